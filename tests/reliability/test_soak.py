"""A long run neither grows nor slows down; five hundred iterations of three runs are an experiment."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "experiments" / "reliability" / "soak.py"


@pytest.mark.slow
def test_resident_memory_stays_where_it_was(tmp_path: Path) -> None:
    out = tmp_path / "soak.json"
    command = [sys.executable, str(SCRIPT), "--out", str(out), "--iterations", "160", "--runs", "PPO-hydra"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    (row,) = json.loads(out.read_text())["rows"]
    assert -0.1 < row["growth"] < 0.02


def test_growth_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from soak import summary

    leaking = [400 + index / 10 for index in range(100)]
    assert summary([int(mib * 2**20) for mib in leaking], [float(i * i) for i in range(100)])["growth"] > 0.015
    flat = summary([400 * 2**20] * 100, [float(i) for i in range(100)])
    assert flat["growth"] == flat["drift"] == 0
