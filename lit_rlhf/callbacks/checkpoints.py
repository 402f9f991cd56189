"""Checkpoint files that are complete or absent, and that are refused where they are not."""

import os
from pathlib import Path
from typing import Any

import fsspec
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lit_rlhf.checkpoint_files import CheckpointError, disk_error, load_file, sync_folder, why_not_written


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint under a temporary name in the same folder, to the disk, and only then gives it its own.

    A failed write leaves the earlier file of that name as it was, and nothing beside it. Local files are streamed, so
    that no second copy of the checkpoint is made in memory. Remote paths are left to Lightning, which uploads whole.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Raises:
            CheckpointError: It could not be written; the earlier file of that name is intact.
        """
        target = _local(path)
        if target is None or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(target)
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, target)
            sync_folder(target.parent)
        except (OSError, RuntimeError) as error:
            cause = disk_error(error)
            if cause is None:
                raise
            raise CheckpointError(why_not_written(target, cause)) from error
        finally:
            partial.unlink(missing_ok=True)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint: tensors and plain values, unless ``weights_only`` is False.

        Raises:
            CheckpointError: There is no such file, it is torn or of another kind, or reading it could run code.
        """
        target = _local(path)
        if target is None:
            return super().load_checkpoint(path, map_location, weights_only)
        return load_file(target, map_location, weights_only is not False)


def _local(path: str | Path) -> Path | None:
    """Return the path of a local file, None for a remote one."""
    file_system, local = fsspec.core.url_to_fs(str(path))
    return Path(local) if "file" in file_system.protocol else None


def _remove_leftovers(target: Path) -> None:
    """Remove what processes that were killed while writing this checkpoint left behind."""
    for leftover in target.parent.glob(f".{target.name}.*.partial"):
        process = leftover.name.split(".")[-2]
        if process.isdigit() and not _lives(int(process)):
            leftover.unlink(missing_ok=True)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


class SafeCheckpoints(Callback):
    """Has every checkpoint written and read by :class:`AtomicCheckpointIO`, unless the trainer has an IO of its own.

    Modules bring it along by ``configure_callbacks``. Sharded strategies write folders, which it leaves alone.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the checkpoint IO in place.

        Raises:
            ValueError: A ModelCheckpoint would save where a run cannot be resumed: inside an RL iteration or a step.
        """
        if stage == "fit":
            for callback in model_checkpoints(trainer):
                _check_when(callback, trainer.accumulate_grad_batches)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell each ModelCheckpoint that a resumed run's step is saved; Lightning lets it be saved a batch later."""
        for callback in model_checkpoints(trainer):
            callback._last_global_step_saved = trainer.global_step

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse to save between the batches of one optimizer step.

        Raises:
            ValueError: A supervised stage is trained, and a step is under way; a checkpoint holds no gradients.
        """
        if hasattr(pl_module, "rollout_buffer"):  # saved at iterations' ends only, some of which cut a step short
            return
        if (trainer.training or trainer.validating) and trainer.fit_loop._should_accumulate():
            raise ValueError(
                f"a checkpoint would be saved between the {trainer.accumulate_grad_batches} batches of one optimizer "
                "step (accumulate_grad_batches), whose gradients it does not hold. If validation saves it, let "
                "val_check_interval be a multiple of them"
            )


class SaveAtEpochEnd(Checkpoint):
    """Puts a checkpoint that is due by steps or by time at an epoch's last batch off to the end of the epoch.

    Resumed from the last batch, Lightning goes on with the next epoch, leaves out this one's validation, and counts
    epochs wrongly when that run is resumed again. The end of a run is saved as if it were due, since later stages read
    it.
    """

    def __init__(self) -> None:
        self._held: list[tuple[ModelCheckpoint, float | None]] = []
        self._due: list[ModelCheckpoint] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Hold back the checkpoints of the last batch: all hooks of its start come before those of its end."""
        if not trainer.fit_loop.epoch_loop._num_ready_batches_reached():
            return
        for callback in model_checkpoints(trainer):
            callback._should_skip_saving_checkpoint = _always  # type: ignore[method-assign]
            self._held.append((callback, callback._last_time_checked))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let go of them, and note which would have saved; this hook comes behind theirs."""
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


def is_last_epoch(trainer: Trainer) -> bool:
    """Return at an epoch's end whether the run ends with it."""
    limits = trainer.current_epoch + 1 == trainer.max_epochs, trainer.global_step == trainer.max_steps
    return any(limits) or trainer.should_stop


def is_saved(trainer: Trainer) -> bool:
    """Return whether a checkpoint that can be resumed holds the current step."""
    saved = [c._last_global_step_saved for c in model_checkpoints(trainer) if not c.save_weights_only]
    return trainer.global_step in saved


def _always(trainer: Trainer) -> bool:
    return True


def model_checkpoints(trainer: Trainer) -> list[ModelCheckpoint]:
    """Return the run's ModelCheckpoints; other callbacks of that base do not write by themselves."""
    return [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]


def _check_when(callback: ModelCheckpoint, accumulated: int) -> None:
    if callback.save_on_exception:
        raise ValueError(
            "ModelCheckpoint(save_on_exception=True) would save inside a step or an RL iteration, where a run cannot "
            "be resumed exactly. Leave it out: SIGTERM saves what is complete, and every_n_train_steps (of supervised "
            "stages) or every_n_epochs limit what another end can cost"
        )
    if callback._train_time_interval is not None and accumulated > 1:
        raise ValueError(
            f"ModelCheckpoint(train_time_interval) may save between the {accumulated} batches of one optimizer step "
            "(accumulate_grad_batches), whose gradients a checkpoint does not hold. Use every_n_train_steps"
        )


def last_checkpoint(trainer: Trainer) -> str | None:
    """Return the newest checkpoint to resume from: that this run wrote, or that it was itself resumed from.

    Returns:
        Its path; None without one.
    """
    callbacks = [callback for callback in model_checkpoints(trainer) if not callback.save_weights_only]
    # What a resumed run's callbacks remember as best or last may be older than what it was resumed from.
    named = [callback._last_checkpoint_saved for callback in callbacks] + [getattr(trainer, "ckpt_path", None)]
    remembered = [path for callback in callbacks for path in (callback.last_model_path, callback.best_model_path)]
    for paths in (named, remembered):
        if found := [path for path in map(_found, paths) if path]:
            return max(found, key=_written)
    return None


def _found(path: str | Path | None) -> str | None:
    target = _local(path) if path else None
    return str(target or path) if path and (target is None or target.exists()) else None


def _written(path: str) -> float:
    target = _local(path)
    return 0.0 if target is None else target.stat().st_mtime
