"""Supervised stages saved inside an epoch, by their own checkpoints or at SIGTERM, go on with the same numbers."""

import csv
import os
import signal
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
    L.seed_everything(3, verbose=False)
    module_kind, data_kind = KINDS[kind]
    checkpoint = kwargs.pop("ckpt_path", None)
    batch_size = kwargs.pop("batch_size", 2)
    data = data_kind(train=rows, validation_size=0, batch_size=batch_size, num_workers=workers)
    module = module_kind(model=TINY, optimizer=adamw(1e-2), lora=LoraArgs(r=4))
    trainer = make_trainer(folder, 2, **kwargs)
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
    [("HydraSFT", 0, 3, 1), ("HydraSFT", 2, 7, 1), ("SFT", 0, 8, 1), ("DPO", 0, 2, 1), ("SFT", 0, 4, 2)],
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
        ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3),
        ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1),
    ]
    run(rows, tmp_path / "whole", callbacks=callbacks)
    assert run(rows, tmp_path / "other", batch_size=3, ckpt_path=tmp_path / "epoch=0.ckpt").global_step == 5 + 3
    with pytest.raises(ValueError, match=r"cannot resume inside an epoch with 3 examples a batch .* run had 2\. Set"):
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
    # The last step of an epoch is left to the checkpoint of its end.
    saved, path = step if step != 5 else 6, tmp_path / "stopped" / "sigterm.ckpt"
    assert f"stopped by SIGTERM after step {saved} in epoch {1 + (step > 4)} of 2, which is saved in {path}" in (
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
    assert all(row == expected[key] for key, row in found.items())


def test_sigterm_in_a_run_without_checkpoints_saves_nothing(
    rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SIGTERMException) as stop:
        run(rows, tmp_path / "run", callbacks=[SignalAtStep(3)], enable_checkpointing=False)
    assert "after step 3 in epoch 1 of 2, which is not saved: the run has no ModelCheckpoint" in capsys.readouterr().err
    assert stop.value.checkpoint is None
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize("arguments", [{"save_on_exception": True}, {"train_time_interval": timedelta(seconds=1)}])
def test_checkpoints_inside_an_accumulated_step_are_refused(
    arguments: dict[str, Any], rows: str, tmp_path: Path
) -> None:
    run(rows, tmp_path / "run", callbacks=[ModelCheckpoint(tmp_path, **arguments)])
    with pytest.raises(ValueError, match=rf"ModelCheckpoint\({next(iter(arguments))}\) may save between the 2 batches"):
        run(rows, tmp_path / "run", callbacks=[ModelCheckpoint(tmp_path, **arguments)], accumulate_grad_batches=2)


def test_overfit_batches_takes_a_plain_loader(rows: str, tmp_path: Path) -> None:
    assert run(rows, tmp_path / "run", overfit_batches=2).global_step == 4
