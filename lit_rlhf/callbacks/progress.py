"""A progress bar that shows iteration and phase."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

from lit_rlhf.rollout.phases import PhaseListener


class IterationProgress(RichProgressBar, PhaseListener):
    """Rich progress: ``iteration 3/16 · scoring`` and the key numbers."""

    phase = "training"

    def _description(self, epoch: int) -> str:
        total = self.trainer.max_epochs
        count = f"{epoch + 1}/{total}" if total and total > 0 else f"{epoch + 1}"
        return f"iteration {count} · {self.phase}"

    def _get_train_description(self, current_epoch: int) -> str:
        return self._description(current_epoch)

    def on_phase_start(self, trainer: Trainer, pl_module: LightningModule, phase: str) -> None:
        """Show the phase at once."""
        self.phase = phase
        if self.progress is not None and self.train_progress_bar_id is not None:
            self.progress.update(self.train_progress_bar_id, description=self._description(trainer.current_epoch))
            self.progress.refresh()

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Leave out the logger's version number."""
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        return items
