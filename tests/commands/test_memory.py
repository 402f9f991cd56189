"""``lit-rlhf memory``: the table, the JSON object, errors in one line, and a quick start."""

import json
import subprocess
import sys
from dataclasses import fields
from inspect import signature
from pathlib import Path

import pytest

from lit_rlhf.backbone import load_language_model
from lit_rlhf.cli import main
from lit_rlhf.commands.memory import memory
from lit_rlhf.planner import Setting
from lit_rlhf.planner.report import parse_bytes

SHORT = ["--batch_size", "2", "--prompt_length", "16", "--response_length", "16", "--lora_rank", "4"]


def run_json(capsys: pytest.CaptureFixture[str], *words: str) -> dict:
    main(["memory", "--model", "random:tiny", *SHORT, *words, "--json"])
    return json.loads(capsys.readouterr().out)


def test_the_table_puts_every_layout_beside_sft(capsys: pytest.CaptureFixture[str]) -> None:
    main(["memory", "--model", "random:tiny", *SHORT])
    shown = capsys.readouterr().out
    for word in ("SFT, full", "SFT, LoRA", "dynamic_lora", "j_hydra", "KV cache", "x SFT", "MiB per device"):
        assert word in shown
    assert "fragmentation" in shown


def test_json_states_settings_phases_peaks_and_assumptions(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--layout", "[full, hydra]", "--gradient_checkpointing", "--precision", "float32", "--fit", "32MiB"]
    data = run_json(capsys, *words)
    assert data["setting"]["gradient_checkpointing"] is True
    assert data["setting"]["lora"]["r"] == 4
    assert data["parameters"] == sum(p.numel() for p in load_language_model("random:tiny").parameters())
    sft, *_, hydra = data["rows"]
    assert (sft["name"], hydra["name"]) == ("sft", "hydra")
    assert set(sft["phases"]) == {"training"}
    assert set(hydra["phases"]) == {"generation", "scoring", "training"}
    for row in data["rows"]:
        totals = {phase: kinds["total"] for phase, kinds in row["phases"].items()}
        assert row["peak"] == max(totals.values()) == totals[row["peak_phase"]]
        assert all(sum(kinds.values()) == 2 * kinds["total"] for kinds in row["phases"].values())
        assert row["ratio_to_full_sft"] == pytest.approx(row["peak"] / sft["peak"], abs=1e-4)
        assert row["largest_batch"] > 2
    assert data["assumptions"]


def test_layouts_can_be_chosen_and_the_critic_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    data = run_json(capsys, "--layout", "[hydra, lora]", "--algorithm", "remax", "--devices", "2")
    assert [row["name"] for row in data["rows"]] == ["sft", "lora_sft", "hydra", "lora"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give --model NAME"),
        (["--model", "random:nowhere"], "is not a folder"),
        (["--model", "gpt2", "--layout", "hydraa"], "layout must be one of"),
        (["--model", "gpt2", "--prompt_length", "1024"], "the model's context is 1024 tokens"),
        (["--model", "gpt2", "--fit", "many"], "size 'many' cannot be parsed"),
        (["--model", "gpt2", "--batch_size", "0"], "batch_size must be at least 1"),
        (["--model", "gpt2", "--lora_rank", "0"], "lora.r must be at least 1"),
        (["--model", "nobody/no-such-model"], "config of 'nobody/no-such-model' could not be read"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["memory", *words])
    error = capsys.readouterr().err
    assert stop.value.code == 1
    assert error.startswith("lit-rlhf memory: ")
    assert message in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "size"), [("24GiB", 24 << 30), ("24G", 24 << 30), ("80GB", 80 * 10**9), ("1.5 mib", 3 << 19), ("7", 7)]
)
def test_sizes_are_read_with_either_unit(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-3GiB", "0", "3PiB"])
def test_a_size_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="cannot be parsed"):
        parse_bytes(text)


def test_every_setting_has_an_option_with_its_name_and_default() -> None:
    options = signature(memory).parameters
    for field in fields(Setting):
        if field.name != "lora":
            assert options[field.name].default == field.default


def test_help_imports_neither_torch_nor_the_planner(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom lit_rlhf.cli import main\n"
        "try:\n    main(['memory', '--help'])\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'transformers', 'lit_rlhf.planner'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, capture_output=True)
