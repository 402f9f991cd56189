"""Summarize a run of this folder: losses of both halves, held-out accuracy with its 95 % interval.

python experiments/hh_rlhf/summarize.py runs/hh_hydra_sft/version_0 --pairs 400
"""

import argparse
import csv
import json
import statistics
from pathlib import Path

from lit_rlhf.evaluation import proportion_ci95


def summarize(folder: Path, pairs: int) -> dict[str, object]:
    """Read ``metrics.csv`` and return mean losses of the run's two halves, and accuracy with Wilson's interval."""
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    result: dict[str, object] = {"steps": max(int(row["step"]) for row in rows) + 1, "held_out_pairs": pairs}
    for name in rows[0]:
        values = [float(row[name]) for row in rows if row[name]]
        if name.startswith("train/"):
            half = len(values) // 2
            means = (statistics.fmean(values[:half]), statistics.fmean(values[half:]))
            result[name] = {"first_half": round(means[0], 4), "second_half": round(means[1], 4)}
        elif name.startswith("val/"):
            result[name] = round(values[-1], 4)
    low, high = proportion_ci95(float(str(result["val/accuracy"])), pairs)
    result["val/accuracy_ci95"] = [round(low, 4), round(high, 4)]
    return result


def main() -> None:
    """Print the summary as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="the run's version folder")
    parser.add_argument("--pairs", type=int, required=True, help="held-out pairs")
    args = parser.parse_args()
    print(json.dumps(summarize(args.folder, args.pairs), indent=1))


if __name__ == "__main__":
    main()
