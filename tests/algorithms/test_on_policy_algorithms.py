"""What every on-policy algorithm must hold in every layout: passes, tensors, estimates and losses by the formula."""

import csv
import math
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import LAYOUTS, OPENINGS, adamw, count_e, make_ppo, make_trainer, silence, write_jsonl
from torch import Tensor

from lit_rlhf import (
    GRPO,
    PPO,
    RLOO,
    Experience,
    FixedKL,
    FunctionReward,
    LoraArgs,
    OnPolicyModule,
    PromptData,
    Reinforce,
    ReinforcePlusPlus,
    ReMax,
    Sampling,
)
from lit_rlhf.backbone.reuse import PassKey, RecordedPass
from lit_rlhf.evaluation import mean_ci95
from lit_rlhf.functional import clipped_policy_loss, policy_gradient_loss

CRITIC_FREE = [ReMax, RLOO, GRPO, ReinforcePlusPlus]
ALL = [PPO, Reinforce, *CRITIC_FREE]
# Roles that share trunk and adapter share one forward pass over a rollout.
PASSES = {"full": 4, "lora": 4, "dynamic_lora": 4, "pe": 4, "j_hydra": 2, "hydra": 3}
PASSES_WITHOUT_CRITIC = {"full": 3, "lora": 3, "dynamic_lora": 3, "pe": 3, "j_hydra": 2, "hydra": 2}
# Trunks and adapters in memory without a critic.
TENSORS_WITHOUT_CRITIC = {
    "full": (3, 0), "lora": (3, 1), "dynamic_lora": (2, 1), "pe": (1, 2), "j_hydra": (1, 1), "hydra": (1, 1),
}  # fmt: skip


class Record(L.Callback):
    """Keeps each iteration's experience, its greedy responses, and every trunk pass with its rows."""

    def __init__(self) -> None:
        self.experiences: list[Experience] = []
        self.greedy: list[Experience | None] = []
        self.rollout_passes: list[Counter[tuple[str, str | None, int]]] = []
        self.first_batches: list[Experience] = []
        self._passes: Counter[tuple[str, str | None, int]] = Counter()

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        hidden, estimate = module.backbone._hidden, module.estimate

        def counted(trunk: str, adapter: str | None, tokens: Tensor, mask: Tensor) -> Tensor:
            self._passes[(trunk, adapter, len(tokens))] += 1
            return hidden(trunk, adapter, tokens, mask)

        def kept(experience: Experience) -> None:
            self.greedy.append(getattr(experience, "greedy", None))
            self.rollout_passes.append(Counter(self._passes))
            estimate(experience)

        module.backbone._hidden, module.estimate = counted, kept

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Experience, batch_idx: int) -> None:
        if batch_idx == 0:
            self.experiences.append(module.rollout_buffer.experience)
            self.first_batches.append(batch)

    def on_train_batch_end(self, *args: Any) -> None:
        self._passes.clear()


def make(kind: type[OnPolicyModule], **kwargs: Any) -> Any:
    return make_ppo(kind, **{"inner_epochs": 1, **kwargs})  # type: ignore[type-var]


def fit(module: OnPolicyModule, prompts: PromptData, folder: Path, epochs: int = 2) -> Record:
    trainer, record = make_trainer(folder, epochs), Record()
    trainer.callbacks.append(record)
    trainer.fit(module, prompts)
    return record


@pytest.fixture
def artifacts(
    hydra_checkpoint: Path, lora_reward_checkpoint: Path, full_reward_checkpoint: Path
) -> dict[str, dict[str, str]]:
    """Checkpoints that each layout starts from."""
    hydra = {"policy_checkpoint": str(hydra_checkpoint)}
    two = {**hydra, "reward_checkpoint": str(full_reward_checkpoint)}
    return {
        "full": two, "lora": two, "dynamic_lora": two,
        "pe": {**hydra, "reward_checkpoint": str(lora_reward_checkpoint)}, "j_hydra": hydra, "hydra": hydra,
    }  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("keep", [False, True])
def test_passes_and_tensors_are_those_of_the_layout(
    keep: bool, kind: type[OnPolicyModule], layout: str, artifacts: dict[str, Any], prompts: PromptData, tmp_path: Path
) -> None:
    module = make(kind, layout=layout, keep_log_probs=keep, **artifacts[layout])
    record = fit(module, prompts, tmp_path, epochs=1)
    passes, greedy = record.rollout_passes[0], 8 if kind is ReMax else 0
    expected = dict(PASSES if kind in (PPO, Reinforce) else PASSES_WITHOUT_CRITIC)
    if keep and not (layout == "j_hydra" and kind in (PPO, Reinforce)):
        expected[layout] -= 1  # the actor's, unless the critic reads it too
    # ReMax rates its greedy responses in one more pass, of the reward role alone.
    assert sum(passes.values()) == expected[layout] + (kind is ReMax)
    assert sum(rows * n for (_, _, rows), n in passes.items()) == 8 * expected[layout] + greedy
    assert {rows for _, _, rows in passes} == {8}

    backbone = module.backbone
    state = [id(p) for group in module.optimizers().param_groups for p in group["params"]]
    assert len(state) == len(set(state)) == len(backbone.trainable_names)
    if kind in CRITIC_FREE:
        sets = {name for trunk in backbone.trunks for name in backbone.layout.adapters(trunk)}
        assert (len(backbone.trunks), len(sets)) == TENSORS_WITHOUT_CRITIC[layout]
        assert not any("value" in name or "critic" in name for name, _ in backbone.named_parameters())
        assert not hasattr(record.experiences[0], "values")
        assert not hasattr(record.experiences[0], "returns")
    else:
        assert "value" in backbone.heads


def test_the_greedy_response_costs_no_language_head_work(
    hydra_checkpoint: Path, prompts: PromptData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    positions: list[int] = []
    from lit_rlhf.backbone import backbone as room

    whole = room.masked_log_probs

    def counted(*args: Any) -> Any:
        positions.append(int(args[4].sum()))
        return whole(*args)

    monkeypatch.setattr(room, "masked_log_probs", counted)
    module = make(ReMax, policy_checkpoint=str(hydra_checkpoint), keep_log_probs=False)
    record = fit(module, prompts, tmp_path, epochs=1)
    real = int(record.experiences[0].mask.sum())
    assert positions[:2] == [real, real]  # old and reference log-probs of the sampled responses, nothing else
    assert sum(positions[2:]) == real  # the training pass
    greedy = record.greedy[0]
    assert greedy is not None
    assert not hasattr(greedy, "log_probs")
    assert not hasattr(record.experiences[0], "greedy")  # not kept through training


def test_remax_greedy_responses_are_greedy_and_rated(prompts: PromptData, tmp_path: Path) -> None:
    module = make(ReMax)
    record = fit(module, prompts, tmp_path, epochs=1)
    sampled, greedy = record.experiences[0], record.greedy[0]
    assert greedy is not None
    width = greedy.tokens.shape[1] - greedy.mask.shape[1]
    fresh = make(ReMax)  # the policy before its first update
    fresh.configure_model()
    alone = fresh.generate(
        {"tokens": greedy.tokens[:, :width], "attention_mask": greedy.attention_mask[:, :width]}, 0, greedy=True
    )
    texts = greedy.decode(module.tokenizer)
    assert texts == alone.decode(module.tokenizer)
    assert greedy.scores.tolist() == pytest.approx(count_e([], texts))
    assert texts != sampled.decode(module.tokenizer)


# ---- estimates by the formula, in float64, from the record's own fields --------------------------------------------


def rows_of(e: Experience) -> list[tuple[int, int, list[float]]]:
    """Return (row, length, token log-ratios) of each response."""
    ratios = (e.require("log_probs").double() - e.require("ref_log_probs").double()).tolist()
    return [(row, int(n), ratios[row]) for row, n in enumerate(e.mask.sum(dim=1))]


def remax_by_hand(e: Experience, greedy: list[float], beta: float) -> list[list[float]]:
    out = []
    for row, length, kl in rows_of(e):
        gain = min(max(float(e.require("scores")[row]) - greedy[row], -5.0), 5.0)
        out.append([0.99 ** (length - t + 1) * gain - beta * kl[t - 1] for t in range(1, length + 1)])
    return out


def rloo_by_hand(e: Experience, k: int, beta: float) -> list[list[float]]:
    rewards = [float(e.require("scores")[row]) - beta * sum(kl[:n]) for row, n, kl in rows_of(e)]
    out = []
    for row, length, _ in rows_of(e):
        start = row - row % k
        others = [rewards[j] for j in range(start, start + k) if j != row]
        out.append([rewards[row] - sum(others) / (k - 1)] * length)
    return out


def grpo_by_hand(e: Experience, k: int) -> list[list[float]]:
    scores, out = e.require("scores").double().tolist(), []
    for row, length, _ in rows_of(e):
        start = row - row % k
        group = scores[start : start + k]
        mean = sum(group) / k
        deviation = math.sqrt(sum((x - mean) ** 2 for x in group) / (k - 1))
        out.append([(scores[row] - mean) / (deviation + 1e-4)] * length)
    return out


def to_go_by_hand(e: Experience, beta: float) -> list[list[float]]:
    out = []
    for row, length, kl in rows_of(e):
        rewards = [-beta * kl[t] + (float(e.require("scores")[row]) if t == length - 1 else 0) for t in range(length)]
        out.append([sum(rewards[t:]) for t in range(length)])
    return out


def whitened(rows: list[list[float]]) -> list[list[float]]:
    flat = [x for row in rows for x in row]
    mean = sum(flat) / len(flat)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in flat) / (len(flat) - 1))
    return [[(x - mean) / deviation for x in row] for row in rows]


def assert_advantages(e: Experience, expected: list[list[float]]) -> None:
    advantages = e.require("advantages")
    for row, values in enumerate(expected):
        assert advantages[row, : len(values)].tolist() == pytest.approx(values, rel=1e-3, abs=1e-5)
        assert (advantages[row, len(values) :] == 0).all()


@pytest.mark.parametrize("kind", [ReMax, RLOO, GRPO, ReinforcePlusPlus, Reinforce])
def test_advantages_by_the_formula(kind: type[OnPolicyModule], prompts: PromptData, tmp_path: Path) -> None:
    module = make(kind, kl=FixedKL(0.3), optimizer=adamw(3e-2))
    record = fit(module, prompts, tmp_path, epochs=3)
    e, greedy = record.experiences[-1], record.greedy[-1]
    assert e.require("log_probs").ne(e.require("ref_log_probs")).any()  # the penalty is not zero any more
    if kind is ReMax:
        assert greedy is not None
        assert_advantages(e, remax_by_hand(e, greedy.require("scores").tolist(), 0.3))
    elif kind is RLOO:
        assert_advantages(e, rloo_by_hand(e, 4, 0.3))
    elif kind is GRPO:
        assert_advantages(e, grpo_by_hand(e, 4))
    elif kind is ReinforcePlusPlus:
        assert_advantages(e, whitened(to_go_by_hand(e, 0.3)))
    else:
        values, returns = e.require("values").tolist(), to_go_by_hand(e, 0.3)
        assert_advantages(e, [[g - v for g, v in zip(row, values[i], strict=False)] for i, row in enumerate(returns)])
        for row, expected in enumerate(returns):
            assert e.require("returns")[row, : len(expected)].tolist() == pytest.approx(expected, rel=1e-3, abs=1e-5)


def loud(prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
    """Scores so far apart that ReMax's clamp at 5 shows."""
    return [float(sum(map(ord, response)) % 41) for response in responses]


@pytest.mark.parametrize("copies", [1, 2])
def test_remax_clamps_and_pairs_each_sample_with_its_own_prompts_greedy_response(
    copies: int, prompts: PromptData, tmp_path: Path
) -> None:
    module = make(ReMax, kl=FixedKL(0.3), reward=FunctionReward(loud), samples_per_prompt=copies, seed=2)
    record = fit(module, prompts, tmp_path, epochs=2)
    e, greedy = record.experiences[-1], record.greedy[-1]
    assert greedy is not None
    assert len(greedy) * copies == len(e)
    baseline = [score for score in greedy.require("scores").tolist() for _ in range(copies)]
    gains = [a - b for a, b in zip(e.require("scores").tolist(), baseline, strict=True)]
    assert max(map(abs, gains)) > 5
    assert len(set(baseline)) > 1
    assert_advantages(e, remax_by_hand(e, baseline, 0.3))


def test_several_updates_without_a_ratio_are_warned_of(prompts: PromptData, tmp_path: Path) -> None:
    module = make(ReMax, minibatch_size=2)
    with pytest.warns(UserWarning, match="only the first of an iteration's 4 updates is on-policy.* to 4"):
        make_trainer(tmp_path, 1).fit(module, prompts)


def test_an_accumulation_that_leaves_a_rest_is_refused(prompts: PromptData, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="accumulate_grad_batches 3 must divide the 2 minibatches"):
        make_trainer(tmp_path, 1, accumulate_grad_batches=3).fit(make(PPO), prompts)


def test_a_loss_scaler_keeps_one_graph(prompts: PromptData, tmp_path: Path) -> None:
    """Float16's gradients would vanish before the trainer's scale reaches them."""
    module = make(PPO)
    fit(module, prompts, tmp_path, epochs=1)
    assert len(module.loss_passes()) == 2
    module.trainer.strategy.precision_plugin.scaler = object()
    assert len(module.loss_passes()) == 1


def test_scores_are_clipped_after_they_are_scaled() -> None:
    module = make(PPO, reward_scaling="running", score_clip=0.5)
    bare = torch.zeros(3, 2, dtype=torch.long)
    e = Experience(
        bare, bare.bool(), bare.bool(), torch.zeros(3, dtype=torch.bool), scores=torch.tensor([30.0, 3, -90])
    )
    module.reward_scaler.update(e.require("scores"), module.all_reduce_sum)
    scaled = e.require("scores") / e.require("scores").std()
    assert float(scaled.min()) < -0.5 < float(scaled[1]) < 0.5
    torch.testing.assert_close(module.shaped_scores(e), scaled.clamp(-0.5, 0.5))


def test_remax_options(prompts: PromptData, tmp_path: Path) -> None:
    """KL summed to go, no clamp, gamma 1, which is how verl interprets the paper."""
    options = {"kl_to_go": True, "advantage_clip": None, "gamma": 1.0}
    module = make(ReMax, kl=FixedKL(0.3), optimizer=adamw(3e-2), **options)
    record = fit(module, prompts, tmp_path, epochs=2)
    e, greedy = record.experiences[-1], record.greedy[-1]
    assert greedy is not None
    scores, base = e.require("scores").tolist(), greedy.require("scores").tolist()
    assert_advantages(e, [[scores[r] - base[r] - 0.3 * sum(kl[t:n]) for t in range(n)] for r, n, kl in rows_of(e)])


# ---- losses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL)
def test_the_policy_gradient_at_the_first_minibatch(
    kind: type[OnPolicyModule], hydra_checkpoint: Path, prompts: PromptData, tmp_path: Path
) -> None:
    """Before an update the ratio is 1, so every policy loss has the gradient of -mean(A log pi) on the actor's set."""
    module = make(kind, policy_checkpoint=str(hydra_checkpoint), optimizer=adamw(0.0))
    b = fit(module, prompts, tmp_path, epochs=1).experiences[0]
    silence(module)
    actor = list(module.backbone.role_parameters("actor").values())
    ours = torch.autograd.grad(module.loss(b), actor)
    log_probs = module.log_probs(b)
    torch.testing.assert_close(log_probs, b.require("log_probs"), rtol=0, atol=1e-5)
    weights = b.require("advantages") * b.mask
    # GRPO takes each response's own mean first.
    weights = weights / (b.mask.sum(dim=1, keepdim=True) * len(b) if kind is GRPO else b.mask.sum())
    plain = torch.autograd.grad(-(weights * log_probs).sum(), actor)
    assert max(float(g.abs().max()) for g in plain) > 1e-4
    for ours_g, plain_g in zip(ours, plain, strict=True):
        torch.testing.assert_close(ours_g, plain_g, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ALL)
def test_what_stands_in_padding_changes_no_loss_and_no_gradient(
    kind: type[OnPolicyModule], hydra_checkpoint: Path, prompts: PromptData, tmp_path: Path
) -> None:
    module = make(kind, policy_checkpoint=str(hydra_checkpoint))
    clean = fit(module, prompts, tmp_path, epochs=1).experiences[0]
    clean.mask[:4, 5:] = False
    clean.attention_mask[:4, -3:] = False
    junk = clean[:]
    junk.tokens = torch.where(clean.attention_mask, clean.tokens, 5)
    for name in ("log_probs", "ref_log_probs", "advantages", "values", "returns"):
        if hasattr(clean, name):
            setattr(junk, name, getattr(clean, name).masked_fill(~clean.mask, 1e6))
    silence(module)
    trained = [p for p in module.backbone.parameters() if p.requires_grad]
    losses = [module.loss(experience) for experience in (clean, junk)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=1e-7)
    for a, b in zip(*(torch.autograd.grad(loss, trained) for loss in losses), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_grpo_penalises_the_kl_in_its_loss(prompts: PromptData, tmp_path: Path) -> None:
    module = make(GRPO, kl=FixedKL(0.7))
    b = fit(module, prompts, tmp_path, epochs=1).experiences[0]
    silence(module)
    b.ref_log_probs = b.require("ref_log_probs") - 0.5 * b.mask
    log_probs = module.log_probs(b).detach().double()
    reference = b.require("ref_log_probs").double()
    k3 = [
        sum(math.exp(-(p - q)) - 1 + (p - q) for p, q in zip(log_probs[r, :n], reference[r, :n], strict=True)) / n
        for r, n, _ in rows_of(b)
    ]
    with_kl = float(module.loss(b))
    module.kl = FixedKL(0.0)
    assert with_kl - float(module.loss(b)) == pytest.approx(0.7 * sum(map(float, k3)) / len(b), rel=1e-4)


@pytest.mark.parametrize("kind", [PPO, Reinforce])
@pytest.mark.parametrize("layout", ["hydra", "full"])
def test_the_critic_differentiated_first_gives_the_gradients_of_the_sum(
    layout: str, kind: type[OnPolicyModule], artifacts: dict[str, Any], prompts: PromptData, tmp_path: Path
) -> None:
    module = make(kind, layout=layout, **artifacts[layout])
    b = fit(module, prompts, tmp_path, epochs=1).experiences[0]
    silence(module)
    trained = {n: p for n, p in module.backbone.named_parameters() if p.requires_grad}
    (3.0 * module.loss(b)).backward()  # scaled, as accumulation does
    ours = {name: p.grad.clone() for name, p in trained.items()}
    read = module.backbone(("actor", "critic"), b.tokens, b.attention_mask, b.mask)
    if kind is PPO:
        policy, _ = clipped_policy_loss(read["actor"], b.require("log_probs"), b.require("advantages"), b.mask, 0.2)
    else:
        policy = policy_gradient_loss(read["actor"], b.require("advantages"), b.mask)
    joint = 3.0 * (policy + module.value_loss(read["critic"], b)[0])
    for (name, got), want in zip(ours.items(), torch.autograd.grad(joint, list(trained.values())), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7, msg=name)


# ---- j_hydra's stability options -----------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.0, 0.25])
def test_the_value_gradient_into_the_shared_set_is_scaled(
    factor: float, hydra_checkpoint: Path, prompts: PromptData, tmp_path: Path
) -> None:
    """Gradient of (policy + f * value) on the shared set; the value head's own stays whole."""
    module = make(PPO, layout="j_hydra", policy_checkpoint=str(hydra_checkpoint), value_coef=1.0, value_clip=None)
    b = fit(module, prompts, tmp_path, epochs=1).experiences[0]
    silence(module)
    shared = list(module.backbone.role_parameters("actor").values())
    head = list(module.backbone.heads["value"].parameters())

    def gradients(value_coef: float, value_gradient: float) -> tuple[list[Tensor], list[Tensor]]:
        module.value_coef, module.value_gradient = value_coef, value_gradient
        both = torch.autograd.grad(module.loss(b), [*shared, *head])
        return list(both[: len(shared)]), list(both[len(shared) :])

    policy, _ = gradients(0.0, 1.0)
    whole, head_whole = gradients(1.0, 1.0)
    scaled, head_scaled = gradients(1.0, factor)
    assert max(float((w - p).abs().max()) for w, p in zip(whole, policy, strict=True)) > 1e-5
    for p, w, s in zip(policy, whole, scaled, strict=True):
        torch.testing.assert_close(s, p + factor * (w - p), rtol=1e-4, atol=1e-7)
    for a, b_ in zip(head_whole, head_scaled, strict=True):
        assert torch.equal(a, b_)


def test_a_critic_with_its_own_set_keeps_its_whole_gradient(
    hydra_checkpoint: Path, prompts: PromptData, tmp_path: Path
) -> None:
    module = make(PPO, policy_checkpoint=str(hydra_checkpoint), value_gradient=0.0)
    b = fit(module, prompts, tmp_path, epochs=1).experiences[0]
    silence(module)
    module.loss(b).backward()
    own = [p for name, p in module.backbone.role_parameters("critic").items() if "lora_B" in name]
    assert max(float(p.grad.abs().max()) for p in own) > 0


def test_balanced_losses_do_not_depend_on_the_scale_of_the_reward(prompts: PromptData, tmp_path: Path) -> None:
    module = make(PPO, balance_losses=True, kl=FixedKL(0.0), value_clip=None)
    b = fit(module, prompts, tmp_path, epochs=1).experiences[0]
    silence(module)
    losses = []
    for factor in (1.0, 100.0):
        module.set_returns(b, b.require("returns") * factor)
        values = b.require("values") * factor
        losses.append(module.value_loss(values, b)[0])
        b.returns = b.require("returns") / factor
    torch.testing.assert_close(losses[0], losses[1])
    returns = b.require("returns")[b.mask].double()
    plain = 0.5 * ((b.require("values")[b.mask].double() - returns) ** 2).mean()
    assert float(losses[0]) == pytest.approx(float(module.value_coef * plain / returns.var()), rel=1e-4)


# ---- what stays, whatever is trained --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        ("hydra", "float32"),
        *(
            pytest.param(layout, dtype, marks=pytest.mark.slow)
            for dtype in ("float32", "bfloat16")
            for layout in LAYOUTS
            if (layout, dtype) != ("hydra", "float32")
        ),
    ],
)
def test_frozen_roles_stay_bit_exact_through_50_updates(
    layout: str, dtype: str, artifacts: dict[str, Any], prompts: PromptData, tmp_path: Path
) -> None:
    settings = {"layout": layout, "dtype": dtype, "minibatch_size": 4, "sampling": Sampling(max_new_tokens=6)}
    module = make(PPO, **settings, **artifacts[layout])
    module.configure_model()
    tokens = torch.randint(3, 900, (3, 10), generator=torch.Generator().manual_seed(0))
    batch = (tokens, torch.ones_like(tokens).bool(), torch.ones(3, 4, dtype=torch.bool))
    roles = ("actor", "critic", "reference", "reward")
    with torch.no_grad():
        before = module.backbone(roles, *batch)
        fit(module, prompts, tmp_path, epochs=25)
        after = module.backbone(roles, *batch)
    assert module.trainer.global_step == 50
    for role in ("reference", "reward"):
        assert torch.equal(before[role], after[role])
    for role in ("actor", "critic"):
        assert (before[role] - after[role]).abs().max() > 1e-4


# ---- errors, learning ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (ReMax, {"inner_epochs": 2}, "inner_epochs must be 1 for ReMax"),
        (Reinforce, {"inner_epochs": 3}, "inner_epochs must be 1 for Reinforce"),
        (ReMax, {"advantage_clip": 0.0}, "advantage_clip must be positive"),
        (RLOO, {"samples_per_prompt": 1}, "samples_per_prompt must be at least 2 for RLOO"),
        (GRPO, {"samples_per_prompt": 3}, "rollout_size 8 must be a multiple of samples_per_prompt 3"),
        (ReinforcePlusPlus, {"gamma": 2.0}, r"gamma must be in \[0, 1\], got 2.0"),
        (PPO, {"value_gradient": -1.0}, "value_gradient must be at least 0"),
        (GRPO, {"clip": 0.0}, "clip must be positive"),
        (GRPO, {"kl_estimator": "k1"}, "k1 has no gradient on average"),
        (PPO, {"rollout_batch_size": 0}, "rollout_batch_size must be positive"),
        (PPO, {"lora": LoraArgs(ranks={"crtic": 2})}, "lora.ranks names 'crtic'"),
    ],
)
def test_settings_out_of_range_are_named(kind: type[OnPolicyModule], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(kind, **settings).check_settings()


@pytest.mark.parametrize(
    "kind", [ReMax, *(pytest.param(k, marks=pytest.mark.slow) for k in (RLOO, GRPO, ReinforcePlusPlus, Reinforce))]
)
def test_it_learns_over_five_seeds(kind: type[OnPolicyModule], varied_checkpoint: Path, tmp_path: Path) -> None:
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": text} for text in OPENINGS] * 4)
    gains = []
    for seed in range(5):
        module = make(
            kind, policy_checkpoint=str(varied_checkpoint), lora=LoraArgs(r=8), rollout_size=32, minibatch_size=32,
            sampling=Sampling(max_new_tokens=12, min_new_tokens=12), kl=FixedKL(0.0), seed=seed,
            reward=FunctionReward(count_e), reward_scaling="running", optimizer=adamw(5e-3),
        )  # fmt: skip
        trainer = make_trainer(tmp_path / str(seed), 20)
        trainer.fit(module, PromptData(train=prompts, validation_size=0))
        with (tmp_path / str(seed) / "metrics.csv").open() as file:
            scores = [float(row["rollout/score"]) for row in csv.DictReader(file) if row["rollout/score"]]
        gains.append(sum(scores[-5:]) / 5 - sum(scores[:5]) / 5)
    low, _ = mean_ci95(gains).ci95
    assert low > 0.0, gains


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("kind", "keep"), [(PPO, True), (PPO, False), (RLOO, False)])
def test_a_rollout_of_one_minibatch_is_not_read_twice_for_the_loss(
    kind: type[OnPolicyModule], keep: bool, layout: str, artifacts: dict[str, Any], prompts: PromptData, tmp_path: Path
) -> None:
    """The pass with the graph serves scoring too: one pass fewer, the same weights."""
    ends, passes = [], []
    for carried in (False, True):
        extra = {"samples_per_prompt": 2} if kind is RLOO else {"entropy_coef": 0.01, "value_gradient": 0.5}
        settings = dict(layout=layout, keep_log_probs=keep, minibatch_size=8, **extra, **artifacts[layout])
        module = make(kind, **settings)
        if not carried:
            module.collector.trained_as_one = False
        record = CountedPasses()
        trainer = make_trainer(tmp_path / str(carried), 2)
        trainer.callbacks.append(record)
        trainer.fit(module, prompts)
        ends.append({name: value.clone() for name, value in module.state_dict().items()})
        passes.append(record.count)
        assert not module.backbone._recorded
    assert passes[0] - passes[1] == 2  # one in each of the two iterations
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_a_recorded_pass_goes_to_its_own_batch_once(hydra_checkpoint: Path) -> None:
    """Other roles, tensors (equal ones included), options or weights get a pass of their own."""
    module = make(PPO, policy_checkpoint=str(hydra_checkpoint))
    module.configure_model()
    backbone = module.backbone
    tokens = torch.randint(3, 900, (4, 6), generator=torch.Generator().manual_seed(0))
    attention, mask = torch.ones_like(tokens).bool(), torch.ones(4, 3, dtype=torch.bool)
    batch, narrow = (tokens, attention, mask), torch.tensor([[True, False, False]]).repeat(4, 1)

    def update() -> None:
        with torch.no_grad():
            next(iter(backbone.role_parameters("actor").values())).add_(0.0)

    others: list[tuple[tuple[str, ...], tuple[Tensor, ...], dict[str, Any], Any]] = [
        (("critic",), batch, {}, None), (("actor",), (tokens[:], attention, mask), {}, None),
        (("actor",), (tokens, attention.clone(), mask), {}, None), (("actor",), (tokens, attention, narrow), {}, None),
        (("actor",), batch, {"entropy": True}, None), (("actor",), batch, {}, update),
    ]  # fmt: skip
    for roles, inputs, options, change in others:
        recorded = backbone.record(("actor",), *batch)
        if change is not None:
            change()
        fresh = backbone(roles, *inputs, **options)
        assert fresh[roles[0]].requires_grad
        if roles == ("actor",):
            torch.testing.assert_close(fresh["actor"], recorded["actor"].masked_fill(~inputs[2], 0.0))
        assert not backbone._recorded  # one question ends it
    recorded = backbone.record(("actor",), *batch)
    kept = backbone._recorded._kept[1]
    assert backbone(("actor",), *batch) is kept
    assert backbone(("actor",), *batch) is not kept
    backbone.record(("actor",), *batch)
    with torch.no_grad():
        backbone(("actor",), *batch)
    assert backbone._recorded  # passes without gradients neither take nor end it
    backbone.forget()
    assert not backbone._recorded


@pytest.mark.parametrize(
    "change",
    [
        {"roles": ("critic",)}, {"options": {"entropy": True, "value_gradient": 1.0}}, {"versions": (4,)},
        *({"inputs": place} for place in range(3)),
    ],
)  # fmt: skip
def test_a_recorded_pass_differs_by_everything_that_decides_it(change: dict[str, Any]) -> None:
    inputs = tuple(torch.ones(2, 3) for _ in range(3))
    fields: dict[str, Any] = {
        "roles": ("actor",), "inputs": inputs, "options": {"entropy": False, "value_gradient": 1.0}, "versions": (3,),
    }  # fmt: skip
    if "inputs" in change:  # equal, but another tensor
        change = {"inputs": tuple(x.clone() if i == change["inputs"] else x for i, x in enumerate(inputs))}
    recorded, outputs = RecordedPass(), {"actor": torch.zeros(2, 3)}
    recorded.keep(PassKey(**fields), outputs)
    assert recorded.take(PassKey(**{**fields, **change})) is None
    recorded.keep(PassKey(**fields), outputs)
    assert recorded.take(PassKey(**fields)) is outputs


def test_a_loss_that_reads_nothing_frees_the_graph_before_its_backward_pass(
    prompts: PromptData, tmp_path: Path
) -> None:
    held = []

    class Own(RLOO):
        def loss(self, b: Experience) -> Tensor:
            held.append(bool(self.backbone._recorded))
            return self.backbone.zero_loss()

        def on_after_backward(self) -> None:
            held.append(bool(self.backbone._recorded))

    module = make(Own, samples_per_prompt=2, keep_log_probs=False, minibatch_size=8)
    make_trainer(tmp_path, 1).fit(module, prompts)
    assert held == [True, False]


def test_a_loss_that_does_not_ask_for_it_leaves_no_graph(
    hydra_checkpoint: Path, prompts: PromptData, tmp_path: Path
) -> None:
    held = []

    class Own(RLOO):
        def loss(self, b: Experience) -> Tensor:
            held.append(bool(self.backbone._recorded))
            fresh = self.backbone(("actor",), b.tokens.clone(), b.attention_mask, b.mask, lm_mask=b.mask)["actor"]
            torch.testing.assert_close(fresh.detach(), b.require("log_probs"), rtol=1e-4, atol=1e-5)
            return fresh.mean()

    module = make(Own, samples_per_prompt=2, keep_log_probs=False, minibatch_size=8,
                  policy_checkpoint=str(hydra_checkpoint))  # fmt: skip
    make_trainer(tmp_path, 3).fit(module, prompts)
    assert held == [True] * 3
    assert not module.backbone._recorded


def test_rollouts_scored_in_parts_carry_nothing(hydra_checkpoint: Path, prompts: PromptData, tmp_path: Path) -> None:
    module: Any = make(PPO, policy_checkpoint=str(hydra_checkpoint), minibatch_size=8, rollout_batch_size=4)
    module.configure_model()
    asked: list[Any] = []
    module.backbone.record = lambda *args, **kwargs: asked.append(args) or {}
    make_trainer(tmp_path, 1).fit(module, prompts)
    assert asked == []


class CountedPasses(L.Callback):
    """Counts trunk passes outside generation."""

    def __init__(self) -> None:
        self.count = 0

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        hidden = module.backbone._hidden

        def counted(*args: Any) -> Tensor:
            self.count += 1
            return hidden(*args)

        module.backbone._hidden = counted
