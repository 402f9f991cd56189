"""Algorithm, reward, KL controller and layout from a folder outside the package, by their import paths in YAML."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from helpers import LAYOUTS, write_jsonl
from plugin_helpers import CHECKPOINT, OWN, lit_rlhf, metrics, run, small

from lit_rlhf.cli import main

COSINE = [0.1, 0.0997535, 0.0990166, 0.0977975, 0.0961095]  # from 0.1 to 0.01 over 30 iterations


def test_the_algorithm_has_at_most_40_lines_and_is_the_notebooks() -> None:
    code = (OWN / "my_algorithms.py").read_text()
    assert len(code.splitlines()) <= 40
    assert code.count("class ") == 1
    notebook = json.loads((OWN.parents[1] / "notebooks" / "own_algorithm.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"]]
    assert code.split('"""\n', 1)[1].strip() in cells


def test_all_four_together_give_metrics_samples_and_a_checkpoint(whole_run: Path) -> None:
    rows = metrics(whole_run)
    assert sorted(rows) == [0, 1, 2, 3, 4]
    assert [float(row["rollout/kl_coef"]) for row in rows.values()] == pytest.approx(COSINE, rel=1e-5)
    assert float(rows[0]["rollout/kl"]) == pytest.approx(0.0, abs=1e-4)
    assert abs(float(rows[4]["rollout/kl"])) > 1e-2
    samples = (whole_run / "runs/own_algorithm/version_0/samples.jsonl").read_text().splitlines()
    assert len(samples) == 5 * 8
    for row in map(json.loads, samples):
        assert row["score"] == pytest.approx(-len(row["response"]) / 10)
    content = torch.load(whole_run / CHECKPOINT, weights_only=True)
    assert content["controllers"]["kl"] == {"done": 5}
    record = content["lit_rlhf"]
    assert record["algorithm"] == "my_algorithms.BestOfK"
    assert record["layout"]["roles"] == {"actor": ["actor", None, "lm"], "reference": ["frozen", None, "lm"]}
    assert record["layout"]["trunks"] == {"actor": ["policy", True], "frozen": ["policy", False]}
    assert all(name.startswith("backbone.trunks.actor.") for name in content["state_dict"])


def test_sigkill_in_iteration_3_then_resume_repeats_every_number(whole_run: Path, own_folder: Path) -> None:
    command = lit_rlhf(*small("--trainer.callbacks+=my_callbacks.Pause", epochs=5))
    process = subprocess.Popen(command, cwd=own_folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (own_folder / "in_iteration_3").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert torch.load(own_folder / CHECKPOINT, weights_only=True)["controllers"]["kl"] == {"done": 2}
    run(own_folder, *small("--ckpt_path", CHECKPOINT, epochs=5))

    whole, resumed = metrics(whole_run), metrics(own_folder, version=1)
    assert resumed == {epoch: whole[epoch] for epoch in (2, 3, 4)}
    ends = [torch.load(folder / CHECKPOINT, weights_only=True) for folder in (whole_run, own_folder)]
    assert ends[0]["controllers"] == ends[1]["controllers"]
    for name, value in ends[0]["state_dict"].items():
        assert torch.equal(value, ends[1]["state_dict"][name])


def test_two_ranks_run_the_same_yaml_and_end_equal(own_folder: Path) -> None:
    run(own_folder, *small("--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.callbacks+=my_callbacks.Ranks"))
    first, second = (json.loads((own_folder / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first["state"] == second["state"]
    assert first["kl"] == second["kl"] == pytest.approx(COSINE[2], rel=1e-5)
    assert not set(first["prompts"]) & set(second["prompts"])
    assert sorted(metrics(own_folder)) == [0, 1]
    assert torch.load(own_folder / CHECKPOINT, weights_only=True)["epoch"] == 1


def with_learned_reward(layout: str, request: pytest.FixtureRequest) -> list[str]:
    """Return the arguments that replace the reward function by the reward role, built as each layout does."""
    reward = {"pe": "lora_reward_checkpoint"} | dict.fromkeys(
        ("full", "lora", "dynamic_lora"), "full_reward_checkpoint"
    )
    settings = {"layout": layout, "reward": "null", "policy_checkpoint": request.getfixturevalue("hydra_checkpoint")}
    if layout in reward:
        settings["reward_checkpoint"] = request.getfixturevalue(reward[layout])
    return [f"--model.{key}={value}" for key, value in settings.items()]


@pytest.mark.parametrize("layout", [*LAYOUTS, "my_layouts.WHOLE_ACTOR"])
def test_the_algorithm_runs_on_every_layout(layout: str, here: Path, request: pytest.FixtureRequest) -> None:
    main(small(*with_learned_reward(layout, request)))
    rows = metrics(here)
    assert len({row["rollout/score"] for row in rows.values()}) == 2
    assert abs(float(rows[1]["rollout/kl"])) > 1e-3
    record = torch.load(here / CHECKPOINT, weights_only=True)["lit_rlhf"]
    assert sorted(record["layout"]["roles"]) == ["actor", "reference", "reward"]
    if layout == "pe":
        assert record["layout"]["loaded_adapters"] == ["reward"]


def test_ppo_runs_on_the_layout(here: Path, request: pytest.FixtureRequest) -> None:
    config = yaml.safe_load((here / "run.yaml").read_text())
    config["model"]["class_path"] = "PPO"
    for name in ("keep", "samples_per_prompt"):
        del config["model"]["init_args"][name]
    (here / "ppo.yaml").write_text(yaml.safe_dump(config))
    main(small(*with_learned_reward("my_layouts.WHOLE_ACTOR", request), "--model.lora.r=4", config="ppo.yaml"))
    state = torch.load(here / CHECKPOINT, weights_only=True)["state_dict"]
    places = {".".join(name.split(".")[1:3]) for name in state}
    assert places == {"trunks.actor", "trunks.frozen", "heads.value"}
    assert all(".critic." in name for name in state if name.startswith("backbone.trunks.frozen"))
    assert len(metrics(here)) == 2


def test_generate_and_export_need_none_of_the_modules(
    whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    prompts = ["--prompt+", "The film was", "--greedy", "true", "--max_new_tokens", "6"]
    main(["generate", str(whole_run / CHECKPOINT), *prompts, "--out", "trained.jsonl"])
    main(["export", str(whole_run / CHECKPOINT), "merged", "--format", "merged"])
    main(["generate", "merged", *prompts, "--out", "merged.jsonl"])
    assert Path("trained.jsonl").read_text() == Path("merged.jsonl").read_text()
    assert "my_algorithms" not in sys.modules


def test_modules_beside_the_yaml_are_found_behind_those_of_the_working_directory(
    here: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    write_jsonl(Path("p.jsonl"), [{"prompt": f"The film {index} was"} for index in range(8)])
    Path("my_rewards.py").write_text("def brevity(prompts, responses, **columns): return [7.0] * len(responses)\n")
    main(small("--data.train=p.jsonl", config=str(here / "run.yaml"), epochs=1))
    assert [row["rollout/score"] for row in metrics(Path()).values()] == ["7.0"]


def test_an_installed_package_registers_a_short_name_and_a_broken_one_only_warns(own_folder: Path) -> None:
    site = own_folder.parent / "site"
    for package, entry in (("best_of_k", "best_of_k:BestOfK"), ("broken", "not_there:Thing")):
        (site / f"{package}-1.0.dist-info").mkdir(parents=True)
        (site / f"{package}-1.0.dist-info" / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n"
        )
        (site / f"{package}-1.0.dist-info" / "entry_points.txt").write_text(
            f"[lit_rlhf.plugins]\n{package} = {entry}\n"
        )
    (own_folder / "my_algorithms.py").rename(site / "best_of_k.py")
    config = (own_folder / "run.yaml").read_text().replace("my_algorithms.BestOfK", "BestOfK")
    (own_folder / "run.yaml").write_text(config)
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = run(own_folder, *small(epochs=1), PYTHONPATH=path)
    assert "plugin broken (not_there:Thing) not loaded: ModuleNotFoundError" in done.stderr
    record = torch.load(own_folder / CHECKPOINT, weights_only=True)["lit_rlhf"]
    assert record["algorithm"] == "best_of_k.BestOfK"


@pytest.mark.parametrize(
    ("right", "wrong", "named"),
    [
        ("my_layouts.WHOLE_ACTOR", "my_layouts.HALF_ACTOR", "HALF_ACTOR"),
        ("my_layouts.WHOLE_ACTOR", "my_layoutz.WHOLE_ACTOR", "my_layoutz"),
        ("my_layouts.WHOLE_ACTOR", "hydraa", "hydraa"),
        ("my_rewards.brevity", "my_rewards.length", "length"),
        ("my_rewards.brevity", "my_rewardz.brevity", "my_rewardz"),
        ("my_kl.CosineKL", "my_kl.SineKL", "SineKL"),
        ("start: 0.1", "strat: 0.1", "strat"),
        ("my_algorithms.BestOfK", "my_algorithms.WorstOfK", "WorstOfK"),
        ("my_algorithms.BestOfK", "my_algorithmz.BestOfK", "my_algorithmz"),
        ("keep: 1", "keep: four", "four"),
    ],
)
def test_a_wrong_import_path_is_one_line_that_names_it(
    right: str, wrong: str, named: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = (here / "run.yaml").read_text()
    assert right in config
    (here / "run.yaml").write_text(config.replace(right, wrong))
    with pytest.raises(SystemExit) as stop:
        main(small())
    assert stop.value.code in (1, 2)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("Seed set to")]
    assert line.startswith("lit-rlhf: ")
    assert named in line
    assert "Namespace" not in line


def test_settings_an_own_class_refuses_are_listed_and_its_bugs_keep_their_traceback(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(small("--model.keep=4", "--model.inner_epochs=0"))
    assert capsys.readouterr().err.splitlines()[-3:] == [
        "lit-rlhf: invalid configuration:",
        "  - inner_epochs must be positive, got 0",
        "  - keep must be in 1..3, got 4",
    ]
    code = (here / "my_algorithms.py").read_text()
    (here / "my_faults.py").write_text(code.replace("self.keep = keep", "self.keep = kept"))
    config = (here / "run.yaml").read_text().replace("my_algorithms.", "my_faults.")
    (here / "run.yaml").write_text(config)
    with pytest.raises(NameError, match="kept"):
        main(small())
