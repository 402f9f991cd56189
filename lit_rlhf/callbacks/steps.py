"""Skipped updates: the actor's during the critic's warm-up, and the rest of an iteration past a KL target."""

from collections.abc import Mapping
from typing import Protocol, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lit_rlhf.errors import ConfigError
from lit_rlhf.strategies.ranks import mean_over_ranks


class SkipsMinibatches(Protocol):
    """What the KL target needs of an on-policy module."""

    skip_minibatches: bool
    minibatch_stats: Mapping[str, Tensor]


class CriticWarmup(Callback):
    """Updates only the critic's own parameters in the first iterations.

    Args:
        iterations: Number of first iterations.
    """

    def __init__(self, iterations: int) -> None:
        super().__init__()
        self.iterations = iterations

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Leave the actor's parameters without gradients: no step, no decay, no momentum."""
        if trainer.current_epoch < self.iterations:
            _drop_gradients(optimizer, groups=slice(1))


class KLTarget(Callback):
    """Skips the rest of an iteration's minibatches once the policy has moved too far from the one that sampled.

    They cost no forward pass and change neither weights nor optimizer state. Lightning's own way to skip (returning -1
    or None) would drop the epoch's validation, or fail under DDP.

    Args:
        target: Mean KL per token (k3: the module's statistic ``approx_kl``) of a minibatch, over all ranks.
    """

    def __init__(self, target: float) -> None:
        super().__init__()
        self.target = target

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the iteration with no minibatch skipped."""
        _policy(pl_module).skip_minibatches = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Compare the minibatch's KL with the target; all ranks reach the same decision."""
        policy = _policy(pl_module)
        if policy.skip_minibatches:
            return
        if "approx_kl" not in policy.minibatch_stats:
            raise ConfigError(
                f"target_kl needs the statistic approx_kl of every minibatch, and {type(pl_module).__name__} gives "
                f"{', '.join(policy.minibatch_stats) or 'none'}. Return it from policy_loss, or leave target_kl out"
            )
        (mean,) = mean_over_ranks(pl_module, {"approx_kl": policy.minibatch_stats["approx_kl"]}).values()
        policy.skip_minibatches = bool(mean > self.target)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Leave the parameters as they are after skipped minibatches."""
        if _policy(pl_module).skip_minibatches:
            _drop_gradients(optimizer)


def _policy(module: LightningModule) -> SkipsMinibatches:
    return cast(SkipsMinibatches, module)


def _drop_gradients(optimizer: Optimizer, groups: slice = slice(None)) -> None:
    """Leave the parameters of these groups as they are in the coming step."""
    for group in optimizer.param_groups[groups]:
        for parameter in group["params"]:
            parameter.grad = None
