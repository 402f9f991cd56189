"""Memory by phase: peaks in every logger, when cached memory is released, and what to change when memory runs out."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch import LightningModule, Trainer

from lit_rlhf.errors import ConfigError
from lit_rlhf.metrics.memory import HISTORY, CudaMeter, HostMeter, Meter, bytes_by_kind, merge_peaks
from lit_rlhf.rollout.phases import PhaseListener

EmptyCache = Literal["never", "after_inference", "after_training", "every_boundary"]
BOUNDARIES: dict[str, tuple[str, ...]] = {
    "never": (),
    "after_inference": ("scoring",),
    "after_training": ("training",),
    "every_boundary": ("generation", "scoring", "training"),
}


class MemoryPhases(PhaseListener):
    """Logs ``memory/<phase>/...`` in GiB, the maximum over all ranks.

    On CUDA ``allocated``, ``reserved`` and ``fragmentation`` (reserved minus allocated when reserved memory peaked;
    without ``snapshot`` a lower bound, ``fragmentation_at_least``); elsewhere ``resident``. When memory runs out, the
    error says in which phase, what held the memory and what to change; on CUDA it also writes a memory snapshot.

    Args:
        empty_cache: When cached memory goes back to the system: after scoring, after training, or both and after
            generation (Zhou et al. 2024, arXiv:2410.15651: less reserved memory for about 2 % more time).
        snapshot: Record the CUDA allocator's history; ``memory.pickle`` in the trainer's folder holds the last
            iteration (open it at pytorch.org/memory_viz). Costs time.

    Raises:
        ConfigError: ``empty_cache`` is unknown, or ``snapshot`` is on without CUDA.
    """

    def __init__(self, empty_cache: EmptyCache = "never", snapshot: bool = False) -> None:
        super().__init__()
        if empty_cache not in BOUNDARIES:
            raise ConfigError(f"empty_cache must be one of {', '.join(BOUNDARIES)}, got {empty_cache!r}")
        self.empty_cache = empty_cache
        self.snapshot = snapshot
        self.meter: Meter | None = None
        # Phase to its peaks in bytes, of the current iteration.
        self.peaks: dict[str, dict[str, int]] = {}
        self._running: list[str] = []
        # The last error that ended a phase, by id, and the innermost phase that it ended.
        self._failed = (0, "")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose the meter by the device."""
        cuda = trainer.strategy.root_device.type == "cuda"
        if self.snapshot and not cuda:
            raise ConfigError("MemoryPhases: snapshot records the CUDA allocator, and this run is not on CUDA")
        if self.snapshot:
            record_history(True)
        self.meter = self.meter or (CudaMeter(self.snapshot) if cuda else HostMeter())

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop recording."""
        if self.snapshot:
            record_history(False)

    def _close(self) -> None:
        """Add what was measured since the last boundary to the running phase."""
        if self._running and self.meter is not None:
            name = self._running[-1]
            self.peaks[name] = merge_peaks(self.peaks.get(name, {}), self.meter.read())

    def on_phase_start(self, trainer: Trainer, pl_module: LightningModule, phase: str) -> None:
        """Begin to measure the phase; a nested phase interrupts the outer one."""
        self._close()
        self._running.append(phase)
        if self.meter is not None:
            self.meter.reset()

    def on_phase_end(self, trainer: Trainer, pl_module: LightningModule, phase: str) -> None:
        """Stop measuring the phase, and empty the cache at the chosen boundaries."""
        self._close()
        self._running.remove(phase)
        error = sys.exc_info()[1]
        if error is not None and id(error) != self._failed[0]:
            self._failed = (id(error), phase)
        if self.meter is not None:
            if phase in BOUNDARIES[self.empty_cache]:
                self.meter.release()
            self.meter.reset()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the iteration's peaks; the training phase still runs if the callback that ends it comes later."""
        self._close()
        if self.meter is not None:
            self.meter.reset()
        for name, peaks in self.peaks.items():
            for kind, size in peaks.items():
                # Not by sync_dist: the first rank's progress bar would reduce before the other ranks do.
                largest = trainer.strategy.reduce(torch.tensor(float(size), device=pl_module.device), reduce_op="max")
                pl_module.log(f"memory/{name}/{kind}", largest / 2**30)
        self.peaks = {}
        if self.snapshot:
            dump_snapshot(Path(trainer.default_root_dir), "memory", trainer.global_rank)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Add to an out-of-memory error what held the memory and what to change."""
        if not is_out_of_memory(exception):
            return
        self._close()
        failed, phase = self._failed
        if failed != id(exception):
            phase = self._running[-1] if self._running else "start"
        peaks = self.peaks.get(phase, self.meter.read() if self.meter is not None else {})
        lines = [explain(phase, peaks, bytes_by_kind(pl_module, trainer.optimizers), pl_module, self.empty_cache)]
        if trainer.strategy.root_device.type == "cuda":
            file = dump_snapshot(Path(trainer.default_root_dir), "memory_oom", trainer.global_rank)
            lines.append(f"  allocator snapshot: {file} (open it at pytorch.org/memory_viz)")
        exception.add_note("\n".join(lines))


def record_history(on: bool) -> None:
    """Turn the recording of CUDA allocator events on or off."""
    torch.cuda.memory._record_memory_history(enabled="all" if on else None, stacks="python", max_entries=HISTORY)


def dump_snapshot(folder: Path, name: str, rank: int) -> Path:
    """Write the CUDA allocator's state, and its history where it was recorded; return the file."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / (f"{name}_rank{rank}.pickle" if rank else f"{name}.pickle")
    partial = file.with_suffix(".partial")
    torch.cuda.memory._dump_snapshot(str(partial))
    os.replace(partial, file)
    return file


def is_out_of_memory(exception: BaseException) -> bool:
    """Return whether memory ran out, on a device or on the host."""
    if isinstance(exception, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(exception, RuntimeError) and "DefaultCPUAllocator" in str(exception)


def explain(
    phase: str, peaks: Mapping[str, int], held: Mapping[str, int], settings: object, empty_cache: str = "never"
) -> str:
    """Return which phase ran out of memory, what held it, and what to change, in that order.

    Args:
        phase: The phase.
        peaks: Its peaks in bytes, as a meter reads them.
        held: Bytes by kind, see :func:`bytes_by_kind`.
        settings: The module, whose batch sizes and layout are named where it has them.
        empty_cache: When the cache is emptied now.
    """
    peak = peaks.get("allocated", peaks.get("resident", 0))
    rest = {"generation": "KV cache and logits", "training": "activations and logits"}.get(phase, "activations")
    rows = {**held, f"rest ({rest})": max(0, peak - sum(held.values()))}
    table = [f"  {kind:<32}{size / 2**30:8.2f} GiB" for kind, size in rows.items() if size]
    kind = "allocated" if "allocated" in peaks else "resident"
    head = f"lit-rlhf: out of memory in the {phase} phase at {peak / 2**30:.2f} GiB {kind}"
    if "reserved" in peaks:
        head += f", {peaks['reserved'] / 2**30:.2f} GiB reserved"
    changes = [f"    - {change}" for change in advice(phase, peaks, rows, settings, empty_cache)]
    return "\n".join([head, *table, "  what to change, best first:", *changes])


def advice(
    phase: str, peaks: Mapping[str, int], rows: Mapping[str, int], settings: object, empty_cache: str
) -> list[str]:
    """Return the changes that would lower this phase's peak, the cheapest first."""

    def now(name: str) -> str:
        return f" (now {getattr(settings, name)})" if hasattr(settings, name) else ""

    found = []
    if empty_cache == "never" and peaks.get("reserved", 0) > 1.2 * peaks.get("allocated", 0) > 0:
        found.append("MemoryPhases(empty_cache=every_boundary): much is reserved but not allocated")
    if phase in ("generation", "scoring", "evaluation"):
        found.append(f"lower rollout_batch_size{now('rollout_batch_size')}: the same rollout in smaller parts")
    else:
        size = now("minibatch_size") or now("batch_size")
        found.append(f"lower minibatch_size{size}, and raise trainer.accumulate_grad_batches by the same factor")
        if not getattr(settings, "gradient_checkpointing", False):
            found.append("gradient_checkpointing: true recomputes activations in backward")
    trunks = getattr(getattr(settings, "layout", None), "trunks", {})
    weights = sum(rows.get(name, 0) for name in ("frozen weights", "trained weights", "gradients", "optimizer"))
    if len(trunks) > 1 and 2 * weights > sum(rows.values()):
        found.append(f"layout hydra or j_hydra keeps one trunk in memory instead of {len(trunks)}")
    elif 2 * weights > sum(rows.values()):
        found.append("dtype: bfloat16 halves the frozen weights, if they are float32")
    return found
