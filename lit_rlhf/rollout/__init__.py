"""Rollouts: sampling, rewards, the record of an iteration and its buffer."""

from lit_rlhf.rollout.buffer import RolloutBuffer
from lit_rlhf.rollout.experience import Experience, LengthGroup, join, length_groups, read_groups
from lit_rlhf.rollout.generation import generate
from lit_rlhf.rollout.rewards import FunctionReward, Reward, RewardError, RoleReward, Scored, WeightedReward
from lit_rlhf.rollout.sampling import Sampling
from lit_rlhf.rollout.scaling import RewardScaler, RewardScaling

__all__ = [
    "Experience",
    "FunctionReward",
    "LengthGroup",
    "Reward",
    "RewardError",
    "RewardScaler",
    "RewardScaling",
    "RoleReward",
    "RolloutBuffer",
    "Sampling",
    "Scored",
    "WeightedReward",
    "generate",
    "join",
    "length_groups",
    "read_groups",
]
