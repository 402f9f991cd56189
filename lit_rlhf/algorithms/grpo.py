"""GRPO: outcome rewards normalized within the responses to a prompt. No critic."""

from typing import Any

from torch import Tensor

from lit_rlhf.algorithms.on_policy import OnPolicyModule
from lit_rlhf.algorithms.settings import out_of_range
from lit_rlhf.functional import (
    Aggregation,
    KLEstimator,
    aggregate,
    clipped_policy_loss,
    group_normalize,
    kl_estimate,
)
from lit_rlhf.renamed import renamed
from lit_rlhf.rollout import Experience


@renamed(normalise_by_std="normalize_by_std")
class GRPO(OnPolicyModule):
    """Group relative policy optimization, outcome supervision.

    Paper    Shao et al. 2024 (DeepSeekMath), arXiv:2402.03300, Eq. 3 and 4
    Departs  The reference is never refreshed (the paper's outer loop does).
    Overrides
        estimate     advantage = (score - group mean) / (group deviation + 1e-4), the same for every token of a
                     response; the deviation is the unbiased one
        policy_loss  clipped policy loss + beta * k3(pi || pi_ref): the penalty is in the loss, not in the reward

    Args:
        samples_per_prompt: Responses to each prompt (K), at least 2.
        clip: Range of the policy ratio.
        normalize_by_std: Divide by the group's deviation; False is half of Dr. GRPO
            (Liu et al. 2025, arXiv:2503.20783), whose constant length as the divisor is not offered.
        aggregation: ``response`` averages each response's tokens first (the paper), ``token`` weights all equally.
        kl_estimator: Per-token KL estimate in the loss: k3 or k2.
        **kwargs: See :class:`OnPolicyModule`.
    """

    def __init__(
        self,
        samples_per_prompt: int = 4,
        clip: float = 0.2,
        normalize_by_std: bool = True,
        aggregation: Aggregation = "response",
        kl_estimator: KLEstimator = "k3",
        **kwargs: Any,
    ) -> None:
        super().__init__(samples_per_prompt=samples_per_prompt, kl_estimator=kl_estimator, **kwargs)
        self.clip = clip
        self.normalize_by_std = normalize_by_std
        self.aggregation: Aggregation = aggregation

    def problems(self) -> list[str]:
        """Add GRPO's own settings."""
        found = super().problems() + self.needs_groups() + out_of_range(self, positive=("clip",))
        if self.kl_estimator == "k1":
            found.append("kl_estimator k1 has no gradient on average as a loss; use k3 or k2")
        return found

    def estimate(self, experience: Experience) -> None:
        """Fill advantages."""
        e = experience
        advantages = group_normalize(self.shaped_scores(e), self.samples_per_prompt, self.normalize_by_std)
        e.advantages = advantages[:, None] * e.mask

    def policy_loss(self, log_probs: Tensor, minibatch: Experience) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the clipped policy loss plus the KL penalty, of ``[B, T]`` log-probs."""
        b = minibatch
        # Response means are divided by the number of responses, equal in all minibatches on all ranks: no count.
        count = b.count if self.aggregation == "token" else None
        policy_loss, stats = clipped_policy_loss(
            log_probs, b.log_probs, b.advantages, b.mask, self.clip, aggregation=self.aggregation, count=count
        )
        kl_loss = aggregate(
            kl_estimate(log_probs, b.ref_log_probs, b.mask, self.kl_estimator), b.mask, self.aggregation, count=count
        )
        stats = {"policy_loss": policy_loss.detach(), "kl_loss": kl_loss.detach(), **stats}
        return policy_loss + self.kl.value * kl_loss, stats
