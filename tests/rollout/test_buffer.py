"""The rollout buffer: laziness, coverage, seeds, prompts."""

from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from helpers import make_ppo, make_trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from lit_rlhf import AdaptiveKL, Experience, InstructionData, PromptData, RolloutBuffer
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


def test_an_iteration_draws_one_prompt_for_all_its_responses() -> None:
    buffer = RolloutBuffer(6, 3, 1, seed=1, samples_per_prompt=3)
    buffer.setup(TypedTrainer(world_size=1, datamodule=SimpleNamespace(num_prompts=4, prompt_batch=list)), None, "fit")  # type: ignore[arg-type]
    drawn = [buffer.prompt_indices(iteration) for iteration in range(4)]
    assert [len(indices) for indices in drawn] == [2] * 4
    assert sorted(drawn[0] + drawn[1]) == sorted(drawn[2] + drawn[3]) == [0, 1, 2, 3]


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


# ---- on a trainer of typed numbers ----------------------------------------------------------------------------------

LENGTHS = [3, 1, 6, 2, 5, 1, 4, 2]


class TypedTrainer(SimpleNamespace):
    """One of two ranks (unless told otherwise), whose other rank's minibatches have the tokens of ``elsewhere``."""

    def __init__(self, elsewhere: list[float] | None = None, **settings: Any) -> None:
        defaults: dict[str, Any] = {
            "world_size": 2, "global_rank": 0, "current_epoch": 0, "accumulate_grad_batches": 1, "in_context": False,
            "checkpoint_callbacks": [], "optimizers": [], "state": SimpleNamespace(fn=TrainerFn.FITTING),
            "datamodule": SimpleNamespace(num_prompts=32, prompt_batch=list),
        }  # fmt: skip
        super().__init__(**{**defaults, **settings})

        def reduce(tensor: torch.Tensor, reduce_op: str) -> torch.Tensor:
            assert reduce_op == "mean"
            return tensor if elsewhere is None else (tensor + torch.tensor(elsewhere)) / 2

        @contextmanager
        def forward_context() -> Any:
            self.in_context = True
            yield
            self.in_context = False

        self.strategy = SimpleNamespace(reduce=reduce, batch_to_device=lambda batch: batch)
        self.precision_plugin = SimpleNamespace(forward_context=forward_context)


class TypedModule:
    """Samples eight responses of typed lengths, and keeps what it saw."""

    def __init__(self, trainer: TypedTrainer, count: int = 8) -> None:
        self._trainer, self.count = trainer, count
        self.prompts: list[int] = []
        self.drawn, self.in_context = 0.0, False

    def rollout(self, prompts: list[int]) -> tuple[Experience, list[dict[str, Any]]]:
        self.prompts, self.drawn, self.in_context = prompts, float(torch.rand(())), self._trainer.in_context
        rows = experience(self.count)
        mask = torch.arange(6) < torch.tensor(LENGTHS[: self.count])[:, None]
        tokens = rows.tokens[:, :1].repeat(1, 8)
        return Experience(tokens, torch.cat([rows.mask, mask], dim=1), mask, mask[:, -1]), []


def an_iteration(buffer: RolloutBuffer, trainer: TypedTrainer, count: int = 8) -> tuple[TypedModule, list[Experience]]:
    module: Any = TypedModule(trainer, count)
    buffer.setup(trainer, module, "fit")  # type: ignore[arg-type]
    buffer.on_train_epoch_start(trainer, module)  # type: ignore[arg-type]
    return module, list(buffer)


def rows_of(batch: Experience) -> list[int]:
    return batch.tokens[:, -1].tolist()


@pytest.mark.parametrize("by_length", [False, True])
def test_a_minibatch_carries_the_tokens_of_its_step_averaged_over_ranks_and_minibatches(by_length: bool) -> None:
    elsewhere = [10.0, 3.0, 7.0, 5.0]
    buffer = RolloutBuffer(8, 2, inner_epochs=1, seed=0, group_by_length=by_length)
    _, batches = an_iteration(buffer, TypedTrainer(elsewhere, accumulate_grad_batches=2))
    own = [sum(LENGTHS[row] for row in rows_of(batch)) for batch in batches]
    both = [(here + there) / 2 for here, there in zip(own, elsewhere, strict=True)]
    steps = [(both[0] + both[1]) / 2] * 2 + [(both[2] + both[3]) / 2] * 2
    assert [float(batch.count) for batch in batches] == steps  # type: ignore[arg-type]


def test_minibatches_by_length_are_the_same_in_every_inner_epoch_and_no_wider_than_they_must_be() -> None:
    _, batches = an_iteration(RolloutBuffer(8, 2, 3, seed=0, group_by_length=True), TypedTrainer())
    groups = [sorted(rows_of(batch)) for batch in batches]
    assert len(groups) == 12
    # By length: 1 1 | 2 2 | 3 4 | 5 6.
    wanted = [[0, 6], [1, 5], [2, 4], [3, 7]]
    assert [sorted(groups[i : i + 4]) for i in (0, 4, 8)] == [wanted] * 3
    assert len({tuple(map(tuple, groups[i : i + 4])) for i in (0, 4, 8)}) > 1
    assert {batch.mask.shape[1] for batch in batches} == {1, 2, 4, 6}
    _, plain = an_iteration(RolloutBuffer(8, 2, 3, seed=0), TypedTrainer())
    assert {batch.mask.shape[1] for batch in plain} == {6}


def test_a_rollout_of_one_minibatch_is_handed_out_as_it_is() -> None:
    buffer = RolloutBuffer(8, 8, 1, seed=0)
    _, (batch,) = an_iteration(buffer, TypedTrainer())
    assert buffer.experience is not None
    assert batch.tokens is buffer.experience.tokens  # so that the pass that scored it is known again


def test_every_iteration_and_rank_has_a_stream_of_its_own_whatever_was_drawn_before() -> None:
    def run(iteration: int, rank: int, seed: int = 1) -> tuple[float, list[list[int]]]:
        torch.rand(iteration + rank)
        trainer = TypedTrainer(current_epoch=iteration, global_rank=rank)
        module, batches = an_iteration(RolloutBuffer(8, 4, 1, seed=seed), trainer)
        assert module.in_context  # old log-probs come from the arithmetic of training
        return module.drawn, [rows_of(batch) for batch in batches]

    first = run(0, 0)
    assert run(0, 0) == first
    for other in (run(1, 0), run(0, 1), run(0, 0, seed=2)):
        assert other[0] != first[0]
        assert other[1] != first[1]


def test_a_seed_that_is_not_given_is_that_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "41")
    assert RolloutBuffer(8, 4, 1, seed=None).seed == 41
    assert RolloutBuffer(8, 4, 1, seed=5).seed == 5
    monkeypatch.delenv("PL_GLOBAL_SEED")
    assert RolloutBuffer(8, 4, 1, seed=None).seed == 0


def test_a_rollout_of_another_size_than_was_planned_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="the rollout holds 6 samples, but the epoch was planned for 8"):
        an_iteration(RolloutBuffer(8, 4, 1, seed=0), TypedTrainer(), count=6)


def test_after_an_iteration_neither_the_rollout_nor_gradients_are_kept() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    trainer, buffer = TypedTrainer(optimizers=[torch.optim.SGD([parameter], lr=1.0)]), RolloutBuffer(8, 4, 1, seed=0)
    module, _ = an_iteration(buffer, trainer)
    buffer.on_train_epoch_end(trainer, module)  # type: ignore[arg-type]
    assert buffer.experience is None
    assert parameter.grad is None


@pytest.mark.parametrize(
    ("buffer", "trainer", "message"),
    [
        ((8, 4, 1), {"world_size": 5}, "on 5 rank(s) needs at least 40 training prompts; the data has 32"),
        ((8, 4, 1), {"accumulate_grad_batches": 3}, "accumulate_grad_batches 3 must divide the 2 minibatches"),
        ((8, 4, 0), {}, "inner_epochs must be positive"),
        ((8, 0, 1), {}, "minibatch_size must be positive"),
        ((9, 4, 1), {}, "rollout_size 9 must be a multiple of minibatch_size 4"),
        ((8, 4, 1), {"checkpoint_callbacks": [ModelCheckpoint(every_n_train_steps=3)]}, "by train steps or by time"),
        (
            (8, 4, 1),
            {"checkpoint_callbacks": [ModelCheckpoint(train_time_interval=timedelta(hours=1))]},
            "by train steps or by time",
        ),
        (
            (8, 4, 1),
            {"checkpoint_callbacks": [ModelCheckpoint(save_on_train_epoch_end=False)]},
            "needs save_on_train_epoch_end: true",
        ),
    ],
)
def test_what_does_not_fit_the_trainer_is_named(
    buffer: tuple[int, int, int], trainer: dict[str, Any], message: str
) -> None:
    module: Any = TypedModule(TypedTrainer(**trainer))
    (problem,) = RolloutBuffer(*buffer, seed=0).problems(module)
    assert message in problem
    fits: Any = TypedModule(TypedTrainer(world_size=4))
    assert RolloutBuffer(8, 4, 1, seed=0).problems(fits) == []


def test_checkpoints_are_made_at_the_ends_of_iterations_unless_told_otherwise() -> None:
    keeper: Any = ModelCheckpoint()
    RolloutBuffer(8, 4, 1, seed=0).setup(TypedTrainer(checkpoint_callbacks=[keeper]), None, "fit")  # type: ignore[arg-type]
    assert keeper._save_on_train_epoch_end is True


def saved(buffer: RolloutBuffer, **trainer: Any) -> tuple[RolloutBuffer, TypedTrainer]:
    ready = TypedTrainer(**{"world_size": 1, **trainer})
    buffer.setup(ready, None, "fit")  # type: ignore[arg-type]
    return buffer, ready


def test_a_resumed_buffer_draws_the_prompts_of_the_seed_it_began_with() -> None:
    first, _ = saved(RolloutBuffer(8, 4, 1, seed=3))
    resumed, _ = saved(RolloutBuffer(8, 4, 1, seed=99))
    assert resumed.prompt_indices(5) != first.prompt_indices(5)
    resumed.load_state_dict(first.state_dict())
    assert resumed.seed == 3
    assert [resumed.prompt_indices(i) for i in range(9)] == [first.prompt_indices(i) for i in range(9)]


@pytest.mark.parametrize(
    ("settings", "prompts", "message"),
    [
        ({"samples_per_prompt": 2}, 32, "samples_per_prompt was 1 and is now 2"),
        ({}, 31, "prompts_in_data was 32 and is now 31"),
        ({"rollout_size": 4}, 32, "rollout_size was 8 and is now 4"),
    ],
)
def test_a_buffer_that_would_draw_other_prompts_is_not_resumed(
    settings: dict[str, int], prompts: int, message: str
) -> None:
    first, _ = saved(RolloutBuffer(8, 4, 1, seed=3))
    data = SimpleNamespace(num_prompts=prompts, prompt_batch=list)
    now = {"rollout_size": 8, "minibatch_size": 4, "inner_epochs": 1, "seed": 3, **settings}
    resumed, _ = saved(RolloutBuffer(**now), datamodule=data)
    with pytest.raises(ValueError, match=f"cannot resume: {message}"):
        resumed.load_state_dict(first.state_dict())


def test_ranks_and_accumulation_count_in_the_size_of_a_step() -> None:
    first, _ = saved(RolloutBuffer(8, 2, 1, seed=3), accumulate_grad_batches=4)
    assert first.state_dict()["step_size"] == 8
    fits, _ = saved(RolloutBuffer(4, 1, 1, seed=3), world_size=2, accumulate_grad_batches=4)
    fits.load_state_dict(first.state_dict())
    other, _ = saved(RolloutBuffer(4, 1, 1, seed=3), world_size=2, accumulate_grad_batches=2)
    with pytest.warns(UserWarning, match="with 4 responses per optimizer step, where the checkpoint's run took 8"):
        other.load_state_dict(first.state_dict())
    assert other.seed == 3


def test_controllers_go_on_where_the_checkpoint_left_them() -> None:
    before, after = (make_ppo(kl=AdaptiveKL(0.3), reward_scaling="running") for _ in range(2))
    before.kl.update(60.0, 1000)
    scores = torch.tensor([1.0, 5.0, 2.0])
    before.reward_scaler.update(scores, torch.Tensor.clone)
    buffer, checkpoint = RolloutBuffer(8, 4, 1, seed=0), {}
    buffer.on_save_checkpoint(None, before, checkpoint)  # type: ignore[arg-type]
    buffer.on_load_checkpoint(None, after, checkpoint)  # type: ignore[arg-type]
    assert after.kl.value == pytest.approx(0.3 * 1.02)
    more = torch.tensor([-3.0, 0.0, 8.0])
    after.reward_scaler.update(more, torch.Tensor.clone)
    torch.testing.assert_close(after.reward_scaler(more), more / torch.cat([scores, more]).std())
