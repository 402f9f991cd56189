"""What the results study trains: the cells, the stages they start from, and one run of one cell."""

import csv
import statistics
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger

from lit_rlhf import algorithms
from lit_rlhf.algorithms import DPO, SFT, BackboneModule, HydraSFT, OnPolicyModule, RewardModel
from lit_rlhf.backbone import LAYOUTS, LoraArgs
from lit_rlhf.commands import quickstart_report as report
from lit_rlhf.commands.quickstart_pipeline import respond
from lit_rlhf.data import InstructionData, PreferenceData, PromptData
from lit_rlhf.errors import ConfigError
from lit_rlhf.planner.live import LiveBytes
from lit_rlhf.rollout import AdaptiveKL, Sampling

WITH_CRITIC = ("PPO", "Reinforce")
CRITIC_FREE = ("ReMax", "RLOO", "GRPO", "ReinforcePlusPlus")
STAGES = ("sft", "reward_full", "reward_lora", "hydra_sft")
MODEL = "random:tiny"
SAMPLING = Sampling(max_new_tokens=24)
STAGE_STEPS, STAGE_BATCH = 300, 16
ROLLOUT_SIZE, MINIBATCH_SIZE = 64, 32
STAGE_LR, FULL_LR, LORA_LR = 3e-3, 1e-3, 3e-3
LORA = LoraArgs(r=16, alpha=32)
PHASES = ("generation", "scoring", "training")


@dataclass(frozen=True, eq=False)
class Cell:
    """One row of the table.

    Args:
        algorithm: Class name.
        layout: Layout name.
        variant: What differs from the algorithm's defaults, in words; empty for nothing.
        settings: The arguments that differ.
    """

    algorithm: str
    layout: str
    variant: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the cell, also of its files."""
        return "-".join(part.replace(" ", "_") for part in (self.algorithm, self.layout, self.variant) if part)

    @property
    def stages(self) -> dict[str, str]:
        """Which stage gives each checkpoint argument."""
        if self.layout in ("hydra", "j_hydra"):
            return {"policy_checkpoint": "hydra_sft"}
        if self.algorithm == "DPO":
            return {"policy_checkpoint": "sft"}
        reward = "reward_lora" if self.layout == "pe" else "reward_full"
        return {"policy_checkpoint": "sft", "reward_checkpoint": reward}


# The stability options of j_hydra and the critic's own rank, each against the plain cells.
VARIANTS = [
    Cell("PPO", "j_hydra", "value gradient 0", {"value_gradient": 0.0}),
    Cell("PPO", "j_hydra", "value gradient 0.1", {"value_gradient": 0.1}),
    Cell("PPO", "j_hydra", "value warm-up", {"critic_warmup_iterations": 2}),
    Cell("PPO", "j_hydra", "balanced losses", {"balance_losses": True}),
    Cell("PPO", "hydra", "critic rank 4", {"lora": LoraArgs(r=16, alpha=32, ranks={"critic": 4})}),
    Cell("DPO", "full"),
    Cell("DPO", "hydra"),
]


def make_cells(names: list[str] | None, layouts: list[str] | None, variants: bool) -> list[Cell]:
    """Return the chosen cells. Critic-free algorithms leave ``j_hydra`` out: without a critic it is ``hydra``.

    Raises:
        ConfigError: An algorithm or layout is unknown.
    """
    known = {"algorithms": (*WITH_CRITIC, *CRITIC_FREE), "layouts": tuple(LAYOUTS)}
    for kind, given in (("algorithms", names), ("layouts", layouts)):
        for name in given or ():
            if name not in known[kind]:
                raise ConfigError(f"{kind}: {name!r} is not one of {', '.join(known[kind])}")
    cells = [
        Cell(name, layout)
        for name in names or known["algorithms"]
        for layout in layouts or known["layouts"]
        if not (layout == "j_hydra" and name in CRITIC_FREE)
    ]
    return cells + (VARIANTS if variants else [])


def adamw(lr: float) -> Callable[..., torch.optim.Optimizer]:
    """Return the optimizer of every run here."""
    return lambda parameters: torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)


def make_trainer(folder: Path, **kwargs: Any) -> L.Trainer:
    """Return a silent trainer on one device that logs to ``metrics.csv`` in the folder."""
    return L.Trainer(
        devices=1, logger=CSVLogger(folder, name="", version=""), enable_checkpointing=False, num_sanity_val_steps=0,
        enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=1.0, log_every_n_steps=1, **kwargs,
    )  # fmt: skip


def train_stage(stage: str, seed: int, folder: Path, steps: int) -> Path:
    """Train one stage of a seed unless its checkpoint is there; return the checkpoint."""
    checkpoint = folder / stage / "last.ckpt"
    if checkpoint.is_file():
        return checkpoint
    L.seed_everything(seed, verbose=False)
    schedule: dict[str, Any] = {
        "lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)
    }
    module: BackboneModule
    if stage == "sft":
        module = SFT(model=MODEL, optimizer=adamw(STAGE_LR), **schedule)
    elif stage == "hydra_sft":
        module = HydraSFT(model=MODEL, optimizer=adamw(STAGE_LR), **schedule)
    else:
        policy = str(train_stage("sft", seed, folder, steps))
        lora, lr = (LORA, LORA_LR) if stage == "reward_lora" else (None, FULL_LR)
        module = RewardModel(model=MODEL, optimizer=adamw(lr), lora=lora, policy_checkpoint=policy, **schedule)
    kind = InstructionData if stage == "sft" else PreferenceData
    trainer = make_trainer(folder / stage, max_epochs=-1, max_steps=steps, limit_val_batches=0)
    trainer.fit(module, stage_data(kind, folder.parents[1] / "task"))
    partial = checkpoint.with_suffix(".partial")
    trainer.save_checkpoint(partial, weights_only=True)
    partial.rename(checkpoint)
    return checkpoint


def stage_data(kind: type[Any], task: Path) -> Any:
    """Return the task's preference pairs as a module of this kind."""
    return kind(train=str(task / "pairs.jsonl"), validation_size=160, batch_size=STAGE_BATCH)


def prompt_data(task: Path) -> PromptData:
    """Return the task's openings."""
    return PromptData(
        train=str(task / "prompts_train.jsonl"), validation=str(task / "prompts_heldout.jsonl"), batch_size=160
    )


def make_module(cell: Cell, seed: int, checkpoints: dict[str, str]) -> BackboneModule:
    """Return the untrained module of a cell."""
    lr = FULL_LR if cell.layout == "full" else LORA_LR
    common: dict[str, Any] = {
        "model": MODEL, "optimizer": adamw(lr), "layout": cell.layout, "lora": LORA,
        **checkpoints,
    }  # fmt: skip
    if cell.algorithm == "DPO":
        return DPO(**{**common, "optimizer": adamw(lr / 10), **cell.settings})
    rollout: dict[str, Any] = {
        "sampling": SAMPLING, "rollout_size": ROLLOUT_SIZE, "minibatch_size": MINIBATCH_SIZE,
        "kl": AdaptiveKL(0.1, target=6.0, horizon=128.0), "reward_scaling": "running",
        "seed": seed,
    }  # fmt: skip
    return getattr(algorithms, cell.algorithm)(**{**common, **rollout, **cell.settings})


def run_cell(cell: Cell, seed: int, folder: Path, iterations: int, steps: int) -> dict[str, Any]:
    """Train one cell with one seed and judge it on the held-out openings.

    Args:
        cell: The cell.
        seed: Seed of stages, training and sampling.
        folder: Holds ``task`` and ``stages/seedN``, and receives the run's metrics.
        iterations: On-policy iterations.
        steps: Optimizer steps of the stages, and of DPO.

    Returns:
        Gold scores before and after, win rate, KL, seconds per sample by phase, peak bytes of tensors.
    """
    report.quiet()
    gold = report.GoldScorer()
    stages = folder / "stages" / f"seed{seed}"
    checkpoints = {argument: str(train_stage(stage, seed, stages, steps)) for argument, stage in cell.stages.items()}
    L.seed_everything(seed, verbose=False)
    module = make_module(cell, seed, checkpoints)
    prompts = prompt_data(folder / "task")
    module.configure_model()
    prompts.tokenizer = module.tokenizer
    prompts.setup("fit")
    before = respond(module, prompts, SAMPLING, len(prompts.val_dataset or []), seed)
    logs = folder / "runs" / f"{cell.name}-seed{seed}"
    if isinstance(module, OnPolicyModule):
        trainer = make_trainer(logs, max_epochs=iterations, limit_val_batches=0, **accumulation(module))
        trainer.fit(module, prompts)
    else:
        data = stage_data(PreferenceData, folder / "task")
        make_trainer(logs, max_epochs=-1, max_steps=steps, limit_val_batches=0).fit(module, data)
    after = respond(module, prompts, SAMPLING, len(prompts.val_dataset or []), seed)
    compared = report.compare(gold, before, after)
    return {
        "cell": cell.name,
        "seed": seed,
        "commit": code_version(),
        **compared,
        "seconds_per_sample": seconds_per_sample(logs),
        "peak_bytes": peak_bytes(cell, seed, checkpoints, folder / "task"),
    }


def accumulation(module: OnPolicyModule) -> dict[str, Any]:
    """Return the trainer's setting by which algorithms without a policy ratio update once an iteration."""
    return {"accumulate_grad_batches": len(module.rollout_buffer)} if module.one_update else {}


def code_version() -> str | None:
    """Return the commit of a clone, with ``-dirty`` where files differ from it; None outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def seconds_per_sample(logs: Path) -> dict[str, float]:
    """Return the median seconds of each phase per response, the first iteration left out; empty for DPO."""
    with (logs / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("time/training")][1:]
    return {
        name: statistics.median(float(row[f"time/{name}"]) for row in rows) / ROLLOUT_SIZE for name in PHASES if rows
    }


def peak_bytes(cell: Cell, seed: int, checkpoints: dict[str, str], task: Path) -> int:
    """Return the peak bytes of tensors over two iterations (or steps): weights, gradients, optimizer, activations."""
    module = make_module(cell, seed, checkpoints)
    module.configure_model()
    weights = {p.untyped_storage()._cdata: p.untyped_storage().nbytes() for p in module.backbone.parameters()}
    data = prompt_data(task) if isinstance(module, OnPolicyModule) else stage_data(PreferenceData, task)
    limits: dict[str, Any] = {"max_epochs": -1, "max_steps": 2}
    if isinstance(module, OnPolicyModule):
        limits = {"max_epochs": 2, **accumulation(module)}
    trainer = L.Trainer(
        devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, limit_val_batches=0,
        enable_model_summary=False, gradient_clip_val=1.0, num_sanity_val_steps=0, **limits,
    )  # fmt: skip
    with LiveBytes(known=module.backbone.parameters()) as live:
        trainer.fit(module, data)
    return sum(weights.values()) + live.peak("")
