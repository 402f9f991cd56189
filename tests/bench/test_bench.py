"""``lit-rlhf bench``: what is trained, what is counted, what is compared."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import LAYOUTS, TINY

from lit_rlhf.backbone import load_tokenizer, read_config
from lit_rlhf.bench import Workload
from lit_rlhf.bench import process as bench_process
from lit_rlhf.bench import report as bench_report
from lit_rlhf.bench import run as bench_run
from lit_rlhf.bench.probe import WorkCounter, best_seconds, roofline
from lit_rlhf.commands import bench

SMALL = Workload(model=TINY, updates=1, prompt_length=5, response_length=4, batch_size=4, lora_r=2)


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stages")
    bench_run.write_stages(LAYOUTS, SMALL, folder)
    return folder


@pytest.fixture
def quick_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = {"flops_per_second": 1e9, "bytes_per_second": 1e9}
    monkeypatch.setattr(bench_run, "probe", lambda device, dtype: speeds)


def test_the_command_starts_without_torch() -> None:
    code = (
        "import sys, jsonargparse\n"
        "from lit_rlhf.bench import process, report\n"
        "from lit_rlhf.commands import bench, run\n"
        "assert 'torch' not in sys.modules and 'lightning' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_all_wrong_numbers_are_named_together(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(["--updates", "0", "--batch_size", "-1"])
    assert "batch_size must be at least 1, got -1; updates must be at least 1, got 0" in capsys.readouterr().err


def test_bare_flags_and_the_workload_reach_the_measurement(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(bench_process, "measure_one", lambda *given: seen.append(given) or {"x": 1})
    bench.main(["--layout", "pe", "--gradient_checkpointing", "--json", "--precision", "bfloat16"])
    assert seen == [("pe", "PPO", Workload(gradient_checkpointing=True, precision="bfloat16"))]
    assert json.loads(capsys.readouterr().out) == {"x": 1}


def test_prompts_are_ordinary_tokens_of_one_length() -> None:
    tokenizer = load_tokenizer(TINY)
    data, again = (bench_run.RandomPrompts(50, 6, tokenizer, seed=3) for _ in range(2))
    batch = data.prompt_batch([4, 1])
    assert batch["tokens"].shape == (2, 6)
    assert batch["attention_mask"].all()
    assert torch.equal(batch["tokens"][0], data.tokens[4])
    assert not torch.isin(data.tokens, torch.tensor(tokenizer.all_special_ids)).any()
    assert torch.equal(data.tokens, again.tokens)


@pytest.mark.usefixtures("quick_probe")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_measured(layout: str, stages: Path) -> None:
    result = json.loads(json.dumps(bench_run.measure(layout, "PPO", SMALL, stages)))
    work = result["work_per_sample"]
    assert set(work) >= {"generation", "scoring", "training"}
    # The prompt's pass and three steps: the fourth token is never read.
    assert (work["generation"]["passes"], work["generation"]["tokens"]) == (4, 5 + 3)
    # The rollout is one minibatch, so that the loss's first pass (j_hydra's only one) runs in scoring.
    assert work["training"]["passes"] == (0 if layout == "j_hydra" else 1)
    assert work["scoring"]["passes"] == {"hydra": 2, "j_hydra": 2}.get(layout, 3)
    for name in ("scoring", "training"):
        assert work[name]["tokens"] == work[name]["passes"] * 9
    assert work["training"]["flops"] + work["scoring"]["flops"] > work["generation"]["flops"] > 0
    seconds = result["seconds_per_sample"]
    parts = sum(seconds[name]["median"] for name in ("generation", "scoring", "training", "other"))
    assert parts == pytest.approx(seconds["total"]["median"])
    assert result["tokens_per_second"] == pytest.approx(4 / seconds["total"]["median"])
    peaks = result["memory"]
    assert peaks["peak"]["resident"] >= max(peaks[name]["resident"] for name in ("generation", "scoring", "training"))
    held = result["bytes_held"]
    assert held["gradients"] == held["trained weights"] > 0
    # Two moments, and a step count a tensor.
    assert held["optimizer"] == pytest.approx(2 * held["trained weights"], rel=0.05)


@pytest.mark.usefixtures("quick_probe")
def test_remax_pays_for_the_greedy_response_in_generation(stages: Path) -> None:
    work = bench_run.measure("hydra", "ReMax", SMALL, stages)["work_per_sample"]
    assert work["training"]["passes"] == 1
    assert work["generation"]["passes"] > 4  # twice the rows, the prompt shared


def test_no_stage_puts_whole_weights_on_the_disk(stages: Path) -> None:
    lora_and_head = 250_000  # the tiny model itself has 1.3 MB
    assert {file.name for file in stages.iterdir()} == {bench_run.REWARD, bench_run.HYDRA}
    assert all(file.stat().st_size < lora_and_head for file in stages.iterdir())


def test_algorithms_by_name_by_path_and_not_at_all() -> None:
    assert bench_run.find_algorithm("ReMax").__name__ == "ReMax"
    assert bench_run.find_algorithm("lit_rlhf.algorithms.rloo.RLOO").__name__ == "RLOO"
    assert bench_run.find_algorithm("ppo") is bench_run.find_algorithm("PPO")
    for name in ("SFT", "Nobody"):
        with pytest.raises(ValueError, match=r"not an on-policy algorithm; choose from GRPO, PPO"):
            bench_run.find_algorithm(name)


def test_flops_of_a_product_and_of_its_gradients_are_counted_by_phase() -> None:
    counter = WorkCounter()
    x, w = torch.randn(3, 5), torch.randn(5, 7, requires_grad=True)
    with counter:
        counter.phase = "training"
        (x @ w).sum().backward()
        counter.phase = "scoring"
        torch.zeros(3, 7).addmm_(x, w.detach())
    assert counter.counts["training"]["flops"] == 2 * (2 * 3 * 5 * 7)
    assert counter.counts["scoring"]["flops"] == 2 * 3 * 5 * 7


def test_roofline_by_hand() -> None:
    work = {"generation": {"flops": 10.0}, "scoring": {"flops": 40.0}, "training": {"flops": 80.0}}
    seconds = {"generation": 8.0, "scoring": 4.0, "training": 10.0}
    found = roofline({"flops_per_second": 20.0, "bytes_per_second": 5.0}, work, 20.0, seconds)
    assert found["seconds"] == {"generation": 4.0, "scoring": 2.0, "training": 4.0}
    assert found["fraction"] == pytest.approx({"generation": 0.5, "scoring": 0.5, "training": 0.4, "total": 10 / 22})


def test_the_fastest_call_counts() -> None:
    calls: list[int] = []
    assert 0 <= best_seconds(lambda: calls.append(1), torch.device("cpu"), budget=0.001) < 0.001
    assert len(calls) > 1


def run_of(layout: str, turn: int, seconds: float, peak: int) -> dict[str, Any]:
    phases = ("generation", "scoring", "training", "total")
    return {
        "layout": layout,
        "algorithm": "PPO",
        "round": turn,
        "seconds_per_sample": {name: {"median": seconds} for name in phases},
        "memory": {"peak": {"resident": peak}},
        "machine": {"cpu": "x", "cores": 2},
        "versions": {"torch": "2"},
        **{"device": "cpu", "threads": 2, "load_average": 0.1, "commit": None},
    }


def test_ratios_are_taken_round_by_round(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The second round ran backwards, on a machine that had become twice as slow.
    runs = [run_of("hydra", 0, 1.0, 100), run_of("lora", 0, 2.0, 300), run_of("lora", 1, 5.0, 300)]
    runs.append(run_of("hydra", 1, 2.0, 100))
    compared = bench_report.compare_to_first(runs)
    assert compared["PPO lora"]["seconds_ratio"] == (2.25, 2.0, 2.5)
    assert compared["PPO lora"]["peak_ratio"] == (3.0, 3.0, 3.0)
    bench_report.print_comparison(runs)
    assert "2.25 (2.00-2.50)" in capsys.readouterr().out
    bench_report.write_comparison(runs, str(tmp_path / "new" / "out.json"))
    assert len(json.loads((tmp_path / "new" / "out.json").read_text())["runs"]) == 4


def test_rounds_alternate_and_every_run_has_its_own_process(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks: list[dict[str, Any]] = []
    monkeypatch.setattr(bench_process, "run_child", lambda task: tasks.append(task) or {})
    results = bench_process.measure_alternating([("hydra", "PPO"), ("pe", "ReMax")], SMALL, rounds=2)
    assert tasks[0]["write_stages"] == ["hydra", "pe"]
    assert [task["layout"] for task in tasks[1:]] == ["hydra", "pe", "pe", "hydra"]
    assert [result["round"] for result in results] == [0, 0, 1, 1]


def test_a_child_reports_wrong_settings_in_one_line(monkeypatch: pytest.MonkeyPatch, stages: Path, capsys: Any) -> None:
    wrong = Workload(**{**vars(SMALL), "samples_per_prompt": 1})
    task = {"layout": "hydra", "algorithm": "GRPO", "workload": vars(wrong), "folder": str(stages)}
    monkeypatch.setattr(sys, "argv", ["bench_run", json.dumps(task)])
    bench_run.main()
    (line,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith(bench_process.MARK))
    assert (
        "samples_per_prompt must be at least 2 for GRPO" in json.loads(line.removeprefix(bench_process.MARK))["error"]
    )


@pytest.mark.parametrize(
    ("code", "out", "message"),
    [
        (0, f'{bench_process.MARK}{{"error": "no such model"}}', "^no such model$"),
        (1, "", "PPO on pe failed with exit code 1:\nlast words"),
        (-9, "", "ended by signal 9, probably because memory ran out"),
        (-15, "", "ended by signal 15$"),
    ],
)
def test_a_failed_child_says_why(code: int, out: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], code, stdout=out, stderr="last words")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: done)
    with pytest.raises(ChildProcessError, match=message):
        bench_process.run_child({"layout": "pe", "algorithm": "PPO"})


@pytest.mark.slow
def test_from_the_command_line_and_an_error_in_the_child(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--model", TINY, "--updates", "1", "--response_length", "4", "--batch_size", "4"]
    bench.main([*small, "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["layout"] == "hydra"
    assert result["roofline"]["flops_per_second"] > 1e8
    with pytest.raises(SystemExit):
        bench.main([*small, "--layout", "hydra", "--algorithm", "GRPO", "--samples_per_prompt", "1"])
    assert capsys.readouterr().err.startswith("lit-rlhf bench: invalid configuration:\n  - samples_per_prompt must be")


def test_a_shape_is_written_with_a_tokenizer(tmp_path: Path) -> None:
    name = bench_process.write_shape("opt-125m", tmp_path)
    assert name == f"random:{tmp_path}"
    assert read_config(name).hidden_size == 768
    assert len(load_tokenizer(name)) == len(load_tokenizer(TINY))
    with pytest.raises(ValueError, match=r"unknown shape 'gpt5'; choose from llama-7b, .* --model random:FOLDER"):
        bench_process.write_shape("gpt5", tmp_path)
