import random

import pytest

from lit_rlhf.data import LengthGroupedSampler

LENGTHS = random.Random(0).choices(range(1, 500), k=1003)


def order(epoch=0, lengths=LENGTHS, batch_size=8, **kwargs):
    sampler = LengthGroupedSampler(lengths, batch_size, **kwargs)
    sampler.set_epoch(epoch)
    indices = list(sampler)
    assert len(indices) == len(sampler)
    return indices


def padding(indices, batch_size=8):
    batches = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
    return sum(max(LENGTHS[i] for i in batch) * len(batch) for batch in batches) - sum(LENGTHS[i] for i in indices)


@pytest.mark.parametrize("group", [True, False])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 1003])
def test_one_rank_sees_every_example_once(count, group):
    assert sorted(order(lengths=LENGTHS[:count], group=group)) == list(range(count))


def test_grouping_saves_most_padding():
    assert padding(order()) < 0.2 * padding(order(group=False))


def test_batches_do_not_come_in_order_of_length():
    indices = order()
    starts = [LENGTHS[i] for i in indices[: 50 * 8 : 8]]
    assert starts != sorted(starts)


def test_order_depends_on_seed_and_epoch_only():
    assert order(epoch=3, seed=5) == order(epoch=3, seed=5)
    orders = [tuple(order(epoch=epoch, seed=seed)) for epoch in range(3) for seed in range(3)]
    assert len(set(orders)) == 9


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_are_disjoint_and_equally_long(world):
    ranks = [order(num_replicas=world, rank=rank) for rank in range(world)]
    seen = [index for rank in ranks for index in rank]
    assert {len(rank) for rank in ranks} == {1003 // world}
    assert len(set(seen)) == len(seen)


def test_examples_that_sit_out_change_with_the_epoch():
    left_out = set()
    for epoch in range(8):
        seen = {i for rank in range(2) for i in order(epoch=epoch, num_replicas=2, rank=rank)}
        left_out |= set(range(1003)) - seen
    assert len(left_out) > 1


def test_ranks_have_batches_of_similar_length_at_each_step():
    first, second = (order(num_replicas=2, rank=rank) for rank in range(2))
    whole = len(first) - len(first) % 8  # the last, short batch is not grouped
    gaps = [
        abs(max(LENGTHS[j] for j in first[i : i + 8]) - max(LENGTHS[j] for j in second[i : i + 8]))
        for i in range(0, whole, 8)
    ]
    assert sum(gaps) / len(gaps) < 10


def test_impossible_sizes():
    with pytest.raises(ValueError, match="1 examples cannot be shared by 2 ranks"):
        LengthGroupedSampler([3], 1, num_replicas=2)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        LengthGroupedSampler([3], 0)
