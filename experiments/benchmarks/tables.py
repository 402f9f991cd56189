"""Turn the committed measurements into tables and a plot.

    python experiments/benchmarks/tables.py

Reads ``compare.json``, ``peer.json`` and ``fixed_budget.json`` in ``experiments/benchmarks/results`` and writes
``performance.md`` and ``performance.png`` beside them.
"""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from peer import TARGETS

from lit_rlhf.bench.report import configurations, show

RESULTS = Path(__file__).parent / "results"
GIB = 2**30


def gib(spread: list[float]) -> str:
    """Return bytes as ``median (smallest-largest)`` in GiB."""
    return show(tuple(x / GIB for x in spread), 2)  # type: ignore[arg-type]


def where(content: dict[str, Any], threads: int, loads: list[float]) -> str:
    """Say by which command, on which machine and at which commit."""
    machine = content["machine"]
    return (
        f"`{content['command']}`, {machine['cpu']}, {machine['cores']} cores, {threads} threads, load averages "
        f"{min(loads):.1f} to {max(loads):.1f}, commit {str(content['commit'])[:12]}."
    )


def peer_table(content: dict[str, Any]) -> list[str]:
    """Against TRL: seconds and peak memory as shares of its own."""
    against, summary = next(iter(content["comparisons"].items()))
    lines = [
        "| | s / sample | share of TRL's seconds | goal | peak RSS, GiB | share of TRL's peak | goal |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in summary.items():
        goals = [f"{x:.2f}" for x in TARGETS[name]] if name in TARGETS else ["", ""]
        label = name.replace("trl:full", "TRL PPO, LoRA policy, full value model")
        label = label.replace("trl:lora", "TRL PPO, LoRA policy, LoRA value model").replace(":", " on ")
        cells = [show(row["seconds"]), show(row["seconds_ratio"], 2), goals[0], gib(row["peak"])]
        lines.append(f"| {label} | {' | '.join(cells)} | {show(row['peak_ratio'], 2)} | {goals[1]} |")
    runs = [run for rows in content["runs"].values() for run in rows]
    threads = next(r["full"]["threads"] for name, rows in content["runs"].items() if "trl" not in name for r in rows)
    return [
        *lines,
        "",
        f"Ratios are to {against} of the same round. " + where(content, threads, [r["load_average"] for r in runs]),
    ]


def layout_table(content: dict[str, Any]) -> list[str]:
    """Layouts and algorithms against each other."""
    groups = configurations(content["runs"])
    lines = [
        "| | s / sample | generation | scoring | training | kept, GiB | peak RSS, GiB | of roofline |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in content["comparison"].items():
        first = groups[name][0]
        phases = [f"{row[f'{phase}_seconds'][0]:.3f}" for phase in ("generation", "scoring", "training")]
        held = sum(size for kind, size in first["bytes_held"].items() if kind != "rollout") / GIB
        cells = [show(row["seconds_per_sample"]), *phases, f"{held:.2f}", gib(row["peak_bytes"])]
        lines.append(f"| {name} | {' | '.join(cells)} | {first['roofline']['fraction']['total']:.0%} |")
    runs = content["runs"]
    return [
        *lines,
        "",
        "Kept: weights, gradients and Adam's moments. "
        + where(runs[0], runs[0]["threads"], [r["load_average"] for r in runs]),
    ]


def budget_table(content: dict[str, Any]) -> list[str]:
    """Seconds a sample at the largest batch of a budget."""
    first = next(iter(content["summary"])).replace(":", " on ")
    lines = [
        f"| | largest batch in {content['budget']} | s / sample | ratio to {first} | peak RSS, GiB |",
        "|---|---|---|---|---|",
    ]
    for name, row in content["summary"].items():
        cells = [str(row["batch"]), show(row["seconds"]), show(row["ratio"], 2), gib(row["peak"])]
        lines.append(f"| {name.replace(':', ' on ')} | {' | '.join(cells)} |")
    runs = [run for rows in content["runs"].values() for run in rows]
    return [*lines, "", where(content, runs[0]["threads"], [r["load_average"] for r in runs])]


def plot(compare: dict[str, Any], peer: dict[str, Any]) -> None:
    """Draw seconds by phase and peak memory of every configuration, TRL's beside them."""
    rows = compare["comparison"]
    summary = next(iter(peer["comparisons"].values()))
    trl = {name: row for name, row in summary.items() if name.startswith("trl:")}
    names = [*rows, *(name.replace("trl:", "TRL, value model ") for name in trl)]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 0.36 * len(names) + 1.2), sharey=True)
    start = [0.0] * len(rows)
    for phase in ("generation", "scoring", "training"):
        width = [row[f"{phase}_seconds"][0] for row in rows.values()]
        left.barh(range(len(rows)), width, left=start, label=phase)
        start = [a + b for a, b in zip(start, width, strict=True)]
    places = range(len(rows), len(names))
    left.barh(places, [row["seconds"][0] for row in trl.values()], color="grey", label="all phases")
    right.barh(range(len(rows)), [row["peak_bytes"][0] / GIB for row in rows.values()], color="tab:purple")
    right.barh(places, [row["peak"][0] / GIB for row in trl.values()], color="grey")
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.set_xlabel("seconds a sample (median)")
    right.set_xlabel("peak resident memory, GiB (median)")
    left.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(RESULTS / "performance.png", dpi=110)


def main() -> None:
    content = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in ("compare", "peer", "fixed_budget")}
    parts = [
        [
            "# Performance",
            "",
            "SmolLM2-135M in float32, prompts of 8 tokens, responses of 32, 16 a batch, one inner epoch, LoRA r 16.",
        ],
        ["## Against TRL's PPOTrainer", "", *peer_table(content["peer"])],
        ["## Layouts and algorithms", "", *layout_table(content["compare"])],
        ["## The largest batch within a memory budget", "", *budget_table(content["fixed_budget"])],
        ["![Seconds a sample and peak memory](performance.png)"],
    ]
    (RESULTS / "performance.md").write_text("\n\n".join("\n".join(part) for part in parts) + "\n")
    plot(content["compare"], content["peer"])
    print((RESULTS / "performance.md").read_text())


if __name__ == "__main__":
    main()
