"""How well scores tell chosen responses from rejected ones."""

import torch
from torch import Tensor
from torchmetrics import MeanMetric


class PairMean(MeanMetric):
    """Mean of :meth:`of_pairs` over all pairs, summed in float64; nan before the first pair."""

    higher_is_better = True  # type: ignore[assignment]  # annotated as None in torchmetrics

    def __init__(self) -> None:
        super().__init__(nan_strategy="disable")
        self.set_dtype(torch.float64)

    def of_pairs(self, chosen_scores: Tensor, rejected_scores: Tensor) -> Tensor:
        """Return one number per pair: ``[n]`` float64.

        Args:
            chosen_scores: [n] float64.
            rejected_scores: [n] float64.
        """
        raise NotImplementedError(f"{type(self).__name__} must define of_pairs")

    def update(self, chosen_scores: Tensor, rejected_scores: Tensor) -> None:  # type: ignore[override]
        """Count more pairs.

        Args:
            chosen_scores: [n] float.
            rejected_scores: [n] float.

        Raises:
            ValueError: The shapes differ or are not one-dimensional.
        """
        if chosen_scores.dim() != 1:
            raise ValueError(f"chosen_scores must have 1 dimension(s), got shape {tuple(chosen_scores.shape)}")
        if rejected_scores.shape != chosen_scores.shape:
            raise ValueError(
                f"rejected_scores has shape {tuple(rejected_scores.shape)}, "
                f"but chosen_scores has shape {tuple(chosen_scores.shape)}"
            )
        self.set_dtype(torch.float64)  # torchmetrics forgets it when the module around this is moved
        super().update(self.of_pairs(chosen_scores.detach().double(), rejected_scores.detach().double()))

    def compute(self) -> Tensor:
        """Mean so far, 0-dim float32."""
        return super().compute().float()


class PairwiseAccuracy(PairMean):
    """Share of pairs whose chosen response scores higher; a tie counts half, a nan score as wrong."""

    def of_pairs(self, chosen_scores: Tensor, rejected_scores: Tensor) -> Tensor:
        """Return 1 for a correctly ordered pair, 0.5 for a tie, else 0."""
        wins, ties = chosen_scores > rejected_scores, chosen_scores == rejected_scores
        return wins.double() + ties.double() / 2


class RewardMargin(PairMean):
    """Mean of chosen score - rejected score."""

    def of_pairs(self, chosen_scores: Tensor, rejected_scores: Tensor) -> Tensor:
        """Return the differences."""
        return chosen_scores - rejected_scores
