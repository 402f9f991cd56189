"""Every setting of the estimates in the numbers it decides, against slow loops; no model is loaded."""

import math
from collections.abc import Sequence
from statistics import fmean, stdev, variance
from typing import Any

import pytest
import torch
from typed_numbers import (
    GREEDY_SCORES,
    GREEDY_TRUNCATED,
    OLD,
    REFERENCE,
    SCORES,
    TRUNCATED,
    VALUES,
    Rows,
    a_rollout,
    assert_rows,
    kl_of,
    make,
    padded,
)

from lit_rlhf import (
    GRPO,
    PPO,
    RLOO,
    FixedKL,
    OnPolicyModule,
    Reinforce,
    ReinforcePlusPlus,
    ReMax,
)

SHAPING = {"score_clip": 1.5, "missing_eos_penalty": 0.25, "kl": FixedKL(0.3), "kl_estimator": "k2"}
DEFAULTS: dict[str, Any] = {}


def shaped(settings: dict[str, Any], scores: Sequence[float], truncated: Sequence[bool]) -> list[float]:
    clip, penalty = settings.get("score_clip", math.inf), settings.get("missing_eos_penalty", 0.0)
    return [min(max(s, -clip), clip) - penalty * t for s, t in zip(scores, truncated, strict=True)]


def penalties(settings: dict[str, Any]) -> Rows:
    """The KL penalty of each token, times its coefficient; 0.05 and k1 unless they are given."""
    beta = settings["kl"].value if "kl" in settings else 0.05
    estimator = settings.get("kl_estimator", "k1")
    pairs = zip(OLD, REFERENCE, strict=True)
    return [[beta * kl_of(estimator, p, q) for p, q in zip(*rows, strict=True)] for rows in pairs]


def token_rewards(settings: dict[str, Any]) -> Rows:
    rewards = [[-kl for kl in row] for row in penalties(settings)]
    for row, score in zip(rewards, shaped(settings, SCORES, TRUNCATED), strict=True):
        row[-1] += score
    return rewards


def to_go(rows: Rows, gamma: float) -> Rows:
    return [[sum(gamma ** (j - t) * row[j] for j in range(t, len(row))) for t in range(len(row))] for row in rows]


def white(rows: Rows, elsewhere: Sequence[float] = ()) -> Rows:
    every = [x for row in rows for x in row] + list(elsewhere)
    return [[(x - fmean(every)) / stdev(every) for x in row] for row in rows]


def gae_by_hand(rewards: Rows, gamma: float, lam: float) -> Rows:
    """Advantages as the weighted sum of all later temporal differences."""
    deltas = []
    for row, values in zip(rewards, VALUES, strict=True):
        following = [*values[1:], 0.0]
        deltas.append([r + gamma * n - v for r, v, n in zip(row, values, following, strict=True)])
    return to_go(deltas, gamma * lam)


@pytest.mark.parametrize("settings", [DEFAULTS, {"gamma": 0.9, "gae_lambda": 0.7, **SHAPING}])
def test_ppos_estimate(settings: dict[str, Any]) -> None:
    module, e = make(PPO, **settings), a_rollout()
    module.estimate(e)
    advantages = gae_by_hand(token_rewards(settings), settings.get("gamma", 1.0), settings.get("gae_lambda", 0.95))
    returns = [[a + v for a, v in zip(*rows, strict=True)] for rows in zip(advantages, VALUES, strict=True)]
    assert_rows(e.returns, returns)
    assert_rows(e.advantages, white(advantages))


@pytest.mark.parametrize("settings", [DEFAULTS, {"gamma": 0.9, **SHAPING}])
def test_reinforces_estimate(settings: dict[str, Any]) -> None:
    module, e = make(Reinforce, **settings), a_rollout()
    module.estimate(e)
    returns = to_go(token_rewards(settings), settings.get("gamma", 1.0))
    assert_rows(e.returns, returns)
    assert_rows(
        e.advantages, [[g - v for g, v in zip(*rows, strict=True)] for rows in zip(returns, VALUES, strict=True)]
    )


@pytest.mark.parametrize("settings", [DEFAULTS, {"gamma": 0.9, **SHAPING}])
def test_reinforce_plus_plus_estimate(settings: dict[str, Any]) -> None:
    module, e = make(ReinforcePlusPlus, **settings), a_rollout()
    module.estimate(e)
    assert_rows(e.advantages, white(to_go(token_rewards(settings), settings.get("gamma", 1.0))))


@pytest.mark.parametrize("kind", [PPO, ReinforcePlusPlus])
def test_advantages_are_whitened_over_the_tokens_of_all_ranks(kind: type[OnPolicyModule]) -> None:
    elsewhere = [2.0, -1.0, 4.0]  # another rank's three tokens: count 3, sum 5, sum of squares 21
    module, e = make(kind), a_rollout()
    module.all_reduce_sum = lambda moments: moments + torch.tensor([3.0, 5.0, 21.0])
    module.estimate(e)
    rewards = token_rewards({})
    assert_rows(e.advantages, white(gae_by_hand(rewards, 1.0, 0.95) if kind is PPO else to_go(rewards, 1.0), elsewhere))


@pytest.mark.parametrize(
    "settings",
    [
        DEFAULTS,
        {"gamma": 0.9, "advantage_clip": 2.0, **SHAPING},
        {"gamma": 0.8, "advantage_clip": None, "kl_to_go": True, **SHAPING},
    ],
)
def test_remax_estimate(settings: dict[str, Any]) -> None:
    module, e = make(ReMax, samples_per_prompt=2, **settings), a_rollout()
    module.estimate(e)
    gamma, clip = settings.get("gamma", 0.99), settings.get("advantage_clip", 5.0) or math.inf
    scores, base = shaped(settings, SCORES, TRUNCATED), shaped(settings, GREEDY_SCORES, GREEDY_TRUNCATED)
    gains = [min(max(score - base[row // 2], -clip), clip) for row, score in enumerate(scores)]
    kl = penalties(settings)
    kl = to_go(kl, gamma) if settings.get("kl_to_go") else kl
    assert_rows(
        e.advantages,
        [[gamma ** (len(k) - t) * a - k[t] for t in range(len(k))] for a, k in zip(gains, kl, strict=True)],
    )


@pytest.mark.parametrize("settings", [DEFAULTS, SHAPING])
def test_rloos_estimate(settings: dict[str, Any]) -> None:
    module, e = make(RLOO, samples_per_prompt=2, **settings), a_rollout()
    module.estimate(e)
    scores = shaped(settings, SCORES, TRUNCATED)
    rewards = [score - sum(row) for score, row in zip(scores, penalties(settings), strict=True)]
    gains = [rewards[0] - rewards[1], rewards[1] - rewards[0], rewards[2] - rewards[3], rewards[3] - rewards[2]]
    assert_rows(e.advantages, [[gain] * len(row) for gain, row in zip(gains, OLD, strict=True)])


@pytest.mark.parametrize("by_std", [True, False])
@pytest.mark.parametrize("settings", [DEFAULTS, {**SHAPING, "kl_estimator": "k3"}])
def test_grpos_estimate(settings: dict[str, Any], by_std: bool) -> None:
    module, e = make(GRPO, samples_per_prompt=2, normalize_by_std=by_std, **settings), a_rollout()
    module.estimate(e)
    scores = shaped(settings, SCORES, TRUNCATED)
    gains = []
    for row, score in enumerate(scores):
        group = scores[row - row % 2 : row - row % 2 + 2]
        gains.append((score - fmean(group)) / (stdev(group) + 1e-4 if by_std else 1.0))
    assert_rows(e.advantages, [[gain] * len(row) for gain, row in zip(gains, OLD, strict=True)])


@pytest.mark.parametrize("kind", [PPO, Reinforce])
def test_value_losses_are_balanced_by_the_variance_of_the_returns_of_all_ranks(kind: type[OnPolicyModule]) -> None:
    module, e = make(kind, balance_losses=True, value_clip=None, value_coef=0.7), a_rollout()
    module.all_reduce_sum = lambda moments: moments + torch.tensor([3.0, 5.0, 21.0])
    module.estimate(e)
    returns = [[float(x) for x in row[: len(old)]] for row, old in zip(e.returns, OLD, strict=True)]
    every = [x for row in returns for x in row] + [2.0, -1.0, 4.0]
    squares = [(v - g) ** 2 for rows in zip(VALUES, returns, strict=True) for v, g in zip(*rows, strict=True)]
    loss, _ = module.value_loss(padded(VALUES), e)
    assert float(loss) == pytest.approx(0.7 / variance(every) * 0.5 * fmean(squares), rel=1e-4)
    e.scores, e.ref_log_probs, e.values = torch.zeros(4), e.log_probs, torch.zeros(4, 4)
    module.all_reduce_sum = lambda moments: moments
    module.estimate(e)  # all returns are 0
    assert float(module.value_loss(torch.ones(4, 4), e)[0]) == pytest.approx(0.7 * 0.5)
