"""Sampling responses from a causal language model."""

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

from lit_rlhf.functional import response_mask
from lit_rlhf.rollout.decoding import DynamicDecoder, decode
from lit_rlhf.rollout.experience import Experience
from lit_rlhf.rollout.sampling import DrawnToken, Sampler, Sampling, uniform_dtype


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokens: Tensor,
    attention_mask: Tensor,
    sampling: Sampling,
    pad_id: int,
    eos_ids: list[int],
    *,
    samples: int = 1,
    greedy: bool = False,
    batch_size: int | None = None,
    keep_log_probs: bool = False,
    in_step: bool = False,
    decoder: DynamicDecoder | None = None,
) -> Experience:
    """Sample responses to each prompt and, if wanted, decode one greedily in the same call.

    The responses to one prompt stand together and share the pass over it.

    Args:
        model: The language model, its LoRA set already on.
        tokens: ``[N, P]`` long, left-padded.
        attention_mask: ``[N, P]`` bool, True = token counts.
        sampling: Settings.
        pad_id: Fills responses after their EOS.
        eos_ids: Every id that ends a response.
        samples: Responses sampled for each prompt; 0 decodes greedily only.
        greedy: Also decode the most probable tokens of each prompt.
        batch_size: Sequences decoded at once; None decodes all.
        keep_log_probs: Also fill ``log_probs`` with those of sampling, which spares a pass over the responses. They
            equal a pass to 2e-5 in float32; in bf16 they differ by up to 0.2.
        in_step: Keep all ranks at the same pass until the last has ended, as sharded models need: each pass gathers
            their weights from all ranks.
        decoder: How the model is read, and its KV cache; None is a :class:`DynamicDecoder`.

    Returns:
        An :class:`Experience` with the sequence fields filled, all responses padded to one T: ``[N * samples]``
        sampled rows, whose ``greedy`` holds the N greedy ones. Without samples: the greedy rows.

    Raises:
        RuntimeError: The model is in train mode, where gradient checkpointing throws the KV cache away.
        ValueError: Neither samples nor greedy responses are asked for.
    """
    if any(m.training for m in model.modules() if not isinstance(m, nn.Identity)):
        raise RuntimeError("generate needs the model in eval mode: in train mode checkpointing drops the KV cache")
    per_prompt = samples + int(greedy)
    if per_prompt < 1:
        raise ValueError("generate: samples is 0 and greedy is False, so there is nothing to decode")
    device = tokens.device
    is_greedy = (torch.arange(per_prompt, device=device) >= samples).repeat(len(tokens))
    uniforms = torch.zeros(len(tokens), per_prompt, sampling.max_new_tokens, dtype=uniform_dtype(device), device=device)
    # The greedy rows take none, so that they change no sampled one.
    uniforms[:, :samples].uniform_()
    uniforms = uniforms.flatten(0, 1)
    eos = torch.tensor(eos_ids, device=device)
    prompts_at_once = max(1, (batch_size or len(uniforms)) // per_prompt)
    decoder = decoder or DynamicDecoder()
    parts: list[Tensor] = []
    log_probs: list[Tensor] = []
    for first in range(0, len(tokens), prompts_at_once):
        prompts = slice(first, first + prompts_at_once)
        rows = slice(first * per_prompt, (first + prompts_at_once) * per_prompt)
        sampler = Sampler(sampling, uniforms[rows], is_greedy[rows], eos)
        part = _decode_part(decoder, model, tokens[prompts], attention_mask[prompts], sampler, pad_id, in_step)
        parts.append(part[0])
        log_probs.append(part[1])
    prompt_mask = attention_mask.bool().repeat_interleave(per_prompt, dim=0)
    experience = as_experience(tokens.repeat_interleave(per_prompt, dim=0), prompt_mask, _padded(parts, pad_id), eos)
    if keep_log_probs:
        experience.log_probs = _padded(log_probs, 0.0).masked_fill(~experience.mask, 0.0)
    if not (samples and greedy):
        return experience
    sampled = experience[~is_greedy]
    sampled.greedy = experience[is_greedy]
    sampled.greedy.log_probs = None
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
    """Decode some prompts, see :func:`decode`, by transformers where the decoder cannot read the model."""
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
    """Join batches of different widths."""
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
