"""Writing and reading checkpoint files under Lightning: complete or absent, refused where they are not."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lit_rlhf.checkpoints.files import disk_error, load_file, local_path, sync_folder, why_not_written
from lit_rlhf.errors import CheckpointError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint under a temporary name in the same folder, flushes it to disk, and only then renames it.

    A failed write leaves the earlier file of that name as it was, and nothing beside it. Local files are streamed, so
    that no second copy of the checkpoint is made in memory. Remote paths are left to Lightning, which uploads whole.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Raises:
            CheckpointError: It could not be written; the earlier file of that name is intact.
        """
        target = local_path(path)
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
            CheckpointError: There is no such file, it is truncated or of another kind, or reading it could run code.
        """
        target = local_path(path)
        if target is None:
            return super().load_checkpoint(path, map_location, weights_only)
        return load_file(target, map_location, weights_only is not False)


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
