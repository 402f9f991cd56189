"""What rollouts and callbacks need of the module that is trained."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

from lightning.pytorch import LightningModule
from torch import Tensor

from lit_rlhf.backbone import PassOptions
from lit_rlhf.rollout.experience import Experience, PromptBatch, Sample
from lit_rlhf.rollout.kl_control import KLController
from lit_rlhf.rollout.rewards import Scored
from lit_rlhf.rollout.scaling import RewardScaler
from lit_rlhf.strategies.ranks import HasBackbone

if TYPE_CHECKING:
    from lit_rlhf.rollout.buffer import RolloutBuffer


class Policy(HasBackbone, Protocol):
    """An on-policy module."""

    kl: KLController
    reward_scaler: RewardScaler
    rollout_buffer: "RolloutBuffer"

    @property
    def pad_id(self) -> int:
        """Token id that fills padding."""

    @property
    def eos_ids(self) -> list[int]:
        """Every token id that ends a response."""

    def log_all(self, prefix: str, values: Mapping[str, Tensor | float], **kwargs: Any) -> None:
        """Log values under ``prefix/``."""

    def rollout(self, prompts: PromptBatch) -> tuple[Experience, list[Sample]]:
        """Collect one iteration's experience, and its samples as text."""

    def sample(self, prompts: PromptBatch) -> Experience:
        """Sample responses to a batch of prompts."""

    def score(self, experience: Experience, prompts: PromptBatch) -> Scored:
        """Fill log-probs, values and scores."""

    def estimate(self, experience: Experience) -> None:
        """Fill advantages and returns."""

    def kl_penalty(self, experience: Experience) -> Tensor:
        """Return ``[N, T]`` per-token KL estimates."""

    def loss_passes(self) -> Sequence[tuple[str, ...]]:
        """Return the roles of each forward pass of the loss, in order."""

    def pass_options(self) -> PassOptions:
        """Return the keyword arguments of these passes."""


def has_backbone(module: LightningModule) -> HasBackbone:
    """Return the module as one that has a backbone."""
    return cast(HasBackbone, module)


def as_policy(module: LightningModule) -> Policy:
    """Return the module as the on-policy module that it is."""
    return cast(Policy, module)
