"""A run saved on two processes goes on with one and with four, under DDP and FSDP2 and from one to the other."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TINY, make_ppo, make_trainer
from peft import PeftModel

from lit_rlhf import PromptData
from lit_rlhf.backbone import load_language_model
from lit_rlhf.commands.export import export

PER_ITERATION = 4

RUN = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from helpers import make_ppo, make_trainer
from lit_rlhf import AdaptiveKL, PromptData
from lit_rlhf.strategies import FSDP2Strategy

folder, data, policy, world, jobs = Path(sys.argv[2]), *sys.argv[3:5], int(sys.argv[5]), json.loads(sys.argv[6])

def whole(value):
    value = value.full_tensor() if isinstance(value, DTensor) else value
    return value.detach().clone() if isinstance(value, torch.Tensor) else value

def held(value):
    value = value.to_local() if isinstance(value, DTensor) else value
    return value.numel() * value.element_size()

class Watch(L.Callback):
    def __init__(self, name, resumed):
        self.name, self.resumed, self.prompts = name, resumed, {}
    def state_of(self, trainer, module):
        optimizer = trainer.optimizers[0]
        if isinstance(optimizer, ZeroRedundancyOptimizer):
            optimizer.consolidate_state_dict()
            if trainer.global_rank:
                return None
        optimizer = optimizer.state_dict()
        return {
            "weights": {name: whole(p) for name, p in module.backbone.named_parameters()},
            "optimizer": {i: {k: whole(v) for k, v in s.items()} for i, s in optimizer["state"].items()},
            "counters": [trainer.current_epoch, trainer.global_step, module.kl.value,
                         module.reward_scaler.state_dict()],
        }
    def save(self, trainer, module, moment):
        state = self.state_of(trainer, module)
        if trainer.global_rank == 0:
            torch.save(state, folder / f"{self.name}.{moment}.pt")
    def on_train_start(self, trainer, module):
        if self.resumed:
            self.save(trainer, module, "restored")
            trainer.save_checkpoint(folder / f"{self.name}.restored.ckpt")
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.prompts[trainer.current_epoch] = [s["prompt"] for s in module.rollout_buffer.samples]
    def on_train_end(self, trainer, module):
        self.save(trainer, module, "final")
        parameters = sum(held(p) for p in module.parameters())
        optimizer = trainer.optimizers[0]
        states = getattr(optimizer, "optim", optimizer).state_dict()["state"].values()
        moments = sum(held(v) for s in states for k, v in s.items() if k != "step")
        row = {"prompts": self.prompts, "parameters": parameters, "moments": moments}
        (folder / f"{self.name}.rank{trainer.global_rank}.json").write_text(json.dumps(row))

for name, strategy, checkpoint in jobs:
    L.seed_everything(0, verbose=False)
    size = 4 // world
    module = make_ppo(policy_checkpoint=policy, kl=AdaptiveKL(0.1, 1.0, 40.0), reward_scaling="running", seed=3,
                      rollout_size=size, minibatch_size=size, critic_lr=3e-3)
    if strategy == "zero1":
        module.optimizer = lambda p: ZeroRedundancyOptimizer(p, optimizer_class=torch.optim.AdamW, lr=1e-3)
    plans = {"sharded": FSDP2Strategy(save_distributed_checkpoint=True), "zero1": "ddp"}
    plan = plans.get(strategy, strategy)
    keeper = ModelCheckpoint(folder, filename=name, enable_version_counter=False)
    trainer = make_trainer(folder / "logs" / name, 3 if checkpoint else 2, devices=world, strategy=plan,
                           callbacks=[keeper, Watch(name, bool(checkpoint))])
    trainer.fit(module, PromptData(train=data, validation_size=0), ckpt_path=checkpoint or None)
"""

SAVED = ["ddp", "fsdp2", "sharded", "zero1"]
RESUMED = {
    1: [("auto", "ddp"), ("auto", "fsdp2"), ("fsdp2", "ddp"), ("fsdp2", "sharded"), ("auto", "zero1")],
    4: [("ddp", "ddp"), ("zero1", "ddp"), ("ddp", "fsdp2"), ("fsdp2", "ddp"), ("fsdp2", "fsdp2"), ("fsdp2", "sharded")],
}
LOADS = [(world, strategy, saved) for world, pairs in RESUMED.items() for strategy, saved in pairs]


def name_of(world: int, strategy: str, saved: str) -> str:
    return f"{strategy}_on_{world}_from_{saved}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, data_folder: Path, hydra_checkpoint: Path) -> Path:
    """Two iterations on two ranks under each strategy, and from each checkpoint a third on one and four ranks."""
    folder = tmp_path_factory.mktemp("world_size")
    script = folder / "run.py"
    script.write_text(RUN)
    jobs = {2: [(saved, saved, "") for saved in SAVED]}
    for world, pairs in RESUMED.items():
        jobs[world] = [(name_of(world, strategy, s), strategy, str(folder / f"{s}.ckpt")) for strategy, s in pairs]
    for world, listed in jobs.items():
        arguments = [str(Path(__file__).parents[1]), str(folder), str(data_folder / "prompts.jsonl")]
        arguments += [str(hydra_checkpoint), str(world), json.dumps(listed)]
        done = subprocess.run(
            [sys.executable, str(script), *arguments], timeout=600, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-4000:]
    return folder


def rows(folder: Path, name: str, world: int) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{name}.rank{rank}.json").read_text()) for rank in range(world)]


def prompts_of(folder: Path, name: str, world: int, iteration: int) -> list[str]:
    return sorted(p for row in rows(folder, name, world) for p in row["prompts"].get(str(iteration), []))


@pytest.mark.slow
@pytest.mark.parametrize(("world", "strategy", "saved"), LOADS)
def test_a_run_saved_on_two_ranks_goes_on_with(world: int, strategy: str, saved: str, runs: Path) -> None:
    name = name_of(world, strategy, saved)
    before = torch.load(runs / f"{saved}.final.pt", weights_only=True)
    after = torch.load(runs / f"{name}.restored.pt", weights_only=True)
    assert after["counters"] == before["counters"]
    assert before["counters"][:2] == [2, 4]
    for part in ("weights", "optimizer"):
        torch.testing.assert_close(after[part], before[part], rtol=0, atol=0)
    assert len(before["optimizer"]) > 4
    trained = torch.load(runs / f"{name}.final.pt", weights_only=True)
    assert trained["counters"][:2] == [3, 6]
    assert any(not torch.equal(trained["weights"][n], value) for n, value in before["weights"].items())


@pytest.mark.slow
def test_every_number_of_ranks_draws_the_same_prompts(runs: Path) -> None:
    third = [prompts_of(runs, name_of(*load), load[0], 2) for load in LOADS]
    assert all(drawn == third[0] for drawn in third)
    whole_pass = [prompts_of(runs, "ddp", 2, 0), prompts_of(runs, "ddp", 2, 1), third[0]]
    assert all(len(drawn) == PER_ITERATION for drawn in whole_pass)
    assert len({prompt for drawn in whole_pass for prompt in drawn}) == 12


@pytest.mark.slow
def test_adapters_exported_from_every_load_are_one(runs: Path) -> None:
    tokens = torch.arange(3, 40).unsqueeze(0)
    logits = {}
    for saved in SAVED:
        loads = [name_of(*load) for load in LOADS if load[2] == saved]
        files = [runs / f"{name}.restored.ckpt" for name in loads]
        for file in files:
            export(str(file), str(file.with_suffix("")), "peft")
            model = PeftModel.from_pretrained(load_language_model(TINY), str(file.with_suffix(""))).eval()
            with torch.no_grad():
                logits[file.name] = model(tokens).logits
            assert torch.equal(logits[file.name], logits[files[0].name])
    with torch.no_grad():
        assert not torch.equal(logits[files[0].name], load_language_model(TINY)(tokens).logits)


@pytest.mark.slow
def test_fsdp2_shares_parameters_and_moments_among_the_ranks(runs: Path) -> None:
    whole = rows(runs, name_of(1, "auto", "ddp"), 1)[0]
    two = rows(runs, "fsdp2", 2)
    four = rows(runs, name_of(4, "fsdp2", "fsdp2"), 4)
    copies = rows(runs, "ddp", 2)
    for what in ("parameters", "moments"):
        assert all(row[what] == whole[what] for row in copies)
        for ranks in (two, four):
            # A row that is not divisible lies on one rank: value head, norms.
            assert sum(row[what] for row in ranks) == whole[what]
            assert all(row[what] == pytest.approx(whole[what] / len(ranks), rel=0.02) for row in ranks)


@pytest.mark.slow
def test_zero1_shares_the_moments_and_trains_as_adamw_does(runs: Path) -> None:
    plain, shared = (torch.load(runs / f"{name}.final.pt", weights_only=True) for name in ("ddp", "zero1"))
    for part in ("weights", "optimizer"):
        torch.testing.assert_close(shared[part], plain[part], rtol=0, atol=0)
    whole, halves = rows(runs, "ddp", 2)[0]["moments"], [row["moments"] for row in rows(runs, "zero1", 2)]
    assert sum(halves) == whole
    assert halves[0] == pytest.approx(whole / 2, rel=0.1)


def test_another_number_of_responses_is_refused_with_the_number_that_fits(tmp_path: Path, prompts: PromptData) -> None:
    make_trainer(tmp_path, 1).fit(make_ppo(), prompts)
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    (state,) = (value for name, value in content["callbacks"].items() if name.startswith("RolloutBuffer"))
    assert (state["rollout_size"], state["ranks"], state["step_size"]) == (8, 1, 4)
    state["ranks"] = 2
    torch.save(content, tmp_path / "of_two_ranks.ckpt")
    with pytest.raises(ValueError, match=r"16 responses per iteration .* Set rollout_size to 16"):
        make_trainer(tmp_path, 2).fit(make_ppo(), prompts, ckpt_path=str(tmp_path / "of_two_ranks.ckpt"))
    state.update(ranks=2, rollout_size=4, step_size=16)
    torch.save(content, tmp_path / "same_prompts.ckpt")
    with pytest.warns(UserWarning, match="4 responses per optimizer step, where the checkpoint's run took 16"):
        make_trainer(tmp_path, 2).fit(make_ppo(), prompts, ckpt_path=str(tmp_path / "same_prompts.ckpt"))
