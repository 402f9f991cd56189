"""Tables of what ``lit-rlhf bench`` measured."""

import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Result = dict[str, Any]
Spread = tuple[float, float, float]


def spread(values: Sequence[float]) -> Spread:
    """Return median, smallest and largest."""
    return statistics.median(values), min(values), max(values)


def show(values: Spread, digits: int = 3) -> str:
    """Return ``median (smallest-largest)``, or the value alone where all are equal."""
    middle, low, high = values
    return f"{middle:.{digits}f}" if low == high else f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def peak_bytes(result: Result, phase: str = "peak") -> int:
    """Return the peak of a phase: reserved memory on CUDA, else resident memory."""
    peaks = result["memory"].get(phase, {})
    return int(peaks.get("reserved", peaks.get("resident", 0)))


def make_console() -> Console:
    """Return a console that does not fold tables in a file or a pipe."""
    return Console(soft_wrap=True) if Console().is_terminal else Console(soft_wrap=True, width=140)


def print_one(result: Result, as_json: bool) -> None:
    """Print one configuration's table, or its JSON in one line."""
    if as_json:
        print(json.dumps(result))
        return
    console, w = make_console(), result["workload"]
    allocated = "allocated" in result["memory"]["peak"]
    table = Table(
        title=f"{result['algorithm']} on {result['layout']}: {w['model']}, {w['precision']}, "
        f"{w['batch_size']} x ({w['prompt_length']} + {w['response_length']}) tokens, {w['updates']} updates"
    )
    peak = ["allocated GiB", "reserved GiB"] if allocated else ["peak RSS GiB"]
    for name in ("phase", "s / sample", *peak, "passes", "tokens", "GFLOP", "roofline"):
        table.add_column(name, justify="left" if name == "phase" else "right")
    for name, seconds in result["seconds_per_sample"].items():
        phase = "peak" if name == "total" else name
        peaks, work = result["memory"].get(phase, {}), result["work_per_sample"].get(name)
        kinds = ("allocated", "reserved") if allocated else ("resident",)
        sizes = [f"{peaks[kind] / 2**30:.2f}" if kind in peaks else "" for kind in kinds]
        counts = [f"{work['passes']:.4g}", f"{work['tokens']:.4g}", f"{work['flops'] / 1e9:.1f}"] if work else [""] * 3
        share = result["roofline"]["fraction"].get(name)
        times = show((seconds["median"], seconds["min"], seconds["max"]))
        table.add_row(name, times, *sizes, *counts, "" if share is None else f"{share:.0%}")
    console.print(table)
    roof, held = result["roofline"], result["bytes_held"]
    console.print(
        f"{result['samples_per_second']:.3g} samples/s, {result['tokens_per_second']:.4g} response tokens/s; "
        f"passes, tokens and GFLOP are a sample's. Kept: "
        + ", ".join(f"{kind} {size / 2**30:.2f} GiB" for kind, size in held.items())
    )
    console.print(
        f"probes: {roof['flops_per_second'] / 1e9:.0f} GFLOP/s, {roof['bytes_per_second'] / 1e9:.1f} GB/s; "
        f"{_where(result)}"
    )


def _where(result: Result) -> str:
    machine, versions = result["machine"], result["versions"]
    return (
        f"{result['device']}, {machine['cpu']}, {machine['cores']} cores, {result['threads']} threads, load "
        f"{result['load_average']}; torch {versions['torch']}, commit {result['commit']}"
    )


def configurations(runs: Sequence[Result]) -> dict[str, list[Result]]:
    """Group the runs by configuration, in the order of the first round, each sorted by round."""
    groups: dict[str, list[Result]] = {}
    for run in sorted(runs, key=lambda run: run["round"]):
        groups.setdefault(f"{run['algorithm']} {run['layout']}", []).append(run)
    return groups


def compare_to_first(runs: Sequence[Result]) -> dict[str, dict[str, Spread]]:
    """Return each configuration's seconds, peak bytes and their ratios to the first one's run of the same round."""
    groups = configurations(runs)
    first = next(iter(groups.values()))

    def seconds(run: Result) -> float:
        return float(run["seconds_per_sample"]["total"]["median"])

    return {
        name: {
            "seconds_per_sample": spread([seconds(run) for run in group]),
            "seconds_ratio": spread([seconds(run) / seconds(base) for run, base in zip(group, first, strict=True)]),
            "peak_bytes": spread([peak_bytes(run) for run in group]),
            "peak_ratio": spread([peak_bytes(run) / peak_bytes(base) for run, base in zip(group, first, strict=True)]),
            **{
                f"{phase}_seconds": spread([run["seconds_per_sample"][phase]["median"] for run in group])
                for phase in ("generation", "scoring", "training")
            },
        }
        for name, group in groups.items()
    }


def print_comparison(runs: Sequence[Result]) -> None:
    """Print the configurations side by side."""
    console = make_console()
    compared = compare_to_first(runs)
    first, rounds = next(iter(compared)), 1 + max(run["round"] for run in runs)
    table = Table(title=f"medians (smallest-largest) of {rounds} rounds; ratios to {first}, round by round")
    heads = ("configuration", "s / sample", "ratio", "generation", "scoring", "training", "peak GiB", "ratio")
    for name in heads:
        table.add_column(name, justify="left" if name == "configuration" else "right")
    for name, row in compared.items():
        low, middle, high = (x / 2**30 for x in sorted(row["peak_bytes"]))
        table.add_row(
            name,
            show(row["seconds_per_sample"]),
            show(row["seconds_ratio"], 2),
            *(f"{row[f'{phase}_seconds'][0]:.3f}" for phase in ("generation", "scoring", "training")),
            show((middle, low, high), 2),
            show(row["peak_ratio"], 2),
        )
    console.print(table)
    console.print(_where(runs[-1]))


def write_comparison(runs: Sequence[Result], out: str) -> None:
    """Write everything measured, and the comparison, as JSON."""
    content = {"comparison": compare_to_first(runs), "runs": list(runs)}
    file = Path(out)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, file)
