"""Log-probabilities of chosen tokens from hidden states, without ever holding all logits."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lit_rlhf.functional._common import check_rank, check_rows, result_dtype


class _Options(NamedTuple):
    scale: float
    softcap: float | None
    temperature: float
    chunk_size: int
    with_entropy: bool


def _chunk_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, options: _Options) -> Tensor:
    """Final logits of one chunk in a fresh float32 buffer."""
    logits = F.linear(hidden, weight, bias).to(result_dtype(hidden))
    if options.softcap is None:
        return logits.mul_(options.scale / options.temperature)
    return logits.mul_(options.scale / options.softcap).tanh_().mul_(options.softcap / options.temperature)


def _chunk_grad_logits(
    logits: Tensor, targets: Tensor, log_norm: Tensor, grad: Tensor, entropy: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Gradient for one chunk's logits, written over them.

    With p the softmax and H the entropy: d log p_y / dz = onehot(y) - p and dH / dz = -p (log p + H).
    ``torch.special.entr`` gives -p log p, also (0) where p is 0.
    """
    probs = logits.sub_(log_norm.unsqueeze(1)).exp_()
    if entropy is None:
        result = probs.mul_(grad.neg().unsqueeze(1))
    else:
        value, grad_entropy = entropy
        extra = torch.special.entr(probs).mul_(grad_entropy.unsqueeze(1))
        result = probs.mul_((grad + grad_entropy * value).neg().unsqueeze(1)).add_(extra)
    rows = torch.arange(len(targets), device=targets.device)
    result[rows, targets] += grad
    return result


def _squashed(logits: Tensor, options: _Options) -> Tensor | None:
    """Return the tanh inside the soft cap, in a new buffer."""
    return None if options.softcap is None else logits * (options.temperature / options.softcap)


def _through_transform(d: Tensor, squashed: Tensor | None, options: _Options) -> Tensor:
    """Turn the gradient for the final logits into that for the raw ones, in place."""
    d.mul_(options.scale / options.temperature)
    return d if squashed is None else d.mul_(squashed.square_().neg_().add_(1))


class _TokenLogProbs(torch.autograd.Function):
    """Chunked over tokens; the backward pass computes the logits a second time instead of keeping them.

    Where only ``hidden`` needs a gradient, not even that: the incoming gradient only scales d log p_y / d hidden, one
    factor per token, so the forward pass saves that ``[N, H]`` derivative in place of ``hidden``.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: _Options
    ) -> tuple[Tensor, Tensor]:
        n, dtype = len(targets), result_dtype(hidden)
        log_probs, log_norm, entropy = (torch.empty(n, dtype=dtype, device=hidden.device) for _ in range(3))
        needs = ctx.needs_input_grad
        slope = torch.empty_like(hidden) if needs[0] and not (needs[1] or needs[2] or options.with_entropy) else None
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, n, options.chunk_size):
                part = slice(start, min(start + options.chunk_size, n))
                logits = _chunk_logits(hidden[part], weight, bias, options)
                squashed = _squashed(logits, options) if slope is not None else None
                top = logits.amax(1)
                chosen = logits.gather(1, targets[part].unsqueeze(1)).squeeze(1) - top
                mass = logits.sub_(top.unsqueeze(1)).exp_()
                total = mass.sum(1)
                log_total = total.log()
                log_probs[part] = chosen - log_total
                log_norm[part] = log_total + top
                if options.with_entropy:
                    entropy[part] = log_total + torch.special.entr(mass, out=mass).sum(1) / total
                if slope is not None:
                    d = mass.div_(total.neg().unsqueeze(1))
                    d[torch.arange(len(top), device=d.device), targets[part]] += 1
                    slope[part] = _through_transform(d, squashed, options).to(weight.dtype) @ weight
                    del d
                del logits, mass, squashed
        if slope is not None:
            ctx.save_for_backward(slope)
        else:
            ctx.save_for_backward(hidden, weight, bias, targets, log_norm, entropy)
        ctx.options = options
        if not options.with_entropy:
            ctx.mark_non_differentiable(entropy)
        return log_probs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        if len(ctx.saved_tensors) == 1:
            (slope,) = ctx.saved_tensors
            return (slope * grad.unsqueeze(1)).to(slope.dtype), None, None, None, None
        hidden, weight, bias, targets, log_norm, entropy = ctx.saved_tensors
        options: _Options = ctx.options
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        exact = result_dtype(hidden)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=exact) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=exact) if need_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(targets), options.chunk_size):
                part = slice(start, min(start + options.chunk_size, len(targets)))
                logits = _chunk_logits(hidden[part], weight, bias, options)
                squashed = _squashed(logits, options)
                extra = (entropy[part], grad_entropy[part]) if options.with_entropy else None
                d = _chunk_grad_logits(logits, targets[part], log_norm[part], grad[part], extra)
                d = _through_transform(d, squashed, options)
                if grad_bias is not None:
                    grad_bias += d.sum(0)
                del logits, squashed, extra
                d = d.to(weight.dtype)
                if grad_hidden is not None:
                    grad_hidden[part] = d @ weight
                if grad_weight is not None and weight.dtype == exact:
                    grad_weight.addmm_(d.t(), hidden[part])
                elif grad_weight is not None:
                    grad_weight += d.t() @ hidden[part]
                del d
        weight_result = None if grad_weight is None else grad_weight.to(weight.dtype)
        bias_result = None if grad_bias is None else grad_bias.to(bias.dtype)
        return grad_hidden, weight_result, bias_result, None, None


def token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    chunk_size: int = 128,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each target token, and optionally the entropy of its distribution.

    The logits are ``cap * tanh(scale * (hidden @ weight.T + bias) / cap) / temperature`` (no tanh without
    ``softcap``). They exist for ``chunk_size`` tokens at a time and are computed again in the backward pass,
    so the memory beyond the inputs (and gradients) is a few ``chunk_size * V`` floats, whatever N is.
    Differentiable once with respect to ``hidden``, ``weight`` and ``bias``, through the log-probabilities and
    the entropy. Under autocast the matrix products use its dtype. Masking happens before: pass only the
    positions that count, for example ``hidden[mask]``.

    Args:
        hidden: [N, H] float, N may be 0.
        weight: [V, H], the LM head, same dtype as ``hidden`` (outside autocast).
        targets: [N] long in [0, V).
        bias: [V] or None.
        scale: Factor on the raw logits.
        softcap: Cap of the tanh squashing (Gemma 2), or None.
        temperature: The final logits are divided by it.
        chunk_size: Tokens per chunk. Larger is not faster beyond about 128 and costs memory in proportion.
        with_entropy: Also return the entropies.

    Returns:
        [N] log-probabilities and [N] entropies (None unless asked for), float32 also for half-precision input
        (float64 for float64 input).

    Raises:
        ValueError: Shapes or dtypes do not fit together, or a number other than ``scale`` is not positive.

    Example:
        >>> hidden, weight = torch.tensor([[1.0], [3.0]]).log(), torch.tensor([[0.0], [1.0]])  # [N, H] and [V, H]
        >>> token_log_probs(hidden, weight, torch.tensor([1, 1]))[0].exp()  # logits (0, 0) and (0, log 3)
        tensor([0.5000, 0.7500])
    """
    _check(hidden, weight, targets, bias)
    for name, value in (("softcap", softcap), ("temperature", temperature), ("chunk_size", chunk_size)):
        if value is not None and value <= 0:
            raise ValueError(f"{name} must be positive, got {value}")
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = bias if bias is None else bias.to(dtype)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise ValueError(f"{name} has dtype {tensor.dtype}, but hidden has dtype {hidden.dtype}")
    options = _Options(scale, softcap, temperature, chunk_size, with_entropy)
    log_probs, entropy = _TokenLogProbs.apply(hidden, weight, bias, targets, options)
    return log_probs, entropy if with_entropy else None


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    check_rank(2, hidden=hidden, weight=weight)
    check_rank(1, targets=targets)
    check_rows(hidden=hidden, targets=targets)
    if weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, but hidden has shape {tuple(hidden.shape)}: "
            "the last dimensions must be equal"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}, but weight has shape {tuple(weight.shape)}")
