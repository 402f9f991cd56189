"""A disk that fills up during a run: one line, the checkpoint before it intact, and the run goes on from there."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers import OPENINGS, write_jsonl

# From the second iteration on the system refuses files above 20 kB, as a full disk would.
FULL_DISK = """
import resource
import lightning as L
def count_e(prompts, responses, **columns): return [response.count("e") / 10 for response in responses]
class FullDisk(L.Callback):
    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
"""


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_checkpoint_before_it_resumes(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": text} for text in OPENINGS])
    (tmp_path / "full_disk.py").write_text(FULL_DISK)
    saved = {"dirpath": "saved", "filename": "last", "enable_version_counter": False}
    config = {
        "trainer": {
            "accelerator": "cpu", "devices": 1, "max_epochs": 3, "enable_progress_bar": False,
            "callbacks": [{"class_path": "ModelCheckpoint", "init_args": saved}],
        },
        "model": {
            "class_path": "PPO",
            "init_args": {
                "model": "random:tiny", "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.001}},
                "reward": {"class_path": "FunctionReward", "init_args": {"function": "full_disk.count_e"}},
                "rollout_size": 4, "minibatch_size": 2, "sampling": {"max_new_tokens": 6},
            },
        },
        "data": {"class_path": "PromptData", "init_args": {"train": "prompts.jsonl", "validation_size": 4}},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))

    def fit(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "lit_rlhf", "fit", "-c", "run.yaml", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)

    full = fit("--trainer.callbacks+=full_disk.FullDisk")
    assert full.returncode == 1
    (line,) = [line for line in full.stderr.splitlines() if line.startswith("lit-rlhf")]
    assert "saved/last.ckpt could not be written: File too large" in line
    assert "The earlier file of that name is intact" in line
    assert "Traceback" not in full.stderr
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["last.ckpt"]
    assert torch.load(tmp_path / "saved" / "last.ckpt", weights_only=True)["epoch"] == 0
    resumed = fit("--ckpt_path=saved/last.ckpt")
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert torch.load(tmp_path / "saved" / "last.ckpt", weights_only=True)["epoch"] == 2
