"""Errors that a user can mend: each message says what is wrong, where, and what to do.

The command line prints such an error as it is, without a traceback. Everything else that is raised is a bug, ours or a
library's, and keeps its traceback. Each class is also the built-in exception that fits, for callers from Python.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager


class LitRLHFError(Exception):
    """Base of every error of the user's making, or of the user's files, models and machines."""


class ConfigError(LitRLHFError, ValueError):
    """A setting, or a combination of settings, that cannot work."""


class StrategyError(ConfigError):
    """A strategy of the trainer that lit_rlhf cannot train under."""


class CheckpointError(LitRLHFError, ValueError):
    """A checkpoint could not be written, or is not one that can be read or resumed."""


class ModelFileError(LitRLHFError, OSError):
    """A model's or a tokenizer's files are damaged, or cannot be read."""


class ModelNotFoundError(ModelFileError, FileNotFoundError):
    """A name of a model or a tokenizer leads to nothing."""


class MissingPackageError(LitRLHFError, ImportError):
    """An optional package is not installed."""


class NonFiniteError(LitRLHFError, RuntimeError):
    """A number that training cannot use: NaN or infinite."""


class RewardError(LitRLHFError, RuntimeError):
    """A reward function raised, or did not answer in time."""


class OutputExistsError(LitRLHFError, FileExistsError):
    """A command would write where something is already."""


class BenchmarkError(LitRLHFError, ChildProcessError):
    """The process of a measurement failed; the message holds its last words."""


def message_suffices(error: BaseException) -> bool:
    """Say whether a user can mend an error by its message: one of ours, or the system's about a file or a full disk."""
    if isinstance(error, OSError) and (error.filename is not None or error.errno in (errno.ENOSPC, errno.EDQUOT)):
        return True
    return isinstance(error, LitRLHFError)


@contextmanager
def model_errors(what: str) -> Iterator[None]:
    """Turn what libraries raise about a user's model into one kind, with the name of what they were reading.

    Damaged files raise ``SafetensorError``, ``struct.error``, ``TypeError``, ``RuntimeError`` and more.

    Args:
        what: Begins the message: ``model 'x' could not be loaded``.

    Raises:
        ModelFileError: Anything was raised inside the block, but for our own errors and those about missing packages.
    """
    try:
        yield
    except (LitRLHFError, ImportError):  # these say what to do
        raise
    except Exception as error:
        cause = str(error).strip().split("\n")[0]  # listings and advice follow
        raise ModelFileError(f"{what}: {cause or type(error).__name__}") from error
