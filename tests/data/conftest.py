import gzip
import json

import pytest
from data_helpers import make_tokenizer


@pytest.fixture
def tokenizer():
    return make_tokenizer()


@pytest.fixture
def write(tmp_path):
    """Write rows (objects, or raw bytes for one line) as JSON lines; return the path."""

    def write(rows, name="rows.jsonl"):
        path = tmp_path / name
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        (gzip.open if name.endswith(".gz") else open)(path, "wb").write(b"\n".join(lines) + b"\n")
        return str(path)

    return write
