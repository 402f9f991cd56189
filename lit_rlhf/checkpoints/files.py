"""Reads checkpoint files without running code; words the errors of files that cannot be read or written."""

import errno
import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import fsspec
import torch

from lit_rlhf.errors import CheckpointError


def load_file(file: Path, map_location: Any = "cpu", weights_only: bool = True, mmap: bool = False) -> dict[str, Any]:
    """Load a checkpoint file.

    Args:
        file: Its path.
        map_location: As of ``torch.load``.
        weights_only: Tensors and plain values only; False lets the file run code, and is the caller's decision.
        mmap: Read tensors from the disk when they are used.

    Raises:
        CheckpointError: There is no such file, it is truncated or of another kind, or reading it could run code.
    """
    if not file.is_file():
        if (file / ".metadata").is_file():
            raise CheckpointError(f"checkpoint {file} is a folder of shards; only strategy fsdp2 resumes it")
        kind = "is a folder" if file.is_dir() else "does not exist"
        raise CheckpointError(f"checkpoint {file} {kind}; give the .ckpt file that an earlier run wrote")
    content = load_plain(file, map_location, weights_only, mmap)
    if not isinstance(content, dict) or "state_dict" not in content:
        raise CheckpointError(f"{file} is a torch file but not a checkpoint of a run: it holds no state_dict")
    return content


def load_plain(file: Path, map_location: Any = "cpu", weights_only: bool = True, mmap: bool = False) -> Any:
    """Load a torch file, whatever it holds; arguments and errors as of :func:`load_file`."""
    if not file.stat().st_size:
        raise CheckpointError(f"checkpoint {file} is empty; use an earlier one")
    try:
        # torch can map only its own archives; loading shows what is wrong with other files.
        mapped = mmap and zipfile.is_zipfile(file)
        return torch.load(file, map_location=map_location, weights_only=weights_only, mmap=mapped)
    except Exception as error:
        raise CheckpointError(why_not_read(file, error)) from error


def why_not_read(target: Path, error: Exception) -> str:
    """Return the message about a file that could not be read."""
    text = str(error)
    if isinstance(error, pickle.UnpicklingError) and (
        found := re.search(r"(?:GLOBAL|Unsupported global:) (\S+)", text)
    ):
        name = text[found.end() :].split()[0] if found[1] == "GLOBAL" else found[1]
        return (
            f"checkpoint {target} is refused: it holds {name}, and reading it could run code. Checkpoints of lit_rlhf "
            "hold tensors and plain values only; get the file from somewhere you trust"
        )
    if isinstance(error, OSError) and error.errno != errno.EINVAL:
        return f"checkpoint {target} cannot be read: {error.strerror or error}"
    # torch's message about a truncated file speaks of zip archives and pickles; it stays the cause.
    return f"checkpoint {target} cannot be read: it is truncated or not a checkpoint; use another one"


def sync_folder(folder: Path) -> None:
    """Flush a rename to disk, where the system can do that for a folder."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def disk_error(error: Exception) -> OSError | None:
    """Return the system's own error, which torch's "unexpected pos" may hide; None for other errors."""
    return next((e for e in (error, error.__cause__, error.__context__) if isinstance(e, OSError)), None)


def why_not_written(target: Path, error: Exception) -> str:
    """Return the message about a checkpoint, a file or a folder, that could not be written."""
    try:
        space = f", {shutil.disk_usage(target.parent).free / 1e6:.1f} MB free in {target.parent}"
    except OSError:
        space = ""
    kind = "folder" if target.is_dir() else "file"
    if target.exists():
        rest = f"The earlier {kind} of that name is intact: free some space and resume with --ckpt_path {target}"
    else:
        rest = "There is no earlier file of that name. Free some space, or give ModelCheckpoint another dirpath"
    return f"checkpoint {target} could not be written: {getattr(error, 'strerror', None) or error}{space}. {rest}"


def local_path(path: str | Path) -> Path | None:
    """Return the path of a local file, None for a remote one."""
    file_system, local = fsspec.core.url_to_fs(str(path))
    return Path(local) if "file" in file_system.protocol else None
