"""Rollouts: sampling, rewards, the record of an iteration and its buffer."""

from lit_rlhf.rollout.buffer import RolloutBuffer
from lit_rlhf.rollout.engines import Engine, TransformersEngine
from lit_rlhf.rollout.experience import Experience, LengthGroup, join, length_groups, read_groups
from lit_rlhf.rollout.generation import generate
from lit_rlhf.rollout.rewards import FunctionReward, Reward, RewardError, RoleReward, Scored, WeightedReward
from lit_rlhf.rollout.sampling import Sampling
from lit_rlhf.rollout.scaling import RewardScaler, RewardScaling
from lit_rlhf.rollout.vllm_engine import VLLMEngine

__all__ = [
    "Engine",
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
    "TransformersEngine",
    "VLLMEngine",
    "WeightedReward",
    "generate",
    "join",
    "length_groups",
    "read_groups",
]
