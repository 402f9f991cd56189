"""Runs measurements, each in a fresh process, so that no run's memory contains leftovers of another."""

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lit_rlhf.bench import Workload
from lit_rlhf.errors import BenchmarkError, ConfigError

MARK = "LIT_RLHF_BENCH "


def measure_one(layout: str, algorithm: str, workload: Workload) -> dict[str, Any]:
    """Write the stages that layouts start from, then measure one configuration.

    Raises:
        BenchmarkError: The run failed; its own message is in the text.
    """
    return measure_alternating([(layout, algorithm)], workload, rounds=1)[0]


def measure_alternating(
    configurations: Sequence[tuple[str, str]], workload: Workload, rounds: int
) -> list[dict[str, Any]]:
    """Measure (layout, algorithm) pairs in turn; odd rounds run backwards, so that a drifting machine favors none.

    Returns:
        One result per run, in the order they ran, each with its ``round``.

    Raises:
        BenchmarkError: A run failed; its own message is in the text.
    """
    results = []
    with tempfile.TemporaryDirectory(prefix="lit_rlhf_bench_") as folder:
        if workload.random_weights is not None:
            workload = replace(workload, model=write_shape(workload.random_weights, Path(folder) / "shape"))
        common = {"workload": asdict(workload), "folder": folder}
        run_child({"write_stages": sorted({layout for layout, _ in configurations}), **common})
        for turn in range(rounds):
            for layout, algorithm in configurations if turn % 2 == 0 else reversed(configurations):
                if rounds * len(configurations) > 1:
                    print(f"round {turn + 1}/{rounds}: {algorithm} on {layout}", file=sys.stderr, flush=True)
                result = run_child({"layout": layout, "algorithm": algorithm, **common})
                results.append({**result, "round": turn, **environment()})
    return results


def write_shape(name: str, folder: Path) -> str:
    """Write a shape's config and the tiny tokenizer; return the model name that builds it with random weights.

    Raises:
        ConfigError: There is no such shape.
    """
    from lit_rlhf.backbone import load_tokenizer
    from lit_rlhf.planner import SHAPES, load_config

    if name not in SHAPES:
        raise ConfigError(
            f"random_weights: unknown shape {name!r}; choose from {', '.join(SHAPES)}. For your own config, give "
            "--model random:FOLDER"
        )
    load_config(name).save_pretrained(folder)
    load_tokenizer("random:tiny").save_pretrained(folder)
    return f"random:{folder}"


def run_child(task: dict[str, Any]) -> dict[str, Any]:
    """Run one task of :mod:`lit_rlhf.bench.run` in its own process and return its result.

    Raises:
        BenchmarkError: It failed.
    """
    command = [sys.executable, "-m", "lit_rlhf.bench.run", json.dumps(task)]
    # A console script has no working directory on its path; custom layouts and algorithms are found there.
    paths = [os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])]
    child = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    )
    answers = [line.removeprefix(MARK) for line in child.stdout.splitlines() if line.startswith(MARK)]
    if child.returncode == 0 and answers:
        result: dict[str, Any] = json.loads(answers[-1])
        if "error" in result:
            raise BenchmarkError(result["error"])
        return result
    what = f"{task.get('algorithm', 'stages')} on {task.get('layout', task.get('write_stages'))}"
    if child.returncode < 0:
        hint = ", probably because memory ran out" if child.returncode == -9 else ""
        raise BenchmarkError(f"{what}: the process was ended by signal {-child.returncode}{hint}")
    tail = "\n".join(child.stderr.strip().splitlines()[-15:])
    raise BenchmarkError(f"{what} failed with exit code {child.returncode}:\n{tail}")


def environment() -> dict[str, Any]:
    """Return machine, load and commit."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        cpu = next((x.split(":")[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")), cpu)
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    except OSError:  # no git
        commit = None
    machine = {"cpu": cpu, "cores": os.cpu_count(), "system": platform.platform()}
    # Above the number of threads, something else was running.
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    return {"machine": machine, "load_average": load, "commit": commit, "command": " ".join(sys.argv)}
