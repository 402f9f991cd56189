"""Differentiating one loss of several before the others are computed."""

from typing import Any

import torch
from torch import Tensor


class _Differentiated(torch.autograd.Function):
    """A loss whose gradients are known already; they are multiplied by what comes from above."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        """Keep the gradients and return the loss."""
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> Any:
        """Hand them out, once."""
        gradients, ctx.gradients = ctx.gradients, None
        return None, None, *(gradient.mul_(above[0]) for gradient in gradients)


def differentiate_now(loss: Tensor, parameters: list[torch.nn.Parameter]) -> Tensor:
    """Differentiate a loss and free its graph; the loss returned hands the gradients on in its own backward pass.

    Its value and gradients are those of ``loss``. Hooks on the parameters (DDP's) see one backward pass as ever.

    Args:
        loss: 0-dim.
        parameters: Everything that the loss is to be differentiated by.
    """
    with torch.autocast(loss.device.type, enabled=False):  # as the trainer's own backward pass
        gradients = list(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))
    return _Differentiated.apply(loss.detach(), gradients, *parameters)
