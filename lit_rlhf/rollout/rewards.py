"""Rewards: the reward role, a Python function, or a weighted sum of rewards."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Scored:
    """What a reward sees of N responses.

    Args:
        prompts: Prompt texts.
        responses: Response texts, special tokens removed.
        columns: The data set's other columns, each a list of N.
        role_scores: ``[N]`` float32, what the reward role said; None if no reward asked for it.
    """

    prompts: list[str]
    responses: list[str]
    columns: Mapping[str, list[Any]]
    role_scores: Tensor | None = None


class Reward(ABC):
    """Rates whole responses. Subclass it, or use :class:`FunctionReward`, and name the class path in YAML."""

    needs_reward_role: bool = False

    @abstractmethod
    def score(self, batch: Scored) -> Tensor:
        """Return ``[N]`` float32, higher is better."""


class RoleReward(Reward):
    """The learned reward: the layout's reward role."""

    needs_reward_role = True

    def score(self, batch: Scored) -> Tensor:
        """Return the reward role's scores."""
        if batch.role_scores is None:
            raise ValueError("RoleReward: the reward role was not run")
        return batch.role_scores


class FunctionReward(Reward):
    """A Python function, such as a rule, a classifier or a remote judge.

    Args:
        function: Import path of ``f(prompts, responses, **columns) -> sequence of float``.
    """

    def __init__(self, function: Callable[..., Sequence[float]]) -> None:
        self.function = function

    def score(self, batch: Scored) -> Tensor:
        """Return the function's numbers.

        Raises:
            ValueError: It returned the wrong count, or something that is not a finite number; the sample is named.
        """
        name = getattr(self.function, "__qualname__", type(self.function).__name__)
        if taken := {"prompts", "responses"} & set(batch.columns):
            raise ValueError(
                f"reward function {name}: the data's column {sorted(taken)[0]!r} has the name of an argument"
            )
        values = list(self.function(batch.prompts, batch.responses, **batch.columns))
        if len(values) != len(batch.responses):
            raise ValueError(
                f"reward function {name} returned {len(values)} numbers for {len(batch.responses)} responses"
            )
        for index, value in enumerate(values):
            try:
                finite = math.isfinite(value)
            except TypeError:
                finite = False
            if not finite:
                where = f"prompt {batch.prompts[index]!r}, response {batch.responses[index]!r}"
                raise ValueError(f"reward function {name} returned {value!r} for sample {index} ({where})")
        return torch.tensor([float(value) for value in values], dtype=torch.float32)


class WeightedReward(Reward):
    """A weighted sum of rewards.

    Args:
        rewards: The rewards.
        weights: One factor each.
    """

    def __init__(self, rewards: list[Reward], weights: list[float]) -> None:
        if len(rewards) != len(weights) or not rewards:
            raise ValueError(f"WeightedReward: {len(rewards)} rewards need as many weights, got {len(weights)}")
        self.rewards, self.weights = rewards, weights
        self.needs_reward_role = any(reward.needs_reward_role for reward in rewards)

    def score(self, batch: Scored) -> Tensor:
        """Return the sum."""
        parts = [reward.score(batch) * weight for reward, weight in zip(self.rewards, self.weights, strict=True)]
        device = batch.role_scores.device if batch.role_scores is not None else parts[0].device
        return torch.stack([part.to(device) for part in parts]).sum(dim=0)
