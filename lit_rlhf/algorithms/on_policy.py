"""The base of on-policy algorithms: rollout, estimate, loss, in this order."""

from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback
from torch import Tensor

from lit_rlhf.algorithms.base import BackboneModule
from lit_rlhf.algorithms.settings import unpack
from lit_rlhf.backbone import Layout, LoraArgs, PassOptions, find_layout
from lit_rlhf.callbacks import PhaseTimer, SampleTable, StopInIteration, TrainingPhase
from lit_rlhf.functional import KLEstimator, kl_estimate
from lit_rlhf.rollout import (
    Collector,
    Engine,
    Experience,
    FixedKL,
    KLController,
    PromptBatch,
    Reward,
    RewardScaler,
    RewardScaling,
    RoleReward,
    RolloutBuffer,
    Sample,
    Sampling,
    Scored,
    TransformersEngine,
)
from lit_rlhf.strategies.ranks import mean_over_ranks, world_size


class OnPolicyModule(BackboneModule):
    """Alternates rollouts and updates; one Lightning epoch is one iteration.

    A new algorithm overrides one to three hooks: :meth:`sample` (which responses), :meth:`estimate` (rewards and
    advantages) and :meth:`policy_loss`. It runs on every layout. :mod:`lit_rlhf.algorithms` documents the contract.

    Args:
        layout: Which trunk, adapter and head each role uses: ``full``, ``lora``, ``dynamic_lora``, ``pe``,
            ``j_hydra`` or ``hydra``, or the import path of your own :class:`Layout` (``my_layouts.SPLIT``).
        lora: The trained adapters; None is ``LoraArgs()``. Not used by layouts that train whole trunks (``full``).
        reward_checkpoint: Reward-model checkpoint; None uses the policy checkpoint's own reward head (Hydra-SFT).
        reward: What scores responses; None is the layout's reward role.
        sampling: How responses are sampled.
        rollout_size: Responses that each rank samples per iteration.
        samples_per_prompt: Responses to each prompt; divides ``rollout_size``. They share the forward pass over the
            prompt.
        minibatch_size: Responses in one minibatch; divides ``rollout_size``.
        inner_epochs: Passes over each rollout.
        rollout_batch_size: Responses generated and scored at once; None takes the whole rollout.
        group_by_length: Make minibatches of responses of similar length, scored and trained without the padding they
            share: less work where lengths vary much, but then minibatches are not random samples.
        kl: Controller of the KL penalty's coefficient; None is ``FixedKL(0.05)``.
        kl_estimator: Per-token KL estimate in the penalty.
        score_clip: Clip scores to ``[-score_clip, score_clip]`` after scaling; None does not.
        reward_scaling: ``batch`` whitens the scores of each rollout, ``running`` divides by their running standard
            deviation.
        missing_eos_penalty: Subtracted from the score of a response that hit the length limit.
        keep_log_probs: Take the old log-probs from sampling instead of a forward pass over the responses; None does so
            where the two agree: in float32, with an engine that returns them.
        log_samples: Number of responses to log per iteration.
        seed: Base seed; every iteration reseeds from (seed, iteration, rank). None takes ``seed_everything``'s, or 0.
        engine: What samples the responses; None is ``TransformersEngine()``.
        **kwargs: See :class:`BackboneModule`.
    """

    lr_interval: ClassVar[str] = "epoch"
    sigterm_callback = StopInIteration
    # True for algorithms without a policy ratio: one update an iteration, in one pass over the rollout.
    one_update: ClassVar[bool] = False
    progress_metrics: ClassVar[frozenset[str]] = frozenset({"rollout/score", "rollout/kl", "train/value_loss"})
    roles: ClassVar[tuple[str, ...]] = ("actor", "reference")
    entry_methods: ClassVar[tuple[str, ...]] = (*BackboneModule.entry_methods, "rollout")

    def __init__(
        self,
        layout: str = "hydra",
        lora: LoraArgs | None = None,
        reward_checkpoint: str | None = None,
        reward: Reward | None = None,
        sampling: Sampling | None = None,
        rollout_size: int = 32,
        samples_per_prompt: int = 1,
        minibatch_size: int = 8,
        inner_epochs: int = 1,
        rollout_batch_size: int | None = None,
        group_by_length: bool = False,
        kl: KLController | None = None,
        kl_estimator: KLEstimator = "k1",
        score_clip: float | None = None,
        reward_scaling: RewardScaling = "none",
        missing_eos_penalty: float = 0.0,
        keep_log_probs: bool | None = None,
        log_samples: int = 8,
        seed: int | None = None,
        engine: Engine | None = None,
        **kwargs: Any,
    ) -> None:
        named = find_layout(layout)
        # `full` ignores LoRA settings rather than refusing them, so that changing the layout is a one-line change.
        super().__init__(lora=(lora or LoraArgs()) if named.trains_lora else None, **kwargs)
        self.spec.reward_checkpoint = reward_checkpoint
        self.layout = named
        self.rollout_size, self.minibatch_size = rollout_size, minibatch_size
        self.rollout_batch_size = rollout_size if rollout_batch_size is None else rollout_batch_size
        self.samples_per_prompt = samples_per_prompt
        self.kl = kl or FixedKL(0.05)
        self.kl_estimator: KLEstimator = kl_estimator
        self.reward_scaler = RewardScaler(reward_scaling, score_clip, missing_eos_penalty)
        self.log_samples = log_samples
        self.collector = Collector(
            engine or TransformersEngine(),
            sampling or Sampling(),
            reward or RoleReward(),
            batch_size=self.rollout_batch_size,
            group_size=minibatch_size if group_by_length else None,
            keep_log_probs=keep_log_probs,
            sampling_agrees=self.spec.dtype == "float32" and self.spec.quantization is None,
            trained_as_one=inner_epochs == 1 and minibatch_size == rollout_size,
            skip_non_finite=self.on_non_finite == "skip_step",
        )
        self.sampling = self.collector.sampling
        self.temperature, self.sampled_tokens = self.sampling.temperature, self.sampling.max_new_tokens
        self.rollout_buffer = RolloutBuffer(
            rollout_size, minibatch_size, inner_epochs, seed, samples_per_prompt, group_by_length
        )
        # For callbacks: the latest minibatch's statistics, and whether the following ones are skipped.
        self.minibatch_stats: dict[str, Tensor] = {}
        self.skip_minibatches = False

    def problems(self) -> list[str]:
        """Hook: return all problems with the settings, one line each; a subclass adds its own to ``super()``'s."""
        found = [*super().problems(), *self.collector.problems(), *self.rollout_buffer.problems(self)]
        found += self.reward_scaler.problems() + self.kl.problems(self.rollout_size * world_size(self))
        if self.compile_layers and getattr(self.collector.engine, "compile", False):
            found.append("compile_layers and engine.compile cannot be combined; remove one of them")
        return found

    def needs_groups(self) -> list[str]:
        """Return a problem if there is a single response per prompt, for algorithms that compare several."""
        if self.samples_per_prompt >= 2:
            return []
        return [f"samples_per_prompt must be at least 2 for {type(self).__name__}, got {self.samples_per_prompt}"]

    def make_layout(self) -> Layout:
        """Return the named layout, restricted to the roles this algorithm and its reward use."""
        return self.layout.restricted_to(self.roles + self.collector.roles)

    def configure_callbacks(self) -> list[Callback]:
        """Add the rollout buffer and what logs; the user's YAML need not name them."""
        own = [self.rollout_buffer, TrainingPhase(), PhaseTimer(), SampleTable(self.log_samples)]
        return [*super().configure_callbacks(), *own]

    def rollout(self, prompts: PromptBatch) -> tuple[Experience, list[Sample]]:
        """Collect one iteration's experience, and log its means; see :meth:`Collector.collect`."""
        return self.collector.collect(self, prompts)

    def sample(self, prompts: PromptBatch) -> Experience:
        """Hook: return ``samples_per_prompt`` responses to each of N prompts, grouped by prompt."""
        return self.generate(prompts, self.samples_per_prompt)

    def score(self, experience: Experience, prompts: PromptBatch) -> Scored:
        """Hook: fill log-probs, values and scores; see :meth:`Collector.score`. Returns the texts that were scored."""
        return self.collector.score(self, experience, prompts)

    def estimate(self, experience: Experience) -> None:
        """Hook: fill ``advantages`` (and ``returns``) from scores, log-probs and values."""
        raise NotImplementedError(f"{type(self).__name__} must define estimate")

    def policy_loss(self, log_probs: Tensor, minibatch: Experience) -> tuple[Tensor, dict[str, Tensor]]:
        """Hook: return the loss of ``[B, T]`` log-probs under the current policy, and statistics for the log."""
        raise NotImplementedError(f"{type(self).__name__} must define policy_loss, or loss")

    def loss(self, minibatch: Experience) -> Tensor:
        """Hook: return the loss of one minibatch, 0-dim; by default :meth:`policy_loss` alone."""
        loss, self.minibatch_stats = unpack(self.policy_loss(self.log_probs(minibatch), minibatch), self)
        return loss

    def generate(self, prompts: PromptBatch, samples: int = 1, greedy: bool = False) -> Experience:
        """Sample responses to each prompt with the current actor; ``greedy`` adds one most probable response each."""
        return self.collector.generate(self, prompts, samples, greedy)

    def loss_passes(self) -> list[tuple[str, ...]]:
        """Return the roles of each forward pass of the loss, in the order in which the loss runs them."""
        return [("actor",)]

    def pass_options(self) -> PassOptions:
        """Return the keyword arguments of these passes; see :meth:`Backbone.forward`."""
        return {}

    def log_probs(self, minibatch: Experience) -> Tensor:
        """Return ``[B, T]`` log-probs of the responses under the current policy; the gradient flows through them."""
        return self.backbone(("actor",), *minibatch.inputs, **self.pass_options())["actor"]

    def shaped_scores(self, experience: Experience) -> Tensor:
        """Return ``[N]`` scores as they enter the token rewards; see :meth:`RewardScaler.shape`."""
        return self.reward_scaler.shape(experience.scores, experience.truncated)

    def kl_penalty(self, experience: Experience) -> Tensor:
        """Return ``[N, T]`` per-token KL estimates of the sampling policy to the reference."""
        e = experience
        return kl_estimate(e.log_probs, e.ref_log_probs, e.mask, self.kl_estimator)

    def log_training(self, values: dict[str, Tensor], batch_size: int) -> None:
        """Log a minibatch's losses and statistics under ``train/``, averaged over the iteration and all ranks."""
        means = mean_over_ranks(self, {name: value.detach() for name, value in values.items()})
        self.log_all("train", means, batch_size=batch_size, on_step=False, on_epoch=True)

    def training_step(self, batch: Experience, batch_idx: int) -> Tensor:
        """Return the minibatch's loss; Lightning does backward, clipping and the step."""
        if self.skip_minibatches:
            return self.backbone.zero_loss()
        self.minibatch_stats = {}
        loss = self.loss(batch)
        self.log_training({**self.minibatch_stats, "loss": loss}, len(batch))
        return loss

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Sample on held-out prompts; log score, KL and length."""
        self.collector.evaluate(self, batch, "val")

    def test_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Like validation, under ``test/``."""
        self.collector.evaluate(self, batch, "test")

    @torch.no_grad()
    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, str]]:
        """Return prompts and sampled responses as text."""
        responses = self.generate(batch).decode(self.tokenizer)
        return [{"prompt": p, "response": r} for p, r in zip(batch["prompts"], responses, strict=True)]
