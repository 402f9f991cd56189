"""Callbacks: phases, memory, guards, checkpoint files, signals, progress, sample tables, predictions."""

from lit_rlhf.callbacks.checkpoints import SafeCheckpoints, SaveAtEpochEnd
from lit_rlhf.callbacks.guards import NumericalGuard, OnNonFinite
from lit_rlhf.callbacks.memory import MemoryPhases
from lit_rlhf.callbacks.offload import OffloadOptimizerState
from lit_rlhf.callbacks.phases import PhaseTimer, TrainingPhase
from lit_rlhf.callbacks.predictions import PredictionWriter
from lit_rlhf.callbacks.progress import IterationProgress
from lit_rlhf.callbacks.samples import SampleTable
from lit_rlhf.callbacks.signals import StopAfterStep, StopInIteration, StopOnSigterm
from lit_rlhf.callbacks.steps import CriticWarmup, KLTarget
from lit_rlhf.rollout.phases import PhaseListener

__all__ = [
    "CriticWarmup",
    "IterationProgress",
    "KLTarget",
    "MemoryPhases",
    "NumericalGuard",
    "OffloadOptimizerState",
    "OnNonFinite",
    "PhaseListener",
    "PhaseTimer",
    "PredictionWriter",
    "SafeCheckpoints",
    "SampleTable",
    "SaveAtEpochEnd",
    "StopAfterStep",
    "StopInIteration",
    "StopOnSigterm",
    "TrainingPhase",
]
