"""What every algorithm shares: the backbone, its optimizer, and checkpoints that hold only what was trained."""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, ClassVar

import lightning as L
import torch
from lightning.pytorch import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedTokenizerBase

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
    check_model,
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
from lit_rlhf.errors import ConfigError
from lit_rlhf.strategies import check_strategy, data_parallel_mesh, shard


class BackboneModule(L.LightningModule):
    """Base of all algorithms.

    Args:
        model: Base model: hub name, local folder, ``.gguf`` file, ``package:NAME`` (the GGUF file of an installed
            package) or ``random:FOLDER`` (random weights from a config; ``random:tiny`` ships with lit_rlhf).
        optimizer: Optimizer class path with all its arguments.
        lr_scheduler: Learning-rate schedule.
        tokenizer: Tokenizer name, in the forms of ``model``; None means the model's own.
        dtype: Dtype of the trunks. LoRA sets and scalar heads are float32 always.
        lora: The trained LoRA sets; None trains the whole trunk.
        policy_checkpoint: Stage checkpoint the policy trunks start from; None starts from ``model`` itself.
        quantization: ``int8`` or ``nf4`` holds frozen trunks in 8 or 4 bits (bitsandbytes, on CUDA).
        gradient_checkpointing: Recompute activations in backward: less memory, more time.
        compile_layers: Compile the decoder layers with ``torch.compile`` for scoring and training; not together with
            ``gradient_checkpointing`` or a compiled engine.
        on_non_finite: At a NaN or infinity in reward, log-probs, loss or gradient, ``raise`` stops the run and names
            the samples; ``skip_step`` leaves that optimizer step out and counts it.

    Raises:
        ValueError: Settings exclude each other.
    """

    lr_interval: ClassVar[str] = "step"
    progress_metrics: ClassVar[frozenset[str]] = frozenset({"train/loss"})
    sigterm_callback: ClassVar[type[StopOnSigterm]] = StopAfterStep
    entry_methods: ClassVar[tuple[str, ...]] = ("training_step", "validation_step", "test_step", "predict_step")

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
        if compile_layers and gradient_checkpointing:
            # The context that puts the right LoRA set back in recomputation is none that torch can trace.
            raise ConfigError("compile_layers and gradient_checkpointing exclude each other; leave one of them out")
        self.spec = BackboneSpec(model, tokenizer, dtype, lora, policy_checkpoint, quantization=quantization)
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.gradient_checkpointing = gradient_checkpointing
        self.compile_layers = compile_layers
        self.guard = NumericalGuard(on_non_finite)
        # Checkpoints hold the trainables only; `on_load_checkpoint` compares the names instead.
        self.strict_loading = False
        self.backbone: Backbone
        self.temperature = 1.0
        self._stages: Stages | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._eos_ids: list[int] = []

    def setup(self, stage: str) -> None:
        """Refuse what cannot run, before any weights load.

        Raises:
            StrategyError: See :func:`lit_rlhf.strategies.check_strategy`.
            ValueError: The trainer's precision would cast LoRA sets, heads and Adam's moments along with the trunk; the
                optimizer or the schedule refuses its arguments; or the data are beyond the model.
            OSError: A model's files are missing or damaged.
        """
        check_strategy(self.trainer.strategy, self.spec.quantization is not None)
        if str(self.trainer.precision) in ("bf16-true", "16-true"):
            raise ConfigError(
                f"precision {self.trainer.precision} would cast LoRA sets, heads and optimizer state too. Use "
                "trainer.precision: 32-true with model.dtype: bfloat16: only the trunk is stored in 16 bits"
            )
        if stage == "fit":
            self._try_optimizer()
        if not hasattr(self, "backbone"):
            self._stages = read_stages(self.spec, self.make_layout())
        self.check_data(getattr(self.trainer, "datamodule", None))

    def _try_optimizer(self) -> None:
        """Build optimizer and schedule for a parameter of their own, to see whether they take their arguments."""
        try:
            optimizer = self.optimizer([torch.nn.Parameter(torch.zeros(1, 1))])
            if self.lr_scheduler is not None:
                self.lr_scheduler(optimizer)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"optimizer or lr_scheduler: {error}") from error

    def check_data(self, data: Any, response_length: int = 0) -> None:
        """Refuse data that the model cannot read.

        Args:
            data: The data module; datasets with ``longest`` and ``largest_id`` are looked into.
            response_length: Most tokens that are sampled behind each sequence.

        Raises:
            ValueError: See :func:`lit_rlhf.backbone.check_model`.
        """
        parts = [getattr(data, name, None) for name in ("train_dataset", "val_dataset")]
        known: list[Any] = [part for part in parts if hasattr(part, "longest")]
        longest = max((part.longest() for part in known), default=0)
        check_model(
            self.spec,
            self.tokenizer,
            longest,
            response_length,
            lambda: max(part.largest_id() for part in known),
            self._stages.parents if self._stages is not None else {},
        )

    def configure_callbacks(self) -> list[Callback]:
        """Guard every run's numbers, checkpoints and end; a subclass adds its own."""
        return [self.guard, SafeCheckpoints(), self.sigterm_callback()]

    def make_layout(self) -> Layout:
        """Return the layout of this run; the one thing a new kind of stage has to say about its model."""
        raise NotImplementedError(f"{type(self).__name__} must define make_layout")

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; data modules read it from here."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.spec.tokenizer or self.spec.model)
        return self._tokenizer

    @property
    def pad_id(self) -> int:
        """Token id that fills padding."""
        return int(self.tokenizer.pad_token_id)

    @property
    def eos_ids(self) -> list[int]:
        """Every token id that ends a response."""
        return self._eos_ids

    def configure_model(self) -> None:
        """Build the backbone, once, and shard it under FSDP2.

        Raises:
            StrategyError: The device mesh has a tensor-parallel dimension.
        """
        mesh = None if self.device_mesh is None else data_parallel_mesh(self.device_mesh)
        # bitsandbytes quantises while it loads, and its tensors carry state of their own: every rank loads those.
        from_first_rank = mesh is not None and mesh.size() > 1 and self.spec.quantization is None
        if not hasattr(self, "backbone"):
            skeleton = from_first_rank and mesh is not None and mesh.get_local_rank() > 0
            layout = self.make_layout()
            stages = self._stages or read_stages(self.spec, layout)
            with without_weights() if skeleton else nullcontext():
                self.backbone = build_backbone(self.spec, layout, self.gradient_checkpointing, self.temperature, stages)
            self.spec.fingerprints = self.spec.fingerprints or stages.fingerprints()
            self._stages = None
            if self.compile_layers:
                compile_layers(self.backbone)
        if mesh is not None and not self.backbone.is_sharded:
            strategy = None if self._trainer is None else self._trainer.strategy
            reshard = getattr(strategy, "reshard_after_forward", True)
            offload = getattr(strategy, "cpu_offload", False)
            shard(self, self.backbone, mesh, self.entry_methods, reshard, from_first_rank, offload)
        self._eos_ids = sorted({int(self.tokenizer.eos_token_id), *self.backbone.eos_token_ids})

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the optimizer's parameter groups."""
        parameters = dict(self.backbone.named_parameters())
        return [{"params": [parameters[name] for name in self.backbone.trainable_names]}]

    def configure_optimizers(self) -> Any:
        """Build the optimizer and its schedule from the given classes."""
        optimizer = self.optimizer(self.parameter_groups())
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        # Only ReduceLROnPlateau has a monitor.
        schedule = {
            "scheduler": scheduler,
            "interval": self.lr_interval,
            "monitor": getattr(scheduler, "monitor", None),
        }
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the trained tensors only."""
        state = super().state_dict(*args, **kwargs)
        trained = {f"backbone.{name}" for name in self.backbone.trainable_names}
        return {key: value for key, value in state.items() if key in trained}

    def _record(self) -> dict[str, Any]:
        # fully_shard puts a class of its own in front.
        kind = next(cls for cls in type(self).__mro__ if not issubclass(cls, FSDPModule))
        algorithm = f"{kind.__module__}.{kind.__qualname__}"
        if not hasattr(self, "backbone"):
            return {**make_record(algorithm, self.spec, self.make_layout(), []), "trainable_names": None}
        return make_record(algorithm, self.spec, self.backbone.layout, self.backbone.trainable_names)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the record by which later stages find the frozen rest."""
        checkpoint[RECORD_KEY] = self._record()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another algorithm, model or layout: resuming it would train something else.

        Raises:
            ValueError: The checkpoint does not belong to this configuration; the first difference is named.
        """
        path = None if self._trainer is None else self.trainer.ckpt_path
        refuse_foreign(checkpoint, self._record(), path, complete_spec, describe_part)

    def check_checkpoint(self, path: str, max_epochs: int | None = None) -> None:
        """Refuse a checkpoint that cannot be resumed, as far as that can be told before any weights load.

        Args:
            path: Its path, of a file or a folder of shards; remote ones and keywords such as ``last`` are left to the
                restore.
            max_epochs: Epochs that the run is to have in the end; None and -1 set no limit.

        Raises:
            ValueError: It is missing, damaged, foreign, of another algorithm, model or layout, or has more epochs.
        """
        self.spec.fingerprints = fingerprint_parents(self.spec)
        check_resume(path, self._record(), max_epochs, complete_spec, describe_part)

    def log_all(self, prefix: str, values: Mapping[str, Tensor | float], **kwargs: Any) -> None:
        """Log values under ``prefix/``; those in ``progress_metrics`` also in the progress bar."""
        for name, value in values.items():
            key = f"{prefix}/{name}"
            self.log(key, value, prog_bar=key in self.progress_metrics, **kwargs)

    def mean_over_ranks(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return 0-dim values averaged over all ranks, at once.

        For logging by epoch: ``sync_dist`` averages when a value is first asked for, and the first rank's progress bar
        asks before the other ranks do.
        """
        if self._trainer is None or self.trainer.world_size == 1:
            return dict(values)
        stacked = torch.stack([value.float().to(self.device) for value in values.values()])
        return dict(zip(values, self.trainer.strategy.reduce(stacked, reduce_op="mean").unbind(), strict=True))

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all ranks (without a trainer: itself)."""
        if self._trainer is None:
            return tensor
        return self.trainer.strategy.reduce(tensor.clone(), reduce_op="sum")
