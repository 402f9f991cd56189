"""Stage 4, tokens: records of any kind to token ids, by chat templates, EOS and the length limits."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Literal

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lit_rlhf.data.chat import render
from lit_rlhf.data.errors import RAISE, BadRowHandler, DataError
from lit_rlhf.data.records import Ids, Record, Text, TokensT
from lit_rlhf.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TruncatedResponse = Literal["keep_eos", "no_eos", "drop"]
CHUNK = 2000  # texts per tokenizer call: enough to use its threads, few enough to bound memory


@dataclass(frozen=True)
class TokenizeOptions:
    """Length limits and EOS policy.

    Args:
        max_prompt_length: Longest prompt in tokens; of a longer one the last tokens are kept.
        max_response_length: Longest response in tokens, EOS included; of a longer one the first are kept.
        drop_overlong_prompts: Leave out rows whose prompt is too long, instead of cutting the prompt.
        truncated_response: End of a response that is cut: EOS in place of the last kept token, no EOS, or
            leave the row out. With `append_eos` off there is no EOS to keep.
        append_eos: End each response with the tokenizer's EOS.

    Raises:
        ConfigError: A length is below 1.
    """

    max_prompt_length: int = 512
    max_response_length: int = 512
    drop_overlong_prompts: bool = False
    truncated_response: TruncatedResponse = "keep_eos"
    append_eos: bool = True

    def __post_init__(self) -> None:
        lengths = {"max_prompt_length": self.max_prompt_length, "max_response_length": self.max_response_length}
        wrong = [f"{name} must be at least 1, not {length}" for name, length in lengths.items() if length < 1]
        if wrong:
            raise ConfigError("; ".join(wrong))


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
        parts = [f"{count} {text}" for count, text in lines if count]
        if parts:
            rank_zero_warn(f"Length limits, {self.total} rows: {'; '.join(parts)}.")


def tokenize(
    records: Sequence[Record[TokensT]],
    tokenizer: PreTrainedTokenizerBase,
    options: TokenizeOptions = DEFAULT_OPTIONS,
    on_bad: BadRowHandler = RAISE,
) -> list[TokensT]:
    """Tokenize records of one kind, in order; rows that the options leave out are missing, and reported in a warning.

    Every example gets the same columns: one that only some records have is None in the others.

    Args:
        records: The records, all with the same number of responses.
        tokenizer: Their tokenizer; it renders chat messages by its chat template.
        options: Length limits and EOS policy.
        on_bad: Called with the error of each bad record; when it returns, the record is left out.

    Raises:
        DataError: A prompt cannot be rendered or gives no tokens, or the tokenizer lacks what is needed.
    """

    def decode(ids: Ids) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=True))

    counts = _Counts(options, len(records))
    names = dict.fromkeys(name for record in records for name in record.columns)  # a set that keeps the order
    prompts = _encode_prompts(records, tokenizer, on_bad)
    by_position = zip(*(record.responses for record in records), strict=True)  # the first responses, the second, ...
    responses = [_encode_responses(texts, tokenizer, options) for texts in by_position]
    examples = []
    for index, (record, prompt) in enumerate(zip(records, prompts, strict=True)):
        if prompt is None:
            continue
        ids = _fit(prompt, [position[index] for position in responses], tokenizer, counts)
        if ids is not None:
            examples.append(record.with_ids(ids, {name: record.columns.get(name) for name in names}, decode))
    counts.warn()
    return examples


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to pad with: the tokenizer's pad token, else its EOS.

    Raises:
        DataError: The tokenizer has neither.
    """
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token_id, int):
            return token_id
    raise DataError(
        "has neither a pad nor an EOS token", where=_name(tokenizer), fix="Set tokenizer.pad_token and eos_token."
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
    prompt: array[int], responses: Sequence[array[int]], tokenizer: PreTrainedTokenizerBase, counts: _Counts
) -> list[Ids] | None:
    """Apply the length limits to [prompt, *responses]; None if the row is left out."""
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
    if any(one == other for one, other in combinations(kept[1:], 2)):
        counts.pairs_made_equal += 1  # they differ only past the limit, or in something the tokenizer ignores
        return None
    return kept


def _encode_prompts(
    records: Sequence[Record[TokensT]], tokenizer: PreTrainedTokenizerBase, on_bad: BadRowHandler
) -> list[array[int] | None]:
    """Token ids of each prompt; None where the record is bad."""
    ids: list[array[int] | None] = [None] * len(records)
    plain: dict[int, str] = {}
    rendered: dict[int, str] = {}
    for index, record in enumerate(records):
        try:
            if isinstance(record.prompt, str):
                plain[index] = record.prompt
            else:
                rendered[index] = render(record.prompt, tokenizer, record.where)
        except DataError as error:
            on_bad(error)
    for texts, special in ((plain, True), (rendered, False)):  # a template writes its own special tokens
        for index, encoded in zip(texts, _encode(list(texts.values()), tokenizer, special), strict=True):
            if encoded:
                ids[index] = encoded
                continue
            fix, reason = "Remove the row, or use a tokenizer that knows its characters.", "prompt without tokens"
            on_bad(DataError("gives no tokens", where=records[index].where, field="prompt", fix=fix, reason=reason))
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
        for index, ids in enumerate(batch["input_ids"]):
            end = len(ids)
            # Some tokenizers end a text with EOS; here the response follows.
            while special and end and batch["special_tokens_mask"][index][end - 1]:
                end -= 1
            encoded.append(array("i", ids[:end]))
    return encoded
