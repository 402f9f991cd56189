"""How well scores tell chosen responses from rejected ones."""

import torch
from torch import Tensor
from torchmetrics import Metric


def _check_pairs(chosen_scores: Tensor, rejected_scores: Tensor) -> None:
    if chosen_scores.dim() != 1:
        raise ValueError(f"chosen_scores must have 1 dimension(s), got shape {tuple(chosen_scores.shape)}")
    if rejected_scores.shape != chosen_scores.shape:
        raise ValueError(
            f"rejected_scores has shape {tuple(rejected_scores.shape)}, "
            f"but chosen_scores has shape {tuple(chosen_scores.shape)}"
        )


class PairwiseAccuracy(Metric):
    """Share of pairs whose chosen response scores higher; a tie counts half. nan before the first pair.

    A pair with a nan score counts as wrong.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    half_points: Tensor
    pairs: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("half_points", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("pairs", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, chosen_scores: Tensor, rejected_scores: Tensor) -> None:
        """Count more pairs.

        Args:
            chosen_scores: [n] float.
            rejected_scores: [n] float.

        Raises:
            ValueError: The shapes differ or are not one-dimensional.
        """
        _check_pairs(chosen_scores, rejected_scores)
        wins, ties = chosen_scores > rejected_scores, chosen_scores == rejected_scores
        self.half_points = self.half_points + 2 * wins.sum() + ties.sum()
        self.pairs = self.pairs + chosen_scores.numel()

    def compute(self) -> Tensor:
        """Accuracy so far in [0, 1], 0-dim float32."""
        return (self.half_points.double() / (2 * self.pairs)).float()


class RewardMargin(Metric):
    """Mean of chosen score - rejected score over all pairs. nan before the first pair."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    difference: Tensor
    pairs: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("difference", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("pairs", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, chosen_scores: Tensor, rejected_scores: Tensor) -> None:
        """Add more pairs.

        Args:
            chosen_scores: [n] float.
            rejected_scores: [n] float.

        Raises:
            ValueError: The shapes differ or are not one-dimensional.
        """
        _check_pairs(chosen_scores, rejected_scores)
        difference = chosen_scores.detach().double() - rejected_scores.detach().double()
        self.difference = self.difference + difference.sum()
        self.pairs = self.pairs + chosen_scores.numel()

    def compute(self) -> Tensor:
        """Mean margin so far, 0-dim float32."""
        return (self.difference / self.pairs).float()
