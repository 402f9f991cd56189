"""Trains for many iterations and watches resident memory and CPU seconds per iteration: neither may grow.

    python experiments/reliability/soak.py --out experiments/reliability/results/soak.json

Each run (algorithm-layout, on ``random:tiny``, with metrics, samples and a checkpoint every iteration) has its own
process. Growth compares the mean of the last tenth of the iterations with the tenth after the warm-up (the first
fifth); ``drift`` compares the medians of their CPU seconds.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

import lit_rlhf
from lit_rlhf import AdaptiveKL, FunctionReward, LoraArgs, PromptData, Sampling

RUNS = ("PPO-hydra", "PPO-full", "ReMax-hydra")
LIMIT = 0.02


class Watch(L.Callback):
    """Records resident bytes and CPU seconds at the end of each iteration."""

    def __init__(self) -> None:
        self.resident: list[int] = []
        self.times: list[float] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record both."""
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.resident.append(pages * os.sysconf("SC_PAGE_SIZE"))
        self.times.append(time.process_time())


def count_e(prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
    """How often the letter e occurs."""
    return [response.count("e") / 10 for response in responses]


def soak(name: str, iterations: int, folder: str) -> dict[str, Any]:
    """Train, and return what was measured."""
    algorithm, layout = name.split("-")
    torch.set_num_threads(1)
    openings = [f"The {thing} of the {film} was" for thing in ("plot", "cast", "end") for film in ("film", "show")]
    prompts = Path(folder) / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in openings))
    kind = getattr(lit_rlhf, algorithm)
    module = kind(
        model="random:tiny", layout=layout, lora=LoraArgs(r=4), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-5),
        reward=FunctionReward(count_e, timeout=60.0), sampling=Sampling(max_new_tokens=8), rollout_size=4,
        minibatch_size=2, reward_scaling="running", kl=AdaptiveKL(0.1, 1.0, 1000.0), seed=0,
    )  # fmt: skip
    watch = Watch()
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=iterations, logger=CSVLogger(folder), num_sanity_val_steps=0,
        callbacks=[watch, ModelCheckpoint(folder, filename="last", enable_version_counter=False)],
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(module, PromptData(train=str(prompts), validation_size=0))
    return {"run": name, "iterations": iterations, **summary(watch.resident, watch.times)}


def summary(resident: list[int], times: list[float]) -> dict[str, float]:
    """Return growth and drift of a series: the last tenth against the tenth after the first fifth."""
    seconds = [after - before for before, after in itertools.pairwise(times)]
    begin, tenth = len(resident) // 5, max(1, len(resident) // 10)
    first, last = (statistics.mean(part) for part in (resident[begin : begin + tenth], resident[-tenth:]))
    early, late = (statistics.median(part) for part in (seconds[begin : begin + tenth], seconds[-tenth:]))
    return {
        "resident_mib": round(first / 2**20, 2), "resident_mib_end": round(last / 2**20, 2),
        "growth": round(last / first - 1, 5), "seconds": round(early, 4), "seconds_end": round(late, 4),
        "drift": round(late / early - 1, 3),
    }  # fmt: skip


def main() -> None:
    """Run them one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--iterations", type=int, default=500)
    parser.add_argument("--runs", default=",".join(RUNS), help="comma-separated algorithm-layout")
    args = parser.parse_args()
    rows = []
    for name in args.runs.split(","):
        with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("spawn").Pool(1) as pool:
            rows.append(pool.apply(soak, (name, args.iterations, folder)))
        print(rows[-1])
    here = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
    command = " ".join(["python", "experiments/reliability/soak.py", *sys.argv[1:]])
    content = {"command": command, "commit": commit.stdout.strip(), "torch": torch.__version__, "rows": rows}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(content, indent=1) + "\n")
    raise SystemExit(any(row["growth"] >= LIMIT for row in rows))


if __name__ == "__main__":
    main()
