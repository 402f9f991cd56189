"""Masks, and means, variances and lookups that respect them.

One convention: ``mask`` is bool and True means "this position counts". No function here waits for the device.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lit_rlhf.functional._common import (
    accumulation_dtype,
    check_mask,
    check_rank,
    check_shapes,
    result_dtype,
    zero_masked,
)


def response_mask(response_tokens: Tensor, eos_ids: Tensor | Sequence[int]) -> Tensor:
    """Mark each response's tokens up to and including its first end-of-sequence token.

    Args:
        response_tokens: [B, T] long, generated tokens, right-padded after the end.
        eos_ids: Token ids that end a response; empty means that every token counts. A tensor on the same
            device saves a copy to it.

    Returns:
        [B, T] bool, True for real response tokens.

    Raises:
        ValueError: ``response_tokens`` is not two-dimensional.

    Example:
        Token 2 ends a response; the second response was cut off before it came to an end.

        >>> response_mask(torch.tensor([[5, 2, 0, 0], [5, 6, 7, 8]]), eos_ids=[2])
        tensor([[ True,  True, False, False],
                [ True,  True,  True,  True]])
    """
    check_rank(2, response_tokens=response_tokens)
    eos = torch.as_tensor(eos_ids, dtype=response_tokens.dtype, device=response_tokens.device).reshape(-1)
    is_eos = (response_tokens.unsqueeze(-1) == eos).any(-1).long()
    return is_eos.cumsum(-1) - is_eos == 0


def masked_sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum the entries of ``x`` that count.

    Args:
        x: Any shape; values where ``mask`` is False (nan included) change nothing.
        mask: Same shape, bool.
        dim: Dimension to sum over; None sums everything.

    Returns:
        The sum in float32 (float64 for float64 input); 0 where nothing counts.

    Raises:
        ValueError: The shapes differ.
        TypeError: ``mask`` is not bool.

    Example:
        >>> masked_sum(torch.tensor([1.0, 2.0, torch.nan]), torch.tensor([True, True, False]))
        tensor(3.)
    """
    check_mask(mask)
    check_shapes(x=x, mask=mask)
    kept = zero_masked(x, mask)
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None, *, count: Tensor | float | None = None) -> Tensor:
    """Average the entries of ``x`` that count, or divide their sum by a given ``count``.

    With ``count`` = the number of tokens of the whole batch, the results of its microbatches add up to the
    whole batch's mean.

    Args:
        x: Any shape; values where ``mask`` is False (nan included) change nothing.
        mask: Same shape, bool.
        dim: Dimension to average over; None averages everything.
        count: Divisor to use instead of the number of True entries.

    Returns:
        The mean in float32 (float64 for float64 input); 0 where nothing counts.

    Raises:
        ValueError: The shapes differ, or ``count`` is a number that is not positive.
        TypeError: ``mask`` is not bool.

    Example:
        >>> x, mask = torch.tensor([1.0, 2.0, torch.nan]), torch.tensor([True, True, False])
        >>> masked_mean(x, mask), masked_mean(x, mask, count=6)
        (tensor(1.5000), tensor(0.5000))
    """
    total = masked_sum(x, mask, dim)
    if count is None:
        return total / (mask.sum() if dim is None else mask.sum(dim)).clamp_min(1)
    if isinstance(count, Tensor):
        count = count.to(total.device)
        return total / torch.where(count > 0, count, torch.ones_like(count))
    if count <= 0:
        raise ValueError(f"count must be positive, got {count}")
    return total / count


Aggregation = Literal["token", "response"]


def aggregate(x: Tensor, mask: Tensor, how: Aggregation = "token", *, count: Tensor | float | None = None) -> Tensor:
    """Average a per-token loss over a batch.

    Args:
        x: [B, T] float; values where ``mask`` is False change nothing.
        mask: [B, T] bool.
        how: ``token`` weights all tokens equally; ``response`` takes each response's mean first, so that a long
            response weighs no more than a short one (GRPO: DeepSeekMath, arXiv:2402.03300, Eq. 3).
        count: Divisor instead of the number of tokens (``token``) or of responses that have any (``response``).

    Returns:
        0-dim float32 (float64 for float64 input); 0 where nothing counts.

    Raises:
        ValueError: The shapes differ or are not two-dimensional, ``how`` is unknown, or ``count`` is not positive.
        TypeError: ``mask`` is not bool.

    Example:
        Three tokens of loss 1 in one response and one token of loss 5 in another: ``8 / 4``, or ``(1 + 5) / 2``.

        >>> x = torch.tensor([[1.0, 1.0, 1.0], [5.0, 9.0, 9.0]])
        >>> mask = torch.tensor([[True, True, True], [True, False, False]])
        >>> aggregate(x, mask, "token"), aggregate(x, mask, "response")
        (tensor(2.), tensor(3.))
    """
    check_rank(2, x=x)
    if how == "token":
        return masked_mean(x, mask, count=count)
    if how == "response":
        return masked_mean(masked_mean(x, mask, dim=1), mask.any(dim=1), count=count)
    raise ValueError(f"how must be 'token' or 'response', got {how!r}")


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """Return finite ``x`` unchanged; its gradient is multiplied by ``factor`` on the way back (0 stops it).

    Args:
        x: Any shape, float.
        factor: Factor of the gradient.

    Example:
        >>> x = torch.tensor(3.0, requires_grad=True)
        >>> y = scale_gradient(x, 0.5)
        >>> y.backward()
        >>> y.item(), x.grad.item()
        (3.0, 0.5)
    """
    kept = x.detach()
    return kept + factor * (x - kept)


def masked_var(x: Tensor, mask: Tensor, unbiased: bool = True, dim: int | None = None) -> Tensor:
    """Variance of the entries of ``x`` that count, in two passes.

    Args:
        x: Any shape; values where ``mask`` is False (nan included) change nothing.
        mask: Same shape, bool.
        unbiased: Divide by n - 1 instead of n.
        dim: Dimension to reduce; None reduces everything.

    Returns:
        The variance in float32 (float64 for float64 input); 0 where fewer than two entries count.

    Raises:
        ValueError: The shapes differ.
        TypeError: ``mask`` is not bool.

    Example:
        >>> x, mask = torch.tensor([1.0, 3.0, torch.nan]), torch.tensor([True, True, False])
        >>> masked_var(x, mask), masked_var(x, mask, unbiased=False)
        (tensor(2.), tensor(1.))
    """
    mean = masked_mean(x, mask, dim)
    mean = mean if dim is None else mean.unsqueeze(dim)
    squares = zero_masked(zero_masked(x, mask) - mean, mask).square()
    total, count = (squares.sum(), mask.sum()) if dim is None else (squares.sum(dim), mask.sum(dim))
    return total / (count - int(unbiased)).clamp_min(1)


def moments(x: Tensor, mask: Tensor) -> Tensor:
    """Number, sum and sum of squares of the entries that count: add them over ranks, then finish.

    ``finish_moments(all_reduce_sum(moments(x, mask)))`` gives the mean and variance over all ranks.

    Args:
        x: Any shape; values where ``mask`` is False (nan included) change nothing.
        mask: Same shape, bool.

    Returns:
        [3] float64 (count, sum, sum of squares); float32 on devices without float64.

    Raises:
        ValueError: The shapes differ.
        TypeError: ``mask`` is not bool.

    Example:
        >>> moments(torch.tensor([1.0, 3.0, torch.nan]), torch.tensor([True, True, False]))
        tensor([ 2.,  4., 10.], dtype=torch.float64)
    """
    check_mask(mask)
    check_shapes(x=x, mask=mask)
    kept = zero_masked(x, mask, accumulation_dtype(x))
    return torch.stack([mask.sum().to(kept.dtype), kept.sum(), kept.square().sum()])


def finish_moments(total: Tensor, unbiased: bool = True) -> tuple[Tensor, Tensor]:
    """Turn summed ``moments`` into mean and variance.

    Args:
        total: [3], a ``moments`` result or a sum of several.
        unbiased: Divide by n - 1 instead of n.

    Returns:
        Mean and variance, 0-dim, in the dtype of ``total``; the mean of nothing is 0, and so is the
        variance of fewer than two entries.

    Raises:
        ValueError: ``total`` does not have shape (3,).

    Example:
        One rank holds the number 1, another the number 3.

        >>> one = torch.ones(1, dtype=torch.bool)
        >>> finish_moments(moments(torch.tensor([1.0]), one) + moments(torch.tensor([3.0]), one))
        (tensor(2., dtype=torch.float64), tensor(2., dtype=torch.float64))
    """
    if total.shape != (3,):
        raise ValueError(f"total must have shape (3,), got {tuple(total.shape)}")
    count, first, second = total.unbind()
    mean = first / count.clamp_min(1)
    spread = (second - first * mean).clamp_min(0)
    return mean, spread / (count - int(unbiased)).clamp_min(1)


def whiten(
    x: Tensor,
    mask: Tensor,
    *,
    mean: Tensor | float | None = None,
    var: Tensor | float | None = None,
    shift_mean: bool = True,
    eps: float = 1e-8,
) -> Tensor:
    """Scale the entries that count to variance 1, and by default shift them to mean 0.

    Args:
        x: Any shape; values where ``mask`` is False (nan included) change nothing.
        mask: Same shape, bool.
        mean: Mean to use, for example over all ranks (``finish_moments``); None takes that of ``x``.
        var: Variance to use; None takes the unbiased one of ``x``.
        shift_mean: True gives mean 0; False keeps the mean and rescales around it.
        eps: Added to the variance.

    Returns:
        Shape of ``x``, float32 (float64 for float64 input), exactly 0 where ``mask`` is False.

    Raises:
        ValueError: The shapes differ.
        TypeError: ``mask`` is not bool.

    Example:
        The entries that count have mean 2 and standard deviation 2.

        >>> x, mask = torch.tensor([0.0, 2.0, 4.0, 9.0]), torch.tensor([True, True, True, False])
        >>> whiten(x, mask)
        tensor([-1.,  0.,  1.,  0.])
        >>> whiten(x, mask, shift_mean=False)
        tensor([1., 2., 3., 0.])
    """
    check_mask(mask)
    check_shapes(x=x, mask=mask)
    dtype = accumulation_dtype(x)
    own_mean, own_var = finish_moments(moments(x, mask))
    mean = own_mean if mean is None else mean
    var = own_var if var is None else var
    scaled = (zero_masked(x, mask, dtype) - mean) * (var + eps) ** -0.5
    return zero_masked(scaled if shift_mean else scaled + mean, mask, result_dtype(x))


def last_token_index(mask: Tensor) -> Tensor:
    """Column of the last True in each row, wherever the padding is.

    Args:
        mask: [B, T] bool with T >= 1.

    Returns:
        [B] long. A row without any True gives 0, so the result is always a valid column; ``mask.any(-1)`` tells
        such rows apart.

    Raises:
        ValueError: ``mask`` is not two-dimensional or has no columns.
        TypeError: ``mask`` is not bool.

    Example:
        Right padding, left padding, and a row without tokens.

        >>> last_token_index(torch.tensor([[True, True, False], [False, True, True], [False, False, False]]))
        tensor([1, 2, 0])
    """
    check_mask(mask)
    check_rank(2, mask=mask)
    if mask.shape[1] == 0:
        raise ValueError(f"mask must have at least one column, got shape {tuple(mask.shape)}")
    columns = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, columns, 0).amax(-1)


def gather_last(x: Tensor, mask: Tensor) -> Tensor:
    """Pick each row's entry at the last True of ``mask``.

    Args:
        x: [B, S, ...].
        mask: [B, S] bool with S >= 1.

    Returns:
        [B, ...] in the dtype of ``x``; exactly 0 for rows without any True.

    Raises:
        ValueError: The first two dimensions differ, or ``mask`` is not two-dimensional or has no columns.
        TypeError: ``mask`` is not bool.

    Example:
        >>> x = torch.tensor([[1.0, 2.0, 9.0], [9.0, 3.0, 4.0]])
        >>> gather_last(x, torch.tensor([[True, True, False], [False, True, True]]))
        tensor([2., 4.])
    """
    last = last_token_index(mask)
    if x.shape[:2] != mask.shape:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}, but x has shape {tuple(x.shape)}: its first two dimensions "
            "must be the mask's"
        )
    picked = x[torch.arange(x.shape[0], device=x.device), last]
    found = mask.any(-1).reshape(-1, *[1] * (picked.dim() - 1))
    return torch.where(found, picked, torch.zeros((), dtype=x.dtype, device=x.device))


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions that start at 0 on each row's first real token, for left or right padding.

    Args:
        attention_mask: [B, S], bool or the 0/1 integers that tokenizers return.

    Returns:
        [B, S] long: ``(cumsum - 1)`` with a floor of 0.

    Raises:
        ValueError: ``attention_mask`` is not two-dimensional.

    Example:
        >>> position_ids(torch.tensor([[0, 1, 1], [1, 1, 0]]))
        tensor([[0, 0, 1],
                [0, 1, 1]])
    """
    check_rank(2, attention_mask=attention_mask)
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
