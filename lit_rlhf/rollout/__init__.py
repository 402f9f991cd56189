"""Rollouts: sampling, rewards, the record of an iteration and its buffer."""

from lit_rlhf.rollout.buffer import RolloutBuffer
from lit_rlhf.rollout.collector import Collector
from lit_rlhf.rollout.engines import Engine, TransformersEngine
from lit_rlhf.rollout.experience import Experience, PromptBatch, Sample, UnsetFieldError
from lit_rlhf.rollout.generation import Request, generate
from lit_rlhf.rollout.kl_control import AdaptiveKL, FixedKL, KLController
from lit_rlhf.rollout.length_groups import LengthGroup, length_groups, map_groups
from lit_rlhf.rollout.phases import PhaseListener, phase
from lit_rlhf.rollout.rewards import FunctionReward, Reward, RoleReward, Scored, WeightedReward
from lit_rlhf.rollout.sampling import Sampling
from lit_rlhf.rollout.scaling import RewardScaler, RewardScaling
from lit_rlhf.rollout.vllm_engine import VLLMEngine

__all__ = [
    "AdaptiveKL",
    "Collector",
    "Engine",
    "Experience",
    "FixedKL",
    "FunctionReward",
    "KLController",
    "LengthGroup",
    "PhaseListener",
    "PromptBatch",
    "Request",
    "Reward",
    "RewardScaler",
    "RewardScaling",
    "RoleReward",
    "RolloutBuffer",
    "Sample",
    "Sampling",
    "Scored",
    "TransformersEngine",
    "UnsetFieldError",
    "VLLMEngine",
    "WeightedReward",
    "generate",
    "length_groups",
    "map_groups",
    "phase",
]
