"""``lit-rlhf fit|validate|test|predict``: LightningCLI with our classes, defaults and callbacks."""

import logging
import os
import shlex
import sys
import traceback
from collections.abc import Mapping
from typing import Any, NoReturn

import lightning as L
import yaml
from jsonargparse import get_loader, set_loader
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

import lit_rlhf.algorithms
import lit_rlhf.data
import lit_rlhf.rollout  # noqa: F401  (short class names work for imported classes)
from lit_rlhf.algorithms import BackboneModule
from lit_rlhf.callbacks import IterationProgress, PredictionWriter
from lit_rlhf.commands.messages import check_files, parser_message
from lit_rlhf.commands.own_modules import config_files, find_own_modules, load_plugins
from lit_rlhf.errors import ConfigError, LitRLHFError
from lit_rlhf.renamed import rename_settings, rename_words
from lit_rlhf.strategies import refuse_strategy
from lit_rlhf.warning_filters import silence_warnings

# Modules of Lightning that refuse settings by a plain ValueError or RuntimeError once the run has begun.
REFUSING_MODULES = tuple(
    f"lightning.pytorch.{name}"
    for name in (
        "callbacks.early_stopping",  # what it monitors is not logged
        "callbacks.gradient_accumulation_scheduler",
        "loops.fit_loop",  # val_check_interval
        "plugins.precision.amp",  # clipping with a fused optimizer
        "strategies.launchers.subprocess_script",  # LOCAL_RANK
        "trainer.connectors.callback_connector",  # two callbacks of a kind
        "trainer.connectors.checkpoint_connector",  # ckpt_path: best
    )
)
LOAD_YAML = get_loader("yaml")
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
            logger.log_hyperparams(_plain_dict(self.config.as_dict()))


def _plain_dict(settings: Mapping[str, object]) -> dict[str, object]:
    return {key: _plain(value) for key, value in settings.items() if key not in ("config", "ckpt_path")}


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return _plain_dict(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


class Parser(LightningArgumentParser):
    """Prints what is wrong in one line, or few; ``JSONARGPARSE_DEBUG=true`` shows everything."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print where the wrong setting is and what is wrong with it, and stop with status 2."""
        if os.environ.get("JSONARGPARSE_DEBUG") or not self.exit_on_error:
            super().error(message, ex)
        print(f"lit-rlhf: {parser_message(message)}", file=sys.stderr)
        raise SystemExit(2)


def cause_outside_the_parser(error: BaseException | None) -> BaseException | None:
    """Return the first error of a chain that our code or a user's raised; jsonargparse wraps it several times."""
    while error is not None and (trace := error.__traceback__):
        while trace.tb_next:
            trace = trace.tb_next
        if not trace.tb_frame.f_globals.get("__name__", "").startswith("jsonargparse"):
            return error
        error = error.__cause__
    return None


def is_for_the_user(error: Exception) -> bool:
    """Return whether a user can fix an error: one of ours, or Lightning's about settings; the rest are bugs."""
    if isinstance(error, LitRLHFError | MisconfigurationException):
        return True
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return type(error) in (ValueError, RuntimeError) and frame.f_globals.get("__name__") in REFUSING_MODULES


class CLI(LightningCLI):
    """LightningCLI for on-policy training."""

    def instantiate_classes(self) -> None:
        """Build model, data and trainer; a setting that a constructor refuses is an error message, not a traceback."""
        self._check_strategy()
        try:
            super().instantiate_classes()
        except ValueError as error:
            cause = cause_outside_the_parser(error)
            if os.environ.get("JSONARGPARSE_DEBUG") or cause is None:
                raise
            if not isinstance(cause, ValueError):  # a bug, in our code or a user's
                raise cause from cause.__cause__
            print(f"lit-rlhf: {cause}", file=sys.stderr)
            raise SystemExit(1) from error

    def _check(self, max_epochs: int | None = None) -> None:
        """Refuse settings before a log folder is made, and a checkpoint to resume before any weights load."""
        for part in (self.model, self.datamodule):
            if hasattr(part, "check_settings"):
                part.check_settings()
        if path := self._get(self.config, "ckpt_path"):
            self.model.check_checkpoint(str(path), max_epochs)

    def before_fit(self) -> None:
        """Check everything that can be checked; LightningCLI calls this, as the other ``before_`` methods."""
        self._check(self.trainer.max_epochs)

    before_validate = before_test = before_predict = _check

    def _check_strategy(self) -> None:
        """Refuse a strategy before Lightning looks for its package or its accelerator."""
        strategy = self._get(self.config, "trainer.strategy")
        name = strategy if isinstance(strategy, str) else getattr(strategy, "class_path", None)
        if name is not None:
            refuse_strategy(name)

    def _parse_ckpt_path(self) -> None:
        # Lightning would merge the checkpoint's hyper-parameters over the command line.
        # BackboneModule.on_load_checkpoint compares them instead.
        return

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer, with the callbacks every run needs unless the user names similar ones."""
        trainer = super().instantiate_trainer(**kwargs)
        config = self._get(self.config_init, "trainer", default={})
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
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


def resume_command(args: list[str], checkpoint: str) -> str:
    """Return the command line that resumes from a checkpoint."""
    kept = [word for word in args if not word.startswith("--ckpt_path=")]
    if "--ckpt_path" in kept:
        at = kept.index("--ckpt_path")
        del kept[at : at + 2]
    return shlex.join(["lit-rlhf", *kept, "--ckpt_path", checkpoint])


@rank_zero_only
def say(text: str) -> None:
    """Print a line on the error stream, once."""
    print(f"lit-rlhf: {text}", file=sys.stderr, flush=True)


def main(args: list[str] | None) -> None:
    """Run LightningCLI on these arguments (None: the process's own); errors that need no traceback are one message."""
    try:
        run_cli(args)
    except SIGTERMException as stop:
        if checkpoint := getattr(stop, "checkpoint", None):
            say(f"resume with\n  {resume_command(sys.argv[1:] if args is None else args, checkpoint)}")
        raise
    except Exception as error:
        if os.environ.get("JSONARGPARSE_DEBUG") or not is_for_the_user(error):
            raise
        rank = getattr(rank_zero_only, "rank", 0)  # other ranks print too: an error may be theirs alone
        print(f"lit-rlhf: {f'rank {rank}: ' if rank else ''}{error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from error


def run_cli(args: list[str] | None) -> None:
    """Parse the arguments and run the subcommand."""
    words = sys.argv[1:] if args is None else args
    find_own_modules(words)
    load_plugins()
    current = rename_words(words)
    if words[0] in LightningCLI.subcommands():
        try:
            check_files(words[0], config_files(words))
        except ConfigError as error:
            print(f"lit-rlhf: {error}", file=sys.stderr)
            raise SystemExit(2) from error
    set_loader("yaml", lambda text: rename_settings(LOAD_YAML(text)), (yaml.YAMLError,))
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
        parser_kwargs={"prog": "lit-rlhf", "allow_abbrev": False},
        parser_class=Parser,
        args=None if args is None and current == words else current,
    )
