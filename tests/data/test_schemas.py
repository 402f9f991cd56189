import json
import re
import tempfile
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from data_helpers import pair_row
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_rlhf.data import (
    BadRows,
    DataError,
    Fields,
    Instruction,
    Pair,
    Row,
    load_records,
    parse_instruction,
    parse_pair,
    parse_prompt,
)
from lit_rlhf.data.parsing import _shared_beginning, cut_transcripts

USER = {"role": "user", "content": "a b"}
GOOD = {"role": "assistant", "content": "c"}
BAD = {"role": "assistant", "content": "d"}
BLANK = "\n\nHuman: \n\nAssistant:"
START = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"


def pair(data, **fields):
    return parse_pair(Row(data, "f:1"), Fields(**fields))


def test_columns():
    assert pair(pair_row()) == Pair("a b", "c", "d", "f:1")


def test_columns_under_other_names():
    row = {"q": "a b", "good": "c", "bad": "d"}
    assert pair(row, prompt="q", chosen="good", rejected="bad") == Pair("a b", "c", "d", "f:1")


@pytest.mark.parametrize(
    "row",
    [
        pair_row([USER], [GOOD], [BAD]),
        pair_row([USER], "c", "d"),
        pair_row("a b", [GOOD], [BAD]),
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        pair_row([USER], [USER, GOOD], [USER, BAD]),
        pair_row("a b", [USER, GOOD], [USER, BAD]),
    ],
    ids=["all-chat", "text-responses", "text-prompt", "no-prompt", "whole", "whole-and-text"],
)
def test_every_chat_form_gives_the_same_pair(row):
    assert pair(row) == Pair([USER], [GOOD], [BAD], "f:1")


SYSTEM = {"role": "system", "content": "s"}
HEAD = [SYSTEM, {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}, USER]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        (pair_row("a b", [*HEAD, GOOD], [*HEAD, BAD]), HEAD),
        (pair_row(" a b\n", [*HEAD, GOOD], [*HEAD, BAD]), HEAD),
        (pair_row("a b", [GOOD], [BAD]), [USER]),
        (pair_row(None, [*HEAD, GOOD], [*HEAD, BAD]), HEAD),
        (pair_row(HEAD, [*HEAD, GOOD], [*HEAD, BAD]), HEAD),
        (pair_row(HEAD, [GOOD], [BAD]), HEAD),
        (pair_row(HEAD), HEAD),
        (pair_row(), "a b"),
        ({"chosen": START + " yes", "rejected": START + " no"}, START),
    ],
    ids=[
        "text-beside-whole",
        "spaced-text",
        "text-beside-turn",
        "whole",
        "same-beside-whole",
        "turns",
        "texts",
        "plain",
        "hh",
    ],
)
def test_all_modules_see_the_same_prompt(row, prompt):
    for parse in (parse_pair, parse_instruction, parse_prompt):
        assert parse(Row(row, "f:1")).prompt == prompt


@pytest.mark.parametrize("more", [{}, {"prompt": "a b"}, {"prompt": "x"}])
def test_prompts_and_instructions_of_whole_conversations_are_the_same(more):
    row, fields = Row({"messages": [*HEAD, GOOD], **more}, "f:1"), Fields(response="messages")
    assert parse_prompt(row, fields).prompt == parse_instruction(row, fields).prompt == HEAD


def test_lists_that_are_no_messages_are_columns():
    row = {"prompt": "a", "response": ["b", "c"], "chosen": [1]}
    assert parse_prompt(Row(row, "f:1")).columns == {"response": ["b", "c"], "chosen": [1]}


def test_chat_prompt_is_the_conversation_up_to_the_last_assistant_turn():
    row = {"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, GOOD, USER, BAD]}
    assert pair(row) == Pair([USER, GOOD, USER], [GOOD], [BAD], "f:1")


@pytest.mark.parametrize("format", ["auto", "hh"])
def test_hh(format):
    row = {"chosen": START + " yes", "rejected": START + " yes, no"}
    assert pair(row, format=format) == Pair(START, " yes", " yes, no", "f:1")


FIRST = "\n\nHuman: a\n\nAssistant:"
EARLY = {"chosen": FIRST + " b\n\nHuman: c\n\nAssistant: d", "rejected": FIRST + " no\n\nHuman: e\n\nAssistant: f"}
IN_A_QUESTION = {"chosen": FIRST + " b\n\nHuman: c\n\nAssistant: d", "rejected": FIRST + " b\n\nHuman: e"}


def test_hh_transcripts_that_differ_in_an_earlier_turn_split_there():
    assert pair(EARLY) == Pair(FIRST, " b", " no", "f:1")
    assert parse_instruction(Row(EARLY, "f:1")) == Instruction(FIRST, " b", "f:1")
    trailing = {"chosen": FIRST + " b\n\nHuman: thanks"}
    assert parse_instruction(Row(trailing, "f:1")) == Instruction(FIRST, " b", "f:1")


def test_hh_transcripts_that_differ_before_the_last_turn_are_counted():
    same = {"chosen": START + " yes", "rejected": START + " no"}
    rows = [Row(data, "f:1") for data in (same, EARLY, IN_A_QUESTION, pair_row(), {"chosen": FIRST}, MISSING)]
    with pytest.warns(UserWarning, match="Format 'auto' left out: 1 the turns behind .* 1 rows whose transcripts"):
        kept = list(cut_transcripts(rows, Fields()))
    assert kept == [row for row in rows if row.data != IN_A_QUESTION]


@given(st.text("ab", max_size=6), st.text("ab", max_size=6))
def test_shared_beginning(first, second):
    shared = _shared_beginning(first, second)
    assert first.startswith(shared)
    assert second.startswith(shared)
    assert first[len(shared) : len(shared) + 1] != second[len(shared) : len(shared) + 1] or first == second == shared


def test_instruction_sources():
    fields = Fields()
    rows = [{"prompt": "a", "response": "b"}, pair_row("a", "b"), {"response": "b", **pair_row("a", "x")}]
    assert [parse_instruction(Row(row, "f:1"), fields) for row in rows] == [Instruction("a", "b", "f:1")] * 3
    chat = Instruction([USER], [GOOD], "f:1")
    assert parse_instruction(Row({"messages": [USER, GOOD]}, "f:1"), Fields(response="messages")) == chat
    assert parse_instruction(Row({"chosen": START + " d"}, "f:1"), fields) == Instruction(START, " d", "f:1")


def test_prompt_sources_and_columns():
    prompt = parse_prompt(Row({"prompt": "a", "answer": 4, "tags": ["x"]}, "f:1"))
    assert (prompt.prompt, prompt.columns) == ("a", {"answer": 4, "tags": ["x"]})
    assert parse_prompt(Row({"chosen": START + " x", "rejected": START + " y"}, "f:1")).prompt == START
    assert parse_prompt(Row({"chosen": [USER, GOOD]}, "f:1")).prompt == [USER]
    assert parse_prompt(Row(pair_row("a"), "f:1")).columns == {"chosen": "c", "rejected": "d"}


MISSING = {"prompt": "a", "chosen": "b"}
BAD_ROWS = [
    (MISSING, "'rejected'", "is missing", "*_column"),
    ({**MISSING, "rejected": None}, "'rejected'", "is missing", "Add it"),
    ({"text": "a"}, "'prompt'", "is missing", "['text']"),
    ({"chosen": "b", "rejected": "c"}, "'prompt'", "not an HH-RLHF transcript", "choose a format"),
    (pair_row(prompt=3), "'prompt'", "not int", "Give a string"),
    (pair_row(chosen={"a": 1}), "'chosen'", "not dict", "Give a string"),
    (pair_row(prompt=" \n"), "'prompt'", "empty", "Fill or remove"),
    (pair_row(chosen=""), "'chosen'", "empty", "Fill or remove"),
    (pair_row(rejected="  "), "'rejected'", "empty", "Fill or remove"),
    (pair_row(chosen="d"), "'rejected'", "same as 'chosen'", "Remove the row"),
    (pair_row(chosen="\ud800"), "'chosen'", "lone surrogate at character 1", "decoded"),
    (pair_row(chosen=[]), "'chosen'", "empty list", "Fill or remove"),
    (pair_row(chosen=[{"role": "assistant"}]), "'chosen'", "number 1 is not", "list of {'role': ..."),
    (pair_row(chosen=["x"]), "'chosen'", "number 1 is not", "Give a string"),
    (pair_row(chosen=[USER]), "'chosen'", "must end with an assistant turn", "Give"),
    (pair_row(chosen=[GOOD, GOOD]), "'chosen'", "one assistant turn, not 2", "Give"),
    (pair_row([USER, GOOD], [GOOD], [BAD]), "'prompt'", "ending with an assistant turn", "Give"),
    (pair_row("a b", [GOOD], "d"), "'rejected'", "same kind as chosen", "Give"),
    (pair_row("x", [USER, GOOD], [USER, BAD]), "'prompt'", "differs from the conversation", "Remove"),
    ({"chosen": [USER, GOOD], "rejected": [USER, BAD, USER, BAD]}, "'rejected'", "same conversation", "one"),
    ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "'rejected'", "same as 'chosen'", "Remove"),
    ({"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: b"}, "'chosen'", "holds no", "Format 'hh'"),
    ({"chosen": START + " ", "rejected": START + " b"}, "'chosen'", "empty", "Fill"),
    ({"chosen": START + " b", "rejected": START + " b"}, "'rejected'", "same as", "Remove"),
    ({"chosen": BLANK + " b", "rejected": BLANK + " c"}, "'chosen'", "empty prompt", "Fill"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "field", "problem", "fix"), BAD_ROWS)
def test_bad_pair_names_file_line_field_and_fix(write, row, field, problem, fix):
    path = write([pair_row(), b"", row])
    with pytest.raises(DataError) as caught:
        load_records([path], parse_pair)
    message = str(caught.value)
    assert message.startswith(f"rows.jsonl:3: field {field} ")
    assert problem in message
    assert fix in message


def test_skipped_rows_are_counted_by_reason_in_one_warning(write):
    bad = BadRows("skip")
    path = write([MISSING, pair_row(), b"{", pair_row(chosen=""), MISSING, b"\xff"])
    assert load_records([path], parse_pair, bad) == [Pair("a b", "c", "d", "rows.jsonl:2")]
    with pytest.warns(UserWarning, match="^Skipped 5 bad rows") as caught:
        bad.warn()
    message = str(caught[0].message)
    assert len(caught) == 1
    assert "Skipped 5 bad rows: 2 x missing field 'rejected'" in message
    for fragment in ("1 x broken JSON", "1 x empty field 'chosen'", "1 x not UTF-8", "rows.jsonl:1"):
        assert fragment in message


@pytest.mark.parametrize("rows", [[], [b"", b""], [MISSING]])
def test_nothing_usable_is_an_error_even_when_skipping(write, rows):
    with pytest.raises(DataError, match=r"rows\.jsonl: no usable rows"):
        load_records([write(rows)], parse_pair, BadRows("skip"))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content"]), inner),
    max_leaves=6,
)
lines = st.one_of(
    st.binary(max_size=20),
    st.dictionaries(st.sampled_from(["prompt", "chosen", "rejected", "response"]), json_values).map(
        lambda row: json.dumps(row).encode()
    ),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(lines, min_size=1, max_size=4), st.sampled_from(["auto", "columns", "hh"]))
def test_any_bytes_give_records_or_a_data_error_with_file_and_line(content, format):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fuzz.jsonl"
        path.write_bytes(b"\n".join(content))
        for parse in (parse_pair, parse_instruction, parse_prompt):
            bad = []
            with suppress(DataError):  # no usable rows
                load_records([str(path)], partial(parse, fields=Fields(format)), bad.append)
            for error in bad:
                assert re.match(r"fuzz\.jsonl:[1-9]\d*: ", str(error))
