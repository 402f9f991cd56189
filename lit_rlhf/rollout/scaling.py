"""Scaling scores before they become token rewards."""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from lit_rlhf.functional import finish_moments, moments, whiten

RewardScaling = Literal["none", "batch", "running"]


class RewardScaler:
    """Brings scores to unit scale: ``batch`` whitens each rollout, ``running`` divides by the deviation so far.

    ``running`` keeps the scores' mean (Engstrom et al. 2020, arXiv:2005.12729, reward scaling). Its statistics are
    updated from sums over all ranks, so every rank holds the same ones and a checkpoint's copy fits all.

    Args:
        mode: ``none``, ``batch`` or ``running``.
    """

    def __init__(self, mode: RewardScaling) -> None:
        self.mode = mode
        self._total = [0.0, 0.0, 0.0]

    def __call__(self, scores: Tensor, all_reduce: Callable[[Tensor], Tensor]) -> Tensor:
        """Scale ``[N]`` scores.

        Args:
            scores: ``[N]`` float32.
            all_reduce: Sums a tensor over all ranks.
        """
        if self.mode == "none":
            return scores
        mask = torch.ones_like(scores, dtype=torch.bool)
        batch = all_reduce(moments(scores, mask))
        if self.mode == "batch":
            mean, var = finish_moments(batch)
            return whiten(scores, mask, mean=mean, var=var)
        total = batch.cpu().double() + torch.tensor(self._total, dtype=torch.float64)
        self._total = total.tolist()
        _, var = finish_moments(total)
        # Equal scores so far say nothing about the scale.
        return scores / torch.where(var > 0, var.sqrt(), 1.0).to(scores)

    def state_dict(self) -> dict[str, list[float]]:
        """Return the running sums as plain numbers."""
        return {"total": list(self._total)}

    def load_state_dict(self, state: Mapping[str, list[float]]) -> None:
        """Take over saved running sums."""
        self._total = [float(value) for value in state["total"]]
