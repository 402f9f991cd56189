"""Parsing and errors of the light commands."""

import sys
import warnings
from collections.abc import Callable
from typing import Any


def silence_warnings() -> None:
    """Hide warnings about things that are so on purpose, or that only a library's next version can mend."""
    for message in (
        ".*does not have many workers.*",  # the tokenised data are in memory
        ".*module\\(s\\) in eval mode.*",  # the backbone stays in eval mode for good
        ".*treespec.*",
        ".*is_gradient_checkpointing.*",
        ".*args parameter is intended.*",
    ):
        warnings.filterwarnings("ignore", message=message)


def run(function: Callable[..., Any], argv: list[str], name: str) -> None:
    """Call a command with parsed arguments; an error of the user's making is one line, not a traceback."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog=f"lit-rlhf {name}", description=(function.__doc__ or "").split("\n")[0])
    parser.add_function_arguments(function, as_positional=True)
    arguments = parser.parse_args(argv)
    try:
        function(**arguments.as_dict())
    except (OSError, ValueError, ImportError) as error:
        print(f"lit-rlhf {name}: {error}", file=sys.stderr)
        raise SystemExit(1) from error
