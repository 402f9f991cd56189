"""The record of one rollout."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase


@dataclass
class Experience:
    """Responses to N prompts and what was computed about them. Every tensor's first axis is the sample.

    Prompts are left-padded to P, responses right-padded to T, so that response column t is token column P+t.
    This padding is fixed once per rollout: scoring and training see the same layout, which ratio 1 needs in bf16.

    Args:
        tokens: ``[N, P+T]`` long.
        attention_mask: ``[N, P+T]`` bool, True = token counts.
        mask: ``[N, T]`` bool, True = real response token, the first EOS included.
        truncated: ``[N]`` bool, True = the response hit its length limit without an EOS.
        log_probs: ``[N, T]`` float32, the sampling policy's.
        ref_log_probs: ``[N, T]`` float32.
        values: ``[N, T]`` float32, the critic's before the update; None without a critic.
        scores: ``[N]`` float32, the reward of the whole response, as the reward gave it.
        advantages: ``[N, T]`` float32.
        returns: ``[N, T]`` float32, the critic's targets; None without a critic.
        count: 0-dim float, set on minibatches: real tokens of a minibatch, averaged over ranks and over the minibatches
            of one optimizer step. Token losses divided by it add up to the mean over all tokens of the step.
        greedy: The greedy responses to the same prompts, one a prompt, until the advantages are known; None where
            an algorithm asks for none.
    """

    tokens: Tensor
    attention_mask: Tensor
    mask: Tensor
    truncated: Tensor
    log_probs: Tensor | None = None
    ref_log_probs: Tensor | None = None
    values: Tensor | None = None
    scores: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None
    count: Tensor | None = None
    greedy: "Experience | None" = None

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def _map(self, function: Any) -> "Experience":
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: function(t) for name, t in tensors.items() if isinstance(t, Tensor)})

    def __getitem__(self, index: slice | Tensor) -> "Experience":
        """Return the samples of a slice (views) or an index tensor (copies)."""
        return self._map(lambda tensor: tensor[index] if tensor.dim() else tensor)

    def to(self, *args: Any, **kwargs: Any) -> "Experience":
        """Return the record with every tensor moved; Lightning's batch transfer calls this."""
        return self._map(lambda tensor: tensor.to(*args, **kwargs))

    def split(self, size: int) -> list["Experience"]:
        """Return consecutive chunks of at most ``size`` samples, as views."""
        return [self[start : start + size] for start in range(0, len(self), size)]

    def trim(self, prompt: int, response: int) -> "Experience":
        """Return the record with ``prompt`` and ``response`` columns left: padding dropped at both ends, as views."""
        width, longest = self.tokens.shape[1], self.mask.shape[1]
        columns = slice(width - longest - prompt, width - longest + response)
        kept: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor) and value.dim() == 2:
                kept[f.name] = value[:, columns] if value.shape[1] == width else value[:, :response]
        return replace(self, **kept)

    def decode(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """Return the response texts, special tokens removed."""
        rows = self.tokens[:, -self.mask.shape[1] :].tolist()
        lengths = self.mask.sum(dim=1).tolist()
        kept = [row[:length] for row, length in zip(rows, lengths, strict=True)]
        return tokenizer.batch_decode(kept, skip_special_tokens=True)

    def require(self, name: str) -> Tensor:
        """Return a field that an earlier step must have filled.

        Raises:
            ValueError: It is empty.
        """
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"experience has no {name} yet: the step that fills it has not run")
        return value


class LengthGroup(NamedTuple):
    """Samples of similar length, and the columns that they need."""

    rows: Tensor
    prompt: int
    response: int

    def take(self, experience: Experience) -> Experience:
        """Return the group's samples without the padding that all of them have."""
        return experience[self.rows].trim(self.prompt, self.response)


def length_groups(experience: Experience, size: int) -> list[LengthGroup]:
    """Sort the samples by length and cut them into groups of at most ``size``.

    The groups depend on the masks alone: scoring and training see the same padding, which ratio 1 needs in bf16.
    """
    responses = experience.mask.sum(dim=1).cpu()
    prompts = experience.attention_mask.sum(dim=1).cpu() - responses
    order = torch.argsort(prompts + responses, stable=True)
    return [
        LengthGroup(index.to(experience.tokens.device), int(prompts[index].max()), int(responses[index].max()))
        for index in order.split(size)
    ]


def read_groups(
    read: Callable[[Experience], dict[str, Tensor]], experience: Experience, size: int
) -> dict[str, Tensor]:
    """Read the experience in groups of similar length; return ``[N]`` and ``[N, T]`` tensors in its own order.

    Args:
        read: Returns ``[b]`` or ``[b, T']`` tensors for ``b`` samples whose longest response has ``T'`` tokens.
        experience: N samples.
        size: Samples in a group.
    """
    groups, width = length_groups(experience, size), experience.mask.shape[1]
    parts = []
    for group in groups:
        found = read(group.take(experience))
        parts.append({k: F.pad(t, (0, width - t.shape[1])) if t.dim() == 2 else t for k, t in found.items()})
    back = torch.argsort(torch.cat([group.rows for group in groups]))
    return {name: tensor[back] for name, tensor in join(parts).items()}


def join(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Join dictionaries of tensors along the sample axis."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
