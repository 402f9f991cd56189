"""The guard against non-finite numbers in the loss, the gradient and the weights."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from lit_rlhf.rollout.non_finite import (
    bad_columns,
    bad_rows,
    describe_parameters,
    describe_samples,
    only_bad,
    place,
    raise_non_finite,
)
from lit_rlhf.rollout.policy import has_backbone
from lit_rlhf.strategies.ranks import any_rank, join_texts, local_shard

OnNonFinite = Literal["raise", "skip_step"]
SKIPS_IN_A_ROW = 100

# What a role's forward pass returns, as messages name it.
OUTPUTS = {"actor": "log-probs", "reference": "log-probs of the reference", "critic": "values", "reward": "reward"}


class NumericalGuard(Callback):
    """Stops a run at the first NaN or infinity, or skips that optimizer step.

    It checks each loss and, before the optimizer step, the gradient; after each iteration also the trained weights, so
    that no checkpoint holds broken ones. Rollouts are checked where they are collected
    (:func:`lit_rlhf.rollout.non_finite.check_rollout`). All ranks decide together. Each optimizer step costs one pass
    over the gradients and one number copied from the device (all-reduced, with several ranks); with accumulation, its
    minibatches are kept until the step.

    A skipped step changes neither weights nor optimizer state; learning-rate schedules and step counts continue. A
    non-finite rollout skips every step of its iteration, and updates neither the KL controller nor reward statistics.
    Under ``16-mixed`` precision the loss scaler handles the gradient.

    Args:
        on_non_finite: ``raise`` or ``skip_step``, which logs ``train/skipped_steps``, and stops when the trained
            weights are not finite or 100 steps in a row were skipped.
    """

    def __init__(self, on_non_finite: OnNonFinite = "raise") -> None:
        super().__init__()
        self.on_non_finite = on_non_finite
        self._window: list[tuple[int, object]] = []
        self._losses: list[Tensor] = []
        self._skipped = 0
        self._skipped_in_a_row = 0
        self._warned_in = -1

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the counts."""
        self._window, self._losses = [], []
        self._skipped = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Keep the minibatch, to name its samples."""
        self._window.append((batch_idx, batch))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Keep the loss on its device."""
        self._losses.append(loss.detach().float())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Check the losses and the gradient; all ranks raise, all ranks skip the step, or none does."""
        window, losses = self._window, self._losses
        self._window, self._losses = [], []
        if any(getattr(batch, "left_out", False) for _, batch in window):  # found by the collector
            self._stop_after_too_many(pl_module, "scoring", None)
        else:
            # A loss scaler, where there is one, handles the gradient.
            scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
            gradients = [] if scaled else [local_shard(p.grad) for p in _parameters(optimizer) if p.grad is not None]
            # The 2-norm of finite numbers can overflow; only then is the slower max-norm computed.
            for norm in (2.0, float("inf")):
                finite = _all_finite(losses, gradients, norm, pl_module.device)
                if not any_rank(pl_module, ~finite):
                    self._skipped_in_a_row = 0
                    return
            number = f", minibatch {window[-1][0] + 1} of {trainer.num_training_batches}" if window else ""
            bad_loss = not all(loss.isfinite() for loss in losses)
            # DDP averages gradients over ranks: only the ranks whose own loss is not finite have samples to name.
            any_bad_loss = any_rank(pl_module, torch.tensor(bad_loss, device=pl_module.device))
            names = not finite and (bad_loss or not any_bad_loss)
            found = _explain(pl_module, optimizer, window, losses) if names else None
            self._decide(pl_module, f"training{number}", found)
        self._skip(optimizer)

    def _skip(self, optimizer: Optimizer) -> None:
        optimizer.zero_grad(set_to_none=True)
        self._skipped += 1
        self._skipped_in_a_row += 1

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the skipped steps; check the weights before a checkpoint is made of them."""
        if self.on_non_finite == "skip_step":
            pl_module.log("train/skipped_steps", float(self._skipped))
        weights = _named_weights(pl_module, trainer.optimizers)
        largest = _total_norm(list(weights.values()), float("inf"), pl_module.device)
        if any_rank(pl_module, ~largest.isfinite()):
            found = describe_parameters(weights, "trained weights")
            raise_non_finite(pl_module, "the weights after the last step", found)

    def _decide(self, module: LightningModule, where: str, found: str | None) -> None:
        """Raise on every rank, or warn once per iteration that a step is skipped."""
        if self.on_non_finite == "raise":
            raise_non_finite(module, where, found)
        self._stop_after_too_many(module, where, found)
        if self._warned_in != module.current_epoch:
            self._warned_in = module.current_epoch
            found = join_texts(module, found)
            rank_zero_warn(f"{place(module)}, {where}: {found}\n  this optimizer step is skipped (on_non_finite)")

    def _stop_after_too_many(self, module: LightningModule, where: str, found: str | None) -> None:
        if self._skipped_in_a_row >= SKIPS_IN_A_ROW:
            many = f"{self._skipped_in_a_row} steps in a row were skipped"
            raise_non_finite(module, where, f"{found or ''}\n  {many}")


def _all_finite(losses: list[Tensor], gradients: list[Tensor], norm: float, device: torch.device) -> Tensor:
    """Return a 0-dim bool, still on its device."""
    numbers = [*losses, _total_norm(gradients, norm, device)]
    return torch.stack([number.to(device) for number in numbers]).isfinite().all()


def _total_norm(tensors: list[Tensor], norm: float, device: torch.device) -> Tensor:
    """Return the norm over all tensors, 0 for none; a rank's shard of a small parameter may be empty."""
    present = [tensor for tensor in tensors if tensor.numel()]
    return get_total_norm(present, norm).float().to(device) if present else torch.zeros((), device=device)


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _named_weights(module: LightningModule, optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
    """Return the trained tensors by name, as the optimizers hold them; ``requires_grad`` changes with the adapter."""
    trained = {id(parameter) for optimizer in optimizers for parameter in _parameters(optimizer)}
    return {name: local_shard(p.detach()) for name, p in module.named_parameters() if id(p) in trained}


def _explain(
    module: LightningModule, optimizer: Optimizer, window: list[tuple[int, object]], losses: list[Tensor]
) -> str:
    """Return what is not finite: losses, gradients by name, weights by name, and the samples that show it."""
    parts = []
    bad_losses = [index for index, loss in enumerate(losses) if not loss.isfinite()]
    for index in bad_losses:
        number = window[index][0] + 1 if index < len(window) else index + 1
        parts.append(f"the loss is {float(losses[index])}" + (f" (minibatch {number})" if len(window) > 1 else ""))
    trained = _named_weights(module, [optimizer])
    gradients = {n: local_shard(p.grad) for n, p in module.named_parameters() if n in trained and p.grad is not None}
    weights = {name: local_shard(p.detach()) for name, p in module.named_parameters()}
    lines = [describe_parameters(gradients, "gradients"), describe_parameters(weights, "weights before the step")]
    if not parts:
        parts.append("the loss is finite, its gradient is not")
    suspects = [window[index] for index in bad_losses if index < len(window)] or window
    lines += [_describe_batch(module, batch) for _, batch in suspects[:1]]
    return "\n".join([", ".join(parts), *(line for line in lines if line)])


def _fields(batch: object) -> Mapping[str, Any]:
    """Return a batch's fields by name, whether it is a mapping or a record."""
    return batch if isinstance(batch, Mapping) else getattr(batch, "__dict__", {})


def _describe_batch(module: LightningModule, batch: object) -> str:
    """Return the samples of a minibatch whose numbers are not finite, or its first ones where none is to blame."""
    fields = _fields(batch)
    if not all(isinstance(fields.get(name), Tensor) for name in ("tokens", "attention_mask", "mask")):
        return ""  # a batch of a user's own module
    try:
        rows = bad_columns(fields)
        # Other ranks may have nothing to explain.
        if not has_backbone(module).backbone.in_step:
            rows |= _bad_outputs(module, batch)
        return describe_samples(rows, _texts(module, batch))
    except Exception as error:  # the first error matters more than this one
        return f"  (its samples could not be read: {type(error).__name__}: {error})"


def _bad_outputs(module: LightningModule, batch: object) -> dict[str, Tensor]:
    """Run the minibatch again, and return the samples for which a role's output is not finite."""
    fields = _fields(batch)
    skipped = () if isinstance(batch, Mapping) else ("reference", "reward")
    backbone = has_backbone(module).backbone
    roles = tuple(role for role in backbone.layout.roles if role not in skipped)
    tokens, attention_mask, mask = (fields[name] for name in ("tokens", "attention_mask", "mask"))
    with torch.no_grad(), module.trainer.precision_plugin.forward_context():
        outputs = backbone(roles, tokens, attention_mask, mask)
    return only_bad({OUTPUTS.get(role, role): bad_rows(value, mask) for role, value in outputs.items()})


def _texts(module: LightningModule, batch: object) -> list[tuple[str, str]]:
    """Return prompt and response of each sample of a minibatch."""
    fields = _fields(batch)
    tokens, attention_mask, mask = (fields[name] for name in ("tokens", "attention_mask", "mask"))
    width = tokens.shape[1] - mask.shape[1]
    prompts = [row[keep] for row, keep in zip(tokens[:, :width], attention_mask[:, :width].bool(), strict=True)]
    responses = [row[keep] for row, keep in zip(tokens[:, width:], mask, strict=True)]
    decoded = [
        has_backbone(module).tokenizer.batch_decode([row.tolist() for row in rows], skip_special_tokens=True)
        for rows in (prompts, responses)
    ]
    return list(zip(*decoded, strict=True))
