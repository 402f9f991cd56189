"""REINFORCE++: reward-to-go with token KL, normalised over the whole batch, and PPO's clip. No critic."""

from typing import Any

from torch import Tensor

from lit_rlhf.algorithms.on_policy import OnPolicyModule
from lit_rlhf.algorithms.ranges import out_of_range
from lit_rlhf.functional import clipped_policy_loss, finish_moments, moments, returns_to_go, token_rewards, whiten
from lit_rlhf.rollout import Experience


class ReinforcePlusPlus(OnPolicyModule):
    """REINFORCE++ on any layout.

    Paper    Hu 2025, arXiv:2501.03262
    Overrides
        estimate  advantage = reward-to-go of (score at the last token - beta * KL_t), whitened over all ranks
        loss      clipped policy loss

    Args:
        gamma: Discount.
        clip: Range of the policy ratio.
        **kwargs: See :class:`OnPolicyModule`.
    """

    def __init__(self, gamma: float = 1.0, clip: float = 0.2, **kwargs: Any) -> None:
        self.gamma = gamma
        self.clip = clip
        super().__init__(**kwargs)

    def problems(self) -> list[str]:
        """Add REINFORCE++'s own settings."""
        return super().problems() + out_of_range(self, unit=("gamma",), positive=("clip",))

    def estimate(self, experience: Experience) -> None:
        """Fill advantages."""
        mask = experience.mask
        rewards = token_rewards(self.shaped_scores(experience), self.kl_penalty(experience), mask, self.kl.value)
        returns = returns_to_go(rewards, mask, self.gamma)
        mean, var = finish_moments(self.all_reduce_sum(moments(returns, mask)))
        experience.advantages = whiten(returns, mask, mean=mean, var=var)

    def loss(self, minibatch: Experience) -> Tensor:
        """Return the clipped policy loss."""
        b = minibatch
        loss, stats = clipped_policy_loss(
            self.log_probs(b), b.require("log_probs"), b.require("advantages"), b.mask, self.clip, count=b.count
        )
        self.log_training({"policy_loss": loss, **stats}, len(b))
        return loss
