"""Callbacks: phases, memory, guards, checkpoint files, signals, progress, sample tables, predictions."""

from lit_rlhf.callbacks.checkpoints import (
    AtomicCheckpointIO,
    CheckpointError,
    SafeCheckpoints,
    SaveAtEpochEnd,
    last_checkpoint,
)
from lit_rlhf.callbacks.guards import NonFiniteError, NumericalGuard, OnNonFinite
from lit_rlhf.callbacks.memory import MemoryPhases
from lit_rlhf.callbacks.offload import OffloadOptimizerState
from lit_rlhf.callbacks.phases import PhaseListener, PhaseTimer, TrainingPhase, phase
from lit_rlhf.callbacks.predictions import PredictionWriter
from lit_rlhf.callbacks.progress import IterationProgress
from lit_rlhf.callbacks.samples import SampleTable
from lit_rlhf.callbacks.signals import StopAfterStep, StopInIteration, StopOnSigterm

__all__ = [
    "AtomicCheckpointIO",
    "CheckpointError",
    "IterationProgress",
    "MemoryPhases",
    "NonFiniteError",
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
    "last_checkpoint",
    "phase",
]
