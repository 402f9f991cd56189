"""Stage 1, sources: rows from files, saved `datasets` folders and the hub, each with the place it came from."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lit_rlhf.data.errors import RAISE, BadRowHandler, DataError, parsed

HUB_PREFIX = "hub:"
EACH_LINE = "Put one JSON object on each line"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # some editors write it
CSV_FIELD_LIMIT = 2**31 - 1  # characters; the csv module's own limit, which a long log or document passes, is 131,072
SAVED_DATASET_FILES = ("state.json", "dataset_dict.json")  # what `save_to_disk` leaves in a folder
ACCEPTED = (
    "a .jsonl, .json, .jsonl.gz, .json.gz, .csv or .parquet file, a folder written by datasets' save_to_disk, "
    "or hub:owner/name[:split]"
)


@dataclass(frozen=True)
class Row:
    """One row of a source: its fields, and its place ("a.jsonl:17", "a.json item 17", "a.parquet row 17")."""

    data: dict[str, Any]
    where: str


def read_rows(source: str, on_bad: BadRowHandler = RAISE) -> Iterator[Row]:
    """Read a source row by row. Lines, items and rows are counted from 1.

    Args:
        source: Path of a .jsonl, .json, .csv or .parquet file (the first two also as .gz) or of a folder written by
            `datasets.Dataset.save_to_disk`, or "hub:owner/name[:split]" (the only form using the network).
            A .json file holds one array of objects, or an object on each line.
        on_bad: Called with the error of each unreadable row; when it returns, reading continues after that row.

    Returns:
        Iterator over the rows, in file order. Blank lines give no row.

    Raises:
        DataError: The source does not exist, has an unknown form, or is damaged: a parser that has lost its place
            would take what follows for rows, so that nothing behind it is read, whatever `on_bad` does.
    """
    if source.startswith(HUB_PREFIX):
        return _number(load_hub(source), source)
    path = Path(source).expanduser()
    if not path.exists():
        raise DataError(
            f"no such file or folder (looked for {path.absolute()})", where=source, fix=f"A data source is {ACCEPTED}."
        )
    if path.is_dir():
        return _read_saved_dataset(path)
    for ending, read in READERS.items():
        if path.name.lower().endswith(ending):
            return read(path, on_bad)
    raise DataError(f"unknown kind of file {path.suffix!r}", where=source, fix=f"A data source is {ACCEPTED}.")


def _read_jsonl(path: Path, on_bad: BadRowHandler) -> Iterator[Row]:
    def parse(numbered: tuple[int, bytes]) -> Row:
        where = f"{path.name}:{numbered[0]}"
        data = _parse_json(numbered[1], where, f"{EACH_LINE}.")
        return _as_row(data, where, f'{EACH_LINE}, such as {{"prompt": "..."}}.')

    with _open_binary(path) as file:
        yield from parsed(((number, line) for number, line in _lines(file, path) if line.strip()), parse, on_bad)


def _read_json(path: Path, on_bad: BadRowHandler) -> Iterator[Row]:
    with _open_binary(path) as file:
        first = next(((number, line) for number, line in _lines(file, path) if line.strip()), None)
    if first is None:
        return iter(())
    if first[1].lstrip().startswith(b"["):
        return _read_json_array(path, on_bad)
    # An object over several lines: its lines are no rows, even those that are whole objects.
    _parse_json(first[1], f"{path.name}:{first[0]}", f"{EACH_LINE}, or one array of objects in the file.")
    return _read_jsonl(path, on_bad)


def _read_json_array(path: Path, on_bad: BadRowHandler) -> Iterator[Row]:
    with _open_binary(path) as file:
        content = b"".join(line for _, line in _lines(file, path))
    items = _parse_json(content, path.name, "Put one array of JSON objects in the file, or name it .jsonl.")
    del content  # these files are large

    def parse(numbered: tuple[int, Any]) -> Row:
        return _as_row(numbered[1], f"{path.name} item {numbered[0]}", "Make every item of the array an object.")

    return parsed(enumerate(items, start=1), parse, on_bad)


def _open_binary(path: Path) -> BinaryIO:
    try:
        # GzipFile reads like a binary file but is not declared as one.
        return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")  # type: ignore[return-value]
    except OSError as error:
        raise DataError(f"cannot be opened ({error})", where=str(path), fix="Check its permissions.") from error


def _lines(file: BinaryIO, path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines of a possibly compressed file; damage ends them with a DataError naming the line reached."""
    number = 0
    try:
        for number, line in enumerate(file, start=1):
            yield number, line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"the file is damaged after line {number} ({error})",
            where=f"{path.name}:{number + 1}",
            fix="Fetch or write the file again; `gzip -t` checks an archive.",
            reason="damaged file",
        ) from error


def _parse_json(content: bytes, where: str, fix: str) -> Any:
    try:
        return json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"byte {error.start + 1} is not UTF-8", where=where, fix="Convert the file to UTF-8.", reason="not UTF-8"
        ) from error
    except (ValueError, RecursionError) as error:  # ValueError also covers integers of too many digits
        raise DataError(f"broken JSON ({error})", where=where, fix=fix, reason="broken JSON") from error


def _as_row(data: Any, where: str, fix: str) -> Row:
    if isinstance(data, dict):
        return Row(data, where)
    problem = f"expected a JSON object, found {type(data).__name__}"
    raise DataError(problem, where=where, fix=fix, reason="not a JSON object")


def _read_csv(path: Path, on_bad: BadRowHandler) -> Iterator[Row]:
    # Undecodable bytes become lone surrogates here and are found per field, so that one bad row
    # does not stop the reader in the middle of the file.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        records = _csv_records(file, path.name)
        header = next(records, None)
        if header is None:
            return
        _check_header(*header)
        names = header[1]
        yield from parsed(records, lambda record: Row(_csv_fields(names, record[1], record[0]), record[0]), on_bad)


def _csv_records(file: Iterable[str], name: str) -> Iterator[tuple[str, list[str]]]:
    """Place and cells of each record that is no blank line."""
    reader = csv.reader(file, strict=True)  # strict: an open quote is an error, not a long field
    while True:
        where = f"{name}:{reader.line_num + 1}"
        shared_limit = csv.field_size_limit(CSV_FIELD_LIMIT)  # of the process, hence set for one record at a time
        try:
            cells = next(reader, None)
        except csv.Error as error:
            fix = "Check its quotes, and those of the rows before it."
            raise DataError(
                f"broken CSV ({error}); where later rows begin is unknown", where=where, fix=fix, reason="broken CSV"
            ) from error
        finally:
            csv.field_size_limit(shared_limit)
        if cells is None:
            return
        if cells:
            yield where, cells


def _check_header(where: str, header: list[str]) -> None:
    if len(set(header)) < len(header) or not all(_is_utf8(name) and name.strip() for name in header):
        raise DataError(
            f"the header {header} must name each column once, in UTF-8", where=where, fix="Correct the first line."
        )


def _csv_fields(header: list[str], cells: list[str], where: str) -> dict[str, Any]:
    if len(cells) != len(header):
        raise DataError(
            f"{len(cells)} fields where the header names {len(header)}",
            where=where,
            fix="Quote fields that hold commas or line breaks.",
            reason="wrong number of fields",
        )
    for name, cell in zip(header, cells, strict=True):
        if not _is_utf8(cell):
            raise DataError(
                "is not UTF-8", where=where, field=name, fix="Convert the file to UTF-8.", reason="not UTF-8"
            )
    return dict(zip(header, cells, strict=True))


def _is_utf8(text: str) -> bool:
    return text == text.encode("utf-8", "ignore").decode("utf-8")


def _read_parquet(path: Path, on_bad: BadRowHandler) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for data in batch.to_pylist():
                    row += 1
                    yield Row(data, f"{path.name} row {row}")
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"the file is damaged or not parquet ({error})",
            where=f"{path.name} row {row + 1}",
            fix="Fetch or write the file again.",
        ) from error


READERS: dict[str, Callable[[Path, BadRowHandler], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".json": _read_json,
    ".json.gz": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _read_saved_dataset(path: Path) -> Iterator[Row]:
    if not any((path / name).exists() for name in SAVED_DATASET_FILES):
        raise DataError(
            "the folder was not written by datasets' save_to_disk", where=str(path), fix=f"A data source is {ACCEPTED}."
        )
    import datasets

    try:
        dataset = datasets.load_from_disk(str(path))
    except Exception as error:  # many kinds, none of which names the folder
        raise DataError(f"cannot be loaded ({error})", where=str(path), fix="Write the folder again.") from error
    if isinstance(dataset, datasets.DatasetDict):
        splits = ", ".join(str(path / name) for name in dataset)
        raise DataError("the folder holds several splits", where=str(path), fix=f"Name one of {splits}.")
    return _number(dataset, path.name)


def load_hub(source: str) -> Iterable[dict[str, Any]]:
    """Load "hub:owner/name[:split]" (split "train" unless named) through `datasets`, downloading if needed.

    Raises:
        DataError: The name has another form, or the dataset cannot be loaded.
    """
    name, _, split = source.removeprefix(HUB_PREFIX).partition(":")
    if name.count("/") != 1 or not all(name.split("/")):
        raise DataError("not a hub dataset name", where=source, fix="Write hub:owner/name or hub:owner/name:split.")
    import datasets

    try:
        rows: Iterable[dict[str, Any]] = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # network, hub and builder errors share no base class
        raise DataError(
            f"cannot be loaded from the hub ({error})", where=source, fix="Check name, split and network."
        ) from error
    return rows


def _number(rows: Iterable[dict[str, Any]], name: str) -> Iterator[Row]:
    for number, data in enumerate(rows, start=1):
        yield Row(dict(data), f"{name} row {number}")
