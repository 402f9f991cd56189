"""Two processes (gloo): ranks draw their own prompts and stay equal in everything they share."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

RUN = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import json
import lightning as L
import torch
from helpers import make_ppo, make_trainer
from lit_rlhf import AdaptiveKL, PromptData
folder, data, policy = sys.argv[2:5]
class Keep(L.Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 0:
            e = module.rollout_buffer.experience
            kept = e.advantages[e.mask]
            self.prompts = [s["prompt"] for s in module.rollout_buffer.samples]
            self.advantages = (float(kept.sum()), float(kept.pow(2).sum()), len(kept))
    def on_train_end(self, trainer, module):
        state = {name: float(value.double().abs().sum()) for name, value in module.state_dict().items()}
        row = {"prompts": self.prompts, "advantages": self.advantages, "state": state, "kl": module.kl.value,
               "scaler": module.reward_scaler.state_dict(), "score": float(trainer.callback_metrics["rollout/score"]),
               "loss": float(trainer.callback_metrics["train/policy_loss"])}
        Path(folder, f"rank{trainer.global_rank}.json").write_text(json.dumps(row))
torch.manual_seed(0)
module = make_ppo(policy_checkpoint=policy, kl=AdaptiveKL(0.1, 1.0, 40.0), reward_scaling="running", rollout_size=4,
                  target_kl=0.5, inner_epochs=2)
trainer = make_trainer(Path(folder), 3, devices=2, strategy="ddp")
trainer.callbacks.append(Keep())
trainer.fit(module, PromptData(train=data, validation_size=4))
"""


def test_two_ranks(data_folder: Path, hydra_checkpoint: Path, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(RUN)
    tests = str(Path(__file__).parents[1])
    arguments = [tests, str(tmp_path), str(data_folder / "prompts.jsonl"), str(hydra_checkpoint)]
    subprocess.run([sys.executable, str(script), *arguments], check=True, timeout=300, capture_output=True)
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert not set(first["prompts"]) & set(second["prompts"])
    assert first["state"] == second["state"]
    for shared in ("kl", "scaler", "score", "loss"):
        assert first[shared] == second[shared]
    total, squares, count = (a + b for a, b in zip(first["advantages"], second["advantages"], strict=True))
    assert total / count == pytest.approx(0.0, abs=1e-4)
    assert squares / (count - 1) == pytest.approx(1.0, abs=1e-3)
    # White over both ranks together, not on each alone.
    assert abs(first["advantages"][0] / first["advantages"][2]) > 1e-3
