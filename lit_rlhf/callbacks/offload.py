"""Optimizer state outside the accelerator while nothing is trained."""

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lit_rlhf.errors import ConfigError
from lit_rlhf.rollout.phases import PhaseListener
from lit_rlhf.strategies.ranks import is_shard


class OffloadOptimizerState(PhaseListener):
    """Keeps the optimizer's moments in the host's memory during generation and scoring.

    It pays off where whole trunks are trained (layout ``full``): AdamW's moments then take twice the weights' bytes,
    room for a larger rollout. An adapter's moments are small; moving them saves little. Costs two copies of the state
    per iteration. Results do not change. Not for sharded optimizers (FSDP2). Not yet measured on a GPU.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn where it has no effect."""
        if pl_module.device.type == "cpu":
            rank_zero_warn(
                "OffloadOptimizerState has no effect on a CPU: the optimizer's state is in its memory already"
            )

    def on_phase_start(self, trainer: Trainer, pl_module: LightningModule, phase: str) -> None:
        """Move the state out before generation, back before training.

        Raises:
            ValueError: The state is sharded.
        """
        if pl_module.device.type == "cpu" or phase not in ("generation", "training"):
            return
        for optimizer in trainer.optimizers:
            move_state(optimizer, torch.device("cpu") if phase == "generation" else pl_module.device)


def move_state(optimizer: Optimizer, device: torch.device) -> None:
    """Move every tensor of an optimizer's state as large as its parameter; step counts stay where they are.

    Args:
        optimizer: Changed in place.
        device: Where to. What comes from CUDA goes into page-locked memory, so that copies run at full speed.

    Raises:
        ValueError: The state is sharded.
    """
    for state, name, tensor in _moments(optimizer):
        if is_shard(tensor):
            raise ConfigError("OffloadOptimizerState cannot move a sharded optimizer's state; remove it under FSDP2")
        if device.type == "cpu" and tensor.device.type != "cpu":
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
            state[name] = host.copy_(tensor)
        else:
            state[name] = tensor.to(device)


def _moments(optimizer: Optimizer) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    # ZeroRedundancyOptimizer keeps its rank's share in its own optimizer.
    for parameter, state in getattr(optimizer, "optim", optimizer).state.items():
        for name, value in list(state.items()):
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                yield state, name, value
