"""Losses over real tokens.

Every loss takes ``count``, a divisor: the loss and its statistics then are sums divided by it. With the number of
tokens (or pairs) of a whole batch, the results of its microbatches add up to the whole batch's mean; with that number
averaged over microbatches and ranks, the mean of their results is it. Without ``count`` they are plain means over the
tokens given.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_rlhf.functional._common import check_mask, check_rank, check_shapes, result_dtype, zero_masked
from lit_rlhf.functional.kl import kl_estimate
from lit_rlhf.functional.masking import Aggregation, aggregate, masked_mean, masked_var


def clipped_policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip: float = 0.2,
    *,
    aggregation: Aggregation = "token",
    count: Tensor | float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped objective as a loss: ``mean(max(-A * ratio, -A * clip(ratio, 1 - eps, 1 + eps)))``.

    Source: Schulman et al. 2017, arXiv:1707.06347, Eq. 7.

    Args:
        log_probs: [B, T] float, current policy; the gradient flows here.
        old_log_probs: [B, T] float, the policy that sampled; no gradient.
        advantages: [B, T] float; no gradient.
        mask: [B, T] bool.
        clip: Half-width eps of the trust interval, above 0.
        aggregation: How tokens are averaged, see :func:`aggregate`.
        count: Divisor, see :func:`aggregate`.

    Returns:
        The 0-dim loss, and detached 0-dim statistics: ``ratio_mean``; ``clip_fraction``, the share of tokens
        whose clipped term is the larger one; ``approx_kl``, the k3 estimate of KL(old || current).

    Raises:
        ValueError: The shapes differ, or ``clip`` or a number ``count`` is not positive.
        TypeError: ``mask`` is not bool.

    Example:
        The ratios are 1.5, clipped to 1.2, and 0.5, where the smaller, unclipped product counts: ``-(1.2 + 0.5) / 2``.

        >>> log_probs, old = torch.tensor([[0.6, 0.2, 0.9]]).log(), torch.tensor([[0.4, 0.4, 0.1]]).log()
        >>> advantages, mask = torch.tensor([[1.0, 1.0, 9.0]]), torch.tensor([[True, True, False]])
        >>> loss, stats = clipped_policy_loss(log_probs, old, advantages, mask, clip=0.2)
        >>> loss, stats["clip_fraction"]
        (tensor(-0.8500), tensor(0.5000))
    """
    check_mask(mask)
    check_shapes(log_probs=log_probs, old_log_probs=old_log_probs, advantages=advantages, mask=mask)
    _check_clip(clip)
    old, advantage = zero_masked(old_log_probs.detach(), mask), zero_masked(advantages.detach(), mask)
    ratio = torch.exp(zero_masked(log_probs, mask) - old)
    unclipped = -advantage * ratio
    clipped = -advantage * ratio.clamp(1.0 - clip, 1.0 + clip)
    loss = aggregate(torch.maximum(unclipped, clipped), mask, aggregation, count=count)
    with torch.no_grad():
        stats = {
            "ratio_mean": aggregate(ratio, mask, aggregation, count=count),
            "clip_fraction": aggregate(clipped > unclipped, mask, aggregation, count=count),
            "approx_kl": aggregate(kl_estimate(old, log_probs, mask, "k3"), mask, aggregation, count=count),
        }
    return loss, stats


def policy_gradient_loss(
    log_probs: Tensor, advantages: Tensor, mask: Tensor, *, count: Tensor | float | None = None
) -> Tensor:
    """REINFORCE: ``-mean(A * log pi)`` over real tokens.

    Source: Williams 1992, "Simple statistical gradient-following algorithms", Eq. 11.

    Args:
        log_probs: [B, T] float, current policy; the gradient flows here.
        advantages: [B, T] float; no gradient.
        mask: [B, T] bool.
        count: Divisor instead of the number of True entries.

    Returns:
        0-dim loss.

    Raises:
        ValueError: The shapes differ, or a number ``count`` is not positive.
        TypeError: ``mask`` is not bool.

    Example:
        ``-(2 * -1 + 1 * -2) / 2``; the third position is padding.

        >>> log_probs, advantages = torch.tensor([[-1.0, -2.0, torch.nan]]), torch.tensor([[2.0, 1.0, 9.0]])
        >>> policy_gradient_loss(log_probs, advantages, torch.tensor([[True, True, False]]))
        tensor(2.)
    """
    check_mask(mask)
    check_shapes(log_probs=log_probs, advantages=advantages, mask=mask)
    # Both zeroed before they meet: nan * 0 in the padding would be nan.
    weighted = zero_masked(advantages.detach(), mask) * zero_masked(log_probs, mask)
    return -masked_mean(weighted, mask, count=count)


def dpo_loss(
    chosen_log_ratio: Tensor,
    rejected_log_ratio: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    *,
    count: Tensor | float | None = None,
) -> Tensor:
    """Direct preference optimization: ``mean(-log sigmoid(beta * (chosen - rejected)))``.

    Source: Rafailov et al. 2023, arXiv:2305.18290, Eq. 7; label smoothing: Mitchell 2023, "A note on DPO with noisy
    preferences", Eq. 3.

    Args:
        chosen_log_ratio: [n] float, ``log pi(y_w | x) - log pi_ref(y_w | x)``, summed over tokens.
        rejected_log_ratio: [n] float, the same for ``y_l``.
        beta: Strength of the pull toward the reference, above 0.
        label_smoothing: Assumed share of pairs whose labels are swapped, in [0, 0.5).
        count: Divisor instead of n.

    Returns:
        0-dim loss, 0 for n = 0.

    Raises:
        ValueError: The shapes differ or are not one-dimensional, or a number is out of range.

    Example:
        With log-ratios of log 3 and 0, the sigmoid is 3/4 at ``beta = 1``; where both ratios are equal, it is 1/2.

        >>> chosen, rejected = torch.tensor([3.0]).log(), torch.tensor([0.0])
        >>> dpo_loss(chosen, rejected, beta=1.0)  # -log(3 / 4)
        tensor(0.2877)
        >>> dpo_loss(rejected, rejected)  # log 2: the policy is still the reference
        tensor(0.6931)
    """
    if beta <= 0:
        raise ValueError(f"beta must be positive, got {beta}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must lie in [0, 0.5), got {label_smoothing}")
    kept = preference_loss(beta * chosen_log_ratio, beta * rejected_log_ratio, count=count)
    if not label_smoothing:
        return kept
    swapped = preference_loss(beta * rejected_log_ratio, beta * chosen_log_ratio, count=count)
    return (1 - label_smoothing) * kept + label_smoothing * swapped


def clipped_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip: float | None = 0.2,
    *,
    count: Tensor | float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Value loss ``0.5 * mean(max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2))``.

    Source: openai/baselines ppo2; the PPO paper's Eq. 9 has the plain squared error (``clip=None``).

    Args:
        values: [B, T] float, current critic; the gradient flows here.
        old_values: [B, T] float, values at rollout time; no gradient.
        returns: [B, T] float; no gradient.
        mask: [B, T] bool.
        clip: Half-width eps around the old values, above 0; None does not clip.
        count: Divisor instead of the number of True entries.

    Returns:
        The 0-dim loss, and detached 0-dim statistics: ``value_clip_fraction``, the share of tokens whose
        clipped term is the larger one.

    Raises:
        ValueError: The shapes differ, or ``clip`` or a number ``count`` is not positive.
        TypeError: ``mask`` is not bool.

    Example:
        The first value moved from 1 to 2, its target, but counts as 1.5: ``0.5 * (0.5^2 + 1^2) / 2``.

        >>> values, old_values = torch.tensor([[2.0, 1.0, 9.0]]), torch.tensor([[1.0, 1.0, 0.0]])
        >>> returns, mask = torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([[True, True, False]])
        >>> clipped_value_loss(values, old_values, returns, mask, clip=0.5)
        (tensor(0.3125), {'value_clip_fraction': tensor(0.5000)})
    """
    check_mask(mask)
    check_shapes(values=values, old_values=old_values, returns=returns, mask=mask)
    value, target = zero_masked(values, mask), zero_masked(returns.detach(), mask)
    plain = limited = (value - target).square()
    if clip is not None:
        _check_clip(clip)
        old = zero_masked(old_values.detach(), mask)
        limited = (value.clamp(old - clip, old + clip) - target).square()
    loss = 0.5 * masked_mean(torch.maximum(plain, limited), mask, count=count)
    return loss, {"value_clip_fraction": masked_mean((limited > plain).detach(), mask, count=count)}


def cross_entropy(log_probs: Tensor, mask: Tensor, *, count: Tensor | float | None = None) -> Tensor:
    """Negative mean log-probability of the tokens that count.

    Args:
        log_probs: [B, T] float.
        mask: [B, T] bool.
        count: Divisor instead of the number of True entries.

    Returns:
        0-dim loss.

    Raises:
        ValueError: The shapes differ, or a number ``count`` is not positive.
        TypeError: ``mask`` is not bool.

    Example:
        >>> cross_entropy(torch.tensor([[-1.0, -3.0, -9.0]]), torch.tensor([[True, True, False]]))
        tensor(2.)
    """
    check_mask(mask)
    check_shapes(log_probs=log_probs, mask=mask)
    return -masked_mean(log_probs, mask, count=count)


def preference_loss(
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    margin: Tensor | None = None,
    *,
    count: Tensor | float | None = None,
) -> Tensor:
    """Pairwise ranking loss ``mean(-log sigmoid(chosen - rejected - margin))``.

    Source: Ouyang et al. 2022, arXiv:2203.02155, Eq. 1; margin: Touvron et al. 2023, arXiv:2307.09288, Eq. 2.

    Args:
        chosen_scores: [n] float.
        rejected_scores: [n] float.
        margin: [n] float, how much better the chosen response should score; None is 0.
        count: Divisor instead of n.

    Returns:
        0-dim loss, 0 for n = 0.

    Raises:
        ValueError: The shapes differ or are not one-dimensional, or a number ``count`` is not positive.

    Example:
        A difference of log 3 gives the chosen response the probability 3/4.

        >>> chosen, rejected = torch.tensor([3.0]).log(), torch.tensor([0.0])
        >>> preference_loss(chosen, rejected)  # -log(3 / 4)
        tensor(0.2877)
        >>> preference_loss(chosen, rejected, margin=chosen)  # log 2: exactly as much better as the margin asks
        tensor(0.6931)
    """
    check_rank(1, chosen_scores=chosen_scores)
    check_shapes(chosen_scores=chosen_scores, rejected_scores=rejected_scores)
    dtype = result_dtype(chosen_scores, rejected_scores)
    difference = chosen_scores.to(dtype) - rejected_scores.to(dtype)
    if margin is not None:
        check_shapes(chosen_scores=chosen_scores, margin=margin)
        difference = difference - margin
    every = torch.ones_like(difference, dtype=torch.bool)
    return masked_mean(-F.logsigmoid(difference), every, count=count)


def entropy_bonus(entropy: Tensor, mask: Tensor, *, count: Tensor | float | None = None) -> Tensor:
    """Mean entropy of the tokens that count; subtract ``coefficient * entropy_bonus`` from a loss.

    Args:
        entropy: [B, T] float.
        mask: [B, T] bool.
        count: Divisor instead of the number of True entries.

    Returns:
        0-dim mean entropy (not negated).

    Raises:
        ValueError: The shapes differ, or a number ``count`` is not positive.
        TypeError: ``mask`` is not bool.

    Example:
        >>> entropy_bonus(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[True, True, False]]))
        tensor(2.)
    """
    check_mask(mask)
    check_shapes(entropy=entropy, mask=mask)
    return masked_mean(entropy, mask, count=count)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Share of the returns' variance that the values explain: ``1 - var(R - V) / var(R)``.

    Args:
        values: [B, T] float.
        returns: [B, T] float.
        mask: [B, T] bool.

    Returns:
        Detached 0-dim tensor: 1 for perfect values, 0 for constant ones; 0 also where the returns do
        not vary.

    Raises:
        ValueError: The shapes differ.
        TypeError: ``mask`` is not bool.

    Example:
        The returns have variance 2, the residuals -0.5 and 0.5 have variance 0.5.

        >>> values, returns = torch.tensor([[0.5, 1.5, 9.0]]), torch.tensor([[0.0, 2.0, 0.0]])
        >>> explained_variance(values, returns, torch.tensor([[True, True, False]]))
        tensor(0.7500)
    """
    check_mask(mask)
    check_shapes(values=values, returns=returns, mask=mask)
    values, returns = zero_masked(values.detach(), mask), zero_masked(returns.detach(), mask)
    total, residual = masked_var(returns, mask), masked_var(returns - values, mask)
    varies = total > 0
    return torch.where(varies, 1 - residual / torch.where(varies, total, 1), 0)


def _check_clip(clip: float) -> None:
    if clip <= 0:
        raise ValueError(f"clip must be positive, got {clip}")
