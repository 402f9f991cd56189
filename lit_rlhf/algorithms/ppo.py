"""Proximal policy optimisation from a rollout buffer, on any layout."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from lit_rlhf.algorithms.on_policy import OnPolicyModule
from lit_rlhf.functional import (
    clipped_policy_loss,
    clipped_value_loss,
    entropy_bonus,
    finish_moments,
    gae,
    moments,
    token_rewards,
    whiten,
)
from lit_rlhf.rollout import Experience


class PPO(OnPolicyModule):
    """PPO with a token-level KL penalty and a learned critic.

    Paper    Schulman et al. 2017, arXiv:1707.06347, Eq. 7; Hydra-PPO and J-Hydra-PPO (layouts ``hydra`` and
             ``j_hydra``): Santacroce et al. 2023, arXiv:2309.00754
    Overrides
        estimate  token rewards, GAE, advantages whitened over all ranks
        loss      clipped policy loss + value_coef * clipped value loss - entropy_coef * entropy

    Args:
        gamma: Discount.
        gae_lambda: GAE's lambda.
        clip: Range of the policy ratio.
        value_clip: Range of the values around the old ones; None does not clip.
        value_coef: Weight of the value loss.
        entropy_coef: Weight of the entropy bonus.
        critic_lr: Learning rate of the critic's own parameters; None uses the optimizer's.
        target_kl: Skip the rest of an iteration's minibatches once the policy moved this far (k3, per token) from
            the one that sampled; None never does.
        critic_warmup_iterations: First iterations, in which only the critic's own parameters are updated.
        **kwargs: See :class:`OnPolicyModule`.
    """

    roles: ClassVar[tuple[str, ...]] = ("actor", "critic", "reference")

    def __init__(
        self,
        gamma: float = 1.0,
        gae_lambda: float = 0.95,
        clip: float = 0.2,
        value_clip: float | None = 0.2,
        value_coef: float = 0.1,
        entropy_coef: float = 0.0,
        critic_lr: float | None = None,
        target_kl: float | None = None,
        critic_warmup_iterations: int = 0,
        **kwargs: Any,
    ) -> None:
        self.gamma = gamma
        self.gae_lambda = gae_lambda
        self.clip = clip
        self.value_clip = value_clip
        self.value_coef = value_coef
        self.entropy_coef = entropy_coef
        self.critic_lr = critic_lr
        self.target_kl = target_kl
        self.critic_warmup_iterations = critic_warmup_iterations
        self._skip_rest = self._skipping = False
        super().__init__(**kwargs)

    def problems(self) -> list[str]:
        """Add PPO's own settings."""
        found = super().problems()
        for name in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, name) <= 1:
                found.append(f"{name} must be in [0, 1], got {getattr(self, name)}")
        for name in ("clip", "value_clip", "critic_lr", "target_kl"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                found.append(f"{name} must be positive, got {value}")
        for name in ("value_coef", "entropy_coef", "critic_warmup_iterations"):
            if getattr(self, name) < 0:
                found.append(f"{name} must not be negative, got {getattr(self, name)}")
        return found

    def estimate(self, experience: Experience) -> None:
        """Fill advantages (whitened over real tokens of all ranks) and returns (from the raw advantages)."""
        mask, values = experience.mask, experience.require("values")
        rewards = token_rewards(self.shaped_scores(experience), self.kl_penalty(experience), mask, self.kl.value)
        advantages, experience.returns = gae(rewards, values, mask, self.gamma, self.gae_lambda)
        mean, var = finish_moments(self.all_reduce_sum(moments(advantages, mask)))
        experience.advantages = whiten(advantages, mask, mean=mean, var=var)

    def loss(self, minibatch: Experience) -> Tensor:
        """Return policy, value and entropy losses in one: Lightning runs one backward pass."""
        b, with_entropy = minibatch, self.entropy_coef > 0
        read = self.backbone(("actor", "critic"), b.tokens, b.attention_mask, b.mask, entropy=with_entropy)
        policy_loss, policy_stats = clipped_policy_loss(
            read["actor"], b.require("log_probs"), b.require("advantages"), b.mask, self.clip
        )
        value_loss, value_stats = clipped_value_loss(
            read["critic"], b.require("values"), b.require("returns"), b.mask, self.value_clip
        )
        loss = policy_loss + self.value_coef * value_loss
        if with_entropy:
            loss = loss - self.entropy_coef * entropy_bonus(read["entropy"], b.mask)
        stats = {
            "policy_loss": policy_loss.detach(),
            "value_loss": value_loss.detach(),
            **policy_stats,
            **value_stats,
        }
        self.log_all("train", stats, batch_size=len(b), on_step=False, on_epoch=True, sync_dist=True)
        self._watch_kl(policy_stats["approx_kl"])
        return loss

    def _watch_kl(self, approx_kl: Tensor) -> None:
        if self.target_kl is not None:
            mean = self.all_reduce_sum(approx_kl) / self.trainer.world_size
            self._skip_rest = bool(mean > self.target_kl)

    def on_train_epoch_start(self) -> None:
        """Begin the iteration with every minibatch wanted."""
        self._skip_rest = False

    def training_step(self, batch: Experience, batch_idx: int) -> Tensor:
        """Once the KL target was passed, skip the iteration's other minibatches: no pass, and no optimizer step.

        Lightning's own way to skip (returning -1 or None) would drop the epoch's validation, or fail under DDP.
        """
        self._skipping = self._skip_rest
        if not self._skipping:
            return super().training_step(batch, batch_idx)
        return torch.stack([p.sum() for p in self.backbone.parameters() if p.requires_grad]).sum() * 0.0

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return two groups: the actor's parameters, and those only the critic reads."""
        actor = self.backbone.role_parameters("actor")
        own = {name: p for name, p in self.backbone.role_parameters("critic").items() if name not in actor}
        critic: dict[str, Any] = {"params": list(own.values())}
        if self.critic_lr is not None:
            critic["lr"] = self.critic_lr
        return [{"params": list(actor.values())}, critic]

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Leave parameters without gradients where nothing may move them: no step, no decay, no momentum.

        These are the actor's during the critic's warm-up, and all once the KL target was passed.
        """
        if self._skipping:
            frozen = optimizer.param_groups
        else:
            frozen = optimizer.param_groups[: int(self.current_epoch < self.critic_warmup_iterations)]
        for group in frozen:
            for parameter in group["params"]:
                parameter.grad = None
