"""The loss of one minibatch, by the algorithm's own module, which allocates and frees as it does in training."""

import inspect

import torch
from torch import Tensor

from lit_rlhf.algorithms import GRPO, PPO, RLOO, SFT, OnPolicyModule, Reinforce, ReinforcePlusPlus, ReMax
from lit_rlhf.backbone import Backbone
from lit_rlhf.rollout import Experience

ALGORITHMS: dict[str, type[OnPolicyModule]] = {
    "ppo": PPO,
    "reinforce": Reinforce,
    "remax": ReMax,
    "rloo": RLOO,
    "grpo": GRPO,
    "reinforce_plus_plus": ReinforcePlusPlus,
}


def roles_of(algorithm: str) -> tuple[str, ...]:
    """Return the roles that an algorithm (or ``sft``) uses, the reward's aside."""
    return ALGORITHMS[algorithm].roles if algorithm in ALGORITHMS else ("actor",)


def trained_roles(algorithm: str) -> list[str]:
    """Return the roles that an algorithm's loss uses."""
    return [role for role in roles_of(algorithm) if role in ("actor", "critic")]


def default_samples(algorithm: str) -> int:
    """Return how many responses an algorithm samples to each prompt by default."""
    parameter = inspect.signature(ALGORITHMS[algorithm].__init__).parameters.get("samples_per_prompt")
    return 1 if parameter is None else int(parameter.default)


def make_module(algorithm: str, backbone: Backbone) -> OnPolicyModule | SFT:
    """Return the algorithm's module (or SFT's) on a backbone that is built already; no trainer, nothing logged.

    Call it outside a fake-tensor mode: its metrics keep their own tensors.
    """
    kind: type[OnPolicyModule | SFT] = ALGORITHMS.get(algorithm, SFT)
    module = kind(model="", optimizer=torch.optim.AdamW)
    module.backbone = backbone
    module.log_all = lambda *_, **__: None  # type: ignore[method-assign]
    return module


def minibatch_loss(module: OnPolicyModule | SFT, tokens: Tensor, attention_mask: Tensor, mask: Tensor) -> Tensor:
    """Return the loss of a minibatch whose every other field is zero.

    Args:
        module: See :func:`make_module`.
        tokens: ``[B, P+T]`` long.
        attention_mask: ``[B, P+T]`` bool.
        mask: ``[B, T]`` bool.
    """
    if not isinstance(module, OnPolicyModule):
        return module.losses({"tokens": tokens, "attention_mask": attention_mask, "mask": mask})[0]
    names = ("log_probs", "ref_log_probs", "values", "advantages", "returns")
    zeros = {name: torch.zeros(mask.shape) for name in names}
    truncated = torch.zeros(len(mask), dtype=torch.bool)
    return module.loss(Experience(tokens, attention_mask, mask, truncated, count=torch.ones(()), **zeros))
