"""Supervised stages saved inside an epoch, by their own checkpoints or at SIGTERM, go on with the same numbers."""

import csv
import os
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import OPENINGS, TINY, adamw, make_trainer, write_jsonl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_rlhf import DPO, SFT, HydraSFT, InstructionData, LoraArgs, PreferenceData

KINDS: dict[str, tuple[Any, Any]] = {
    "SFT": (SFT, InstructionData),
    "HydraSFT": (HydraSFT, PreferenceData),
    "DPO": (DPO, PreferenceData),
}
# Two epochs of five batches, the last of them short.
ROWS = [
    {"prompt": prompt, "chosen": " good" * (1 + i % 4), "rejected": " bad" * (1 + i % 3)}
    for i, prompt in enumerate(OPENINGS)
][:9]


@pytest.fixture
def rows(tmp_path: Path) -> str:
    return write_jsonl(tmp_path / "pairs.jsonl", ROWS)


class SignalAtStep(L.Callback):
    """Sends this process SIGTERM in the batch that ends the given number of optimizer steps."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.state = 0

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.state += 1

    def state_dict(self) -> dict[str, int]:
        return {"state": self.state}


def run(rows: str, folder: Path, kind: str = "HydraSFT", workers: int = 0, **kwargs: Any) -> L.Trainer:
    L.seed_everything(kwargs.pop("seed", 3), verbose=False)
    module_kind, data_kind = KINDS[kind]
    checkpoint = kwargs.pop("ckpt_path", None)
    batch_size = kwargs.pop("batch_size", 2)
    size = kwargs.pop("validation_size", 0)
    data = data_kind(train=rows, validation_size=size, batch_size=batch_size, num_workers=workers)
    module = module_kind(model=TINY, optimizer=adamw(1e-2), lora=LoraArgs(r=4))
    trainer = make_trainer(folder, kwargs.pop("epochs", 2), **kwargs)
    trainer.fit(module, data, ckpt_path=checkpoint)
    return trainer


def logged(folder: Path) -> dict[int, dict[str, str]]:
    """Return the logged rows by step."""
    with (folder / "metrics.csv").open() as file:
        return {int(row["step"]): row for row in csv.DictReader(file)}


def weights(trainer: L.Trainer) -> dict[str, torch.Tensor]:
    return trainer.lightning_module.state_dict()


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize(
    ("kind", "workers", "step", "accumulate"),
    [
        ("HydraSFT", 0, 3, 1),
        ("HydraSFT", 2, 7, 1),
        ("SFT", 0, 8, 1),
        ("DPO", 0, 2, 1),
        ("SFT", 0, 4, 2),
        ("SFT", 0, 5, 1),
        ("SFT", 0, 3, 2),
    ],
)
def test_a_checkpoint_inside_an_epoch_goes_on_with_the_same_numbers(
    kind: str, workers: int, step: int, accumulate: int, rows: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"accumulate_grad_batches": accumulate, "workers": workers}
    steps = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole = run(rows, tmp_path / "whole", kind, callbacks=[steps], **options)
    path = tmp_path / f"step={step}.ckpt"
    resumed = run(rows, tmp_path / "resumed", kind, ckpt_path=path, **options)
    assert whole.global_step == resumed.global_step == 2 * (5 if accumulate == 1 else 3)
    assert equal(weights(whole), weights(resumed))
    assert not equal(weights(whole), torch.load(path, weights_only=True)["state_dict"])
    expected, found = logged(tmp_path / "whole"), logged(tmp_path / "resumed")
    assert list(found) == list(expected)[step:]
    assert all(row == expected[key] for key, row in found.items())


class Epochs(L.Callback):
    """Counts the hooks around the epochs."""

    def __init__(self) -> None:
        self.hooks: list[str] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.hooks.append(f"start {trainer.current_epoch}")

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.hooks.append(f"validated {trainer.current_epoch}")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.hooks.append(f"end {trainer.current_epoch}")


WHEN: dict[str, dict[str, Any]] = {
    "steps": {"every_n_train_steps": 1},
    "time": {"train_time_interval": timedelta(0)},
    "best steps": {"every_n_train_steps": 1, "monitor": "val/loss"},
    "epochs": {},
    "validations": {"save_on_train_epoch_end": False},
}


@pytest.mark.parametrize("when", WHEN)
def test_a_run_that_is_resumed_twice_has_the_epochs_of_one_that_is_not(when: str, rows: str, tmp_path: Path) -> None:
    def start(name: str, **kwargs: Any) -> tuple[L.Trainer, list[str]]:
        every = ModelCheckpoint(tmp_path / name, filename="{step}", save_top_k=-1, **WHEN[when])
        epochs = Epochs()
        options = {"epochs": 3, "validation_size": 1, "limit_val_batches": 1.0, "callbacks": [epochs, every]}
        return run(rows, tmp_path / name, "SFT", **options, **kwargs), epochs.hooks

    whole, hooks = start("whole")
    assert [hook for hook in hooks if hook.startswith("end")] == ["end 0", "end 1", "end 2"]
    # There is no metric to compare before the first validation.
    ends = [4, 8, 12] if when in ("epochs", "validations") else [*range(4 if "best" in when else 1, 13)]
    assert sorted(int(file.stem[5:]) for file in (tmp_path / "whole").glob("*.ckpt")) == ends
    for first, second in ((4, 8), (4, 10), (3, 8)):
        if not {first, second} <= set(ends):
            continue
        name = f"{first} {second}"
        start(f"{name} once", ckpt_path=tmp_path / "whole" / f"step={first}.ckpt")
        twice, left = start(f"{name} twice", ckpt_path=tmp_path / f"{name} once" / f"step={second}.ckpt")
        assert (twice.global_step, twice.current_epoch) == (whole.global_step, whole.current_epoch)
        assert equal(weights(whole), weights(twice))
        # Saved by a validation, the epoch ends after resuming; inside an epoch it was begun before.
        done = hooks.index("start 2") if second == 8 else hooks.index("start 2") + 1
        assert left == hooks[done - (when == "validations") :]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_checkpoint_of_an_epochs_end_goes_on_with_the_next_epochs_order(
    workers: int, rows: str, tmp_path: Path
) -> None:
    ends = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole = run(rows, tmp_path / "whole", workers=workers, callbacks=[ends])
    resumed = run(rows, tmp_path / "resumed", workers=workers, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert equal(weights(whole), weights(resumed))


def test_an_epoch_that_is_limited_ends_where_it_would_have(rows: str, tmp_path: Path) -> None:
    ends = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole = run(rows, tmp_path / "whole", limit_train_batches=3, callbacks=[ends])
    resumed = run(rows, tmp_path / "resumed", limit_train_batches=3, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert equal(weights(whole), weights(resumed))
    assert whole.global_step == resumed.global_step == 6


def test_another_batch_size_is_refused_inside_an_epoch_only(rows: str, tmp_path: Path) -> None:
    callbacks = [
        ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1),
        ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1),
    ]
    run(rows, tmp_path / "whole", callbacks=callbacks)
    assert run(rows, tmp_path / "other", batch_size=3, ckpt_path=tmp_path / "epoch=0.ckpt").global_step == 5 + 3
    with pytest.raises(
        ValueError, match=r"inside an epoch: examples in a batch of all ranks was 2 and is now 3, .* Set"
    ):
        run(rows, tmp_path / "refused", batch_size=3, ckpt_path=tmp_path / "step=9.ckpt")


@pytest.mark.parametrize(("accumulate", "step"), [(1, 3), (1, 5), (1, 7), (2, 2)])
def test_sigterm_saves_the_step_that_is_under_way(
    accumulate: int, step: int, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    options: dict[str, Any] = {"accumulate_grad_batches": accumulate}
    whole = run(rows, tmp_path / "whole", **options)
    watch = SignalAtStep(step)
    checkpoints = ModelCheckpoint(tmp_path / "stopped", filename="last", enable_version_counter=False)
    with pytest.raises(SIGTERMException) as stop:
        run(rows, tmp_path / "stopped", callbacks=[watch, checkpoints], **options)
    assert stop.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before
    # At an epoch's end the run's own checkpoint serves.
    saved, path = step, tmp_path / "stopped" / ("last.ckpt" if step == 5 else "sigterm.ckpt")
    assert f"stopped by SIGTERM after step {saved} in epoch {1 + (step > 5)} of 2, which is saved in {path}" in (
        capsys.readouterr().err
    )
    assert stop.value.checkpoint == str(path)
    content = torch.load(path, weights_only=True)
    assert content["global_step"] == saved
    assert content["callbacks"]["SignalAtStep"]["state"] == watch.state  # other callbacks had their turn
    resumed = run(rows, tmp_path / "resumed", ckpt_path=path, **options)
    assert equal(weights(whole), weights(resumed))
    expected, found = logged(tmp_path / "whole"), logged(tmp_path / "resumed")
    assert list(found) == list(expected)[saved:]
    assert logged(tmp_path / "stopped") | found == expected


@pytest.mark.parametrize("saves", ["every epoch", "seldom"])
def test_sigterm_stops_a_run_whose_every_step_ends_an_epoch(saves: str, rows: str, tmp_path: Path) -> None:
    def start(name: str, *callbacks: L.Callback, **kwargs: Any) -> L.Trainer:
        last = ModelCheckpoint(tmp_path / name, filename="last", every_n_epochs=1 if saves == "every epoch" else 9)
        return run(rows, tmp_path / name, callbacks=[*callbacks, last], epochs=4, batch_size=9, **kwargs)

    whole = start("whole")
    with pytest.raises(SIGTERMException) as stop:
        start("stopped", SignalAtStep(2))
    path = Path(stop.value.checkpoint)
    assert path.name == ("last.ckpt" if saves == "every epoch" else "sigterm.ckpt")
    assert torch.load(path, weights_only=True)["global_step"] == 2
    resumed = start("resumed", ckpt_path=path)
    assert equal(weights(whole), weights(resumed))
    assert logged(tmp_path / "stopped") | logged(tmp_path / "resumed") == logged(tmp_path / "whole")


def test_sigterm_stops_a_run_that_validates_after_every_step(rows: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"validation_size": 1, "limit_val_batches": 1.0, "val_check_interval": 1}
    last = ModelCheckpoint(tmp_path, filename="last", every_n_epochs=9)
    with pytest.raises(SIGTERMException) as stop:
        run(rows, tmp_path, callbacks=[SignalAtStep(1), last], **options)
    assert torch.load(stop.value.checkpoint, weights_only=True)["global_step"] == 2


def test_sigterm_in_a_run_without_checkpoints_saves_nothing(
    rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SIGTERMException) as stop:
        run(rows, tmp_path / "run", callbacks=[SignalAtStep(3)], enable_checkpointing=False)
    assert "after step 3 in epoch 1 of 2, which is not saved: the run has no ModelCheckpoint" in capsys.readouterr().err
    assert stop.value.checkpoint is None
    assert not list(tmp_path.rglob("*.ckpt"))


def test_checkpoints_inside_a_step_are_refused(rows: str, tmp_path: Path) -> None:
    def start(accumulate: int, **when: Any) -> None:
        options = {key: when.pop(key) for key in ("val_check_interval",) if key in when}
        callbacks = [ModelCheckpoint(tmp_path, **when)]
        run(
            rows, tmp_path / "run", callbacks=callbacks, accumulate_grad_batches=accumulate,
            validation_size=1, limit_val_batches=1.0, **options,
        )  # fmt: skip

    with pytest.raises(ValueError, match=r"save_on_exception=True\) would save inside a step"):
        start(1, save_on_exception=True)
    start(1, train_time_interval=timedelta(0))
    with pytest.raises(ValueError, match=r"train_time_interval\) may save between the 2 batches"):
        start(2, train_time_interval=timedelta(0))
    start(2, val_check_interval=2, save_on_train_epoch_end=False)
    with pytest.raises(
        ValueError, match=r"between the 2 batches of one optimizer step .* val_check_interval a multiple"
    ):
        start(2, val_check_interval=3, save_on_train_epoch_end=False)


@pytest.mark.parametrize("limits", [{}, {"max_steps": 8, "epochs": -1}])
def test_the_end_of_a_run_is_saved_by_steps_too(limits: dict[str, Any], rows: str, tmp_path: Path) -> None:
    rare = ModelCheckpoint(tmp_path, filename="last", enable_version_counter=False, every_n_train_steps=3)
    trainer = run(rows, tmp_path / "run", callbacks=[rare], **limits)
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert content["global_step"] == trainer.global_step == (8 if limits else 10)
    assert equal(content["state_dict"], weights(trainer))


def test_what_a_run_was_resumed_from_is_not_saved_again_inside_the_next_step(rows: str, tmp_path: Path) -> None:
    def start(name: str, **kwargs: Any) -> L.Trainer:
        steps = ModelCheckpoint(tmp_path / name, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        return run(rows, tmp_path / name, callbacks=[steps], accumulate_grad_batches=2, **kwargs)

    whole = start("whole")
    resumed = start("resumed", ckpt_path=tmp_path / "whole" / "step=1.ckpt")
    assert equal(weights(whole), weights(resumed))
    assert sorted(int(file.stem[5:]) for file in (tmp_path / "resumed").glob("*.ckpt")) == [2, 3, 4, 5, 6]


@pytest.mark.parametrize("changed", ["rows", "seed"])
def test_other_batches_are_refused_inside_an_epoch(changed: str, rows: str, tmp_path: Path) -> None:
    steps = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    run(rows, tmp_path / "whole", callbacks=[steps])
    fewer = write_jsonl(tmp_path / "fewer.jsonl", ROWS[:7])
    with pytest.raises(ValueError, match=r"resume inside an epoch: (seed was 3 .* 4|number of examples was 9 .* 7)"):
        run(
            fewer if changed == "rows" else rows, tmp_path / "other", seed=4 if changed == "seed" else 3,
            ckpt_path=tmp_path / "step=3.ckpt",
        )  # fmt: skip


def test_sigterm_lets_the_validation_that_is_due_come_first(rows: str, tmp_path: Path) -> None:
    def start(name: str, *callbacks: L.Callback, **kwargs: Any) -> tuple[L.Trainer, list[str]]:
        epochs, last = Epochs(), ModelCheckpoint(tmp_path / name, filename="last")
        options: dict[str, Any] = {"validation_size": 1, "limit_val_batches": 1.0, "val_check_interval": 2}
        trainer = run(rows, tmp_path / name, callbacks=[epochs, *callbacks, last], **options, **kwargs)
        return trainer, epochs.hooks

    whole, hooks = start("whole")
    with pytest.raises(SIGTERMException) as stop:
        start("stopped", SignalAtStep(2))
    assert torch.load(stop.value.checkpoint, weights_only=True)["global_step"] == 3
    resumed, left = start("resumed", ckpt_path=stop.value.checkpoint)
    assert equal(weights(whole), weights(resumed))
    assert hooks == ["start 0", "validated 0", *left]


WORKERS = """
import os, sys, time
sys.path[:0] = sys.argv[1:3]
from test_resume_supervised import *
class Wait(L.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 2:
            print("ready", flush=True)
            time.sleep(3)
if __name__ == "__main__":
    folder = Path(sys.argv[4])
    checkpoints = ModelCheckpoint(folder, filename="last", enable_version_counter=False)
    run(sys.argv[3], folder, workers=2, callbacks=[Wait(), checkpoints])
"""


def test_sigterm_to_every_process_leaves_the_workers_to_the_run(rows: str, tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(WORKERS)
    here = Path(__file__).parent
    command = [sys.executable, str(tmp_path / "run.py"), str(here), str(here.parent), rows, str(tmp_path / "run")]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    assert any(line.startswith("ready") for line in process.stdout)
    os.killpg(process.pid, signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 143, error
    assert "stopped by SIGTERM after step 3 in epoch 1 of 2, which is saved in" in error
    assert torch.load(tmp_path / "run" / "sigterm.ckpt", weights_only=True)["global_step"] == 3


def test_overfit_batches_takes_a_plain_loader(rows: str, tmp_path: Path) -> None:
    assert run(rows, tmp_path / "run", overfit_batches=2).global_step == 4
