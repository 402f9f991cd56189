"""Predicted bytes of a layout by kind and phase, and the largest batch that fits."""

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from transformers import AutoModelForCausalLM, PretrainedConfig

from lit_rlhf.backbone import (
    LAYOUTS,
    DType,
    Layout,
    LoraArgs,
    context_length,
    find_layout,
    supervised_layout,
)
from lit_rlhf.errors import ConfigError, model_errors
from lit_rlhf.planner.shapes import depth, kv_cache_bytes, with_depth
from lit_rlhf.planner.simulation import Peaks, Simulation, Sizes, count_parameters
from lit_rlhf.planner.steps import default_samples, roles_of, trained_roles

Algorithm = Literal["ppo", "reinforce", "remax", "rloo", "grpo", "reinforce_plus_plus"]
Strategy = Literal["ddp", "fsdp2"]
AdamW = Literal["foreach", "fused", "forloop"]
PHASES = ("generation", "scoring", "training")
KINDS = ("trunks", "adapters", "gradients", "optimizer", "gathered", "kv_cache", "activations", "logits")
# Depths and batch sizes that are run; between and beyond them everything is linear.
DEPTHS = (2, 4)
BATCHES = (4, 16)


@dataclass(frozen=True)
class Setting:
    """What is planned.

    Args:
        batch_size: Sequences in one training minibatch, per device.
        rollout_batch_size: Sequences generated and scored at once, per device; None is ``batch_size``.
        prompt_length: Tokens P that prompts are padded to.
        response_length: Tokens T of every response.
        precision: Dtype of the trunks; adapters and scalar heads are always float32.
        lora: The trained adapters.
        gradient_checkpointing: Recompute the layers' activations in backward.
        algorithm: Decides whether there is a critic.
        samples_per_prompt: Sampled responses that share the pass over their prompt (ReMax adds a greedy one); None is
            the algorithm's default.
        reward_function: The reward is a Python function: no reward role in memory.
        devices: Number of devices.
        strategy: ``ddp`` copies everything, ``fsdp2`` shards all but one layer.
        adamw: Which implementation steps; ``foreach`` is torch's choice on CUDA.
        accumulate_grad_batches: Above 1, gradients stay throughout the backward pass.
    """

    batch_size: int = 8
    rollout_batch_size: int | None = None
    prompt_length: int = 256
    response_length: int = 256
    precision: DType = "bfloat16"
    lora: LoraArgs = field(default_factory=LoraArgs)
    gradient_checkpointing: bool = False
    algorithm: Algorithm = "ppo"
    samples_per_prompt: int | None = None
    reward_function: bool = False
    devices: int = 1
    strategy: Strategy = "ddp"
    adamw: AdamW = "foreach"
    accumulate_grad_batches: int = 1

    def __post_init__(self) -> None:
        positive = ("batch_size", "prompt_length", "response_length", "devices", "accumulate_grad_batches")
        wrong = [
            f"{name} must be at least 1, got {getattr(self, name)}" for name in positive if getattr(self, name) < 1
        ]
        if self.rollout_batch_size is not None and self.rollout_batch_size < 1:
            wrong.append(f"rollout_batch_size must be at least 1, got {self.rollout_batch_size}")
        if wrong:
            raise ConfigError("; ".join(wrong))

    @property
    def sharded(self) -> bool:
        """Whether parameters, gradients and moments are divided by the devices."""
        return self.strategy == "fsdp2" and self.devices > 1

    def share(self, size: int) -> int:
        """Return a device's share of so many bytes."""
        return -(-size // self.devices) if self.sharded else size

    @property
    def per_prompt(self) -> int:
        """Sequences decoded together for each prompt."""
        samples = self.samples_per_prompt or default_samples(self.algorithm)
        return samples + (self.algorithm == "remax")

    @property
    def keep_log_probs(self) -> bool:
        """Whether old log-probs come from sampling, as in float32: scoring then needs no forward pass of the actor."""
        return self.precision == "float32"

    def training_sizes(self) -> Sizes:
        """Return the batch of one training step."""
        return Sizes(self.batch_size, self.prompt_length, self.response_length)

    def rollout_sizes(self) -> Sizes:
        """Return the batch that is generated and scored at once."""
        return replace(self.training_sizes(), batch=self.rollout_batch_size or self.batch_size)


@dataclass(frozen=True)
class Row:
    """One line of the comparison: a name, a layout restricted to the roles in use, an algorithm or ``sft``."""

    name: str
    layout: Layout
    algorithm: str


@dataclass(frozen=True)
class Prediction:
    """Bytes of one row, per device.

    Args:
        row: What it is about.
        phases: Phase to bytes by kind (see :data:`KINDS`) at the phase's peak.
        largest: Kind to its largest bytes at any time; kinds need not be largest together.
    """

    row: Row
    phases: dict[str, Counter[str]]
    largest: Counter[str]

    def total(self, phase: str) -> int:
        """Return a phase's peak."""
        return sum(self.phases[phase].values())

    @property
    def peak_phase(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=self.total)

    @property
    def peak(self) -> int:
        """The most that is ever needed."""
        return self.total(self.peak_phase)


def make_rows(layouts: Sequence[str], setting: Setting) -> list[Row]:
    """Return full SFT, LoRA-SFT and the named layouts as this algorithm builds them.

    Args:
        layouts: Layout names or import paths; ``all`` stands for all of :data:`lit_rlhf.backbone.LAYOUTS`.
        setting: Gives the algorithm and where rewards come from.

    Raises:
        ConfigError: There is no such layout.
    """
    roles = [*roles_of(setting.algorithm), *([] if setting.reward_function else ["reward"])]
    names: list[str] = []
    for name in layouts:
        # Without a critic, j_hydra is hydra.
        names += [n for n in LAYOUTS if "critic" in roles or n != "j_hydra"] if name == "all" else [name]
    rows = [
        Row("sft", supervised_layout({"actor": "lm"}, lora=False), "sft"),
        Row("lora_sft", supervised_layout({"actor": "lm"}, lora=True), "sft"),
    ]
    return rows + [
        Row(name, find_layout(name).restricted_to(roles), setting.algorithm) for name in dict.fromkeys(names)
    ]


class Planner:
    """Predicts rows of one model; what rows have in common is simulated once.

    Args:
        config: Architecture.
        setting: What is planned.

    Raises:
        ConfigError: Prompt and response together exceed the model's context; when predicting, the model makes
            sizes depend on values.
        ModelFileError: transformers cannot build a causal language model of this config.
    """

    def __init__(self, config: PretrainedConfig, setting: Setting) -> None:
        limit, wanted = context_length(config), setting.prompt_length + setting.response_length
        if limit is not None and wanted > limit:
            raise ConfigError(f"prompt_length + response_length is {wanted}, but the model's context is {limit} tokens")
        self.config = config
        self.setting = setting
        self.depth = depth(config)
        self.parameters, self.depths = self._choose_depths()
        self._simulations: dict[tuple[str, int], Simulation] = {}
        self._counted: dict[str, Counter[str]] = {}
        self._done: dict[Hashable, Peaks] = {}

    def _choose_depths(self) -> tuple[int, tuple[int, ...]]:
        """Return the number of parameters, and depths to run: all layers where layers differ from each other."""
        if self.depth <= DEPTHS[-1]:
            return _count_parameters(self.config), (self.depth,)
        counts = {n: _count_parameters(with_depth(self.config, n)) for n in (*DEPTHS, self.depth)}
        linear = _line({n: Counter(all=counts[n]) for n in DEPTHS}, self.depth)["all"]
        return counts[self.depth], DEPTHS if linear == counts[self.depth] else (self.depth,)

    def predict(self, row: Row, setting: Setting | None = None, interpolate: bool = False) -> Prediction:
        """Return the bytes of a row.

        Args:
            row: What to predict.
            setting: Another setting with other batch sizes, strategy or optimizer; None is the planner's own.
            interpolate: Run the batch sizes of :data:`BATCHES` only, and draw lines between them.
        """
        setting = setting or self.setting
        held = self._held(row, setting)
        stretches: dict[str, list[Counter[str]]] = {}
        if row.algorithm != "sft":
            for phase in ("generation", "scoring"):
                peaks = self._peaks(row, phase, setting.rollout_sizes(), interpolate)
                stretches[phase] = [_sum(held, extra) for extra in self._rollout(setting, peaks)]
        peaks = self._peaks(row, "training", setting.training_sizes(), interpolate)
        stretches["training"] = [_sum(held, extra) for extra in self._training(row, setting, peaks)]
        largest: Counter[str] = Counter()
        for stretch in (s for parts in stretches.values() for s in parts):
            largest |= stretch
        phases = {phase: max(parts, key=Counter.total) for phase, parts in stretches.items()}
        return Prediction(row, phases, largest)

    def largest_batch(self, row: Row, budget: int, limit: int = 1 << 16) -> int:
        """Return the largest batch size (minibatch and, unless it is fixed, rollout batch) within a budget, or 0.

        Args:
            row: What to fit.
            budget: Bytes of one device.
            limit: Largest answer.
        """

        def fits(batch: int) -> bool:
            return self.predict(row, replace(self.setting, batch_size=batch), interpolate=True).peak <= budget

        low, high = 0, 1
        while high <= limit and fits(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return min(low, limit)

    # ---- what is always there ----------------------------------------------------------------------------------

    def counts(self, row: Row) -> Counter[str]:
        """Return the bytes of a row's parameters (see :func:`count_parameters`), on one device."""
        if row.name not in self._counted:
            counts = {n: count_parameters(self._simulation(row, n).backbone) for n in self.depths}
            self._counted[row.name] = _line(counts, self.depth)
        return self._counted[row.name]

    def _held(self, row: Row, setting: Setting) -> Counter[str]:
        counts, share = self.counts(row), setting.share
        held = Counter(trunks=share(counts["trunks"]), adapters=share(counts["adapters"]))
        # AdamW's two moments, in the parameters' own dtype; they stay through generation and scoring.
        held["optimizer"] = share(2 * counts["trained"])
        if setting.sharded:
            held["gathered"] = counts["unit"] + counts["outside"]
        elif setting.devices > 1:
            held["gradients"] = counts["trained"]  # the reducer's buckets
        return held

    # ---- what comes and goes -----------------------------------------------------------------------------------

    def _rollout(self, setting: Setting, peaks: Peaks) -> list[Counter[str]]:
        sizes = setting.rollout_sizes()
        prompts = max(1, sizes.batch // setting.per_prompt)
        cached = {"prefill": prompts * sizes.prompt, "decode": sizes.batch * (sizes.prompt + sizes.response)}
        stretches = []
        for name, found in peaks.items():
            rest = found.total() - found["logits"]
            kv = min(rest, kv_cache_bytes(self.config, 1, cached.get(name, 0), setting.precision))
            stretches.append(Counter(kv_cache=kv, activations=rest - kv, logits=found["logits"]))
        return stretches

    def _training(self, row: Row, setting: Setting, peaks: Peaks) -> list[Counter[str]]:
        counts, share = self.counts(row), setting.share
        gradients = share(counts["trained"])
        stretches = []
        for name, found in peaks.items():
            now = share(found["gradients"])
            if name.startswith("loss"):
                # Lightning frees the last step's gradients only between loss and backward.
                now += gradients
            elif setting.accumulate_grad_batches > 1:
                now = max(now, gradients)
            extra = Counter(gradients=now)
            extra["activations"], extra["logits"] = found["activations"], found["logits"]
            if setting.sharded and found["gradients"]:
                extra["gathered"] = counts["trained_unit"] + counts["trained_outside"]
            stretches.append(extra)
        workspace = {
            "foreach": share(counts["trained"]),
            "fused": 0,
            "forloop": share(2 * counts["largest_trained"]),
        }
        return [*stretches, Counter(gradients=gradients, optimizer=workspace[setting.adamw])]

    def _peaks(self, row: Row, phase: str, sizes: Sizes, interpolate: bool) -> Peaks:
        if not interpolate:
            return self._run(row, phase, sizes)
        upper = next((i for i, b in enumerate(BATCHES) if i and sizes.batch <= b), len(BATCHES) - 1)
        ends = {b: self._run(row, phase, replace(sizes, batch=b)) for b in BATCHES[upper - 1 : upper + 1]}
        return _lines(ends, sizes.batch)

    def _run(self, row: Row, phase: str, sizes: Sizes) -> Peaks:
        """Simulate a phase at the depths of this model, and draw the line to its own depth."""
        roles = {
            "generation": ["actor"],
            "scoring": [r for r in row.layout.roles if r != "actor" or not self.setting.keep_log_probs],
            "training": trained_roles(row.algorithm),
        }[phase]
        key = (phase, row.algorithm, sizes, passes_of(row.layout, roles))
        if key not in self._done:
            run: Callable[[Simulation], Peaks] = {
                "generation": lambda s: s.generation(sizes, self.setting.per_prompt),
                "scoring": lambda s: s.scoring(roles, sizes),
                "training": lambda s: s.training(row.algorithm, sizes),
            }[phase]
            try:
                self._done[key] = _lines({n: run(self._simulation(row, n)) for n in self.depths}, self.depth)
            except (DataDependentOutputException, DynamicOutputShapeException) as error:
                raise ConfigError(
                    f"{phase} of {row.name} cannot be planned: {type(self.config).__name__} makes sizes depend on "
                    f"values ({error.func}), as some mixtures of experts do"
                ) from error
        return self._done[key]

    def _simulation(self, row: Row, layers: int) -> Simulation:
        key = (row.name, layers)
        if key not in self._simulations:
            s, config = self.setting, with_depth(self.config, layers)
            self._simulations[key] = Simulation(config, row.layout, s.lora, s.precision, s.gradient_checkpointing)
        return self._simulations[key]


def passes_of(layout: Layout, roles: Sequence[str]) -> Hashable:
    """Return what the activations of a forward call depend on: its passes, whatever trunks and adapters are called."""
    groups: dict[tuple[str, str | None], list[str]] = {}
    for role in (layout.roles[name] for name in roles):
        groups.setdefault((role.trunk, role.adapter), []).append(role.head)
    return tuple(
        (layout.trunks[trunk].trained, adapter is not None, tuple(heads)) for (trunk, adapter), heads in groups.items()
    )


def _count_parameters(config: PretrainedConfig) -> int:
    with torch.device("meta"), model_errors(f"a model of this {type(config).__name__} cannot be built"):
        return int(AutoModelForCausalLM.from_config(config).num_parameters())


def _sum(first: Counter[str], second: Counter[str]) -> Counter[str]:
    return Counter({kind: first[kind] + second[kind] for kind in {*first, *second}})


def _line(points: dict[int, Counter[str]], x: int) -> Counter[str]:
    """Return the value at x of the line through one or two points."""
    if len(points) == 1:
        return next(iter(points.values()))
    (x0, y0), (x1, y1) = points.items()
    return Counter({k: y0[k] + round((y1[k] - y0[k]) * (x - x0) / (x1 - x0)) for k in {*y0, *y1}})


def _lines(points: dict[int, Peaks], x: int) -> Peaks:
    """As :func:`_line` for every stretch that both runs have (two layers have none in the middle)."""
    common = set.intersection(*(set(peaks) for peaks in points.values()))
    return {name: _line({at: peaks[name] for at, peaks in points.items()}, x) for name in common}
