"""Stage 4, tokens: the texts of records to token ids, by EOS and the length limits."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Literal

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lit_rlhf.data.errors import RAISE, BadRowHandler, DataError
from lit_rlhf.data.records import Ids, Record, TokensT
from lit_rlhf.data.texts import ControlTokens, RowText, RowTexts
from lit_rlhf.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TruncatedResponse = Literal["keep_eos", "no_eos", "drop"]
WORD, LINE_BREAK = "a", "\n"
CHUNK = 2000  # texts per tokenizer call: enough to use its threads, few enough to bound memory


@dataclass(frozen=True)
class TokenizeOptions:
    """Length limits and EOS policy.

    Args:
        max_prompt_length: Longest prompt in tokens; of a longer one BOS and the last tokens are kept, of a chat the
            system message and the last turns.
        max_response_length: Longest response in tokens, EOS included; of a longer one the first are kept.
        drop_overlong_prompts: Leave out rows whose prompt is too long, instead of cutting the prompt.
        truncated_response: End of a response that is cut: EOS in place of the last kept token, no EOS, or
            leave the row out. With `append_eos` off there is no EOS to keep.
        append_eos: End each response with the tokenizer's EOS, or as the chat template ends an answer.
        control_tokens: What to do where the text of a control token stands in a chat message, or in a response
            before its end: keep it as that token and count it in a warning, "escape" it in all texts by a
            zero-width space behind its first character, or "refuse" the row. BOS may begin a prompt that is text,
            and EOS end a response.

    Raises:
        ConfigError: A length is below 1.
    """

    max_prompt_length: int = 512
    max_response_length: int = 512
    drop_overlong_prompts: bool = False
    truncated_response: TruncatedResponse = "keep_eos"
    append_eos: bool = True
    control_tokens: ControlTokens = "keep"

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
    headers_cut: int = 0
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
            (self.prompts_cut, f"prompts {prompt} lost their beginning, but for BOS and the last turn's header"),
            (self.headers_cut, "of these lost the header too, which alone is as long"),
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
        DataError: A record cannot be rendered or gives no tokens, or the tokenizer lacks what is needed.
    """

    def decode(ids: Ids) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=True))

    counts = _Counts(options, len(records))
    names = dict.fromkeys(name for record in records for name in record.columns)  # a set that keeps the order
    texts = RowTexts(tokenizer, options.control_tokens, options.append_eos)
    found = zip(records, texts.of(records, on_bad), strict=True)
    read = [(record, row) for record, row in found if row is not None]
    rows = [row for _, row in read]
    prompts = _encode_mixed([row.prompt for row in rows], rows, tokenizer)
    by_position = zip(*(row.responses for row in rows), strict=True)  # the first responses, the second, ...
    responses = [_encode_responses(each, rows, prompts, texts, options) for each in by_position]
    examples = []
    for index, ((record, row), prompt) in enumerate(zip(read, prompts, strict=True)):
        try:
            _check_tokens(prompt, record.where)
            ids = _fit(row, prompt, [position[index] for position in responses], texts, counts)
        except DataError as error:
            on_bad(error)
            continue
        if ids is not None:
            examples.append(record.with_ids(ids, {name: record.columns.get(name) for name in names}, decode))
    texts.warn()
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


def _check_tokens(prompt: Ids, where: str) -> None:
    if not prompt:
        fix, reason = "Remove the row, or use a tokenizer that knows its characters.", "prompt without tokens"
        raise DataError("gives no tokens", where=where, field="prompt", fix=fix, reason=reason)


def _fit(
    row: RowText, prompt: array[int], responses: Sequence[array[int]], texts: RowTexts, counts: _Counts
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
    kept: list[Ids] = [_shorten(row, prompt, texts, counts) if long_prompt else prompt]
    for response in responses:
        if len(response) > limit and ends_in_eos:
            response = response[: limit - 1] + response[-1:]  # its EOS, or its template's
        kept.append(response[:limit])
    if any(one == other for one, other in combinations(kept[1:], 2)):
        counts.pairs_made_equal += 1  # they differ only past the limit, or in something the tokenizer ignores
        return None
    return kept


def _shorten(row: RowText, prompt: array[int], texts: RowTexts, counts: _Counts) -> array[int]:
    """A prompt that is too long without its beginning: whole turns of a chat, then the beginning of the last one."""
    limit = counts.options.max_prompt_length
    for text in texts.shorter(row, limit):
        (ids,) = _encode([text], texts.tokenizer, special=False)
        if len(ids) <= limit:
            return ids
    counts.headers_cut += not row.is_text
    keeps_bos = limit > 1 and prompt[0] == texts.tokenizer.bos_token_id
    return prompt[:1] + prompt[len(prompt) - limit + 1 :] if keeps_bos else prompt[-limit:]


def _encode_responses(
    responses: Sequence[str],
    rows: Sequence[RowText],
    prompts: Sequence[array[int]],
    texts: RowTexts,
    options: TokenizeOptions,
) -> list[array[int]]:
    """Token ids of one response to each prompt, as they follow the prompt's in the joined text."""
    tokenizer = texts.tokenizer
    if _marks_beginnings(tokenizer):
        encoded = _encode_behind(responses, rows, prompts, tokenizer)
    else:
        encoded = _encode(list(responses), tokenizer, special=False)
    if not options.append_eos:
        return encoded
    result = []
    for ids, row in zip(encoded, rows, strict=True):
        ended = ids and (ids[-1] == tokenizer.eos_token_id or (not row.is_text and ids[-1] == texts.template.end_id))
        result.append(ids if ended else ids + array("i", [_eos_id(tokenizer)]))
    return result


def _marks_beginnings(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a word has other ids at the beginning of a text than behind a line break, as with most SentencePiece."""
    alone, behind = _encode([WORD, LINE_BREAK + WORD], tokenizer, special=False)
    return behind[-len(alone) :] != alone


def _encode_behind(
    responses: Sequence[str], rows: Sequence[RowText], prompts: Sequence[array[int]], tokenizer: PreTrainedTokenizerBase
) -> list[array[int]]:
    """Token ids of responses without the mark of a text's beginning.

    The joined text decides. Where its tokens run over the boundary, the model, which is given the prompt's own tokens,
    goes on in the middle of a word: the response is then read behind a line break.
    """
    joined_texts = [row.prompt + response for row, response in zip(rows, responses, strict=True)]
    joined = _encode_mixed(joined_texts, rows, tokenizer)
    result = [whole[len(prompt) :] for whole, prompt in zip(joined, prompts, strict=True)]
    apart = [i for i, prompt in enumerate(prompts) if joined[i][: len(prompt)] != prompt]
    (line_break,) = _encode([LINE_BREAK], tokenizer, special=False)
    behind = _encode([LINE_BREAK + responses[i] for i in apart], tokenizer, special=False)
    alone = _encode([responses[i] for i in apart], tokenizer, special=False)
    for i, ids, own in zip(apart, behind, alone, strict=True):
        result[i] = ids[len(line_break) :] if ids[: len(line_break)] == line_break else own
    return result


def _encode_mixed(
    texts: Sequence[str], rows: Sequence[RowText], tokenizer: PreTrainedTokenizerBase
) -> list[array[int]]:
    """Token ids of each text, with the tokenizer's leading special tokens unless its row is a chat."""
    ids: list[array[int]] = [array("i")] * len(texts)
    for is_text in (True, False):  # a template writes its own special tokens
        places = [index for index, row in enumerate(rows) if row.is_text is is_text]
        encoded = _encode([texts[index] for index in places], tokenizer, special=is_text)
        for index, found in zip(places, encoded, strict=True):
            ids[index] = found
    return ids


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase, special: bool) -> list[array[int]]:
    """Token ids of each text; `special` adds the tokenizer's leading special tokens, not trailing or repeated ones."""
    bos = tokenizer.bos_token_id
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
            written = special and end > 1 and bos is not None and ids[0] == ids[1] == bos  # BOS stands in the text too
            encoded.append(array("i", ids[int(written) : end]))
    return encoded
