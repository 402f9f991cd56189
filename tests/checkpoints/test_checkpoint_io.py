"""Checkpoint files: complete or absent, whatever the disk does; torn and foreign ones are refused by name."""

import errno
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_ppo, make_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lit_rlhf import PromptData
from lit_rlhf.checkpoints import AtomicCheckpointIO, CheckpointError
from lit_rlhf.checkpoints.records import read_checkpoint

FULL = OSError(errno.ENOSPC, "No space left on device")


class Payload:
    """What an attacker would pickle."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch /tmp/lit_rlhf_was_here",))


def content(value: float) -> dict[str, Any]:
    return {"state_dict": {"w": torch.full((5000,), value)}, "epoch": int(value)}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fail_at(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise FULL

    def fail_late(value: Any, file: Any) -> None:
        file.write(b"half of it")
        raise FULL

    if where == "torch.save":
        monkeypatch.setattr(torch, "save", fail_late)
    else:
        monkeypatch.setattr(os, where, fail)


@pytest.mark.parametrize("where", ["torch.save", "fsync", "replace"])
def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_else(
    where: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    io, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint(content(1.0), path)
    with monkeypatch.context() as patch:
        fail_at(patch, where)
        message = r"last.ckpt could not be written: No space left on device, .* MB free in .* is intact"
        with pytest.raises(CheckpointError, match=message):
            io.save_checkpoint(content(2.0), path)
        with pytest.raises(CheckpointError, match="There is no earlier file of that name"):
            io.save_checkpoint(content(2.0), tmp_path / "other.ckpt")
    assert io.load_checkpoint(path)["epoch"] == 1
    assert names(tmp_path) == ["last.ckpt"]
    io.save_checkpoint(content(3.0), path)
    assert torch.equal(io.load_checkpoint(path)["state_dict"]["w"], torch.full((5000,), 3.0))


def test_errors_that_are_not_the_disks_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises((pickle.PicklingError, AttributeError)):
        AtomicCheckpointIO().save_checkpoint({"bad": lambda: None}, tmp_path / "x.ckpt")
    assert names(tmp_path) == []


LIMITED = """
import resource, sys
from lit_rlhf.checkpoints import AtomicCheckpointIO, CheckpointError
import torch
io, path = AtomicCheckpointIO(), sys.argv[1]
io.save_checkpoint({"state_dict": {"w": torch.ones(1000)}}, path)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    io.save_checkpoint({"state_dict": {"w": torch.zeros(1_000_000)}}, path)
except CheckpointError as error:
    print(error)
"""


def test_a_write_that_the_system_cuts_short(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    done = subprocess.run([sys.executable, "-c", LIMITED, str(path)], check=True, capture_output=True, text=True)
    assert f"checkpoint {path} could not be written: File too large" in done.stdout
    assert torch.equal(AtomicCheckpointIO().load_checkpoint(path)["state_dict"]["w"], torch.ones(1000))
    assert names(tmp_path) == ["last.ckpt"]


def test_what_a_killed_process_left_is_cleared_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / f".last.ckpt.{ended.pid}.partial").write_bytes(b"half")
    (tmp_path / f".last.ckpt.{os.getppid()}.partial").write_bytes(b"busy")
    AtomicCheckpointIO().save_checkpoint(content(1.0), tmp_path / "last.ckpt")
    assert names(tmp_path) == [f".last.ckpt.{os.getppid()}.partial", "last.ckpt"]


def test_a_run_whose_disk_is_full_says_so_and_its_last_checkpoint_resumes(
    prompts: PromptData, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class FillsUp(ModelCheckpoint):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 1:
                fail_at(monkeypatch, "torch.save")
            super().on_train_epoch_end(trainer, pl_module)

    checkpoint = FillsUp(tmp_path, filename="{epoch}")  # deletes epoch 0's file once epoch 1's is written
    trainer = make_trainer(tmp_path / "log", 3, callbacks=[checkpoint])
    with pytest.raises(CheckpointError, match=r"epoch=1\.ckpt could not be written"):
        trainer.fit(make_ppo(), prompts)
    monkeypatch.undo()
    assert [name for name in names(tmp_path) if name != "log"] == ["epoch=0.ckpt"]
    resumed = make_trainer(tmp_path / "again", 3)
    resumed.fit(make_ppo(), prompts, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert resumed.global_step == 3 * 4


def test_a_plain_trainer_gets_the_checkpoint_io_and_a_users_own_is_kept(prompts: PromptData, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, 1)
    trainer.fit(make_ppo(), prompts)
    assert type(trainer.strategy.checkpoint_io) is AtomicCheckpointIO

    class Own(TorchCheckpointIO):
        pass

    trainer = make_trainer(tmp_path, 1, plugins=[Own()])
    trainer.fit(make_ppo(), prompts)
    assert type(trainer.strategy.checkpoint_io) is Own


def test_saving_when_an_exception_stops_an_iteration_is_refused(prompts: PromptData, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, 1, callbacks=[ModelCheckpoint(tmp_path, save_on_exception=True)])
    with pytest.raises(ValueError, match="save_on_exception=True"):
        trainer.fit(make_ppo(), prompts)


def bad_files(good: Path, folder: Path) -> dict[str, tuple[Path, str]]:
    """Return bad checkpoints by kind, each with what is said about it."""
    data = good.read_bytes()
    made: dict[str, tuple[bytes, str]] = {"empty": (b"", "is empty")}
    for length in (1, 3, 64, len(data) // 4, len(data) // 2, len(data) - 1000, len(data) - 1):
        made[f"torn at {length}"] = (data[:length], "cannot be read: it is truncated ")
    made["text"] = (b"version https://git-lfs.github.com/spec/v1\n", "cannot be read: it is truncated ")
    files = {}
    for kind, (written, said) in made.items():
        path = folder / f"{kind}.ckpt"
        path.write_bytes(written)
        files[kind] = (path, said)
    for kind, value, said in (
        ("code", {"state_dict": {}, "x": Payload()}, "is refused: it holds posix.system"),
        ("tensors", {"w": torch.ones(2)}, "it holds no state_dict"),
        ("list", [1], "it holds no state_dict"),
        ("foreign", {"state_dict": {}, "pytorch-lightning_version": "2.6.0", "loops": {}}, "not written by lit_rlhf"),
    ):
        torch.save(value, folder / f"{kind}.ckpt")
        files[kind] = (folder / f"{kind}.ckpt", said)
    for protocol, said in (
        (2, "is refused: it holds posix.system"),
        (4, "cannot be read: it is truncated "),
    ):
        path = folder / f"pickle {protocol}.ckpt"
        path.write_bytes(pickle.dumps(Payload(), protocol))
        files[path.stem] = (path, said)
    files["missing"] = (folder / "missing.ckpt", "does not exist")
    files["folder"] = (folder, "is a folder")
    return files


def test_bad_files_are_refused_by_name_when_a_run_resumes(prompts: PromptData, tmp_path: Path) -> None:
    make_trainer(tmp_path / "good", 1).fit(make_ppo(), prompts)
    (tmp_path / "bad").mkdir()
    for kind, (path, said) in bad_files(tmp_path / "good" / "last.ckpt", tmp_path / "bad").items():
        with pytest.raises((CheckpointError, ValueError), match=said) as error:
            make_trainer(tmp_path / "again", 2).fit(make_ppo(), prompts, ckpt_path=path)
        assert str(path) in str(error.value), kind
        assert len(str(error.value).splitlines()) == 1, kind
    assert not Path("/tmp/lit_rlhf_was_here").exists()


def test_bad_files_are_refused_by_name_as_an_earlier_stage(
    hydra_checkpoint: Path, prompts: PromptData, tmp_path: Path
) -> None:
    for kind, (path, _) in bad_files(hydra_checkpoint, tmp_path).items():
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            read_checkpoint(path)
        assert str(path) in str(error.value), kind
    path = tmp_path / f"torn at {hydra_checkpoint.stat().st_size - 1}.ckpt"
    for name in ("policy_checkpoint", "reward_checkpoint"):
        with pytest.raises(ValueError, match="cannot be read"):
            make_trainer(tmp_path / "run", 1).fit(make_ppo(**{name: str(path)}), prompts)
    assert not Path("/tmp/lit_rlhf_was_here").exists()
