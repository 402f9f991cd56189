"""Sampling responses from a causal language model."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from lit_rlhf.functional import response_mask
from lit_rlhf.rollout.experience import Experience


@dataclass
class Sampling:
    """How responses are sampled. Nothing else is applied: the hub's own sampling settings are switched off.

    Args:
        max_new_tokens: Longest response, in tokens.
        min_new_tokens: No EOS before this many tokens.
        temperature: Divides the logits; log-probs are taken at the same temperature.
        top_p: Nucleus probability mass; 1 samples the policy itself.
        top_k: Number of most probable tokens kept; 0 keeps all.
    """

    max_new_tokens: int = 64
    min_new_tokens: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def problems(self) -> list[str]:
        """Return what is wrong with the settings, one line each."""
        found = []
        if self.max_new_tokens < 1:
            found.append(f"sampling.max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            found.append(f"sampling.min_new_tokens must be in 0..{self.max_new_tokens}, got {self.min_new_tokens}")
        if self.temperature <= 0:
            found.append(f"sampling.temperature must be positive, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            found.append(f"sampling.top_p must be in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            found.append(f"sampling.top_k must not be negative, got {self.top_k}")
        return found

    def to_config(self, pad_id: int, eos_ids: list[int], greedy: bool = False) -> GenerationConfig:
        """Return the complete generation config.

        A field left None would be filled from the model's config or from transformers' defaults (``top_k=50``).
        """
        settings: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "min_new_tokens": self.min_new_tokens,
            "pad_token_id": pad_id,
            "eos_token_id": eos_ids,
        }
        if greedy:
            return GenerationConfig(do_sample=False, **settings)
        return GenerationConfig(
            do_sample=True, temperature=self.temperature, top_p=self.top_p, top_k=self.top_k, **settings
        )


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokens: Tensor,
    attention_mask: Tensor,
    sampling: Sampling,
    pad_id: int,
    eos_ids: list[int],
    greedy: bool = False,
    batch_size: int | None = None,
) -> Experience:
    """Sample one response a prompt.

    Args:
        model: The language model, its LoRA set already on.
        tokens: ``[N, P]`` long, left-padded.
        attention_mask: ``[N, P]`` bool, True = token counts.
        sampling: Settings.
        pad_id: Fills responses after their EOS.
        eos_ids: Every id that ends a response.
        greedy: Take the most probable token instead of sampling.
        batch_size: Prompts decoded at once; None decodes all.

    Returns:
        An :class:`Experience` with the sequence fields filled, all responses padded to one T.

    Raises:
        RuntimeError: The model is in train mode, where gradient checkpointing throws the KV cache away.
    """
    if any(m.training for m in model.modules() if not isinstance(m, nn.Identity)):
        raise RuntimeError("generate needs the model in eval mode: in train mode checkpointing drops the KV cache")
    config = sampling.to_config(pad_id, eos_ids, greedy)
    parts = []
    for start in range(0, tokens.shape[0], batch_size or tokens.shape[0]):
        rows = slice(start, start + (batch_size or tokens.shape[0]))
        parts.append(
            model.generate(tokens[rows], attention_mask=attention_mask[rows].long(), generation_config=config)  # type: ignore[operator]
        )
    width = max(part.shape[1] for part in parts)
    joined = torch.cat([nn.functional.pad(part, (0, width - part.shape[1]), value=pad_id) for part in parts])
    responses = joined[:, tokens.shape[1] :]
    eos = torch.tensor(eos_ids, device=tokens.device)
    mask = response_mask(responses, eos)
    return Experience(
        tokens=joined,
        attention_mask=torch.cat([attention_mask.bool(), mask], dim=1),
        mask=mask,
        truncated=~torch.isin(responses, eos).any(dim=1),
    )
