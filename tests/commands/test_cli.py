"""The command line in-process: dispatch, typos, seeds, loggers, generate and export."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers import write_jsonl
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_rlhf.backbone import StageCheckpoint, load_language_model
from lit_rlhf.cli import main

REWARD_MODULE = """
def rate(prompts, responses, topic, **columns):
    assert len(prompts) == len(responses) == len(topic)
    return [len(response) / 10 for response in responses]
"""


def ppo_config(folder: Path, data_folder: Path, **trainer: object) -> dict:
    return {
        "seed_everything": 5,
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 2,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": str(folder), "name": "", "version": ""},
            },
            **trainer,
        },
        "model": {
            "class_path": "PPO",
            "init_args": {
                "model": "random:tiny",
                "layout": "hydra",
                "lora": {"r": 4},
                "rollout_size": 4,
                "minibatch_size": 2,
                "sampling": {"max_new_tokens": 6},
                "reward": {"class_path": "FunctionReward", "init_args": {"function": "my_rewards.rate"}},
                "kl": {"class_path": "AdaptiveKL", "init_args": {"coefficient": 0.1}},
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.001}},
            },
        },
        "data": {
            "class_path": "PromptData",
            "init_args": {"train": str(data_folder / "prompts.jsonl"), "validation_size": 4},
        },
    }


@pytest.fixture
def run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory holding a user's own reward module."""
    (tmp_path / "my_rewards.py").write_text(REWARD_MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    sys.modules.pop("my_rewards", None)
    return tmp_path


def fit(config: dict, folder: Path, *extra: str) -> None:
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "-c", str(folder / "run.yaml"), *extra])


def test_fit_from_yaml_with_a_users_reward_writes_metrics_config_samples_and_a_checkpoint(
    run_folder: Path, data_folder: Path
) -> None:
    fit(ppo_config(run_folder, data_folder), run_folder)
    header, *rows = (run_folder / "metrics.csv").read_text().splitlines()
    for name in ("rollout/score", "rollout/kl", "train/value_loss", "time/generation", "val/score"):
        assert name in header.split(",")
    assert len(rows) >= 2
    samples = [json.loads(line) for line in (run_folder / "samples.jsonl").read_text().splitlines()]
    assert [s["iteration"] for s in samples] == [0] * 4 + [1] * 4
    assert samples[0]["score"] == pytest.approx(len(samples[0]["response"]) / 10)
    assert (run_folder / "config.yaml").is_file()
    last = torch.load(run_folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["epoch"] == 1
    assert last["callbacks"]["RolloutBuffer"]["seed"] == 5


def test_resume_keeps_the_command_lines_values_over_the_checkpoints(run_folder: Path, data_folder: Path) -> None:
    config = ppo_config(run_folder, data_folder)
    fit(config, run_folder)
    config["model"]["init_args"]["clip"] = 0.05
    config["trainer"]["max_epochs"] = 3
    fit(config, run_folder, "--ckpt_path", str(run_folder / "checkpoints" / "last.ckpt"))
    saved = yaml.safe_load((run_folder / "config.yaml").read_text())
    assert saved["model"]["init_args"]["clip"] == 0.05
    assert torch.load(run_folder / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 2


def test_validate_test_and_predict_run_on_a_checkpoint(
    run_folder: Path, data_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(ppo_config(run_folder, data_folder), run_folder)
    checkpoint = str(run_folder / "checkpoints" / "last.ckpt")
    for command, shown in (("validate", "val/score"), ("test", "test/score"), ("predict", "predictions.jsonl")):
        main([command, "-c", str(run_folder / "run.yaml"), "--ckpt_path", checkpoint])
        assert shown in capsys.readouterr().out
    rows = [json.loads(line) for line in (run_folder / "predictions.jsonl").read_text().splitlines()]
    assert [set(row) for row in rows] == [{"prompt", "response"}] * 4
    assert not list(run_folder.glob("*.partial"))


def test_a_single_callback_and_a_rerun_keep_one_last_checkpoint(run_folder: Path, data_folder: Path) -> None:
    config = ppo_config(run_folder, data_folder)
    for _ in range(2):
        fit(config, run_folder, "--trainer.callbacks", "LearningRateMonitor")
    assert [path.name for path in (run_folder / "checkpoints").iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("name", ["own_pairs/hydra_sft"])
def test_rerunning_a_shipped_experiment_keeps_the_earlier_metrics(
    name: str, run_folder: Path, data_folder: Path
) -> None:
    yaml_file = Path(__file__).parents[2] / "experiments" / f"{name}.yaml"
    for _ in range(2):
        main(["fit", "-c", str(yaml_file), "--data.train", str(data_folder / "pairs.jsonl"), "--model.model",
              "random:tiny", "--trainer.accelerator", "cpu", "--trainer.max_epochs", "1"])  # fmt: skip
    assert [str(path) for path in sorted(Path("runs").rglob("last.ckpt"))] == ["runs/hydra_sft/last.ckpt"]
    assert len(list(Path("runs").rglob("metrics.csv"))) == 2


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("model", "init_args", "clipp"), 0.1, "clipp"),
        (("model", "init_args", "lora", "rank"), 4, "rank"),
        (("model", "init_args", "sampling", "temprature"), 1.0, "temprature"),
        (("trainer", "max_epoch"), 4, "max_epoch"),
        (("data", "init_args", "trian"), "x", "trian"),
        (("model", "init_args", "kl_estimator"), "k9", "kl_estimator"),
        (("model", "init_args", "rollout_size"), "many", "rollout_size"),
    ],
)
def test_a_typo_in_a_yaml_key_names_the_key(
    path: tuple[str, ...],
    value: object,
    named: str,
    run_folder: Path,
    data_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = ppo_config(run_folder, data_folder)
    place = config
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(SystemExit) as stop:
        fit(config, run_folder)
    assert stop.value.code == 2
    assert named in capsys.readouterr().err


def test_wandb_offline_and_tensorboard_by_a_yaml_line(
    run_folder: Path, data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    loggers = [
        {
            "class_path": "WandbLogger",
            "init_args": {"save_dir": str(run_folder), "offline": True, "project": "p"},
        },
        {
            "class_path": "TensorBoardLogger",
            "init_args": {"save_dir": str(run_folder), "name": "tb", "version": ""},
        },
    ]
    fit(ppo_config(run_folder, data_folder, logger=loggers), run_folder)
    import wandb

    wandb.finish()
    (run,) = (run_folder / "wandb").glob("offline-run-*")
    assert list(run.glob("run-*.wandb"))
    (record,) = run.glob("run-*.wandb")
    assert b"rollout_size" in record.read_bytes()
    tables = sorted(run.glob("files/media/table/samples_*.table.json"))
    assert len(tables) == 2
    table = json.loads(tables[0].read_text())
    assert table["columns"] == ["iteration", "prompt", "response", "score"]
    assert len(table["data"]) == 4
    assert list((run_folder / "tb").glob("events.out.tfevents.*"))


def test_generate_and_export_agree_with_plain_peft_and_transformers(
    run_folder: Path, hydra_checkpoint: Path, data_folder: Path
) -> None:
    config = ppo_config(run_folder, data_folder)
    config["model"]["init_args"]["policy_checkpoint"] = str(hydra_checkpoint)
    config["model"]["init_args"]["optimizer"]["init_args"]["lr"] = 0.05
    fit(config, run_folder)
    checkpoint = str(run_folder / "checkpoints" / "last.ckpt")
    stage = StageCheckpoint.read(checkpoint)
    assert len(stage.role_model("actor").adapters) == 2  # Hydra-SFT's set and PPO's on top of it
    prompts = write_jsonl(run_folder / "p.jsonl", [{"prompt": "The plot of the film was"}, {"prompt": "The cast"}])
    generation = ["--prompts", prompts, "--greedy", "true", "--max_new_tokens", "12"]
    main(["generate", checkpoint, *generation, "--out", "own.jsonl"])
    own = [json.loads(line) for line in Path("own.jsonl").read_text().splitlines()]
    start = load_language_model("random:tiny")
    for name in ("peft", "merged"):
        main(["export", checkpoint, name, "--format", name])
        main(["generate", name, *generation, "--out", f"{name}.jsonl"])
        assert Path(f"{name}.jsonl").read_text() == Path("own.jsonl").read_text()
        tokenizer = AutoTokenizer.from_pretrained(name)
        if name == "peft":
            model = PeftModel.from_pretrained(start, name).eval()
        else:
            model = AutoModelForCausalLM.from_pretrained(name).eval()
        for row in own:
            ids = tokenizer(row["prompt"], return_tensors="pt")
            out = model.generate(**ids, do_sample=False, max_new_tokens=12)
            text = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
            assert text == row["response"]
    files = {file.name for file in Path("peft").iterdir()}
    assert "adapter_model.safetensors" in files
    assert not {name for name in files if name.endswith((".bin", ".pt", ".ckpt"))}
    untrained = "lit-untrained.jsonl"
    main(["generate", "random:tiny", *generation, "--out", untrained])
    assert Path(untrained).read_text() != Path("own.jsonl").read_text()


def test_light_commands_report_errors_in_one_line(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_folder / "there").mkdir()
    (run_folder / "torn.ckpt").write_bytes(b"PK\x03\x04 not a checkpoint")
    for arguments, message in (
        (["generate", "missing.ckpt", "--prompt", "x"], "missing.ckpt does not exist"),
        (["generate", "no-such/model", "--prompt", "x"], "no-such/model"),
        (["generate", "torn.ckpt", "--prompt+", "x"], "torn.ckpt cannot be read"),
        (["generate", "random:tiny"], "give --prompt TEXT"),
        (["generate", "random:tiny", "--prompt+", "x", "--temperature", "0"], "temperature must be positive"),
        (["export", "missing.ckpt", "out"], "missing.ckpt does not exist"),
        (["export", "missing.ckpt", "there"], "there exists already"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 1
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error
    assert not (run_folder / "out").exists()


def test_help_and_unknown_commands(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    assert "quickstart" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["fitt"])
    assert stop.value.code == 2
    assert "unknown command 'fitt'" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["quickstart"], ["generate"], ["export"]], ids=lambda c: "-".join(c) or "all")
def test_the_help_of_light_commands_loads_no_model_library(command: list[str]) -> None:
    heavy = ("lightning", "transformers", "peft", "datasets")
    code = f"""
import sys
from lit_rlhf.cli import main
try:
    main({[*command, "--help"]})
except SystemExit as stop:
    assert stop.code in (0, None)
print([name for name in {heavy} if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "--help" in done.stdout
    assert done.stderr.strip().splitlines()[-1] == "[]"
