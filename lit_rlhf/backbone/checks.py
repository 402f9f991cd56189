"""What can be refused before any weights load, from configs, tokenizers and the rows' lengths."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase

from lit_rlhf.backbone.adapter_tensors import check_targets
from lit_rlhf.backbone.loading import load_tokenizer, read_config
from lit_rlhf.backbone.spec import BackboneSpec
from lit_rlhf.backbone.stage_checkpoints import StageCheckpoint
from lit_rlhf.errors import ConfigError


def vocabulary(config: PretrainedConfig) -> int:
    """Return the size of the vocabulary."""
    return int(config.get_text_config(decoder=True).vocab_size)


def context_length(config: PretrainedConfig) -> int | None:
    """Return the model's longest sequence in tokens, None where its config states no limit."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)


def check_model(
    spec: BackboneSpec,
    tokenizer: PreTrainedTokenizerBase,
    longest: int = 0,
    response_length: int = 0,
    largest_id: Callable[[], int] = lambda: 0,
    parents: Mapping[str, StageCheckpoint] = MappingProxyType({}),
) -> None:
    """Refuse a model that cannot process the run's data; loads its config, no weights.

    Args:
        spec: Where its weights come from.
        tokenizer: The tokenizer of the run.
        longest: Tokens of the longest prompt or whole sequence of the data.
        response_length: Maximum number of tokens sampled after it.
        largest_id: Returns the largest token id of the data; called only where it matters.
        parents: The checkpoints that the run starts from, by their paths; see :class:`lit_rlhf.backbone.Stages`.

    Raises:
        ValueError: The tokenizer's ids or the sequences' lengths are beyond the model, a checkpoint was trained with
            another vocabulary, or LoRA settings name modules that the model does not have.
        OSError: The model's config cannot be read.
    """
    config = read_config(spec.model)
    _check_ids(spec, vocabulary(config), tokenizer, largest_id)
    check_length(context_length(config), longest, response_length)
    _check_vocabularies(spec, tokenizer, parents)
    if spec.lora is not None and spec.lora.target_modules != "all-linear":
        with torch.device("meta"):
            check_targets(AutoModelForCausalLM.from_config(config), spec.lora)


def check_length(limit: int | None, longest: int, response_length: int) -> None:
    """Refuse sequences beyond the model's context: there it fails or gives meaningless results.

    Raises:
        ValueError: They are; the lengths are named.
    """
    if limit is not None and longest + response_length > limit:
        sampled = f" and {response_length} sampled ones" if response_length else ""
        raise ConfigError(
            f"the longest sequence has {longest} tokens{sampled}, but the model's context is {limit} tokens. Shorten "
            + (
                "the prompts or the responses (max_prompt_length, max_new_tokens)"
                if sampled
                else "them (max_prompt_length, max_response_length)"
            )
        )


def _check_ids(
    spec: BackboneSpec, size: int, tokenizer: PreTrainedTokenizerBase, largest_id: Callable[[], int]
) -> None:
    if len(tokenizer) <= size:
        return
    # Tokenizers may list tokens that the model was never resized for; only those in use matter.
    special: list[int | None] = [tokenizer.pad_token_id, tokenizer.eos_token_id]
    largest = max(largest_id(), *(i for i in special if i is not None))
    if largest >= size:
        raise ConfigError(
            f"the tokenizer of {spec.tokenizer or spec.model!r} gives token ids up to {largest}, but the vocabulary of "
            f"model {spec.model!r} has {size} tokens. Set model.tokenizer to the one that the model was trained with"
        )


def _check_vocabularies(
    spec: BackboneSpec, tokenizer: PreTrainedTokenizerBase, parents: Mapping[str, StageCheckpoint]
) -> None:
    ours = spec.tokenizer or spec.model
    for path, stage in parents.items():
        name = stage.spec.tokenizer or stage.spec.model
        if name != ours and load_tokenizer(name).get_vocab() != tokenizer.get_vocab():
            raise ConfigError(
                f"checkpoint {path} was trained with the tokenizer of {name!r}, whose vocabulary is not that of "
                f"{ours!r}: the same token ids would mean other words. Set model.tokenizer"
            )
