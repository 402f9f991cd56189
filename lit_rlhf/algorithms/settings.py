"""Checks before any weights load: of settings, each returning one line per problem, and of data."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_rlhf.backbone import BackboneSpec, Layout, LoraArgs, StageCheckpoint, check_model
from lit_rlhf.errors import ConfigError


def out_of_range(
    settings: object, unit: Sequence[str] = (), positive: Sequence[str] = (), not_negative: Sequence[str] = ()
) -> list[str]:
    """Return one line for each attribute outside its range; None is always inside.

    Args:
        settings: The object.
        unit: Attributes in [0, 1].
        positive: Attributes above 0.
        not_negative: Attributes of at least 0.
    """
    found = []
    for names, holds, text in (
        (unit, lambda value: 0 <= value <= 1, "in [0, 1]"),
        (positive, lambda value: value > 0, "positive"),
        (not_negative, lambda value: value >= 0, "at least 0"),
    ):
        for name in names:
            value = getattr(settings, name)
            if value is not None and not holds(value):
                found.append(f"{name} must be {text}, got {value}")
    return found


def optimizer_problems(optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable | None) -> list[str]:
    """Build optimizer and schedule for a dummy parameter, to check that they accept their arguments."""
    try:
        built = optimizer([torch.nn.Parameter(torch.zeros(1, 1))])
        if lr_scheduler is not None:
            lr_scheduler(built)
    except (TypeError, ValueError) as error:
        return [f"optimizer or lr_scheduler: {error}"]
    return []


def layout_problems(make_layout: Callable[[], Layout], lora: LoraArgs | None) -> list[str]:
    """Check that the layout has the roles that are needed, and the adapters that the LoRA settings name."""
    try:
        layout = make_layout()
        if lora is not None:
            lora.check_adapters(layout.trained_adapters)
    except (KeyError, ValueError) as error:
        return [str(error.args[0])]
    return []


def precision_problems(precision: object) -> list[str]:
    """Refuse a trainer's precision that casts the whole module."""
    if str(precision) not in ("bf16-true", "16-true"):
        return []
    return [
        f"precision {precision} would cast adapters, heads and optimizer state too. Use "
        "trainer.precision: 32-true with model.dtype: bfloat16: only the trunk is stored in 16 bits"
    ]


class Measured(Protocol):
    """A tokenized dataset that knows its longest row and its largest token id."""

    def longest(self) -> int:
        """Return the number of tokens of its longest row."""

    def largest_id(self) -> int:
        """Return its largest token id."""


def check_data(
    data: object,
    spec: BackboneSpec,
    tokenizer: PreTrainedTokenizerBase,
    sampled_tokens: int,
    parents: Mapping[str, StageCheckpoint],
) -> None:
    """Refuse data that the model cannot process.

    Args:
        data: The data module; its ``train_dataset`` and ``val_dataset`` are checked where they are :class:`Measured`.
        spec: Where the model comes from.
        tokenizer: The run's.
        sampled_tokens: Maximum number of tokens sampled after each sequence.
        parents: The checkpoints that the run starts from, by path.

    Raises:
        ConfigError: See :func:`lit_rlhf.backbone.check_model`.
    """
    parts = [getattr(data, name, None) for name in ("train_dataset", "val_dataset")]
    known: list[Measured] = [part for part in parts if part is not None and hasattr(part, "longest")]
    longest = max((part.longest() for part in known), default=0)
    check_model(spec, tokenizer, longest, sampled_tokens, lambda: max(part.largest_id() for part in known), parents)


def unpack(found: object, module: object) -> tuple[Tensor, dict[str, Tensor]]:
    """Return what ``policy_loss`` gave, if it is a loss and its statistics."""
    if isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], dict):
        return found
    kind = type(found).__name__
    raise ConfigError(f"{type(module).__name__}.policy_loss must return (loss, statistics), a dict; got one {kind}")
