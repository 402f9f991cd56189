"""ReMax: REINFORCE with the greedy response's reward as baseline. No critic."""

from typing import Any

from torch import Tensor

from lit_rlhf.algorithms.on_policy import OnPolicyModule
from lit_rlhf.algorithms.settings import out_of_range
from lit_rlhf.functional import policy_gradient_loss, remax_returns, returns_to_go
from lit_rlhf.rollout import Experience, PromptBatch


class ReMax(OnPolicyModule):
    """ReMax on any layout; the layout's critic is never built.

    Paper    Li et al. 2023, arXiv:2310.10505, Algorithm 1
    Code     liziniu/ReMax; its KL (each token's own), its clamp at 5 and its gamma^1 at the last token are the defaults
    Departs  Algorithm 1 has no discount, clamp or KL per token; tokens are averaged, not summed per response.
    Overrides
        sample       one greedy response per prompt, decoded in the same call; K samples share it; it only gets a reward
        estimate     G_t = gamma^(T - t + 1) * A - beta * KL_t, A = clip(r(x, y) - r(x, y_greedy)), kept as advantages
        policy_loss  -G_t * log pi(y_t), mean over tokens

    One update per rollout is on-policy: set ``trainer.accumulate_grad_batches`` to rollout_size / minibatch_size. The
    authors' settings: top_p 0.9, temperature 1, learning rate 1e-6 (full fine-tuning), cosine schedule, beta 0.05.

    Args:
        gamma: Discount.
        advantage_clip: Clip A to ``[-advantage_clip, advantage_clip]``; None does not.
        kl_to_go: Sum the KL penalty (discounted by gamma) from each token to the end instead of taking the token's
            own; with gamma 1 and no advantage_clip that is verl's interpretation of the paper.
        **kwargs: See :class:`OnPolicyModule`.
    """

    one_update = True

    def __init__(
        self, gamma: float = 0.99, advantage_clip: float | None = 5.0, kl_to_go: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.gamma = gamma
        self.advantage_clip = advantage_clip
        self.kl_to_go = kl_to_go

    def problems(self) -> list[str]:
        """Add ReMax's own settings."""
        own = out_of_range(self, unit=("gamma",), positive=("advantage_clip",))
        return super().problems() + own

    def sample(self, prompts: PromptBatch) -> Experience:
        """Sample, and decode each prompt greedily too."""
        return self.generate(prompts, self.samples_per_prompt, greedy=True)

    def estimate(self, experience: Experience) -> None:
        """Fill advantages with the returns G_t, which have the baseline in them."""
        e = experience
        baseline = self.shaped_scores(e.greedy).repeat_interleave(self.samples_per_prompt)
        gain = self.shaped_scores(e) - baseline
        if self.advantage_clip is not None:
            gain = gain.clamp(-self.advantage_clip, self.advantage_clip)
        kl = self.kl_penalty(e)
        if self.kl_to_go:
            kl = returns_to_go(kl, e.mask, self.gamma)
        e.advantages = remax_returns(gain, kl, e.mask, self.gamma, self.kl.value)

    def policy_loss(self, log_probs: Tensor, minibatch: Experience) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the policy gradient's loss of ``[B, T]`` log-probs."""
        b = minibatch
        loss = policy_gradient_loss(log_probs, b.advantages, b.mask, count=b.count)
        return loss, {"policy_loss": loss.detach()}
