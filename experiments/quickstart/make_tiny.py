"""Build the description of the tiny model that the tests and ``lit-rlhf quickstart --tiny`` use.

Run from the repository root, after ``make_preferences.py``::

    python experiments/quickstart/make_tiny.py --data lit_rlhf/assets/quickstart --out lit_rlhf/assets/tiny

It writes the configuration of a two-layer Llama and a byte-level BPE tokenizer, trained on the training
pairs of the preference data. There are no weights: a user builds the model with
``AutoModelForCausalLM.from_config`` under a seed of their own. Padding and end of sequence are different
tokens, and nothing is added to a text when it is tokenized, so tokens of a prompt and of its continuation
can be joined as they are.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

PAD, BOS, EOS = "<|pad|>", "<|im_start|>", "<|im_end|>"
MAX_LENGTH = 512
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def read_texts(path: Path) -> Iterator[str]:
    """The two whole texts, prompt and continuation, of each preference pair."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            yield row["prompt"] + row["chosen"]
            yield row["prompt"] + row["rejected"]


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE: every text can be written in it, and comes back unchanged."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer=trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def tiny_config(tokenizer: PreTrainedTokenizerBase) -> LlamaConfig:
    """A two-layer Llama that fits the tokenizer."""
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )


def verify(folder: Path, texts: list[str]) -> None:
    """Load the folder the way a user does, and check tokenizer and model."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = AutoConfig.from_pretrained(folder)
    for text in [*texts, "  two  spaces , é and 漢字\n\n\tdon't 1234 \n"]:
        ids = tokenizer(text)["input_ids"]
        if tokenizer.decode(ids) != text or not set(ids).isdisjoint(tokenizer.all_special_ids):
            raise RuntimeError(f"the tokenizer changes {text!r}")
    special = ("pad_token_id", "bos_token_id", "eos_token_id")
    if any(getattr(tokenizer, name) != getattr(config, name) for name in special):
        raise RuntimeError("the special tokens of tokenizer and configuration differ")
    messages = [{"role": "user", "content": "Hello"}]
    chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if chat != f"{BOS}user\nHello{EOS}\n{BOS}assistant\n":
        raise RuntimeError(f"unexpected chat format {chat!r}")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    batch = tokenizer(texts[:4], padding=True, return_tensors="pt")
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    if logits.shape[-1] != len(tokenizer) or not torch.isfinite(logits).all():
        raise RuntimeError(f"unexpected logits of shape {tuple(logits.shape)}")
    lengths = [len(tokenizer(text)["input_ids"]) for text in texts]
    print(f"{type(model).__name__}, {model.num_parameters()} parameters, {len(tokenizer)} tokens")
    print(f"{len(texts)} texts, {sum(lengths) / len(lengths):.1f} tokens each, at most {max(lengths)}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with preferences_train.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="folder of the tiny model")
    parser.add_argument("--vocab-size", type=int, default=1024)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    texts = list(read_texts(args.data / "preferences_train.jsonl"))
    tokenizer = train_tokenizer(texts, args.vocab_size)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(args.out)
    tiny_config(tokenizer).save_pretrained(args.out)
    verify(args.out, texts)


if __name__ == "__main__":
    main()
