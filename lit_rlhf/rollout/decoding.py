"""Decoding token by token: a language model, its KV cache, and the rows that have not ended yet."""

import inspect
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from lit_rlhf.functional import position_ids
from lit_rlhf.rollout.sampling import Sampler

# Ended rows leave the batch once no more than this part of it is still being decoded.
SHRINK_BELOW = 0.75
# On a GPU, asking whether all rows have ended makes it wait for the next step's first kernels.
CHECK_EVERY = {"cpu": 1}
CHECK_EVERY_ELSEWHERE = 8


class DynamicDecoder:
    """Runs prompts and then one token of each row at a time; the KV cache grows, and rows can be dropped from it."""

    can_shrink = True
    _cache: Cache | None = None

    def start(
        self, model: PreTrainedModel, tokens: Tensor, attention_mask: Tensor, copies: int, new_tokens: int
    ) -> Tensor | None:
        """Run the prompts, each once for all its copies.

        Args:
            model: The language model.
            tokens: ``[N, P]`` long, left-padded.
            attention_mask: ``[N, P]`` bool, True = token counts.
            copies: Rows of each prompt; they are adjacent.
            new_tokens: The most tokens that will follow.

        Returns:
            ``[N * copies, V]`` logits of the first new token; None where the model keeps other state than keys and
            values, as recurrent ones do.
        """
        self._model = model
        self._takes_positions = "position_ids" in inspect.signature(model.base_model.forward).parameters
        mask = attention_mask.long()
        logits = self._run_prompts(tokens, mask, copies, new_tokens)
        if logits is None:
            return None
        self._length = tokens.shape[1]
        mask = mask.repeat_interleave(copies, dim=0)
        self._positions = mask.sum(dim=1, keepdim=True)
        self._mask = torch.cat([mask, mask.new_ones(len(mask), new_tokens)], dim=1)
        return logits.repeat_interleave(copies, dim=0)

    def _run_prompts(self, tokens: Tensor, mask: Tensor, copies: int, new_tokens: int) -> Tensor | None:
        logits, cache = self._prefill(tokens, mask)
        if type(cache) is not DynamicCache or not all(
            type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers
        ):
            return None
        if copies > 1:
            cache.batch_repeat_interleave(copies)
        self._cache = cache
        return logits

    def _prefill(self, tokens: Tensor, mask: Tensor, **inputs: Any) -> tuple[Tensor, object]:
        """Return ``[N, V]`` logits of the last column, and the cache."""
        if self._takes_positions:
            inputs["position_ids"] = position_ids(mask)[:, : tokens.shape[1]]
        if "logits_to_keep" in inspect.signature(self._model.forward).parameters:
            # An index, not a count: a slice of one column is not contiguous, and a CPU then loads the head once per
            # row.
            inputs["logits_to_keep"] = torch.tensor([tokens.shape[1] - 1], device=tokens.device)
        output = self._model(input_ids=tokens, attention_mask=mask, use_cache=True, **inputs)
        return output.logits[:, -1], getattr(output, "past_key_values", None)

    def step(self, tokens: Tensor) -> Tensor:
        """Run ``[A]`` tokens, one per row still decoded; return ``[A, V]`` logits of the next ones."""
        inputs = {"position_ids": self._positions} if self._takes_positions else {}
        self._length += 1
        logits = self._forward(
            input_ids=tokens[:, None],
            attention_mask=self._visible(),
            past_key_values=self._cache,
            use_cache=True,
            **inputs,
        )
        self._positions = self._positions + 1
        return logits

    def _forward(self, **inputs: Any) -> Tensor:
        logits: Tensor = self._model(**inputs).logits[:, -1]
        return logits

    def _visible(self) -> Tensor:
        return self._mask[:, : self._length]

    def keep(self, index: Tensor) -> None:
        """Drop all rows but these, ``[K]`` long."""
        assert self._cache is not None
        self._cache.batch_select_indices(index)
        self._mask, self._positions = self._mask[index], self._positions[index]

    def finish(self) -> None:
        """Free the cache."""
        self._cache = None


def decode(
    decoder: DynamicDecoder,
    model: PreTrainedModel,
    tokens: Tensor,
    attention_mask: Tensor,
    sampler: Sampler,
    pad_id: int,
    in_step: bool = False,
) -> tuple[Tensor, Tensor] | None:
    """Choose tokens until every row has ended or reached the maximum length.

    Args:
        decoder: Runs the model.
        model: The language model.
        tokens: ``[N, P]`` long, left-padded prompts.
        attention_mask: ``[N, P]`` bool, True = token counts.
        sampler: Chooses; its B rows are N prompts' copies, those of a prompt adjacent.
        pad_id: Fills responses after their end.
        in_step: Continue, on all ranks, until the last rank's rows have ended.

    Returns:
        ``[B, T]`` long responses, padded to the longest, and their float32 log-probs, undefined at the padding. None
        where the decoder cannot run the model.
    """
    count, max_new_tokens = sampler.uniforms.shape
    logits = decoder.start(model, tokens, attention_mask, count // len(tokens), max_new_tokens)
    if logits is None:
        return None
    eos = sampler.eos_ids
    responses = torch.full((len(logits), max_new_tokens), pad_id, device=logits.device)
    log_probs = torch.zeros(responses.shape, device=logits.device)
    rows = torch.arange(len(logits), device=logits.device)
    ended = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    every = CHECK_EVERY.get(logits.device.type, CHECK_EVERY_ELSEWHERE)
    for step in range(max_new_tokens):
        tokens, log_probs[rows, step] = sampler(logits, step, rows)
        del logits  # not to be held while the next are computed
        tokens = tokens.masked_fill(ended, pad_id)
        responses[rows, step] = tokens
        ended = ended | torch.isin(tokens, eos)
        if step + 1 == max_new_tokens:
            break
        if (step + 1) % every == 0:
            open_rows = int((~ended).sum())
            if not _anywhere(open_rows > 0, in_step, rows.device):
                break
            if decoder.can_shrink and 0 < open_rows <= SHRINK_BELOW * len(rows):
                index = (~ended).nonzero()[:, 0]
                decoder.keep(index)
                rows, tokens, ended = rows[index], tokens[index], ended[index]
        logits = decoder.step(tokens)  # noqa: F841 (used above)
    sampler.check()
    longest = _longest(responses, eos)
    return responses[:, :longest], log_probs[:, :longest]


def _anywhere(going_on: bool, in_step: bool, device: torch.device) -> bool:
    """Return whether this rank continues, or with ``in_step`` any rank."""
    if not in_step:
        return going_on
    flag = torch.tensor(int(going_on), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


def _longest(responses: Tensor, eos: Tensor) -> int:
    """Return the columns up to the last first EOS; all of them where a row has none."""
    found = torch.isin(responses, eos)
    first = torch.where(found.any(dim=1), found.int().argmax(dim=1), responses.shape[1] - 1)
    return int(first.max()) + 1
