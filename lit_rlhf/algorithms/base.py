"""What every algorithm shares: the backbone, its optimizer, and checkpoints that hold only what was trained."""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, ClassVar

import lightning as L
from lightning.pytorch import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import LRSchedulerConfigType, OptimizerLRScheduler
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_rlhf.algorithms.settings import check_data, layout_problems, optimizer_problems, precision_problems
from lit_rlhf.backbone import (
    RECORD_KEY,
    Backbone,
    BackboneSpec,
    DType,
    Layout,
    LoraArgs,
    Quantization,
    Stages,
    build_backbone,
    compile_layers,
    complete_spec,
    describe_part,
    fingerprint_parents,
    load_tokenizer,
    make_record,
    read_stages,
    without_weights,
)
from lit_rlhf.callbacks import NumericalGuard, OnNonFinite, SafeCheckpoints, StopAfterStep, StopOnSigterm
from lit_rlhf.checkpoints.records import refuse_foreign
from lit_rlhf.checkpoints.resume import check_resume
from lit_rlhf.data import answer_end_ids
from lit_rlhf.errors import ConfigError
from lit_rlhf.strategies import check_strategy, class_path, data_parallel_mesh, shard_module
from lit_rlhf.strategies.ranks import sum_over_ranks, trainer_of


class BackboneModule(L.LightningModule):
    """Base of all algorithms. A subclass says which layout it trains (:meth:`make_layout`) and how.

    Args:
        model: Base model: hub name, local folder, ``.gguf`` file, ``package:NAME`` (the GGUF file of an installed
            package) or ``random:FOLDER`` (random weights from a config; ``random:tiny`` ships with lit_rlhf).
        optimizer: Optimizer class path with all its arguments.
        lr_scheduler: Learning-rate schedule.
        tokenizer: Tokenizer name, in the forms of ``model``; None means the model's own.
        dtype: Dtype of the trunks. Adapters and scalar heads are always float32.
        lora: The trained adapters; None trains the whole trunk.
        policy_checkpoint: Stage checkpoint the policy trunks start from; None starts from ``model`` itself.
        quantization: ``int8`` or ``nf4`` holds frozen trunks in 8 or 4 bits (bitsandbytes, on CUDA).
        gradient_checkpointing: Recompute activations in backward: less memory, more time.
        compile_layers: Compile the decoder layers with ``torch.compile`` for scoring and training; not together with
            ``gradient_checkpointing`` or a compiled engine.
        on_non_finite: At a NaN or infinity in reward, log-probs, loss or gradient, ``raise`` stops the run and names
            the samples; ``skip_step`` skips that optimizer step and counts it.
    """

    lr_interval: ClassVar[str] = "step"
    progress_metrics: ClassVar[frozenset[str]] = frozenset({"train/loss"})
    sigterm_callback: ClassVar[type[StopOnSigterm]] = StopAfterStep
    entry_methods: ClassVar[tuple[str, ...]] = ("training_step", "validation_step", "test_step", "predict_step")

    backbone: Backbone

    def __init__(
        self,
        model: str,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        tokenizer: str | None = None,
        dtype: DType = "float32",
        lora: LoraArgs | None = None,
        policy_checkpoint: str | None = None,
        quantization: Quantization | None = None,
        gradient_checkpointing: bool = False,
        compile_layers: bool = False,
        on_non_finite: OnNonFinite = "raise",
    ) -> None:
        super().__init__()
        self.spec = BackboneSpec(model, tokenizer, dtype, lora, policy_checkpoint, quantization=quantization)
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.gradient_checkpointing = gradient_checkpointing
        self.compile_layers = compile_layers
        self.on_non_finite = on_non_finite
        # Checkpoints hold the trainables only; `on_load_checkpoint` compares the names instead.
        self.strict_loading = False
        self.temperature = 1.0
        self.sampled_tokens = 0  # maximum number of tokens sampled after a prompt
        self._stages: Stages | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None

    def make_layout(self) -> Layout:
        """Return the layout of this run; the one thing a new kind of stage has to define."""
        raise NotImplementedError(f"{type(self).__name__} must define make_layout")

    def problems(self) -> list[str]:
        """Hook: return all problems with the settings, one line each; a subclass adds its own to ``super()``'s.

        It is called before any weights load; :func:`trainer_of` returns the trainer, if there is one.
        """
        found = []
        if self.compile_layers and self.gradient_checkpointing:
            # torch cannot trace the context that restores the right adapter during recomputation.
            found.append("compile_layers and gradient_checkpointing cannot be combined; remove one of them")
        trainer = trainer_of(self)
        found += precision_problems(None if trainer is None else trainer.precision)
        if trainer is not None and trainer.state.fn == TrainerFn.FITTING:  # some optimizers need the process group
            found += optimizer_problems(self.optimizer, self.lr_scheduler)
        return found + layout_problems(self.make_layout, self.spec.lora)

    def check_settings(self) -> None:
        """Raise for settings that cannot work, naming all of them; no files are read.

        Raises:
            ConfigError: There are :meth:`problems`.
        """
        if problems := self.problems():
            raise ConfigError("invalid configuration:\n" + "\n".join(f"  - {problem}" for problem in problems))

    def setup(self, stage: str) -> None:
        """Refuse what cannot run, before any weights load.

        Raises:
            StrategyError: See :func:`lit_rlhf.strategies.check_strategy`.
            ConfigError: There are :meth:`problems`, a checkpoint lacks what the layout needs, or the data exceed the
                model's vocabulary or context.
            ModelFileError: A model's files are missing or damaged.
        """
        check_strategy(self.trainer.strategy, self.spec.quantization is not None)
        self.check_settings()
        if not hasattr(self, "backbone"):
            self._stages = read_stages(self.spec, self.make_layout())
        parents = {} if self._stages is None else self._stages.parents
        check_data(getattr(self.trainer, "datamodule", None), self.spec, self.tokenizer, self.sampled_tokens, parents)

    def configure_callbacks(self) -> list[Callback]:
        """Add what guards every run's numbers, checkpoints and SIGTERM; a subclass adds its own."""
        return [NumericalGuard(self.on_non_finite), SafeCheckpoints(), self.sigterm_callback()]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; data modules take it from here."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.spec.tokenizer or self.spec.model)
        return self._tokenizer

    @property
    def pad_id(self) -> int:
        """Token id that fills padding."""
        return int(self.tokenizer.pad_token_id)

    @property
    def eos_ids(self) -> list[int]:
        """Every token id that ends a response: by the tokenizer, its chat template or the model's configuration."""
        return sorted({*answer_end_ids(self.tokenizer), *self.backbone.eos_token_ids})

    def configure_model(self) -> None:
        """Build the backbone, once, and shard it under FSDP2.

        Raises:
            StrategyError: The device mesh has a tensor-parallel dimension.
        """
        mesh = None if self.device_mesh is None else data_parallel_mesh(self.device_mesh)
        # bitsandbytes quantizes while it loads, and its tensors carry their own state, so every rank loads them.
        from_first_rank = mesh is not None and mesh.size() > 1 and self.spec.quantization is None
        if not hasattr(self, "backbone"):
            layout = self.make_layout()
            stages = self._stages or read_stages(self.spec, layout)
            skeleton = mesh is not None and from_first_rank and mesh.get_local_rank() > 0
            with without_weights() if skeleton else nullcontext():
                self.backbone = build_backbone(self.spec, layout, self.gradient_checkpointing, self.temperature, stages)
            self.spec.fingerprints = self.spec.fingerprints or stages.fingerprints()
            self._stages = None
            if self.compile_layers:
                compile_layers(self.backbone)
        if mesh is not None:
            shard_module(self, self.backbone, self.entry_methods, mesh, from_first_rank)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the optimizer's parameter groups."""
        parameters = dict(self.backbone.named_parameters())
        return [{"params": [parameters[name] for name in self.backbone.trainable_names]}]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimizer and its schedule from the given classes."""
        optimizer = self.optimizer(self.parameter_groups())
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        # Only ReduceLROnPlateau has a monitor.
        monitor = getattr(scheduler, "monitor", None)
        schedule: LRSchedulerConfigType = {"scheduler": scheduler, "interval": self.lr_interval, "monitor": monitor}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the trained tensors only."""
        state = super().state_dict(*args, **kwargs)
        trained = {f"backbone.{name}" for name in self.backbone.trainable_names}
        return {key: value for key, value in state.items() if key in trained}

    def record(self) -> dict[str, Any]:
        """Return the record that a checkpoint carries; ``trainable_names`` is None before the model is built."""
        algorithm = class_path(self)
        if not hasattr(self, "backbone"):
            return {**make_record(algorithm, self.spec, self.make_layout(), []), "trainable_names": None}
        return make_record(algorithm, self.spec, self.backbone.layout, self.backbone.trainable_names)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the record through which later stages find the frozen weights."""
        checkpoint[RECORD_KEY] = self.record()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another algorithm, model or layout: resuming it would train something else.

        Raises:
            ConfigError: The checkpoint does not belong to this configuration; the first difference is named.
        """
        trainer = trainer_of(self)
        path = None if trainer is None else trainer.ckpt_path
        refuse_foreign(checkpoint, self.record(), path, complete_spec, describe_part)

    def check_checkpoint(self, path: str, max_epochs: int | None = None) -> None:
        """Refuse a checkpoint that cannot be resumed, before any weights load; see :func:`check_resume`."""
        self.spec.fingerprints = fingerprint_parents(self.spec)
        check_resume(path, self.record(), max_epochs, complete_spec, describe_part)

    def log_all(self, prefix: str, values: Mapping[str, Tensor | float], **kwargs: Any) -> None:
        """Log values under ``prefix/``; those in ``progress_metrics`` also in the progress bar."""
        for name, value in values.items():
            key = f"{prefix}/{name}"
            self.log(key, value, prog_bar=key in self.progress_metrics, **kwargs)

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Return a tensor summed over all ranks (without a trainer: itself)."""
        return sum_over_ranks(self, tensor)
