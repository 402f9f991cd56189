"""A table of sample responses per iteration, in every logger that can hold one."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from lit_rlhf.rollout.policy import as_policy


class SampleTable(Callback):
    """Writes the first samples of each rollout: a W&B table, TensorBoard text, or ``samples.jsonl`` beside the CSV.

    Args:
        count: Samples per iteration; 0 writes none.
    """

    def __init__(self, count: int = 8) -> None:
        super().__init__()
        self.count = count

    @rank_zero_only
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the samples of the finished iteration."""
        samples = as_policy(pl_module).rollout_buffer.samples[: self.count]
        if not samples:
            return
        rows: list[dict[str, Any]] = [{"iteration": trainer.current_epoch, **sample} for sample in samples]
        columns = list(rows[0])
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                data = [[row[column] for column in columns] for row in rows]
                logger.log_text("samples", columns=columns, data=data, step=trainer.global_step)
            elif isinstance(logger, TensorBoardLogger):
                text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
                logger.experiment.add_text("samples", text, global_step=trainer.global_step)
            elif isinstance(logger, CSVLogger):
                folder = Path(logger.log_dir)
                folder.mkdir(parents=True, exist_ok=True)
                with (folder / "samples.jsonl").open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
