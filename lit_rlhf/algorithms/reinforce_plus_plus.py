"""REINFORCE++: reward-to-go with token KL, normalized over the whole batch, and PPO's clip. No critic."""

from typing import Any

from torch import Tensor

from lit_rlhf.algorithms.on_policy import OnPolicyModule
from lit_rlhf.algorithms.settings import out_of_range
from lit_rlhf.functional import clipped_policy_loss, finish_moments, moments, returns_to_go, token_rewards, whiten
from lit_rlhf.rollout import Experience


class ReinforcePlusPlus(OnPolicyModule):
    """REINFORCE++ on any layout.

    Paper    Hu 2025, arXiv:2501.03262
    Overrides
        estimate     advantage = reward-to-go of (score at the last token - beta * KL_t), whitened over all ranks
        policy_loss  clipped policy loss

    Args:
        gamma: Discount.
        clip: Range of the policy ratio.
        **kwargs: See :class:`OnPolicyModule`.
    """

    def __init__(self, gamma: float = 1.0, clip: float = 0.2, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.gamma = gamma
        self.clip = clip

    def problems(self) -> list[str]:
        """Add REINFORCE++'s own settings."""
        return super().problems() + out_of_range(self, unit=("gamma",), positive=("clip",))

    def estimate(self, experience: Experience) -> None:
        """Fill advantages."""
        e = experience
        rewards = token_rewards(self.shaped_scores(e), self.kl_penalty(e), e.mask, self.kl.value)
        returns = returns_to_go(rewards, e.mask, self.gamma)
        mean, var = finish_moments(self.all_reduce_sum(moments(returns, e.mask)))
        e.advantages = whiten(returns, e.mask, mean=mean, var=var)

    def policy_loss(self, log_probs: Tensor, minibatch: Experience) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the clipped policy loss of ``[B, T]`` log-probs, and its statistics."""
        b = minibatch
        loss, stats = clipped_policy_loss(log_probs, b.log_probs, b.advantages, b.mask, self.clip, count=b.count)
        return loss, {"policy_loss": loss.detach(), **stats}
