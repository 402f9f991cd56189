"""Memory of a run: peaks over an interval, on the host and on CUDA, and what is kept, by kind."""

import contextlib
import ctypes
import resource
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

HISTORY = 100_000  # allocator events kept for a snapshot


class Meter(Protocol):
    """Measures the peak memory of intervals of a run."""

    def reset(self) -> None:
        """Begin an interval."""

    def read(self) -> dict[str, int]:
        """Return the peaks since the last reset, in bytes, by name."""

    def release(self) -> None:
        """Return unused cached memory to the system."""


class HostMeter:
    """Peak resident memory of this process, from the operating system.

    Where the peak cannot be reset (not Linux, or /proc is read-only), it is the peak since the process began.
    """

    def reset(self) -> None:
        """Set the peak to what is resident now."""
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def read(self) -> dict[str, int]:
        """Return ``resident``."""
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
            (line,) = (line for line in lines if line.startswith("VmHWM"))
            return {"resident": int(line.split()[1]) * 1024}
        except (OSError, ValueError):
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            return {"resident": peak if sys.platform == "darwin" else peak * 1024}

    def release(self) -> None:
        """Return free heap pages, with glibc."""
        with contextlib.suppress(OSError, AttributeError):  # no glibc
            ctypes.CDLL("libc.so.6").malloc_trim(0)


class CudaMeter:
    """Peaks of PyTorch's CUDA allocator on the current device.

    Args:
        history: Whether the allocator's events are being recorded; fragmentation is then computed from them, exactly.
    """

    def __init__(self, history: bool = False) -> None:
        self.history = history
        self._before = (0, 0, 0)

    def reset(self) -> None:
        """Forget the peaks, and remember where the interval begins."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        events = len(self._events()) if self.history else 0
        self._before = (torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), events)

    def read(self) -> dict[str, int]:
        """Return ``allocated``, ``reserved`` and ``fragmentation`` (without history: ``fragmentation_at_least``)."""
        torch.cuda.synchronize()
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        peaks = {"allocated": allocated, "reserved": reserved}
        events = self._events() if self.history else []
        if self.history and len(events) < HISTORY:
            peaks["fragmentation"] = fragmentation(events[self._before[2] :], *self._before[:2])
        else:
            # What was allocated when the reserved memory peaked is not recorded; it was at most the allocated peak.
            peaks["fragmentation_at_least"] = reserved - allocated
        return peaks

    def release(self) -> None:
        """Return unused blocks to the device."""
        torch.cuda.empty_cache()

    def _events(self) -> Sequence[Mapping[str, Any]]:
        traces: Sequence[Sequence[Mapping[str, Any]]] = torch.cuda.memory._snapshot()["device_traces"]
        return traces[torch.cuda.current_device()]


def fragmentation(events: Iterable[Mapping[str, Any]], allocated: int, reserved: int) -> int:
    """Return reserved minus allocated bytes at the moment when reserved memory was largest.

    Args:
        events: The CUDA allocator's trace, oldest first.
        allocated: Bytes allocated before the first event.
        reserved: Bytes reserved before the first event.
    """
    signs = {
        "alloc": (1, 0),
        "free_requested": (-1, 0),
        "segment_alloc": (0, 1),
        "segment_map": (0, 1),
        "segment_free": (0, -1),
        "segment_unmap": (0, -1),
    }
    peak, at_peak, grew = reserved, allocated, False
    for event in events:
        a, r = signs.get(event["action"], (0, 0))
        allocated, reserved = allocated + a * event["size"], reserved + r * event["size"]
        if reserved > peak:
            peak, at_peak, grew = reserved, allocated, True
        elif grew and a > 0:
            at_peak = allocated  # a segment is reserved for the allocation that follows it
        grew = grew and a == 0
    return peak - at_peak


def merge_peaks(first: Mapping[str, int], second: Mapping[str, int]) -> dict[str, int]:
    """Return the peaks over two intervals; fragmentation is that of the interval that reserved more."""
    larger = second if second.get("reserved", 0) > first.get("reserved", 0) else first
    return {
        name: larger.get(name, 0) if name.startswith("fragmentation") else max(first.get(name, 0), second.get(name, 0))
        for name in {**first, **second}
    }


def bytes_by_kind(module: nn.Module, optimizers: Sequence[Optimizer] = ()) -> dict[str, int]:
    """Return bytes of what a run keeps: weights, gradients, optimizer state, rollout; shared storages count once."""
    parameters = list(module.parameters())
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    experience = getattr(getattr(module, "rollout_buffer", None), "experience", None)
    kinds: dict[str, list[object]] = {
        "frozen weights": [p for p in parameters if not p.requires_grad],
        "trained weights": [p for p in parameters if p.requires_grad],
        "gradients": [p.grad for p in parameters],
        "optimizer": [value for state in states for value in state.values()],
        "rollout": list(vars(experience).values()) if experience is not None else [],
    }
    seen: set[int] = set()
    return {kind: sum(_new_bytes(tensors, seen)) for kind, tensors in kinds.items()}


def _new_bytes(tensors: Iterable[object], seen: set[int]) -> Iterator[int]:
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            storage = local.untyped_storage()
            if storage._cdata not in seen:
                seen.add(storage._cdata)
                yield storage.nbytes()
