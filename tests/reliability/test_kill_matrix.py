"""Runs killed at random moments and resumed end as if nobody had stopped them; the whole matrix is an experiment."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "experiments" / "reliability" / "kill_matrix.py"


@pytest.mark.slow
def test_killed_runs_end_as_undisturbed_ones_on_one_process_ddp_and_fsdp2(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--small", "--kills", "3", "--seed", "1", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    content = json.loads((tmp_path / "kill_matrix.json").read_text())
    assert [row["strategy"] for row in content["rows"]] == ["single", "ddp", "fsdp2", "fsdp2_folder"]
    assert all(row["starts"] == len(row["kills"]) + 1 for row in content["rows"])
    assert content["kills"] >= 8  # a run may end before its last kill
    assert content["wrong"] == 0


def test_the_comparison_finds_one_changed_bit_and_one_changed_metric(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from kill_matrix import compare, unreadable

    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text('{"epoch": 0, "x": "0.1"}\n{"epoch": 1, "x": "0.2"}\n')
        torch.save({"state_dict": {"w": torch.ones(3)}, "epoch": 1, "callbacks": {}}, tmp_path / name / "last.ckpt")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert compare(whole, killed) == []
    (killed / "metrics.jsonl").write_text('{"epoch": 0, "x": "0.1"}\n{"epoch": 0, "x": "0.3"}\n{"epo')
    torch.save({"state_dict": {"w": torch.tensor([1.0, 1.0, 1.0000001])}, "epoch": 1, "callbacks": {}},
               killed / "last.ckpt")  # fmt: skip
    (killed / ".last.ckpt.1.partial").touch()
    assert compare(whole, killed) == [
        "iteration 1 was repeated with other metrics",
        "metrics of iteration 2 differ",
        "checkpoints differ in state_dict",
        f"left behind: {[killed / '.last.ckpt.1.partial']}",
    ]
    assert unreadable(killed) == []
    (killed / "last.ckpt").write_bytes((killed / "last.ckpt").read_bytes()[:300])
    assert len(unreadable(killed)) == 1
