"""The quickstart's pipeline on the tiny model: what it writes, and that it learns."""

import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from lit_rlhf.cli import main
from lit_rlhf.commands import quickstart_pipeline as quickstart
from lit_rlhf.commands.quickstart import quickstart as light_command
from lit_rlhf.commands.run import spell_out_flags

REPORTED = {
    "pairwise_accuracy", "gold_before", "gold_after", "win_rate", "win_rate_ci95", "kl_to_reference", "seconds",
    "samples_per_second", "peak_memory_bytes", "seed", "versions", "held_out_openings", "reference_perplexity_after",
}  # fmt: skip


def test_the_pipeline_writes_everything_it_promises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    short = replace(quickstart.TINY, sft_steps=10, iterations=2, rollout_size=16, minibatch_size=8, evaluated=128)
    monkeypatch.setattr(quickstart, "TINY", short)
    out = tmp_path / "out"
    main(["quickstart", "--out", str(out), "--tiny", "true", "--seed", "3"])
    report = json.loads((out / "report.json").read_text())
    assert set(report) >= REPORTED
    assert report["seed"] == 3
    assert report["held_out_openings"] == 128
    samples = json.loads((out / "samples.json").read_text())
    assert len(samples) == 128
    assert report["gold_after"] == pytest.approx(sum(row["gold_after"] for row in samples) / 128)
    wins = sum(
        (row["gold_after"] > row["gold_before"]) + 0.5 * (row["gold_after"] == row["gold_before"]) for row in samples
    )
    assert report["win_rate"] == pytest.approx(wins / 128)
    low, high = report["win_rate_ci95"]
    assert low < report["win_rate"] < high
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert len((out / "ppo" / "metrics.csv").read_text().splitlines()) == 3
    AutoModelForCausalLM.from_pretrained(out / "export")
    shown = capsys.readouterr().out
    for text in ("1/4 Hydra-SFT", "Held-out openings", "pairwise accuracy", "win rate"):
        assert text in shown
    with pytest.raises(SystemExit):
        main(["quickstart", "--out", str(out), "--tiny", "true"])
    assert "holds an earlier report.json" in capsys.readouterr().err


def test_lora_stages_export_one_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lora = quickstart.SMOLLM2.sft_lora
    short = replace(
        quickstart.TINY, sft_lora=lora, sft_steps=4, iterations=1, rollout_size=8, minibatch_size=8, evaluated=128
    )
    monkeypatch.setattr(quickstart, "TINY", short)
    main(["quickstart", "--tiny", "--out", str(tmp_path / "out")])
    config = json.loads((tmp_path / "out" / "export" / "adapter_config.json").read_text())
    assert config["r"] == 16 + 16


def test_held_out_openings_are_new_to_training() -> None:
    def prompts(name: str) -> set[str]:
        return {json.loads(line)["prompt"] for line in (quickstart.DATA / name).read_text().splitlines()}

    train = prompts("preferences_train.jsonl") | prompts("prompts_train.jsonl")
    held_out = prompts("preferences_heldout.jsonl") | prompts("prompts_heldout.jsonl")
    assert not train & held_out
    assert len(prompts("prompts_heldout.jsonl")) >= 160


@pytest.mark.slow
def test_tiny_learns(tmp_path: Path) -> None:
    main(["quickstart", "--out", str(tmp_path / "out"), "--tiny"])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["gold_after"] > report["gold_before"]
    assert report["win_rate_ci95"][0] > 0.5


SHORT = """
import sys
from dataclasses import replace
from lit_rlhf.cli import main
from lit_rlhf.commands import quickstart_pipeline as quickstart
quickstart.TINY = replace(quickstart.TINY, sft_steps=60, iterations=3, evaluated=64)
main()
"""


@pytest.mark.slow
def test_two_processes_take_the_batches_of_one(tmp_path: Path) -> None:
    script = tmp_path / "short.py"
    script.write_text(SHORT)
    runs = {"one": [], "ddp": ["--devices", "2"], "fsdp2": ["--devices", "2", "--strategy", "fsdp2"]}
    logs = {}
    for name, options in runs.items():
        command = [sys.executable, str(script), "quickstart", "--tiny", "--out", str(tmp_path / name), *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("1/4 Hydra-SFT") == 1
        report = json.loads((tmp_path / name / "report.json").read_text())
        assert (report["devices"], report["plan"]["rollout_size"]) == (1 if name == "one" else 2, 64)
        logs[name] = [
            list(csv.DictReader((tmp_path / name / stage / "metrics.csv").open())) for stage in ("hydra_sft", "ppo")
        ]
        AutoModelForCausalLM.from_pretrained(tmp_path / name / "export")
    sft = {name: [float(row["train/loss"]) for row in log[0] if row["train/loss"]] for name, log in logs.items()}
    assert len(sft["one"]) == 6
    assert sft["ddp"] == pytest.approx(sft["one"], rel=1e-4)
    assert sft["fsdp2"] == pytest.approx(sft["one"], rel=1e-4)
    # Each rank samples by a stream of its own, so only runs on as many ranks sample alike.
    first = {name: float(log[1][0]["rollout/score"]) for name, log in logs.items()}
    assert first["ddp"] == pytest.approx(first["fsdp2"], rel=1e-3)


def test_devices_that_do_not_divide_the_batches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["quickstart", "--tiny", "--devices", "3", "--out", str(tmp_path / "out")])
    assert "devices 3 must divide the quickstart's batches: sft_batch 16" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_readme_command_without_any_argument(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = replace(quickstart.TINY, sft_steps=2, iterations=1, rollout_size=8, minibatch_size=8, evaluated=128)
    monkeypatch.setattr(quickstart, "SMOLLM2", short)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lit-rlhf", "quickstart"])
    main()
    assert json.loads((tmp_path / "quickstart" / "report.json").read_text())["seed"] == 0


@pytest.mark.parametrize(
    ("given", "understood"),
    [
        ([], []),
        (["--tiny"], ["--tiny=true"]),
        (["--tiny", "--out", "x"], ["--tiny=true", "--out", "x"]),
        (["--tiny", "false"], ["--tiny", "false"]),
        (["--out", "x"], ["--out", "x"]),
    ],
)
def test_bare_flags_are_true(given: list[str], understood: list[str]) -> None:
    assert spell_out_flags(light_command, given) == understood
