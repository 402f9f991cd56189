"""Samples of similar length together, without the padding that all of them have."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lit_rlhf.rollout.experience import Experience


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


def map_groups(
    function: Callable[[Experience], dict[str, Tensor]], experience: Experience, size: int
) -> dict[str, Tensor]:
    """Apply a function to groups of similar length; return ``[N]`` and ``[N, T]`` tensors in the samples' order.

    Args:
        function: Returns ``[b]`` or ``[b, T']`` tensors for ``b`` samples whose longest response has ``T'`` tokens.
        experience: N samples.
        size: Samples in a group.
    """
    groups, width = length_groups(experience, size), experience.mask.shape[1]
    parts = []
    for group in groups:
        found = function(group.take(experience))
        parts.append({k: F.pad(t, (0, width - t.shape[1])) if t.dim() == 2 else t for k, t in found.items()})
    back = torch.argsort(torch.cat([group.rows for group in groups]))
    return {name: tensor[back] for name, tensor in join(parts).items()}


def join(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Join dictionaries of tensors along the sample axis."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
