"""Pure tensor functions of RLHF: masks, log-probabilities, KL, advantages and losses. Imports torch only."""

from lit_rlhf.functional.advantages import (
    gae,
    group_normalise,
    leave_one_out,
    remax_returns,
    returns_to_go,
    token_rewards,
)
from lit_rlhf.functional.gradients import differentiate_now
from lit_rlhf.functional.kl import KLEstimator, kl_estimate
from lit_rlhf.functional.logprobs import token_log_probs
from lit_rlhf.functional.losses import (
    clipped_policy_loss,
    clipped_value_loss,
    cross_entropy,
    dpo_loss,
    entropy_bonus,
    explained_variance,
    policy_gradient_loss,
    preference_loss,
)
from lit_rlhf.functional.masking import (
    Aggregation,
    aggregate,
    finish_moments,
    gather_last,
    last_token_index,
    masked_mean,
    masked_sum,
    masked_var,
    moments,
    position_ids,
    response_mask,
    scale_gradient,
    whiten,
)

__all__ = [
    "Aggregation",
    "KLEstimator",
    "aggregate",
    "clipped_policy_loss",
    "clipped_value_loss",
    "cross_entropy",
    "differentiate_now",
    "dpo_loss",
    "entropy_bonus",
    "explained_variance",
    "finish_moments",
    "gae",
    "gather_last",
    "group_normalise",
    "kl_estimate",
    "last_token_index",
    "leave_one_out",
    "masked_mean",
    "masked_sum",
    "masked_var",
    "moments",
    "policy_gradient_loss",
    "position_ids",
    "preference_loss",
    "remax_returns",
    "response_mask",
    "returns_to_go",
    "scale_gradient",
    "token_log_probs",
    "token_rewards",
    "whiten",
]
