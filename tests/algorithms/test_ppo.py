"""PPO: the invariants of METHODS, its options, and that it learns."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import TINY, adamw, count_e, make_ppo, make_trainer
from torch import Tensor

from lit_rlhf import PPO, AdaptiveKL, Experience, FixedKL, FunctionReward, LoraArgs, PromptData, Sampling


class Spy(L.Callback):
    """Keeps what the first minibatch of each iteration sees."""

    def __init__(self) -> None:
        self.ratios: list[Tensor] = []
        self.kls: list[float] = []
        self.experiences: list[Experience] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Experience, batch_idx: int) -> None:
        if batch_idx:
            return
        self.experiences.append(module.rollout_buffer.experience)
        with torch.no_grad():
            read = module.backbone(("actor",), batch.tokens, batch.attention_mask, batch.mask)
        self.ratios.append((read["actor"] - batch.log_probs).exp()[batch.mask])
        self.kls.append(float(trainer.callback_metrics.get("rollout/kl", torch.tensor(0.0))))


def fit(module: PPO, prompts: PromptData, folder: Path, epochs: int = 2, **kwargs: Any) -> L.Trainer:
    trainer = make_trainer(folder, epochs, **kwargs)
    trainer.fit(module, prompts)
    return trainer


@pytest.mark.parametrize("layout", ["full", "lora", "dynamic_lora", "j_hydra", "hydra"])
def test_ratio_is_one_at_the_first_minibatch_and_kl_zero_before_the_first_update(
    layout: str, hydra_checkpoint: Path, prompts: PromptData, tmp_path: Path
) -> None:
    module, spy = make_ppo(layout=layout, policy_checkpoint=str(hydra_checkpoint)), Spy()
    trainer = make_trainer(tmp_path, 2)
    trainer.callbacks.append(spy)
    trainer.fit(module, prompts)
    first, second = spy.experiences
    for ratios in spy.ratios:
        torch.testing.assert_close(ratios, torch.ones_like(ratios), atol=1e-5, rtol=0)
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


def test_without_a_reward_artefact_the_values_start_at_zero(prompts: PromptData, tmp_path: Path) -> None:
    module = make_ppo()
    module.configure_model()
    tokens = torch.ones(2, 6, dtype=torch.long)
    read = module.backbone(("critic",), tokens, tokens.bool(), torch.ones(2, 3, dtype=torch.bool))
    assert torch.equal(read["critic"], torch.zeros(2, 3))


def test_frozen_roles_stay_bit_exact_and_trained_ones_move(
    hydra_checkpoint: Path, prompts: PromptData, tmp_path: Path
) -> None:
    module = make_ppo(policy_checkpoint=str(hydra_checkpoint))
    module.configure_model()
    tokens = torch.randint(3, 900, (3, 10), generator=torch.Generator().manual_seed(0))
    args = (tokens, torch.ones_like(tokens).bool(), torch.ones(3, 4, dtype=torch.bool))
    roles = ("actor", "critic", "reference", "reward")
    with torch.no_grad():
        before = module.backbone(roles, *args)
        fit(module, prompts, tmp_path, epochs=6)
        after = module.backbone(roles, *args)
    for role in ("reference", "reward"):
        assert torch.equal(before[role], after[role])
    for role in ("actor", "critic"):
        assert (before[role] - after[role]).abs().max() > 1e-4


def test_what_stands_in_padding_changes_no_loss_and_no_gradient(
    hydra_checkpoint: Path, prompts: PromptData, tmp_path: Path
) -> None:
    module, spy = make_ppo(policy_checkpoint=str(hydra_checkpoint)), Spy()
    trainer = make_trainer(tmp_path, 1)
    trainer.callbacks.append(spy)
    trainer.fit(module, prompts)
    clean = spy.experiences[0]
    clean.mask[:4, 5:] = False
    clean.attention_mask[:4, -3:] = False
    junk = clean[:]
    junk.tokens = torch.where(clean.attention_mask, clean.tokens, 5)
    responses = ~clean.mask
    for name in ("log_probs", "advantages", "values", "returns"):
        setattr(junk, name, getattr(clean, name).masked_fill(responses, 1e6))
    results = []
    for experience in (clean, junk):
        module.zero_grad()
        module._trainer = None
        module.log_dict = module.log = lambda *a, **k: None  # type: ignore[method-assign, assignment]
        loss = module.loss(experience)
        loss.backward()
        grads = {n: p.grad.clone() for n, p in module.backbone.named_parameters() if p.grad is not None}
        results.append((loss.detach(), grads))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=1e-7)
    assert len(results[0][1]) == len(module.backbone.trainable_names)
    for name, grad in results[0][1].items():
        torch.testing.assert_close(grad, results[1][1][name], rtol=1e-5, atol=1e-7)


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
    whitened = make_ppo(reward_scaling="batch").shaped_scores(experience)
    assert float(whitened.mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(whitened.var()) == pytest.approx(1.0, abs=1e-5)
    running = make_ppo(reward_scaling="running")
    running.shaped_scores(experience)
    again = running.shaped_scores(experience)
    joined = torch.cat([experience.scores, experience.scores])
    torch.testing.assert_close(again, experience.scores / joined.std(), rtol=1e-5, atol=1e-6)


def test_critic_warm_up_leaves_the_actor_alone(prompts: PromptData, tmp_path: Path) -> None:
    # Weight decay would move the actor even with zero gradients.
    optimizer = lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.5)  # noqa: E731
    module = PPO(
        TINY, optimizer, lora=LoraArgs(r=4), reward=FunctionReward(count_e), sampling=Sampling(max_new_tokens=8),
        rollout_size=8, minibatch_size=4, critic_warmup_iterations=2,
    )  # fmt: skip
    module.configure_model()
    start = {n: p.detach().clone() for n, p in module.backbone.role_parameters("actor").items()}
    critic = {n: p.detach().clone() for n, p in module.backbone.role_parameters("critic").items()}
    fit(module, prompts, tmp_path, epochs=2)
    assert all(torch.equal(p, start[n]) for n, p in module.backbone.role_parameters("actor").items())
    assert any(not torch.equal(p, critic[n]) for n, p in module.backbone.role_parameters("critic").items())
    longer = PPO(
        TINY, optimizer, lora=LoraArgs(r=4), reward=FunctionReward(count_e), sampling=Sampling(max_new_tokens=8),
        rollout_size=8, minibatch_size=4, critic_warmup_iterations=2,
    )  # fmt: skip
    fit(longer, prompts, tmp_path, epochs=3)
    assert any(not torch.equal(p, start[n]) for n, p in longer.backbone.role_parameters("actor").items())


def test_a_kl_target_ends_the_iterations_updates_early(prompts: PromptData, tmp_path: Path) -> None:
    patient = fit(make_ppo(inner_epochs=4, target_kl=100.0), prompts, tmp_path, epochs=2)
    assert patient.global_step == 2 * 4 * 2
    # Below any real movement: the first minibatch moves nothing (ratio 1), the second exceeds the target.
    hasty = fit(make_ppo(inner_epochs=4, target_kl=1e-9), prompts, tmp_path, epochs=2)
    assert 2 <= hasty.global_step <= 4
    assert hasty.current_epoch == 2


def test_entropy_bonus_changes_the_gradient(prompts: PromptData, tmp_path: Path) -> None:
    plain = fit(make_ppo(), prompts, tmp_path / "a", epochs=1)
    bonus = fit(make_ppo(entropy_coef=1.0), prompts, tmp_path / "b", epochs=1)
    first, second = plain.lightning_module.state_dict(), bonus.lightning_module.state_dict()
    assert any(not torch.equal(first[name], second[name]) for name in first)


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
    assert float(trainer.callback_metrics["rollout/kl"]) == 0.0
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
            "no/such-model", adamw(), layout="hydra2", rollout_size=10, minibatch_size=4, gamma=1.5,
            clip=-0.1, sampling=Sampling(temperature=0.0),
        )  # fmt: skip
    message = str(error.value)
    for part in ("layout", "rollout_size 10", "minibatch_size 4", "gamma", "clip", "sampling.temperature"):
        assert part in message


def test_hydra_needs_its_artefact_before_any_model_loads() -> None:
    module = PPO("no/such-model", adamw(), layout="hydra")
    with pytest.raises(ValueError, match=r"reward role needs a trained reward head.*policy_checkpoint"):
        module.configure_model()


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["full", "hydra", "j_hydra"])
def test_it_learns_a_simple_reward_over_seeds(layout: str, prompts: PromptData, tmp_path: Path) -> None:
    gains = []
    for seed in range(5):
        module = PPO(
            TINY, adamw(1e-2 if layout != "full" else 3e-3), layout=layout, lora=LoraArgs(r=8),
            reward=FunctionReward(count_e), sampling=Sampling(max_new_tokens=12, min_new_tokens=12), rollout_size=8,
            minibatch_size=8, inner_epochs=2, kl=FixedKL(0.0), reward_scaling="running", seed=seed,
        )  # fmt: skip
        scores: list[float] = []

        class Keep(L.Callback):
            def on_train_epoch_end(self, trainer: Any, pl_module: Any, scores: list[float] = scores) -> None:
                scores.append(float(trainer.callback_metrics["rollout/score"]))

        trainer = make_trainer(tmp_path, 60)
        trainer.callbacks.append(Keep())
        trainer.fit(module, prompts)
        gains.append(sum(scores[-10:]) / 10 - sum(scores[:10]) / 10)
    mean = sum(gains) / len(gains)
    spread = (sum((g - mean) ** 2 for g in gains) / (len(gains) - 1)) ** 0.5
    # Student's t for 4 degrees of freedom.
    assert mean - 2.776 * spread / len(gains) ** 0.5 > 0, gains
