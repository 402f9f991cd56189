"""Comparing models: win rates, proportions and means with confidence intervals."""

from lit_rlhf.evaluation.statistics import MeanCI, WinRate, mean_ci95, proportion_ci95, win_rate

__all__ = ["MeanCI", "WinRate", "mean_ci95", "proportion_ci95", "win_rate"]
