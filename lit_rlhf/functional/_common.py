"""Checks and dtype rules shared by the functions of this package."""

import torch
from torch import Tensor


def check_shapes(**tensors: Tensor) -> None:
    """Raise ``ValueError`` naming the first tensor whose shape differs from the first argument's."""
    items = iter(tensors.items())
    first, reference = next(items)
    for name, tensor in items:
        if tensor.shape != reference.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, but {first} has shape {tuple(reference.shape)}")


def check_rows(**tensors: Tensor) -> None:
    """Raise ``ValueError`` if a tensor's first dimension differs from the first argument's."""
    items = iter(tensors.items())
    first, reference = next(items)
    for name, tensor in items:
        if tensor.shape[:1] != reference.shape[:1]:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, but {first} has shape {tuple(reference.shape)}: "
                "the first dimensions must be equal"
            )


def check_rank(rank: int, **tensors: Tensor) -> None:
    """Raise ``ValueError`` naming the first tensor that does not have ``rank`` dimensions."""
    for name, tensor in tensors.items():
        if tensor.dim() != rank:
            raise ValueError(f"{name} must have {rank} dimension(s), got shape {tuple(tensor.shape)}")


def check_mask(mask: Tensor) -> None:
    """Raise ``TypeError`` unless ``mask`` is bool."""
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool (True = counts), got {mask.dtype}")


def check_unit_interval(**values: float) -> None:
    """Raise ``ValueError`` naming the first number outside [0, 1]."""
    for name, value in values.items():
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} must lie in [0, 1], got {value}")


def result_dtype(*tensors: Tensor) -> torch.dtype:
    """Float64 if any tensor is float64, otherwise float32 (also for half-precision and integer input)."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """Float64, or float32 on devices without it (Apple's MPS)."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def zero_masked(x: Tensor, mask: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``x`` where ``mask`` is True, exactly 0 (in value and gradient) elsewhere, even where ``x`` is nan."""
    x = torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))
    return x.to(dtype if dtype is not None else result_dtype(x))
