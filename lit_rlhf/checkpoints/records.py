"""The record that every checkpoint carries: which algorithm trained it, from what, and what it holds.

A record is plain data. What its ``spec`` and its ``layout`` mean is the backbone's business; here they are compared.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lit_rlhf.checkpoints.files import load_file
from lit_rlhf.errors import ConfigError

RECORD_KEY = "lit_rlhf"
FORMAT = 1


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint file written by this package, tensors mapped lazily, plain types only.

    Raises:
        CheckpointError: There is no such file, or it is not a readable checkpoint.
        ValueError: It is not one of this package's.
    """
    file = Path(path)
    if file.is_dir():
        raise ConfigError(
            f"checkpoint {file} is a folder of shards, as FSDP2 writes them; give the strategy "
            "save_distributed_checkpoint: false and resume for one more epoch (trainer.max_epochs), to get one file"
        )
    content = load_file(file, mmap=True)
    record = content.get(RECORD_KEY)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ConfigError(f"checkpoint {file} was not written by this version of lit_rlhf (no {RECORD_KEY!r} record)")
    return content


def shorten(key: str, value: object) -> str:
    """Return a part of a record as it is shown in a message: its first 300 characters."""
    text = str(value)
    return text if len(text) <= 300 else text[:300] + " ..."


def refuse_foreign(
    checkpoint: Mapping[str, Any],
    ours: Mapping[str, Any],
    path: str | Path | None,
    complete_spec: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
    describe: Callable[[str, Any], str] = shorten,
) -> None:
    """Refuse a checkpoint whose record is not this run's: resuming it would train something else.

    Args:
        checkpoint: The content of the checkpoint.
        ours: The run's own record; ``trainable_names`` is None before the model is built, and then not compared.
        path: Where the checkpoint lies, for the message.
        complete_spec: Fills in what older versions did not write into a record's ``spec``.
        describe: Returns a part of a record, given its key and its value, for the message.

    Raises:
        ValueError: The checkpoint has no record, or another one; the first difference is named.
    """
    saved = checkpoint.get(RECORD_KEY)
    if saved is None:
        raise ConfigError(f"checkpoint {path or ''} was not written by lit_rlhf; it cannot be resumed")
    for key in ("algorithm", "layout", "trainable_names"):
        if saved[key] != ours[key] and ours[key] is not None:
            raise ConfigError(
                f"cannot resume: the checkpoint's {key} differs from the configuration's: "
                f"{describe(key, saved[key])} there, {describe(key, ours[key])} here. "
                "Change it back, or start over without --ckpt_path"
            )
    saved_spec = complete_spec(saved["spec"])
    for key, value in ours["spec"].items():
        if saved_spec[key] != value:
            raise ConfigError(f"cannot resume: {key} was {saved_spec[key]!r} and is now {value!r}")
