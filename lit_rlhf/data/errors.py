"""The one error of this package, and two counters: of bad rows, and of what a format leaves out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, TypeVar

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lit_rlhf.errors import LitRLHFError

OnBadRow = Literal["error", "skip"]
InT = TypeVar("InT")
OutT = TypeVar("OutT")


class DataError(LitRLHFError, ValueError):
    """A data source or one of its rows cannot be used.

    Args:
        problem: What is wrong, continuing the sentence "<where>: field 'x' ...".
        where: File and line (or row) at fault.
        field: Field of the row at fault, when there is one.
        fix: What the user can do about it.
        reason: Short name for the kind of problem, under which skipped rows are counted.
    """

    def __init__(self, problem: str, *, where: str, field: str | None = None, fix: str = "", reason: str = "") -> None:
        super().__init__(f"{where}: {_sentence(problem, field)}." + (f" {fix}" if fix else ""))
        self.where = where
        self.field = field
        self.reason = reason or _sentence(problem, field)


def _sentence(problem: str, field: str | None) -> str:
    return problem if field is None else f"field {field!r} {problem}"


BadRowHandler = Callable[[DataError], None]


class BadRows:
    """Handler of bad rows: raises the first, or counts them by reason for one summary warning.

    Args:
        policy: "error" raises; "skip" counts.
    """

    def __init__(self, policy: OnBadRow = "error") -> None:
        super().__init__()
        self.policy = policy
        self.counts: Counter[str] = Counter()
        self.first: DataError | None = None

    def __call__(self, error: DataError) -> None:
        """Take note of one bad row.

        Raises:
            DataError: The policy is "error".
        """
        if self.policy == "error":
            raise error
        self.counts[error.reason] += 1
        self.first = self.first or error

    def warn(self) -> None:
        """Issue one warning with the count per reason and the first example; nothing if no row was bad."""
        if not self.counts:
            return
        reasons = ", ".join(f"{count} x {reason}" for reason, count in self.counts.most_common())
        rank_zero_warn(f"Skipped {self.counts.total()} bad rows: {reasons}. The first was {self.first}")


RAISE: BadRowHandler = BadRows("error")


def parsed(items: Iterable[InT], parse: Callable[[InT], OutT], on_bad: BadRowHandler) -> Iterator[OutT]:
    """Parse each item; where that raises a DataError and `on_bad` returns, the item is left out."""
    for item in items:
        try:
            result = parse(item)
        except DataError as error:
            on_bad(error)
        else:
            yield result


class Notes(Counter[str]):
    """How much a format left out although the data are not at fault, by reason, for one warning."""

    def warn(self, name: str) -> None:
        """Issue one warning about the format `name`, or none if nothing was left out."""
        parts = [f"{count} {reason}" for reason, count in self.items() if count]
        if parts:
            rank_zero_warn(f"Format {name!r} left out: {'; '.join(parts)}.")
