"""Records to token ids: chat templates, EOS, and the length limits."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lit_rlhf.data.errors import BadRowHandler, DataError, raise_error
from lit_rlhf.data.schemas import Instruction, Messages, Pair, Prompt, Text
from lit_rlhf.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TruncatedResponse = Literal["keep_eos", "no_eos", "drop"]
CHUNK = 2000  # texts per tokenizer call: enough to use its threads, few enough to bound memory
Ids = Sequence[int]  # in practice array("i"): 4 bytes a token, where a list takes 36


@dataclass(frozen=True)
class PairTokens:
    """Token ids of a preference pair."""

    prompt: Ids
    chosen: Ids
    rejected: Ids

    def __len__(self) -> int:
        """Length of the longer of the two sequences."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


@dataclass(frozen=True)
class InstructionTokens:
    """Token ids of a prompt and its response."""

    prompt: Ids
    response: Ids

    def __len__(self) -> int:
        """Length of the sequence."""
        return len(self.prompt) + len(self.response)


@dataclass(frozen=True)
class PromptTokens:
    """Token ids of a prompt, the text they decode to without special tokens, and the row's other fields."""

    prompt: Ids
    text: str
    columns: Mapping[str, Any]

    def __len__(self) -> int:
        """Length of the prompt."""
        return len(self.prompt)


@dataclass(frozen=True)
class TokenizeOptions:
    """Length limits and EOS policy.

    Args:
        max_prompt_length: Longest prompt in tokens; of a longer one the last tokens are kept.
        max_response_length: Longest response in tokens, EOS included; of a longer one the first are kept.
        drop_overlong_prompts: Leave rows out whose prompt is too long, instead of cutting the prompt.
        truncated_response: End of a response that is cut: EOS in place of the last kept token, no EOS, or
            leave the row out. With `append_eos` off there is no EOS to keep.
        append_eos: End each response with the tokenizer's EOS.

    Raises:
        ValueError: A length is below 1.
    """

    max_prompt_length: int = 512
    max_response_length: int = 512
    drop_overlong_prompts: bool = False
    truncated_response: TruncatedResponse = "keep_eos"
    append_eos: bool = True

    def __post_init__(self) -> None:
        for name in ("max_prompt_length", "max_response_length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")


DEFAULT_OPTIONS = TokenizeOptions()


@dataclass
class _Counts:
    """What the length limits did to a list of records, for one warning at its end."""

    options: TokenizeOptions
    total: int
    prompts_cut: int = 0
    prompts_dropped: int = 0
    responses_cut: int = 0
    responses_dropped: int = 0
    pairs_made_equal: int = 0
    responses: int = 0

    def warn(self) -> None:
        """Issue one warning, or none if nothing was cut or left out."""
        prompt = f"longer than max_prompt_length={self.options.max_prompt_length}"
        response = f"longer than max_response_length={self.options.max_response_length}"
        policy = f"truncated_response={self.options.truncated_response!r}"
        lines = [
            (self.prompts_cut, f"prompts {prompt} lost their beginning"),
            (self.prompts_dropped, f"rows were left out, their prompt being {prompt}"),
            (self.responses_cut, f"of {self.responses} responses {response} lost their end ({policy})"),
            (self.responses_dropped, f"rows were left out, a response being {response} ({policy})"),
            (self.pairs_made_equal, "pairs were left out, their responses being the same tokens"),
        ]
        told = [f"{count} {text}" for count, text in lines if count]
        if told:
            rank_zero_warn(f"Length limits, {self.total} rows: {'; '.join(told)}.")


def tokenize_pairs(
    pairs: Sequence[Pair],
    tokenizer: PreTrainedTokenizerBase,
    options: TokenizeOptions = DEFAULT_OPTIONS,
    on_bad: BadRowHandler = raise_error,
) -> list[PairTokens]:
    """Tokenise preference pairs, in order; pairs the options leave out are missing and reported in a warning.

    Raises:
        DataError: A prompt cannot be rendered or gives no tokens, or the tokenizer lacks what is needed.
    """
    counts = _Counts(options, len(pairs))
    prompts = _encode_prompts(pairs, tokenizer, on_bad)
    chosen = _encode_responses([pair.chosen for pair in pairs], tokenizer, options)
    rejected = _encode_responses([pair.rejected for pair in pairs], tokenizer, options)
    examples = []
    for prompt, *responses in zip(prompts, chosen, rejected, strict=True):
        kept = _fit(prompt, responses, tokenizer, counts)
        if kept is None:
            continue
        if kept[1] == kept[2]:  # differing only past the limit, or in what the tokenizer does not see
            counts.pairs_made_equal += 1
            continue
        examples.append(PairTokens(*kept))
    counts.warn()
    return examples


def tokenize_instructions(
    instructions: Sequence[Instruction],
    tokenizer: PreTrainedTokenizerBase,
    options: TokenizeOptions = DEFAULT_OPTIONS,
    on_bad: BadRowHandler = raise_error,
) -> list[InstructionTokens]:
    """Tokenise instructions, in order; rows the options leave out are missing and reported in a warning.

    Raises:
        DataError: A prompt cannot be rendered or gives no tokens, or the tokenizer lacks what is needed.
    """
    counts = _Counts(options, len(instructions))
    prompts = _encode_prompts(instructions, tokenizer, on_bad)
    responses = _encode_responses([row.response for row in instructions], tokenizer, options)
    kept = [_fit(prompt, [ids], tokenizer, counts) for prompt, ids in zip(prompts, responses, strict=True)]
    counts.warn()
    return [InstructionTokens(*parts) for parts in kept if parts is not None]


def tokenize_prompts(
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    options: TokenizeOptions = DEFAULT_OPTIONS,
    on_bad: BadRowHandler = raise_error,
) -> list[PromptTokens]:
    """Tokenise prompts, in order; prompts the options leave out are missing and reported in a warning.

    Every example gets the same columns: a field that only some rows have is None in the others.

    Raises:
        DataError: A prompt cannot be rendered or gives no tokens, or the tokenizer lacks what is needed.
    """
    counts = _Counts(options, len(prompts))
    names = dict.fromkeys(name for prompt in prompts for name in prompt.columns)  # a set that keeps the order
    encoded = _encode_prompts(prompts, tokenizer, on_bad)
    kept = [(row, _fit(ids, [], tokenizer, counts)) for row, ids in zip(prompts, encoded, strict=True)]
    examples = [(row, parts[0]) for row, parts in kept if parts is not None]
    counts.warn()
    if not examples:  # of no sequences, transformers decodes one empty text
        return []
    texts = tokenizer.batch_decode([list(ids) for _, ids in examples], skip_special_tokens=True)
    return [
        PromptTokens(ids, text, {name: row.columns.get(name) for name in names})
        for (row, ids), text in zip(examples, texts, strict=True)
    ]


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to pad with: the tokenizer's pad token, else its EOS.

    Raises:
        DataError: The tokenizer has neither.
    """
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token_id, int):
            return token_id
    raise DataError(
        "has neither a pad nor an EOS token",
        where=_name(tokenizer),
        fix="Set tokenizer.pad_token and eos_token.",
    )


def _eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    if isinstance(tokenizer.eos_token_id, int):
        return tokenizer.eos_token_id
    raise DataError(
        "has no EOS token to end responses with",
        where=_name(tokenizer),
        fix="Set tokenizer.eos_token, or append_eos=False.",
    )


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"tokenizer {tokenizer.name_or_path or type(tokenizer).__name__}"


def _fit(
    prompt: array[int] | None,
    responses: Sequence[array[int]],
    tokenizer: PreTrainedTokenizerBase,
    counts: _Counts,
) -> list[Ids] | None:
    """Apply the length limits to [prompt, *responses]; None if the row is left out."""
    if prompt is None:
        return None
    options = counts.options
    limit = options.max_response_length
    counts.responses += len(responses)
    long_prompt = len(prompt) > options.max_prompt_length
    if long_prompt and options.drop_overlong_prompts:
        counts.prompts_dropped += 1
        return None
    long_responses = sum(len(response) > limit for response in responses)
    if long_responses and options.truncated_response == "drop":
        counts.responses_dropped += 1
        return None
    counts.prompts_cut += long_prompt
    counts.responses_cut += long_responses
    ends_in_eos = options.append_eos and options.truncated_response == "keep_eos"
    kept: list[Ids] = [prompt[-options.max_prompt_length :]]
    for response in responses:
        if len(response) > limit and ends_in_eos:
            response = response[: limit - 1] + array("i", [_eos_id(tokenizer)])
        kept.append(response[:limit])
    return kept


def _encode_prompts(
    rows: Sequence[Pair | Instruction | Prompt],
    tokenizer: PreTrainedTokenizerBase,
    on_bad: BadRowHandler,
) -> list[array[int] | None]:
    """Token ids of each prompt; None where the row is bad."""
    ids: list[array[int] | None] = [None] * len(rows)
    plain = {i: row.prompt for i, row in enumerate(rows) if isinstance(row.prompt, str)}
    chats = {i: row.prompt for i, row in enumerate(rows) if not isinstance(row.prompt, str)}
    rendered: dict[int, str] = {}
    for index, messages in chats.items():
        try:
            rendered[index] = _render(messages, tokenizer, rows[index].where)
        except DataError as error:
            on_bad(error)
    for texts, special in ((plain, True), (rendered, False)):  # a template writes its own special tokens
        for index, encoded in zip(texts, _encode(list(texts.values()), tokenizer, special), strict=True):
            if encoded:
                ids[index] = encoded
                continue
            on_bad(
                DataError(
                    "gives no tokens",
                    where=rows[index].where,
                    field="prompt",
                    fix="Remove the row, or use a tokenizer that knows its characters.",
                    reason="prompt without tokens",
                )
            )
    return ids


def _encode_responses(
    responses: Sequence[Text], tokenizer: PreTrainedTokenizerBase, options: TokenizeOptions
) -> list[array[int]]:
    texts = [response if isinstance(response, str) else response[-1]["content"] for response in responses]
    encoded = _encode(texts, tokenizer, special=False)
    if not options.append_eos:
        return encoded
    eos = _eos_id(tokenizer)
    return [ids if ids and ids[-1] == eos else ids + array("i", [eos]) for ids in encoded]


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase, special: bool) -> list[array[int]]:
    """Token ids of each text; `special` adds the tokenizer's leading special tokens, not trailing ones."""
    encoded: list[array[int]] = []
    for start in range(0, len(texts), CHUNK):
        batch = tokenizer(
            texts[start : start + CHUNK],
            add_special_tokens=special,
            return_attention_mask=False,
            return_special_tokens_mask=special,
            padding=False,
            truncation=False,
            verbose=False,  # our limits replace its warning about long texts
        )
        if not special:
            encoded.extend(array("i", ids) for ids in batch["input_ids"])
            continue
        for ids, added in zip(batch["input_ids"], batch["special_tokens_mask"], strict=True):
            end = len(ids)
            while end and added[end - 1]:  # some tokenizers close a text with EOS; the response follows here
                end -= 1
            encoded.append(array("i", ids[:end]))
    return encoded


def _render(messages: Messages, tokenizer: PreTrainedTokenizerBase, where: str) -> str:
    if not tokenizer.chat_template:
        raise DataError(
            "holds chat messages, but the tokenizer has no chat template",
            where=where,
            field="prompt",
            fix="Use a chat model's tokenizer, set tokenizer.chat_template, or use text fields.",
            reason="no chat template",
        )
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except TemplateError as error:
        raise DataError(
            f"is refused by the tokenizer's chat template ({error})",
            where=where,
            field="prompt",
            fix="Change the roles or their order to what the template accepts.",
            reason="refused by the chat template",
        ) from error
