"""Checkpoint files that are complete or absent, and that are refused where they are not."""

import os
from pathlib import Path
from typing import Any

import fsspec
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
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
            ValueError: A ModelCheckpoint would save inside an RL iteration, or between the batches of one step.
        """
        if stage == "fit":
            for callback in trainer.checkpoint_callbacks:
                if isinstance(callback, ModelCheckpoint):
                    _check_when(callback, hasattr(pl_module, "rollout_buffer"), trainer.accumulate_grad_batches)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()


def _check_when(callback: ModelCheckpoint, by_iteration: bool, accumulated: int) -> None:
    if by_iteration and callback.save_on_exception:
        raise ValueError(
            "ModelCheckpoint(save_on_exception=True) would save inside an RL iteration, where a run cannot be resumed. "
            "Leave it out: the checkpoint of the last complete iteration is there already"
        )
    if not by_iteration and accumulated > 1 and (callback.save_on_exception or callback._train_time_interval):
        option = "save_on_exception" if callback.save_on_exception else "train_time_interval"
        raise ValueError(
            f"ModelCheckpoint({option}) may save between the {accumulated} batches of one optimizer step "
            "(accumulate_grad_batches), whose gradients a checkpoint does not hold. Use every_n_train_steps"
        )


def last_checkpoint(trainer: Trainer) -> str | None:
    """Return the newest checkpoint that this run wrote, or the one that it was resumed from; None without either."""
    for callback in trainer.checkpoint_callbacks:
        for name in ("_last_checkpoint_saved", "last_model_path", "best_model_path"):
            path = str(getattr(callback, name, "") or "")
            target = _local(path) if path else None
            if path and (target is None or target.exists()):
                return str(target or path)
    resumed = getattr(trainer, "ckpt_path", None)
    return str(_local(resumed) or resumed) if resumed else None
