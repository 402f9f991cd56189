"""Pure tensor functions of RLHF: masks, log-probabilities, KL, advantages and losses. Imports torch only."""

import warnings
from typing import TYPE_CHECKING

from lit_rlhf.functional.advantages import (
    gae,
    group_normalize,
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
    "group_normalize",
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

if not TYPE_CHECKING:  # a checker would take any name for one of this package's

    def __getattr__(name: str) -> object:
        """Give a renamed function under its old name, which the next release no longer has."""
        if name != "group_normalise":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        message = "lit_rlhf.functional.group_normalise is now group_normalize; the old name goes in the next release"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return group_normalize
