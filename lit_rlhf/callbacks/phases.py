"""The training phase, and the seconds of each phase."""

import time
from collections import defaultdict
from contextlib import ExitStack

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_rlhf.rollout.phases import PhaseListener, phase
from lit_rlhf.rollout.policy import as_policy


class TrainingPhase(Callback):
    """Marks everything of an epoch after its rollout as the training phase."""

    def __init__(self) -> None:
        super().__init__()
        self._stack = ExitStack()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the phase; this callback comes after the rollout buffer in the list."""
        self._stack.enter_context(phase(pl_module, "training"))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the phase; this callback comes before the listeners that report it."""
        self._stack.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """End the phase."""
        self._stack.close()


class PhaseTimer(PhaseListener):
    """Logs ``time/<phase>`` (seconds of each iteration) and ``time/samples_per_second``.

    A nested phase (evaluation inside training) pauses the outer one's clock.
    """

    def __init__(self) -> None:
        super().__init__()
        self._running: list[str] = []
        self._since = 0.0
        self._seconds: dict[str, float] = defaultdict(float)

    def _tick(self) -> None:
        now = time.perf_counter()
        if self._running:
            self._seconds[self._running[-1]] += now - self._since
        self._since = now

    def on_phase_start(self, trainer: Trainer, pl_module: LightningModule, phase: str) -> None:
        """Start the phase's clock."""
        self._tick()
        self._running.append(phase)

    def on_phase_end(self, trainer: Trainer, pl_module: LightningModule, phase: str) -> None:
        """Stop the phase's clock."""
        self._tick()
        self._running.remove(phase)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the iteration's seconds; evaluation does not count against the samples per second."""
        for name, seconds in self._seconds.items():
            pl_module.log(f"time/{name}", seconds)
        total = sum(seconds for name, seconds in self._seconds.items() if name != "evaluation")
        samples = as_policy(pl_module).rollout_buffer.rollout_size * trainer.world_size
        if total > 0:
            pl_module.log("time/samples_per_second", samples / total)
        self._seconds.clear()
