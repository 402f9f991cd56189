"""No network for local names, no code from files, no secrets in what a run writes."""

import ast
import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import OPENINGS, write_jsonl

from lit_rlhf.cli import main

ROOT = Path(__file__).parents[2]
SECRETS = {"WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567", "HF_TOKEN": "hf_SecretSecretSecretSecretSecret"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "pickle.load", "pickle.loads", "yaml.load", "os.system", "os.popen"}
# Python imports it at start: from then on, whoever asks for a connection is written down and refused.
NO_NETWORK = """
import os, socket, traceback
def refuse(*args, **kwargs):
    with open(os.environ["CONNECTIONS"], "a") as file:
        file.write(repr(args[-1:]) + "\\n" + "".join(traceback.format_stack(limit=6)))
    raise OSError(101, "Network is unreachable (blocked by the test)")
def guarded(method):
    def connect(self, *args):  # W&B talks to a process of its own on this machine
        return method(self, *args) if self.family == socket.AF_UNIX else refuse(*args)
    return connect
socket.socket.connect, socket.socket.connect_ex = guarded(socket.socket.connect), guarded(socket.socket.connect_ex)
socket.create_connection = socket.getaddrinfo = refuse
"""


def config(model: str, algorithm: str, data: str, rows: str, **arguments: Any) -> dict[str, Any]:
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.001}}
    return {
        "trainer": {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "enable_progress_bar": False},
        "model": {"class_path": algorithm, "init_args": {"model": model, "optimizer": optimizer, **arguments}},
        "data": {"class_path": data, "init_args": {"train": rows, "validation_size": 4}},
    }


def write_runs(folder: Path, model: str = "random:tiny") -> None:
    pairs = [{"prompt": p, "chosen": " good and fine.", "rejected": " bad and dull, sadly."} for p in OPENINGS]
    write_jsonl(folder / "pairs.jsonl", pairs)
    lora = {"r": 4}
    stage = config(model, "HydraSFT", "PreferenceData", "pairs.jsonl", lora=lora)
    ppo = config(
        model, "PPO", "PromptData", "pairs.jsonl", lora=lora, policy_checkpoint="sft/last.ckpt", rollout_size=4,
        minibatch_size=2, sampling={"max_new_tokens": 6},
    )  # fmt: skip
    for name, run in (("sft", stage), ("ppo", ppo)):
        saved = {"dirpath": name, "filename": "last", "enable_version_counter": False}
        run["trainer"]["callbacks"] = [{"class_path": "ModelCheckpoint", "init_args": saved}]
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(run))


WHOLE_RUN = (
    ["fit", "-c", "sft.yaml"],
    ["fit", "-c", "ppo.yaml"],
    ["fit", "-c", "ppo.yaml", "--trainer.max_epochs=2", "--ckpt_path=ppo/last.ckpt"],
    ["validate", "-c", "ppo.yaml", "--ckpt_path=ppo/last.ckpt"],
    ["predict", "-c", "ppo.yaml", "--ckpt_path=ppo/last.ckpt"],
    ["generate", "ppo/last.ckpt", "--prompt+", "The film was", "--max_new_tokens", "4", "--out", "generated.jsonl"],
    ["export", "ppo/last.ckpt", "merged", "--format", "merged"],
    ["generate", "./merged", "--prompt+", "The film was", "--max_new_tokens", "4", "--out", "again.jsonl"],
)


def run_commands(
    folder: Path, *commands: list[str], check: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run commands one after the other in one process that sees no network and is not told to stay offline."""
    (folder / "site").mkdir(exist_ok=True)
    (folder / "site" / "sitecustomize.py").write_text(NO_NETWORK)
    code = f"from lit_rlhf.cli import main\nfor command in {list(commands)}:\n    main(command)"
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_", "WANDB_"))}
    variables["PYTHONPATH"] = os.pathsep.join([str(folder / "site"), str(ROOT)])
    variables |= {"CONNECTIONS": str(folder / "connections"), "HF_HOME": str(folder / "hub"), **environment}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=variables, capture_output=True, text=True, timeout=300
    )
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.mark.slow
def test_local_names_ask_for_no_connection_and_remote_ones_fail_in_one_line(tmp_path: Path) -> None:
    write_runs(tmp_path)
    run_commands(tmp_path, *WHOLE_RUN)
    assert not (tmp_path / "connections").exists(), (tmp_path / "connections").read_text()
    for name in ("ppo/last.ckpt", "generated.jsonl", "again.jsonl", "merged/model.safetensors"):
        assert (tmp_path / name).is_file()
    done = run_commands(tmp_path, ["generate", "owner/name", "--prompt+", "x"], check=False)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("lit-rlhf")]
    assert "'owner/name' could not be loaded" in line
    assert "Traceback" not in done.stderr
    assert (tmp_path / "connections").exists()  # the block was in force


@pytest.mark.slow
def test_secrets_reach_no_file_and_no_line(tmp_path: Path) -> None:
    write_runs(tmp_path)
    loggers = [
        {"class_path": "CSVLogger", "init_args": {"save_dir": "runs", "name": "csv"}},
        {"class_path": "WandbLogger", "init_args": {"save_dir": "runs", "offline": True, "project": "p"}},
        {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "runs", "name": "tb"}},
    ]
    ppo = yaml.safe_load((tmp_path / "ppo.yaml").read_text())
    ppo["trainer"]["logger"] = loggers
    (tmp_path / "ppo.yaml").write_text(yaml.safe_dump(ppo))
    done = run_commands(tmp_path, *WHOLE_RUN[:2], *WHOLE_RUN[6:7], WANDB_MODE="offline", **SECRETS)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert any(path.name == "config.yaml" for path in files)
    for name, secret in SECRETS.items():
        assert secret not in done.stdout + done.stderr, name
        assert not [path for path in files if secret.encode() in path.read_bytes()], name


# ---- no code from files -----------------------------------------------------------------------------------------


class Payload:
    """What an attacker would pickle."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    write_runs(tmp_path)
    return tmp_path


def test_a_checkpoint_with_code_in_it_is_refused_and_the_code_does_not_run(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": {}, "lit_rlhf": Payload(here / "ran")}, "evil.ckpt")
    for arguments in (
        ["fit", "-c", "sft.yaml", "--ckpt_path=evil.ckpt"],
        ["predict", "-c", "sft.yaml", "--ckpt_path=evil.ckpt"],
        ["fit", "-c", "ppo.yaml", "--model.policy_checkpoint=evil.ckpt"],
        ["fit", "-c", "ppo.yaml", "--model.policy_checkpoint=null", "--model.reward_checkpoint=evil.ckpt"],
        ["generate", "evil.ckpt", "--prompt+", "x"],
        ["export", "evil.ckpt", "out"],
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert "evil.ckpt is refused: it holds" in capsys.readouterr().err
        assert not (here / "ran").exists()
    torch.load("evil.ckpt", weights_only=False)  # the payload works
    assert (here / "ran").exists()


@pytest.mark.parametrize(
    "text",
    [
        "model: !!python/object/apply:os.system ['touch ran']",
        "data: !!python/object/new:subprocess.Popen [['touch', 'ran']]",
        "seed_everything: !!python/name:os.system",
        "model: {class_path: os.system, init_args: {command: touch ran}}",
        "model: {class_path: subprocess.Popen, init_args: {args: [touch, ran]}}",
        "data: {class_path: subprocess.Popen, init_args: {args: [touch, ran]}}",
        "trainer: {callbacks: [{class_path: subprocess.Popen, init_args: {args: [touch, ran]}}]}",
        "model: {init_args: {kl: {class_path: subprocess.Popen, init_args: {args: [touch, ran]}}}}",
        "model: {init_args: {optimizer: {class_path: subprocess.Popen, init_args: {args: [touch, ran]}}}}",
        "trainer: {logger: {class_path: subprocess.Popen, init_args: {args: [touch, ran]}}}",
    ],
)
def test_yaml_runs_nothing_but_classes_of_the_kind_that_is_asked_for(
    text: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "code.yaml").write_text(text)
    with pytest.raises(SystemExit) as stop:
        main(["fit", "-c", "sft.yaml", "-c", "code.yaml"])
    assert stop.value.code == 2
    assert "lit-rlhf:" in capsys.readouterr().err
    assert not (here / "ran").exists()


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            with contextlib.suppress(AttributeError):
                yield ast.unparse(node.func), node


def test_our_code_reads_no_pickles_and_runs_no_strings() -> None:
    loads = []
    for path in [*(ROOT / "lit_rlhf").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")]:
        for name, call in calls(path):
            where = f"{path.relative_to(ROOT)}:{call.lineno}"
            words = {word.arg: ast.unparse(word.value) for word in call.keywords}
            assert name not in FORBIDDEN_CALLS, where
            assert "trust_remote_code" not in words, where
            assert words.get("shell") != "True", where
            if name in ("torch.load", "np.load", "numpy.load"):
                loads.append(where.rpartition(":")[0])
                assert words.get("weights_only") in ("True", "weights_only"), where
                assert "allow_pickle" not in words, where
    ours = sorted(name for name in loads if name.startswith("lit_rlhf/"))
    assert ours == ["lit_rlhf/checkpoints/files.py", "lit_rlhf/checkpoints/folders.py"]
