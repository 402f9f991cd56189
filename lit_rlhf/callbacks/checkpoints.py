"""When checkpoints are saved, and what writes them."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lit_rlhf.checkpoints import AtomicCheckpointIO, is_last_epoch, model_checkpoints
from lit_rlhf.errors import ConfigError


class SafeCheckpoints(Callback):
    """Writes and reads every checkpoint by :class:`AtomicCheckpointIO`, unless the trainer has its own CheckpointIO.

    Modules add it in ``configure_callbacks``. It leaves alone the folders that sharded strategies write.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Install the checkpoint IO.

        Raises:
            ValueError: A ModelCheckpoint would save where a run cannot be resumed: inside an RL iteration or a step.
        """
        if stage == "fit":
            for callback in model_checkpoints(trainer):
                _check_when(callback, trainer.accumulate_grad_batches)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Mark a resumed run's step as saved; Lightning would save it again one batch later."""
        for callback in model_checkpoints(trainer):
            callback._last_global_step_saved = trainer.global_step

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse to save between the batches of one optimizer step.

        Raises:
            ValueError: A supervised stage is trained, and a step is incomplete; a checkpoint holds no gradients.
        """
        if hasattr(pl_module, "rollout_buffer"):  # saved at iterations' ends only, some of which cut a step short
            return
        if (trainer.training or trainer.validating) and trainer.fit_loop._should_accumulate():
            raise ConfigError(
                f"a checkpoint would be saved between the {trainer.accumulate_grad_batches} batches of one optimizer "
                "step (accumulate_grad_batches), whose gradients it does not hold. If validation triggers "
                "it, make val_check_interval a multiple of that number"
            )


class SaveAtEpochEnd(Checkpoint):
    """Postpones a checkpoint that is due, by steps or by time, at an epoch's last batch to the end of the epoch.

    When resumed from the last batch, Lightning continues with the next epoch, skips this one's validation, and
    miscounts epochs when that run is resumed again. The end of a run is saved as if a checkpoint were due, since later
    stages start from it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._held: list[tuple[ModelCheckpoint, float | None]] = []
        self._due: list[ModelCheckpoint] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Suppress the checkpoints of the last batch: all start hooks run before the end hooks."""
        if not trainer.fit_loop.epoch_loop._num_ready_batches_reached():
            return
        for callback in model_checkpoints(trainer):
            callback._should_skip_saving_checkpoint = _always  # type: ignore[method-assign]
            self._held.append((callback, callback._last_time_checked))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Release them, and note which would have saved; this hook runs after theirs."""
        for callback, checked in self._held:
            del callback._should_skip_saving_checkpoint
            steps = callback._every_n_train_steps
            if (steps and trainer.global_step % steps == 0) or callback._last_time_checked != checked:
                self._due.append(callback)
        self._held.clear()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, unless validation has done so or there is no metric to compare."""
        if is_last_epoch(trainer):
            every = model_checkpoints(trainer)
            self._due = [c for c in every if c._every_n_train_steps or c._train_time_interval is not None]
        for callback in self._due:
            candidates = callback._monitor_candidates(trainer)
            known = callback.monitor is None or callback.monitor in candidates
            if known and not callback._should_skip_saving_checkpoint(trainer):
                callback._save_topk_checkpoint(trainer, candidates)
                callback._save_last_checkpoint(trainer, candidates)
        self._due.clear()


def _always(trainer: Trainer) -> bool:
    return True


def _check_when(callback: ModelCheckpoint, accumulated: int) -> None:
    if callback.save_on_exception:
        raise ConfigError(
            "ModelCheckpoint(save_on_exception=True) would save inside a step or an RL iteration, where a run cannot "
            "be resumed exactly. Remove it: SIGTERM saves what is complete, and every_n_train_steps (supervised "
            "stages) or every_n_epochs limit what other failures can cost"
        )
    if callback._train_time_interval is not None and accumulated > 1:
        raise ConfigError(
            f"ModelCheckpoint(train_time_interval) may save between the {accumulated} batches of one optimizer step "
            "(accumulate_grad_batches), whose gradients a checkpoint does not hold. Use every_n_train_steps"
        )
