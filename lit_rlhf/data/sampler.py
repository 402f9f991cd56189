"""Order of the training examples: random, with examples of similar length in one batch, split over ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import DistributedSampler

MEGABATCH = 50  # batches sorted by length together: more saves more padding, fewer is more random


class LengthGroupedSampler(DistributedSampler[int]):
    """Indices in an order that fills consecutive batches with examples of similar length.

    It is a DistributedSampler (also on one rank) because Lightning leaves such a sampler alone, where it
    replaces any other sampler or batch sampler under DDP, and because Lightning calls its `set_epoch`.

    The order depends on (seed, epoch) only. The examples are shuffled, cut into megabatches, sorted by length
    inside each, cut into global batches of batch_size * num_replicas, and the global batches are shuffled.
    Each rank takes every num_replicas-th example of a global batch: ranks have disjoint examples, equally
    many, and batches of similar length at each step. On one rank every example comes exactly once; on
    several, the len(lengths) % num_replicas examples at the end of the shuffle sit the epoch out,
    others each epoch. The attribute `skip` leaves out the first so many examples of the rank.

    Args:
        lengths: Length of each example.
        batch_size: Examples per batch and rank, as given to the DataLoader.
        num_replicas: Number of ranks.
        rank: This rank, from 0.
        seed: Seed of the order, the same on all ranks.
        group: Sort by length; False leaves the plain shuffle.

    Raises:
        ValueError: There are fewer examples than ranks, or batch_size is below 1.
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
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        if len(lengths) < num_replicas:
            raise ValueError(f"{len(lengths)} examples cannot be shared by {num_replicas} ranks")
        # drop_last: the base class then counts len // num_replicas examples per rank
        super().__init__(lengths, num_replicas=num_replicas, rank=rank, seed=seed, drop_last=True)  # type: ignore[arg-type]
        self.lengths = torch.tensor(lengths)
        self.global_batch = batch_size * num_replicas
        self.group = group
        self.skip = 0

    def __iter__(self) -> Iterator[int]:
        # The seed is spread first, so that epoch 1 of seed 0 is not epoch 0 of seed 1.
        spread = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(self.seed)))
        generator = torch.Generator().manual_seed(spread + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator)[: self.total_size]
        whole = self.total_size - self.total_size % self.global_batch
        # The short last batch is set aside before sorting, lest it always get the extremes.
        batches, last = self._group(order[:whole]), order[whole:]
        if self.group:
            batches = batches[torch.randperm(len(batches), generator=generator)]
        ours = torch.cat([batches.flatten(), last])[self.rank :: self.num_replicas]
        return iter(ours[self.skip :].tolist())

    def origin(self) -> dict[str, int]:
        """Return all that the order of an epoch follows from, beside the lengths themselves."""
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
