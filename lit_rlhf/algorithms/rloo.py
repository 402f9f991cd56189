"""RLOO: the other responses to the same prompt are the baseline. No critic."""

from typing import Any

from torch import Tensor

from lit_rlhf.algorithms.on_policy import OnPolicyModule
from lit_rlhf.algorithms.settings import out_of_range
from lit_rlhf.functional import clipped_policy_loss, leave_one_out, masked_sum
from lit_rlhf.rollout import Experience


class RLOO(OnPolicyModule):
    """REINFORCE leave-one-out over K responses per prompt.

    Paper    Ahmadian et al. 2024, arXiv:2402.14740, section 2.3
    Departs  Tokens are averaged over the minibatch, not summed per response: the gradient's direction is the same.
             The ratio is clipped, which changes nothing at one update per rollout and guards further ones.
    Overrides
        estimate     R = score - beta * sum_t KL_t; advantage = R minus the mean R of the prompt's other responses
        policy_loss  clipped policy loss

    Args:
        samples_per_prompt: Responses to each prompt (K), at least 2.
        clip: Range of the policy ratio.
        **kwargs: See :class:`OnPolicyModule`.
    """

    def __init__(self, samples_per_prompt: int = 4, clip: float = 0.2, **kwargs: Any) -> None:
        super().__init__(samples_per_prompt=samples_per_prompt, **kwargs)
        self.clip = clip

    def problems(self) -> list[str]:
        """Add RLOO's own settings."""
        return super().problems() + self.needs_groups() + out_of_range(self, positive=("clip",))

    def estimate(self, experience: Experience) -> None:
        """Fill advantages, the same for every token of a response."""
        mask = experience.mask
        penalty = masked_sum(self.kl_penalty(experience), mask, dim=1)
        rewards = self.shaped_scores(experience) - self.kl.value * penalty
        experience.advantages = leave_one_out(rewards, self.samples_per_prompt)[:, None] * mask

    def policy_loss(self, log_probs: Tensor, minibatch: Experience) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the clipped policy loss of ``[B, T]`` log-probs, and its statistics."""
        b = minibatch
        loss, stats = clipped_policy_loss(log_probs, b.log_probs, b.advantages, b.mask, self.clip, count=b.count)
        return loss, {"policy_loss": loss.detach(), **stats}
