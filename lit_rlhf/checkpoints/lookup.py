"""What a run has saved, and what it can be resumed from."""

from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_rlhf.checkpoints.files import local_path


def is_last_epoch(trainer: Trainer) -> bool:
    """Return at an epoch's end whether the run ends with it."""
    limits = trainer.current_epoch + 1 == trainer.max_epochs, trainer.global_step == trainer.max_steps
    return any(limits) or trainer.should_stop


def is_saved(trainer: Trainer) -> bool:
    """Return whether a checkpoint that can be resumed holds the current step."""
    saved = [c._last_global_step_saved for c in model_checkpoints(trainer) if not c.save_weights_only]
    return trainer.global_step in saved


def model_checkpoints(trainer: Trainer) -> list[ModelCheckpoint]:
    """Return the run's ModelCheckpoints; other callbacks of that base do not write on their own."""
    return [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]


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
    target = local_path(path) if path else None
    return str(target or path) if path and (target is None or target.exists()) else None


def _written(path: str) -> float:
    target = local_path(path)
    return 0.0 if target is None else target.stat().st_mtime
