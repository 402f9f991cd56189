"""Checkpoints that are folders of shards: complete or absent, consistent across ranks, and read without running code.

A folder is written as ``.NAME.partial`` beside its place and renamed in the end; between the two renames, the earlier
one of that name is ``.NAME.previous``. What is deleted is renamed ``.NAME.removed`` first.
"""

import errno
import io
import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.optim import Optimizer

from lit_rlhf.checkpoints.files import (
    disk_error,
    load_plain,
    sync_folder,
    why_not_read,
    why_not_written,
)
from lit_rlhf.errors import CheckpointError

# Lightning's and torch's names: all that is not sharded, and which shard lies where.
REST, INDEX = "meta.pt", ".metadata"
Result = TypeVar("Result")


def save_folder(path: Path, shards: dict[str, Any], rest: dict[str, Any]) -> None:
    """Write a checkpoint as a folder; every rank calls this.

    Args:
        path: The folder, the same on all ranks and on a disk that they share.
        shards: Sharded tensors; each rank writes its own.
        rest: Everything else; the first rank writes its own.

    Raises:
        CheckpointError: On all ranks, if one could not write; the earlier checkpoint is intact.
    """
    partial = beside(path, "partial")
    try:
        _on_first_rank(path, lambda: _prepare(path, partial))
        _on_every_rank(path, lambda: _write_shards(path, partial, shards))
        _on_first_rank(path, lambda: _finish(path, partial, rest))
    except CheckpointError:
        if _rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def load_folder(
    path: Path, model: torch.nn.Module, optimizers: Sequence[Optimizer], strict: bool = True
) -> dict[str, Any]:
    """Load weights and optimizer state from a folder, and return the rest; every rank calls this.

    Args:
        path: The folder.
        model: Sharded.
        optimizers: Of its parameters.
        strict: Refuse weights that the model does not have.

    Raises:
        CheckpointError: On all ranks, if one cannot read the folder, or it is incomplete, foreign or of another model.
    """
    rest = _on_every_rank(path, lambda: read_rest(path), why_not_read)
    weights = {"state_dict": get_model_state_dict(model)}
    _read_shards(path, weights)
    model.load_state_dict(weights["state_dict"], strict=strict)
    for index, optimizer in enumerate(optimizers):
        state = {f"optimizer_{index}": get_optimizer_state_dict(model, optimizer)}
        _read_shards(path, state)
        (loaded,) = state.values()
        set_optimizer_state_dict(model, optimizer, optim_state_dict=loaded, options=StateDictOptions(cpu_offload=True))
    return rest


def read_rest(path: Path) -> dict[str, Any]:
    """Return what a folder holds besides its shards, after checking that these are complete.

    Raises:
        CheckpointError: The folder is incomplete or foreign, or reading it could run code.
    """
    settle(path)
    for name in (INDEX, REST):
        if not (path / name).is_file():
            raise CheckpointError(
                f"checkpoint {path} is incomplete or not a checkpoint: {name} is missing; give the folder or the .ckpt "
                "file that an earlier run wrote"
            )
    sizes: dict[str, int] = {}
    for part in (_read_index(path).storage_data or {}).values():
        sizes[part.relative_path] = max(sizes.get(part.relative_path, 0), part.offset + part.length)
    for name, size in sizes.items():
        file = path / name
        if Path(name).name != name:
            raise CheckpointError(f"checkpoint {path} is refused: its shards are outside it, in {name}")
        if not file.is_file() or file.stat().st_size < size:
            how = "cut short" if file.is_file() else "missing"
            raise CheckpointError(f"checkpoint {path} is incomplete: {name} is {how}; use an earlier one")
    rest = load_plain(path / REST)
    if not isinstance(rest, dict):
        raise CheckpointError(f"checkpoint {path} was not written by a run: {REST} holds no dict")
    return rest


def settle(path: Path) -> None:
    """Restore the earlier checkpoint if a run was killed between its two renames."""
    previous = beside(path, "previous")
    if previous.exists() and not path.exists():
        try:
            previous.rename(path)
        except FileNotFoundError:  # another rank was first
            return
        sync_folder(path.parent)


def put_in_place(partial: Path, path: Path) -> None:
    """Give a file or folder its name; an earlier one of that name is removed once the new one is in place."""
    previous = beside(path, "previous")
    try:
        for last in (False, True):
            if path.exists():
                path.rename(previous)
            try:
                partial.rename(path)
                break
            except OSError as error:
                # A process that read the checkpoint in between has restored the previous one.
                if last or error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
        sync_folder(path.parent)
    finally:
        settle(path)
    remove(previous)


def remove(path: Path) -> None:
    """Delete a file or folder so that it is never half deleted under its name."""
    removed = beside(path, "removed")
    _delete(removed)
    try:
        path.rename(removed)
    except FileNotFoundError:
        return
    _delete(removed)


def beside(path: Path, what: str) -> Path:
    """Return the hidden name beside a checkpoint: ``partial``, ``previous`` or ``removed``."""
    return path.with_name(f".{path.name}.{what}")


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _prepare(path: Path, partial: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    settle(path)
    remove(beside(path, "previous"))
    for leftover in (partial, *path.parent.glob(".*.ckpt.removed")):
        _delete(leftover)
    partial.mkdir()


def _finish(path: Path, partial: Path, rest: dict[str, Any]) -> None:
    with (partial / REST).open("wb") as file:
        torch.save(rest, file)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(partial)
    put_in_place(partial, path)


# ---- ranks ------------------------------------------------------------------------------------------------------


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _on_first_rank(path: Path, work: Callable[[], None]) -> None:
    _on_every_rank(path, lambda: work() if _rank() == 0 else None)


def _on_every_rank(
    path: Path, work: Callable[[], Result], say: Callable[[Path, Exception], str] = why_not_written
) -> Result:
    """Do something on every rank, and continue when all are done; ``say`` words a system error.

    Raises:
        CheckpointError: On all ranks, if it failed on one.
    """
    result, said, cause = None, None, None
    try:
        result = work()
    except CheckpointError as error:
        said, cause = str(error), error.__cause__
    except Exception as error:
        said, cause = say(path, disk_error(error) or error), error
    everywhere = [said]
    if dist.is_initialized():
        everywhere = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, said)
    if text := next(filter(None, everywhere), None):
        raise CheckpointError(text) from cause
    return result  # type: ignore[return-value]


# ---- shards -----------------------------------------------------------------------------------------------------


def _write_shards(path: Path, partial: Path, shards: dict[str, Any]) -> None:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.save(shards, storage_writer=_Writer(partial))
    except CheckpointException as error:
        # torch raises it on every rank.
        cause = _first_failure(error)
        raise CheckpointError(why_not_written(path, cause)) from cause


def _read_shards(path: Path, state: dict[str, Any]) -> None:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load(state, storage_reader=_Reader(path), planner=_Planner(path))
    except CheckpointException as error:
        cause = _first_failure(error)
        if isinstance(cause, CheckpointError):
            raise cause from None
        text = (str(cause).splitlines() or [type(cause).__name__])[0]
        raise CheckpointError(
            f"checkpoint {path} is damaged or belongs to another model than this run's: {text}"
        ) from cause


def _first_failure(error: CheckpointException) -> Exception:
    _, (cause, _) = min(error.failures.items())
    if not isinstance(cause, Exception):  # the run is being stopped
        raise cause
    return cause


class _Writer(dcp.FileSystemWriter):
    """Writes each file to disk, and raises the system's own error, which would be lost on its way to rank 0."""

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            raise disk_error(error) or error from None


class _Reader(dcp.FileSystemReader):
    """Reads the index as :func:`_read_index` does; torch's own would run whatever code it holds."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        index = _read_index(Path(self.path))
        index.storage_meta = metadata.StorageMeta(load_id=self.load_id)
        return index


class _Planner(DefaultLoadPlanner):
    """Reads plain values only where torch's own would run code."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        try:
            plain = torch.load(value, weights_only=True)
        except Exception as error:
            raise CheckpointError(why_not_read(self.path, error)) from error
        set_element(self.original_state_dict, self.mappings[read_item.dest_index.fqn], plain)


class _IndexUnpickler(pickle.Unpickler):
    """Accepts the plain records that make up torch's index, and nothing else."""

    _records: ClassVar[Mapping[tuple[str, str], Any]] = {
        (kind.__module__, kind.__qualname__): kind
        for kind in (
            metadata.Metadata,
            metadata.MetadataIndex,
            metadata.TensorStorageMetadata,
            metadata.BytesStorageMetadata,
            metadata.ChunkStorageMetadata,
            metadata.TensorProperties,
            metadata.StorageMeta,
            metadata._MEM_FORMAT_ENCODING,
            filesystem._StorageInfo,
            torch.Size,
            torch.serialization._get_layout,
            type(Path()),
        )
    }

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(plain := getattr(torch, name, None), torch.dtype | torch.layout):
            return plain
        if (module, name) not in self._records:
            raise pickle.UnpicklingError(f"Unsupported global: {module}.{name}")
        return self._records[module, name]


def _read_index(path: Path) -> metadata.Metadata:
    try:
        with (path / INDEX).open("rb") as file:
            index = _IndexUnpickler(file).load()
    except Exception as error:
        raise CheckpointError(why_not_read(path / INDEX, error)) from error
    if not isinstance(index, metadata.Metadata):
        raise CheckpointError(f"checkpoint {path} was not written by a run: {INDEX} holds no index of shards")
    return index
