"""Every setting of the losses in the numbers it decides, against slow loops; no model is loaded."""

import math
from collections import Counter
from collections.abc import Sequence
from statistics import fmean, variance
from typing import Any

import pytest
import torch
from torch import Tensor
from typed_numbers import (
    ADVANTAGES,
    NOW,
    OLD,
    REFERENCE,
    RETURNS,
    VALUES,
    VALUES_NOW,
    FixedBackbone,
    Rows,
    a_minibatch,
    assert_rows,
    kl_of,
    make,
    padded,
)

from lit_rlhf import (
    GRPO,
    PPO,
    RLOO,
    Experience,
    FixedKL,
    OnPolicyModule,
    Reinforce,
    ReinforcePlusPlus,
    ReMax,
    Sampling,
)


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


def test_a_critic_with_a_pass_of_its_own_is_differentiated_before_the_actors_pass_begins() -> None:
    """So that the activations of one pass are alive at a time."""
    weight, events = torch.nn.Parameter(torch.ones(())), []

    class Apart(FixedBackbone):
        def passes(self, roles: Sequence[str]) -> dict[str, Any]:
            return dict.fromkeys(roles)

        def role_parameters(self, role: str) -> dict[str, Any]:
            return {"weight": weight}

        def __call__(self, roles: Sequence[str], *inputs: Tensor, **options: Any) -> dict[str, Tensor]:
            events.append(tuple(roles))
            outputs = super().__call__(roles, *inputs, **options)
            if "critic" in outputs:
                outputs["critic"] = outputs["critic"] * weight
                outputs["critic"].register_hook(lambda _: events.append("backward"))
            return outputs

    module, b = make(PPO), a_minibatch()
    module.backbone = Apart()
    module.loss(b)
    assert events == [("critic",), "backward", ("actor",)]


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


@pytest.mark.parametrize(("checkpointing", "times"), [(False, 1), (True, 2)])
def test_gradient_checkpointing_computes_each_layer_again_in_backward(checkpointing: bool, times: int) -> None:
    module, computed = make(RLOO, gradient_checkpointing=checkpointing), []
    module.configure_model()
    with torch.no_grad():
        for name, parameter in module.backbone.named_parameters():
            if "lora_B" in name:
                parameter.normal_()  # so that every layer has a gradient
    for name, layer in module.backbone.named_modules():
        if name.endswith(".self_attn"):
            layer.register_forward_hook(lambda *_, name=name: computed.append(name))
    mask = torch.ones(2, 4, dtype=torch.bool)
    b = Experience(torch.randint(3, 900, (2, 6)), torch.ones(2, 6, dtype=torch.bool), mask, mask[:, 0])
    module.log_probs(b).sum().backward()
    assert set(Counter(computed).values()) == {times}
