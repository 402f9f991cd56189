"""Proximal policy optimisation from a rollout buffer, on any layout."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lit_rlhf.algorithms.actor_critic import ActorCriticModule, drop_gradients
from lit_rlhf.algorithms.ranges import out_of_range
from lit_rlhf.functional import (
    clipped_policy_loss,
    entropy_bonus,
    finish_moments,
    gae,
    moments,
    token_rewards,
    whiten,
)
from lit_rlhf.rollout import Experience


class PPO(ActorCriticModule):
    """PPO with a token-level KL penalty and a learned critic.

    Paper    Schulman et al. 2017, arXiv:1707.06347, Eq. 7; Hydra-PPO and J-Hydra-PPO (layouts ``hydra`` and
             ``j_hydra``): Santacroce et al. 2023, arXiv:2309.00754
    Overrides
        estimate  token rewards, GAE, advantages whitened over all ranks
        loss      clipped policy loss + value_coef * clipped value loss - entropy_coef * entropy

    Args:
        gae_lambda: GAE's lambda.
        clip: Range of the policy ratio.
        entropy_coef: Weight of the entropy bonus.
        target_kl: Skip the rest of an iteration's minibatches once the policy moved this far (k3, per token) from
            the one that sampled; None never does.
        **kwargs: See :class:`ActorCriticModule` and :class:`OnPolicyModule`.
    """

    def __init__(
        self,
        gae_lambda: float = 0.95,
        clip: float = 0.2,
        entropy_coef: float = 0.0,
        target_kl: float | None = None,
        **kwargs: Any,
    ) -> None:
        self.gae_lambda = gae_lambda
        self.clip = clip
        self.entropy_coef = entropy_coef
        self.target_kl = target_kl
        self._skip_rest = self._skipping = False
        super().__init__(**kwargs)

    def problems(self) -> list[str]:
        """Add PPO's own settings."""
        return super().problems() + out_of_range(
            self, unit=("gae_lambda",), positive=("clip", "target_kl"), not_negative=("entropy_coef",)
        )

    def reading_options(self) -> dict[str, Any]:
        """Add the entropy, where it has a weight."""
        return {**super().reading_options(), "entropy": self.entropy_coef > 0}

    def estimate(self, experience: Experience) -> None:
        """Fill advantages (whitened over real tokens of all ranks) and returns (from the raw advantages)."""
        mask, values = experience.mask, experience.require("values")
        rewards = token_rewards(self.shaped_scores(experience), self.kl_penalty(experience), mask, self.kl.value)
        advantages, returns = gae(rewards, values, mask, self.gamma, self.gae_lambda)
        self.set_returns(experience, returns)
        mean, var = finish_moments(self.all_reduce_sum(moments(advantages, mask)))
        experience.advantages = whiten(advantages, mask, mean=mean, var=var)

    def loss(self, minibatch: Experience) -> Tensor:
        """Return policy, value and entropy losses in one: Lightning runs one backward pass."""
        b = minibatch
        read, value_loss, value_stats = self.read(b)
        policy_loss, policy_stats = clipped_policy_loss(
            read["actor"], b.require("log_probs"), b.require("advantages"), b.mask, self.clip, count=b.count
        )
        loss = policy_loss + value_loss
        if "entropy" in read:
            loss = loss - self.entropy_coef * entropy_bonus(read["entropy"], b.mask, count=b.count)
        self.log_training({"policy_loss": policy_loss, **policy_stats, **value_stats}, len(b))
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
        # DDP wants every parameter in the graph; sharded ones need no gradient, and the value head is not sharded here.
        parameters = self.backbone.heads.parameters() if self.backbone.is_sharded else self.backbone.parameters()
        return torch.stack([p.sum() for p in parameters if p.requires_grad]).sum() * 0.0

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Once the KL target was passed, no parameter moves."""
        super().on_before_optimizer_step(optimizer)
        if self._skipping:
            drop_gradients(optimizer.param_groups)
