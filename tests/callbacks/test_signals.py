"""SIGTERM: a run stops in order, says how it goes on, and goes on with the same numbers."""

import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from helpers import make_ppo, make_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_rlhf import AdaptiveKL, PromptData
from lit_rlhf.callbacks import StopInIteration
from lit_rlhf.cli import main

REWARD_MODULE = """
import time
from pathlib import Path

calls = 0

def rate(prompts, responses, **columns):
    global calls
    calls += 1
    if calls == 3 and Path("wait").exists():
        Path("in_iteration_3").touch()
        while not Path("signalled").exists():
            time.sleep(0.02)
    return [response.count("e") / 10 for response in responses]
"""


def config(data_folder: Path) -> dict[str, Any]:
    return {
        "seed_everything": 5,
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 4,
            "limit_val_batches": 0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "log", "name": "", "version": ""}},
        },
        "model": {
            "class_path": "PPO",
            "init_args": {
                "model": "random:tiny",
                "rollout_size": 4,
                "minibatch_size": 2,
                "lora": {"r": 4},
                "sampling": {"max_new_tokens": 6},
                "reward": {"class_path": "FunctionReward", "init_args": {"function": "my_rewards.rate"}},
                "kl": {"class_path": "AdaptiveKL", "init_args": {"coefficient": 0.1}},
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.001}},
            },
        },
        "data": {"class_path": "PromptData", "init_args": {"train": str(data_folder / "prompts.jsonl")}},
    }


def metrics(folder: Path) -> dict[int, dict[str, str]]:
    with (folder / "log" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {int(r["epoch"]): {k: v for k, v in r.items() if not k.startswith("time/")} for r in rows}


@pytest.mark.slow
def test_sigterm_in_iteration_3_of_a_command_line_run_then_the_printed_command(
    data_folder: Path, tmp_path: Path
) -> None:
    def start(name: str, *arguments: str) -> subprocess.Popen[str]:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "run.yaml").write_text(yaml.safe_dump(config(data_folder)))
        (folder / "my_rewards.py").write_text(REWARD_MODULE)
        command = [sys.executable, "-m", "lit_rlhf", *arguments]
        return subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)

    whole = start("whole", "fit", "-c", "run.yaml")
    assert whole.wait(200) == 0
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    (stopped / "wait").touch()
    process = start("stopped", "fit", "-c", "run.yaml")
    deadline = time.monotonic() + 120
    while not (stopped / "in_iteration_3").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    (stopped / "signalled").touch()
    _, error = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in error
    checkpoint = stopped / "log" / "checkpoints" / "last.ckpt"
    said = f"stopped by SIGTERM in iteration 3 of 4, which is abandoned; the last complete one is in {checkpoint}"
    assert said in error
    assert torch.load(checkpoint, weights_only=True)["epoch"] == 1
    before = metrics(stopped)
    program, *arguments = shlex.split(error.rsplit("resume with\n", 1)[1])
    assert program == "lit-rlhf"
    (stopped / "wait").unlink()
    assert start("stopped", *arguments).wait(200) == 0

    expected, after = metrics(tmp_path / "whole"), metrics(stopped)
    assert sorted(before) == [0, 1]
    assert sorted(after) == [2, 3]
    assert before | after == expected
    ends = [
        torch.load(tmp_path / name / "log/checkpoints/last.ckpt", weights_only=True) for name in ("whole", "stopped")
    ]
    for name, value in ends[0]["state_dict"].items():
        assert torch.equal(value, ends[1]["state_dict"][name])
    assert ends[0]["controllers"] == ends[1]["controllers"]


class SignalAt(L.Callback):
    """Sends this process SIGTERM in the second minibatch of the second iteration."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == (1, 1):
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_between_minibatches_ends_the_run_with_status_143(
    prompts: PromptData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    trainer = make_trainer(tmp_path, 3)
    trainer.callbacks.append(SignalAt())
    with pytest.raises(SIGTERMException) as stop:
        trainer.fit(make_ppo(), prompts)
    assert stop.value.code == 143
    path = tmp_path / "last.ckpt"
    assert f"in iteration 2 of 3, which is abandoned; the last complete one is in {path}" in capsys.readouterr().err
    assert torch.load(path, weights_only=True)["epoch"] == 0
    assert signal.getsignal(signal.SIGTERM) == before
    resumed, whole = (make_trainer(tmp_path / name, 3) for name in ("resumed", "whole"))
    resumed.fit(make_ppo(), prompts, ckpt_path=path)
    whole.fit(make_ppo(), prompts)
    for name, value in whole.lightning_module.state_dict().items():
        assert torch.equal(value, resumed.lightning_module.state_dict()[name])


class SignalInIteration(L.Callback):
    """Sends this process SIGTERM in the second minibatch of an iteration, counted from 0."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration
        self.ends = 0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == (self.iteration, 1):
            os.kill(os.getpid(), signal.SIGTERM)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.ends += 1

    def state_dict(self) -> dict[str, int]:
        return {"ends": self.ends}


@pytest.mark.parametrize(("iteration", "saved"), [(0, None), (1, "sigterm"), (2, "last"), (3, "sigterm")])
@pytest.mark.parametrize("layout", ["hydra", "full"])
def test_the_end_of_an_iteration_that_no_checkpoint_saved_is_saved_at_sigterm(
    layout: str,
    iteration: int,
    saved: str | None,
    prompts: PromptData,
    hydra_checkpoint: Path,
    full_reward_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    parents: dict[str, Any] = {"layout": layout}
    if layout == "full":
        parents |= {"policy_checkpoint": str(hydra_checkpoint), "reward_checkpoint": str(full_reward_checkpoint)}

    def start(name: str, **kwargs: Any) -> L.Trainer:
        checkpoints = ModelCheckpoint(tmp_path / name, filename="last", enable_version_counter=False, every_n_epochs=2)
        trainer = make_trainer(tmp_path / name, 4, callbacks=[*kwargs.pop("callbacks", []), checkpoints])
        L.seed_everything(2, verbose=False)
        trainer.fit(make_ppo(kl=AdaptiveKL(0.1), **parents), prompts, **kwargs)
        return trainer

    with pytest.raises(SIGTERMException) as stop:
        start("stopped", callbacks=[SignalInIteration(iteration)])
    where = f"stopped by SIGTERM in iteration {iteration + 1} of 4, which is abandoned; "
    error = capsys.readouterr().err
    if saved is None:
        assert where + "no checkpoint was saved yet" in error
        assert not list((tmp_path / "stopped").glob("*.ckpt"))
        return
    path = tmp_path / "stopped" / f"{saved}.ckpt"
    said = "the end of the one before is saved in" if saved == "sigterm" else "the last complete one is in"
    assert f"{where}{said} {path}" in error
    assert stop.value.checkpoint == str(path)
    content = torch.load(path, weights_only=True)
    assert content["epoch"] == iteration - 1
    assert content["callbacks"]["SignalInIteration"]["ends"] == iteration
    resumed, whole = start("resumed", ckpt_path=path), start("whole")
    for name, value in whole.lightning_module.state_dict().items():
        assert torch.equal(value, resumed.lightning_module.state_dict()[name])
    before, after, expected = (rows_of(tmp_path / name) for name in ("stopped", "resumed", "whole"))
    assert before | after == expected


def rows_of(folder: Path) -> dict[int, dict[str, str]]:
    """Return what each complete iteration logged, but for times."""
    with (folder / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    return {int(r["epoch"]): {k: v for k, v in r.items() if not k.startswith("time/")} for r in rows}


def test_a_second_signal_names_what_the_first_one_saved(prompts: PromptData, tmp_path: Path) -> None:
    def stop(iteration: int, **kwargs: Any) -> str:
        rare = ModelCheckpoint(tmp_path, filename="{epoch}", every_n_epochs=2, save_top_k=-1)
        trainer = make_trainer(tmp_path, 5, callbacks=[SignalInIteration(iteration), rare])
        with pytest.raises(SIGTERMException) as stopped:
            trainer.fit(make_ppo(), prompts, **kwargs)
        return str(stopped.value.checkpoint)  # type: ignore[attr-defined]

    first = stop(3)
    assert Path(first).name == "sigterm.ckpt"
    assert torch.load(first, weights_only=True)["epoch"] == 2
    assert stop(3, ckpt_path=first) == first  # and not epoch=1.ckpt, which the callback remembers


def test_a_file_of_weights_alone_saves_no_iteration(prompts: PromptData, tmp_path: Path) -> None:
    weights = ModelCheckpoint(tmp_path, filename="{epoch}", save_weights_only=True)
    trainer = make_trainer(tmp_path, 3, callbacks=[SignalInIteration(2), weights])
    with pytest.raises(SIGTERMException) as stop:
        trainer.fit(make_ppo(), prompts)
    assert Path(stop.value.checkpoint).name == "sigterm.ckpt"
    make_trainer(tmp_path / "resumed", 3).fit(make_ppo(), prompts, ckpt_path=stop.value.checkpoint)


def test_one_copy_of_the_state_is_kept_at_a_time_and_none_after_the_run(prompts: PromptData, tmp_path: Path) -> None:
    alive: list[int] = []
    kept: list[weakref.ref[torch.Tensor]] = []

    class Look(L.Callback):
        def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
            alive.append(sum(ref() is not None for ref in kept))

        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            callback = next(c for c in trainer.callbacks if isinstance(c, StopInIteration))
            if callback._kept is not None:
                kept.append(weakref.ref(next(iter(callback._kept["state_dict"].values()))))

    rare = ModelCheckpoint(tmp_path, every_n_epochs=9)
    make_trainer(tmp_path, 4, callbacks=[Look(), rare]).fit(make_ppo(), prompts)
    assert alive == [0, 0, 0, 0]
    assert len(kept) == 3
    assert all(ref() is None for ref in kept)


def test_runs_that_keep_no_checkpoints_keep_no_copy_of_their_state(prompts: PromptData, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, 2, callbacks=[SignalInIteration(1)], enable_checkpointing=False)
    with pytest.raises(SIGTERMException):
        trainer.fit(make_ppo(), prompts)
    assert not list(tmp_path.rglob("*.ckpt"))
    assert next(c for c in trainer.callbacks if isinstance(c, StopInIteration))._kept is None


def test_a_signal_during_generation_is_heeded_before_scoring(prompts: PromptData, tmp_path: Path) -> None:
    module = make_ppo()
    generate, scored = module.generate, []

    def signalled(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return generate(*args, **kwargs)

    module.generate = signalled  # type: ignore[method-assign]
    module.score = lambda *args: scored.append(1)  # type: ignore[method-assign,assign,return-value,func-returns-value]
    with pytest.raises(SIGTERMException):
        make_trainer(tmp_path, 3).fit(module, prompts)
    assert not scored


TWO_RANKS = """
import sys
tests, folder, data, who = sys.argv[1:5]
sys.path[:0] = [tests, tests + "/callbacks"]
import json, os
from pathlib import Path
from helpers import make_ppo, make_trainer
from test_signals import SignalAt
from lit_rlhf import PromptData
rank = int(os.environ.get("LOCAL_RANK", "0"))
module = make_ppo(rollout_size=4, minibatch_size=2)
trainer = make_trainer(Path(folder), 3, devices=2, strategy="ddp")
if str(rank) in who:
    trainer.callbacks.append(SignalAt())
try:
    trainer.fit(module, PromptData(train=data, validation_size=4))
except SystemExit as stop:
    row = {"epoch": trainer.current_epoch, "step": trainer.global_step, "code": stop.code}
    Path(folder, f"rank{rank}.json").write_text(json.dumps(row))
    raise
"""


def run_to_the_end(command: list[str], seconds: float = 120) -> subprocess.CompletedProcess[str]:
    """Run a command; where it hangs, end its whole process group, so that no rank stays behind."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, error = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(command, process.returncode, out, error)


@pytest.mark.slow
@pytest.mark.parametrize("who", ["0", "1", "01"])
def test_two_ranks_stop_at_the_same_minibatch_whoever_got_the_signal(
    who: str, data_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "run.py").write_text(TWO_RANKS)
    tests = str(Path(__file__).parents[1])
    command = [sys.executable, str(tmp_path / "run.py"), tests, str(tmp_path), str(data_folder / "prompts.jsonl"), who]
    done = run_to_the_end(command)
    assert done.returncode == 143, done.stderr
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first == {"epoch": 1, "step": 6, "code": 143}
    assert second == {"epoch": 1, "step": 6, "code": None}
    assert done.stderr.count("stopped by SIGTERM in iteration 2 of 3") == 1
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["epoch"] == 0


SAVED_ON_TWO_RANKS = """
import sys
tests, folder, data, kind, strategy, mode, resume = sys.argv[1:8]
sys.path[:0] = [tests, tests + "/callbacks"]
import json, os
from pathlib import Path
import lightning as L
import torch
from helpers import TINY, adamw, make_ppo, make_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from test_signals import SignalInIteration
from torch.distributed.tensor import DTensor
from lit_rlhf import HydraSFT, LoraArgs, PreferenceData, PromptData
from lit_rlhf.strategies import FSDP2Strategy
L.seed_everything(1, verbose=False)
checkpoints = ModelCheckpoint(folder, filename="last", enable_version_counter=False, every_n_epochs=4)
if strategy == "fsdp2_folder":
    strategy = FSDP2Strategy(save_distributed_checkpoint=True)
rare = {"callbacks": [checkpoints], "devices": 2, "strategy": strategy}
trainer = make_trainer(Path(folder), 3, **rare)
if mode == "stopped" and os.environ.get("LOCAL_RANK") == "1":
    trainer.callbacks.insert(0, SignalInIteration(1))
if kind == "PPO":
    module, rows = make_ppo(rollout_size=4, minibatch_size=2), PromptData(train=data + "/prompts.jsonl")
else:
    module = HydraSFT(model=TINY, optimizer=adamw(1e-2), lora=LoraArgs(r=4))
    rows = PreferenceData(train=data + "/pairs.jsonl", batch_size=2)
trainer.fit(module, rows, ckpt_path=resume or None)
state = {n: v.full_tensor() if isinstance(v, DTensor) else v for n, v in module.state_dict().items()}
if trainer.is_global_zero:
    torch.save({"state_dict": state, "global_step": trainer.global_step}, folder + "/end.pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "strategy"), [("HydraSFT", "ddp"), ("PPO", "fsdp2_folder")])
def test_two_ranks_save_at_sigterm_what_no_checkpoint_holds(
    kind: str, strategy: str, data_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "run.py").write_text(SAVED_ON_TWO_RANKS)
    tests = str(Path(__file__).parents[1])

    def start(mode: str, resume: str = "") -> subprocess.CompletedProcess[str]:
        arguments = [tests, str(tmp_path / mode), str(data_folder), kind, strategy, mode, resume]
        return run_to_the_end([sys.executable, str(tmp_path / "run.py"), *arguments])

    stopped, path = start("stopped"), tmp_path / "stopped" / "sigterm.ckpt"
    assert stopped.returncode == 143, stopped.stderr
    where = {
        "PPO": "in iteration 2 of 3, which is abandoned; the end of the one before is saved in",
        "HydraSFT": "after step 5 in epoch 2 of 3, which is saved in",
    }
    assert stopped.stderr.count(f"stopped by SIGTERM {where[kind]} {path}") == 1
    assert start("whole").returncode == start("resumed", str(path)).returncode == 0
    whole, resumed = (torch.load(tmp_path / name / "end.pt", weights_only=True) for name in ("whole", "resumed"))
    assert whole["global_step"] == resumed["global_step"]
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][name]), name


def test_errors_of_a_run_are_one_message_on_the_command_line(
    data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config(data_folder)))
    (tmp_path / "my_rewards.py").write_text(REWARD_MODULE)
    (tmp_path / "torn.ckpt").write_bytes(b"PK\x03\x04 half a file")
    for arguments, said in (
        (
            ["--ckpt_path", "torn.ckpt"],
            "lit-rlhf: checkpoint torn.ckpt cannot be read: it is truncated",
        ),
        (["--ckpt_path", "none.ckpt"], "lit-rlhf: checkpoint none.ckpt does not exist"),
        (["--model.optimizer.lr", "1e37"], "lit-rlhf: iteration 1 of 4, training, minibatch 2 of 2: the loss is nan"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["fit", "-c", "run.yaml", *arguments])
        assert stop.value.code == 1
        error = capsys.readouterr().err
        assert said in error
        assert "Traceback" not in error
