"""The runs of kill_matrix.py: what they train, and the callback that shows their progress."""

import json
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lit_rlhf.callbacks import PhaseListener

PHASES = ("building", "generation", "scoring", "training", "saving", "between iterations", "evaluation")
ON_POLICY = {"PPO", "Reinforce", "ReMax", "RLOO", "GRPO", "ReinforcePlusPlus"}
WATCH = "LIT_RLHF_KILL_WATCH"
ITERATIONS = 12


@dataclass(frozen=True)
class Run:
    """A cell of the matrix."""

    algorithm: str
    layout: str | None
    strategy: str

    @property
    def name(self) -> str:
        """The cell in a table, and as a folder."""
        return "-".join(part for part in (self.algorithm, self.layout, self.strategy) if part)

    @property
    def processes(self) -> int:
        """Processes that train it."""
        return 1 if self.strategy == "single" else 2


MATRIX = [
    Run("PPO", "hydra", "single"),
    Run("PPO", "hydra", "ddp"),
    Run("PPO", "hydra", "fsdp2"),
    Run("PPO", "full", "single"),
    Run("PPO", "j_hydra", "ddp"),
    Run("PPO", "pe", "fsdp2"),
    Run("Reinforce", "lora", "single"),
    Run("ReMax", "dynamic_lora", "single"),
    Run("ReMax", "hydra", "ddp"),
    Run("RLOO", "pe", "single"),
    Run("RLOO", "full", "fsdp2"),
    Run("PPO", "hydra", "fsdp2_folder"),
    Run("GRPO", "j_hydra", "single"),
    Run("GRPO", "dynamic_lora", "ddp"),
    Run("ReinforcePlusPlus", "hydra", "single"),
    Run("DPO", "hydra", "single"),
    Run("DPO", "full", "ddp"),
    Run("HydraSFT", None, "single"),
    Run("HydraSFT", None, "fsdp2"),
    Run("RewardModel", None, "ddp"),
]
SMALL = [
    Run("PPO", "hydra", "single"),
    Run("PPO", "hydra", "ddp"),
    Run("GRPO", "full", "fsdp2"),
    Run("PPO", "hydra", "fsdp2_folder"),
]
FOLDER = {"class_path": "lit_rlhf.strategies.FSDP2Strategy", "init_args": {"save_distributed_checkpoint": True}}


class Watch(PhaseListener):
    """Shows the iteration and phase of rank 0 to the killing process, and keeps every iteration's metrics."""

    def __init__(self) -> None:
        self.place: mmap.mmap | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Open the shared page."""
        if trainer.is_global_zero:
            with Path(os.environ[WATCH]).open("r+b") as file:
                self.place = mmap.mmap(file.fileno(), 2)

    def _mark(self, trainer: Trainer, phase: str) -> None:
        if self.place is not None:
            self.place[:2] = bytes([trainer.current_epoch, PHASES.index(phase)])

    def on_phase_start(self, trainer: Trainer, pl_module: LightningModule, phase: str) -> None:
        """Show it."""
        self._mark(trainer, phase)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Supervised stages have no phases of their own."""
        self._mark(trainer, "training")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """The file is written next."""
        self._mark(trainer, "saving")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the metrics, before the checkpoint callback, which runs last."""
        self._mark(trainer, "between iterations")
        # On every rank, since reading them may sum over all.
        values = {name: repr(float(value)) for name, value in trainer.callback_metrics.items()}
        if trainer.is_global_zero:
            row = {"epoch": trainer.current_epoch, **{n: v for n, v in values.items() if not n.startswith("time/")}}
            with Path("metrics.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
                file.flush()
                os.fsync(file.fileno())


def settings(run: Run, stages: Path, seed: int) -> dict[str, Any]:
    """Return the configuration of a run."""
    arguments: dict[str, Any] = {
        "model": "random:tiny",
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.003}},
        "lr_scheduler": {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 3, "gamma": 0.8}},
    }
    if run.layout is None or run.layout != "full":
        arguments["lora"] = {"r": 4}
    if run.layout is not None:
        arguments |= {"layout": run.layout, "policy_checkpoint": str(stages / "HydraSFT" / "last.ckpt")}
    data = {"class_path": "PreferenceData", "init_args": {"train": str(stages / "pairs.jsonl"), "batch_size": 4}}
    if run.algorithm in ON_POLICY:
        data = {"class_path": "PromptData", "init_args": {"train": str(stages / "prompts.jsonl")}}
        if run.layout in ("full", "lora", "dynamic_lora", "pe"):
            arguments["reward_checkpoint"] = str(stages / "RewardModel" / "last.ckpt")
        groups = {"samples_per_prompt": 4} if run.algorithm in ("RLOO", "GRPO") else {}
        arguments |= {
            "rollout_size": 8, "minibatch_size": 4, "sampling": {"max_new_tokens": 8}, "reward_scaling": "running",
            "kl": {"class_path": "AdaptiveKL", "init_args": {"coefficient": 0.1, "target": 1.0, "horizon": 60}},
            **groups,
        }  # fmt: skip
    data["init_args"]["validation_size"] = 4  # type: ignore[index]
    # On-policy runs can be saved at an iteration's end only, supervised ones after any step.
    when = {} if run.algorithm in ON_POLICY else {"every_n_train_steps": 1}
    trainer: dict[str, Any] = {
        "accelerator": "cpu", "devices": run.processes, "max_epochs": ITERATIONS, "enable_progress_bar": False,
        "enable_model_summary": False, "logger": False, "callbacks": [
            {"class_path": "kill_runs.Watch"},
            {"class_path": "ModelCheckpoint", "init_args": {"dirpath": ".", "filename": "last",
                                                            "enable_version_counter": False, **when}},
        ],
    }  # fmt: skip
    if run.strategy != "single":
        trainer["strategy"] = FOLDER if run.strategy == "fsdp2_folder" else run.strategy
    model = {"class_path": run.algorithm, "init_args": arguments}
    return {"seed_everything": seed, "trainer": trainer, "model": model, "data": data}
