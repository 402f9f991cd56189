"""What the machine can do and what the work needs: FLOP/s, bytes/s, trunk passes, FLOPs, share of the roofline."""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.hooks import RemovableHandle

from lit_rlhf.backbone import Backbone
from lit_rlhf.bench import Workload
from lit_rlhf.planner.shapes import kv_cache_bytes

aten = torch.ops.aten


# Operations that torch's own registry leaves out: arguments to FLOPs.
OWN_FORMULAS: dict[OpOverloadPacket, Callable[..., int]] = {
    aten.addmm_: lambda bias, a, b, **_: 2 * a.shape[0] * a.shape[1] * b.shape[1],
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
        q.shape, k.shape, v.shape
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(
        grad.shape, q.shape, k.shape, v.shape
    ),
}


class WorkCounter(TorchDispatchMode):
    """Counts, by phase, the trunks' forward passes (calls, rows, tokens) and the FLOPs of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = ""
        self.running = False
        self.counts: dict[str, dict[str, float]] = defaultdict(
            lambda: {"calls": 0, "passes": 0, "tokens": 0, "flops": 0}
        )
        self._hooks: list[RemovableHandle] = []

    def start(self, backbone: Backbone) -> None:
        """Start counting."""
        self.running = True
        for trunk in backbone.trunks:
            model = backbone.language_model(trunk).base_model
            self._hooks.append(model.register_forward_pre_hook(self._on_pass, with_kwargs=True))
        self.__enter__()

    def stop(self) -> None:
        """Stop counting, if it ever began."""
        if self.running:
            self.__exit__(None, None, None)
            for hook in self._hooks:
                hook.remove()

    def _on_pass(self, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        tokens = next(x for x in (*args, *map(kwargs.get, ("input_ids", "inputs_embeds"))) if x is not None)
        rows, length = tokens.shape[:2]
        self.counts[self.phase]["calls"] += 1
        self.counts[self.phase]["passes"] += rows
        self.counts[self.phase]["tokens"] += rows * length

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation and add its FLOPs."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet in OWN_FORMULAS:
            self.counts[self.phase]["flops"] += OWN_FORMULAS[packet](*args, **kwargs)
        elif packet in flop_registry:
            self.counts[self.phase]["flops"] += flop_registry[packet](*args, **kwargs, out_val=result)
        return result

    def per_sample(self, samples: int) -> dict[str, dict[str, float]]:
        """Return the counts of each phase divided by the samples."""
        return {
            phase: {name: value / samples for name, value in counts.items()}
            for phase, counts in self.counts.items()
            if phase
        }


def decode_bytes(backbone: Backbone, workload: Workload, work: Mapping[str, float]) -> float:
    """Return the bytes per sample that generation must read: the weights every step, and half the full KV cache per
    row.

    Args:
        backbone: Its actor generates.
        workload: Lengths and dtype.
        work: Generation's counts per sample.
    """
    where = backbone.role("actor")
    model = backbone.language_model(where.trunk)
    own = f".{where.adapter}."
    embedding = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is embedding
    weights = sum(
        p.numel() * p.element_size()
        for name, p in model.named_parameters()
        if ("lora_" not in name or own in name) and (tied or p is not embedding)
    )
    tokens = workload.prompt_length + workload.response_length // 2
    return weights * work["calls"] + kv_cache_bytes(model.config, 1, tokens, workload.precision) * work["passes"]


def best_seconds(function: Callable[[], object], device: torch.device, budget: float = 0.5) -> float:
    """Return the seconds of the fastest of many calls within a time budget."""

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    function()
    times: list[float] = []
    end = clock() + budget
    while not times or clock() < end:
        start = clock()
        function()
        times.append(clock() - start)
    return min(times)


def probe(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Measure the machine: FLOP/s of a square matrix product in this dtype, bytes/s of a matrix-vector product."""
    gpu = device.type == "cuda"
    side = 8192 if gpu else 1536
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = best_seconds(lambda: a @ b, device)
    tall = torch.ones(1 << (16 if gpu else 13), 1 << 13, device=device)
    vector = torch.ones(1 << 13, device=device)
    read = best_seconds(lambda: tall @ vector, device)
    return {"flops_per_second": 2 * side**3 / product, "bytes_per_second": tall.numel() * tall.element_size() / read}


def roofline(
    speeds: Mapping[str, float], work: Mapping[str, Mapping[str, float]], decoded: float, seconds: Mapping[str, float]
) -> dict[str, Any]:
    """Return the fewest seconds per sample that the machine allows, by phase, and their share of the measured ones.

    Args:
        speeds: See :func:`probe`.
        work: See :meth:`WorkCounter.per_sample`.
        decoded: Bytes per sample that generation must read.
        seconds: Measured seconds per sample by phase.

    Returns:
        The speeds, ``seconds`` (generation: the larger of FLOPs and bytes; the others: FLOPs) and ``fraction``.
    """
    least = {name: work[name]["flops"] / speeds["flops_per_second"] for name in seconds}
    least["generation"] = max(least["generation"], decoded / speeds["bytes_per_second"])
    fraction = {name: least[name] / seconds[name] for name in seconds}
    fraction["total"] = sum(least.values()) / sum(seconds.values())
    return {**speeds, "decode_bytes_per_sample": decoded, "seconds": least, "fraction": fraction}
