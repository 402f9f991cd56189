"""Order of the training examples: random, of similar length in one batch, split over ranks, exact after a resume."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, DistributedSampler

from lit_rlhf.errors import ConfigError

ExampleT = TypeVar("ExampleT", covariant=True)

MEGABATCH = 50  # batches sorted by length together: more of them saves more padding, fewer is more random


class LengthGroupedSampler(DistributedSampler[int]):
    """Indices in an order that fills consecutive batches with examples of similar length.

    It is a DistributedSampler (also on one rank) because Lightning keeps such a sampler under DDP, where it
    replaces any other sampler or batch sampler, and because Lightning calls its `set_epoch`.

    The order depends on (seed, epoch) only. The examples are shuffled, cut into megabatches, sorted by length
    inside each, cut into global batches of batch_size * num_replicas, and the global batches are shuffled.
    Each rank takes every num_replicas-th example of a global batch: ranks have disjoint examples, the
    same number of them, and batches of similar length at each step. On one rank every example comes exactly once; on
    several, the len(lengths) % num_replicas examples at the end of the shuffle are left out of the epoch,
    different ones each epoch. The rank's first `skip` examples (an attribute, 0) are not yielded.

    Args:
        lengths: Length of each example.
        batch_size: Examples per batch and rank, as given to the DataLoader.
        num_replicas: Number of ranks.
        rank: This rank, from 0.
        seed: Seed of the order, the same on all ranks.
        group: Sort by length; False leaves the plain shuffle.

    Raises:
        ConfigError: There are fewer examples than ranks, or batch_size is below 1.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
        group: bool = True,
    ) -> None:
        # drop_last: the base class then counts len // num_replicas examples per rank
        super().__init__(lengths, num_replicas=num_replicas, rank=rank, seed=seed, drop_last=True)  # type: ignore[arg-type]
        if batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, not {batch_size}")
        if len(lengths) < num_replicas:
            raise ConfigError(f"{len(lengths)} examples cannot be shared by {num_replicas} ranks")
        self.lengths = torch.tensor(lengths)
        self.global_batch = batch_size * num_replicas
        self.group = group
        self.skip = 0

    def __iter__(self) -> Iterator[int]:
        # Hash the seed first, so that epoch 1 of seed 0 is not epoch 0 of seed 1.
        spread = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(self.seed)))
        generator = torch.Generator().manual_seed(spread + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator)[: self.total_size]
        whole = self.total_size - self.total_size % self.global_batch
        # The short last batch is set aside before sorting; otherwise it would always get the longest examples.
        batches, last = self._group(order[:whole]), order[whole:]
        if self.group:
            batches = batches[torch.randperm(len(batches), generator=generator)]
        ours = torch.cat([batches.flatten(), last])[self.rank :: self.num_replicas]
        return iter(ours[self.skip :].tolist())

    def origin(self) -> dict[str, int]:
        """Return everything that determines the order of an epoch, except for the lengths themselves."""
        return {
            "seed": self.seed,
            "number_of_examples": len(self.lengths),
            "examples_in_a_batch_of_all_ranks": self.global_batch,
            "group_by_length": int(self.group),
        }

    def _group(self, order: torch.Tensor) -> torch.Tensor:
        """Cut into global batches, shape (batches, global_batch), after sorting each megabatch if asked."""
        if self.group:
            chunks = order.split(MEGABATCH * self.global_batch)
            order = torch.cat([chunk[self.lengths[chunk].argsort(stable=True)] for chunk in chunks])
        return order.view(-1, self.global_batch)


class ResumableLoader(DataLoader[ExampleT]):
    """A DataLoader over a :class:`LengthGroupedSampler`; a run saved inside an epoch resumes with the next batch.

    Lightning saves the loader's state with its loops and restores it before the first batch; earlier batches are not
    built again. Iteration is lazy: Lightning makes an iterator before it sets a resumed run's epoch, and eager
    workers would fetch another epoch's examples. With any other sampler (``overfit_batches`` puts one in) this is a
    plain DataLoader.
    """

    _batches = 0
    _resumed: dict[str, int] | None = None

    def state_dict(self) -> dict[str, int]:
        """Return the epoch, how many of its batches were yielded, and what determines their order."""
        order = self.sampler
        if not isinstance(order, LengthGroupedSampler):
            return {}
        return {"epoch": order.epoch, "batches": self._batches, **order.origin()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Let the next iteration, if it is over the saved epoch, begin after the batches already yielded."""
        self._resumed = dict(state_dict)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield the remaining batches of the epoch.

        Raises:
            ConfigError: The run was saved inside this epoch with other batches: data, batch size, ranks or seed
                changed.
        """
        order, self._batches = self.sampler, 0
        if isinstance(order, LengthGroupedSampler):
            self._batches = self._place(order)
            order.skip = self._batches * (self.batch_size or 1)
        for batch in super().__iter__():
            self._batches += 1
            yield batch

    def _place(self, order: LengthGroupedSampler) -> int:
        """Return how many batches of the sampler's epoch a resumed run has already seen."""
        resumed, self._resumed = self._resumed, None
        if not resumed or resumed["epoch"] != order.epoch:
            return 0
        for name, now in order.origin().items():
            if (before := resumed[name]) != now:
                raise ConfigError(
                    f"cannot resume inside an epoch: {name.replace('_', ' ')} was {before} and is now {now}, so "
                    "its batches would differ. Set it back, or resume from a checkpoint saved at the end of an epoch"
                )
        return resumed["batches"]
