"""Pure tensor functions of RLHF: masks, log-probabilities, KL, advantages and losses. Imports torch only."""

from lit_rlhf.functional.advantages import gae, returns_to_go, token_rewards
from lit_rlhf.functional.kl import KLEstimator, kl_estimate
from lit_rlhf.functional.kl_control import AdaptiveKL, FixedKL, KLController
from lit_rlhf.functional.logprobs import token_log_probs
from lit_rlhf.functional.losses import (
    clipped_policy_loss,
    clipped_value_loss,
    cross_entropy,
    entropy_bonus,
    explained_variance,
    preference_loss,
)
from lit_rlhf.functional.masking import (
    finish_moments,
    gather_last,
    last_token_index,
    masked_mean,
    masked_sum,
    masked_var,
    moments,
    position_ids,
    response_mask,
    whiten,
)

__all__ = [
    "AdaptiveKL",
    "FixedKL",
    "KLController",
    "KLEstimator",
    "clipped_policy_loss",
    "clipped_value_loss",
    "cross_entropy",
    "entropy_bonus",
    "explained_variance",
    "finish_moments",
    "gae",
    "gather_last",
    "kl_estimate",
    "last_token_index",
    "masked_mean",
    "masked_sum",
    "masked_var",
    "moments",
    "position_ids",
    "preference_loss",
    "response_mask",
    "returns_to_go",
    "token_log_probs",
    "token_rewards",
    "whiten",
]
