"""Reading checkpoint files: never code, and what is said of a file that cannot be read."""

import errno
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch


class CheckpointError(ValueError):
    """A checkpoint could not be written, or is not one that can be read."""


def load_file(file: Path, map_location: Any = "cpu", weights_only: bool = True, mmap: bool = False) -> dict[str, Any]:
    """Load a checkpoint file.

    Args:
        file: Its path.
        map_location: As of ``torch.load``.
        weights_only: Tensors and plain values only; False lets the file run code, and is the caller's decision.
        mmap: Read tensors from the disk when they are used.

    Raises:
        CheckpointError: There is no such file, it is torn or of another kind, or reading it could run code.
    """
    if not file.is_file():
        kind = "is a folder" if file.is_dir() else "does not exist"
        raise CheckpointError(f"checkpoint {file} {kind}; give the .ckpt file that an earlier run wrote")
    if not file.stat().st_size:
        raise CheckpointError(f"checkpoint {file} is empty; use an earlier one")
    try:
        # torch can map its own archives only; what is wrong with other files shows without.
        mapped = mmap and zipfile.is_zipfile(file)
        content = torch.load(file, map_location=map_location, weights_only=weights_only, mmap=mapped)
    except Exception as error:
        raise CheckpointError(_why_not_read(file, error)) from error
    if not isinstance(content, dict) or "state_dict" not in content:
        raise CheckpointError(f"{file} is a file of torch's but no checkpoint of a run: it holds no state_dict")
    return content


def _why_not_read(target: Path, error: Exception) -> str:
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
    # What torch says of a torn file is about zip archives and pickles; it stays the cause.
    return f"checkpoint {target} cannot be read: it is torn (its writing was cut short) or no checkpoint; use another"
