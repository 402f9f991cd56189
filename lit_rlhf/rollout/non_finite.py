"""Finding NaN and infinity in what a rollout holds, and saying where: which numbers, which samples, what to do."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_rlhf.checkpoints import last_checkpoint
from lit_rlhf.errors import NonFiniteError
from lit_rlhf.rollout.experience import Experience
from lit_rlhf.rollout.rewards import Scored
from lit_rlhf.strategies.ranks import InTraining, any_rank, join_texts, local_shard, trainer_of

SHOWN_SAMPLES = 3
SHOWN_CHARACTERS = 120

# What an experience holds, as messages name it.
COLUMNS = {
    "scores": "reward",
    "log_probs": "log-probs of the sampling policy",
    "ref_log_probs": "log-probs of the reference",
    "values": "values of the critic before the update",
    "advantages": "advantages",
    "returns": "returns",
}


def check_rollout(module: InTraining, experience: Experience, scored: Scored, skip: bool) -> None:
    """Check a scored rollout before anything is updated from it; every rank calls this.

    Args:
        module: The module that sampled it.
        experience: Log-probs, values and scores filled in. ``left_out`` is set on all ranks if any of them found a
            number that is not finite.
        scored: Its texts, one per sample.
        skip: Warn and skip the rollout, rather than raise.

    Raises:
        NonFiniteError: A number is not finite, and ``skip`` is False.
    """
    rows = bad_columns(vars(experience))
    if hasattr(experience, "greedy") and (bad := bad_columns(vars(experience.greedy))):
        copies = len(experience) // len(experience.greedy)
        rows["reward of the greedy response"] = bad["reward"].repeat_interleave(copies)
    found = None
    if rows:
        samples = list(zip(scored.prompts, scored.responses, strict=True))
        found = f"not finite: {', '.join(rows)}\n{describe_samples(rows, samples)}"
    if not any_rank(module, torch.tensor(found is not None, device=module.device)):
        return
    if not skip:
        raise_non_finite(module, "scoring", found)
    experience.left_out = True
    found = join_texts(module, found)
    rank_zero_warn(f"{place(module)}, scoring: {found}\n  its optimizer steps are skipped (on_non_finite)")


def raise_non_finite(module: InTraining, where: str, found: str | None) -> NoReturn:
    """Raise on every rank, with what the ranks found, the last good checkpoint and what to do; every rank calls this.

    Args:
        module: The module in training.
        where: Stage of the iteration, such as ``scoring``.
        found: What this rank found; None for nothing.

    Raises:
        NonFiniteError: Always.
    """
    trainer = trainer_of(module)
    path = None if trainer is None else last_checkpoint(trainer)
    resume = f"resume with --ckpt_path {path}" if path else "start again"
    found = join_texts(module, found)
    raise NonFiniteError(
        f"{place(module)}, {where}: {found}\n"
        f"  last good checkpoint: {path or 'none was saved yet'}\n"
        f"  Lower the learning rate, set trainer.gradient_clip_val, or correct the reward or the data; then "
        f"{resume}. model.on_non_finite: skip_step skips such steps instead"
    )


def explain_sampling(module: InTraining, named_parameters: Iterable[tuple[str, Tensor]]) -> NonFiniteError:
    """Return the error of a policy whose logits are not finite: which weights are to blame, and what to do."""
    trainer = trainer_of(module)
    weights = {name: local_shard(p.detach()) for name, p in named_parameters}
    path = None if trainer is None else last_checkpoint(trainer)
    return NonFiniteError(
        f"{place(module)}, generation: the policy's logits are not finite\n"
        f"{describe_parameters(weights, 'weights') or '  all weights are finite: the trunk itself overflows'}\n"
        f"  last good checkpoint: {path or 'none was saved yet'}\n"
        "  Lower the learning rate, or set model.dtype to bfloat16 or float32; then resume from that checkpoint"
    )


def place(module: InTraining) -> str:
    """Return ``iteration 3 of 16``, or ``epoch 3 of 16`` for modules without rollouts."""
    trainer = trainer_of(module)
    word = "iteration" if hasattr(module, "rollout_buffer") else "epoch"
    if trainer is None:
        return f"this {word}"
    total = f" of {trainer.max_epochs}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
    return f"{word} {trainer.current_epoch + 1}{total}"


def bad_columns(fields: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the samples with a number that is not finite, by the column's name in a message.

    Args:
        fields: An experience's, or a batch's; those of :data:`COLUMNS` are looked at, under ``mask``.

    Returns:
        ``[N]`` bool for each column with such a sample.
    """
    present = {words: fields[name] for name, words in COLUMNS.items() if name in fields}
    return only_bad({words: bad_rows(value, fields["mask"]) for words, value in present.items()})


def bad_rows(value: Tensor, mask: Tensor) -> Tensor:
    """Return ``[B]`` bool, True = a number of the sample that counts is not finite."""
    bad = ~value.isfinite()
    return (bad & mask).any(dim=1) if bad.dim() == 2 else bad


def only_bad(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop the columns without a bad sample, by one copy from the device for all of them."""
    if not rows:
        return {}
    kept = torch.stack([flags.any() for flags in rows.values()]).tolist()
    return {name: flags for (name, flags), keep in zip(rows.items(), kept, strict=True) if keep}


def describe_parameters(tensors: Mapping[str, Tensor], what: str) -> str:
    """Return how many of these are not finite, and the names of two; nothing if all are finite."""
    bad = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if not bad:
        return ""
    named = ", ".join(bad[:2]) + (", ..." if len(bad) > 2 else "")
    return f"  {len(bad)} of {len(tensors)} {what} are not finite: {named}"


def describe_samples(rows: Mapping[str, Tensor], samples: Sequence[tuple[str, str]]) -> str:
    """Return the bad samples as text, or the first ones where no single sample is to blame.

    Args:
        rows: ``[N]`` bool by what is bad.
        samples: Prompt and response of each.
    """
    bad = torch.stack(list(rows.values())).any(dim=0).nonzero().flatten().tolist() if rows else []
    chosen = bad or list(range(len(samples)))
    lines = [
        f"  {len(bad)} of {len(samples)} samples:" if bad else f"  no single sample is to blame; {len(samples)} in all:"
    ]
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
