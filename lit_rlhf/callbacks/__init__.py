"""Callbacks: phases and their timing, progress, sample tables, predictions."""

from lit_rlhf.callbacks.phases import PhaseListener, PhaseTimer, TrainingPhase, phase
from lit_rlhf.callbacks.predictions import PredictionWriter
from lit_rlhf.callbacks.progress import IterationProgress
from lit_rlhf.callbacks.samples import SampleTable

__all__ = [
    "IterationProgress",
    "PhaseListener",
    "PhaseTimer",
    "PredictionWriter",
    "SampleTable",
    "TrainingPhase",
    "phase",
]
