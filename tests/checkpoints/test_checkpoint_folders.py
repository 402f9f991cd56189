"""Folders of shards: complete or absent at whatever step a write fails or is killed; bad ones are refused by name."""

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers import make_ppo, make_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard

from lit_rlhf import PromptData
from lit_rlhf.checkpoints import folders as checkpoint_folders
from lit_rlhf.checkpoints.files import CheckpointError
from lit_rlhf.checkpoints.folders import load_folder, put_in_place, read_rest, remove, save_folder, settle
from lit_rlhf.strategies import FSDP2Strategy

FULL = OSError(errno.ENOSPC, "No space left on device")
STEPS = [(os, "fsync"), (os, "mkdir"), (Path, "rename"), (torch, "save")]


class Run:
    """A model with an optimizer, sharded if there is a mesh, all of whose numbers follow from one."""

    mesh: ClassVar[Any] = None

    def __init__(self, value: float, width: int = 3) -> None:
        self.model = torch.nn.Linear(4, width)
        if self.mesh is not None:
            fully_shard(self.model, mesh=self.mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=value)
        self.model(torch.ones(2, 4)).sum().backward()
        self.optimizer.step()
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.fill_(value)

    def shards(self) -> dict[str, Any]:
        optimizer = get_optimizer_state_dict(self.model, self.optimizer)
        return {"state_dict": get_model_state_dict(self.model), "optimizer_0": optimizer}

    def save(self, path: Path) -> None:
        save_folder(path, self.shards(), {"epoch": self.optimizer.param_groups[0]["lr"]})

    def load(self, path: Path) -> float:
        """Load, and return the one number; fail if parts of several checkpoints are mixed."""
        rest = load_folder(path, self.model, [self.optimizer])
        assert all(bool((parameter == rest["epoch"]).all()) for parameter in self.model.parameters())
        assert self.optimizer.param_groups[0]["lr"] == rest["epoch"]
        return rest["epoch"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fail_at(monkeypatch: pytest.MonkeyPatch, step: int, fail: Callable[[], None]) -> list[int]:
    """Let the given of all steps of the disk fail; -1 only counts them."""
    seen = [0]

    def watch(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            seen[0] += 1
            if seen[0] == step:
                fail()
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    for owner, name in STEPS:
        watch(owner, name)
    return seen


def disk_full() -> None:
    raise FULL


def failure(work: Callable[[], None]) -> str | None:
    try:
        work()
    except CheckpointError as error:
        return str(error)
    return None


def test_a_write_that_fails_at_any_step_leaves_one_whole_checkpoint(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path, ends, step = tmp_path / "last.ckpt", [], 0
    Run(0.5).save(path)
    while True:
        step += 1
        with monkeypatch.context() as patch:
            seen = fail_at(patch, step, disk_full)
            said = failure(lambda: Run(0.25).save(path))
        if said is None:  # nothing failed, or nothing that matters
            assert Run(1.0).load(path) == 0.25
            if seen[0] < step:
                break
            Run(0.5).save(path)
            continue
        assert "last.ckpt could not be written: No space left on device" in said
        assert "The earlier folder of that name is intact" in said
        assert len(said.splitlines()) == 1
        ends.append(Run(1.0).load(path))
        assert ".last.ckpt.partial" not in names(tmp_path)
        Run(0.5).save(path)
        assert names(tmp_path) == ["last.ckpt"]
    # Until the new one has its name, the old one is there.
    assert ends == sorted(ends, reverse=True)
    assert ends.count(0.5) >= 10


def test_a_first_write_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for step in (2, 5, 9):
        with monkeypatch.context() as patch:
            fail_at(patch, step, disk_full)
            with pytest.raises(CheckpointError, match="There is no earlier file of that name"):
                Run(0.5).save(tmp_path / "last.ckpt")
        assert names(tmp_path) == []


def disturb(folder: Path, world: int, every: int, how: str) -> list[dict[str, Any]]:
    command = [sys.executable, str(Path(__file__).parent / "kill_folder.py"), str(folder), str(world), str(every), how]
    searched = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": searched}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(("world", "every"), [(1, 1), (2, 3)])
def test_ranks_killed_at_any_step_leave_one_whole_checkpoint(world: int, every: int, tmp_path: Path) -> None:
    rows = disturb(tmp_path, world, every, "kill")
    assert {row["rank"] for row in rows} == set(range(world))
    assert sum(row["said"] is None for row in rows) >= 8
    for rank in range(world):
        held = [row["holds"] for row in rows if row["rank"] == rank]
        # Until the new one has its name, the old one is there.
        assert held == sorted(held, reverse=True)
        assert held[0] == 0.5
        assert held[-1] == 0.25


@pytest.mark.slow
def test_a_disk_that_fails_one_rank_ends_all_in_the_same_line(tmp_path: Path) -> None:
    rows = disturb(tmp_path, 2, 3, "fail")
    failed = [row for row in rows if row["said"][0][0] or row["said"][1][0]]
    assert {row["rank"] for row in failed} == {0, 1}
    for row in failed:
        texts = {text for text, _ in row["said"]}
        assert len(texts) == 1
        assert "last.ckpt could not be written: No space left on device" in texts.pop()
    assert all(row["partial"] == [] for row in rows)
    assert all(row["holds"] == 0.25 for row in rows if row not in failed)
    assert sum(row["holds"] == 0.5 for row in failed) >= 8


def test_a_kill_between_the_renamings_is_settled_by_the_next_reader_or_writer(tmp_path: Path) -> None:
    path, previous = tmp_path / "last.ckpt", tmp_path / ".last.ckpt.previous"
    Run(0.5).save(path)
    path.rename(previous)
    assert Run(1.0).load(path) == 0.5
    path.rename(previous)
    Run(0.25).save(path)
    assert names(tmp_path) == ["last.ckpt"]
    shutil.copytree(path, previous)  # killed just before it was removed
    settle(path)
    Run(0.125).save(path)
    assert names(tmp_path) == ["last.ckpt"]
    assert Run(1.0).load(path) == 0.125


def test_a_folder_takes_a_files_place_and_removal_is_never_halfway(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "last.ckpt"
    path.write_bytes(b"a file of that name")
    Run(0.5).save(path)
    assert Run(1.0).load(path) == 0.5
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)  # killed as soon as it deletes
        remove(path)
    assert names(tmp_path) == [".last.ckpt.removed"]
    Run(0.5).save(tmp_path / "other.ckpt")
    assert names(tmp_path) == ["other.ckpt"]


class Payload:
    """What an attacker would pickle."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.marker}",))


def with_code(marker: Path) -> dict[str, Callable[[Path], Any]]:
    def index(folder: Path) -> None:
        (folder / ".metadata").write_bytes(pickle.dumps(Payload(marker)))

    def index_entry(folder: Path) -> None:
        content = pickle.loads((folder / ".metadata").read_bytes())
        content.planner_data = Payload(marker)
        (folder / ".metadata").write_bytes(pickle.dumps(content))

    def rest(folder: Path) -> None:
        torch.save({"epoch": Payload(marker)}, folder / "meta.pt")

    def value(folder: Path) -> None:
        shards = Run(0.5).shards()
        shards["optimizer_0"]["param_groups"][0]["lr"] = Payload(marker)
        dcp.save(shards, checkpoint_id=folder)

    return {"index": index, "index entry": index_entry, "rest": rest, "value": value}


def test_code_in_any_part_is_refused_and_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "code_was_run"
    for kind, spoil in with_code(marker).items():
        path = tmp_path / f"{kind}.ckpt"
        Run(0.5).save(path)
        spoil(path)
        with pytest.raises(CheckpointError, match=f"checkpoint {path}.*posix.system") as error:
            Run(1.0).load(path)
        assert len(str(error.value).splitlines()) == 1, kind
        assert not marker.exists(), kind


def spoiled(path: Path) -> dict[str, tuple[Callable[[], Any], str]]:
    def cut(name: str, part: float) -> None:
        data = (path / name).read_bytes()
        (path / name).write_bytes(data[: int(len(data) * part)])

    def damage() -> None:
        data = bytearray((path / "__0_0.distcp").read_bytes())
        data[100:-100] = bytes(len(data) - 200)
        (path / "__0_0.distcp").write_bytes(data)

    def elsewhere() -> None:
        content = pickle.loads((path / ".metadata").read_bytes())
        for part in content.storage_data.values():
            part.relative_path = "../other/__0_0.distcp"
        (path / ".metadata").write_bytes(pickle.dumps(content))

    return {
        "rest missing": ((path / "meta.pt").unlink, "incomplete or not a checkpoint: meta.pt is missing"),
        "rest cut": (lambda: cut("meta.pt", 0.5), "meta.pt cannot be read: it is truncated"),
        "rest empty": (lambda: cut("meta.pt", 0.0), "meta.pt is empty"),
        "rest a list": (lambda: torch.save([1], path / "meta.pt"), "holds no dict"),
        "index missing": ((path / ".metadata").unlink, r"incomplete or not a checkpoint: .metadata is missing"),
        "index cut": (lambda: cut(".metadata", 0.9), ".metadata cannot be read: it is truncated"),
        "index a list": (lambda: (path / ".metadata").write_bytes(pickle.dumps([1])), "holds no index"),
        "shard missing": ((path / "__0_0.distcp").unlink, "is incomplete: __0_0.distcp is missing"),
        "shard cut": (lambda: cut("__0_0.distcp", 0.99), "is incomplete: __0_0.distcp is cut short"),
        "shard damaged": (damage, "is damaged or belongs to another model"),
        "shard elsewhere": (elsewhere, "its shards are outside it"),
        "empty folder": (lambda: [file.unlink() for file in path.iterdir()], "is missing"),
    }


def test_torn_and_foreign_folders_are_refused_by_name(tmp_path: Path) -> None:
    for kind in spoiled(tmp_path):
        path = tmp_path / f"{kind}.ckpt"
        Run(0.5).save(path)
        spoil, said = spoiled(path)[kind]
        spoil()
        with pytest.raises(CheckpointError, match=said) as error:
            Run(1.0).load(path)
        assert str(path) in str(error.value), kind
        assert len(str(error.value).splitlines()) == 1, kind
    Run(0.5, width=5).save(tmp_path / "wide.ckpt")
    save_folder(tmp_path / "other.ckpt", {"state_dict": {"x": torch.ones(2)}}, {})
    for name in ("wide", "other"):
        with pytest.raises(
            CheckpointError, match=f"{name}.ckpt is damaged or belongs to another model than this run's"
        ):
            Run(1.0).load(tmp_path / f"{name}.ckpt")


# ---- runs -------------------------------------------------------------------------------------------------------


@pytest.fixture
def group() -> Iterator[None]:
    """Leave no process group and no environment of one behind."""
    before = dict(os.environ)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


def sharded(folder: Path, epochs: int, **kwargs: Any) -> Any:
    return make_trainer(folder, epochs, strategy=FSDP2Strategy(save_distributed_checkpoint=True), **kwargs)


def test_a_run_whose_disk_is_full_keeps_its_last_folder_and_resumes(
    group: None, prompts: PromptData, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class FillsUp(ModelCheckpoint):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if trainer.current_epoch == 2:
                fail_at(monkeypatch, 6, disk_full)
            super().on_train_epoch_end(trainer, pl_module)

    saved = tmp_path / "saved"
    checkpoint = FillsUp(saved, filename="{epoch}")  # deletes epoch 0's folder once epoch 1's is written
    with pytest.raises(CheckpointError, match=r"epoch=2\.ckpt could not be written: No space left on device"):
        sharded(tmp_path / "log", 4, callbacks=[checkpoint]).fit(make_ppo(), prompts)
    monkeypatch.undo()
    assert names(saved) == ["epoch=1.ckpt"]
    path = saved / "epoch=1.ckpt"
    make_ppo().check_checkpoint(str(path), 2)
    with pytest.raises(ValueError, match=r"has 2 finished epochs, but trainer\.max_epochs is 1"):
        make_ppo().check_checkpoint(str(path), 1)
    with pytest.raises(ValueError, match="cannot resume: the checkpoint's layout differs"):
        make_ppo(layout="j_hydra").check_checkpoint(str(path))
    path.rename(saved / ".epoch=1.ckpt.previous")
    make_ppo().check_checkpoint(str(path))
    resumed = sharded(tmp_path / "again", 3)
    resumed.fit(make_ppo(), prompts, ckpt_path=path)
    assert resumed.global_step == 3 * 4


def test_a_file_takes_a_folders_place(group: None, prompts: PromptData, tmp_path: Path) -> None:
    sharded(tmp_path, 1).fit(make_ppo(), prompts)
    assert (tmp_path / "last.ckpt" / "meta.pt").is_file()
    path = tmp_path / "last.ckpt"
    make_trainer(tmp_path, 2, strategy=FSDP2Strategy()).fit(make_ppo(), prompts, ckpt_path=path)
    assert path.is_file()
    assert not [name for name in names(tmp_path) if name.startswith(".")]
    make_ppo().check_checkpoint(str(path), 2)


def test_bad_folders_end_a_run_in_one_line(group: None, prompts: PromptData, tmp_path: Path) -> None:
    sharded(tmp_path, 1).fit(make_ppo(), prompts)
    path = tmp_path / "last.ckpt"
    with pytest.raises(CheckpointError, match="is damaged or belongs to another model") as error:
        sharded(tmp_path / "again", 2).fit(make_ppo(layout="j_hydra"), prompts, ckpt_path=path)
    assert len(str(error.value).splitlines()) == 1
    (path / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"is incomplete: __0_0\.distcp is missing"):
        make_ppo().check_checkpoint(str(path))
    with pytest.raises(CheckpointError, match=r"is incomplete: __0_0\.distcp is missing"):
        sharded(tmp_path / "again", 2).fit(make_ppo(), prompts, ckpt_path=path)
    with pytest.raises(CheckpointError, match="is incomplete"):
        read_rest(path)


def test_a_reader_that_puts_the_earlier_one_back_does_not_stop_the_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, partial = tmp_path / "last.ckpt", tmp_path / ".last.ckpt.partial"
    for folder, name in ((path, "old"), (partial, "new")):
        folder.mkdir()
        (folder / name).touch()
    rename, readers = Path.rename, []

    def meets_a_reader(self: Path, target: Path) -> Path:
        if self == partial and not readers:
            readers.append(settle(path))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", meets_a_reader)
    put_in_place(partial, path)
    assert readers == [None]
    assert [file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*")] == ["last.ckpt", "last.ckpt/new"]


def test_a_folder_that_may_not_be_read_is_not_said_to_be_unwritable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checkpoint_folders, "read_rest", refuse)
    with pytest.raises(CheckpointError, match=r"last.ckpt cannot be read: Permission denied$"):
        load_folder(tmp_path / "last.ckpt", torch.nn.Linear(1, 1), [])
