"""Loading a checkpoint, an exported folder or a model for inference, and completing prompts with it."""

import sys
from collections.abc import Sequence
from pathlib import Path

from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_rlhf.backbone import StageCheckpoint, check_length, context_length, load_language_model, load_tokenizer
from lit_rlhf.data import Prompt, TokenizeOptions, answer_end_ids, collate_prompts, tokenize_prompts
from lit_rlhf.errors import ConfigError, model_errors
from lit_rlhf.rollout import Sampling, generate


def load_source(source: str, role: str = "actor") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model for inference.

    Args:
        source: A ``.ckpt`` file, a folder written by ``lit-rlhf export``, or a model name.
        role: The role to load from a checkpoint.

    Returns:
        The language model (LoRA layers inside, not merged, where there are any) and its tokenizer.

    Raises:
        ModelNotFoundError: There is no model of that name.
        CheckpointError: The checkpoint cannot be read.
        ModelFileError: The files of a model or an adapter are damaged.
        ConfigError: The checkpoint has no such role, or an adapter folder does not name its base model.
    """
    if source.endswith(".ckpt"):
        stage = StageCheckpoint.read(source)
        tokenizer = load_tokenizer(stage.spec.tokenizer or stage.spec.model)
        found = stage.role_model(role)
        return found.for_inference(), tokenizer
    if (Path(source) / "adapter_config.json").is_file():
        with model_errors(f"adapter {source} could not be loaded"):
            base = PeftConfig.from_pretrained(source).base_model_name_or_path
            if not base:
                raise ConfigError(f"{source}/adapter_config.json names no base model")
            wrapped = PeftModel.from_pretrained(load_language_model(base), source).eval()
        return wrapped.get_base_model(), load_tokenizer(source if has_tokenizer(source) else base)  # type: ignore[return-value]
    if Path(source).is_dir():
        source = str(Path(source).resolve())
    return load_language_model(source), load_tokenizer(source)


def has_tokenizer(folder: str) -> bool:
    """Return whether a folder holds its own tokenizer."""
    return (Path(folder) / "tokenizer_config.json").is_file()


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | list[dict[str, str]]],
    sampling: Sampling,
    greedy: bool = False,
    batch_size: int = 16,
) -> list[str]:
    """Return one response text per prompt, in order.

    Args:
        model: The language model.
        tokenizer: Its tokenizer.
        prompts: Texts, or lists of chat messages (rendered by the tokenizer's chat template).
        sampling: How to sample.
        greedy: Take the most probable token instead.
        batch_size: Prompts decoded at once.

    Raises:
        ConfigError: A prompt and its response exceed the model's context.
    """
    records = [Prompt(prompt, {}, f"prompt {index + 1}") for index, prompt in enumerate(prompts)]
    examples = tokenize_prompts(records, tokenizer, TokenizeOptions(max_prompt_length=sys.maxsize))
    longest = max(map(len, examples), default=0)
    check_length(context_length(model.config), longest, sampling.max_new_tokens)
    batch = collate_prompts(examples, int(tokenizer.pad_token_id))
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    listed = configured if isinstance(configured, list) else [configured]
    eos_ids = sorted({int(i) for i in [*answer_end_ids(tokenizer), *listed] if i is not None})
    pad_id = int(tokenizer.pad_token_id)
    done = generate(
        model,
        batch["tokens"].to(model.device),
        batch["attention_mask"].to(model.device),
        sampling,
        pad_id,
        eos_ids,
        samples=0 if greedy else 1,
        greedy=greedy,
        batch_size=batch_size,
    )
    return done.decode(tokenizer)
