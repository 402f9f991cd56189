"""Any bytes and any JSON rows: every row comes out or is reported with its file and line; nothing hangs."""

import contextlib
import csv
import gzip
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lit_rlhf.data import (
    BadRows,
    DataError,
    Row,
    load_records,
    parse_instruction,
    parse_pair,
    parse_prompt,
    read_rows,
)

quick = settings(max_examples=150, deadline=10_000, derandomize=True)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
values = st.recursive(
    scalars, lambda of: st.lists(of, max_size=3) | st.dictionaries(st.text(max_size=4), of, max_size=3), max_leaves=8
)
# Pure noise yields nearly valid lines too rarely.
lines = st.one_of(
    st.binary(max_size=20).map(lambda line: line.replace(b"\n", b"")),
    values.map(lambda value: json.dumps(value).encode()),
    st.dictionaries(st.text(max_size=4), scalars, max_size=3).map(lambda row: json.dumps(row).encode()),
    st.sampled_from([b"", b" ", b"\t\r", b"{", b'{"a": 1', b"\xef\xbb\xbf", b'{"a": 1}\r', b"[" * 5000, b"9" * 5000]),
)


def read(name: str, content: bytes) -> tuple[list[Row], list[DataError]]:
    """Return the rows and the errors of a file, the last error being that of the whole file where it is damaged."""
    bad: list[DataError] = []
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        try:
            rows.extend(read_rows(str(path), bad.append))
        except DataError as error:
            bad.append(error)
    for error in bad:
        assert error.where.startswith(name) or name in error.where
        assert len(str(error)) < 20_000
    return rows, bad


@quick
@given(st.lists(lines, max_size=8), st.booleans(), st.booleans())
@example([b"\xef\xbb\xbf", b'{"a": 1}'], True, False)
def test_each_line_of_jsonl_is_a_row_or_an_error_of_that_line(
    content: list[bytes], final: bool, compressed: bool
) -> None:
    data = b"\n".join(content) + (b"\n" if final else b"")
    name = "x.jsonl.gz" if compressed else "x.jsonl"
    rows, bad = read(name, gzip.compress(data) if compressed else data)
    expected = []
    for number, line in enumerate(data.split(b"\n"), start=1):
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if line.strip():
            expected.append(f"{name}:{number}")
    assert sorted([row.where for row in rows] + [error.where for error in bad]) == sorted(expected)


@quick
@given(st.binary(max_size=200), st.sampled_from(["x.jsonl", "x.json", "x.csv", "x.parquet", "x.jsonl.gz", "x.json.gz"]))
def test_noise_gives_rows_or_errors_in_every_kind_of_file(content: bytes, name: str) -> None:
    rows, bad = read(name, content)
    text = content.removeprefix(b"\xef\xbb\xbf")
    if name in ("x.parquet", "x.jsonl.gz", "x.json.gz") and content:
        assert bad
    if name == "x.json" and text.strip():
        assert rows or bad or text.strip() == b"[]"


@quick
@given(st.lists(values, max_size=6))
def test_each_item_of_a_json_array_is_a_row_or_an_error_of_that_item(items: list[Any]) -> None:
    rows, bad = read("x.json", json.dumps(items).encode())
    objects = [f"x.json item {index}" for index, item in enumerate(items, 1) if isinstance(item, dict)]
    others = [f"x.json item {index}" for index, item in enumerate(items, 1) if not isinstance(item, dict)]
    assert [row.where for row in rows] == objects
    assert [error.where for error in bad] == others


# Text that the csv module writes and reads unchanged.
cells = st.text(st.characters(exclude_characters="\r\0", codec="utf-8"), max_size=6)


@quick
@given(st.integers(1, 3).flatmap(lambda width: st.lists(st.lists(cells, min_size=width, max_size=width), max_size=5)))
def test_csv_comes_out_as_it_was_written(table: list[list[str]]) -> None:
    width = len(table[0]) if table else 1
    names = [f"column{index}" for index in range(width)]
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_ALL)
    writer.writerows([names, *table])
    rows, bad = read("x.csv", text.getvalue().encode())
    assert not bad
    assert [list(row.data.values()) for row in rows] == table


@quick
@given(st.lists(st.lists(cells, max_size=4), max_size=5))
def test_each_csv_record_of_another_width_is_an_error(table: list[list[str]]) -> None:
    text = io.StringIO()
    csv.writer(text, quoting=csv.QUOTE_ALL).writerows([["a", "b"], *table])
    rows, bad = read("x.csv", text.getvalue().encode())
    assert len(rows) == sum(len(record) == 2 for record in table)
    assert len(bad) == sum(len(record) not in (0, 2) for record in table)


@quick
@given(st.data())
def test_a_cut_parquet_file_is_an_error(data: st.DataObject) -> None:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a", "b", "c"]}), buffer)
    whole = buffer.getvalue()
    rows, bad = read("x.parquet", whole[: data.draw(st.integers(0, len(whole) - 1))])
    assert not rows
    assert len(bad) == 1
    assert len(read("x.parquet", whole)[0]) == 3


fields = st.sampled_from(["prompt", "chosen", "rejected", "response", "messages", "topic"])
messages = st.lists(
    st.dictionaries(st.sampled_from(["role", "content"]), st.sampled_from(["user", "assistant", "x", ""]) | scalars),
    max_size=3,
)
transcripts = st.sampled_from(["\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant: c", "\n\nAssistant:", "a"])


@quick
@given(
    st.lists(st.dictionaries(fields, values | messages | transcripts), max_size=6),
    st.sampled_from([parse_prompt, parse_pair, parse_instruction]),
)
def test_each_row_becomes_a_record_or_is_counted(rows: list[dict[str, Any]], parse: Any) -> None:
    bad = BadRows("skip")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        records: list[Any] = []
        with contextlib.suppress(DataError):  # nothing usable at all; every row is counted nevertheless
            records = load_records([str(path)], parse, bad)
    assert len(records) + sum(bad.counts.values()) == len(rows)
    assert bad.first is None or bad.first.where.startswith("x.jsonl:")
