"""What the quickstart measures and shows: the gold scorer, clocks, tables, curves and the report."""

import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from lit_rlhf.callbacks import IterationProgress
from lit_rlhf.errors import MissingPackageError
from lit_rlhf.evaluation import win_rate
from lit_rlhf.warning_filters import silence_warnings

CONSOLE = Console(soft_wrap=True)
SHOWN = 10
REPORTED_PACKAGES = ("lit-rlhf", "torch", "lightning", "transformers", "peft", "vaderSentiment")


class GoldScorer:
    """vaderSentiment's compound score of a response, -1 to 1.

    Raises:
        MissingPackageError: The ``demo`` extra is not installed.
    """

    def __init__(self) -> None:
        for package in ("vaderSentiment", "matplotlib"):
            if importlib.util.find_spec(package) is None:
                raise MissingPackageError(f"quickstart needs {package}: pip install 'lit-rlhf[demo]'")
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

        self._analyzer = SentimentIntensityAnalyzer()

    def __call__(self, responses: Sequence[str]) -> list[float]:
        """Return one score per response."""
        return [float(self._analyzer.polarity_scores(text)["compound"]) for text in responses]


class StageClock:
    """Seconds of each stage, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time the block."""
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


@dataclass(frozen=True)
class Responses:
    """One policy's responses to the held-out openings.

    Args:
        prompts: The openings.
        responses: One response each.
        kl: Mean over responses of the summed log-ratio to the reference (k1), in nats.
        perplexity: Of the responses under the reference.
    """

    prompts: list[str]
    responses: list[str]
    kl: float
    perplexity: float


def quiet() -> None:
    """Silence warnings that a user of the quickstart can do nothing about."""
    silence_warnings()
    warnings.filterwarnings("ignore", category=UserWarning, module="lightning")
    transformers_logging.disable_progress_bar()
    for name in ("lightning.pytorch", "lightning.fabric", "httpx", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


class LineProgress(Callback):
    """One line every few steps, for output that is not a terminal."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: object) -> None:
        """Print the supervised stage's loss."""
        if not hasattr(pl_module, "rollout_buffer") and trainer.global_step % 25 == 0:
            CONSOLE.print(f"    step {trainer.global_step}: loss {float(trainer.callback_metrics['train/loss']):.3f}")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print an iteration's key numbers."""
        if hasattr(pl_module, "rollout_buffer"):
            shown = {k: float(v) for k, v in trainer.callback_metrics.items()}
            CONSOLE.print(
                f"    iteration {trainer.current_epoch + 1}/{trainer.max_epochs}: "
                f"reward {shown['rollout/score']:.2f}  kl {shown['rollout/kl']:.2f}  "
                f"kl_coef {shown['rollout/kl_coef']:.3f}  value_loss {shown['train/value_loss']:.3f}"
            )


def progress() -> list[Callback]:
    """Return the progress display: a live bar in a terminal, lines elsewhere."""
    return [IterationProgress()] if CONSOLE.is_terminal else [LineProgress()]


def compare(gold: GoldScorer, before: Responses, after: Responses) -> dict[str, Any]:
    """Return the report's comparison of the policy before and after PPO."""
    scores_before, scores_after = gold(before.responses), gold(after.responses)
    wins = win_rate(scores_after, scores_before)
    return {
        "gold_before": statistics.fmean(scores_before),
        "gold_after": statistics.fmean(scores_after),
        "win_rate": wins.rate,
        "win_rate_ci95": list(wins.ci95),
        "held_out_openings": len(scores_after),
        "kl_to_reference": after.kl,
        "reference_perplexity_before": before.perplexity,
        "reference_perplexity_after": after.perplexity,
    }


def sample_rows(gold: GoldScorer, before: Responses, after: Responses) -> list[dict[str, Any]]:
    """Return every held-out opening with both responses and their scores."""
    columns = (
        before.prompts,
        before.responses,
        gold(before.responses),
        after.responses,
        gold(after.responses),
    )
    names = ("prompt", "before", "gold_before", "after", "gold_after")
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def print_tables(result: dict[str, Any], gold: GoldScorer, before: Responses, after: Responses) -> None:
    """Print sample responses and the result."""
    samples = Table(title="Held-out openings", show_lines=True)
    for name in ("opening", "before PPO", "", "after PPO", ""):
        samples.add_column(name, overflow="fold", justify="left" if name else "right")
    for row in sample_rows(gold, before, after)[:SHOWN]:
        cells = [
            row["prompt"],
            row["before"],
            f"{row['gold_before']:+.2f}",
            row["after"],
            f"{row['gold_after']:+.2f}",
        ]
        samples.add_row(*[" ".join(str(cell).split()).replace("[", "\\[") for cell in cells])
    CONSOLE.print(samples)
    table = Table("result", "value")
    low, high = result["win_rate_ci95"]
    for name, value in (
        ("pairwise accuracy, held-out pairs", f"{result['pairwise_accuracy']:.3f}"),
        ("gold score before PPO", f"{result['gold_before']:+.3f}"),
        ("gold score after PPO", f"{result['gold_after']:+.3f}"),
        (
            "win rate, after against before",
            f"{result['win_rate']:.3f}  (95 % interval {low:.3f} to {high:.3f})",
        ),
        (
            "KL to the reference",
            f"{result['kl_to_reference']:.2f} nats per response (target {result['kl_target']:g})",
        ),
        (
            "perplexity under the reference",
            f"{result['reference_perplexity_before']:.1f} -> {result['reference_perplexity_after']:.1f}",
        ),
        ("PPO samples per second", f"{result['samples_per_second']:.2f}"),
        ("peak memory", f"{result['peak_memory_bytes'] / 2**30:.2f} GiB"),
        ("seconds", f"{sum(result['seconds'].values()):.0f}"),
    ):
        table.add_row(name, value)
    CONSOLE.print(table)


def plot_curves(rows: Sequence[dict[str, float]], kl_target: float, path: Path) -> None:
    """Draw reward, gold score and KL per iteration."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    iterations = [row["iteration"] for row in rows]
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), constrained_layout=True)
    panels = (
        ("score", "reward (learned)"),
        ("gold", "gold score (vaderSentiment)"),
        ("kl", "KL to the reference [nats]"),
    )
    for axis, (key, title) in zip(axes, panels, strict=True):
        axis.plot(iterations, [row[key] for row in rows], marker="o", markersize=3, color="tab:blue")
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("iteration")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    axes[2].axhline(kl_target, color="grey", linestyle="--", linewidth=1, label="target")
    axes[2].legend(frameon=False, fontsize=8)
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, dpi=150, format="png")
    plt.close(figure)
    os.replace(partial, path)


def write_json(content: object, path: Path) -> None:
    """Write JSON under a temporary name, then rename."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def peak_memory_bytes() -> int:
    """Return the peak of allocated GPU memory where there is a GPU, else of resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def versions() -> dict[str, str]:
    """Return the versions that produced a report."""
    found = {name: importlib.metadata.version(name) for name in REPORTED_PACKAGES}
    return {"python": platform.python_version(), **found}
