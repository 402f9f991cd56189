"""Stage 3, records: a row of columns or of HH-RLHF transcripts becomes a pair, an instruction or a prompt."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from lit_rlhf.data.errors import RAISE, BadRowHandler, DataError, Notes, parsed
from lit_rlhf.data.fields import bad_field, check_unicode
from lit_rlhf.data.records import Instruction, Messages, Pair, Prompt, Text, Tools
from lit_rlhf.data.sources import Row, read_rows

Format = Literal["auto", "columns", "hh"]
TOOLS = "tools"  # the column in which data sets of tool calls keep the tools
HH_HUMAN = "\n\nHuman:"
HH_ASSISTANT = "\n\nAssistant:"
RecordT = TypeVar("RecordT")


@dataclass(frozen=True)
class Fields:
    """How rows are laid out: the format, and the name of each field."""

    format: Format = "auto"
    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    response: str = "response"


DEFAULT_FIELDS = Fields()


def load_records(
    sources: Sequence[str],
    parse: Callable[[Row], RecordT],
    on_bad: BadRowHandler = RAISE,
    convert: Callable[[Iterator[Row]], Iterable[Row]] = iter,
) -> list[RecordT]:
    """Read all rows of the sources and parse each.

    Args:
        sources: Data sources, see `read_rows`.
        parse: Turns a row into a record or raises a DataError.
        on_bad: Called with the error of each bad row; when it returns, the row is left out.
        convert: Turns the rows of all sources into the rows to parse, see `converted_rows`.

    Raises:
        DataError: A source cannot be read, or no usable row remains.
    """
    rows = convert(row for source in sources for row in read_rows(source, on_bad))
    records = list(parsed(rows, parse, on_bad))
    if not records:
        raise DataError("no usable rows", where=", ".join(sources) or "data", fix="Name a source that has usable rows.")
    return records


def parse_pair(row: Row, fields: Fields = DEFAULT_FIELDS) -> Pair:
    """Turn a row into a preference pair.

    Raises:
        DataError: A field is missing, of the wrong type or empty, or chosen and rejected are the same.
    """
    if _format_of(row, fields) == "hh":
        prompt, chosen, rejected = _split_transcripts(row, fields, _text(row, fields.rejected))
        pair = Pair(prompt, _first_turn(chosen), _first_turn(rejected), row.where)
    else:
        pair = _pair_of_columns(row, fields)
    _check_not_empty(row, fields.chosen, pair.chosen)
    _check_not_empty(row, fields.rejected, pair.rejected)
    if _same_answer(pair.chosen, pair.rejected):
        raise DataError(
            f"is the same as {fields.chosen!r}",
            where=row.where,
            field=fields.rejected,
            fix="Remove the row: it states no preference.",
            reason="chosen equals rejected",
        )
    return pair


def parse_instruction(row: Row, fields: Fields = DEFAULT_FIELDS) -> Instruction:
    """Turn a row into an instruction; a pair row gives its chosen response.

    Raises:
        DataError: A field is missing, of the wrong type or empty.
    """
    if _format_of(row, fields) == "hh":
        field = fields.chosen
        prompt, answer, _ = _split_transcripts(row, fields, _optional_text(row, fields.rejected))
        response: Text = _first_turn(answer)
    else:
        field = _response_field(row, fields)
        prompt, response = _prompt_and_response(row, fields, field)
    _check_not_empty(row, field, response)
    return Instruction(prompt, response, row.where, tools=_tools(row, prompt))


def parse_prompt(row: Row, fields: Fields = DEFAULT_FIELDS) -> Prompt:
    """Turn a row into a prompt: the one that `parse_pair` and `parse_instruction` find in it.

    Raises:
        DataError: The prompt is missing, of the wrong type or empty, or differs from that of a conversation beside it.
    """
    if _format_of(row, fields) == "hh":
        prompt, _, _ = _split_transcripts(row, fields, _optional_text(row, fields.rejected))
    elif _is_chat(row.data.get(field := _response_field(row, fields))):
        prompt, _ = _prompt_and_response(row, fields, field)
    else:
        prompt = _prompt_field(row, fields)
    columns = {name: value for name, value in row.data.items() if name != fields.prompt}
    return Prompt(prompt, columns, row.where, _tools(row, prompt))


def _format_of(row: Row, fields: Fields) -> Literal["columns", "hh"]:
    """The format of a row: the one the user chose, or else the one recognized from the row itself."""
    if fields.format != "auto":
        return fields.format
    if row.data.get(fields.prompt) is not None:
        return "columns"
    chosen = row.data.get(fields.chosen)
    if isinstance(chosen, list) or isinstance(row.data.get(fields.response), list):
        return "columns"  # chat messages can hold the prompt themselves
    if isinstance(chosen, str) and chosen.startswith(HH_HUMAN):
        return "hh"
    raise bad_field(
        row,
        (fields.prompt,),
        f"is missing, and {fields.chosen!r} is not an HH-RLHF transcript (found fields: {sorted(row.data)})",
        "missing field",
        "Name the columns with the *_column options, or choose a format.",
    )


def cut_transcripts(rows: Iterable[Row], fields: Fields) -> Iterator[Row]:
    """Leave out HH-RLHF rows whose transcripts first differ in what the human says, and warn of what is cut.

    Such a row compares no answers to one prompt. Where transcripts first differ in an answer that is not the last,
    the answers are those two, and what follows them is no part of any record.
    """
    notes = Notes()
    for row in rows:
        try:
            is_hh = _format_of(row, fields) == "hh"
            _, *answers = _split_transcripts(row, fields, _optional_text(row, fields.rejected)) if is_hh else ("",)
        except DataError:
            answers = []  # the parser reports it
        if any(HH_HUMAN in answer for answer in answers):
            if _first_turn(answers[0]) == _first_turn(answers[1]):
                notes["rows whose transcripts first differ in what the human says"] += 1
                continue
            notes["the turns behind the first answer that differs, in rows that differ before their last turn"] += 1
        yield row
    notes.warn(fields.format)


def _split_transcripts(row: Row, fields: Fields, rejected: str | None) -> tuple[Text, str, str]:
    """Split HH-RLHF transcripts into prompt, the rest of chosen and the rest of rejected.

    The prompt is the longest shared beginning that ends in "Assistant:". It is cut there rather than at each
    transcript's own last turn because in some real rows the two already differ in an earlier turn.
    """
    chosen = _text(row, fields.chosen)
    shared = chosen if rejected is None else _shared_beginning(chosen, rejected)
    cut = shared.rfind(HH_ASSISTANT)
    if cut < 0:
        raise DataError(
            f"holds no {HH_ASSISTANT!r}"
            + ("" if rejected is None else f" in the beginning it shares with {fields.rejected!r}"),
            where=row.where,
            field=fields.chosen,
            fix="Format 'hh' needs whole transcripts; use format 'columns' for rows with a prompt field.",
            reason="not a pair of HH-RLHF transcripts",
        )
    _check_not_empty(row, fields.chosen, shared[:cut].removeprefix(HH_HUMAN), part="prompt")
    end = cut + len(HH_ASSISTANT)
    return chosen[:end], chosen[end:], "" if rejected is None else rejected[end:]


def _first_turn(transcript: str) -> str:
    """What the assistant says before the human's next turn, which is no part of the answer."""
    return transcript.partition(HH_HUMAN)[0]


def _shared_beginning(first: str, second: str) -> str:
    same, different = 0, min(len(first), len(second)) + 1  # lengths of beginnings; halved, as texts are long
    while different - same > 1:
        middle = (same + different) // 2
        if first[:middle] == second[:middle]:
            same = middle
        else:
            different = middle
    return first[:same]


def _pair_of_columns(row: Row, fields: Fields) -> Pair:
    prompt, chosen = _prompt_and_response(row, fields, fields.chosen)
    other_prompt, rejected = _prompt_and_response(row, fields, fields.rejected)
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise _wrong_type(row, fields.rejected, "must be of the same kind as chosen, text or messages")
    if prompt != other_prompt:
        raise DataError(
            f"does not follow the same conversation as {fields.chosen!r} up to its last turn",
            where=row.where,
            field=fields.rejected,
            fix="Both must answer the same prompt with one assistant turn.",
            reason="prompts of a pair differ",
        )
    return Pair(prompt, chosen, rejected, row.where, tools=_tools(row, prompt))


def _prompt_and_response(row: Row, fields: Fields, field: str) -> tuple[Text, Text]:
    """Prompt and response of a row in column format, both as strings or both as chat messages."""
    messages = _text_or_messages(row, field)
    if isinstance(messages, str):
        prompt = _prompt_field(row, fields)
        return prompt, messages if isinstance(prompt, str) else [{"role": "assistant", "content": messages}]
    if messages[-1]["role"] != "assistant":
        raise _wrong_type(row, field, f"must end with an assistant turn, not {messages[-1]['role']!r}")
    if len(messages) == 1:
        prompt = _prompt_field(row, fields)
        return ([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt), messages
    if all(message["role"] == "assistant" for message in messages):
        raise _wrong_type(row, field, f"must be one assistant turn, not {len(messages)} in a row")
    _check_prompt(row, field, messages[:-1])
    _check_same_prompt(row, fields, messages[:-1])
    return messages[:-1], messages[-1:]


def _response_field(row: Row, fields: Fields) -> str:
    """The field of the response, which chat messages can begin with the prompt: a row's own, else the chosen one."""
    has_own = row.data.get(fields.response) is not None or row.data.get(fields.chosen) is None
    return fields.response if has_own else fields.chosen


def _is_chat(value: Any) -> bool:
    """Whether a value is chat messages, and not some other list, which a reward function may want."""
    return isinstance(value, list) and any(isinstance(item, dict) and "role" in item for item in value)


def _check_same_prompt(row: Row, fields: Fields, conversation: Messages) -> None:
    """Refuse a prompt field that is not part of the conversation beside it: the row would have two prompts."""
    if row.data.get(fields.prompt) is None:
        return
    prompt = _prompt_field(row, fields)
    if isinstance(prompt, str):
        is_part = prompt.strip() in (message["content"].strip() for message in conversation)
    else:
        is_part = prompt == conversation
    if not is_part:
        raise DataError(
            "differs from the conversation before the response",
            where=row.where,
            field=fields.prompt,
            fix="Remove the field, or give the response as one assistant turn.",
            reason="prompt differs from the conversation",
        )


def _prompt_field(row: Row, fields: Fields) -> Text:
    prompt = _text_or_messages(row, fields.prompt)
    if isinstance(prompt, str):
        _check_not_empty(row, fields.prompt, prompt)
    else:
        _check_prompt(row, fields.prompt, prompt)
    return prompt


def _tools(row: Row, prompt: Text) -> Tools | None:
    """The row's tools for the chat template: a list of JSON schemas, or the JSON text of one or of each."""
    value = row.data.get(TOOLS)
    if isinstance(prompt, str) or value is None:
        return None
    try:
        value = json.loads(value) if isinstance(value, str) else value
        tools = [json.loads(tool) if isinstance(tool, str) else tool for tool in value]
    except (TypeError, ValueError, RecursionError):
        tools = [None]
    if not all(isinstance(tool, dict) for tool in tools):
        fix = "Give a list of JSON schemas, or its JSON text."
        raise bad_field(row, (TOOLS,), "must be a list of objects", "wrong type of field", fix)
    return [_without_nulls(tool) for tool in tools] or None


def _without_nulls(value: Any) -> Any:
    """A JSON value without the nulls that tables store for absent keys."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _check_prompt(row: Row, field: str, messages: Messages) -> None:
    if messages[-1]["role"] == "assistant":
        raise _wrong_type(row, field, "has a prompt ending with an assistant turn: nothing to answer")
    _check_not_empty(row, field, messages, part="prompt")


def _value(row: Row, field: str) -> Any:
    value = row.data.get(field)
    if value is None:  # tables store an absent field as null
        fix = "Add it, or name another field with the *_column options."
        raise bad_field(row, (field,), f"is missing (found: {sorted(row.data)})", "missing field", fix)
    return value


def _text(row: Row, field: str) -> str:
    value = _value(row, field)
    if not isinstance(value, str):
        raise _wrong_type(row, field, f"must be text or chat messages, not {type(value).__name__}")
    check_unicode(row, value, field)
    return value


def _optional_text(row: Row, field: str) -> str | None:
    return None if row.data.get(field) is None else _text(row, field)


def _text_or_messages(row: Row, field: str) -> Text:
    value = _value(row, field)
    if not isinstance(value, list):
        return _text(row, field)
    if not value:
        raise _empty(row, field, "is an empty list")
    return [_message(row, field, number, message) for number, message in enumerate(value, start=1)]


def _message(row: Row, field: str, number: int, value: Any) -> dict[str, Any]:
    """A message without the nulls that tables store for absent keys; one that only calls tools may lack content."""
    message = {key: item for key, item in value.items() if item is not None} if isinstance(value, dict) else {}
    if message.get("tool_calls"):
        message.setdefault("content", "")
    if not all(isinstance(message.get(key), str) for key in ("role", "content")):
        raise _wrong_type(row, field, f"must hold messages with text 'role' and 'content'; number {number} is not")
    check_unicode(row, message["content"], field)
    return message


def _check_not_empty(row: Row, field: str, text: Text, part: str = "text") -> None:
    calls_tools = not isinstance(text, str) and text[-1].get("tool_calls")
    if not _last_text(text).strip() and not calls_tools:
        raise _empty(row, field, f"has an empty {part}")


def _same_answer(one: Text, other: Text) -> bool:
    if isinstance(one, str) or isinstance(other, str):
        return one == other
    return all(one[-1].get(key) == other[-1].get(key) for key in ("content", "tool_calls"))


def _last_text(text: Text) -> str:
    return text if isinstance(text, str) else text[-1]["content"]


def _empty(row: Row, field: str, problem: str) -> DataError:
    return bad_field(row, (field,), problem, "empty field", "Fill or remove it.")


def _wrong_type(row: Row, field: str, problem: str) -> DataError:
    fix = "Give a string, or a list of {'role': ..., 'content': ...}."
    return bad_field(row, (field,), problem, "wrong type of field", fix)
