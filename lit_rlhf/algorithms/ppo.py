"""Proximal policy optimization from a rollout buffer, on any layout."""

from typing import Any

from lightning.pytorch import Callback
from torch import Tensor

from lit_rlhf.algorithms.actor_critic import ActorCriticModule
from lit_rlhf.algorithms.settings import out_of_range
from lit_rlhf.callbacks import KLTarget
from lit_rlhf.functional import clipped_policy_loss, finish_moments, gae, moments, token_rewards, whiten
from lit_rlhf.rollout import Experience


class PPO(ActorCriticModule):
    """PPO with a token-level KL penalty and a learned critic.

    Paper    Schulman et al. 2017, arXiv:1707.06347, Eq. 7; Hydra-PPO and J-Hydra-PPO (layouts ``hydra`` and
             ``j_hydra``): Santacroce et al. 2023, arXiv:2309.00754
    Departs  The KL penalty is in the reward (Ziegler et al. 2019, arXiv:1909.08593), advantages are whitened, and the
             value loss is clipped; Eq. 9 has none of these.
    Overrides
        estimate     R_t = [t is the last token] * score - beta * KL_t; GAE, with the value 0 behind the last token,
                     truncated or not; returns = advantages + values, then advantages whitened over all ranks' tokens
        policy_loss  max(-A * ratio, -A * clip(ratio, 1 - clip, 1 + clip)), mean over tokens
    Inherits         the clipped value loss and the entropy bonus of :class:`ActorCriticModule`

    Args:
        gae_lambda: GAE's lambda.
        clip: Range of the policy ratio.
        target_kl: Skip the rest of an iteration's minibatches once the policy moved this far (k3, per token, averaged
            over ranks) from the one that sampled; None never does. It is measured after each minibatch, whose own step
            stays; of an accumulated step that is under way nothing stays.
        **kwargs: See :class:`ActorCriticModule` and :class:`OnPolicyModule`.
    """

    def __init__(
        self, gae_lambda: float = 0.95, clip: float = 0.2, target_kl: float | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.gae_lambda = gae_lambda
        self.clip = clip
        self.target_kl = target_kl

    def problems(self) -> list[str]:
        """Add PPO's own settings."""
        return super().problems() + out_of_range(self, unit=("gae_lambda",), positive=("clip", "target_kl"))

    def configure_callbacks(self) -> list[Callback]:
        """Add the KL target's early stop."""
        return super().configure_callbacks() + ([] if self.target_kl is None else [KLTarget(self.target_kl)])

    def estimate(self, experience: Experience) -> None:
        """Fill advantages (whitened over real tokens of all ranks) and returns (from the raw advantages)."""
        e = experience
        rewards = token_rewards(self.shaped_scores(e), self.kl_penalty(e), e.mask, self.kl.value)
        advantages, returns = gae(rewards, e.values, e.mask, self.gamma, self.gae_lambda)
        self.set_returns(e, returns)
        mean, var = finish_moments(self.all_reduce_sum(moments(advantages, e.mask)))
        e.advantages = whiten(advantages, e.mask, mean=mean, var=var)

    def policy_loss(self, log_probs: Tensor, minibatch: Experience) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the clipped policy loss of ``[B, T]`` log-probs, and its statistics."""
        b = minibatch
        loss, stats = clipped_policy_loss(log_probs, b.log_probs, b.advantages, b.mask, self.clip, count=b.count)
        return loss, {"policy_loss": loss.detach(), **stats}
