"""Differentiating one loss of several before the others are computed."""

from typing import Any

import torch
from torch import Tensor


class _Differentiated(torch.autograd.Function):
    """A loss whose gradients are already known; the backward pass scales them by the incoming gradient."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        """Keep the gradients and return the loss."""
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor) -> tuple[Tensor | None, ...]:
        """Return them scaled; possible once."""
        gradients, ctx.gradients = ctx.gradients, None
        return None, None, *(gradient.mul_(incoming[0]) for gradient in gradients)


def differentiate_now(loss: Tensor, parameters: list[torch.nn.Parameter]) -> Tensor:
    """Differentiate a loss and free its graph; the loss returned passes the gradients on in its own backward pass.

    Its value and gradients are those of ``loss``. Hooks on the parameters (such as DDP's) still see one backward pass.

    Args:
        loss: 0-dim.
        parameters: Everything that needs a gradient of this loss.

    Example:
        The gradient of ``2 * weight^2`` at 3 is 12.

        >>> weight = torch.nn.Parameter(torch.tensor(3.0))
        >>> loss = differentiate_now(weight.square(), [weight])  # the graph of the square is gone
        >>> (2 * loss).backward()
        >>> loss.item(), weight.grad.item()
        (9.0, 12.0)
    """
    with torch.autocast(loss.device.type, enabled=False):  # as in the trainer's own backward pass
        gradients = list(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))
    result: Tensor = _Differentiated.apply(loss.detach(), gradients, *parameters)
    return result
