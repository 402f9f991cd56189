"""Optimizer state outside the accelerator: what moves, what stays, and that nothing is learnt differently."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import LAYOUTS, make_ppo, make_trainer

from lit_rlhf import PromptData
from lit_rlhf.callbacks import OffloadOptimizerState
from lit_rlhf.callbacks.offload import move_state


def test_moments_move_and_step_counts_stay() -> None:
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    move_state(optimizer, torch.device("meta"))
    for state in optimizer.state.values():
        assert {name: value.device.type for name, value in state.items()} == {
            "step": "cpu", "exp_avg": "meta", "exp_avg_sq": "meta",
        }  # fmt: skip


def test_a_shared_optimizers_own_part_moves() -> None:
    layer = torch.nn.Linear(3, 2)

    class Shared(torch.optim.SGD):  # as ZeroRedundancyOptimizer
        optim = torch.optim.AdamW(layer.parameters())

    layer(torch.ones(1, 3)).sum().backward()
    optimizer = Shared(layer.parameters(), lr=1.0)
    optimizer.optim.step()
    move_state(optimizer, torch.device("meta"))
    assert all(state["exp_avg"].device.type == "meta" for state in optimizer.optim.state.values())


def test_on_a_cpu_it_says_that_it_does_nothing(hydra_checkpoint: Path, prompts: PromptData, tmp_path: Path) -> None:
    module = make_ppo(policy_checkpoint=str(hydra_checkpoint))
    trainer = make_trainer(tmp_path, 1)
    trainer.callbacks.append(OffloadOptimizerState())
    with pytest.warns(UserWarning, match="has no effect on a CPU"):
        trainer.fit(module, prompts)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name in ("full", "hydra")])
def test_training_is_bit_equal_with_and_without(
    layout: str, hydra_checkpoint: Path, full_reward_checkpoint: Path, prompts: PromptData, tmp_path: Path
) -> None:
    reward = {"reward_checkpoint": str(full_reward_checkpoint)} if layout == "full" else {}
    ends = []

    class Where(OffloadOptimizerState):
        def __init__(self, works: bool) -> None:
            self.works, self.seen = works, set()

        def on_phase_start(self, trainer: Any, pl_module: Any, phase: str) -> None:
            if self.works:
                super().on_phase_start(trainer, pl_module, phase)
            for optimizer in trainer.optimizers:
                self.seen |= {(phase, s["exp_avg"].device.type) for s in optimizer.state.values()}

    for works in (False, True):
        module = make_ppo(layout=layout, policy_checkpoint=str(hydra_checkpoint), **reward)
        trainer, where = make_trainer(tmp_path / str(works), 3, accelerator="gpu"), Where(works)
        trainer.callbacks.append(where)
        trainer.fit(module, prompts)
        ends.append({name: value.cpu() for name, value in module.state_dict().items()})
        assert ("training", "cuda") in where.seen
        assert (("generation", "cpu") in where.seen) == works
    assert all(torch.equal(ends[0][name], value) for name, value in ends[1].items())
