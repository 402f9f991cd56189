"""The algorithms: one LightningModule each."""

from lit_rlhf.algorithms.base import BackboneModule
from lit_rlhf.algorithms.on_policy import OnPolicyModule
from lit_rlhf.algorithms.ppo import PPO
from lit_rlhf.algorithms.supervised import SFT, HydraSFT, RewardModel, SupervisedModule

__all__ = ["PPO", "SFT", "BackboneModule", "HydraSFT", "OnPolicyModule", "RewardModel", "SupervisedModule"]
