"""What ``lit-rlhf predict`` writes."""

import json
import os
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class PredictionWriter(Callback):
    """Writes each prediction as a line of ``predictions.jsonl`` in the log folder; one file per rank."""

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the file under a temporary name."""
        rank = f"-rank{trainer.global_rank}" if trainer.world_size > 1 else ""
        self.path = Path(trainer.log_dir or trainer.default_root_dir) / f"predictions{rank}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._partial = self.path.with_name(self.path.name + ".partial")
        self._file = self._partial.open("w", encoding="utf-8")

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: object, batch_idx: int, *_: object
    ) -> None:
        """Write one line per row."""
        self._file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in outputs)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Rename the complete file."""
        self._file.close()
        os.replace(self._partial, self.path)
        print(f"wrote {self.path}")
