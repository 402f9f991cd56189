"""``lit-rlhf fit|validate|test|predict``: LightningCLI with our classes, defaults and callbacks."""

import logging
from typing import Any

import lightning as L
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback

import lit_rlhf.algorithms
import lit_rlhf.data
import lit_rlhf.rollout  # noqa: F401  (short class names work for imported classes)
from lit_rlhf.algorithms import BackboneModule
from lit_rlhf.callbacks import IterationProgress, PredictionWriter
from lit_rlhf.commands.run import silence_warnings

TRAINER_DEFAULTS: dict[str, Any] = {
    "logger": {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": "runs", "name": "lit_rlhf"},
    },
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 10,
}


class ConfigToLoggers(SaveConfigCallback):
    """Besides writing ``config.yaml``, gives every logger the whole configuration (W&B shows it with the run)."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Send the configuration as plain values."""
        for logger in trainer.loggers:
            logger.log_hyperparams(_plain(self.config.as_dict()))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if key not in ("config", "ckpt_path")}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


class CLI(LightningCLI):
    """LightningCLI for on-policy training."""

    def _parse_ckpt_path(self) -> None:
        # Lightning would merge the checkpoint's hyper-parameters over the command line.
        # BackboneModule.on_load_checkpoint compares them instead.
        return

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer, with the callbacks every run needs unless the user names their like."""
        trainer = super().instantiate_trainer(**kwargs)
        config = self._get(self.config_init, "trainer", default={})
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        given = config.get("callbacks") or []
        named = [
            str(c.get("class_path", "")) if hasattr(c, "get") else type(c).__name__
            for c in (given if isinstance(given, list) else [given])
        ]
        if config.get("enable_progress_bar") is not False and not any("ProgressBar" in name for name in named):
            callbacks[:] = [c for c in callbacks if not isinstance(c, ProgressBar)] + [IterationProgress()]
        default = [c for c in callbacks if type(c) is ModelCheckpoint]
        if default and not any(name.endswith("ModelCheckpoint") for name in named):
            # One file, replaced when complete: the next stage and a resumed run find it by its name.
            callbacks[callbacks.index(default[0])] = ModelCheckpoint(filename="last", enable_version_counter=False)
        callbacks.append(PredictionWriter())
        return trainer


def main(args: list[str] | None) -> None:
    """Run LightningCLI on these arguments (None: the process's own)."""
    silence_warnings()
    logging.getLogger("httpx").setLevel(logging.WARNING)
    CLI(
        BackboneModule,
        L.LightningDataModule,
        trainer_defaults=TRAINER_DEFAULTS,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        save_config_callback=ConfigToLoggers,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"prog": "lit-rlhf"},
        args=args,
    )
