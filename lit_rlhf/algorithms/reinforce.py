"""REINFORCE with a learned value baseline: the RL step of PE-RLHF."""

from torch import Tensor

from lit_rlhf.algorithms.actor_critic import ActorCriticModule
from lit_rlhf.functional import policy_gradient_loss, returns_to_go, token_rewards
from lit_rlhf.rollout import Experience


class Reinforce(ActorCriticModule):
    """REINFORCE with the critic's value as baseline; no ratio, no clipping of the policy.

    Paper    Sidahmed et al. 2024 (PE-RLHF), arXiv:2403.10704, section on reinforcement learning; Williams 1992
    Overrides
        estimate     advantage = reward-to-go minus the critic's value, not whitened
        policy_loss  -A * log pi, mean over tokens

    One update per rollout is on-policy: set ``trainer.accumulate_grad_batches`` to rollout_size / minibatch_size.

    Args:
        **kwargs: See :class:`ActorCriticModule` and :class:`OnPolicyModule`.
    """

    one_update = True

    def estimate(self, experience: Experience) -> None:
        """Fill returns (reward-to-go) and advantages."""
        e = experience
        rewards = token_rewards(self.shaped_scores(e), self.kl_penalty(e), e.mask, self.kl.value)
        returns = returns_to_go(rewards, e.mask, self.gamma)
        self.set_returns(e, returns)
        e.advantages = returns - e.values

    def policy_loss(self, log_probs: Tensor, minibatch: Experience) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the policy gradient's loss of ``[B, T]`` log-probs."""
        b = minibatch
        loss = policy_gradient_loss(log_probs, b.advantages, b.mask, count=b.count)
        return loss, {"policy_loss": loss.detach()}
