"""What a rollout needs of the module that is trained."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_rlhf.backbone import Backbone
from lit_rlhf.rollout.experience import Experience
from lit_rlhf.rollout.kl_control import KLController
from lit_rlhf.rollout.rewards import Scored
from lit_rlhf.rollout.scaling import RewardScaler
from lit_rlhf.strategies.ranks import InTraining


class Policy(InTraining, Protocol):
    """An on-policy module, as the collector sees it."""

    backbone: Backbone
    kl: KLController
    reward_scaler: RewardScaler

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer."""

    @property
    def pad_id(self) -> int:
        """Token id that fills padding."""

    @property
    def eos_ids(self) -> list[int]:
        """Every token id that ends a response."""

    def log_all(self, prefix: str, values: Mapping[str, Tensor | float], **kwargs: Any) -> None:
        """Log values under ``prefix/``."""

    def sample(self, prompts: dict[str, Any]) -> Experience:
        """Sample responses to a batch of prompts."""

    def score(self, experience: Experience, prompts: dict[str, Any]) -> Scored:
        """Fill log-probs, values and scores."""

    def estimate(self, experience: Experience) -> None:
        """Fill advantages and returns."""

    def kl_penalty(self, experience: Experience) -> Tensor:
        """Return ``[N, T]`` per-token KL estimates."""

    def loss_passes(self) -> Sequence[tuple[str, ...]]:
        """Return the roles of each forward pass of the loss, in order."""

    def pass_options(self) -> dict[str, Any]:
        """Return the keyword arguments of these passes."""
