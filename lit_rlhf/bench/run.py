"""One task of ``lit-rlhf bench`` in its own process: write untrained stages, or train and measure."""

import gc
import importlib.metadata
import json
import platform
import statistics
import sys
import time
import warnings
from collections import defaultdict
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.optim.optimizer import ParamsT
from transformers import PreTrainedTokenizerBase

from lit_rlhf import algorithms
from lit_rlhf.algorithms import HydraSFT, OnPolicyModule, RewardModel
from lit_rlhf.backbone import LoraArgs, check_length, context_length, find_layout, read_config
from lit_rlhf.bench import Workload
from lit_rlhf.bench.probe import WorkCounter, decode_bytes, probe, roofline
from lit_rlhf.bench.process import MARK
from lit_rlhf.errors import ConfigError, LitRLHFError, message_suffices
from lit_rlhf.metrics.memory import CudaMeter, HostMeter, Meter, bytes_by_kind, merge_peaks
from lit_rlhf.rollout import PromptBatch, RolloutBuffer, Sampling
from lit_rlhf.rollout.phases import PhaseListener
from lit_rlhf.rollout.policy import has_backbone
from lit_rlhf.warning_filters import silence_warnings

PHASES = ("generation", "scoring", "training")
PACKAGES = ("lit-rlhf", "torch", "lightning", "transformers", "peft")
REWARD, HYDRA = "reward.ckpt", "hydra_sft.ckpt"


def adamw(parameters: ParamsT) -> torch.optim.Optimizer:
    """Return the optimizer of every measurement."""
    return torch.optim.AdamW(parameters, lr=1e-6)


def stage_of(layout: str) -> str:
    """Return the file of the stage that a layout's reward role uses: a reward model, or a Hydra-SFT."""
    table = find_layout(layout)
    own_reward = table.loaded_adapters or any(trunk.artifact == "reward" for trunk in table.trunks.values())
    return REWARD if own_reward else HYDRA


def write_stages(layouts: list[str], workload: Workload, folder: Path) -> None:
    """Write the untrained stages that these layouts start from.

    Only adapters and heads are written to disk: merged into the base model on loading, they are full models in memory.
    """
    for name in {stage_of(layout) for layout in layouts}:
        kind = RewardModel if name == REWARD else HydraSFT
        module = kind(model=workload.model, optimizer=adamw, lora=LoraArgs(r=workload.lora_r), dtype=workload.precision)
        module.configure_model()
        # From a zero head every advantage would be zero.
        torch.nn.init.normal_(module.backbone.heads["reward"].weight, std=0.02)  # type: ignore[arg-type]
        trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
        trainer.strategy.connect(module)
        trainer.save_checkpoint(folder / name, weights_only=True)


class RandomPrompts(L.LightningDataModule):
    """Prompts of random tokens, all of one length.

    Args:
        count: Number of prompts.
        length: Tokens of each.
        tokenizer: Gives the vocabulary; special tokens are excluded.
        seed: Seed of the tokens.
    """

    def __init__(self, count: int, length: int, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        super().__init__()
        special = set(tokenizer.all_special_ids)
        ordinary = torch.tensor([i for i in range(len(tokenizer)) if i not in special])
        generator = torch.Generator().manual_seed(seed)
        self.tokens = ordinary[torch.randint(len(ordinary), (count, length), generator=generator)]
        self.texts = tokenizer.batch_decode(self.tokens)

    @property
    def num_prompts(self) -> int:
        """Number of prompts."""
        return len(self.tokens)

    def prompt_batch(self, indices: list[int]) -> PromptBatch:
        """Return the prompts at these indices, see :class:`lit_rlhf.PromptData`."""
        tokens = self.tokens[indices]
        mask = torch.ones_like(tokens, dtype=torch.bool)
        return {"tokens": tokens, "attention_mask": mask, "prompts": [self.texts[i] for i in indices], "columns": {}}

    def train_dataloader(self) -> RolloutBuffer:
        """Return the rollout buffer."""
        assert self.trainer is not None
        module = self.trainer.lightning_module
        assert isinstance(module, OnPolicyModule)
        return module.rollout_buffer


def find_algorithm(name: str) -> type[OnPolicyModule]:
    """Return an on-policy algorithm by its name, or by its import path.

    Raises:
        ConfigError: There is none.
    """
    path, _, attribute = name.rpartition(".")
    by_name = {n.lower(): n for n in algorithms.__all__}
    attribute = attribute if path else by_name.get(attribute.lower(), attribute)
    try:
        found = getattr(import_module(path) if path else algorithms, attribute, None)
    except ModuleNotFoundError as error:
        if not f"{path}.".startswith(f"{error.name}."):  # the module exists, what it imports does not
            raise
        raise ConfigError(f"algorithm {name!r}: no module named {error.name!r} (searched sys.path)") from error
    if not (isinstance(found, type) and issubclass(found, OnPolicyModule)):
        known = [n for n in algorithms.__all__ if issubclass(getattr(algorithms, n), OnPolicyModule)]
        raise ConfigError(
            f"{name!r} is not an on-policy algorithm; choose from {', '.join(known)}, or give an import path"
        )
    return found


def make_module(layout: str, algorithm: str, workload: Workload, folder: Path) -> OnPolicyModule:
    """Return the module to measure, its weights not loaded yet.

    Raises:
        ConfigError: The workload exceeds the model's context, or the layout or algorithm is unknown.
    """
    check_length(context_length(read_config(workload.model)), workload.prompt_length, workload.response_length)
    stage = stage_of(layout)
    argument = "reward_checkpoint" if stage == REWARD else "policy_checkpoint"
    length = workload.response_length
    settings: dict[str, Any] = {argument: str(folder / stage)}
    if workload.samples_per_prompt is not None:
        settings["samples_per_prompt"] = workload.samples_per_prompt
    return find_algorithm(algorithm)(
        model=workload.model, optimizer=adamw, layout=layout, lora=LoraArgs(r=workload.lora_r),
        dtype=workload.precision, gradient_checkpointing=workload.gradient_checkpointing,
        compile_layers=workload.compile_layers,
        sampling=Sampling(max_new_tokens=length, min_new_tokens=length), inner_epochs=workload.inner_epochs,
        rollout_size=workload.batch_size, minibatch_size=workload.minibatch_size or workload.batch_size,
        seed=workload.seed, **settings,
    )  # fmt: skip


class Recorder(PhaseListener):
    """Clocks and meters every phase; counts passes and FLOPs in one more iteration, which is not timed.

    Args:
        updates: Measured iterations, after one that warms up.
        meter: Measures memory; None chooses by the device.
    """

    def __init__(self, updates: int, meter: Meter | None = None) -> None:
        super().__init__()
        self.updates = updates
        self.meter = meter
        self.work = WorkCounter()
        self.seconds: list[dict[str, float]] = []
        self.peaks: dict[str, dict[str, int]] = defaultdict(dict)
        self.held: dict[str, int] = {}
        self._starts: list[tuple[float, float]] = []
        self._since = 0.0

    def _boundary(self, *stretches: str) -> None:
        assert self.meter is not None
        peaks = self.meter.read()
        for name in stretches:
            self.peaks[name] = merge_peaks(self.peaks[name], peaks)
        self.meter.reset()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Discard what loading took."""
        self.meter = self.meter or (CudaMeter() if pl_module.device.type == "cuda" else HostMeter())
        self._boundary("loading")
        gc.collect()
        self.meter.release()
        self.meter.reset()
        self._boundary("start")

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin an iteration; this runs before the rollout."""
        if trainer.current_epoch <= self.updates:
            self.seconds.append({})
        else:
            self._boundary("peak")
            self.work.start(has_backbone(pl_module).backbone)
        self._starts.append((time.perf_counter(), time.process_time()))

    def on_phase_start(self, trainer: L.Trainer, pl_module: L.LightningModule, phase: str) -> None:
        """Start the clock."""
        self.work.phase = phase
        if not self.work.running:
            self._boundary("peak")
        self._since = time.perf_counter()

    def on_phase_end(self, trainer: L.Trainer, pl_module: L.LightningModule, phase: str) -> None:
        """Stop the clock."""
        self.work.phase = ""
        if not self.work.running:
            if pl_module.device.type == "cuda":
                torch.cuda.synchronize()
            self.seconds[-1][phase] = time.perf_counter() - self._since
            self._boundary(phase, "peak")

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Record what is kept: weights, gradients, optimizer state, rollout."""
        now = bytes_by_kind(pl_module, trainer.optimizers)
        self.held = {kind: max(size, self.held.get(kind, 0)) for kind, size in now.items()}

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop counting."""
        self.work.stop()

    def seconds_per_sample(self, samples: int) -> dict[str, dict[str, float]]:
        """Return median, smallest and largest seconds by phase, without the warm-up.

        ``total`` runs from one iteration's beginning to the next one's; ``cpu`` is the processor time of all threads.
        """
        rows = []
        for index, seconds in list(enumerate(self.seconds))[1:]:
            wall, cpu = (self._starts[index + 1][i] - self._starts[index][i] for i in (0, 1))
            rows.append({**seconds, "other": wall - sum(seconds.values()), "total": wall, "cpu": cpu})
        return {
            name: {
                "median": statistics.median(row[name] for row in rows) / samples,
                "min": min(row[name] for row in rows) / samples,
                "max": max(row[name] for row in rows) / samples,
            }
            for name in rows[0]
        }


def measure(layout: str, algorithm: str, workload: Workload, folder: Path) -> dict[str, Any]:
    """Train and return what it cost."""
    module = make_module(layout, algorithm, workload, folder)
    prompts_each = workload.batch_size // module.samples_per_prompt
    data = RandomPrompts(prompts_each * (workload.updates + 2), workload.prompt_length, module.tokenizer, workload.seed)
    recorder = Recorder(workload.updates)
    trainer = L.Trainer(
        accelerator=workload.accelerator, devices=1, max_epochs=workload.updates + 2, logger=False,
        callbacks=[recorder], enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, data)
    samples = workload.batch_size
    seconds = recorder.seconds_per_sample(samples)
    work = recorder.work.per_sample(samples)
    medians = {name: seconds[name]["median"] for name in PHASES}
    device = trainer.strategy.root_device
    speeds = probe(device, getattr(torch, workload.precision))
    read = decode_bytes(module.backbone, workload, work["generation"])
    return {
        "layout": layout,
        "algorithm": algorithm,
        "workload": vars(workload),
        "seconds_per_sample": seconds,
        "samples_per_second": 1 / seconds["total"]["median"],
        "tokens_per_second": workload.response_length / seconds["total"]["median"],
        "memory": recorder.peaks,
        "bytes_held": recorder.held,
        "work_per_sample": work,
        "roofline": roofline(speeds, work, read, medians),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in PACKAGES}},
    }


def run_task(task: dict[str, Any]) -> dict[str, Any]:
    """Run a task; see :func:`lit_rlhf.bench.process.run_child`."""
    workload, folder = Workload(**task["workload"]), Path(task["folder"])
    if "write_stages" in task:
        write_stages(task["write_stages"], workload, folder)
        return {}
    return measure(task["layout"], task["algorithm"], workload, folder)


def main() -> None:
    """Run the task given as JSON; print its result, or an error that the user can fix, as one line of JSON."""
    silence_warnings()
    warnings.filterwarnings("ignore", category=UserWarning, module="lightning")
    try:
        result = run_task(json.loads(sys.argv[1]))
    except (LitRLHFError, OSError) as error:
        if not message_suffices(error):
            raise
        result = {"error": str(error)}
    print(MARK + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
