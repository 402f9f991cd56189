"""Phases of an RL iteration: generation, scoring, training. Callbacks can listen to them."""

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_rlhf.strategies.ranks import InTraining, trainer_of


class PhaseListener(Callback):
    """A callback with hooks for the beginning and the end of a phase."""

    def on_phase_start(self, trainer: Trainer, pl_module: LightningModule, phase: str) -> None:
        """Run when a phase begins."""

    def on_phase_end(self, trainer: Trainer, pl_module: LightningModule, phase: str) -> None:
        """Run when a phase ends, also on an exception."""


@contextmanager
def phase(pl_module: InTraining, name: str) -> Iterator[None]:
    """Mark a phase for every :class:`PhaseListener` of the module's trainer.

    Args:
        pl_module: The module; without a trainer there is nothing to notify.
        name: ``generation``, ``scoring``, ``training`` or ``evaluation``.
    """
    trainer = trainer_of(pl_module)
    callbacks = getattr(trainer, "callbacks", []) if trainer is not None else []
    listeners = [callback for callback in callbacks if isinstance(callback, PhaseListener)]
    for listener in listeners:
        listener.on_phase_start(trainer, pl_module, name)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for listener in listeners:
            listener.on_phase_end(trainer, pl_module, name)  # type: ignore[arg-type]
