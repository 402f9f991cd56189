"""Every setting of the on-policy algorithms in the numbers it decides, against slow loops; no model is loaded."""

import math
from collections.abc import Sequence
from statistics import fmean, stdev, variance
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import make_ppo
from torch import Tensor

from lit_rlhf import (
    GRPO,
    PPO,
    RLOO,
    AdaptiveKL,
    Experience,
    FixedKL,
    OnPolicyModule,
    Reinforce,
    ReinforcePlusPlus,
    ReMax,
    Sampling,
)

Rows = list[list[float]]

# Four responses of 3, 1, 4 and 2 tokens, to two prompts.
OLD = [[-1.0, -2.0, -0.5], [-1.5], [-0.7, -1.1, -2.2, -0.9], [-3.0, -0.4]]
REFERENCE = [[-1.2, -1.6, -0.5], [-2.5], [-0.6, -1.9, -2.0, -1.3], [-2.4, -0.8]]
NOW = [[-0.6, -2.1, -0.55], [-1.9], [-0.72, -0.9, -2.6, -0.3], [-3.05, -0.35]]
VALUES = [[0.3, -0.2, 0.8], [1.1], [0.0, 0.5, -0.4, 0.9], [-0.6, 0.2]]
VALUES_NOW = [[0.5, -0.25, 1.6], [0.4], [0.05, 0.8, -0.4, 0.2], [-0.9, 0.6]]
RETURNS = [[1.0, 0.7, 0.4], [-0.5], [0.2, -0.3, 0.6, 1.5], [0.1, -1.2]]
ADVANTAGES = [[1.0, -0.5, 0.7], [-1.3], [0.4, 2.0, -0.8, 0.6], [-0.2, 1.1]]
SCORES = [2.0, -0.3, 0.8, -4.0]
TRUNCATED = [False, True, True, False]
GREEDY_SCORES, GREEDY_TRUNCATED = [0.5, 3.0], [True, False]


def padded(rows: Rows) -> Tensor:
    """The rows right-padded to one width, by a number that must not matter."""
    width = max(map(len, rows))
    return torch.tensor([row + [7.0] * (width - len(row)) for row in rows])


def an_experience(**filled: Any) -> Experience:
    lengths = torch.tensor([len(row) for row in OLD])
    mask = torch.arange(4) < lengths[:, None]
    attention = torch.cat([torch.ones(4, 2, dtype=torch.bool), mask], dim=1)
    return Experience(torch.ones(4, 6, dtype=torch.long), attention, mask, torch.tensor(TRUNCATED), **filled)


def a_rollout() -> Experience:
    """As it is before ``estimate``."""
    columns = {"log_probs": padded(OLD), "ref_log_probs": padded(REFERENCE), "values": padded(VALUES)}
    greedy = an_experience(scores=torch.tensor([*GREEDY_SCORES, 0.0, 0.0]))[:2]
    greedy.truncated = torch.tensor(GREEDY_TRUNCATED)
    return an_experience(**columns, scores=torch.tensor(SCORES), greedy=greedy)


def a_minibatch(count: float | None = None) -> Experience:
    """As it is in the loss."""
    columns = {"log_probs": OLD, "ref_log_probs": REFERENCE, "values": VALUES, "returns": RETURNS}
    filled = {name: padded(rows) for name, rows in {**columns, "advantages": ADVANTAGES}.items()}
    return an_experience(**filled, count=None if count is None else torch.tensor(count))


def make(kind: type[OnPolicyModule], **settings: Any) -> Any:
    sizes = {"rollout_size": 4, "minibatch_size": 4, "inner_epochs": 1}
    return make_ppo(kind, **{**sizes, **settings})  # type: ignore[type-var]


def assert_rows(got: Tensor, expected: Rows) -> None:
    for row, values in enumerate(expected):
        assert got[row, : len(values)].tolist() == pytest.approx(values, rel=1e-4, abs=1e-5)


# ---- estimates -----------------------------------------------------------------------------------------------------

SHAPING = {"score_clip": 1.5, "missing_eos_penalty": 0.25, "kl": FixedKL(0.3), "kl_estimator": "k2"}
DEFAULTS: dict[str, Any] = {}


def shaped(settings: dict[str, Any], scores: Sequence[float], truncated: Sequence[bool]) -> list[float]:
    clip, penalty = settings.get("score_clip", math.inf), settings.get("missing_eos_penalty", 0.0)
    return [min(max(s, -clip), clip) - penalty * t for s, t in zip(scores, truncated, strict=True)]


def kl_of(estimator: str, p: float, q: float) -> float:
    return {"k1": p - q, "k2": (p - q) ** 2 / 2, "k3": math.exp(q - p) - 1 + p - q}[estimator]


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
    module, e = make(GRPO, samples_per_prompt=2, normalise_by_std=by_std, **settings), a_rollout()
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


# ---- losses --------------------------------------------------------------------------------------------------------


def mean_of(rows: Rows, count: float | None, by_response: bool = False) -> float:
    if by_response:
        return fmean(fmean(row) for row in rows)
    every = [x for row in rows for x in row]
    return sum(every) / (len(every) if count is None else count)


def clipped_by_hand(clip: float) -> tuple[Rows, Rows]:
    """Return each token's loss, and 1 where the clip decides it."""
    losses, clips = [], []
    for now, old, advantages in zip(NOW, OLD, ADVANTAGES, strict=True):
        ratios = [math.exp(p - q) for p, q in zip(now, old, strict=True)]
        plain = [-a * r for a, r in zip(advantages, ratios, strict=True)]
        limited = [-a * min(max(r, 1 - clip), 1 + clip) for a, r in zip(advantages, ratios, strict=True)]
        losses.append([max(pair) for pair in zip(plain, limited, strict=True)])
        clips.append([float(b > a) for a, b in zip(plain, limited, strict=True)])
    return losses, clips


@pytest.mark.parametrize("count", [None, 25.0])
@pytest.mark.parametrize("settings", [{}, {"clip": 0.05}, {"clip": 0.45}])
@pytest.mark.parametrize("kind", [PPO, RLOO, ReinforcePlusPlus])
def test_the_clip_of_the_policy_loss(
    kind: type[OnPolicyModule], settings: dict[str, float], count: float | None
) -> None:
    losses, clips = clipped_by_hand(settings.get("clip", 0.2))
    loss, stats = make(kind, **settings).policy_loss(padded(NOW), a_minibatch(count))
    assert float(loss) == pytest.approx(mean_of(losses, count), rel=1e-5)
    assert float(stats["policy_loss"]) == pytest.approx(mean_of(losses, count), rel=1e-5)
    assert float(stats["clip_fraction"]) == pytest.approx(mean_of(clips, count))


@pytest.mark.parametrize("count", [None, 25.0])
@pytest.mark.parametrize(
    "settings", [{}, {"clip": 0.05}, {"aggregation": "token"}, {"kl_estimator": "k2"}, {"kl": FixedKL(0.7)}]
)
def test_grpos_loss(settings: dict[str, Any], count: float | None) -> None:
    """The count of tokens divides means over tokens; a mean over responses has as many in every minibatch."""
    by_response = settings.get("aggregation", "response") == "response"
    losses, _ = clipped_by_hand(settings.get("clip", 0.2))
    estimator = settings.get("kl_estimator", "k3")
    kl = [[kl_of(estimator, p, q) for p, q in zip(*rows, strict=True)] for rows in zip(NOW, REFERENCE, strict=True)]
    policy, penalty = mean_of(losses, count, by_response), mean_of(kl, count, by_response)
    loss, stats = make(GRPO, **settings).policy_loss(padded(NOW), a_minibatch(count))
    beta = settings["kl"].value if "kl" in settings else 0.05
    assert float(loss) == pytest.approx(policy + beta * penalty, rel=1e-5)
    assert float(stats["policy_loss"]) == pytest.approx(policy, rel=1e-5)
    assert float(stats["kl_loss"]) == pytest.approx(penalty, rel=1e-5)


@pytest.mark.parametrize("count", [None, 25.0])
@pytest.mark.parametrize("kind", [Reinforce, ReMax])
def test_the_policy_gradient_loss(kind: type[OnPolicyModule], count: float | None) -> None:
    tokens = [[-a * p for a, p in zip(*rows, strict=True)] for rows in zip(ADVANTAGES, NOW, strict=True)]
    loss, _ = make(kind).policy_loss(padded(NOW), a_minibatch(count))
    assert float(loss) == pytest.approx(mean_of(tokens, count), rel=1e-5)


@pytest.mark.parametrize("count", [None, 25.0])
@pytest.mark.parametrize("settings", [{}, {"value_clip": 0.05, "value_coef": 0.7}, {"value_clip": None}])
def test_the_value_loss(settings: dict[str, Any], count: float | None) -> None:
    clip, coefficient = settings.get("value_clip", 0.2), settings.get("value_coef", 0.1)
    clip = math.inf if clip is None else clip
    tokens, clips, errors = [], [], []
    for now, old, returns in zip(VALUES_NOW, VALUES, RETURNS, strict=True):
        limited = [min(max(v, w - clip), w + clip) for v, w in zip(now, old, strict=True)]
        pairs = [((v - g) ** 2, (c - g) ** 2) for v, c, g in zip(now, limited, returns, strict=True)]
        tokens.append([max(pair) / 2 for pair in pairs])
        clips.append([float(b > a) for a, b in pairs])
        errors += [g - v for v, g in zip(now, returns, strict=True)]
    loss, stats = make(PPO, **settings).value_loss(padded(VALUES_NOW), a_minibatch(count))
    assert float(loss) == pytest.approx(coefficient * mean_of(tokens, count), rel=1e-5)
    assert float(stats["value_loss"]) == pytest.approx(mean_of(tokens, count), rel=1e-5)
    assert float(stats["value_clip_fraction"]) == pytest.approx(mean_of(clips, count))
    explained = 1 - variance(errors) / variance([g for row in RETURNS for g in row])
    assert float(stats["explained_variance"]) == pytest.approx(explained, rel=1e-4)


class FixedBackbone:
    """Reads typed numbers, in one pass, and remembers what it was asked."""

    is_sharded = False

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def passes(self, roles: Sequence[str]) -> dict[str, Any]:
        return {"one": roles}

    def __call__(self, roles: Sequence[str], *inputs: Tensor, **options: Any) -> dict[str, Tensor]:
        self.asked.append(options)
        every = {"actor": NOW, "critic": VALUES_NOW, "entropy": [[0.5 - p for p in row] for row in NOW]}
        return {name: padded(rows) for name, rows in every.items() if name in roles or name == "entropy"}


@pytest.mark.parametrize("count", [None, 25.0])
@pytest.mark.parametrize("coefficient", [0.0, 0.3])
def test_the_sum_of_the_losses(coefficient: float, count: float | None) -> None:
    module, b = make(PPO, entropy_coef=coefficient, value_coef=0.7, value_gradient=0.4), a_minibatch(count)
    module.backbone = FixedBackbone()
    entropy = mean_of([[0.5 - p for p in row] for row in NOW], count)
    policy, value = module.policy_loss(padded(NOW), b)[0], module.value_loss(padded(VALUES_NOW), b)[0]
    assert float(module.loss(b)) == pytest.approx(float(policy + value) - coefficient * entropy, rel=1e-5)
    assert module.backbone.asked == [{"value_gradient": 0.4, "entropy": coefficient > 0}]
    assert {"policy_loss", "approx_kl", "value_loss", "explained_variance"} <= set(module.minibatch_stats)


@pytest.mark.parametrize("kind", [PPO, RLOO])
def test_temperature_reaches_the_log_probs_that_are_trained(kind: type[OnPolicyModule]) -> None:
    module = make(kind, sampling=Sampling(max_new_tokens=4, temperature=0.6))
    module.configure_model()
    tokens = torch.tensor([[5, 17, 90, 4, 33, 8], [7, 7, 12, 250, 61, 900]])
    mask = torch.ones(2, 4, dtype=torch.bool)
    b = Experience(tokens, torch.ones_like(tokens).bool(), mask, mask[:, 0])
    with torch.no_grad(), module.backbone.use("actor") as model:
        logits = model(tokens).logits.double() / 0.6
        expected = [[float(logits[r, t - 1].log_softmax(-1)[tokens[r, t]]) for t in range(2, 6)] for r in range(2)]
        assert_rows(module.log_probs(b), expected)


# ---- what is refused -----------------------------------------------------------------------------------------------

SHORT = AdaptiveKL(0.1, horizon=2.0)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (PPO, {"gamma": 1.1}, "gamma must be in"),
        (PPO, {"gae_lambda": -0.1}, "gae_lambda must be in"),
        (PPO, {"clip": 0.0}, "clip must be positive"),
        (PPO, {"target_kl": 0.0}, "target_kl must be positive"),
        (PPO, {"value_clip": 0.0}, "value_clip must be positive"),
        (PPO, {"critic_lr": 0.0}, "critic_lr must be positive"),
        (PPO, {"value_coef": -0.1}, "value_coef must be at least 0"),
        (PPO, {"entropy_coef": -0.1}, "entropy_coef must be at least 0"),
        (PPO, {"critic_warmup_iterations": -1}, "critic_warmup_iterations must be at least 0"),
        (Reinforce, {"gamma": -0.1}, "gamma must be in"),
        (ReMax, {"gamma": 1.1}, "gamma must be in"),
        (RLOO, {"clip": 0.0}, "clip must be positive"),
        (ReinforcePlusPlus, {"clip": -1.0}, "clip must be positive"),
        (GRPO, {"samples_per_prompt": 1}, "samples_per_prompt must be at least 2 for GRPO"),
        (PPO, {"score_clip": 0.0}, "score_clip must be positive"),
        (PPO, {"kl": SHORT, "rollout_size": 12}, "kl.horizon 2 must be above a fifth of an iteration's 12"),
        (PPO, {"sampling": Sampling(top_p=0.0)}, "sampling.top_p"),
        (PPO, {"keep_log_probs": True, "engine": SimpleNamespace(gives_log_probs=False)}, "gives no log-probs"),
        (
            PPO,
            {"compile_layers": True, "engine": SimpleNamespace(gives_log_probs=True, compile=True)},
            "compile_layers and engine.compile exclude each other",
        ),
    ],
)
def test_a_setting_out_of_range_is_named(kind: type[OnPolicyModule], settings: dict[str, Any], message: str) -> None:
    (problem,) = [problem for problem in make(kind, **settings).problems() if message in problem]
    assert problem


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (PPO, {"value_clip": None, "target_kl": None, "critic_lr": None, "gamma": 0.0, "gae_lambda": 0.0}),
        (PPO, {"value_coef": 0.0, "entropy_coef": 0.0, "value_gradient": 0.0, "score_clip": None}),
        (PPO, {"compile_layers": True, "kl": SHORT, "rollout_size": 8}),
        (ReMax, {"advantage_clip": None, "gamma": 1.0, "samples_per_prompt": 1}),
        (RLOO, {"samples_per_prompt": 2}),
        (GRPO, {"samples_per_prompt": 2, "kl_estimator": "k2"}),
    ],
)
def test_a_setting_at_the_edge_of_its_range_is_taken(kind: type[OnPolicyModule], settings: dict[str, Any]) -> None:
    assert make(kind, **settings).problems() == []


def test_the_length_of_an_iteration_is_that_of_all_ranks() -> None:
    module = make(PPO, kl=AdaptiveKL(0.1, horizon=1.5))
    assert module.problems() == []
    strategy = SimpleNamespace(state=SimpleNamespace(fn=None), world_size=2, precision="32-true")
    module._trainer = strategy
    assert module.problems() == ["kl.horizon 1.5 must be above a fifth of an iteration's 8 responses"]
