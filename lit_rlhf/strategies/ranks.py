"""Sums, means and errors across the ranks of a run. A module without a trainer counts as one rank."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

from lit_rlhf.backbone import Backbone


class InTraining(Protocol):
    """What these functions need of a LightningModule."""

    @property
    def _trainer(self) -> Trainer | None: ...

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""


class HasBackbone(InTraining, Protocol):
    """A module of any stage."""

    backbone: Backbone

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer."""


def trainer_of(module: InTraining) -> Trainer | None:
    """Return the module's trainer, None where it has none (``module.trainer`` would raise)."""
    return module._trainer


def world_size(module: InTraining) -> int:
    """Return the number of ranks, 1 without a trainer."""
    trainer = trainer_of(module)
    return 1 if trainer is None else trainer.world_size


def sum_over_ranks(module: InTraining, tensor: Tensor) -> Tensor:
    """Return the tensor summed over all ranks; every rank calls this."""
    trainer = trainer_of(module)
    return tensor if trainer is None else trainer.strategy.reduce(tensor.clone(), reduce_op="sum")


def mean_over_ranks(module: InTraining, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return 0-dim values averaged over all ranks, in one reduction; every rank calls this.

    For logging by epoch: ``sync_dist`` averages when a value is first read, and the first rank's progress bar reads it
    before the other ranks do.
    """
    trainer = trainer_of(module)
    if trainer is None or trainer.world_size == 1:
        return dict(values)
    stacked = torch.stack([value.float().to(module.device) for value in values.values()])
    reduced: Tensor = trainer.strategy.reduce(stacked, reduce_op="mean")
    return dict(zip(values, reduced.unbind(), strict=True))


def any_rank(module: InTraining, flag: Tensor) -> bool:
    """Return whether a 0-dim bool is set on any rank: one all-reduced number, read once; every rank calls this."""
    trainer = trainer_of(module)
    return bool(flag if trainer is None else trainer.strategy.reduce(flag.float(), reduce_op="sum") > 0)


def gather_texts(module: InTraining, text: str | None) -> Sequence[str | None]:
    """Return every rank's text, or nothing where no rank has one; every rank calls this."""
    ranks = world_size(module)
    if ranks == 1:
        return [text]
    # The flag first: objects are pickled and sent only if there is a text.
    if not any_rank(module, torch.tensor(text is not None, device=module.device)):
        return []
    texts: list[str | None] = [None] * ranks
    torch.distributed.all_gather_object(texts, text)
    return texts


def join_texts(module: InTraining, text: str | None) -> str:
    """Return the ranks' texts in one, empty ones left out; every rank calls this."""
    texts = {rank: said for rank, said in enumerate(gather_texts(module, text)) if said}
    if world_size(module) == 1:
        return texts[0]
    return "\n".join(f"rank {rank}: {said}" for rank, said in texts.items())


@contextmanager
def fail_together(module: InTraining) -> Iterator[None]:
    """Let an exception on one rank stop all of them, rather than leave the others waiting; every rank enters this.

    Raises:
        RuntimeError: Another rank failed; its error is quoted.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    others = gather_texts(module, None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    for rank, text in enumerate(others):
        if text:
            raise RuntimeError(f"rank {rank} failed: {text}")


def only_trainer_may_differentiate(module: HasBackbone) -> bool:
    """Return whether gradients are correct only in the trainer's own backward pass.

    Under FSDP2 that pass reduces the gradients; a loss scaler keeps float16 gradients from underflowing.
    """
    trainer = trainer_of(module)
    scaler = None if trainer is None else getattr(trainer.precision_plugin, "scaler", None)
    return module.backbone.is_sharded or scaler is not None


def is_shard(tensor: object) -> bool:
    """Return whether a tensor is this rank's part of a sharded one."""
    return isinstance(tensor, DTensor)


def local_shard(tensor: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor; any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
