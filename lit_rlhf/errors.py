"""Errors that a user can fix: each message says what is wrong, where, and what to do.

The command line prints such an error as it is, without a traceback. Everything else that is raised is a bug, ours or a
library's, and keeps its traceback. Each class also derives from the matching built-in exception, for callers in Python.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager


class LitRLHFError(Exception):
    """Base of all errors caused by the user's settings, files, models or machine."""


class ConfigError(LitRLHFError, ValueError):
    """A setting, or a combination of settings, that cannot work."""


class StrategyError(ConfigError):
    """A strategy of the trainer that lit_rlhf cannot train under."""


class CheckpointError(LitRLHFError, ValueError):
    """A checkpoint could not be written, or is not one that can be read or resumed."""


class ModelFileError(LitRLHFError, OSError):
    """A model's or a tokenizer's files are damaged, or cannot be read."""


class ModelNotFoundError(ModelFileError, FileNotFoundError):
    """There is no model or tokenizer of that name."""


class MissingPackageError(LitRLHFError, ImportError):
    """An optional package is not installed."""


class NonFiniteError(LitRLHFError, RuntimeError):
    """A NaN or an infinity where training needs a finite number."""


class RewardError(LitRLHFError, RuntimeError):
    """A reward function raised, or did not return in time."""


class OutputExistsError(LitRLHFError, FileExistsError):
    """A command would overwrite something."""


class BenchmarkError(LitRLHFError, ChildProcessError):
    """The process of a measurement failed; the message holds the end of its output."""


def message_suffices(error: BaseException) -> bool:
    """Return whether the message says how to fix the error: ours, and the system's about a file or a full disk."""
    if isinstance(error, OSError) and (error.filename is not None or error.errno in (errno.ENOSPC, errno.EDQUOT)):
        return True
    return isinstance(error, LitRLHFError)


@contextmanager
def model_errors(what: str) -> Iterator[None]:
    """Turn whatever libraries raise about a user's model into :class:`ModelFileError`, naming what was being read.

    Damaged files raise ``SafetensorError``, ``struct.error``, ``TypeError``, ``RuntimeError`` and more.

    Args:
        what: Begins the message: ``model 'x' could not be loaded``.

    Raises:
        ModelFileError: Anything was raised inside the block, except our own errors and those about missing packages.
    """
    try:
        yield
    except (LitRLHFError, ImportError):  # these say what to do
        raise
    except Exception as error:
        cause = str(error).strip().split("\n")[0]  # listings and advice follow
        raise ModelFileError(f"{what}: {cause or type(error).__name__}") from error
