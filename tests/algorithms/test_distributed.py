"""One optimizer step on two processes equals one process on the joined batch, to rounding; ranks never wait in vain."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_guards import run_to_the_end

RUN = """
import sys
from contextlib import nullcontext
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.tensor import DTensor, distribute_tensor
from helpers import TINY, make_ppo, make_trainer, quantization_device
import lit_rlhf
from lit_rlhf import Experience, FixedKL, LoraArgs, PromptData
from lit_rlhf.strategies import FSDP2Strategy

folder, data, algorithm, layout, policy, reward, quantization, strategy, accumulate = sys.argv[2:]
world, rows, accumulate = (1 if strategy == "auto" else 2), 8, int(accumulate)




class FixedResponses(getattr(lit_rlhf, algorithm)):
    # Responses of very different lengths, so that a mean of the ranks' means is not the mean over all tokens.
    def sample(self, prompts):
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(3, 900, (rows, 12), generator=generator)
        mask = torch.arange(8) < torch.tensor([1, 2, 1, 1, 8, 7, 8, 3])[:, None]
        every = Experience(tokens, torch.cat([torch.ones(rows, 4).bool(), mask], 1), mask, ~mask[:, -1])
        first = self.trainer.global_rank * rows // world
        part = every[first : first + rows // world]
        if algorithm == "ReMax":
            other = torch.randint(3, 900, (rows, 12), generator=generator)
            greedy = Experience(other, torch.ones(rows, 12).bool(), torch.ones(rows, 8).bool(), torch.ones(rows).bool())
            part.greedy = greedy[first : first + rows // world]
        return part


settings = dict(
    layout=layout, policy_checkpoint=policy, reward_checkpoint=reward or None, kl=FixedKL(0.3), lora=LoraArgs(r=4),
    rollout_size=rows // world, minibatch_size=rows // world // accumulate, inner_epochs=1,
    optimizer=lambda p: torch.optim.SGD(p, lr=1.0), quantization=quantization or None,
)
module = make_ppo(FixedResponses, **settings)
plans = {"zero2": FSDP2Strategy(reshard_after_forward=False),
         "mesh": ModelParallelStrategy(2, 1, save_distributed_checkpoint=False)}
plan = plans.get(strategy, strategy)
devices = dict(devices=world, strategy=plan) if world > 1 else {}
trainer = make_trainer(Path(folder), 1, callbacks=[], enable_checkpointing=False, accumulate_grad_batches=accumulate,
                       **devices)
def whole(module):
    state = module.state_dict().items()
    return {k: (v.full_tensor() if isinstance(v, DTensor) else v).clone() for k, v in state}
class Weights(L.Callback):
    def on_fit_start(self, trainer, module):
        torch.manual_seed(0)
        with torch.no_grad():  # a policy that differs from its reference
            for name, p in module.backbone.named_parameters():
                if p.requires_grad and ("lora_B" in name):
                    noise = 0.05 * torch.randn(p.shape)
                    p.add_(distribute_tensor(noise, p.device_mesh, p.placements) if isinstance(p, DTensor) else noise)
        self.before = whole(module)
    def on_train_end(self, trainer, module):
        change = {k: v - self.before[k] for k, v in whole(module).items()}
        if trainer.global_rank == 0:
            torch.save(change, Path(folder, f"{strategy}.pt"))
trainer.callbacks.append(Weights())
with quantization_device() if quantization else nullcontext():
    trainer.fit(module, PromptData(train=data, validation_size=0))
"""


Case = tuple[str, ...]
Changes = dict[Case, dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def alone() -> Changes:
    """What the step of one process changes, by case: every strategy is compared with the same run."""
    return {}


def change_by(folder: Path, data_folder: Path, case: Case, plan: str, accumulate: int) -> dict[str, torch.Tensor]:
    """Take the step and return the change of each weight."""
    script = folder / "run.py"
    script.write_text(RUN)
    arguments = [str(Path(__file__).parents[1]), str(folder), str(data_folder / "prompts.jsonl"), *case]
    command = [sys.executable, str(script), *arguments, plan, str(accumulate)]
    subprocess.run(command, check=True, timeout=300, capture_output=True)
    return torch.load(folder / f"{plan}.pt", weights_only=True)


CASES = [
    ("PPO", "hydra", 1),
    pytest.param("ReMax", "hydra", 2, marks=pytest.mark.slow),
    pytest.param("PPO", "full", 1, marks=pytest.mark.slow),
    pytest.param("PPO", "j_hydra", 2, marks=pytest.mark.slow),
    pytest.param("GRPO", "hydra", 1, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize(("algorithm", "layout", "accumulate"), CASES)
def test_two_processes_step_as_one(
    algorithm: str, layout: str, accumulate: int, strategy: str, data_folder: Path, hydra_checkpoint: Path,
    full_reward_checkpoint: Path, tmp_path: Path, alone: Changes,
) -> None:  # fmt: skip
    reward = str(full_reward_checkpoint) if layout == "full" else ""
    case = (algorithm, layout, str(hydra_checkpoint), reward, "")
    compare(tmp_path, data_folder, case, strategy, accumulate, alone)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero2", "mesh"])
def test_other_ways_to_shard_step_as_one(
    strategy: str, data_folder: Path, hydra_checkpoint: Path, tmp_path: Path, alone: Changes
) -> None:
    compare(tmp_path, data_folder, ("PPO", "hydra", str(hydra_checkpoint), "", ""), strategy, 1, alone)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_step_as_one_on_a_quantized_trunk(
    strategy: str, data_folder: Path, hydra_checkpoint: Path, tmp_path: Path, alone: Changes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Every rank quantizes for itself, here a model that is not a folder."""
    pytest.importorskip("bitsandbytes")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # both ranks run on the CPU
    compare(tmp_path, data_folder, ("PPO", "hydra", str(hydra_checkpoint), "", "nf4"), strategy, 1, alone)


def compare(folder: Path, data_folder: Path, case: Case, strategy: str, accumulate: int, alone: Changes) -> None:
    if case not in alone:
        alone[case] = change_by(folder, data_folder, case, "auto", 1)
    one, two = alone[case], change_by(folder, data_folder, case, strategy, accumulate)
    assert one.keys() == two.keys()
    for name, change in one.items():
        scale = float(change.abs().max())
        torch.testing.assert_close(two[name], change, rtol=1e-5, atol=1e-5 * scale + 1e-9, msg=name)
    assert max(float(change.abs().max()) for change in one.values()) > 1e-4


UNEVEN = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import lightning as L
from helpers import make_ppo, make_trainer
import lit_rlhf
from lit_rlhf import PromptData, Sampling
folder, data, policy, strategy = sys.argv[2:]
class Ends(L.Callback):
    # To the first rank a third of all tokens ends a response, to the second none does.
    def on_fit_start(self, trainer, module):
        self.lengths = []
        type(module).eos_ids = [-1] if trainer.global_rank else list(range(3, 1000, 3))
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.lengths += batch.mask.sum(dim=1).tolist()
for name in ("PPO", "ReMax", "RLOO"):
    ends = Ends()
    groups = {"samples_per_prompt": 2} if name == "RLOO" else {}
    module = make_ppo(getattr(lit_rlhf, name), policy_checkpoint=policy, rollout_size=4, minibatch_size=2,
                      inner_epochs=1, rollout_batch_size=2, sampling=Sampling(max_new_tokens=12), **groups)
    trainer = make_trainer(Path(folder, name), 2, devices=2, strategy=strategy, callbacks=[ends], limit_val_batches=1.0,
                           enable_checkpointing=False, enable_progress_bar=True)
    trainer.fit(module, PromptData(train=data, validation_size=3, batch_size=2))
    Path(folder, f"{name}{trainer.global_rank}.json").write_text(json.dumps(ends.lengths))
"""


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_ranks_whose_responses_differ_in_length_wait_for_one_another(
    strategy: str, data_folder: Path, hydra_checkpoint: Path, tmp_path: Path
) -> None:
    script = tmp_path / "run.py"
    script.write_text(UNEVEN)
    arguments = [str(Path(__file__).parents[1]), str(tmp_path), str(data_folder / "prompts.jsonl")]
    done = run_to_the_end([sys.executable, str(script), *arguments, str(hydra_checkpoint), strategy], seconds=240)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("PPO", "ReMax", "RLOO"):
        short, long = (json.loads((tmp_path / f"{name}{rank}.json").read_text()) for rank in (0, 1))
        assert len(short) == len(long) == 8
        assert sum(short) / 8 < 7
        assert long == [12] * 8
