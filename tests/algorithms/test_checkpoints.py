"""Checkpoints: what they hold, that they load safely, and that a resumed run repeats the uninterrupted one."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_ppo, make_trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_rlhf import AdaptiveKL, FixedKL, PromptData
from lit_rlhf.backbone import StageCheckpoint

RUN = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import lightning as L
from helpers import make_ppo, make_trainer
from lit_rlhf import AdaptiveKL, PromptData
folder, data, policy, resume, pause = sys.argv[2:7]
class Pause(L.Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.current_epoch == 2 and batch_idx == 1 and pause == "pause":
            Path(folder, "in_iteration_3").touch()
            time.sleep(120)
L.seed_everything(3, verbose=False)
module = make_ppo(policy_checkpoint=policy, kl=AdaptiveKL(0.1, 1.0, 40.0), reward_scaling="running", layout=sys.argv[7])
trainer = make_trainer(Path(folder), 5)
trainer.callbacks.append(Pause())
trainer.fit(module, PromptData(train=data, validation_size=4), ckpt_path=resume or None, weights_only=True)
"""


def metrics(path: Path) -> dict[int, dict[str, str]]:
    with path.open() as file:
        rows = list(csv.DictReader(file))
    return {int(r["epoch"]): {k: v for k, v in r.items() if not k.startswith("time/")} for r in rows}


@pytest.mark.parametrize("layout", ["hydra", pytest.param("full", marks=pytest.mark.slow)])
def test_sigkill_in_iteration_3_then_resume_repeats_every_number(
    layout: str, data_folder: Path, hydra_checkpoint: Path, tmp_path: Path
) -> None:
    def command(name: str, resume: str = "", pause: str = "") -> list[str]:
        tests = str(Path(__file__).parents[1])
        data = str(data_folder / "prompts.jsonl")
        return [
            sys.executable,
            "-c",
            RUN,
            tests,
            str(tmp_path / name),
            data,
            str(hydra_checkpoint),
            resume,
            pause,
            layout,
        ]

    subprocess.run(command("whole"), check=True, timeout=300)
    process = subprocess.Popen(command("killed", pause="pause"))
    deadline = time.monotonic() + 120
    while not (tmp_path / "killed" / "in_iteration_3").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    checkpoint = tmp_path / "killed" / "last.ckpt"
    assert torch.load(checkpoint, weights_only=True)["epoch"] == 1
    subprocess.run(command("resumed", resume=str(checkpoint)), check=True, timeout=300)

    whole, resumed = (
        metrics(tmp_path / "whole" / "metrics.csv"),
        metrics(tmp_path / "resumed" / "metrics.csv"),
    )
    assert sorted(resumed) == [2, 3, 4]
    for epoch in resumed:
        assert resumed[epoch] == whole[epoch]
    ends = [torch.load(tmp_path / name / "last.ckpt", weights_only=True) for name in ("whole", "resumed")]
    for name, value in ends[0]["state_dict"].items():
        assert torch.equal(value, ends[1]["state_dict"][name])
    assert ends[0]["controllers"] == ends[1]["controllers"]


def fit(
    folder: Path,
    prompts: PromptData,
    epochs: int = 2,
    trainer_args: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    module = make_ppo(**kwargs)
    trainer = make_trainer(folder, epochs, **(trainer_args or {}))
    trainer.fit(module, prompts)
    return trainer


def test_a_checkpoint_holds_what_was_trained_and_nothing_frozen(prompts: PromptData, tmp_path: Path) -> None:
    trainer = fit(tmp_path, prompts, kl=AdaptiveKL(0.1))
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    backbone = trainer.lightning_module.backbone
    assert set(content["state_dict"]) == {f"backbone.{name}" for name in backbone.trainable_names}
    assert all("lora_" in name or ".heads.value." in name for name in content["state_dict"])
    trained = sum(p.numel() for p in backbone.parameters() if p.requires_grad)
    moments = content["optimizer_states"][0]["state"].values()
    assert sum(state["exp_avg"].numel() for state in moments) == trained
    assert content["controllers"]["kl"]["coefficient"] == trainer.lightning_module.kl.value
    whole = sum(p.numel() * p.element_size() for p in backbone.parameters())
    assert (tmp_path / "last.ckpt").stat().st_size < whole


def test_resuming_another_configuration_is_refused(prompts: PromptData, tmp_path: Path) -> None:
    fit(tmp_path, prompts)
    for changed, message in (
        ({"layout": "j_hydra"}, "layout differs"),
        ({"lora": None}, "lora was"),
    ):
        with pytest.raises(ValueError, match=f"cannot resume: .*{message}"):
            make_trainer(tmp_path / "again", 3).fit(make_ppo(**changed), prompts, ckpt_path=tmp_path / "last.ckpt")


def test_a_fixed_coefficient_is_a_setting_and_an_adaptive_one_is_state(prompts: PromptData, tmp_path: Path) -> None:
    for old, new, expected in (
        (FixedKL(0.3), FixedKL(0.9), 0.9),
        (AdaptiveKL(0.3, 1.0, 1e9), AdaptiveKL(0.9, 1.0, 1e9), 0.3),
    ):
        fit(tmp_path, prompts, epochs=1, kl=old)
        module = make_ppo(kl=new)
        make_trainer(tmp_path / "again", 2).fit(module, prompts, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
        assert module.kl.value == pytest.approx(expected, rel=1e-4)


def test_a_changed_rollout_size_is_refused_and_the_runs_own_seed_is_kept(prompts: PromptData, tmp_path: Path) -> None:
    fit(tmp_path, prompts, epochs=1)
    module = make_ppo(rollout_size=4)
    with pytest.raises(ValueError, match="rollout_size was 8 and is now 4"):
        make_trainer(tmp_path / "again", 2).fit(module, prompts, ckpt_path=tmp_path / "last.ckpt")
    module = make_ppo(seed=99)
    make_trainer(tmp_path / "again", 2).fit(module, prompts, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert module.rollout_buffer.seed == 7


def test_a_replaced_parent_checkpoint_is_noticed(
    hydra_checkpoint: Path, data_folder: Path, prompts: PromptData, tmp_path: Path
) -> None:
    parent = tmp_path / "hydra.ckpt"
    parent.write_bytes(hydra_checkpoint.read_bytes())
    fit(tmp_path, prompts, epochs=1, policy_checkpoint=str(parent))
    assert len(StageCheckpoint.read(tmp_path / "last.ckpt").role_model("actor").adapters) == 2
    content = torch.load(parent, weights_only=True)
    name = next(iter(content["state_dict"]))
    content["state_dict"][name] += 1.0
    torch.save(content, parent)
    with pytest.raises(ValueError, match="was replaced after a later stage was trained on it"):
        StageCheckpoint.read(tmp_path / "last.ckpt").role_model("actor")
    with pytest.raises(ValueError, match="cannot resume: fingerprints"):
        make_trainer(tmp_path / "again", 2).fit(
            make_ppo(policy_checkpoint=str(parent)), prompts, ckpt_path=tmp_path / "last.ckpt"
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_train_steps": 2}, "by train steps or by time"),
        ({"save_on_train_epoch_end": False}, "save_on_train_epoch_end"),
    ],
)
def test_checkpoints_inside_an_iteration_are_refused(
    arguments: dict[str, Any], message: str, prompts: PromptData, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, prompts, trainer_args={"callbacks": [ModelCheckpoint(tmp_path, **arguments)]})


def test_a_checkpoint_with_rare_validation_still_resumes(prompts: PromptData, tmp_path: Path) -> None:
    # Lightning's own default would save after validation, inside the epoch, and skip the next rollout on resume.
    options = {
        "limit_val_batches": 1.0,
        "check_val_every_n_epoch": 2,
        "callbacks": [ModelCheckpoint(tmp_path, filename="last")],
    }
    fit(tmp_path, prompts, epochs=2, trainer_args=options)
    module = make_ppo()
    trainer = make_trainer(tmp_path / "again", 3)
    trainer.fit(module, prompts, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert trainer.global_step == 3 * 4


def test_an_early_stop_inside_an_iteration_resumes_at_the_next(prompts: PromptData, tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", prompts, epochs=3, target_kl=1e-9, inner_epochs=3)
    fit(tmp_path / "part", prompts, epochs=1, target_kl=1e-9, inner_epochs=3)
    module = make_ppo(target_kl=1e-9, inner_epochs=3)
    resumed = make_trainer(tmp_path / "resumed", 3)
    resumed.fit(module, prompts, ckpt_path=tmp_path / "part" / "last.ckpt", weights_only=True)
    assert resumed.global_step == whole.global_step
    for name, value in whole.lightning_module.state_dict().items():
        assert torch.equal(value, resumed.lightning_module.state_dict()[name])
