"""Parsing and errors of the light commands."""

import inspect
import itertools
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from lit_rlhf.errors import LitRLHFError, message_suffices
from lit_rlhf.warning_filters import silence_warnings


def spell_out_flags(function: Callable[..., Any], argv: list[str]) -> list[str]:
    """Give a bare ``--flag`` of a boolean argument its value: ``--tiny`` is ``--tiny=true``."""
    flags = {f"--{name}" for name, p in inspect.signature(function).parameters.items() if p.annotation is bool}
    words = [*argv, "--"]
    return [
        f"{word}=true" if word in flags and after.startswith("--") else word
        for word, after in itertools.pairwise(words)
    ]


def run(function: Callable[..., Any], argv: list[str], name: str) -> None:
    """Call a command with parsed arguments; an error that the user can fix is one line, not a traceback."""
    from jsonargparse import ArgumentParser

    from lit_rlhf.commands.messages import parser_message

    class Parser(ArgumentParser):
        """Prints what is wrong without the usage, which ``--help`` shows."""

        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            print(f"lit-rlhf {name}: {parser_message(message)}", file=sys.stderr)
            raise SystemExit(2)

    parser = Parser(prog=f"lit-rlhf {name}", description=(function.__doc__ or "").split("\n")[0])
    parser.add_function_arguments(function, as_positional=True)
    silence_warnings()
    arguments = parser.parse_args(spell_out_flags(function, argv))
    try:
        function(**arguments.as_dict())
    except (LitRLHFError, OSError) as error:
        if not message_suffices(error):
            raise
        print(f"lit-rlhf {name}: {error}", file=sys.stderr)
        raise SystemExit(1) from error
