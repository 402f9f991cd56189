import csv
import gzip
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from lit_rlhf.data import BadRows, DataError, Row, read_rows

ROWS = [{"prompt": "a", "n": "1"}, {"prompt": "é\nb", "n": "2"}]


def rows_of(source):
    return list(read_rows(str(source)))


@pytest.mark.parametrize("name", ["r.jsonl", "r.jsonl.gz"])
def test_json_lines(write, name):
    path = write([ROWS[0], b"", ROWS[1], b"  ", b""], name)
    assert rows_of(path) == [Row(ROWS[0], f"{name}:1"), Row(ROWS[1], f"{name}:3")]


def test_json_lines_with_byte_order_mark_and_windows_line_ends(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}\r\n')
    assert [row.data for row in rows_of(path)] == [{"a": 1}, {"a": 2}]


def test_csv_names_the_line_where_a_row_starts(tmp_path):
    path = tmp_path / "r.csv"
    path.write_text('prompt,n\na,1\n\n"é\nb",2\nc,3\n', encoding="utf-8")
    assert rows_of(path) == [
        Row(ROWS[0], "r.csv:2"),
        Row(ROWS[1], "r.csv:4"),
        Row({"prompt": "c", "n": "3"}, "r.csv:6"),
    ]


def test_parquet(tmp_path):
    path = tmp_path / "r.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    assert rows_of(path) == [Row(ROWS[0], "r.parquet row 1"), Row(ROWS[1], "r.parquet row 2")]


def test_saved_dataset(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "set"))
    assert rows_of(tmp_path / "set") == [Row(ROWS[0], "set row 1"), Row(ROWS[1], "set row 2")]


def test_saved_dataset_with_splits_must_name_one(tmp_path):
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(str(tmp_path / "set"))
    with pytest.raises(DataError, match=r"several splits.*set/train"):
        rows_of(tmp_path / "set")
    assert len(rows_of(tmp_path / "set" / "train")) == 2


@pytest.mark.parametrize(("source", "split"), [("hub:some/name", "train"), ("hub:some/name:test[:10]", "test[:10]")])
def test_hub(monkeypatch, source, split):
    def load(name, split):
        return [{"name": name, "split": split}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert rows_of(source) == [Row({"name": "some/name", "split": split}, f"{source} row 1")]


def test_hub_failure_names_the_source(monkeypatch):
    def load(name, split):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match=r"hub:some/name: cannot be loaded.*offline"):
        rows_of("hub:some/name")


@pytest.mark.parametrize(
    ("name", "content", "fragments"),
    [
        ("r.jsonl", b'{"a": 1}\n{"a": \n', ["r.jsonl:2", "broken JSON", "one JSON object on each line"]),
        ("r.jsonl", b'{"a": 1}\n[1]\n', ["r.jsonl:2", "found list"]),
        ("r.jsonl", b'{"a": 1}\n\n{"a": "\xff"}\n', ["r.jsonl:3", "byte 8", "not UTF-8"]),
        ("r.jsonl", b"[" * 100_000, ["r.jsonl:1", "broken JSON"]),
        ("r.jsonl", b"1" * 5000, ["r.jsonl:1", "broken JSON"]),
        ("r.jsonl.gz", b"not gzip", ["r.jsonl.gz:1", "damaged"]),
        # Without the time, which would be part of this case's name: xdist's workers compare their names.
        ("r.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-9], ["r.jsonl.gz:", "damaged"]),
        ("r.json", b'[{"a": 1}\n{"a": 2}]', ["r.json: broken JSON", "line 2", "one array of JSON objects"]),
        ("r.json", b'{\n"a": 1}', ["r.json:1", "broken JSON", "one JSON object on each line"]),
        ("r.json", b'["\xff"]', ["r.json: byte 3", "not UTF-8"]),
        ("r.json.gz", b"not gzip", ["r.json.gz:1", "damaged"]),
        ("r.csv", b"a,b\n1,2\n1\n", ["r.csv:3", "1 fields where the header names 2"]),
        ("r.csv", b"a,b\n1,\xff\n", ["r.csv:2", "field 'b'", "not UTF-8"]),
        ("r.csv", b'a,b\n1,2\n1,"x\ny\n', ["r.csv:3", "broken CSV"]),
        ("r.csv", b"a,a\n1,2\n", ["r.csv:1", "name each column once"]),
        ("r.parquet", b"PAR1 no", ["r.parquet row 1", "not parquet"]),
        ("r.txt", b"a", ["r.txt", "unknown kind of file '.txt'", ".jsonl", "hub:owner/name"]),
    ],
)
def test_damage_is_reported_with_its_place(tmp_path, name, content, fragments):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        rows_of(tmp_path / name)
    for fragment in fragments:
        assert fragment in str(caught.value)


@pytest.mark.parametrize(
    ("source", "fragments"),
    [
        (
            "nowhere.jsonl",
            ["nowhere.jsonl: no such file or folder", ".parquet", "save_to_disk", "hub:owner/"],
        ),
        ("hub:only-a-name", ["hub:only-a-name", "hub:owner/name"]),
        (".", ["was not written by datasets' save_to_disk"]),
    ],
)
def test_unusable_sources(tmp_path, monkeypatch, source, fragments):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        rows_of(source)
    for fragment in fragments:
        assert fragment in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("r.jsonl", b'{"a": "1"}\n{"a\n{"a": "\xff"}\n7\n{"a": "2"}\n'),
        ("r.csv", b"a,b\n1,x\n1\n\xff,1\n1,2,3\n2,x\n"),
    ],
)
def test_skipping_goes_on_after_bad_rows(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    bad = BadRows("skip")
    assert [row.data["a"] for row in read_rows(str(tmp_path / name), bad)] == ["1", "2"]
    assert bad.counts.total() == 3


LONG = 'a line of "quoted" text\n' * 6500 + "ham,eggs\nsalt,oil\n"  # 150,000 characters that hold two rows


def test_csv_fields_may_be_long(tmp_path):
    with (tmp_path / "r.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["a", "b"], ["1", "x"], [LONG, "x"], ["2", "x"]])
    limit = csv.field_size_limit()
    for bad in (BadRows("error"), BadRows("skip")):
        assert [row.data["a"] for row in read_rows(str(tmp_path / "r.csv"), bad)] == ["1", LONG, "2"]
    assert csv.field_size_limit() == limit  # other users of the module keep theirs


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("r.csv", b'a,b\n1,x\n"1"2,"\nham,eggs\n"\n2,x\n'),  # ham and eggs stand inside a field
        ("r.csv", b'a,b\n1,x\n"1,x\n2,x\n3,"x"\n4,x\n'),
        ("r.json", b'{\n"rows": [\n{"a": "1"},\n{"a": "2"}\n]\n}\n'),
    ],
)
def test_a_parser_that_lost_its_place_reads_no_more_even_when_skipping(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    found = []
    with pytest.raises(DataError, match="broken"):
        found.extend(row.data["a"] for row in read_rows(str(tmp_path / name), BadRows("skip")))
    assert found in ([], ["1"])


def test_damage_stops_the_reader_even_when_skipping(tmp_path):
    (tmp_path / "r.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n' * 99)[:-9])
    with pytest.raises(DataError, match="damaged"):
        list(read_rows(str(tmp_path / "r.jsonl.gz"), BadRows("skip")))


@pytest.mark.parametrize("name", ["r.json", "r.json.gz"])
@pytest.mark.parametrize("indent", [None, 1])
def test_json_array(tmp_path, name, indent):
    content = b"\xef\xbb\xbf\n" + json.dumps(ROWS, indent=indent).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert rows_of(tmp_path / name) == [Row(ROWS[0], f"{name} item 1"), Row(ROWS[1], f"{name} item 2")]


def test_json_file_of_lines(write):
    assert rows_of(write([b"", ROWS[0], ROWS[1]], "r.json")) == [Row(ROWS[0], "r.json:2"), Row(ROWS[1], "r.json:3")]


def test_items_that_are_no_objects_can_be_skipped(tmp_path):
    (tmp_path / "r.json").write_text('[{"a": 1}, 7, [], {"a": 2}]')
    with pytest.raises(DataError, match=r"r\.json item 2: expected a JSON object, found int"):
        rows_of(tmp_path / "r.json")
    bad = BadRows("skip")
    assert [row.where for row in read_rows(str(tmp_path / "r.json"), bad)] == ["r.json item 1", "r.json item 4"]
    assert bad.counts == {"not a JSON object": 2}
