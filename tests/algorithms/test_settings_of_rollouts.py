"""Every setting of the rollouts and of training in what is asked and logged; which settings are refused."""

import csv
import json
import math
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import make_trainer
from torch import Tensor
from typed_numbers import (
    NOW,
    OLD,
    PROMPTS,
    REFERENCE,
    SCORES,
    Rows,
    a_minibatch,
    an_experience,
    assert_rows,
    in_training,
    kl_of,
    make,
)

from lit_rlhf import (
    GRPO,
    PPO,
    RLOO,
    AdaptiveKL,
    Experience,
    FixedKL,
    LoraArgs,
    OnPolicyModule,
    PromptData,
    Reinforce,
    ReinforcePlusPlus,
    ReMax,
    Reward,
    Sampling,
)
from lit_rlhf.errors import NonFiniteError
from lit_rlhf.rollout import Scored


@pytest.mark.parametrize(
    ("kind", "settings", "asked"),
    [
        (PPO, {}, {"samples": 1, "greedy": False, "batch_size": 4, "keep_log_probs": True}),
        (PPO, {"rollout_batch_size": 3}, {"samples": 1, "greedy": False, "batch_size": 3, "keep_log_probs": True}),
        (PPO, {"dtype": "bfloat16"}, {"samples": 1, "greedy": False, "batch_size": 4, "keep_log_probs": False}),
        (PPO, {"quantization": "nf4"}, {"samples": 1, "greedy": False, "batch_size": 4, "keep_log_probs": False}),
        (PPO, {"keep_log_probs": False}, {"samples": 1, "greedy": False, "batch_size": 4, "keep_log_probs": False}),
        (
            PPO,
            {"dtype": "bfloat16", "keep_log_probs": True},
            {"samples": 1, "greedy": False, "batch_size": 4, "keep_log_probs": True},
        ),
        (RLOO, {}, {"samples": 4, "greedy": False, "batch_size": 4, "keep_log_probs": True}),
        (GRPO, {"samples_per_prompt": 2}, {"samples": 2, "greedy": False, "batch_size": 4, "keep_log_probs": True}),
        (ReMax, {"samples_per_prompt": 2}, {"samples": 2, "greedy": True, "batch_size": 4, "keep_log_probs": True}),
    ],
)
def test_what_the_engine_is_asked(kind: type[OnPolicyModule], settings: dict[str, Any], asked: dict[str, Any]) -> None:
    module, _ = in_training(kind, **settings)
    module.sample(PROMPTS)
    (options,) = module.collector.engine.asked
    assert options == {**asked, "in_step": False}


@pytest.mark.parametrize(
    ("settings", "read", "recorded"),
    [
        ({}, [4], 1),  # the loss's own pass
        ({"minibatch_size": 2}, [4], 0),
        ({"inner_epochs": 2}, [4], 0),
        ({"rollout_batch_size": 3}, [3, 1], 0),
        ({"minibatch_size": 2, "group_by_length": True}, [2, 2], 0),
    ],
)
def test_how_many_responses_a_pass_reads(settings: dict[str, Any], read: list[int], recorded: int) -> None:
    module, _ = in_training(RLOO, keep_log_probs=False, samples_per_prompt=2, **settings)
    e, _ = module.rollout(PROMPTS)
    assert module.backbone.recorded == recorded
    assert module.backbone.read[-len(read) :] == read
    assert_rows(e.log_probs, NOW)
    assert_rows(e.ref_log_probs, REFERENCE)


@pytest.mark.parametrize(("keep", "old"), [(True, OLD), (False, NOW)])
def test_the_kl_that_is_logged_is_that_of_the_sampling_policy(keep: bool, old: Rows) -> None:
    module, logged = in_training(PPO, kl=FixedKL(0.1), kl_estimator="k3", keep_log_probs=keep)
    module.rollout(PROMPTS)
    pairs = [list(zip(*rows, strict=True)) for rows in zip(old, REFERENCE, strict=True)]
    k1 = fmean(sum(kl_of("k1", p, q) for p, q in row) for row in pairs)
    assert logged["rollout/kl"] == pytest.approx(k1, rel=1e-4)
    assert logged["rollout/kl_penalty"] == pytest.approx(fmean(sum(kl_of("k3", *pq) for pq in row) for row in pairs))
    assert logged["rollout/kl_coef"] == 0.1


def test_the_adaptive_controller_is_fed_the_measured_kl_per_response() -> None:
    """With an error of a tenth, which is not clipped, so that the number itself counts."""
    k1 = fmean(sum(p - q for p, q in zip(*rows, strict=True)) for rows in zip(OLD, REFERENCE, strict=True))
    assert k1 > 0
    kl = AdaptiveKL(0.1, target=k1 / 1.1, horizon=100.0)
    module, _ = in_training(PPO, kl=kl, kl_estimator="k2")
    module.rollout(PROMPTS)
    assert kl.value == pytest.approx(0.1 * (1 + 0.1 * 4 / 100), rel=1e-5)


@pytest.mark.parametrize(("mode", "message"), [("raise", "not finite: reward"), ("skip_step", None)])
def test_a_rollout_that_is_not_finite(mode: str, message: str | None) -> None:
    module, _ = in_training(RLOO, on_non_finite=mode, reward=NanReward(), kl=AdaptiveKL(0.1), reward_scaling="running")
    if message is not None:
        with pytest.raises(NonFiniteError, match=message):
            module.rollout(PROMPTS)
        return
    with pytest.warns(UserWarning, match="optimizer steps are skipped"):
        e, _ = module.rollout(PROMPTS)
    assert e.left_out
    assert (module.kl.value, module.reward_scaler.state_dict()["total"]) == (0.1, [0.0, 0.0, 0.0])


class NanReward(Reward):
    def score(self, batch: Scored) -> Tensor:
        return torch.tensor([1.0, math.nan, 2.0, 3.0])


@pytest.mark.parametrize(("step", "prefix"), [("validation_step", "val"), ("test_step", "test")])
def test_held_out_prompts_are_logged_under_their_own_name(step: str, prefix: str) -> None:
    module, logged = in_training(PPO)
    getattr(module, step)(PROMPTS, 0)
    assert logged[f"{prefix}/score"] == pytest.approx(fmean(SCORES))
    assert all(name.startswith(f"{prefix}/") for name in logged)
    assert module.collector.engine.asked[0]["samples"] == 1


def test_predictions_are_sampled_responses_beside_their_prompts() -> None:
    module, _ = in_training(RLOO)
    rows = module.predict_step(PROMPTS, 0)
    (options,) = module.collector.engine.asked
    assert (options["samples"], options["greedy"]) == (1, False)
    assert [row["prompt"] for row in rows] == PROMPTS["prompts"]
    assert [row["response"] for row in rows] == an_experience().decode(module.tokenizer)


# ---- a minibatch in training ---------------------------------------------------------------------------------------


def test_what_a_minibatch_logs_is_averaged_over_ranks() -> None:
    module, logged = in_training(PPO)
    b = a_minibatch()
    module.training_step(b, 0)
    alone, stats = dict(logged), dict(module.minibatch_stats)
    assert {"train/loss", "train/policy_loss", "train/value_loss", "train/approx_kl"} <= set(alone)
    assert alone["train/clip_fraction"] == pytest.approx(float(stats["clip_fraction"]))
    module._trainer.world_size = 2
    # The other rank's numbers are larger by 1.
    module._trainer.strategy.reduce = lambda tensor, reduce_op: tensor + {"mean": 0.5}[reduce_op]
    module.training_step(b, 0)
    assert logged == pytest.approx({name: value + 0.5 for name, value in alone.items()}, abs=1e-6)


def test_a_minibatch_that_is_left_out_reads_nothing_and_logs_nothing() -> None:
    module, logged = in_training(PPO)
    zero = torch.zeros((), requires_grad=True)
    module.backbone.zero_loss = lambda: zero
    module.skip_minibatches = True
    assert module.training_step(a_minibatch(), 0) is zero
    assert (module.backbone.read, logged) == ([], {})


# ---- what is refused -----------------------------------------------------------------------------------------------

SHORT = AdaptiveKL(0.1, horizon=2.0)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (PPO, {"gamma": 1.1}, "gamma must be in"),
        (PPO, {"gae_lambda": -0.1}, "gae_lambda must be in"),
        (PPO, {"clip": 0.0}, "clip must be positive"),
        (PPO, {"target_kl": 0.0}, "target_kl must be positive"),
        (PPO, {"value_clip": 0.0}, "value_clip must be positive"),
        (PPO, {"critic_lr": 0.0}, "critic_lr must be positive"),
        (PPO, {"value_coef": -0.1}, "value_coef must be at least 0"),
        (PPO, {"entropy_coef": -0.1}, "entropy_coef must be at least 0"),
        (PPO, {"critic_warmup_iterations": -1}, "critic_warmup_iterations must be at least 0"),
        (Reinforce, {"gamma": -0.1}, "gamma must be in"),
        (ReMax, {"gamma": 1.1}, "gamma must be in"),
        (RLOO, {"clip": 0.0}, "clip must be positive"),
        (ReinforcePlusPlus, {"clip": -1.0}, "clip must be positive"),
        (GRPO, {"samples_per_prompt": 1}, "samples_per_prompt must be at least 2 for GRPO"),
        (PPO, {"score_clip": 0.0}, "score_clip must be positive"),
        (PPO, {"rollout_batch_size": 0}, "rollout_batch_size must be positive"),
        (PPO, {"kl": SHORT, "rollout_size": 12}, "kl.horizon 2 must be above a fifth of an iteration's 12"),
        (PPO, {"sampling": Sampling(top_p=0.0)}, "sampling.top_p"),
        (PPO, {"keep_log_probs": True, "engine": SimpleNamespace(gives_log_probs=False)}, "returns no log-probs"),
        (
            PPO,
            {"compile_layers": True, "engine": SimpleNamespace(gives_log_probs=True, compile=True)},
            "compile_layers and engine.compile cannot be combined",
        ),
    ],
)
def test_a_setting_out_of_range_is_named(kind: type[OnPolicyModule], settings: dict[str, Any], message: str) -> None:
    (problem,) = [problem for problem in make(kind, **settings).problems() if message in problem]
    assert problem


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (PPO, {"value_clip": None, "target_kl": None, "critic_lr": None, "gamma": 0.0, "gae_lambda": 0.0}),
        (PPO, {"value_coef": 0.0, "entropy_coef": 0.0, "value_gradient": 0.0, "score_clip": None}),
        (PPO, {"compile_layers": True, "kl": SHORT, "rollout_size": 8}),
        (PPO, {"layout": "full", "lora": LoraArgs(ranks={"critic": 2})}),  # which has no adapters, and needs none
        (ReMax, {"advantage_clip": None, "gamma": 1.0, "samples_per_prompt": 1}),
        (RLOO, {"samples_per_prompt": 2}),
        (GRPO, {"samples_per_prompt": 2, "kl_estimator": "k2"}),
    ],
)
def test_a_setting_at_the_edge_of_its_range_is_taken(kind: type[OnPolicyModule], settings: dict[str, Any]) -> None:
    assert make(kind, **settings).problems() == []


def test_the_length_of_an_iteration_is_that_of_all_ranks() -> None:
    module = make(PPO, kl=AdaptiveKL(0.1, horizon=1.5))
    assert module.problems() == []
    strategy = SimpleNamespace(state=SimpleNamespace(fn=None), world_size=2, precision="32-true")
    module._trainer = strategy
    assert module.problems() == ["kl.horizon 1.5 must be above a fifth of an iteration's 8 responses"]


# ---- whole runs ----------------------------------------------------------------------------------------------------


class KeepsLosses(RLOO):
    """Keeps each minibatch's loss and the learning rate that it is trained with."""

    def training_step(self, batch: Experience, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        rate = self.optimizers().param_groups[0]["lr"]
        self.seen = [*getattr(self, "seen", []), (self.current_epoch, float(loss), rate)]
        return loss


def test_a_schedule_moves_once_an_iteration_and_losses_are_logged_as_its_mean(
    prompts: PromptData, tmp_path: Path
) -> None:
    def halved(optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)

    settings = {"rollout_size": 8, "minibatch_size": 4, "inner_epochs": 2, "samples_per_prompt": 2, "log_samples": 3}
    module = make(KeepsLosses, lr_scheduler=halved, **settings)
    make_trainer(tmp_path, 2).fit(module, prompts)
    assert [rate for _, _, rate in module.seen] == [1e-3] * 4 + [5e-4] * 4
    with (tmp_path / "metrics.csv").open() as file:
        logged = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    by_iteration = [[loss for epoch, loss, _ in module.seen if epoch == iteration] for iteration in (0, 1)]
    assert logged == pytest.approx([fmean(losses) for losses in by_iteration], rel=1e-4, abs=1e-7)
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [sample["iteration"] for sample in samples] == [0] * 3 + [1] * 3


def test_responses_that_the_model_has_no_positions_for_are_refused(prompts: PromptData, tmp_path: Path) -> None:
    """The tiny model has a context of 512 tokens; every prompt has several."""
    with pytest.raises(ValueError, match="context is 512 tokens"):
        make_trainer(tmp_path, 1).fit(make(PPO, sampling=Sampling(max_new_tokens=510)), prompts)
