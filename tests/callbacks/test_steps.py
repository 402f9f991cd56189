"""Optimizer steps that are left out: which parameters keep their gradients, and when; on typed numbers."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lit_rlhf.callbacks import CriticWarmup, KLTarget


def an_optimizer() -> torch.optim.SGD:
    """Two groups, the actor's and the critic's, with gradients."""
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    for parameter in parameters:
        parameter.grad = torch.ones(2)
    return torch.optim.SGD([{"params": parameters[:2]}, {"params": parameters[2:]}], lr=1.0)


def with_gradients(optimizer: torch.optim.SGD) -> list[bool]:
    return [p.grad is not None for group in optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize(
    ("iteration", "kept"), [(0, [False, False, True]), (1, [False, False, True]), (2, [True] * 3), (3, [True] * 3)]
)
def test_the_actor_stands_still_for_the_iterations_of_the_warm_up(iteration: int, kept: list[bool]) -> None:
    optimizer, trainer = an_optimizer(), SimpleNamespace(current_epoch=iteration)
    CriticWarmup(2).on_before_optimizer_step(trainer, None, optimizer)  # type: ignore[arg-type]
    assert with_gradients(optimizer) == kept


def a_policy(kl: float, elsewhere: float) -> Any:
    """One of two ranks; the other one's minibatch moved by ``elsewhere``."""
    strategy = SimpleNamespace(reduce=lambda kl, reduce_op: {"mean": (kl + elsewhere) / 2}[reduce_op])
    return SimpleNamespace(
        skip_minibatches=False, minibatch_stats={"approx_kl": torch.tensor(kl)}, device=torch.device("cpu"),
        _trainer=SimpleNamespace(world_size=2, strategy=strategy),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kl", "elsewhere", "skips"), [(0.0, 0.5, True), (0.5, 0.0, True), (0.3, 0.0, False), (0.0, 0.3, False)]
)
def test_the_target_is_compared_with_the_mean_over_ranks(kl: float, elsewhere: float, skips: bool) -> None:
    target, policy, optimizer = KLTarget(0.2), a_policy(kl, elsewhere), an_optimizer()
    target.on_train_batch_end(None, policy, None, None, 0)  # type: ignore[arg-type]
    assert policy.skip_minibatches is skips
    target.on_before_optimizer_step(None, policy, optimizer)  # type: ignore[arg-type]
    assert with_gradients(optimizer) == [not skips] * 3


def test_minibatches_are_left_out_until_the_next_iteration() -> None:
    target, policy = KLTarget(0.2), a_policy(0.5, 0.5)
    target.on_train_batch_end(None, policy, None, None, 0)  # type: ignore[arg-type]
    policy.minibatch_stats = {}  # what is left out has none
    target.on_train_batch_end(None, policy, None, None, 1)  # type: ignore[arg-type]
    assert policy.skip_minibatches
    target.on_train_epoch_start(None, policy)  # type: ignore[arg-type]
    assert not policy.skip_minibatches
