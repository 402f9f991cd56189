"""Scaling scores before they become token rewards."""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from lit_rlhf.functional import finish_moments, moments

RewardScaling = Literal["none", "batch", "running"]


class RewardScaler:
    """Brings scores to unit scale: ``batch`` whitens each rollout, ``running`` divides by the deviation so far.

    ``running`` keeps the scores' mean (Engstrom et al. 2020, arXiv:2005.12729, reward scaling). Its statistics are
    updated from sums over all ranks, so every rank holds the same ones and a checkpoint's copy fits all.

    Args:
        mode: ``none``, ``batch`` or ``running``.
        clip: Clip scaled scores to ``[-clip, clip]``; None does not.
        missing_eos_penalty: Subtracted from the scaled score of a response that hit the length limit.
    """

    def __init__(self, mode: RewardScaling, clip: float | None = None, missing_eos_penalty: float = 0.0) -> None:
        self.mode = mode
        self.clip = clip
        self.missing_eos_penalty = missing_eos_penalty
        self._total = [0.0, 0.0, 0.0]
        self._mean = 0.0
        self._std = 1.0

    def update(self, scores: Tensor, all_reduce: Callable[[Tensor], Tensor]) -> None:
        """Take in a rollout's scores, before they are scaled.

        Args:
            scores: ``[N]`` float32.
            all_reduce: Sums a tensor over all ranks.
        """
        if self.mode == "none":
            return
        total = all_reduce(moments(scores, torch.ones_like(scores, dtype=torch.bool))).cpu().double()
        if self.mode == "running":
            total = total + torch.tensor(self._total, dtype=torch.float64)
            self._total = total.tolist()
        mean, var = (float(value) for value in finish_moments(total))
        self._mean = mean if self.mode == "batch" else 0.0
        # Equal scores say nothing about the scale.
        self._std = var**0.5 if var > 0 else 1.0

    def __call__(self, scores: Tensor) -> Tensor:
        """Scale ``[N]`` scores by what the last update found."""
        return scores if self.mode == "none" else (scores - self._mean) / self._std

    def problems(self) -> list[str]:
        """Return what is wrong with the settings, one line each."""
        return [] if self.clip is None or self.clip > 0 else [f"score_clip must be positive, got {self.clip}"]

    def shape(self, scores: Tensor, truncated: Tensor) -> Tensor:
        """Return ``[N]`` scores as they enter the token rewards: scaled, clipped, less the missing-EOS penalty.

        Args:
            scores: ``[N]`` float32, as the reward gave them.
            truncated: ``[N]`` bool, True = the response hit its length limit without an EOS.
        """
        scores = self(scores)
        if self.clip is not None:
            scores = scores.clamp(-self.clip, self.clip)
        return scores - self.missing_eos_penalty * truncated.to(scores.dtype)

    def state_dict(self) -> dict[str, list[float]]:
        """Return the running sums as plain numbers."""
        return {"total": list(self._total)}

    def load_state_dict(self, state: Mapping[str, list[float]]) -> None:
        """Restore saved running sums."""
        self._total = [float(value) for value in state["total"]]
