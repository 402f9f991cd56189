"""Metrics that add up over batches and ranks (torchmetrics); meters of memory."""

from lit_rlhf.metrics.language import TokenPerplexity
from lit_rlhf.metrics.preference import PairwiseAccuracy, RewardMargin

__all__ = ["PairwiseAccuracy", "RewardMargin", "TokenPerplexity"]
