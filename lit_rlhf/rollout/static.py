"""Decoding into a KV cache of fixed size, whose steps ``torch.compile`` turns into one graph."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from lit_rlhf.errors import ConfigError
from lit_rlhf.rollout.decoding import DynamicDecoder

# Lengths are rounded up to a multiple, so that prompts a little longer fit the existing cache.
ROUND_UP = 64


class StaticDecoder(DynamicDecoder):
    """Keeps keys and values in tensors of fixed size; rows that ended stay until all have.

    Args:
        compile: Compile the decoding step (not the pass over the prompts), on CUDA with CUDA graphs. The cache is then
            kept between calls, since a captured graph holds its address: two numbers per row, position, layer and
            key-value channel. Fewer rows are padded to those it has; more rows or a longer text need a new one.
    """

    can_shrink = False

    def __init__(self, compile: bool = False) -> None:
        super().__init__()
        self.compile = compile
        self._kept: StaticCache | None = None
        self._kept_rows = self._kept_length = 0
        self._owner: PreTrainedModel | None = None
        self._compiled: Callable[..., Any] | None = None

    def start(
        self, model: PreTrainedModel, tokens: Tensor, attention_mask: Tensor, copies: int, new_tokens: int
    ) -> Tensor:
        """Run the prompts, see :meth:`DynamicDecoder.start`.

        Raises:
            ValueError: The model's family cannot be decoded into such a cache.
        """
        if model is not self._owner:
            self._owner, self._kept, self._compiled = model, None, None
        logits = super().start(model, tokens, attention_mask, copies, new_tokens)
        assert logits is not None
        self._rows = len(logits)
        # Every step has one shape: missing rows are copies of the first one.
        index = _filled_up(torch.arange(self._rows, device=tokens.device), self._kept_rows)
        self._mask = self._full(self._mask[index])
        self._positions = self._positions[index]
        return logits

    def _run_prompts(self, tokens: Tensor, mask: Tensor, copies: int, new_tokens: int) -> Tensor:
        rows = len(tokens) * copies
        self._cache = self._take_cache(rows, tokens.shape[1] + new_tokens)
        mask = self._full(mask)
        if rows == self._kept_rows == len(tokens):
            return self._prefill(tokens, mask, past_key_values=self._cache)[0]
        once = StaticCache(config=self._model.config, max_cache_len=self._kept_length)
        logits, _ = self._prefill(tokens, mask, past_key_values=once)
        prompts = torch.arange(rows, device=tokens.device) // copies
        _copy_rows(once, self._cache, _filled_up(prompts, self._kept_rows))
        return logits

    def _full(self, mask: Tensor) -> Tensor:
        """Pad with ones: later positions are masked by the cache's own length."""
        return nn.functional.pad(mask, (0, self._kept_length - mask.shape[1]), value=1)

    def _take_cache(self, rows: int, length: int) -> StaticCache:
        if self._kept is not None and rows <= self._kept_rows and length <= self._kept_length:
            self._kept.reset()
            return self._kept
        self._kept_rows, self._kept_length = rows, -(-length // ROUND_UP) * ROUND_UP
        self._kept = None  # freed before the new one is allocated
        self._kept = new_static_cache(self._model, self._kept_length)
        return self._kept

    def step(self, tokens: Tensor) -> Tensor:
        """Run ``[A]`` tokens; return ``[A, V]`` logits of the next ones."""
        return super().step(_filled_up(tokens, self._kept_rows))[: self._rows]

    def _forward(self, **inputs: Any) -> Tensor:
        if not self.compile:
            return super()._forward(**inputs)
        if self._compiled is None:
            graphs = inputs["input_ids"].is_cuda
            self._compiled = torch.compile(self._model.__call__, mode="reduce-overhead" if graphs else "default")
        # The previous step's logits have been used: their memory may be overwritten.
        torch.compiler.cudagraph_mark_step_begin()
        logits: Tensor = self._compiled(**inputs).logits[:, -1]
        return logits

    def _visible(self) -> Tensor:
        return self._mask

    def finish(self) -> None:
        """Free the cache, unless a compiled step needs it."""
        super().finish()
        if not self.compile:
            self._kept = None


def new_static_cache(model: PreTrainedModel, length: int) -> StaticCache:
    """Return an empty cache of ``length`` positions.

    Raises:
        ValueError: The model's family cannot be decoded into one.
    """
    cache = StaticCache(config=model.config, max_cache_len=length)
    other = {type(layer).__name__ for layer in cache.layers} - {StaticLayer.__name__, StaticSlidingWindowLayer.__name__}
    if other or not getattr(model, "_can_compile_fullgraph", False):
        why = f" (it keeps {', '.join(sorted(other))})" if other else ""
        raise ConfigError(f"{type(model).__name__} cannot be decoded with a static cache{why}; set cache to dynamic")
    return cache


def _filled_up(rows: Tensor, count: int) -> Tensor:
    """Return ``[count]``: the rows, then the first one again."""
    return torch.cat([rows, rows[:1].expand(count - len(rows))])


def _copy_rows(source: StaticCache, target: StaticCache, index: Tensor) -> None:
    layers: list[tuple[Any, Any]] = list(zip(source.layers, target.layers, strict=True))
    for old, new in layers:
        keys, values = old.keys[index], old.values[index]
        if not new.is_initialized:
            new.lazy_initialization(keys, values)
        new.keys.copy_(keys)
        new.values.copy_(values)
        new.cumulative_length.copy_(old.cumulative_length)
        if hasattr(old, "cumulative_length_int"):
            new.cumulative_length_int = old.cumulative_length_int
