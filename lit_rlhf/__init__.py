"""Memory-efficient RLHF in PyTorch Lightning.

Public names are imported on first use, so that ``import lit_rlhf`` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_rlhf.algorithms import (
        DPO,
        GRPO,
        PPO,
        RLOO,
        SFT,
        ActorCriticModule,
        BackboneModule,
        HydraSFT,
        OnPolicyModule,
        Reinforce,
        ReinforcePlusPlus,
        ReMax,
        RewardModel,
    )
    from lit_rlhf.backbone import LAYOUTS, Backbone, Layout, LoraArgs, Role, Trunk
    from lit_rlhf.data import InstructionData, PreferenceData, PromptData
    from lit_rlhf.rollout import (
        AdaptiveKL,
        Engine,
        Experience,
        FixedKL,
        FunctionReward,
        KLController,
        Reward,
        RoleReward,
        RolloutBuffer,
        Sampling,
        TransformersEngine,
        VLLMEngine,
        WeightedReward,
    )

__version__ = "0.1.0"

_EXPORTS = {
    "algorithms": [
        "DPO",
        "GRPO",
        "PPO",
        "RLOO",
        "SFT",
        "ActorCriticModule",
        "BackboneModule",
        "HydraSFT",
        "OnPolicyModule",
        "ReMax",
        "Reinforce",
        "ReinforcePlusPlus",
        "RewardModel",
    ],
    "backbone": ["LAYOUTS", "Backbone", "Layout", "LoraArgs", "Role", "Trunk"],
    "data": ["InstructionData", "PreferenceData", "PromptData"],
    "rollout": [
        "AdaptiveKL",
        "Engine",
        "Experience",
        "FixedKL",
        "FunctionReward",
        "KLController",
        "Reward",
        "RoleReward",
        "RolloutBuffer",
        "Sampling",
        "TransformersEngine",
        "VLLMEngine",
        "WeightedReward",
    ],
}
_PACKAGE_OF = {name: package for package, names in _EXPORTS.items() for name in names}

__all__ = [
    "DPO",
    "GRPO",
    "LAYOUTS",
    "PPO",
    "RLOO",
    "SFT",
    "ActorCriticModule",
    "AdaptiveKL",
    "Backbone",
    "BackboneModule",
    "Engine",
    "Experience",
    "FixedKL",
    "FunctionReward",
    "HydraSFT",
    "InstructionData",
    "KLController",
    "Layout",
    "LoraArgs",
    "OnPolicyModule",
    "PreferenceData",
    "PromptData",
    "ReMax",
    "Reinforce",
    "ReinforcePlusPlus",
    "Reward",
    "RewardModel",
    "Role",
    "RoleReward",
    "RolloutBuffer",
    "Sampling",
    "TransformersEngine",
    "Trunk",
    "VLLMEngine",
    "WeightedReward",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _PACKAGE_OF:
        raise AttributeError(f"module 'lit_rlhf' has no attribute {name!r}")
    return getattr(import_module(f"lit_rlhf.{_PACKAGE_OF[name]}"), name)
