"""The bytes of live tensors, followed operation by operation: on real tensors and on fake ones alike."""

import weakref
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Sums the storages that operations create inside the block, by kind, until they are freed.

    What a kernel allocates and frees within one operation is not seen, nor what an allocator wastes.

    Args:
        known: Tensors that exist already and are not to be counted.
        vocabulary: Size of a last axis that makes a tensor ``logits``; every other one is ``activations`` unless
            :meth:`move` says otherwise.
    """

    def __init__(self, known: Iterable[Tensor] = (), vocabulary: int | None = None) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.stretch = ""
        # Stretch to the bytes by kind when their sum was largest in it.
        self.peaks: dict[str, Counter[str]] = {}
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._live: dict[int, tuple[str, int]] = {}
        self._bytes: Counter[str] = Counter()
        self._sum = 0
        self.enter("")

    @property
    def current(self) -> int:
        """Bytes that are live now."""
        return self._sum

    def peak(self, stretch: str) -> int:
        """Return the largest sum of a stretch."""
        return sum(self.peaks[stretch].values())

    def enter(self, stretch: str) -> None:
        """Begin (or continue) a stretch of the run; each has its own peak."""
        self.stretch = stretch
        self.peaks.setdefault(stretch, Counter())
        self._note()

    def _note(self) -> None:
        if self._sum >= self.peak(self.stretch):
            self.peaks[self.stretch] = self._bytes.copy()

    def add(self, tensor: Tensor, kind: str | None = None) -> None:
        """Count a tensor's storage, once, until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live or key in self._known:
            return
        if kind is None:
            is_logits = tensor.dim() > 1 and tensor.shape[-1] == self.vocabulary
            kind = "logits" if is_logits else "activations"
        size = storage.nbytes()
        self._live[key] = (kind, size)
        self._bytes[kind] += size
        self._sum += size
        weakref.finalize(storage, self._free, key)
        self._note()

    def move(self, tensor: Tensor, kind: str) -> None:
        """Count a live tensor under another kind from now on."""
        key = tensor.untyped_storage()._cdata
        if key in self._live:
            old, size = self._live[key]
            self._live[key] = (kind, size)
            self._bytes[old] -= size
            self._bytes[kind] += size

    def _free(self, key: int) -> None:
        kind, size = self._live.pop(key)
        self._bytes[kind] -= size
        self._sum -= size

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation and count what it returns."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return result


class WorstCaseLive(LiveBytes):
    """As :class:`LiveBytes`, for fake tensors: a boolean index selects everything, since its values are unknown.

    Products shaped as one of ``gradient_shapes`` (shape and dtype) are gradients that an algorithm scales.
    """

    gradient_shapes: Collection[tuple[torch.Size, torch.dtype]] = frozenset()

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Replace boolean indices by indices of their whole size, then run and count."""
        if func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default):
            args = (args[0], _whole(args[1]), *args[2:])
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if func is torch.ops.aten.mul.Tensor and (result.shape, result.dtype) in self.gradient_shapes:
            self.move(result, "gradients")
        return result


def _whole(indices: Iterable[Tensor | None]) -> list[Tensor | None]:
    whole: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype is torch.bool:
            whole += [torch.empty(index.numel(), dtype=torch.long, device=index.device) for _ in range(index.dim())]
        else:
            whole.append(index)
    return whole
