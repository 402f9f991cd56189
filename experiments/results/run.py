"""Algorithms x layouts on a small task over several seeds, each compared with its SFT policy; one table, one plot.

    python experiments/results/run.py --out experiments/results --seeds 5 --jobs 2

A stopped run continues where it was; its settings must then be the same. Needs the ``demo`` extra.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from cells import ROLLOUT_SIZE, STAGE_STEPS, STAGES, Cell, make_cells, run_cell, train_stage
from task import write_task

from lit_rlhf.commands import quickstart_report as report
from lit_rlhf.errors import ConfigError, LitRLHFError
from lit_rlhf.evaluation import mean_ci95

COLUMNS = (
    "algorithm", "layout", "variant", "gold SFT", "gold after", "gain (95 % interval)", "win rate", "KL", "ms / sample",
    "peak MiB",
)  # fmt: skip


def run_results(
    out: str, algorithms: list[str] | None, layouts: list[str] | None, variants: bool, seeds: int, iterations: int,
    jobs: int,
) -> None:  # fmt: skip
    """Run everything whose result is missing.

    Args:
        out: Output folder.
        algorithms: On-policy algorithms; None takes all.
        layouts: Layouts; None takes all.
        variants: Also DPO, j_hydra's stability options and hydra with a critic adapter of small rank.
        seeds: Seeds of each cell; every seed trains its own SFT, reward and Hydra-SFT stages.
        iterations: Iterations of each on-policy run.
        jobs: Runs at the same time; seconds per sample mean little above 1.

    Raises:
        ConfigError: An argument is out of range, or the folder holds runs made with other settings.
    """
    if seeds < 2 or iterations < 2 or jobs < 1:
        raise ConfigError(f"needs seeds >= 2, iterations >= 2 and jobs >= 1; got {seeds}, {iterations}, {jobs}")
    cells, folder = make_cells(algorithms, layouts, variants), Path(out)
    steps = STAGE_STEPS
    settings = {"iterations": iterations, "stage_steps": steps, "rollout_size": ROLLOUT_SIZE}
    check_settings(folder, settings)
    pending = [(c, s) for s in range(seeds) for c in cells if not file_of(folder, c, s).is_file()]
    report.CONSOLE.print(f"{len(cells)} cells x {seeds} seeds, {len(pending)} runs to go, {jobs} at a time")
    write_task(folder / "task", report.GoldScorer())
    # Fresh processes: one run's memory and warnings do not reach the next.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"), initializer=one_thread) as pool:
        stages = [pool.submit(train_stages, seed, folder, steps) for seed in sorted({seed for _, seed in pending})]
        for stage in stages:
            stage.result()
        runs = {pool.submit(run_cell, cell, seed, folder, iterations, steps): (cell, seed) for cell, seed in pending}
        for done, run in enumerate(as_completed(runs), start=1):
            cell, seed = runs[run]
            result = run.result()
            report.write_json(result, file_of(folder, cell, seed))
            gain = result["gold_after"] - result["gold_before"]
            report.CONSOLE.print(f"{done}/{len(pending)} {cell.name} seed {seed}: gold {gain:+.3f}")
    write_results(folder, cells, seeds, settings)


def one_thread() -> None:
    """Keep the runs of a small machine from spinning against each other."""
    import torch

    torch.set_num_threads(1)


def train_stages(seed: int, folder: Path, steps: int) -> None:
    """Train the stages of one seed."""
    report.quiet()
    for stage in STAGES:
        train_stage(stage, seed, folder / "stages" / f"seed{seed}", steps)


def file_of(folder: Path, cell: Cell, seed: int) -> Path:
    """Return the file of one run's result."""
    return folder / "runs" / f"{cell.name}-seed{seed}.json"


def check_settings(folder: Path, settings: dict[str, int]) -> None:
    """Refuse to mix runs of different settings in one folder."""
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    file = folder / "settings.json"
    if file.is_file() and json.loads(file.read_text()) != settings:
        raise ConfigError(f"{folder} holds runs made with {file.read_text().strip()}; choose another --out")
    report.write_json(settings, file)


def summarize(cell: Cell, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return one row: means over seeds, and the 95 % interval of the gain over the SFT policy."""
    mean = {
        key: statistics.fmean(run[key] for run in runs)
        for key in ("gold_before", "gold_after", "win_rate", "kl_to_reference", "peak_bytes")
    }
    gains = [run["gold_after"] - run["gold_before"] for run in runs]
    gain = mean_ci95(gains)
    seconds = [sum(run["seconds_per_sample"].values()) for run in runs]
    return {
        "algorithm": cell.algorithm, "layout": cell.layout, "variant": cell.variant, "seeds": len(runs), **mean,
        "gain": gain.mean, "gain_ci95": list(gain.ci95), "gains": gains,
        "gold_after_ci95": list(mean_ci95([run["gold_after"] for run in runs]).ci95),
        "seconds_per_sample": statistics.fmean(seconds),
    }  # fmt: skip


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for row in rows:
        low, high = row["gain_ci95"]
        cells = [
            row["algorithm"], f"`{row['layout']}`", row["variant"], f"{row['gold_before']:+.3f}",
            f"{row['gold_after']:+.3f}", f"{row['gain']:+.3f} ({low:+.3f} to {high:+.3f})", f"{row['win_rate']:.2f}",
            f"{row['kl_to_reference']:.1f}",
            f"{1000 * row['seconds_per_sample']:.1f}" if row["seconds_per_sample"] else "",
            f"{row['peak_bytes'] / 2**20:.0f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def write_results(folder: Path, cells: Sequence[Cell], seeds: int, settings: dict[str, int]) -> None:
    """Write ``results.json``, ``results.md`` and ``results.png``."""
    runs = {cell: [json.loads(file_of(folder, cell, s).read_text()) for s in range(seeds)] for cell in cells}
    rows = [summarize(cell, of_cell) for cell, of_cell in runs.items()]
    commits = sorted({str(run["commit"]) for of_cell in runs.values() for run in of_cell})
    content = {
        "settings": settings, "seeds": seeds, "commits": commits, "versions": report.versions(),
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}", "rows": rows,
    }  # fmt: skip
    report.write_json(content, folder / "results.json")
    partial = folder / "results.md.partial"
    partial.write_text(table(rows), encoding="utf-8")
    partial.replace(folder / "results.md")
    plot(rows, folder / "results.png")
    report.CONSOLE.print(table(rows))
    report.CONSOLE.print(f"wrote results.json, results.md and results.png into {folder}")


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw each cell's gain over its SFT policy with its interval, a color per layout."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    layouts = list(dict.fromkeys(row["layout"] for row in rows))
    colors = dict(zip(layouts, plt.get_cmap("tab10").colors, strict=False))  # type: ignore[attr-defined]
    figure, axis = plt.subplots(figsize=(8, 0.22 * len(rows) + 1.2), constrained_layout=True)
    for position, row in enumerate(rows):
        low, high = row["gain_ci95"]
        axis.plot([low, high], [position, position], color=colors[row["layout"]], linewidth=1.5)
        axis.plot(row["gain"], position, "o", markersize=4, color=colors[row["layout"]])
    names = [" ".join(part for part in (r["algorithm"], r["layout"], r["variant"]) if part) for r in rows]
    axis.set_yticks(range(len(rows)), names, fontsize=7)
    axis.invert_yaxis()
    axis.axvline(0.0, color="grey", linewidth=1)
    axis.set_xlabel("gold score gained over the SFT policy (mean and 95 % interval over seeds)")
    axis.grid(axis="x", alpha=0.3)
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, dpi=150, format="png")
    plt.close(figure)
    os.replace(partial, path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="results", help="output folder")
    parser.add_argument("--algorithms", nargs="+", help="PPO Reinforce ReMax RLOO GRPO ReinforcePlusPlus; default all")
    parser.add_argument("--layouts", nargs="+", help="default all")
    parser.add_argument(
        "--variants", action=argparse.BooleanOptionalAction, default=True,
        help="also DPO, j_hydra's stability options and hydra with a critic adapter of small rank",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, default=5, help="of each cell, stages included")
    parser.add_argument("--iterations", type=int, default=16, help="of each on-policy run")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    try:
        run_results(**vars(parser.parse_args(argv)))
    except LitRLHFError as error:
        print(f"run.py: {error}", file=sys.stderr)
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
