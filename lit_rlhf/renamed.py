"""Renamed settings: old names work for one release, with a warning, in Python, YAML and on the command line."""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from lightning.fabric.utilities.rank_zero import rank_zero_deprecation

Class = TypeVar("Class", bound=type)

# Old name to new name, of every class that :func:`renamed` decorates.
RENAMED: dict[str, str] = {}


def renamed(**names: str) -> Callable[[Class], Class]:
    """Let a class's constructor take arguments, and its instances show attributes, under their old names too.

    Args:
        **names: Old name to new name.
    """

    def decorate(cls: Class) -> Class:
        construct: Callable[..., None] = cls.__init__  # type: ignore[misc]

        @functools.wraps(construct)
        def __init__(self: object, *args: Any, **kwargs: Any) -> None:
            construct(self, *args, **_rename_keys(kwargs, names))

        cls.__init__ = __init__  # type: ignore[misc]
        for old, new in names.items():
            setattr(cls, old, _alias(old, new))
        RENAMED.update(names)
        return cls

    return decorate


def rename_settings(content: Any) -> Any:
    """Return what a configuration holds, with new names for old ones at any depth."""
    if isinstance(content, Mapping):
        return _rename_keys({key: rename_settings(value) for key, value in content.items()}, RENAMED)
    return [rename_settings(item) for item in content] if isinstance(content, list) else content


def rename_words(words: list[str]) -> list[str]:
    """Return command-line arguments with new names for old ones, as in ``--model.OLD`` and ``--model.OLD=VALUE``."""
    return [_rename_word(word) for word in words]


def _rename_word(word: str) -> str:
    found = re.fullmatch(r"--([\w.]+)(=.*)?", word, re.DOTALL)
    if found is None:
        return word
    (key,) = _rename_keys({found[1]: None}, RENAMED)
    return f"--{key}{found[2] or ''}"


def _rename_keys(settings: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings under their new names; of a dotted key the last part counts."""
    result: dict[str, Any] = {}
    for key, value in settings.items():
        path, dot, name = str(key).rpartition(".")
        if name in names:
            _warn(name, names[name], depth=8)
            result[f"{path}{dot}{names[name]}"] = value
        else:
            result[key] = value
    return result


def _alias(old: str, new: str) -> property:
    def read(self: object) -> Any:
        _warn(old, new, depth=7)
        return getattr(self, new)

    def write(self: object, value: Any) -> None:
        _warn(old, new, depth=7)
        setattr(self, new, value)

    return property(read, write)


def _warn(old: str, new: str, depth: int) -> None:
    message = f"{old} is now called {new}; the old name will be removed in the next release"
    rank_zero_deprecation(message, stacklevel=depth)
