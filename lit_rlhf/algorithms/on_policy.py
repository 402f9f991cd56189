"""The base of on-policy algorithms: rollout, estimate, loss, in this order."""

import os
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback
from torch import Tensor

from lit_rlhf.algorithms.base import BackboneModule
from lit_rlhf.backbone import LAYOUTS, Layout, LoraArgs
from lit_rlhf.callbacks import PhaseTimer, SampleTable, TrainingPhase, phase
from lit_rlhf.functional import AdaptiveKL, FixedKL, KLController, KLEstimator, kl_estimate, masked_sum
from lit_rlhf.rollout import (
    Experience,
    Reward,
    RewardScaler,
    RewardScaling,
    RoleReward,
    RolloutBuffer,
    Sampling,
    Scored,
    concatenate,
    generate,
)


class OnPolicyModule(BackboneModule):
    """Alternates rollouts and updates; one Lightning epoch is one iteration.

    A new algorithm overrides one to three hooks: :meth:`sample` (which responses), :meth:`estimate` (rewards and
    advantages) and :meth:`loss`. It runs on every layout.

    Args:
        layout: Which trunk, LoRA set and head each role reads: ``full``, ``lora``, ``dynamic_lora``, ``pe``,
            ``j_hydra`` or ``hydra``.
        lora: The trained LoRA sets; None is ``LoraArgs()``. Not used by ``full``, which trains whole trunks.
        reward_checkpoint: Reward-model checkpoint; None reads the policy checkpoint's own reward head (Hydra-SFT).
        reward: What rates responses; None is the layout's reward role.
        sampling: How responses are sampled.
        rollout_size: Prompts a rank draws for one iteration.
        minibatch_size: Samples in one minibatch; divides ``rollout_size``.
        inner_epochs: Passes over each rollout.
        rollout_batch_size: Samples generated and scored at once; None takes the whole rollout.
        kl: Controller of the KL penalty's coefficient; None is ``FixedKL(0.05)``.
        kl_estimator: Per-token KL estimate in the penalty.
        score_clip: Clip scores to ``[-score_clip, score_clip]`` after scaling; None does not.
        reward_scaling: ``batch`` whitens the scores of each rollout, ``running`` divides by their deviation so far.
        missing_eos_penalty: Subtracted from the score of a response that hit the length limit.
        log_samples: Sample responses to log each iteration.
        seed: Base seed of the rollouts; every iteration reseeds from (seed, iteration, rank). None takes the seed of
            ``seed_everything``, or 0.
        **kwargs: See :class:`BackboneModule`.
    """

    lr_interval: ClassVar[str] = "epoch"
    progress_metrics: ClassVar[frozenset[str]] = frozenset({"rollout/score", "rollout/kl", "train/value_loss"})
    roles: ClassVar[tuple[str, ...]] = ("actor", "reference")

    def __init__(
        self,
        layout: str = "hydra",
        lora: LoraArgs | None = None,
        reward_checkpoint: str | None = None,
        reward: Reward | None = None,
        sampling: Sampling | None = None,
        rollout_size: int = 32,
        minibatch_size: int = 8,
        inner_epochs: int = 1,
        rollout_batch_size: int | None = None,
        kl: KLController | None = None,
        kl_estimator: KLEstimator = "k1",
        score_clip: float | None = None,
        reward_scaling: RewardScaling = "none",
        missing_eos_penalty: float = 0.0,
        log_samples: int = 8,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        # `full` ignores LoRA settings rather than refusing them, so that changing the layout is a one-line change.
        super().__init__(lora=None if layout == "full" else lora or LoraArgs(), **kwargs)
        self.spec.reward_checkpoint = reward_checkpoint
        self.layout = layout
        self.reward = reward or RoleReward()
        self.sampling = sampling or Sampling()
        self.temperature = self.sampling.temperature
        self.rollout_size = rollout_size
        self.minibatch_size = minibatch_size
        self.inner_epochs = inner_epochs
        self.rollout_batch_size = rollout_batch_size or rollout_size
        self.kl = kl or FixedKL(0.05)
        self.kl_estimator: KLEstimator = kl_estimator
        self.score_clip = score_clip
        self.reward_scaler = RewardScaler(reward_scaling)
        self.missing_eos_penalty = missing_eos_penalty
        self.log_samples = log_samples
        if problems := self.problems():
            raise ValueError("invalid configuration:\n" + "\n".join(f"  - {problem}" for problem in problems))
        base_seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) if seed is None else seed
        self.rollout_buffer = RolloutBuffer(rollout_size, minibatch_size, inner_epochs, base_seed)

    def problems(self) -> list[str]:
        """Return everything wrong with the settings, one line each; subclasses add their own."""
        found = self.sampling.problems()
        if self.layout not in LAYOUTS:
            found.append(f"layout must be one of {', '.join(LAYOUTS)}; got {self.layout!r}")
        for name in ("rollout_size", "minibatch_size", "inner_epochs", "rollout_batch_size"):
            if getattr(self, name) < 1:
                found.append(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.minibatch_size > 0 and self.rollout_size % self.minibatch_size:
            found.append(f"rollout_size {self.rollout_size} must be a multiple of minibatch_size {self.minibatch_size}")
        if isinstance(self.kl, AdaptiveKL) and self.rollout_size >= 5 * self.kl.horizon:
            found.append(f"kl.horizon {self.kl.horizon:g} must be above a fifth of rollout_size {self.rollout_size}")
        if self.score_clip is not None and self.score_clip <= 0:
            found.append(f"score_clip must be positive, got {self.score_clip}")
        return found

    def make_layout(self) -> Layout:
        """Return the named layout, restricted to the roles this algorithm and its reward read."""
        roles = self.roles + (("reward",) if self.reward.needs_reward_role else ())
        return LAYOUTS[self.layout].restricted_to(roles)

    def configure_callbacks(self) -> list[Callback]:
        """Put the rollout buffer in place; the user's YAML need not name it."""
        return [self.rollout_buffer, TrainingPhase(), PhaseTimer(), SampleTable(self.log_samples)]

    # ---- one iteration -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def rollout(self, prompts: dict[str, Any]) -> tuple[Experience, list[dict[str, Any]]]:
        """Collect one iteration's experience: sample, score, estimate.

        Args:
            prompts: A prompt batch: ``tokens`` [N, P] long, ``attention_mask`` [N, P] bool, ``prompts``, ``columns``.

        Returns:
            The experience, ready for :meth:`loss`, and its samples as text for logging.
        """
        with phase(self, "generation"):
            experience = self.sample(prompts)
        with phase(self, "scoring"):
            responses = experience.decode(self.tokenizer)
            self.score(experience, prompts, responses)
            self.estimate(experience)
        metrics = self.rollout_metrics(experience)
        self.log_all("rollout", metrics)
        self.kl.update(float(metrics["kl"]), len(experience) * self.trainer.world_size)
        scores = experience.require("scores").tolist()
        rows = zip(prompts["prompts"], responses, scores, strict=True)
        return experience, [{"prompt": p, "response": r, "score": s} for p, r, s in rows]

    def sample(self, prompts: dict[str, Any]) -> Experience:
        """Hook: sample responses. Returns the experience with its sequence fields filled."""
        return self.generate(prompts)

    def estimate(self, experience: Experience) -> None:
        """Hook: fill ``advantages`` (and ``returns``) from scores, log-probs and values."""
        raise NotImplementedError(f"{type(self).__name__} must define estimate")

    def loss(self, minibatch: Experience) -> Tensor:
        """Hook: return the loss of one minibatch."""
        raise NotImplementedError(f"{type(self).__name__} must define loss")

    def generate(self, prompts: dict[str, Any], greedy: bool = False) -> Experience:
        """Sample (or decode greedily) one response a prompt with the current actor."""
        with self.backbone.use("actor") as model:
            return generate(
                model,
                prompts["tokens"],
                prompts["attention_mask"],
                self.sampling,
                self.pad_id,
                self.eos_ids,
                greedy,
                self.rollout_batch_size,
            )

    @torch.no_grad()
    def score(self, experience: Experience, prompts: dict[str, Any], responses: list[str]) -> None:
        """Fill log-probs, reference log-probs, values and scores; one trunk pass per (trunk, LoRA set)."""
        roles = tuple(self.backbone.layout.roles)
        chunks = experience.split(self.rollout_batch_size)
        read = concatenate([self.backbone(roles, c.tokens, c.attention_mask, c.mask) for c in chunks])
        experience.log_probs, experience.ref_log_probs = read["actor"], read["reference"]
        experience.values = read.get("critic")
        scored = Scored(prompts["prompts"], responses, prompts["columns"], read.get("reward"))
        experience.scores = self.reward.score(scored).to(experience.tokens.device)

    def shaped_scores(self, experience: Experience) -> Tensor:
        """Return ``[N]`` scores as they enter the token rewards: scaled, clipped, less the missing-EOS penalty."""
        scores = self.reward_scaler(experience.require("scores"), self.all_reduce_sum)
        if self.score_clip is not None:
            scores = scores.clamp(-self.score_clip, self.score_clip)
        return scores - self.missing_eos_penalty * experience.truncated.to(scores.dtype)

    def kl_penalty(self, experience: Experience) -> Tensor:
        """Return ``[N, T]`` per-token KL estimates of the sampling policy to the reference."""
        log_probs, reference = experience.require("log_probs"), experience.require("ref_log_probs")
        return kl_estimate(log_probs, reference, experience.mask, self.kl_estimator)

    def rollout_metrics(self, experience: Experience) -> dict[str, Tensor | float]:
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
        stacked = torch.stack(
            [column.double().sum() for column in columns.values()] + [length.new_tensor(len(length)).double()]
        )
        *sums, count = self.all_reduce_sum(stacked).tolist()
        return {
            **{name: total / count for name, total in zip(columns, sums, strict=True)},
            "kl_coef": self.kl.value,
        }

    # ---- Lightning ---------------------------------------------------------------------------------------------

    def training_step(self, batch: Experience, batch_idx: int) -> Tensor:
        """Return the minibatch's loss; Lightning does backward, clipping and the step."""
        loss = self.loss(batch)
        self.log("train/loss", loss.detach(), batch_size=len(batch), on_step=False, on_epoch=True, sync_dist=True)
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
            self.score(experience, batch, experience.decode(self.tokenizer))
        metrics = self.rollout_metrics(experience)
        del metrics["kl_coef"]
        self.log_all(prefix, metrics, batch_size=len(experience), on_step=False, on_epoch=True)

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
