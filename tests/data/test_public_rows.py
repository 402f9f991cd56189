"""Rows of published formats that cannot be used."""

import copy
import json
import re
import tempfile
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from public_helpers import ANSWERED, GOOD_ROWS, KINDS, PAIRED, SCORED, SECOND, comparison, flat_rows, load, post

from lit_rlhf.data import BadRows, DataError
from lit_rlhf.data.formats import FORMATS


def without(row, *path):
    return changed(row, None, *path)


def changed(row, value, *path):
    row = copy.deepcopy(row)
    target = row
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return row


REPLY = ("prompt", "replies", 0)
ANSWERS = "responses_and_scores"
BAD_ROWS = [
    ("gpt4_llm", {"prompt": "a"}, "user_input", "missing (the row has ['prompt'])"),
    ("gpt4_llm", changed(SCORED, 3, "user_input"), "user_input", "must be text, not int"),
    ("gpt4_llm", changed(SCORED, " ", "user_input"), "user_input", "empty text"),
    ("gpt4_llm", without(SCORED, ANSWERS), ANSWERS, "missing"),
    ("gpt4_llm", changed(SCORED, {}, ANSWERS), ANSWERS, "must be a list, not dict"),
    ("gpt4_llm", changed(SCORED, "x", ANSWERS, 1), f"{ANSWERS}[1]", "must be an object, not str"),
    ("gpt4_llm", changed(SCORED, None, ANSWERS, 1), f"{ANSWERS}[1]", "missing"),
    ("gpt4_llm", changed(SCORED, "", ANSWERS, 1, "response"), f"{ANSWERS}[1].response", "empty"),
    ("gpt4_llm", changed(SCORED, "9", ANSWERS, 0, "score"), f"{ANSWERS}[0].score", "a number"),
    ("gpt4_llm", without(SCORED, ANSWERS, 0, "score"), f"{ANSWERS}[0].score", "missing"),
    ("gpt4_llm", changed(SCORED, True, ANSWERS, 0, "score"), f"{ANSWERS}[0].score", "not bool"),
    ("gpt4_llm", changed(SCORED, float("nan"), ANSWERS, 0, "score"), f"{ANSWERS}[0].score", "finite"),
    ("gpt4_llm", changed(SCORED, 10**400, ANSWERS, 0, "score"), f"{ANSWERS}[0].score", "finite"),
    ("gpt4_llm", changed(SCORED, "\ud800", ANSWERS, 0, "response"), f"{ANSWERS}[0].response", "lone surrogate"),
    ("gpt4_llm", {"user_input": "a", "completion_a": "b"}, "completion_b", "missing"),
    ("oasst", {"text": "a"}, "prompt", "missing, and so is 'message_id'"),
    ("oasst", changed(SECOND, "x", "prompt"), "prompt", "must be an object, not str"),
    ("oasst", changed(SECOND, "x", "prompt", "replies"), "prompt.replies", "must be a list, not str"),
    ("oasst", changed(SECOND, 3, *REPLY), "prompt.replies[0]", "must be an object"),
    ("oasst", changed(SECOND, 3, "tree_state"), "tree_state", "must be text"),
    ("oasst", without(SECOND, "prompt", "text"), "prompt.text", "missing"),
    ("oasst", changed(SECOND, "assistant", "prompt", "role"), "prompt.role", "must be 'prompter' here"),
    ("oasst", changed(SECOND, "prompter", *REPLY, "role"), "prompt.replies[0].role", "must be 'assistant' here"),
    ("oasst", changed(SECOND, "  ", *REPLY, "text"), "prompt.replies[0].text", "empty"),
    ("oasst", changed(SECOND, "0", *REPLY, "rank"), "prompt.replies[0].rank", "must be a number, not str"),
    ("oasst", changed(SECOND, "no", *REPLY, "deleted"), "prompt.replies[0].deleted", "must be true or false"),
    ("oasst", {"message_id": "x", "parent_id": "y", "text": "a"}, "parent_id", "does not name a message"),
    ("oasst", {"message_id": "x", "parent_id": "x", "text": "a"}, "parent_id", "leads into a cycle"),
    ("oasst", {"message_id": "x", "parent_id": 3, "text": "a"}, "parent_id", "must be text"),
    ("oasst", {"message_id": 3, "text": "a"}, "message_id", "must be text"),
    ("oasst", {"message_id": "x", "role": "prompter", "text": ""}, "text", "empty"),
    ("tldr", without(comparison(0), "info"), "info", "missing"),
    ("tldr", without(comparison(0), "info", "post"), "info.post", "missing"),
    ("tldr", without(comparison(0), "info", "subreddit"), "info.subreddit", "missing"),
    ("tldr", comparison(2), "choice", "must be 0 or 1, not 2"),
    ("tldr", comparison(-1), "choice", "must be 0 or 1, not -1"),
    ("tldr", comparison(None), "choice", "missing"),
    ("tldr", changed(comparison(0), [], "summaries"), "summaries", "two summaries, not 0"),
    ("tldr", comparison(0, second=" "), "summaries[1].text", "empty"),
    ("stack_exchange", {"question": "a"}, "answers", "missing"),
    ("stack_exchange", without(PAIRED, "response_k"), "response_k", "missing"),
    ("stack_exchange", changed(PAIRED, "", "response_j"), "response_j", "empty"),
    ("stack_exchange", without(ANSWERED, "answers", 1, "pm_score"), "answers[1].pm_score", "missing"),
    ("stack_exchange", changed(ANSWERED, 1, "answers", 0, "text"), "answers[0].text", "must be text"),
    ("shp", without(post(1), "history"), "history", "missing"),
    ("shp", post(1, first=""), "human_ref_A", "empty"),
    ("shp", post(3), "labels", "must be 0 or 1, not 3"),
    ("shp", post("1"), "labels", "must be a number, not str"),
    ("shp", post(1, ratio=0), "score_ratio", "must be positive"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Format 'oasst' left out")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("format", "row", "field", "problem"), BAD_ROWS)
def test_bad_row_names_file_line_and_field(write, kind, format, row, field, problem):
    path = write([GOOD_ROWS[format], row])
    with pytest.raises(DataError) as caught:
        load(kind, format, path)
    assert str(caught.value).startswith(f"rows.jsonl:2: field {field!r} ")
    assert problem in str(caught.value)
    bad = BadRows("skip")
    assert load(kind, format, path, on_bad=bad) or format == "oasst"
    assert bad.counts.total() == 1


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 2) | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["response", "score", "text", "pm_score", "replies", "role", "rank", "deleted", "post", "title"]
            ),
            inner,
        )
    ),
    max_leaves=8,
)


def near(row):
    """Strategy of rows that differ from a good one in a few top-level or nested values."""

    def put(row, edits):
        row = copy.deepcopy(row)
        for seed, value in edits:
            target, index = row, seed
            while True:
                keys = list(target) if isinstance(target, dict) else list(range(len(target)))
                key = keys[index % len(keys)]
                index //= len(keys)
                if not isinstance(target[key], dict | list) or not target[key] or index % 3 == 0:
                    break
                target = target[key]
            target[key] = value
            if not row:
                break
        return row

    edits = st.lists(st.tuples(st.integers(0, 10**6), json_values), max_size=3)
    return edits.map(partial(put, row))


def any_rows(format):
    goods = [GOOD_ROWS[format], ANSWERED] if format == "stack_exchange" else [GOOD_ROWS[format]]
    goods += flat_rows() if format == "oasst" else []
    fields = sorted({key for row in goods for key in row})
    foreign = st.dictionaries(st.sampled_from(fields), json_values)
    return st.lists(st.one_of(foreign, *map(near, goods)), min_size=1, max_size=5)


@pytest.mark.filterwarnings("ignore:Format")
@pytest.mark.parametrize("format", list(FORMATS))
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_objects_give_records_or_an_error_with_line_and_field(format, data):
    rows = data.draw(any_rows(format))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fuzz.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in rows))
        for kind in KINDS:
            bad = []
            with suppress(DataError):  # no usable rows
                load(kind, format, str(path), on_bad=bad.append)
            for error in bad:
                assert re.match(r"fuzz\.jsonl:[1-9]\d*: field '[\w.\[\]]+' ", str(error))
                assert error.field
