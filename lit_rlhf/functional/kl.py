"""Per-token estimates of the KL divergence between two policies."""

from typing import Literal

import torch
from torch import Tensor

from lit_rlhf.functional._common import check_mask, check_shapes, zero_masked

KLEstimator = Literal["k1", "k2", "k3"]


def kl_estimate(log_probs: Tensor, ref_log_probs: Tensor, mask: Tensor, estimator: KLEstimator = "k1") -> Tensor:
    """Estimate KL(pi || ref) from the log-probabilities of tokens sampled from pi.

    With ``log_ratio = log pi - log ref``: k1 = log_ratio (unbiased, may be negative), k2 = log_ratio^2 / 2
    (biased, low variance), k3 = exp(-log_ratio) - 1 + log_ratio (unbiased, never negative).
    Source: Schulman 2020, "Approximating KL Divergence", http://joschu.net/blog/kl-approx.html.

    Args:
        log_probs: [B, T] float, log pi of the sampled tokens.
        ref_log_probs: [B, T] float, log ref of the same tokens.
        mask: [B, T] bool.
        estimator: "k1", "k2" or "k3".

    Returns:
        [B, T] float32 (float64 for float64 input), exactly 0 where ``mask`` is False; differentiable.

    Raises:
        ValueError: The shapes differ, or the estimator is unknown.
        TypeError: ``mask`` is not bool.

    Example:
        The log-ratios are 0.5 and -1; the third position is padding.

        >>> log_probs, ref_log_probs = torch.tensor([[-1.0, -2.0, 9.0]]), torch.tensor([[-1.5, -1.0, torch.nan]])
        >>> mask = torch.tensor([[True, True, False]])
        >>> kl_estimate(log_probs, ref_log_probs, mask)
        tensor([[ 0.5000, -1.0000,  0.0000]])
        >>> kl_estimate(log_probs, ref_log_probs, mask, "k2")
        tensor([[0.1250, 0.5000, 0.0000]])
        >>> kl_estimate(log_probs, ref_log_probs, mask, "k3")  # exp(-0.5) - 1 + 0.5 and e - 1 - 1
        tensor([[0.1065, 0.7183, 0.0000]])
    """
    check_mask(mask)
    check_shapes(log_probs=log_probs, ref_log_probs=ref_log_probs, mask=mask)
    log_ratio = zero_masked(log_probs, mask) - zero_masked(ref_log_probs, mask)
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio.square()
    if estimator == "k3":
        return torch.expm1(-log_ratio) + log_ratio
    raise ValueError(f"estimator must be 'k1', 'k2' or 'k3', got {estimator!r}")
