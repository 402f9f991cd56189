"""Token rewards, advantages and returns. No loop over tokens."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_rlhf.functional._common import (
    accumulation_dtype,
    check_mask,
    check_rank,
    check_rows,
    check_shapes,
    check_unit_interval,
    result_dtype,
    zero_masked,
)


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Spread score and KL penalty over tokens: ``R_t = -kl_coef * kl_t + [t is last] * score``.

    Source: Ziegler et al. 2019, arXiv:1909.08593, Eq. 2, token by token.

    Args:
        scores: [B] float, one score per response, already clipped if it should be.
        kl: [B, T] float, per-token KL estimate.
        mask: [B, T] bool.
        kl_coef: KL coefficient (beta).

    Returns:
        [B, T] float32 (float64 if an input is), exactly 0 where ``mask`` is False; a row without any True
        gets nothing, whatever its score.

    Raises:
        ValueError: The shapes do not fit together.
        TypeError: ``mask`` is not bool.

    Example:
        Real tokens pay their KL, 0.5 and 0.25, and the last of them gets the score of 1; the last column is padding.

        >>> scores, kl = torch.tensor([1.0]), torch.tensor([[0.5, 0.25, 9.0]])
        >>> token_rewards(scores, kl, torch.tensor([[True, True, False]]), kl_coef=1.0)
        tensor([[-0.5000,  0.7500,  0.0000]])
    """
    check_mask(mask)
    check_shapes(kl=kl, mask=mask)
    check_rank(1, scores=scores)
    check_rank(2, kl=kl)
    check_rows(kl=kl, scores=scores)
    is_last = mask & (_still_to_come(mask) == 1)
    dtype = result_dtype(scores, kl)
    return zero_masked(scores.unsqueeze(1), is_last, dtype) - kl_coef * zero_masked(kl, mask, dtype)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation: ``A_t = sum_l (gamma * lam)^l * delta_{t+l}``.

    ``delta_t = R_t + gamma * V_{t+1} - V_t`` where the value after a row's last real token is 0.
    Source: Schulman et al. 2016, arXiv:1506.02438, Eq. 16. Returns are advantages + values, before
    any whitening.

    Args:
        rewards: [B, T] float.
        values: [B, T] float, detached values.
        mask: [B, T] bool, one unbroken run of True per row (or none).
        gamma: Discount in [0, 1].
        lam: GAE's lambda in [0, 1].

    Returns:
        Advantages and returns, [B, T] each, float32 (float64 if an input is), exactly 0 where
        ``mask`` is False.

    Raises:
        ValueError: The shapes differ or are not two-dimensional, or ``gamma`` or ``lam`` is outside [0, 1].
        TypeError: ``mask`` is not bool.

    Example:
        With gamma 1, ``delta = (0 + 0.25 - 0.5, 1 + 0 - 0.25) = (-0.25, 0.75)`` and ``A = (-0.25 + 0.5 * 0.75, 0.75)``.

        >>> rewards, values = torch.tensor([[0.0, 1.0, 9.0]]), torch.tensor([[0.5, 0.25, 9.0]])
        >>> gae(rewards, values, torch.tensor([[True, True, False]]), gamma=1.0, lam=0.5)
        (tensor([[0.1250, 0.7500, 0.0000]]), tensor([[0.6250, 1.0000, 0.0000]]))
    """
    check_mask(mask)
    check_shapes(rewards=rewards, values=values, mask=mask)
    check_rank(2, rewards=rewards)
    check_unit_interval(gamma=gamma, lam=lam)
    dtype = accumulation_dtype(values)
    kept = zero_masked(values, mask, dtype)
    following = F.pad(kept[:, 1:], (0, 1)) if kept.shape[1] else kept
    delta = zero_masked(zero_masked(rewards, mask, dtype) + gamma * following - kept, mask)
    advantages = zero_masked(_discounted_sum_to_go(delta, gamma * lam), mask)
    result = result_dtype(rewards, values)
    return advantages.to(result), (advantages + kept).to(result)


def returns_to_go(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Discounted sum of the rewards from each token to the end: ``G_t = sum_l gamma^l * R_{t+l}``.

    Args:
        rewards: [B, T] float.
        mask: [B, T] bool.
        gamma: Discount in [0, 1].

    Returns:
        [B, T] float32 (float64 for float64 input), exactly 0 where ``mask`` is False.

    Raises:
        ValueError: The shapes differ or are not two-dimensional, or ``gamma`` is outside [0, 1].
        TypeError: ``mask`` is not bool.

    Example:
        From the right: 4, then ``2 + 0.5 * 4``, then ``1 + 0.5 * 4``; the last position is padding.

        >>> rewards, mask = torch.tensor([[1.0, 2.0, 4.0, 9.0]]), torch.tensor([[True, True, True, False]])
        >>> returns_to_go(rewards, mask, gamma=0.5)
        tensor([[3., 4., 4., 0.]])
    """
    check_mask(mask)
    check_shapes(rewards=rewards, mask=mask)
    check_rank(2, rewards=rewards)
    check_unit_interval(gamma=gamma)
    kept = zero_masked(rewards, mask, accumulation_dtype(rewards))
    return zero_masked(_discounted_sum_to_go(kept, gamma), mask, result_dtype(rewards))


def remax_returns(gain: Tensor, kl: Tensor, mask: Tensor, gamma: float, kl_coef: float) -> Tensor:
    """ReMax's per-token return ``G_t = gamma^(T - t + 1) * A - kl_coef * kl_t``, t counted from 1.

    Source: Li et al. 2023, arXiv:2310.10505; the exponent (gamma at the last token too) and the token's own KL are
    those of the authors' code, liziniu/ReMax.

    Args:
        gain: [B] float, the sampled response's score minus the greedy one's (A).
        kl: [B, T] float, per-token KL estimate, or its sum to go.
        mask: [B, T] bool, one unbroken run of True per row (or none).
        gamma: Discount in [0, 1].
        kl_coef: KL coefficient (beta).

    Returns:
        [B, T] float32 (float64 if an input is), exactly 0 where ``mask`` is False.

    Raises:
        ValueError: The shapes do not fit together, or ``gamma`` is outside [0, 1].
        TypeError: ``mask`` is not bool.

    Example:
        Two real tokens: ``0.5^2 * 4 - 0.25`` and ``0.5 * 4 - 0.5``.

        >>> gain, kl = torch.tensor([4.0]), torch.tensor([[0.25, 0.5, 9.0]])
        >>> remax_returns(gain, kl, torch.tensor([[True, True, False]]), gamma=0.5, kl_coef=1.0)
        tensor([[0.7500, 1.5000, 0.0000]])
    """
    check_mask(mask)
    check_shapes(kl=kl, mask=mask)
    check_rank(1, gain=gain)
    check_rank(2, kl=kl)
    check_rows(kl=kl, gain=gain)
    check_unit_interval(gamma=gamma)
    dtype = result_dtype(gain, kl)
    discount = torch.as_tensor(gamma, dtype=dtype, device=gain.device) ** _still_to_come(mask)
    return zero_masked(gain.to(dtype).unsqueeze(1) * discount, mask) - kl_coef * zero_masked(kl, mask, dtype)


def leave_one_out(rewards: Tensor, group_size: int) -> Tensor:
    """RLOO's advantage: a response's reward minus the mean reward of the other responses to its prompt.

    Source: Ahmadian et al. 2024, arXiv:2402.14740, section 2.3 (after Kool et al. 2019).

    Args:
        rewards: [N] float; the responses to one prompt are consecutive.
        group_size: Responses per prompt (K), at least 2; must divide N.

    Returns:
        [N] float32 (float64 for float64 input).

    Raises:
        ValueError: ``rewards`` is not one-dimensional, or ``group_size`` is below 2 or does not divide N.

    Example:
        Two prompts with three responses each. The others' means are 4, 3.5 and 1.5 in the first group, 5 in the second.

        >>> leave_one_out(torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0]), group_size=3)
        tensor([-3.0000, -1.5000,  4.5000,  0.0000,  0.0000,  0.0000])
    """
    groups = _groups(rewards, group_size)
    baseline = (groups.sum(dim=1, keepdim=True) - groups) / (group_size - 1)
    return (groups - baseline).flatten()


def group_normalize(rewards: Tensor, group_size: int, by_std: bool = True, eps: float = 1e-4) -> Tensor:
    """GRPO's advantage: ``(r - mean) / (std + eps)`` over the responses to one prompt.

    Source: Shao et al. 2024 (DeepSeekMath), arXiv:2402.03300, section 4.1.2.

    Args:
        rewards: [N] float; the responses to one prompt are consecutive.
        group_size: Responses per prompt (K), at least 2; must divide N.
        by_std: False only subtracts the mean (Liu et al. 2025, arXiv:2503.20783: the division favors prompts
            whose responses score alike).
        eps: Added to the standard deviation.

    Returns:
        [N] float32 (float64 for float64 input).

    Raises:
        ValueError: ``rewards`` is not one-dimensional, or ``group_size`` is below 2 or does not divide N.

    Example:
        Two prompts with three responses each, of standard deviation 2 and 1.

        >>> rewards = torch.tensor([0.0, 2.0, 4.0, 1.0, 2.0, 3.0])
        >>> group_normalize(rewards, group_size=3, eps=0.0)
        tensor([-1.,  0.,  1., -1.,  0.,  1.])
        >>> group_normalize(rewards, group_size=3, by_std=False)
        tensor([-2.,  0.,  2., -1.,  0.,  1.])
    """
    groups = _groups(rewards, group_size)
    centered = groups - groups.mean(dim=1, keepdim=True)
    return (centered / (groups.std(dim=1, keepdim=True) + eps) if by_std else centered).flatten()


def _groups(rewards: Tensor, group_size: int) -> Tensor:
    check_rank(1, rewards=rewards)
    if group_size < 2 or len(rewards) % group_size:
        raise ValueError(f"group_size must be at least 2 and divide the {len(rewards)} rewards, got {group_size}")
    return rewards.to(result_dtype(rewards)).view(-1, group_size)


def _still_to_come(mask: Tensor) -> Tensor:
    """Return [B, T] long: real tokens from this one to the end of its row, itself included."""
    return mask.long().flip(-1).cumsum(-1).flip(-1)


def _discounted_sum_to_go(x: Tensor, factor: float) -> Tensor:
    """``y_t = sum_l factor^l * x_{t+l}`` over the last dimension of [B, T], by doubling.

    After k rounds an entry holds the sum over the next 2^k columns, so log2(T) rounds are enough. No matrix
    product, hence no TF32 rounding and no [T, T] memory.
    """
    step = 1
    while step < x.shape[1]:
        x = x + factor**step * F.pad(x[:, step:], (0, step))
        step *= 2
    return x
