"""For test_checkpoint_folders.py: overwrites a folder in forked ranks, one of which is killed, or fails, at each step.

Prints a line for each time: the rank, the step, what each rank said, and what the folder holds afterwards.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_checkpoint_folders import Run, disk_full, fail_at, failure, names
from torch.distributed.device_mesh import init_device_mesh

folder, world, every, how = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
path = folder / "saved" / "last.ckpt"
groups = 0


def be(rank: int, work: Callable[[int], Any]) -> None:
    """Do a rank's work and leave what it returns in a file; never returns."""
    status = 1
    try:
        if world > 1:
            dist.init_process_group("gloo", init_method=f"file://{folder}/store{groups}", rank=rank, world_size=world)
            Run.mesh = init_device_mesh("cpu", (world,))
        (folder / f"said{rank}").write_text(json.dumps(work(rank)))
        status = 0
    finally:
        os._exit(status)


def in_ranks(work: Callable[[int], Any]) -> list[Any] | None:
    """Return what each rank's work returned, None if one was killed; the others are killed then."""
    global groups
    groups += 1
    pids = []
    for rank in range(world):
        if not (pid := os.fork()):
            be(rank, work)
        pids.append(pid)
    killed, failed = False, False
    while pids:
        pid, status = os.wait()
        pids.remove(pid)
        if os.WIFSIGNALED(status) and not killed:
            killed = True
            for other in pids:
                os.kill(other, signal.SIGKILL)
        failed |= status != 0
    # A killed rank's peers may notice, fail, and be waited for before it.
    assert killed or not failed, f"a rank of group {groups} failed"
    return None if killed else [json.loads((folder / f"said{rank}").read_text()) for rank in range(world)]


def save(value: float) -> None:
    assert in_ranks(lambda rank: Run(value).save(path)) is not None
    assert names(path.parent) == ["last.ckpt"], names(path.parent)


def loaded() -> float:
    values = in_ranks(lambda rank: Run(1.0).load(path))
    assert values is not None
    assert len(set(values)) == 1
    return values[0]


def disturbed(rank: int, victim: int, step: int) -> list[Any]:
    run, seen = Run(0.25), [0]
    if rank == victim:
        act = disk_full if how == "fail" else lambda: os.kill(os.getpid(), signal.SIGKILL)
        seen = fail_at(pytest.MonkeyPatch(), step, act)
    return [failure(lambda: run.save(path)), seen[0]]


torch.set_num_threads(1)
for victim in range(world):
    step = 1
    while True:
        save(0.5)
        said = in_ranks(lambda rank: disturbed(rank, victim, step))  # noqa: B023
        partial = [name for name in names(path.parent) if name.endswith(".partial")]
        print(json.dumps({"rank": victim, "step": step, "said": said, "holds": loaded(), "partial": partial}))
        if said is not None and said[victim][1] < step:
            break
        step += every
