"""The numerical guard on a module of two weights: which steps it leaves out, and that nothing else changes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from helpers import make_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lit_rlhf.callbacks import NumericalGuard, SafeCheckpoints
from lit_rlhf.errors import NonFiniteError

NAN, INF = float("nan"), float("inf")


class Line(L.LightningModule):
    """Fits w * x; a NaN or infinity among the data is one in the loss."""

    def __init__(self, optimizer: str = "adamw") -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        self.kind = optimizer

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return (self.weight * batch).pow(2).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.kind == "sgd":
            return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1)
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)


def train(folder: Path, numbers: list[float], mode: str = "skip_step", module: Any = None, **kwargs: Any) -> L.Trainer:
    data = DataLoader(torch.tensor([[x, 1.0] for x in numbers]), batch_size=1)
    module = module or Line()
    callbacks = [NumericalGuard(mode), SafeCheckpoints(), ModelCheckpoint(folder, filename="last")]  # type: ignore[arg-type]
    trainer = make_trainer(folder, 1, **{"callbacks": callbacks, **kwargs})
    trainer.fit(module, data)
    return trainer


def state(trainer: L.Trainer) -> tuple[torch.Tensor, dict[str, Any]]:
    return trainer.lightning_module.weight.detach(), trainer.optimizers[0].state_dict()["state"]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_step_left_out_leaves_no_trace(optimizer: str, bad: float, tmp_path: Path) -> None:
    with pytest.warns(match="minibatch 2 of 4: the loss is"):
        dirty = train(tmp_path / "dirty", [1.0, bad, 2.0, 3.0], module=Line(optimizer), gradient_clip_val=0.5)
    clean = train(tmp_path / "clean", [1.0, 2.0, 3.0], "raise", Line(optimizer), gradient_clip_val=0.5)
    (weight, moments), (expected, expected_moments) = state(dirty), state(clean)
    assert torch.equal(weight, expected)
    for key, value in expected_moments[0].items():
        assert torch.equal(moments[0][key], value) if torch.is_tensor(value) else moments[0][key] == value
    assert dirty.callback_metrics["train/skipped_steps"] == 1.0
    assert dirty.global_step == 4


def test_accumulated_minibatches_are_left_out_together(tmp_path: Path) -> None:
    with pytest.warns(match=r"the loss is nan \(minibatch 3\)"):
        dirty = train(tmp_path / "dirty", [1.0, 2.0, NAN, 4.0, 5.0, 6.0], accumulate_grad_batches=2)
    clean = train(tmp_path / "clean", [1.0, 2.0, 5.0, 6.0], accumulate_grad_batches=2)
    assert torch.equal(state(dirty)[0], state(clean)[0])


def test_a_gradient_of_a_finite_loss(tmp_path: Path) -> None:
    class Root(Line):
        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return (self.weight * batch).abs().sqrt().sum()  # infinite slope at 0

    with pytest.raises(NonFiniteError, match="minibatch 2 of 2: the loss is finite, its gradient is not") as error:
        train(tmp_path, [1.0, 0.0], "raise", Root())
    assert "1 of 1 gradients are not finite: weight" in str(error.value)


def test_huge_but_finite_gradients_pass(tmp_path: Path) -> None:
    # Their squares overflow float32, as in the norm that clips; the guard takes the largest number instead.
    class Steep(Line):
        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return (self.weight * batch).sum()

    train(tmp_path, [1e30], "raise", Steep("sgd"))


def test_the_error_says_where_what_to_do_and_which_checkpoint_is_good(tmp_path: Path) -> None:
    class Later(Line):
        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return super().training_step(batch, batch_idx) * (NAN if self.current_epoch == 1 else 1.0)

    with pytest.raises(NonFiniteError) as error:
        train(tmp_path, [1.0, 2.0], "raise", Later(), max_epochs=3)
    text = str(error.value)
    assert text.startswith("epoch 2 of 3, training, minibatch 1 of 2: the loss is nan")
    assert f"last good checkpoint: {tmp_path / 'last.ckpt'}" in text
    assert f"resume with --ckpt_path {tmp_path / 'last.ckpt'}" in text
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["epoch"] == 0
    with pytest.raises(NonFiniteError, match="none was saved yet"):
        train(tmp_path / "new", [NAN], "raise")


def test_broken_weights_never_reach_a_checkpoint(tmp_path: Path) -> None:
    class Broken(Line):
        def on_train_batch_end(self, *args: Any) -> None:
            if self.current_epoch == 1:
                self.weight.data[0] = INF

    for mode in ("raise", "skip_step"):
        folder = tmp_path / mode
        with pytest.raises(NonFiniteError, match="1 of 1 trained weights are not finite: weight"):
            train(folder, [1.0], mode, Broken(), max_epochs=2)
        assert torch.load(folder / "last.ckpt", weights_only=True)["epoch"] == 0


def test_skipping_gives_up_when_nothing_else_happens(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="100 steps in a row were skipped"):
        train(tmp_path, [NAN] * 120)
    alternating = train(tmp_path, [1.0, *([NAN] * 60)] * 2)
    assert alternating.callback_metrics["train/skipped_steps"] == 120.0


def test_a_loss_that_is_not_finite_counts_though_its_gradient_is(tmp_path: Path) -> None:
    class Constant(Line):
        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return super().training_step(batch, batch_idx) + (NAN if batch_idx == 1 else 0.0)

    with pytest.raises(NonFiniteError, match="minibatch 2 of 3: the loss is nan"):
        train(tmp_path, [1.0, 2.0, 3.0], "raise", Constant())


def test_steps_left_out_are_said_once_an_iteration(tmp_path: Path) -> None:
    with pytest.warns(match="this optimizer step is") as said:
        train(tmp_path, [1.0, NAN, 2.0, NAN, NAN], max_epochs=2)
    texts = [str(w.message) for w in said if "this optimizer step is" in str(w.message)]
    assert [text.split(",")[0] for text in texts] == ["epoch 1 of 2", "epoch 2 of 2"]


class LeftOut(Line):
    """Each batch says whether it belongs to a rollout that was left out; its own numbers are finite."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step(batch.numbers, batch_idx)


def train_left_out(folder: Path, left_out: list[bool]) -> L.Trainer:
    rows = [SimpleNamespace(numbers=torch.tensor([[1.0 + i, 1.0]]), left_out=out) for i, out in enumerate(left_out)]
    data = DataLoader(rows, batch_size=1, collate_fn=lambda batch: batch[0])  # type: ignore[arg-type]
    trainer = make_trainer(folder, 1, callbacks=[NumericalGuard("skip_step")], enable_checkpointing=False)
    trainer.fit(LeftOut(), data)
    return trainer


def test_finite_minibatches_of_a_rollout_left_out_move_nothing(tmp_path: Path) -> None:
    trainer = train_left_out(tmp_path, [True, False, True])
    clean = train(tmp_path / "clean", [2.0])
    assert torch.equal(state(trainer)[0], state(clean)[0])
    assert trainer.callback_metrics["train/skipped_steps"] == 2.0
    with pytest.raises(NonFiniteError, match="100 steps in a row"):
        train_left_out(tmp_path, [True] * 120)
