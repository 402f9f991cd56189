"""Whether a run can be resumed from a checkpoint, as far as can be checked before any weights load."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lit_rlhf.checkpoints.files import load_file
from lit_rlhf.checkpoints.folders import read_rest, settle
from lit_rlhf.checkpoints.records import refuse_foreign, shorten
from lit_rlhf.errors import ConfigError

# Lightning looks these up when it restores.
KEYWORDS = frozenset({"best", "hpc", "last", "registry"})


def check_resume(
    path: str,
    ours: Mapping[str, Any],
    max_epochs: int | None = None,
    complete_spec: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
    describe: Callable[[str, Any], str] = shorten,
) -> None:
    """Refuse a checkpoint that this run cannot be resumed from.

    Args:
        path: Its path, of a file or a folder of shards; remote ones and keywords such as ``last`` are left to the
            restore.
        ours: The run's own record; see :func:`lit_rlhf.checkpoints.records.refuse_foreign`.
        max_epochs: Epochs that the run is to have in the end; None and -1 set no limit.
        complete_spec, describe: As there.

    Raises:
        ValueError: It is missing, damaged, foreign, of another algorithm, model or layout, or has more epochs.
    """
    if "://" in path or path in KEYWORDS:
        return
    place = Path(path)
    settle(place)
    content = read_rest(place) if place.is_dir() else load_file(place, mmap=True)
    refuse_foreign(content, ours, path, complete_spec, describe)
    done = int(content.get("epoch", -1)) + 1
    if max_epochs is not None and 0 <= max_epochs < done:
        raise ConfigError(
            f"checkpoint {path} has {done} finished epochs, but trainer.max_epochs is {max_epochs}. Raise it: it "
            "counts from the beginning of the run, not from the checkpoint"
        )
