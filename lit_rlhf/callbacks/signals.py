"""SIGTERM, as schedulers send it: the run saves what is complete, stops cleanly and says how to resume."""

import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lit_rlhf.checkpoints import is_last_epoch, is_saved, last_checkpoint, model_checkpoints
from lit_rlhf.rollout.non_finite import place
from lit_rlhf.rollout.phases import PhaseListener

EXIT_CODE = 128 + signal.SIGTERM
FILE_NAME = "sigterm.ckpt"


class StopOnSigterm(PhaseListener, Checkpoint):
    """Stops all ranks at the same point once any of them has received SIGTERM; the exit status is 143.

    Subclasses define where, and what is saved there: ``sigterm.ckpt`` beside the files of the run's first
    ModelCheckpoint, nothing in runs without one. A running checkpoint or validation is finished first. Costs nothing on
    one process, and on several one all-reduced number per minibatch.

    Lightning's own handler stops each rank wherever it is, possibly between a step and its bookkeeping, which can leave
    other ranks waiting; it is replaced until training ends. As a ``Checkpoint`` this callback runs after all others,
    whose state it saves.
    """

    def __init__(self) -> None:
        super().__init__()
        self._received = False
        self._before: Callable[[int, FrameType | None], object] | int | None = None
        self._report: str | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the handler."""
        self._received, self._report = False, None
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = True

    def _restore(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the previous handler."""
        self._restore()

    def is_requested(self, trainer: Trainer) -> bool:
        """Return whether any rank has received the signal; every rank calls this."""
        received = self._received or trainer.received_sigterm
        if trainer.world_size > 1:
            flag = torch.tensor(float(received), device=trainer.strategy.root_device)
            received = bool(trainer.strategy.reduce(flag, reduce_op="sum"))
        return received

    def stop(self, path: str | None, report: str) -> NoReturn:
        """End the run.

        Args:
            path: The checkpoint to resume from.
            report: Where the run stopped, what is lost and what is saved.
        """
        self._report = f"{report} {path}" if path else report
        stop = SIGTERMException()
        stop.checkpoint = path  # type: ignore[attr-defined]
        raise stop

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the previous handler, and say where the run stopped."""
        self._restore()
        if not isinstance(exception, SIGTERMException):
            return
        _say(f"stopped by SIGTERM {self._report or 'before training'}")
        if trainer.is_global_zero:
            # On rank 0 only: if another process exited with an error status, Lightning's launcher would kill this one.
            exception.code = EXIT_CODE


class StopAfterStep(StopOnSigterm):
    """Stops a supervised stage after the current optimizer step, and saves it.

    If validation is due after that step, it runs first and the run stops one step later; at the end of an epoch the run
    stops after validation, with what a ModelCheckpoint has just saved, if one has.
    """

    def __init__(self) -> None:
        super().__init__()
        self._postponed = False
        self._ended: tuple[str | None, str] | None = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Save and stop, but not inside an accumulated step."""
        loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
        if not self.is_requested(trainer) or loop._should_accumulate() or loop._is_training_done:
            return
        if fetcher is not None and loop._should_check_val_fx(fetcher) and not self._postponed:
            self._postponed = True
            return
        trainer._logger_connector.update_train_step_metrics()  # Lightning would do so only after this hook
        self.stop(*self._saved(trainer, pl_module))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save."""
        if not is_last_epoch(trainer) and self.is_requested(trainer):
            self._ended = self._saved(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop, now that the previous epoch has logged its metrics."""
        if self._ended is not None:
            ended, self._ended = self._ended, None
            self.stop(*ended)

    def _saved(self, trainer: Trainer, pl_module: LightningModule) -> tuple[str | None, str]:
        """Save what is not saved yet; return the arguments of :meth:`stop`."""
        where = f"after step {trainer.global_step} in {place(pl_module)}"
        path = last_checkpoint(trainer) if is_saved(trainer) else _path(trainer)
        if path is None:
            where = f"{where}, which is not saved: the run has no ModelCheckpoint"
            path = last_checkpoint(trainer)
            return path, f"{where}; it was resumed from" if path else where
        if not is_saved(trainer):
            trainer.save_checkpoint(path)
        return path, f"{where}, which is saved in"


class StopInIteration(StopOnSigterm):
    """Stops an on-policy run before the next phase or minibatch, and abandons the current iteration.

    Runs are resumed only at the ends of iterations. Where no ModelCheckpoint saves an iteration (``every_n_epochs``
    above 1), its final state (trained weights and optimizer) is kept in host memory until the next one ends. That costs
    one copy per iteration, and where a checkpoint gathers shards (FSDP2 without folders, ZeRO-1) the gathering.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kept: dict[str, Any] | None = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the iteration's end, unless it was just saved."""
        self._kept = None  # before the next one is made
        if model_checkpoints(trainer) and not is_saved(trainer):
            self._kept = _on_host(trainer._checkpoint_connector.dump_checkpoint(False))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the previous handler, and free the memory."""
        super().on_train_end(trainer, pl_module)
        self._kept = None

    def on_phase_start(self, trainer: Trainer, pl_module: LightningModule, phase: str) -> None:
        """Stop before generation, scoring and training; ranks may validate at different times."""
        if trainer.training and phase != "evaluation":
            self._stop_if_requested(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Stop before a minibatch."""
        self._stop_if_requested(trainer, pl_module)

    def _stop_if_requested(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.is_requested(trainer):
            return
        where = f"in {place(pl_module)}, which is abandoned"
        if self._kept is not None and (path := _path(trainer)):
            kept, self._kept = self._kept, None
            trainer.strategy.save_checkpoint(kept, path)
            trainer.strategy.barrier()
            self.stop(path, f"{where}; the end of the one before is saved in")
        path = last_checkpoint(trainer)
        self.stop(path, f"{where}; " + ("the last complete one is in" if path else "no checkpoint was saved yet"))


def _path(trainer: Trainer) -> str | None:
    """Return where to save: beside the files of the first ModelCheckpoint."""
    folders = [callback.dirpath for callback in model_checkpoints(trainer) if callback.dirpath]
    return f"{folders[0]}/{FILE_NAME}" if folders else None


def _on_host(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return a copy that training does not change, in host memory."""
    copied: dict[str, Any] = tree_map_only(Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), checkpoint)
    return copied


@rank_zero_only
def _say(text: str) -> None:
    print(f"lit-rlhf: {text}", file=sys.stderr, flush=True)
