"""Guards against numbers that are not finite: in the reward, log-probs, the loss, the gradient and the weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from lit_rlhf.checkpoints import last_checkpoint
from lit_rlhf.errors import NonFiniteError

OnNonFinite = Literal["raise", "skip_step"]
SHOWN_SAMPLES = 3
SHOWN_CHARACTERS = 120
SKIPS_IN_A_ROW = 100

# What an experience or a pass over it holds, by the name in a message.
COLUMNS = {
    "scores": "reward",
    "log_probs": "log-probs of the sampling policy",
    "ref_log_probs": "log-probs of the reference",
    "values": "values of the critic before the update",
    "advantages": "advantages",
    "returns": "returns",
}
READINGS = {"actor": "log-probs", "reference": "log-probs of the reference", "critic": "values", "reward": "reward"}


class NumericalGuard(Callback):
    """Stops a run at the first NaN or infinity, or leaves that optimizer step out.

    It looks at a rollout's rewards, log-probs and values; at each loss and, before the optimizer's step, the gradient;
    at the trained weights after each iteration, so that no checkpoint holds broken ones. All ranks decide together.
    Costs one pass over the gradients and one number read from the device (with several ranks: all-reduced) an
    optimizer step; with accumulation, its minibatches are kept until the step.

    A step left out changes neither weights nor optimizer state; learning-rate schedules and step counts go on. A
    rollout that is not finite leaves out every step of its iteration, and updates neither the KL controller nor reward
    statistics. Under ``16-mixed`` precision the gradient is the loss scaler's business.

    Args:
        on_non_finite: ``raise`` or ``skip_step``, which logs ``train/skipped_steps``, and stops when the trained
            weights are not finite or 100 steps in a row had to be left out.
    """

    def __init__(self, on_non_finite: OnNonFinite = "raise") -> None:
        self.on_non_finite = on_non_finite
        self._window: list[tuple[int, Any]] = []
        self._losses: list[Tensor] = []
        self._skip_iteration = False
        self._skipped = 0
        self._skipped_in_a_row = 0
        self._told_in = -1

    # ---- one iteration ------------------------------------------------------------------------------------------

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count."""
        self._window, self._losses = [], []
        self._skipped, self._skip_iteration = 0, False

    def check_rollout(self, module: Any, experience: Any, texts: Any) -> bool:
        """Check a scored rollout before anything is updated from it; every rank calls this.

        Args:
            module: The on-policy module.
            experience: Its experience, log-probs, values and scores filled in.
            texts: The :class:`Scored` texts, one a sample.

        Returns:
            True: this iteration's steps are going to be left out, nothing may be updated from the rollout.

        Raises:
            NonFiniteError: A number is not finite, under ``raise``.
        """
        rows = _bad_columns(experience)
        samples = list(zip(texts.prompts, texts.responses, strict=True))
        if experience.greedy is not None and (bad := _bad_columns(experience.greedy)):
            rows["reward of the greedy response"] = bad["reward"].repeat_interleave(
                len(experience) // len(experience.greedy)
            )
        found = None
        if rows:
            found = f"not finite: {', '.join(rows)}\n{_say_samples(rows, samples)}"
        self._skip_iteration = self._decide(module, "scoring", found)
        return self._skip_iteration

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the minibatch, to name its samples."""
        self._window.append((batch_idx, batch))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Keep the loss on its device."""
        self._losses.append(loss.detach().float())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Look at the losses and the gradient; all ranks raise, all ranks leave the step out, or none does."""
        window, losses = self._window, self._losses
        self._window, self._losses = [], []
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        gradients = [] if scaled else [_shard(p.grad) for p in _parameters(optimizer) if p.grad is not None]
        if not self._skip_iteration:
            # The norm of finite numbers can overflow; only then the slower largest number is asked for.
            for norm in (2.0, float("inf")):
                finite = _all_finite(losses, gradients, norm, pl_module.device)
                if not _any_rank(pl_module, ~finite):
                    self._skipped_in_a_row = 0
                    return
            minibatch = f"training, minibatch {window[-1][0] + 1} of {_count(trainer)}" if window else "training"
            bad_loss = not all(loss.isfinite() for loss in losses)
            # DDP spreads one rank's gradient over all: only the ranks whose own loss shows it have samples to name.
            any_bad_loss = _any_rank(pl_module, torch.tensor(bad_loss, device=pl_module.device))
            names = not finite and (bad_loss or not any_bad_loss)
            found = _explain(pl_module, optimizer, window, losses) if names else None
            self._decide(pl_module, minibatch, found)
        self._skip(optimizer)

    def _skip(self, optimizer: Optimizer) -> None:
        optimizer.zero_grad(set_to_none=True)
        self._skipped += 1
        self._skipped_in_a_row += 1

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the steps left out; look at the weights before a checkpoint is made of them."""
        if self.on_non_finite == "skip_step":
            pl_module.log("train/skipped_steps", float(self._skipped))
        weights = _named_weights(pl_module, trainer.optimizers)
        largest = _total_norm(list(weights.values()), float("inf"), pl_module.device)
        if _any_rank(pl_module, ~largest.isfinite()):
            found = _say_parameters(weights, "trained weights")
            self._raise(pl_module, "the weights after the last step", found)

    # ---- what to do ---------------------------------------------------------------------------------------------

    def _decide(self, module: Any, where: str, found: str | None) -> bool:
        """Raise on every rank, or return whether any rank found something."""
        if not _any_rank(module, torch.tensor(found is not None, device=module.device)):
            return False
        if self.on_non_finite == "raise":
            self._raise(module, where, found)
        if self._skipped_in_a_row >= SKIPS_IN_A_ROW:
            self._raise(module, where, f"{found or ''}\n  {self._skipped_in_a_row} steps in a row had to be left out")
        if self._told_in != module.current_epoch:
            self._told_in = module.current_epoch
            found = _of_all_ranks(module, found)
            what = "its optimizer steps are" if where == "scoring" else "this optimizer step is"
            rank_zero_warn(f"{place(module._trainer, module)}, {where}: {found}\n  {what} left out (on_non_finite)")
        return True

    def _raise(self, module: Any, where: str, found: str | None) -> None:
        trainer = module._trainer
        path = None if trainer is None else last_checkpoint(trainer)
        resume = f"resume with --ckpt_path {path}" if path else "start again"
        found = _of_all_ranks(module, found)
        raise NonFiniteError(
            f"{place(trainer, module)}, {where}: {found}\n"
            f"  last good checkpoint: {path or 'none was saved yet'}\n"
            f"  Lower the learning rate, set trainer.gradient_clip_val, or correct the reward or the data; then "
            f"{resume}. model.on_non_finite: skip_step leaves such steps out instead"
        )

    @contextmanager
    def together(self, module: Any) -> Iterator[None]:
        """Let an exception on one rank stop all of them, rather than leave the others waiting; every rank enters this.

        Raises:
            NonFiniteError: Sampling met logits that are not finite.
            RuntimeError: Another rank failed; its error is quoted.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        others = _gather(module, None if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is not None and "probability tensor" in str(failure):
            self._raise_sampling(module, failure)
        if failure is not None:
            raise failure
        for rank, text in enumerate(others):
            if text:
                raise RuntimeError(f"rank {rank} failed: {text}")

    def _raise_sampling(self, module: Any, failure: Exception) -> None:
        weights = {name: _shard(p.detach()) for name, p in module.named_parameters()}
        path = None if module._trainer is None else last_checkpoint(module._trainer)
        raise NonFiniteError(
            f"{place(module._trainer, module)}, generation: the policy's logits are not finite\n"
            f"{_say_parameters(weights, 'weights') or '  all weights are finite: the trunk itself overflows'}\n"
            f"  last good checkpoint: {path or 'none was saved yet'}\n"
            "  Lower the learning rate, or set model.dtype to bfloat16 or float32; then resume from that checkpoint"
        ) from failure


# ---- ranks ------------------------------------------------------------------------------------------------------


def _any_rank(module: Any, flag: Tensor) -> bool:
    """Return whether the flag is set on any rank: one all-reduced number, read once."""
    trainer = module._trainer
    return bool(flag if trainer is None else trainer.strategy.reduce(flag.float(), reduce_op="sum") > 0)


def _world_size(module: Any) -> int:
    return 1 if module._trainer is None else module._trainer.world_size


def _gather(module: Any, text: str | None) -> Sequence[str | None]:
    """Return every rank's text."""
    if _world_size(module) == 1:
        return [text]
    # The flag first: pickled objects only travel when there is something to say.
    if not _any_rank(module, torch.tensor(text is not None, device=module.device)):
        return []
    texts: list[str | None] = [None] * _world_size(module)
    torch.distributed.all_gather_object(texts, text)
    return texts


def _of_all_ranks(module: Any, found: str | None) -> str:
    """Return what the ranks found, those that found nothing left out."""
    texts = {rank: text for rank, text in enumerate(_gather(module, found)) if text}
    if _world_size(module) == 1:
        return texts[0]
    return "\n".join(f"rank {rank}: {text}" for rank, text in texts.items())


def _all_finite(losses: list[Tensor], gradients: list[Tensor], norm: float, device: torch.device) -> Tensor:
    """Return a 0-dim bool, still on its device."""
    numbers = [*losses, _total_norm(gradients, norm, device)]
    return torch.stack([number.to(device) for number in numbers]).isfinite().all()


def _total_norm(tensors: list[Tensor], norm: float, device: torch.device) -> Tensor:
    """Return the norm over all tensors, 0 for none; a rank's shard of a small parameter may be empty."""
    present = [tensor for tensor in tensors if tensor.numel()]
    return get_total_norm(present, norm).float().to(device) if present else torch.zeros((), device=device)


def _shard(tensor: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


# ---- words ------------------------------------------------------------------------------------------------------


def place(trainer: Trainer | None, module: Any) -> str:
    """Return ``iteration 3 of 16``, or ``epoch 3 of 16`` for modules without rollouts."""
    word = "iteration" if hasattr(module, "rollout_buffer") else "epoch"
    if trainer is None:
        return f"this {word}"
    total = f" of {trainer.max_epochs}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
    return f"{word} {trainer.current_epoch + 1}{total}"


def _count(trainer: Trainer) -> str:
    return str(trainer.num_training_batches)


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _named_weights(module: Any, optimizers: Sequence[Optimizer]) -> dict[str, Tensor]:
    """Return the trained tensors by name, as the optimizers hold them: ``requires_grad`` flips with the LoRA set."""
    trained = {id(parameter) for optimizer in optimizers for parameter in _parameters(optimizer)}
    return {name: _shard(p.detach()) for name, p in module.named_parameters() if id(p) in trained}


def _explain(module: Any, optimizer: Optimizer, window: list[tuple[int, Any]], losses: list[Tensor]) -> str:
    """Return what is not finite: losses, gradients by name, weights by name, and the samples that show it."""
    parts = []
    bad_losses = [index for index, loss in enumerate(losses) if not loss.isfinite()]
    for index in bad_losses:
        number = window[index][0] + 1 if index < len(window) else index + 1
        parts.append(f"the loss is {float(losses[index])}" + (f" (minibatch {number})" if len(window) > 1 else ""))
    trained = _named_weights(module, [optimizer])
    gradients = {n: _shard(p.grad) for n, p in module.named_parameters() if n in trained and p.grad is not None}
    weights = {name: _shard(p.detach()) for name, p in module.named_parameters()}
    lines = [_say_parameters(gradients, "gradients"), _say_parameters(weights, "weights before the step")]
    if not parts:
        parts.append("the loss is finite, its gradient is not")
    suspects = [window[index] for index in bad_losses if index < len(window)] or window
    lines += [_say_batch(module, batch) for _, batch in suspects[:1]]
    return "\n".join([", ".join(parts), *(line for line in lines if line)])


def _say_parameters(tensors: dict[str, Tensor], what: str) -> str:
    bad = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if not bad:
        return ""
    named = ", ".join(bad[:2]) + (", ..." if len(bad) > 2 else "")
    return f"  {len(bad)} of {len(tensors)} {what} are not finite: {named}"


def _say_batch(module: Any, batch: Any) -> str:
    """Return the samples of a minibatch whose numbers are not finite, or its first ones where none stands out."""
    if not all(isinstance(_field(batch, name), Tensor) for name in ("tokens", "attention_mask", "mask")):
        return ""  # a batch of a module of the user's own
    try:
        rows = _bad_columns(batch)
        # A pass over a sharded model needs every rank.
        if not any(isinstance(parameter, DTensor) for parameter in module.parameters()):
            rows |= _bad_readings(module, batch)
        return _say_samples(rows, _texts(module, batch))
    except Exception as error:  # the first error matters more than this one
        return f"  (its samples could not be read: {type(error).__name__}: {error})"


def _say_samples(rows: dict[str, Tensor], samples: list[tuple[str, str]]) -> str:
    bad = torch.stack(list(rows.values())).any(dim=0).nonzero().flatten().tolist() if rows else []
    chosen = bad or list(range(len(samples)))
    lines = [f"  {len(bad)} of {len(samples)} samples:" if bad else f"  no sample stands out; {len(samples)} in all:"]
    for index in chosen[:SHOWN_SAMPLES]:
        prompt, response = (_shortened(text) for text in samples[index])
        names = ", ".join(name for name, flags in rows.items() if flags[index])
        lines.append(f"    sample {index}: prompt {prompt}, response {response}" + (f" ({names})" if names else ""))
    if len(chosen) > SHOWN_SAMPLES:
        lines.append(f"    and {len(chosen) - SHOWN_SAMPLES} more")
    return "\n".join(lines)


def _shortened(text: str) -> str:
    half = SHOWN_CHARACTERS // 2
    return repr(text if len(text) <= SHOWN_CHARACTERS else f"{text[:half]} ... {text[-half:]}")


def _field(batch: Any, name: str) -> Any:
    return batch.get(name) if isinstance(batch, dict) else getattr(batch, name, None)


def _bad_rows(value: Tensor, mask: Tensor) -> Tensor:
    """Return ``[B]`` bool, True = a number of the sample that counts is not finite."""
    bad = ~value.isfinite()
    return (bad & mask).any(dim=1) if bad.dim() == 2 else bad


def _bad_columns(batch: Any) -> dict[str, Tensor]:
    """Return the samples of an experience with a number that is not finite, by the column's name in a message."""
    found = {}
    for name, words in COLUMNS.items():
        value = _field(batch, name)
        if value is not None:
            found[words] = _bad_rows(value, _field(batch, "mask"))
    return _only_bad(found)


def _bad_readings(module: Any, batch: Any) -> dict[str, Tensor]:
    """Read the minibatch once more, and return the samples for which a role says something that is not finite."""
    skipped = () if isinstance(batch, dict) else ("reference", "reward")
    roles = tuple(role for role in module.backbone.layout.roles if role not in skipped)
    tokens, attention_mask, mask = (_field(batch, name) for name in ("tokens", "attention_mask", "mask"))
    with torch.no_grad(), module.trainer.precision_plugin.forward_context():
        read = module.backbone(roles, tokens, attention_mask, mask)
    return _only_bad({READINGS.get(role, role): _bad_rows(value, mask) for role, value in read.items()})


def _only_bad(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave out the columns without a bad sample: one read from the device for all of them."""
    if not rows:
        return {}
    kept = torch.stack([flags.any() for flags in rows.values()]).tolist()
    return {name: flags for (name, flags), keep in zip(rows.items(), kept, strict=True) if keep}


def _texts(module: Any, batch: Any) -> list[tuple[str, str]]:
    """Return prompt and response of each sample of a minibatch."""
    tokens, attention_mask, mask = (_field(batch, name) for name in ("tokens", "attention_mask", "mask"))
    width = tokens.shape[1] - mask.shape[1]
    prompts = [row[keep] for row, keep in zip(tokens[:, :width], attention_mask[:, :width].bool(), strict=True)]
    responses = [row[keep] for row, keep in zip(tokens[:, width:], mask, strict=True)]
    decoded = [
        module.tokenizer.batch_decode([row.tolist() for row in rows], skip_special_tokens=True)
        for rows in (prompts, responses)
    ]
    return list(zip(*decoded, strict=True))
