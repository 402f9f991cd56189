"""Checks of settings."""

from collections.abc import Sequence


def out_of_range(
    settings: object, unit: Sequence[str] = (), positive: Sequence[str] = (), not_negative: Sequence[str] = ()
) -> list[str]:
    """Return one line for each attribute outside its range; None is always inside.

    Args:
        settings: The object.
        unit: Attributes in [0, 1].
        positive: Attributes above 0.
        not_negative: Attributes of at least 0.
    """
    found = []
    for names, holds, text in (
        (unit, lambda value: 0 <= value <= 1, "in [0, 1]"),
        (positive, lambda value: value > 0, "positive"),
        (not_negative, lambda value: value >= 0, "at least 0"),
    ):
        for name in names:
            value = getattr(settings, name)
            if value is not None and not holds(value):
                found.append(f"{name} must be {text}, got {value}")
    return found
