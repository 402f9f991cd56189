"""Architectures without weights: configs by name, at any depth, and what their KV cache occupies."""

import copy
from typing import Any

import torch
from transformers import GPT2Config, LlamaConfig, OPTConfig, PretrainedConfig

from lit_rlhf.backbone import DType, read_config
from lit_rlhf.errors import ModelFileError, ModelNotFoundError

_KEYS = {
    LlamaConfig: ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    OPTConfig: ("hidden_size", "num_hidden_layers", "num_attention_heads"),
    GPT2Config: ("n_embd", "n_layer", "n_head"),
}


def _llama(hidden: int, layers: int, heads: int, kv_heads: int, mlp: int, **other: Any) -> tuple[type, dict[str, Any]]:
    sizes = dict(zip(_KEYS[LlamaConfig], (hidden, layers, heads, kv_heads), strict=True))
    context = {"max_position_embeddings": 2048, "vocab_size": 32000, "intermediate_size": mlp}
    return LlamaConfig, {**context, **sizes, **other}


def _opt(hidden: int, layers: int, heads: int, **other: Any) -> tuple[type, dict[str, Any]]:
    sizes = dict(zip(_KEYS[OPTConfig], (hidden, layers, heads), strict=True))
    return OPTConfig, {**sizes, "ffn_dim": 4 * hidden, "word_embed_proj_dim": hidden, **other}


def _gpt2(hidden: int, layers: int, heads: int) -> tuple[type, dict[str, Any]]:
    return GPT2Config, dict(zip(_KEYS[GPT2Config], (hidden, layers, heads), strict=True))


# Published architecture numbers of the papers' models (LLaMA, Llama 2, OPT, GPT-2) and of this package's examples.
SHAPES: dict[str, tuple[type, dict[str, Any]]] = {
    "llama-7b": _llama(4096, 32, 32, 32, 11008),
    "llama-13b": _llama(5120, 40, 40, 40, 13824),
    "llama2-7b": _llama(4096, 32, 32, 32, 11008, max_position_embeddings=4096),
    "llama2-13b": _llama(5120, 40, 40, 40, 13824, max_position_embeddings=4096),
    "llama2-70b": _llama(8192, 80, 64, 8, 28672, max_position_embeddings=4096),
    "llama3-8b": _llama(4096, 32, 32, 8, 14336, max_position_embeddings=8192, vocab_size=128256),
    "opt-125m": _opt(768, 12, 12),
    "opt-350m": _opt(1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False),
    "opt-1.3b": _opt(2048, 24, 32),
    "opt-2.7b": _opt(2560, 32, 32),
    "opt-6.7b": _opt(4096, 32, 32),
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
    "smollm2-135m": _llama(
        576, 30, 9, 3, 1536, max_position_embeddings=8192, vocab_size=49152, tie_word_embeddings=True
    ),
    "smollm2-360m": _llama(
        960, 32, 15, 5, 2560, max_position_embeddings=8192, vocab_size=49152, tie_word_embeddings=True
    ),
    "smollm2-1.7b": _llama(
        2048, 24, 32, 32, 8192, max_position_embeddings=8192, vocab_size=49152, tie_word_embeddings=True
    ),
}


def load_config(model: str) -> PretrainedConfig:
    """Return the config of a built-in shape, or of any model name that the backbone accepts; no weights are read.

    Args:
        model: A name of :data:`SHAPES` (needs no network), or see :func:`lit_rlhf.backbone.resolve_source`.

    Raises:
        ModelNotFoundError: A local form names something that is not there.
        MissingPackageError: The model is a GGUF file and the ``gguf`` package is missing.
        ModelFileError: The config could not be read or fetched.
    """
    if model in SHAPES:
        kind, settings = SHAPES[model]
        config: PretrainedConfig = kind(**settings)
        return config
    try:
        return read_config(model)
    except ModelNotFoundError:
        raise
    except ModelFileError as error:
        raise ModelFileError(f"{error}. Built-in shapes: {', '.join(SHAPES)}") from error


def depth(config: PretrainedConfig) -> int:
    """Return the number of decoder layers."""
    return int(config.get_text_config(decoder=True).num_hidden_layers)


def with_depth(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """Return the config of the same architecture with its first so many decoder layers."""
    config = copy.deepcopy(config)
    text: Any = config.get_text_config(decoder=True)
    per_layer = [
        name for name, value in vars(text).items() if isinstance(value, list) and len(value) == text.num_hidden_layers
    ]
    text.num_hidden_layers = layers
    for name in per_layer:
        setattr(text, name, getattr(text, name)[:layers])
    return config


def kv_cache_bytes(config: PretrainedConfig, batch: int, tokens: int, dtype: DType) -> int:
    """Bytes of a full KV cache: layers x 2 x KV heads x head size x tokens x batch x dtype bytes.

    Sliding windows and compressed (latent) caches are smaller; neither is modeled.
    """
    text: Any = config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or getattr(text, "num_kv_heads", None)
    heads = heads or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(depth(config) * 2 * heads * size * tokens * batch * getattr(torch, dtype).itemsize)
