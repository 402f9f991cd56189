"""Sampling responses from a causal language model."""

from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

from lit_rlhf.functional import response_mask
from lit_rlhf.rollout.decoding import DynamicDecoder, decode
from lit_rlhf.rollout.experience import Experience
from lit_rlhf.rollout.sampling import DrawnToken, Sampler, Sampling, uniform_dtype


@dataclass(frozen=True)
class Request:
    """A request to an engine: responses to prompts.

    Args:
        tokens: ``[N, P]`` long, left-padded.
        attention_mask: ``[N, P]`` bool, True = token counts.
        sampling: Settings.
        pad_id: Fills responses after their EOS.
        eos_ids: Every id that ends a response.
        samples: Responses sampled for each prompt; 0 decodes greedily only.
        greedy: Also decode the most probable tokens of each prompt.
        batch_size: Sequences decoded at once; None decodes all.
        keep_log_probs: Also fill ``log_probs`` with those of sampling, which saves a forward pass over the responses.
            The two agree to 2e-5 in float32; in bf16 they differ by up to 0.2. Only for engines that return them.
        in_step: The model is sharded, and each pass gathers its weights from all ranks: keep all ranks at the same pass
            until the last has ended.

    Raises:
        ValueError: Neither samples nor greedy responses are asked for.
    """

    tokens: Tensor
    attention_mask: Tensor
    sampling: Sampling
    pad_id: int
    eos_ids: list[int]
    _: KW_ONLY
    samples: int = 1
    greedy: bool = False
    batch_size: int | None = None
    keep_log_probs: bool = False
    in_step: bool = False

    def __post_init__(self) -> None:
        if self.per_prompt < 1:
            raise ValueError("generate: samples is 0 and greedy is False, so there is nothing to decode")

    @property
    def per_prompt(self) -> int:
        """Responses to each prompt, the greedy one included."""
        return self.samples + int(self.greedy)


def generate(
    model: PreTrainedModel, *prompts: Any, decoder: DynamicDecoder | None = None, **options: Any
) -> Experience:
    """Sample responses to each prompt with a model in eval mode, its adapter already on.

    Args:
        model: The language model.
        *prompts: The first arguments of a :class:`Request`.
        decoder: How the model is run, and its KV cache; None is a :class:`DynamicDecoder`.
        **options: The others.

    Returns:
        See :meth:`lit_rlhf.rollout.Engine.respond`.

    Raises:
        RuntimeError: The model is in train mode, where gradient checkpointing discards the KV cache.
        ValueError: Neither samples nor greedy responses are asked for.
    """
    return decode_request(model, Request(*prompts, **options), decoder or DynamicDecoder())


@torch.no_grad()
def decode_request(model: PreTrainedModel, request: Request, decoder: DynamicDecoder) -> Experience:
    """Decode token by token; sampled and greedy responses to a prompt are adjacent and share the pass over it."""
    if any(m.training for m in model.modules() if not isinstance(m, nn.Identity)):
        raise RuntimeError("generate needs the model in eval mode: in train mode checkpointing drops the KV cache")
    tokens, attention_mask, per_prompt = request.tokens, request.attention_mask, request.per_prompt
    device = tokens.device
    is_greedy = (torch.arange(per_prompt, device=device) >= request.samples).repeat(len(tokens))
    shape = (len(tokens), per_prompt, request.sampling.max_new_tokens)
    uniforms = torch.zeros(*shape, dtype=uniform_dtype(device), device=device)
    # Greedy rows draw none, so they do not affect sampled ones.
    uniforms[:, : request.samples].uniform_()
    uniforms = uniforms.flatten(0, 1)
    eos = torch.tensor(request.eos_ids, device=device)
    prompts_at_once = max(1, (request.batch_size or len(uniforms)) // per_prompt)
    parts: list[Tensor] = []
    log_probs: list[Tensor] = []
    for first in range(0, len(tokens), prompts_at_once):
        prompts = slice(first, first + prompts_at_once)
        rows = slice(first * per_prompt, (first + prompts_at_once) * per_prompt)
        sampler = Sampler(request.sampling, uniforms[rows], is_greedy[rows], eos)
        part = _decode_part(
            decoder, model, tokens[prompts], attention_mask[prompts], sampler, request.pad_id, request.in_step
        )
        parts.append(part[0])
        log_probs.append(part[1])
    prompt_mask = attention_mask.bool().repeat_interleave(per_prompt, dim=0)
    responses = _padded(parts, request.pad_id)
    experience = as_experience(tokens.repeat_interleave(per_prompt, dim=0), prompt_mask, responses, eos)
    if request.keep_log_probs:
        experience.log_probs = _padded(log_probs, 0.0).masked_fill(~experience.mask, 0.0)
    if not (request.samples and request.greedy):
        return experience
    sampled = experience[~is_greedy]
    sampled.greedy = experience[is_greedy]
    sampled.greedy.log_probs = None  # type: ignore[assignment]
    return sampled


def _decode_part(
    decoder: DynamicDecoder,
    model: PreTrainedModel,
    tokens: Tensor,
    attention_mask: Tensor,
    sampler: Sampler,
    pad_id: int,
    in_step: bool,
) -> tuple[Tensor, Tensor]:
    """Decode some prompts, see :func:`decode`, by transformers where the decoder cannot run the model."""
    try:
        part = decode(decoder, model, tokens, attention_mask, sampler, pad_id, in_step)
    finally:
        decoder.finish()  # an error must not leave the cache behind
    return part or _generate_elsewhere(model, tokens, attention_mask, sampler, pad_id, in_step)


def _generate_elsewhere(
    model: PreTrainedModel,
    tokens: Tensor,
    attention_mask: Tensor,
    sampler: Sampler,
    pad_id: int,
    in_step: bool,
) -> tuple[Tensor, Tensor]:
    """Let transformers' ``generate`` decode what :func:`decode` cannot, such as recurrent models; see there."""
    copies = len(sampler.greedy) // len(tokens)
    drawn = DrawnToken(sampler, tokens.shape[1])
    done = model.generate(  # type: ignore[operator]
        tokens.repeat_interleave(copies, dim=0),
        attention_mask=attention_mask.long().repeat_interleave(copies, dim=0),
        # Complete: a field left None would be filled from the model's config or from transformers' defaults.
        generation_config=GenerationConfig(
            do_sample=False,
            max_new_tokens=sampler.sampling.max_new_tokens,
            pad_token_id=pad_id,
            eos_token_id=sampler.eos_ids.tolist(),
        ),
        logits_processor=LogitsProcessorList([drawn]),
        synced_gpus=in_step,
    )
    sampler.check()
    return done[:, tokens.shape[1] :], torch.stack(drawn.log_probs, dim=1)


def _padded(parts: list[Tensor], value: float) -> Tensor:
    """Concatenate batches of different widths, padded."""
    width = max(part.shape[1] for part in parts)
    return torch.cat([nn.functional.pad(part, (0, width - part.shape[1]), value=value) for part in parts])


def as_experience(prompts: Tensor, prompt_mask: Tensor, responses: Tensor, eos: Tensor) -> Experience:
    """Return the record of ``[B, P]`` prompts and ``[B, T]`` responses, which end with their first EOS."""
    mask = response_mask(responses, eos)
    return Experience(
        tokens=torch.cat([prompts, responses], dim=1),
        attention_mask=torch.cat([prompt_mask, mask], dim=1),
        mask=mask,
        truncated=~torch.isin(responses, eos).any(dim=1),
    )
