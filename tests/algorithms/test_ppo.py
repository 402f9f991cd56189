"""PPO: its invariants (arXiv:1707.06347), its options, and that it learns."""

import csv
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import OPENINGS, adamw, count_e, make_ppo, make_trainer, write_jsonl
from torch import Tensor

from lit_rlhf import (
    PPO,
    AdaptiveKL,
    Experience,
    FixedKL,
    FunctionReward,
    LoraArgs,
    PromptData,
    Sampling,
)
from lit_rlhf.evaluation import mean_ci95


class Spy(L.Callback):
    """Keeps what the first minibatch of each iteration sees."""

    def __init__(self) -> None:
        self.ratios: list[Tensor] = []
        self.experiences: list[Experience] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Experience, batch_idx: int) -> None:
        if batch_idx:
            return
        self.experiences.append(module.rollout_buffer.experience)
        with torch.no_grad():
            read = module.backbone(("actor",), batch.tokens, batch.attention_mask, batch.mask)
        self.ratios.append((read["actor"] - batch.log_probs).exp()[batch.mask])


def fit(module: PPO, prompts: PromptData, folder: Path, epochs: int = 2, **kwargs: Any) -> L.Trainer:
    trainer = make_trainer(folder, epochs, **kwargs)
    trainer.fit(module, prompts)
    return trainer


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("layout", ["full", "lora", "dynamic_lora", "pe", "j_hydra", "hydra"])
def test_ratio_is_one_at_the_first_minibatch_and_kl_zero_before_the_first_update(
    layout: str, keep: bool, hydra_checkpoint: Path, lora_reward_checkpoint: Path, prompts: PromptData, tmp_path: Path
) -> None:
    reward = str(lora_reward_checkpoint) if layout == "pe" else None
    stages = {"policy_checkpoint": str(hydra_checkpoint), "reward_checkpoint": reward}
    module = make_ppo(layout=layout, keep_log_probs=keep, **stages)
    spy = Spy()
    trainer = make_trainer(tmp_path, 2)
    trainer.callbacks.append(spy)
    trainer.fit(module, prompts)
    first, second = spy.experiences
    for ratios in spy.ratios:
        torch.testing.assert_close(ratios, torch.ones_like(ratios), atol=1e-5, rtol=0)
    if keep:  # decoded token by token: equal to rounding
        torch.testing.assert_close(first.log_probs, first.ref_log_probs, atol=2e-5, rtol=0)
    else:
        assert torch.equal(first.log_probs, first.ref_log_probs)
    assert not torch.allclose(second.log_probs, second.ref_log_probs, atol=1e-4)


def test_the_critic_starts_from_the_reward_head(hydra_checkpoint: Path, prompts: PromptData, tmp_path: Path) -> None:
    module, spy = make_ppo(policy_checkpoint=str(hydra_checkpoint)), Spy()
    trainer = make_trainer(tmp_path, 1)
    trainer.callbacks.append(spy)
    module.configure_model()
    value, reward = module.backbone.heads["value"], module.backbone.heads["reward"]
    assert torch.equal(value.weight, reward.weight)
    assert reward.weight.abs().sum() > 0
    trainer.fit(module, prompts)
    assert not torch.equal(value.weight, reward.weight)


def test_without_a_reward_artifact_the_values_start_at_zero(prompts: PromptData, tmp_path: Path) -> None:
    module = make_ppo()
    module.configure_model()
    tokens = torch.ones(2, 6, dtype=torch.long)
    read = module.backbone(("critic",), tokens, tokens.bool(), torch.ones(2, 3, dtype=torch.bool))
    assert torch.equal(read["critic"], torch.zeros(2, 3))


def test_advantages_are_white_and_returns_come_from_raw_ones(prompts: PromptData, tmp_path: Path) -> None:
    module, spy = make_ppo(kl=FixedKL(0.1)), Spy()
    trainer = make_trainer(tmp_path, 2)
    trainer.callbacks.append(spy)
    trainer.fit(module, prompts)
    for e in spy.experiences:
        kept = e.advantages[e.mask].double()
        assert abs(float(kept.mean())) < 1e-5
        assert float(kept.var()) == pytest.approx(1.0, abs=1e-4)
        slow = _slow_returns(e, kl_coef=0.1, gamma=1.0, lam=0.95)
        torch.testing.assert_close(e.returns.double(), slow, rtol=1e-4, atol=1e-5)


def _slow_returns(e: Experience, kl_coef: float, gamma: float, lam: float) -> Tensor:
    """GAE by a plain loop in float64 from the record's own fields."""
    out = torch.zeros(e.mask.shape, dtype=torch.float64)
    for row in range(len(e)):
        length = int(e.mask[row].sum())
        advantage, next_value = 0.0, 0.0
        for t in reversed(range(length)):
            reward = -kl_coef * float(e.log_probs[row, t] - e.ref_log_probs[row, t])
            if t == length - 1:
                reward += float(e.scores[row])
            value = float(e.values[row, t])
            advantage = reward + gamma * next_value - value + gamma * lam * advantage
            next_value = value
            out[row, t] = advantage + value
    return out


def test_score_clip_missing_eos_penalty_and_scaling(prompts: PromptData) -> None:
    module = make_ppo(score_clip=0.5, missing_eos_penalty=2.0)
    bare = torch.zeros(3, 2, dtype=torch.long)
    experience = Experience(bare, bare.bool(), bare.bool(), torch.tensor([False, True, False]))
    experience.scores = torch.tensor([3.0, 0.2, -9.0])
    torch.testing.assert_close(module.shaped_scores(experience), torch.tensor([0.5, -1.8, -0.5]))
    batch = make_ppo(reward_scaling="batch")
    batch.reward_scaler.update(experience.scores, batch.all_reduce_sum)
    whitened = batch.shaped_scores(experience)
    assert float(whitened.mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(whitened.var()) == pytest.approx(1.0, abs=1e-5)
    running = make_ppo(reward_scaling="running")
    for _ in range(2):
        running.reward_scaler.update(experience.scores, running.all_reduce_sum)
    again = running.shaped_scores(experience)
    joined = torch.cat([experience.scores, experience.scores])
    torch.testing.assert_close(again, experience.scores / joined.std(), rtol=1e-5, atol=1e-6)


def test_critic_warm_up_leaves_the_actor_alone(prompts: PromptData, tmp_path: Path) -> None:
    # Weight decay would move the actor even with zero gradients.
    settings: dict[str, Any] = {
        "optimizer": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.5),
        "critic_warmup_iterations": 2,
    }
    module = make_ppo(**settings)
    module.configure_model()
    start = {n: p.detach().clone() for n, p in module.backbone.role_parameters("actor").items()}
    critic = {n: p.detach().clone() for n, p in module.backbone.role_parameters("critic").items()}
    fit(module, prompts, tmp_path, epochs=2)
    assert all(torch.equal(p, start[n]) for n, p in module.backbone.role_parameters("actor").items())
    assert any(not torch.equal(p, critic[n]) for n, p in module.backbone.role_parameters("critic").items())
    longer = make_ppo(**settings)
    fit(longer, prompts, tmp_path, epochs=3)
    assert any(not torch.equal(p, start[n]) for n, p in longer.backbone.role_parameters("actor").items())


class CountLosses(PPO):
    """Counts the minibatches that were really trained on."""

    count = 0

    def loss(self, minibatch: Experience) -> Tensor:
        self.count += 1
        return super().loss(minibatch)


def test_a_kl_target_ends_the_iterations_updates_but_not_its_validation(prompts: PromptData, tmp_path: Path) -> None:
    counts, moved = [], []
    for target in (100.0, 1e-9):
        module = make_ppo(CountLosses, inner_epochs=4, target_kl=target, optimizer=adamw(1e-2))
        trainer = fit(module, prompts, tmp_path / str(target), epochs=2, limit_val_batches=1)
        counts.append(module.count)
        moved.append(trainer.lightning_module.state_dict())
        assert "val/score" in trainer.callback_metrics
    # The first minibatch of an iteration moves nothing yet (ratio 1); the second exceeds the tiny target.
    assert counts == [2 * 4 * 2, 2 * 2]
    short = make_ppo(CountLosses, inner_epochs=1, optimizer=adamw(1e-2))
    fit(short, prompts, tmp_path / "short", epochs=1)
    once = make_ppo(CountLosses, inner_epochs=4, target_kl=1e-9, optimizer=adamw(1e-2))
    fit(once, prompts, tmp_path / "once", epochs=1)
    # One inner epoch is two minibatches: the skipped ones left no trace, not even Adam's momentum.
    for name, value in short.state_dict().items():
        assert torch.equal(value, once.state_dict()[name])


def test_a_kl_target_without_its_statistic_is_refused(prompts: PromptData, tmp_path: Path) -> None:
    class Silent(PPO):
        def policy_loss(self, log_probs: Tensor, minibatch: Experience) -> tuple[Tensor, dict[str, Tensor]]:
            return super().policy_loss(log_probs, minibatch)[0], {}

    with pytest.raises(
        ValueError, match="target_kl needs the statistic approx_kl of every minibatch, and Silent gives"
    ):
        fit(make_ppo(Silent, target_kl=1.0), prompts, tmp_path)


def test_the_ratio_is_one_under_autocast_too(hydra_checkpoint: Path, prompts: PromptData, tmp_path: Path) -> None:
    spy = Spy()
    trainer = make_trainer(tmp_path, 2, precision="bf16-mixed", accumulate_grad_batches=2)
    trainer.callbacks.append(spy)
    # Both minibatches belong to one step, so that the policy is still the one that sampled.
    trainer.fit(make_ppo(policy_checkpoint=str(hydra_checkpoint), inner_epochs=1), prompts)
    for experience in spy.experiences:
        assert experience.values.dtype == torch.float32
    # The spy's own pass runs outside autocast, so compare with what training itself saw.
    ratios = float(trainer.callback_metrics["train/ratio_mean"])
    assert ratios == pytest.approx(1.0, abs=5e-4)


def test_16_bit_weights_by_the_trainer_are_refused(prompts: PromptData, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"32-true with model.dtype: bfloat16"):
        make_trainer(tmp_path, 1, precision="bf16-true").fit(make_ppo(), prompts)


def test_a_bf16_trunk_trains_with_float32_adapters(prompts: PromptData, tmp_path: Path) -> None:
    module, spy = make_ppo(dtype="bfloat16"), Spy()
    trainer = make_trainer(tmp_path, 2)
    trainer.callbacks.append(spy)
    trainer.fit(module, prompts)
    for ratios in spy.ratios:
        torch.testing.assert_close(ratios, torch.ones_like(ratios), atol=1e-3, rtol=0)
    trained = {p.dtype for p in module.backbone.parameters() if p.requires_grad}
    frozen = {p.dtype for p in module.backbone.trunks.parameters() if not p.requires_grad}
    assert trained == {torch.float32}
    assert frozen == {torch.bfloat16}
    moments = [state["exp_avg"].dtype for state in trainer.optimizers[0].state.values()]
    assert set(moments) == {torch.float32}


def test_the_progress_bar_gets_the_key_numbers_and_gradients_are_freed(prompts: PromptData, tmp_path: Path) -> None:
    trainer = fit(make_ppo(), prompts, tmp_path)
    assert {"rollout/score", "rollout/kl", "train/value_loss"} <= set(trainer.progress_bar_metrics)
    assert all(p.grad is None for p in trainer.lightning_module.parameters())


def test_the_entropy_bonus_raises_entropy(prompts: PromptData, tmp_path: Path) -> None:
    entropies = []
    for name, coefficient in (("without", 0.0), ("with", 5.0)):
        module = make_ppo(entropy_coef=coefficient, optimizer=adamw(1e-2), inner_epochs=4, value_coef=0.0)
        trainer = fit(module, prompts, tmp_path / name, epochs=6)
        entropies.append(float(trainer.callback_metrics["rollout/entropy"]))
    assert entropies[1] > entropies[0]


def test_critic_lr_reaches_the_critics_own_group(hydra_checkpoint: Path) -> None:
    module = make_ppo(critic_lr=0.5, policy_checkpoint=str(hydra_checkpoint))
    module.configure_model()
    actor, critic = module.configure_optimizers().param_groups
    assert (actor["lr"], critic["lr"]) == (1e-3, 0.5)
    listed = {id(p) for group in (actor, critic) for p in group["params"]}
    assert listed == {id(p) for p in module.backbone.parameters() if p.requires_grad}
    assert len(actor["params"]) == 28
    assert len(critic["params"]) == 30


def test_the_adaptive_controller_is_fed_the_kl_per_response(prompts: PromptData, tmp_path: Path) -> None:
    kl = AdaptiveKL(0.1, target=5.0, horizon=80.0)
    trainer = fit(make_ppo(kl=kl), prompts, tmp_path, epochs=1)
    # The first iteration's KL is 0, so the proportional error is clipped at -0.2.
    assert float(trainer.callback_metrics["rollout/kl"]) == pytest.approx(0.0, abs=1e-4)
    assert kl.value == pytest.approx(0.1 * (1 - 0.2 * 8 / 80))


def test_gradient_checkpointing_trains_to_the_same_weights(
    hydra_checkpoint: Path, prompts: PromptData, tmp_path: Path
) -> None:
    states = []
    for checkpointing in (False, True):
        module = make_ppo(policy_checkpoint=str(hydra_checkpoint), gradient_checkpointing=checkpointing)
        states.append(fit(module, prompts, tmp_path / str(checkpointing)).lightning_module.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-4, atol=1e-6)


def test_every_problem_is_reported_together_before_weights_load() -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        PPO(
            model="no/such-model", optimizer=adamw(), rollout_size=10, minibatch_size=4, gamma=1.5, clip=-0.1,
            samples_per_prompt=3, sampling=Sampling(temperature=0.0),
        ).check_settings()  # fmt: skip
    message = str(error.value)
    for part in ("minibatch_size 4", "samples_per_prompt 3", "gamma", "clip", "sampling.temperature"):
        assert part in message


def test_hydra_needs_its_artifact_before_any_model_loads() -> None:
    module = PPO(model="no/such-model", optimizer=adamw(), layout="hydra")
    with pytest.raises(ValueError, match=r"reward role needs a trained reward head.*policy_checkpoint"):
        module.configure_model()


@pytest.mark.parametrize(
    "layout", ["hydra", *(pytest.param(name, marks=pytest.mark.slow) for name in ("full", "dynamic_lora", "j_hydra"))]
)
def test_it_learns_over_five_seeds(layout: str, varied_checkpoint: Path, tmp_path: Path) -> None:
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": text} for text in OPENINGS] * 4)
    gains = []
    for seed in range(5):
        module = make_ppo(
            layout=layout, policy_checkpoint=str(varied_checkpoint), lora=LoraArgs(r=8), rollout_size=32,
            minibatch_size=32, sampling=Sampling(max_new_tokens=12, min_new_tokens=12), kl=FixedKL(0.0), seed=seed,
            reward=FunctionReward(count_e), reward_scaling="running",
            optimizer=adamw(1e-3 if layout == "full" else 1e-2),
        )  # fmt: skip
        trainer = make_trainer(tmp_path / str(seed), 20)
        trainer.fit(module, PromptData(train=prompts, validation_size=0))
        with (tmp_path / str(seed) / "metrics.csv").open() as file:
            scores = [float(row["rollout/score"]) for row in csv.DictReader(file) if row["rollout/score"]]
        gains.append(sum(scores[-5:]) / 5 - sum(scores[:5]) / 5)
    low, _ = mean_ci95(gains).ci95
    assert low > 0.1, gains
