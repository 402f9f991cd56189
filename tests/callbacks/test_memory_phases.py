"""Memory of the phases: peaks, boundaries, and what an out-of-memory error says. CUDA's parts run on a fake meter."""

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import make_ppo, make_trainer

from lit_rlhf import FunctionReward, PromptData
from lit_rlhf.callbacks import MemoryPhases, memory
from lit_rlhf.callbacks.memory import advice, explain
from lit_rlhf.metrics.memory import HostMeter, bytes_by_kind, fragmentation, merge_peaks

GIB = 2**30


class FakeMeter:
    """Peaks from a list, one a reading; notes what it was asked."""

    def __init__(self, peaks: list[dict[str, int]] | None = None) -> None:
        self.peaks = iter(peaks or [])
        self.calls: list[str] = []

    def reset(self) -> None:
        self.calls.append("reset")

    def read(self) -> dict[str, int]:
        self.calls.append("read")
        return next(self.peaks, {"allocated": 0, "reserved": 0})

    def release(self) -> None:
        self.calls.append("release")


def metered(peaks: list[dict[str, int]] | None = None, **kwargs: Any) -> tuple[MemoryPhases, FakeMeter]:
    callback, meter = MemoryPhases(**kwargs), FakeMeter(peaks)
    callback.meter = meter
    return callback, meter


def fit(callback: MemoryPhases, prompts: PromptData, folder: Path, epochs: int = 1, **kwargs: Any) -> None:
    trainer = make_trainer(folder, epochs)
    trainer.callbacks.insert(0, callback)
    trainer.fit(make_ppo(**kwargs), prompts)


def test_peaks_of_every_iteration_reach_the_logger(prompts: PromptData, tmp_path: Path) -> None:
    peaks = [{"allocated": n * GIB, "reserved": 2 * n * GIB, "fragmentation": n * GIB} for n in (1, 2, 3)]
    callback, _ = metered(peaks)
    fit(callback, prompts, tmp_path)
    with (tmp_path / "metrics.csv").open() as file:
        (row,) = (row for row in csv.DictReader(file) if row["memory/training/allocated"])
    for n, name in enumerate(("generation", "scoring", "training"), start=1):
        found = [float(row[f"memory/{name}/{kind}"]) for kind in ("allocated", "reserved", "fragmentation")]
        assert found == [n, 2 * n, n]


def test_on_the_cpu_the_resident_peak_is_logged(prompts: PromptData, tmp_path: Path) -> None:
    fit(MemoryPhases("every_boundary"), prompts, tmp_path, epochs=2)
    with (tmp_path / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["memory/training/resident"]]
    assert len(rows) == 2
    assert all(0.1 < float(row[f"memory/{name}/resident"]) < 100 for row in rows for name in ("generation", "training"))


@pytest.mark.parametrize(
    ("policy", "released"),
    [
        ("never", []),
        ("after_inference", ["scoring"]),
        ("after_training", ["training"]),
        ("every_boundary", ["generation", "scoring", "training"]),
    ],
)
def test_the_cache_is_emptied_after_the_peak_was_read(policy: Any, released: list[str]) -> None:
    callback, meter = metered(empty_cache=policy)
    found = []
    for name in ("generation", "scoring", "training"):
        callback.on_phase_start(None, None, name)  # type: ignore[arg-type]
        meter.calls.clear()
        callback.on_phase_end(None, None, name)  # type: ignore[arg-type]
        if "release" in meter.calls:
            found.append(name)
            assert meter.calls == ["read", "release", "reset"]
    assert found == released


def test_a_phase_inside_another_takes_its_own_stretch() -> None:
    readings = [{"allocated": 5, "reserved": 6}, {"allocated": 9, "reserved": 9}, {"allocated": 4, "reserved": 7}]
    callback, _ = metered(readings)
    for event, name in (("start", "training"), ("start", "evaluation"), ("end", "evaluation"), ("end", "training")):
        getattr(callback, f"on_phase_{event}")(None, None, name)
    assert callback.peaks["evaluation"] == {"allocated": 9, "reserved": 9}
    assert callback.peaks["training"] == {"allocated": 5, "reserved": 7}


def test_fragmentation_is_that_of_the_stretch_that_reserved_more() -> None:
    first, second = {"reserved": 8, "allocated": 8, "fragmentation": 0}, {"reserved": 9, "fragmentation": 4}
    assert merge_peaks(first, second) == {"reserved": 9, "allocated": 8, "fragmentation": 4}
    assert merge_peaks(second, first) == {"reserved": 9, "allocated": 8, "fragmentation": 4}


def event(action: str, size: int) -> dict[str, Any]:
    return {"action": action, "size": size}


def test_fragmentation_at_the_moment_of_the_largest_reservation() -> None:
    events = [
        event("segment_alloc", 100),
        event("alloc", 90),
        event("free_requested", 90),
        event("free_completed", 90),
        event("alloc", 30),
        event("segment_alloc", 50),  # reserved 160, the peak; 40 + 30 allocated, and 45 for this segment's tensor
        event("alloc", 45),
        event("alloc", 20),
        event("segment_free", 50),
    ]
    assert fragmentation(events, allocated=5, reserved=10) == 160 - (5 + 30 + 45)
    assert fragmentation([event("alloc", 3)], allocated=5, reserved=10) == 5


def test_the_peak_of_the_host_can_be_reset() -> None:
    meter = HostMeter()
    block = torch.ones(30 * 2**20 // 4)
    meter.reset()
    del block
    meter.release()
    meter.reset()
    before = meter.read()["resident"]
    block = torch.ones(40 * 2**20 // 4)
    grown = meter.read()["resident"] - before
    assert len(block)
    assert 35 * 2**20 < grown < 60 * 2**20


def test_kept_bytes_by_kind_each_storage_once() -> None:
    module = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 4, bias=False), "b": torch.nn.Linear(4, 4, bias=False)})
    module["c"] = torch.nn.Linear(4, 4, bias=False)
    module["c"].weight = module["a"].weight
    module["b"].requires_grad_(False)
    optimizer = torch.optim.SGD([module["a"].weight], lr=0.1, momentum=0.9)
    module["a"](torch.ones(1, 4)).sum().backward()
    optimizer.step()
    kept = bytes_by_kind(module, [optimizer])  # type: ignore[arg-type]
    assert kept == {"frozen weights": 64, "trained weights": 64, "gradients": 64, "optimizer": 64, "rollout": 0}


@pytest.mark.parametrize("phase", ["scoring", "training"])
def test_a_real_allocation_failure_says_where_and_what_to_change(phase: str, prompts: Any, tmp_path: Path) -> None:
    def too_much(*args: Any, **kwargs: Any) -> Any:
        return torch.empty(2**60)

    module = make_ppo(reward=FunctionReward(too_much)) if phase == "scoring" else make_ppo(layout="lora")
    if phase == "training":
        module.loss = too_much  # type: ignore[method-assign]
    trainer = make_trainer(tmp_path, 1)
    trainer.callbacks.insert(0, MemoryPhases())
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator") as caught:
        trainer.fit(module, prompts)
    (note,) = caught.value.__notes__
    assert f"out of memory in the {phase} phase at" in note
    assert "frozen weights" in note
    wanted = "rollout_batch_size (now 8)" if phase == "scoring" else "minibatch_size (now 4), and raise trainer.accum"
    assert wanted in note


def test_other_errors_are_left_alone(prompts: PromptData, tmp_path: Path) -> None:
    def broken(*args: Any, **kwargs: Any) -> list[float]:
        raise RuntimeError("judge is down")

    with pytest.raises(RuntimeError, match="judge is down") as caught:
        fit(MemoryPhases(), prompts, tmp_path, reward=FunctionReward(broken))
    assert not hasattr(caught.value, "__notes__")


def test_an_error_on_the_device_also_writes_a_snapshot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda name: Path(name).write_bytes(b"x"))
    callback, _ = metered([{"allocated": 6 * GIB, "reserved": 9 * GIB}])
    strategy = SimpleNamespace(root_device=torch.device("cuda"))
    trainer: Any = SimpleNamespace(strategy=strategy, optimizers=[], default_root_dir=str(tmp_path), global_rank=1)
    module: Any = torch.nn.Linear(2, 2)
    error = torch.OutOfMemoryError("CUDA out of memory")
    callback.on_phase_start(trainer, module, "generation")
    try:
        raise error
    except torch.OutOfMemoryError:
        callback.on_phase_end(trainer, module, "generation")
    callback.on_exception(trainer, module, error)
    assert (tmp_path / "memory_oom_rank1.pickle").read_bytes() == b"x"
    (note,) = error.__notes__
    assert "in the generation phase at 6.00 GiB allocated, 9.00 GiB reserved" in note
    assert "rest (KV cache and logits)          6.00 GiB" in note
    assert "empty_cache=every_boundary" in note


def test_snapshot_needs_cuda_and_policies_have_names(prompts: PromptData, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="snapshot records the CUDA allocator"):
        fit(MemoryPhases(snapshot=True), prompts, tmp_path)
    with pytest.raises(ValueError, match="empty_cache must be one of never, after_inference"):
        MemoryPhases("sometimes")  # type: ignore[arg-type]


def test_what_applies_is_advised() -> None:
    settings = SimpleNamespace(
        minibatch_size=8, gradient_checkpointing=True, layout=SimpleNamespace(trunks={"a": 1, "b": 2})
    )
    rows = {"frozen weights": 6 * GIB, "rest": GIB}
    found = advice("training", {"allocated": 7 * GIB, "reserved": 7 * GIB}, rows, settings, "never")
    assert len(found) == 2
    assert found[0].startswith("lower minibatch_size (now 8)")
    assert found[1] == "layout hydra or j_hydra keeps one trunk in memory instead of 2"
    settings.gradient_checkpointing = False
    found = advice("training", {"allocated": 7 * GIB, "reserved": 9 * GIB}, {"rest": GIB}, settings, "never")
    assert ["empty_cache" in found[0], "gradient_checkpointing" in found[2], len(found)] == [True, True, 3]


def test_the_rest_is_never_negative() -> None:
    assert "rest" not in explain("training", {"resident": 1}, {"frozen weights": GIB}, SimpleNamespace())
    assert memory.is_out_of_memory(MemoryError())
