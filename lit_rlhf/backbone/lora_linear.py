"""The LoRA linear layer as one operation, in place of PEFT's chain of six.

PEFT's forward keeps the update, the scaled update and their sum, each as large as the layer's output, and with a
16-bit trunk a float32 copy of the input. One graph node keeps the input and the ``[N, r]`` product alone.
"""

from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Return ``[N, out]`` in x's dtype and the scaled ``[N, r]`` product in the adapter's."""
    reduced = (x.to(a.dtype) @ a.t()).mul_(scaling)
    result = F.linear(x, weight, bias)
    if result.dtype == a.dtype:
        return result.addmm_(reduced, b.t()), reduced
    # As PEFT does it: the sum is rounded once.
    return torch.addmm(result.to(a.dtype), reduced, b.t()).to(result.dtype), reduced


class _LoraLinear(torch.autograd.Function):
    """``y = x W^T + bias + s (x A^T) B^T`` with frozen W and bias."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        result, reduced = _forward(flat, weight, bias, a, b, scaling)
        ctx.save_for_backward(x, weight, a, b, reduced)
        ctx.scaling = scaling
        return result.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, reduced = ctx.saved_tensors
        need_x, _, _, need_a, need_b, _ = ctx.needs_input_grad
        flat, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        exact = grad.to(a.dtype)
        grad_b = exact.t() @ reduced if need_b else None
        grad_reduced = (exact @ b).mul_(ctx.scaling)
        grad_a = grad_reduced.t() @ flat.to(a.dtype) if need_a else None
        grad_x = None
        if need_x:
            grad_x = grad @ weight
            if grad_x.dtype == a.dtype:
                grad_x.addmm_(grad_reduced, a)
            else:
                grad_x = torch.addmm(grad_x.to(a.dtype), grad_reduced, a).to(x.dtype)
            grad_x = grad_x.view(x.shape)
        return grad_x, None, None, grad_a, grad_b, None


class LoraLinear(PeftLinear):
    """PEFT's LoRA layer with a faster, leaner forward pass for the common case.

    The common case: one active adapter, no DoRA, nothing merged, a frozen ``nn.Linear`` below, no autocast. Every
    other case is PEFT's own. The results are PEFT's up to rounding (the scaling is applied before B, not after).
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return ``[.., out]`` for ``[.., in]``."""
        name = None if args or kwargs else self._single_adapter(x)
        if name is None:
            return super().forward(x, *args, **kwargs)
        base = cast(nn.Linear, self.base_layer)
        a, b = (cast(Tensor, matrices[name].weight) for matrices in (self.lora_A, self.lora_B))
        tensors = (base.weight, base.bias, a, b)
        if torch.is_grad_enabled():
            fused: Tensor = _LoraLinear.apply(x, *tensors, self.scaling[name])
            return fused
        result, _ = _forward(x.reshape(-1, x.shape[-1]), *tensors, self.scaling[name])
        return result.view(*x.shape[:-1], base.out_features)

    def _single_adapter(self, x: Tensor) -> str | None:
        """Return the one adapter to use, or None where this is not the common case."""
        base = cast(nn.Linear, self.base_layer)
        active = self._active_adapter
        names = [active] if isinstance(active, str) else [name for name in active if name in self.lora_A]
        if self._disable_adapters or self.merged_adapters or len(names) != 1 or names[0] not in self.lora_A:
            return None
        if type(base) is not nn.Linear or base.weight.requires_grad or names[0] in self.lora_variant:
            return None
        plain = x.dtype == base.weight.dtype and isinstance(self.lora_dropout[names[0]], nn.Identity)
        return None if not plain or torch.is_autocast_enabled(x.device.type) else names[0]


def use_fused_layers(model: nn.Module) -> None:
    """Give a model's plain LoRA layers the forward pass above, in place."""
    for module in model.modules():
        if type(module) is PeftLinear:
            module.__class__ = LoraLinear
