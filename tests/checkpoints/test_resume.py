"""What is refused of a checkpoint to resume from, before any weights load."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lit_rlhf.checkpoints import CheckpointError
from lit_rlhf.checkpoints.records import RECORD_KEY
from lit_rlhf.checkpoints.resume import KEYWORDS, check_resume

OURS = {"algorithm": "PPO", "layout": {}, "trainable_names": None, "spec": {"model": "m"}}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint after two epochs."""
    path = tmp_path / "last.ckpt"
    write(path, OURS)
    return path


def write(path: Path, record: dict[str, Any]) -> None:
    torch.save({"state_dict": {}, "epoch": 1, RECORD_KEY: {**record, "trainable_names": ["a"]}}, path)


@pytest.mark.parametrize("max_epochs", [None, -1, 2, 3])
def test_a_run_that_goes_on_is_let_through(saved: Path, max_epochs: int | None) -> None:
    check_resume(str(saved), OURS, max_epochs)


@pytest.mark.parametrize("max_epochs", [0, 1])
def test_a_run_that_is_longer_already_is_refused(saved: Path, max_epochs: int) -> None:
    with pytest.raises(ValueError, match=rf"has 2 finished epochs, but trainer\.max_epochs is {max_epochs}\. Raise it"):
        check_resume(str(saved), OURS, max_epochs)


def test_another_run_is_refused_first(saved: Path) -> None:
    write(saved, {**OURS, "algorithm": "ReMax"})
    with pytest.raises(ValueError, match="cannot resume: the checkpoint's algorithm differs"):
        check_resume(str(saved), OURS, 0)


def test_what_is_missing_or_torn_is_refused(saved: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        check_resume(str(saved.with_name("none.ckpt")), OURS)
    saved.write_bytes(saved.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="is truncated"):
        check_resume(str(saved), OURS)


def test_remote_paths_and_keywords_are_left_to_the_restore() -> None:
    for path in ("s3://bucket/last.ckpt", *KEYWORDS):
        check_resume(path, OURS, 0)


def test_a_file_caught_between_two_renamings_is_put_back(saved: Path) -> None:
    saved.rename(saved.with_name(".last.ckpt.previous"))
    check_resume(str(saved), OURS)
    assert saved.is_file()
