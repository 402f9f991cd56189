"""Checked access to fields of nested rows, by path: ("answers", 2, "text") is the field answers[2].text.

Each function raises a DataError that names the field if its value is not what is asked for.
"""

from __future__ import annotations

import math
from typing import Any

from lit_rlhf.data.errors import DataError
from lit_rlhf.data.sources import Row

Key = str | int


def value_at(row: Row, *path: Key) -> Any:
    """The value at a path, None if the last step is absent or null. Indices must be in range."""
    value: Any = row.data
    for depth, key in enumerate(path):
        if isinstance(key, int):
            value = value[key]
            continue
        if value is None:
            raise _missing(row, path[:depth])
        if not isinstance(value, dict):
            raise _wrong_type(row, path[:depth], "an object", value)
        value = value.get(key)
    return value


def text_at(row: Row, *path: Key, may_be_empty: bool = False) -> str:
    """The text at a path; blank text is refused unless it may be empty."""
    value = _required(row, path)
    if not isinstance(value, str):
        raise _wrong_type(row, path, "text", value)
    check_unicode(row, value, *path)
    if not may_be_empty and not value.strip():
        raise bad_field(row, path, "has an empty text", "empty field")
    return value


def list_at(row: Row, *path: Key) -> list[Any]:
    """The list at a path."""
    value = _required(row, path)
    if not isinstance(value, list):
        raise _wrong_type(row, path, "a list", value)
    return value


def number_at(row: Row, *path: Key) -> float:
    """The finite number at a path."""
    value = _required(row, path)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong_type(row, path, "a number", value)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise bad_field(row, path, "must be a finite number", "number out of range of field")
    return number


def choice_at(row: Row, *path: Key) -> int:
    """The 0 or 1 at a path."""
    number = number_at(row, *path)
    if number not in (0, 1):
        raise bad_field(row, path, f"must be 0 or 1, not {number:g}", "number out of range of field")
    return int(number)


def flag_at(row: Row, *path: Key) -> bool | None:
    """The true or false at a path, None if absent."""
    value = value_at(row, *path)
    if value is not None and not isinstance(value, bool):
        raise _wrong_type(row, path, "true or false", value)
    return value


def check_unicode(row: Row, text: str, *path: Key) -> None:
    """Raise for half of a surrogate pair in the text at a path."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, which tokenizers refuse
        raise DataError(
            f"holds a lone surrogate at character {error.start + 1}",
            where=row.where,
            field=name_of(path),
            fix="Write the text again from properly decoded strings.",
            reason="not Unicode text",
        ) from error


def name_of(path: tuple[Key, ...]) -> str:
    """A path as it is usually written, such as ``answers[2].text``."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).removeprefix(".")


def bad_field(row: Row, path: tuple[Key, ...], problem: str, kind: str, fix: str = "") -> DataError:
    """Error of a field; skipped rows are counted under the kind of problem and the field without its indices."""
    general = name_of(path)
    for index in {key for key in path if isinstance(key, int)}:
        general = general.replace(f"[{index}]", "[]")
    fix = fix or "Correct or remove the row."
    return DataError(problem, where=row.where, field=name_of(path), fix=fix, reason=f"{kind} {general!r}")


def _wrong_type(row: Row, path: tuple[Key, ...], expected: str, value: Any) -> DataError:
    return bad_field(row, path, f"must be {expected}, not {type(value).__name__}", "wrong type of field")


def _required(row: Row, path: tuple[Key, ...]) -> Any:
    value = value_at(row, *path)
    if value is None:
        raise _missing(row, path)
    return value


def _missing(row: Row, path: tuple[Key, ...]) -> DataError:
    fix = "Correct or remove the row, or choose another format."
    return bad_field(row, path, f"is missing (the row has {sorted(row.data)})", "missing field", fix)
