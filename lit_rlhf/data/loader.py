"""The training loader of supervised stages: a run that was saved inside an epoch goes on with the next batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

from torch.utils.data import DataLoader

from lit_rlhf.data.sampler import LengthGroupedSampler
from lit_rlhf.errors import ConfigError

ExampleT = TypeVar("ExampleT", covariant=True)


class ResumableLoader(DataLoader[ExampleT]):
    """A DataLoader over a :class:`LengthGroupedSampler` with a place in the epoch that checkpoints hold.

    Lightning saves it with its loops and gives it back before the first batch; what comes before that place is not
    read again. Iterators begin with their first batch: Lightning makes one before it sets a resumed run's epoch, and
    workers would already fetch another epoch's examples. Over any other sampler (``overfit_batches`` puts one in) it
    is a plain DataLoader.
    """

    _batches = 0
    _resumed: dict[str, int] | None = None

    def state_dict(self) -> dict[str, int]:
        """Return the epoch, how many of its batches were given out, and what their order follows from."""
        order = self.sampler
        if not isinstance(order, LengthGroupedSampler):
            return {}
        return {"epoch": order.epoch, "batches": self._batches, **order.origin()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Have the next iteration, if it is over the saved epoch, begin behind the batches that were given out."""
        self._resumed = dict(state_dict)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield the batches of the epoch that are left.

        Raises:
            ValueError: The run was saved inside this epoch with other batches: data, batch size, ranks or seed changed.
        """
        order, self._batches = self.sampler, 0
        if isinstance(order, LengthGroupedSampler):
            self._batches = self._place(order)
            order.skip = self._batches * (self.batch_size or 1)
        for batch in super().__iter__():
            self._batches += 1
            yield batch

    def _place(self, order: LengthGroupedSampler) -> int:
        """Return the batches of the sampler's epoch that a resumed run has behind it."""
        resumed, self._resumed = self._resumed, None
        if not resumed or resumed["epoch"] != order.epoch:
            return 0
        for name, now in order.origin().items():
            if (before := resumed[name]) != now:
                raise ConfigError(
                    f"cannot resume inside an epoch: {name.replace('_', ' ')} was {before} and is now {now}, so "
                    "that its batches would be others. Set it back, or resume from a checkpoint of an epoch's end"
                )
        return resumed["batches"]
