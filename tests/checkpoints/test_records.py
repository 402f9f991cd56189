"""Records of checkpoints: read from a file, compared part by part; the first difference is named."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lit_rlhf.checkpoints.records import FORMAT, RECORD_KEY, read_checkpoint, refuse_foreign


def record(**changes: Any) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "algorithm": "lit_rlhf.PPO",
        "spec": {"model": "m", "dtype": "float32"},
        "layout": {"roles": {"actor": ["trunk", None, "lm"]}},
        "trainable_names": ["a", "b"],
        **changes,
    }


def refuse(saved: dict[str, Any], ours: dict[str, Any], **options: Any) -> None:
    refuse_foreign({RECORD_KEY: saved}, ours, "here.ckpt", **options)


def test_a_record_is_read_back(tmp_path: Path) -> None:
    torch.save({"state_dict": {"w": torch.ones(2)}, RECORD_KEY: record()}, tmp_path / "a.ckpt")
    assert read_checkpoint(tmp_path / "a.ckpt")[RECORD_KEY] == record()


def test_files_without_a_record_of_this_format_are_refused(tmp_path: Path) -> None:
    for index, content in enumerate([{}, {RECORD_KEY: 3}, {RECORD_KEY: record(format=FORMAT + 1)}]):
        path = tmp_path / f"{index}.ckpt"
        torch.save({"state_dict": {}, **content}, path)
        with pytest.raises(ValueError, match=rf"{index}\.ckpt was not written by this version of lit_rlhf"):
            read_checkpoint(path)


def test_a_folder_of_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a folder of shards, as FSDP2 writes them"):
        read_checkpoint(tmp_path)


def test_equal_records_are_taken() -> None:
    refuse(record(), record())


def test_a_checkpoint_without_a_record_is_refused() -> None:
    with pytest.raises(ValueError, match=r"checkpoint here\.ckpt was not written by lit_rlhf; it cannot be resumed"):
        refuse_foreign({"state_dict": {}}, record(), "here.ckpt")
    with pytest.raises(ValueError, match=r"checkpoint  was not written by lit_rlhf"):
        refuse_foreign({}, record(), None)


@pytest.mark.parametrize(
    ("key", "value"), [("algorithm", "lit_rlhf.ReMax"), ("layout", {"roles": {}}), ("trainable_names", ["a"])]
)
def test_each_part_is_compared_and_named(key: str, value: Any) -> None:
    with pytest.raises(
        ValueError, match=f"cannot resume: the checkpoint's {key} differs from the configuration's"
    ) as error:
        refuse(record(**{key: value}), record())
    assert f"{value} there, {record()[key]} here. Change it back, or start over without --ckpt_path" in str(error.value)


def test_names_are_not_compared_before_a_model_is_built() -> None:
    refuse(record(), record(trainable_names=None))


def test_settings_are_compared_by_name() -> None:
    with pytest.raises(ValueError, match="cannot resume: dtype was 'bfloat16' and is now 'float32'"):
        refuse(record(spec={"model": "m", "dtype": "bfloat16"}), record())


def test_what_older_versions_did_not_write_takes_its_default() -> None:
    ours = record(spec={"model": "m", "dtype": "float32", "new": 1})
    refuse(record(), ours, complete_spec=lambda spec: {"new": 1, **spec})
    with pytest.raises(ValueError, match="cannot resume: new was 2 and is now 1"):
        refuse(record(), ours, complete_spec=lambda spec: {"new": 2, **spec})


def test_long_parts_are_shortened_or_called_by_their_name() -> None:
    with pytest.raises(ValueError, match="differs") as error:
        refuse(record(trainable_names=["x" * 1000]), record())
    assert len(str(error.value)) < 500
    with pytest.raises(ValueError, match=r"configuration's: hydra there, hydra here\."):
        refuse(record(layout={}), record(), describe=lambda key, value: "hydra")
