"""The rollout buffer: laziness, coverage, seeds, prompts."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from helpers import make_ppo, make_trainer

from lit_rlhf import Experience, InstructionData, PromptData, RolloutBuffer
from lit_rlhf.rollout.buffer import iteration_seed


def experience(count: int) -> Experience:
    column = torch.arange(count)[:, None].repeat(1, 2)
    flags = torch.ones(count, 2, dtype=torch.bool)
    return Experience(column, flags, flags, flags[:, 0])


def test_every_sample_comes_once_per_inner_epoch_in_a_new_order() -> None:
    buffer = RolloutBuffer(8, 4, inner_epochs=3, seed=0)
    assert len(buffer) == 6
    iterator = iter(buffer)  # Lightning calls iter before the rollout hook
    buffer.experience = experience(8)
    buffer._counts = torch.ones(6)
    batches = [batch.tokens[:, 0].tolist() for batch in iterator]
    assert [len(batch) for batch in batches] == [4] * 6
    epochs = [batches[i] + batches[i + 1] for i in (0, 2, 4)]
    assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_an_empty_buffer_says_so() -> None:
    with pytest.raises(RuntimeError, match="rollout buffer is empty"):
        next(iter(RolloutBuffer(8, 4, 1, seed=0)))


def test_seeds_differ_by_run_iteration_and_rank() -> None:
    seeds = {iteration_seed(s, i, r) for s in range(5) for i in range(50) for r in range(4)}
    assert len(seeds) == 5 * 50 * 4


@pytest.mark.parametrize("world", [1, 2])
def test_prompts_cover_the_data_before_any_comes_again_and_ranks_are_disjoint(world: int) -> None:
    drawn: list[list[int]] = []
    for rank in range(world):
        buffer = RolloutBuffer(3, 3, 1, seed=1)
        data = SimpleNamespace(num_prompts=12, prompt_batch=None)
        trainer = SimpleNamespace(
            datamodule=data, world_size=world, global_rank=rank, checkpoint_callbacks=[], current_epoch=0,
            accumulate_grad_batches=1,
        )  # fmt: skip
        buffer.setup(trainer, None, "fit")  # type: ignore[arg-type]
        drawn.append([i for iteration in range(12 // (3 * world)) for i in buffer.prompt_indices(iteration)])
        assert buffer.prompt_indices(0) != buffer.prompt_indices(12 // (3 * world))
    assert sorted(i for indices in drawn for i in indices) == list(range(12))


def test_too_few_prompts_and_the_wrong_data_are_clear_errors(data_folder: Path, tmp_path: Path) -> None:
    prompts = PromptData(train=str(data_folder / "prompts.jsonl"), validation_size=0)
    with pytest.raises(
        ValueError,
        match=r"rollout_size 16 with 1 response\(s\) per prompt on 1 rank\(s\) needs at least 16 training prompts.* 12",
    ):
        make_trainer(tmp_path).fit(make_ppo(rollout_size=16), prompts)
    other = InstructionData(train=str(data_folder / "pairs.jsonl"), validation_size=0)
    with pytest.raises(ValueError, match="PPO needs a PromptData"):
        make_trainer(tmp_path).fit(make_ppo(), other)


def test_rollouts_differ_between_iterations_and_repeat_between_runs(prompts: PromptData, tmp_path: Path) -> None:
    class Keep(L.Callback):
        def __init__(self) -> None:
            self.tokens: list[torch.Tensor] = []

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0:
                self.tokens.append(module.rollout_buffer.experience.tokens)

    runs = []
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        torch.manual_seed(len(runs))  # the surrounding RNG must not matter
        keep = Keep()
        trainer = make_trainer(tmp_path / name, 2)
        trainer.callbacks.append(keep)
        trainer.fit(make_ppo(seed=seed), prompts)
        runs.append(keep.tokens)
    first, again, other = runs
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert first[0].shape != first[1].shape or not torch.equal(first[0], first[1])
    assert first[0].shape != other[0].shape or not torch.equal(first[0], other[0])
