"""The base of on-policy algorithms: rollout, estimate, loss, in this order."""

import os
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_rlhf.algorithms.base import BackboneModule
from lit_rlhf.algorithms.carried import CarriedPass
from lit_rlhf.algorithms.ranges import out_of_range
from lit_rlhf.backbone import Layout, LoraArgs, find_layout
from lit_rlhf.callbacks import PhaseTimer, SampleTable, StopInIteration, TrainingPhase
from lit_rlhf.errors import ConfigError
from lit_rlhf.functional import AdaptiveKL, FixedKL, KLController, KLEstimator, kl_estimate, masked_sum
from lit_rlhf.rollout import (
    Engine,
    Experience,
    Reward,
    RewardScaler,
    RewardScaling,
    RoleReward,
    RolloutBuffer,
    Sampling,
    Scored,
    TransformersEngine,
    join,
    read_groups,
)
from lit_rlhf.rollout.phases import phase


class OnPolicyModule(BackboneModule):
    """Alternates rollouts and updates; one Lightning epoch is one iteration.

    A new algorithm overrides one to three hooks: :meth:`sample` (which responses), :meth:`estimate` (rewards and
    advantages) and :meth:`loss`. It runs on every layout.

    Args:
        layout: Which trunk, LoRA set and head each role reads: ``full``, ``lora``, ``dynamic_lora``, ``pe``,
            ``j_hydra`` or ``hydra``, or the import path of a :class:`Layout` of yours (``my_layouts.SPLIT``).
        lora: The trained LoRA sets; None is ``LoraArgs()``. Not used by layouts that train whole trunks (``full``).
        reward_checkpoint: Reward-model checkpoint; None reads the policy checkpoint's own reward head (Hydra-SFT).
        reward: What rates responses; None is the layout's reward role.
        sampling: How responses are sampled.
        rollout_size: Responses a rank samples for one iteration.
        samples_per_prompt: Responses to each prompt; divides ``rollout_size``. They share the pass over the prompt.
        minibatch_size: Responses in one minibatch; divides ``rollout_size``.
        inner_epochs: Passes over each rollout.
        rollout_batch_size: Responses generated and scored at once; None takes the whole rollout.
        group_by_length: Make minibatches of responses of similar length, and score and train them without the padding
            they share: less work where lengths vary much, at the price of minibatches that are no random samples. They
            are then scored ``minibatch_size`` at once, whatever ``rollout_batch_size`` says.
        kl: Controller of the KL penalty's coefficient; None is ``FixedKL(0.05)``.
        kl_estimator: Per-token KL estimate in the penalty.
        score_clip: Clip scores to ``[-score_clip, score_clip]`` after scaling; None does not.
        reward_scaling: ``batch`` whitens the scores of each rollout, ``running`` divides by their deviation so far.
        missing_eos_penalty: Subtracted from the score of a response that hit the length limit.
        keep_log_probs: Take the old log-probs from sampling instead of a pass over the responses; None does so where
            both agree, in float32 with an engine that gives them.
        log_samples: Sample responses to log each iteration.
        seed: Base seed of the rollouts; every iteration reseeds from (seed, iteration, rank). None takes the seed of
            ``seed_everything``, or 0.
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
        self.layout = find_layout(layout)
        # `full` ignores LoRA settings rather than refusing them, so that changing the layout is a one-line change.
        super().__init__(lora=(lora or LoraArgs()) if self.layout.trains_lora else None, **kwargs)
        self.spec.reward_checkpoint = reward_checkpoint
        self.reward = reward or RoleReward()
        self.sampling = sampling or Sampling()
        self.engine = engine or TransformersEngine()
        self.temperature = self.sampling.temperature
        self.rollout_size = rollout_size
        self.samples_per_prompt = samples_per_prompt
        self.minibatch_size = minibatch_size
        self.inner_epochs = inner_epochs
        self.rollout_batch_size = rollout_size if rollout_batch_size is None else rollout_batch_size
        self.kl = kl or FixedKL(0.05)
        self.kl_estimator: KLEstimator = kl_estimator
        self.score_clip = score_clip
        self.reward_scaler = RewardScaler(reward_scaling)
        self.missing_eos_penalty = missing_eos_penalty
        self.keep_log_probs = keep_log_probs
        self.log_samples = log_samples
        if problems := self.problems():
            raise ConfigError("invalid configuration:\n" + "\n".join(f"  - {problem}" for problem in problems))
        self._carried = CarriedPass()
        base_seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) if seed is None else seed
        self.group_by_length = group_by_length
        self.rollout_buffer = RolloutBuffer(
            rollout_size, minibatch_size, inner_epochs, base_seed, samples_per_prompt, group_by_length
        )

    def problems(self) -> list[str]:
        """Return everything wrong with the settings, one line each; subclasses add their own."""
        found = self.sampling.problems()
        counts = ("rollout_size", "samples_per_prompt", "minibatch_size", "inner_epochs", "rollout_batch_size")
        found += out_of_range(self, positive=(*counts, "score_clip"))
        for name in ("minibatch_size", "samples_per_prompt"):
            part = getattr(self, name)
            if part > 0 and self.rollout_size % part:
                found.append(f"rollout_size {self.rollout_size} must be a multiple of {name} {part}")
        found += self._one_pass_problems()
        if self.compile_layers and getattr(self.engine, "compile", False):
            found.append("compile_layers and engine.compile exclude each other; leave one of them out")
        if self.keep_log_probs and not self.engine.gives_log_probs:
            found.append(f"keep_log_probs: {type(self.engine).__name__} gives no log-probs; leave it out, or false")
        try:
            layout = self.make_layout()
            if self.spec.lora is not None:
                self.spec.lora.check_adapters(layout.trained_adapters)
        except (KeyError, ValueError) as error:
            found.append(str(error.args[0]))
        return found + self._horizon_problems(ranks=1)

    def _horizon_problems(self, ranks: int) -> list[str]:
        size = self.rollout_size * ranks
        if not isinstance(self.kl, AdaptiveKL) or size < 5 * self.kl.horizon:
            return []
        return [f"kl.horizon {self.kl.horizon:g} must be above a fifth of an iteration's {size} responses"]

    def setup(self, stage: str) -> None:
        """Check what depends on the trainer.

        Raises:
            ValueError: The KL controller's horizon is too short for all ranks' responses.
        """
        super().setup(stage)
        if stage == "fit" and (problems := self._horizon_problems(self.trainer.world_size)):
            raise ConfigError(problems[0])
        updates = len(self.rollout_buffer) // self.trainer.accumulate_grad_batches
        if stage == "fit" and self.one_update and updates > 1:
            rank_zero_warn(
                f"{type(self).__name__} has no policy ratio, so only the first of an iteration's {updates} updates is "
                f"on-policy. Set trainer.accumulate_grad_batches to {len(self.rollout_buffer)}"
            )

    def check_data(self, data: Any, response_length: int = 0) -> None:
        """Count the responses' tokens too."""
        super().check_data(data, max(response_length, self.sampling.max_new_tokens))

    def _one_pass_problems(self) -> list[str]:
        if self.inner_epochs == 1 or not self.one_update:
            return []
        return [f"inner_epochs must be 1 for {type(self).__name__}, which has no policy ratio; got {self.inner_epochs}"]

    def needs_groups(self) -> list[str]:
        """Return the problem of a single response a prompt, for algorithms that compare several."""
        if self.samples_per_prompt >= 2:
            return []
        return [f"samples_per_prompt must be at least 2 for {type(self).__name__}, got {self.samples_per_prompt}"]

    def make_layout(self) -> Layout:
        """Return the named layout, restricted to the roles this algorithm and its reward read."""
        roles = self.roles + (("reward",) if self.reward.needs_reward_role else ())
        return self.layout.restricted_to(roles)

    def configure_callbacks(self) -> list[Callback]:
        """Put the rollout buffer in place; the user's YAML need not name it."""
        own = [self.rollout_buffer, TrainingPhase(), PhaseTimer(), SampleTable(self.log_samples)]
        return [*super().configure_callbacks(), *own]

    # ---- one iteration -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def rollout(self, prompts: dict[str, Any]) -> tuple[Experience, list[dict[str, Any]]]:
        """Collect one iteration's experience: sample, score, estimate.

        Args:
            prompts: A prompt batch: ``tokens`` [N, P] long, ``attention_mask`` [N, P] bool, ``prompts``, ``columns``.

        Returns:
            The experience, ready for :meth:`loss`, and its samples as text for logging.
        """
        with phase(self, "generation"), self.guard.together(self):
            experience = self.sample(prompts)
        with phase(self, "scoring"):
            with self.guard.together(self):
                self._carry(self.carried_roles(experience), experience)
                texts = self.score(experience, prompts)
            skipped = self.guard.check_rollout(self, experience, texts)
            if not skipped:
                self.reward_scaler.update(experience.require("scores"), self.all_reduce_sum)
            self.estimate(experience)
        metrics = self.rollout_metrics(experience)
        experience.greedy = None
        self.log_all("rollout", {**metrics, "kl_coef": self.kl.value})
        if not skipped:
            self.kl.update(metrics["kl"], len(experience) * self.trainer.world_size)
        scores = experience.require("scores").tolist()
        rows = zip(texts.prompts, texts.responses, scores, strict=True)
        return experience, [{"prompt": p, "response": r, "score": s} for p, r, s in rows]

    def sample(self, prompts: dict[str, Any]) -> Experience:
        """Hook: sample responses, ``samples_per_prompt`` to each of N prompts, those to one prompt together.

        Returns the experience with its sequence fields filled.
        """
        return self.generate(prompts, self.samples_per_prompt)

    def estimate(self, experience: Experience) -> None:
        """Hook: fill ``advantages`` (and ``returns``) from scores, log-probs and values."""
        raise NotImplementedError(f"{type(self).__name__} must define estimate")

    def loss(self, minibatch: Experience) -> Tensor:
        """Hook: return the loss of one minibatch.

        Read the policy through :meth:`log_probs`: where the rollout is one minibatch, scoring has read it already.
        """
        raise NotImplementedError(f"{type(self).__name__} must define loss")

    def generate(self, prompts: dict[str, Any], samples: int = 1, greedy: bool = False) -> Experience:
        """Sample responses to each prompt with the current actor; ``greedy`` adds one most probable response each.

        See :func:`lit_rlhf.rollout.generate`, whose arguments these are.
        """
        with self.backbone.use("actor") as model:
            return self.engine.generate(
                model,
                prompts["tokens"],
                prompts["attention_mask"],
                self.sampling,
                self.pad_id,
                self.eos_ids,
                samples=samples,
                greedy=greedy,
                batch_size=self.rollout_batch_size,
                in_step=self.backbone.is_sharded,
                keep_log_probs=self._keeps_log_probs(),
            )

    def _keeps_log_probs(self) -> bool:
        if self.keep_log_probs is None:
            return self.engine.gives_log_probs and self._sampling_agrees()
        return self.keep_log_probs

    def _sampling_agrees(self) -> bool:
        """Whether decoding and a pass over the whole response compute the same log-probs."""
        precision = "32-true" if self._trainer is None else str(self.trainer.precision)
        exact = torch.get_float32_matmul_precision() == "highest" and self.spec.quantization is None
        return exact and self.spec.dtype == "float32" and precision == "32-true"

    @torch.no_grad()
    def score(self, experience: Experience, prompts: dict[str, Any]) -> Scored:
        """Fill log-probs and values (unless they are known), reference log-probs and scores.

        One trunk pass per (trunk, LoRA set). Greedy responses get their scores only. Returns what was scored.
        """
        fields = {"actor": experience.log_probs, "critic": experience.values}
        known = {role for role, field in fields.items() if field is not None}
        read = self._read(tuple(role for role in self.backbone.layout.roles if role not in known), experience)
        experience.log_probs = read.get("actor", experience.log_probs)
        experience.ref_log_probs = read["reference"]
        experience.values = read.get("critic", experience.values)
        if experience.greedy is not None:
            role_scores = self._read(("reward",), experience.greedy) if self.reward.needs_reward_role else {}
            self._rate(experience.greedy, prompts, role_scores.get("reward"))
        return self._rate(experience, prompts, read.get("reward"))

    def carried_roles(self, experience: Experience) -> tuple[str, ...]:
        """Return the roles whose pass in training is run in scoring already, and kept with its graph.

        Only where the whole rollout is one minibatch, and is scored at once: the loss reads the same rows and weights.
        """
        whole = len(self.rollout_buffer) == 1 and self.rollout_batch_size >= self.rollout_size
        trained = self._trainer is not None and not self.backbone.is_sharded
        return self.roles_to_carry(experience) if whole and trained else ()

    def roles_to_carry(self, experience: Experience) -> tuple[str, ...]:
        """Return what :meth:`carried_roles` names; at most one graph is kept, the first that the loss needs."""
        return ("actor",) if experience.log_probs is None else ()

    def _carry(self, roles: tuple[str, ...], experience: Experience) -> None:
        self._carried.drop()
        if not roles:
            return
        with torch.enable_grad():
            read = self.read_for_loss(roles, experience)
        self._carried.put(roles, experience, read)
        if "critic" in read:
            experience.values = read["critic"].detach()
        if experience.log_probs is None and "actor" in read:
            experience.log_probs = read["actor"].detach()

    def reading_options(self) -> dict[str, Any]:
        """Return the keyword arguments of the backbone's passes in training."""
        return {}

    def read_for_loss(self, roles: tuple[str, ...], minibatch: Experience) -> dict[str, Tensor]:
        """Read roles with gradients, see :meth:`Backbone.forward`; what scoring carried over is handed out once."""
        b = minibatch
        if (carried := self._carried.take(roles, b)) is not None:
            return carried
        return self.backbone(roles, b.tokens, b.attention_mask, b.mask, **self.reading_options())

    def _read(self, roles: tuple[str, ...], experience: Experience) -> dict[str, Tensor]:
        def read(part: Experience) -> dict[str, Tensor]:
            return self.backbone(roles, part.tokens, part.attention_mask, part.mask)

        if self.group_by_length:
            return read_groups(read, experience, self.minibatch_size)
        return join([read(chunk) for chunk in experience.split(self.rollout_batch_size)])

    def _rate(self, experience: Experience, prompts: dict[str, Any], role_scores: Tensor | None) -> Scored:
        copies = len(experience) // len(prompts["prompts"])
        texts, columns = (
            [text for text in prompts["prompts"] for _ in range(copies)],
            {name: [v for v in values for _ in range(copies)] for name, values in prompts["columns"].items()},
        )
        scored = Scored(texts, experience.decode(self.tokenizer), columns, role_scores)
        experience.scores = self.reward.score(scored).to(experience.tokens.device)
        return scored

    def shaped_scores(self, experience: Experience) -> Tensor:
        """Return ``[N]`` scores as they enter the token rewards: scaled, clipped, less the missing-EOS penalty."""
        scores = self.reward_scaler(experience.require("scores"))
        if self.score_clip is not None:
            scores = scores.clamp(-self.score_clip, self.score_clip)
        return scores - self.missing_eos_penalty * experience.truncated.to(scores.dtype)

    def kl_penalty(self, experience: Experience) -> Tensor:
        """Return ``[N, T]`` per-token KL estimates of the sampling policy to the reference."""
        log_probs, reference = experience.require("log_probs"), experience.require("ref_log_probs")
        return kl_estimate(log_probs, reference, experience.mask, self.kl_estimator)

    def rollout_metrics(self, experience: Experience) -> dict[str, float]:
        """Return the rollout's means over all ranks.

        ``kl`` is the sum over a response's tokens (k1), ``kl_penalty`` the same by the chosen estimator.
        """
        log_probs, mask = experience.require("log_probs"), experience.mask
        kl = kl_estimate(log_probs, experience.require("ref_log_probs"), mask, "k1")
        length = mask.sum(dim=1).float()
        columns = {
            "score": experience.require("scores"),
            "kl": masked_sum(kl, mask, dim=1),
            "kl_penalty": masked_sum(self.kl_penalty(experience), mask, dim=1),
            "response_length": length,
            "truncated": experience.truncated.float(),
            "entropy": -masked_sum(log_probs, mask, dim=1) / length.clamp_min(1.0),
        }
        if experience.greedy is not None:
            columns["greedy_score"] = experience.greedy.require("scores")
        sums = [column.double().sum() for column in columns.values()]
        counts = [sums[0].new_tensor(len(column)) for column in columns.values()]
        totals, rows = self.all_reduce_sum(torch.stack([torch.stack(sums), torch.stack(counts)])).tolist()
        return {name: total / n for name, total, n in zip(columns, totals, rows, strict=True)}

    def log_probs(self, minibatch: Experience) -> Tensor:
        """Return ``[B, T]`` log-probs of the responses under the current policy; the gradient flows through them."""
        return self.read_for_loss(("actor",), minibatch)["actor"]

    def log_training(self, values: dict[str, Tensor], batch_size: int) -> None:
        """Log a minibatch's losses and statistics under ``train/``, averaged over the iteration and all ranks."""
        means = self.mean_over_ranks({name: value.detach() for name, value in values.items()})
        self.log_all("train", means, batch_size=batch_size, on_step=False, on_epoch=True)

    # ---- Lightning ---------------------------------------------------------------------------------------------

    def training_step(self, batch: Experience, batch_idx: int) -> Tensor:
        """Return the minibatch's loss; Lightning does backward, clipping and the step."""
        loss = self.loss(batch)
        self._carried.drop()  # where the loss did not ask for it
        self.log_training({"loss": loss}, len(batch))
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Sample on held-out prompts; log score, KL and length."""
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """As validation, under ``test/``."""
        self._evaluate(batch, "test")

    @torch.no_grad()
    def _evaluate(self, batch: dict[str, Any], prefix: str) -> None:
        with phase(self, "evaluation"):
            experience = self.generate(batch)
            self.score(experience, batch)
        self.log_all(prefix, self.rollout_metrics(experience), batch_size=len(experience), on_step=False, on_epoch=True)

    @torch.no_grad()
    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, str]]:
        """Return prompts and sampled responses as text."""
        responses = self.generate(batch).decode(self.tokenizer)
        return [{"prompt": p, "response": r} for p, r in zip(batch["prompts"], responses, strict=True)]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the controllers' state, plain numbers only."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["controllers"] = {
            "kl": self.kl.state_dict(),
            "reward_scaler": self.reward_scaler.state_dict(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over the controllers' state."""
        super().on_load_checkpoint(checkpoint)
        self.kl.load_state_dict(checkpoint["controllers"]["kl"])
        self.reward_scaler.load_state_dict(checkpoint["controllers"]["reward_scaler"])
