"""Messages for users' errors on the command line: the cause, in one line or few, instead of a listing or a
traceback."""

import difflib
import inspect
import itertools
import os
import re
from pathlib import Path

import yaml

import lit_rlhf
from lit_rlhf.errors import ConfigError

# jsonargparse reports every branch of a Union; these lines hold no cause.
NO_CAUSE = ("Does not validate against", "Subtypes:", "Errors:", "Expected a <class 'NoneType'>", "Given value")
# Where a class or a number is wrong, these do not either.
OTHER_BRANCH = ("Expected a <class", "Expected a path but", "Expected a List")
WRONG_VALUE = (
    "unknown class",
    "No module named",
    "has no attribute",
    "does not correspond to a subclass",
    "expected a number",
    "takes no options",
)


def parser_message(message: str) -> str:
    """Return where the wrong setting is and what is wrong with it, from jsonargparse's message.

    Args:
        message: Its message, which reports every type that the setting could have had.
    """
    lines = [_reworded(line) for line in _plain_values(message).splitlines() if line.strip()]
    kept = [line for line in lines if not _begins(line, NO_CAUSE)] or lines
    if any(word in line for line in kept for word in WRONG_VALUE):
        kept = [line for line in kept if not _begins(line, OTHER_BRANCH)]
    indents = [len(line) - len(line.lstrip()) for line in kept]
    nested = all(outer < inner for outer, inner in itertools.pairwise(indents))
    return " ".join(line.strip().removeprefix("- ") for line in kept) if nested else "\n".join(kept)


def _plain_values(message: str) -> str:
    """Where a number or a class is expected (torch's ``lr``: float or Tensor), report only the missing number."""
    both = r"Expected a <class '(?:int|float)'>\n( *)- Expected a dot import path string: (.+)"
    return re.sub(both, r"expected a number, not '\2'", message)


def _begins(line: str, words: tuple[str, ...]) -> bool:
    return line.strip().removeprefix("- ").startswith(words)


def _reworded(line: str) -> str:
    line = re.sub(r"(Parser key|- Problem with given class_path) [\"'](.+)[\"']:$", r"\2:", line)
    line = re.sub(r"Type (typing|collections)\S.* expects a function or a callable class: ", "", line)
    if found := re.search(r"Expected a dot import path string: (.+)$", line):
        name = found[1]
        from lightning.pytorch import callbacks, loggers
        from lightning.pytorch.strategies import StrategyRegistry  # light commands import Lightning only for an error

        if name in StrategyRegistry:
            kind = StrategyRegistry[name]["strategy"].__name__
            return f"{line[: found.start()]}{name!r} takes no options; put --trainer.strategy {kind} before them"
        near = difflib.get_close_matches(name, [*lit_rlhf.__all__, *callbacks.__all__, *loggers.__all__], 1)
        hint = f"did you mean {near[0]}?" if near else f"give its import path, such as my_module.{name}"
        return f"{line[: found.start()]}unknown class {name!r}; {hint}"
    if re.search(r"Option '.+' is not accepted", line):
        return f"{line.rstrip('.')}; `lit-rlhf fit --model.help CLASS` (or --data.help) lists what is"
    return line


def check_files(command: str, paths: list[str]) -> None:
    """Refuse configuration files that hold no settings, or unknown sections.

    jsonargparse does not name the file, and lets an unknown key with an empty mapping pass.

    Args:
        command: ``fit`` or another of the trainer's.
        paths: Files; missing ones are left to the parser.

    Raises:
        ConfigError: A file is not YAML, or holds an unknown section; the file is named.
    """
    from lightning.pytorch import Trainer

    known = {"seed_everything", "trainer", "model", "data"}
    known |= {"ckpt_path", "weights_only", "verbose", "return_predictions"} & set(
        inspect.signature(getattr(Trainer, command)).parameters
    )
    for path in paths:
        if not os.path.isfile(path):
            continue
        try:
            content = yaml.safe_load(Path(path).read_bytes())
        except yaml.YAMLError as error:
            raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error
        if not isinstance(content, dict):
            raise ConfigError(f"{path}: expected settings by name, found {type(content).__name__}")
        if unknown := [str(key) for key in content if str(key).split(".")[0].rstrip("+") not in known]:
            raise ConfigError(f"{path}: unknown section {unknown[0]!r}; sections are {', '.join(sorted(known))}")
