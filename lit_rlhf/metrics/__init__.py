"""Metrics summed over batches and ranks (torchmetrics), and memory meters."""

from lit_rlhf.metrics.language import TokenPerplexity
from lit_rlhf.metrics.preference import PairwiseAccuracy, RewardMargin

__all__ = ["PairwiseAccuracy", "RewardMargin", "TokenPerplexity"]
