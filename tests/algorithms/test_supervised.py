"""SFT, reward model and Hydra-SFT: losses against hand computation, metrics, learning, passes."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from helpers import TINY, adamw, make_trainer
from torch.nn import functional as F

from lit_rlhf import DPO, SFT, HydraSFT, InstructionData, LoraArgs, PreferenceData, PromptData, RewardModel
from lit_rlhf.algorithms import SupervisedModule


def pair_batch() -> dict[str, torch.Tensor]:
    tokens = torch.randint(3, 900, (4, 9), generator=torch.Generator().manual_seed(0))
    attention = torch.ones(4, 9, dtype=torch.bool)
    attention[1, :2] = attention[3, :2] = False
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[0, 3] = mask[3, 2:] = False
    attention[:, 5:] &= mask
    return {"tokens": tokens, "attention_mask": attention, "mask": mask}


def reference(module: SupervisedModule, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-token log-probs (list flattened) of every row and scores, one unpadded row at a time, full logits."""
    model = module.backbone.language_model("trunk")
    rows, scores = [], []
    for tokens, attention, mask in zip(*batch.values(), strict=True):
        ids = tokens[attention][None]
        length = int(mask.sum())
        out = model(input_ids=ids, output_hidden_states=True)
        log_probs = out.logits[0].log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
        rows.append(log_probs[-length:])
        if "reward" in module.backbone.heads:
            scores.append(module.backbone.heads["reward"](out.hidden_states[-1][0, -1])[0])
    return rows, torch.stack(scores) if scores else torch.zeros(0)


def test_hydra_sft_loss_is_cross_entropy_of_the_chosen_plus_gamma_preference() -> None:
    module = HydraSFT(model=TINY, optimizer=adamw(), gamma=0.3, lora=LoraArgs(r=4))
    module.configure_model()
    for name, p in module.backbone.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
    batch = pair_batch()
    loss, parts, _ = module.losses(batch)
    rows, scores = reference(module, batch)
    language = -torch.cat(rows[:2]).mean()
    preference = -F.logsigmoid(scores[:2] - scores[2:]).mean()
    torch.testing.assert_close(parts["cross_entropy"], language, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(parts["preference"], preference, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss, language + 0.3 * preference, rtol=1e-5, atol=1e-6)


def test_hydra_sft_runs_one_pass_and_no_language_head_work_on_the_rejected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = HydraSFT(model=TINY, optimizer=adamw(), lora=LoraArgs(r=4))
    module.configure_model()
    passes, rows = [], []
    module.backbone.language_model("trunk").base_model.register_forward_hook(lambda *a: passes.append(1))
    from lit_rlhf.backbone import language_head

    real = language_head.token_log_probs
    monkeypatch.setattr(language_head, "token_log_probs", lambda h, *a, **k: (rows.append(len(h)), real(h, *a, **k))[1])
    batch = pair_batch()
    module.losses(batch)
    assert len(passes) == 1
    assert rows == [int(batch["mask"][:2].sum())]


@pytest.mark.parametrize("lora", [None, LoraArgs(r=4)], ids=["full", "lora"])
def test_the_stages_learn_and_report_their_metrics(
    lora: LoraArgs | None, pairs: PreferenceData, data_folder: Path, tmp_path: Path
) -> None:
    lr = adamw(1e-2 if lora else 3e-3)
    rows = str(data_folder / "pairs.jsonl")
    runs = {
        "sft": (SFT(model=TINY, optimizer=lr, lora=lora), InstructionData(train=rows, validation_size=4, batch_size=4)),
        "reward": (RewardModel(model=TINY, optimizer=lr, lora=lora), pairs),
        "hydra": (
            HydraSFT(model=TINY, optimizer=lr, gamma=1.0, lora=lora),
            PreferenceData(train=rows, validation_size=4, batch_size=4),
        ),
    }
    seen = {}
    for name, (module, data) in runs.items():
        L.seed_everything(0, verbose=False)
        trainer = make_trainer(tmp_path / name, epochs=15, limit_val_batches=1.0)
        trainer.fit(module, data)
        seen[name] = {key: float(value) for key, value in trainer.callback_metrics.items()}
    for name in ("reward", "hydra"):
        assert seen[name]["val/accuracy"] == 1.0
        assert seen[name]["val/margin"] > 0.5
    for name in ("sft", "hydra"):
        # 1024 tokens: an untrained model's perplexity is about 1000.
        assert 1 <= seen[name]["val/perplexity"] < 100
    assert seen["sft"]["val/perplexity"] == pytest.approx(math.exp(seen["sft"]["val/loss"]), rel=0.2)


def test_a_lora_reward_model_leaves_its_trunk_alone(pairs: PreferenceData, tmp_path: Path) -> None:
    module = RewardModel(model=TINY, optimizer=adamw(1e-2), lora=LoraArgs(r=4))
    module.configure_model()
    frozen = {n: p.clone() for n, p in module.backbone.named_parameters() if "lora_" not in n and "trunks" in n}
    make_trainer(tmp_path, epochs=2).fit(module, pairs)
    now = dict(module.backbone.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in frozen.items())


def test_a_negative_gamma_is_refused() -> None:
    with pytest.raises(ValueError, match="gamma must be at least 0, got -1"):
        HydraSFT(model=TINY, optimizer=adamw(), gamma=-1.0).check_settings()


# ---- on typed numbers, no model is loaded --------------------------------------------------------------------------

# Two chosen responses, then two rejected ones.
MASK = torch.arange(3) < torch.tensor([2, 3, 1, 3])[:, None]
LOG_PROBS = [[-1.0, -2.0], [-0.5, -1.5, -0.1], [-3.0], [-0.2, -0.9, -0.4]]
REFERENCE = [[-1.5, -1.8], [-0.5, -2.5, -0.3], [-2.0], [-0.6, -0.8, -1.4]]
REWARDS = [1.5, -0.5, 0.25, 0.75]
BATCH = {"tokens": torch.ones(4, 5), "attention_mask": torch.ones(4, 5, dtype=torch.bool), "mask": MASK}


def typed(kind: type[SupervisedModule], **settings: Any) -> Any:
    """A module whose heads read typed numbers, with junk in the padding."""

    def padded(rows: list[list[float]]) -> torch.Tensor:
        return torch.tensor([row + [9.0] * (3 - len(row)) for row in rows])

    module: Any = kind(model=TINY, optimizer=adamw(), **settings)
    module.asked = []

    def backbone(roles: tuple[str, ...], *inputs: Any, lm_mask: Any = None) -> dict[str, torch.Tensor]:
        module.asked.append(lm_mask)
        every = {"actor": padded(LOG_PROBS), "reference": padded(REFERENCE), "reward": torch.tensor(REWARDS)}
        return {role: every[role] for role in roles}

    module.backbone = backbone
    return module


def on_two_ranks(module: Any, elsewhere: float, training: bool = True) -> None:
    """Give it a trainer whose other rank has so many tokens that count."""

    def reduce(own: torch.Tensor, reduce_op: str) -> torch.Tensor:
        assert reduce_op == "mean"
        return (own + elsewhere) / 2

    module._trainer = SimpleNamespace(training=training, world_size=2, strategy=SimpleNamespace(reduce=reduce))


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


PREFERENCE = -(log_sigmoid(1.5 - 0.25) + log_sigmoid(-0.5 - 0.75)) / 2


@pytest.mark.parametrize(("kind", "rows"), [(SFT, 4), (HydraSFT, 2)])
def test_a_token_loss_is_divided_by_the_tokens_of_all_ranks(kind: type[SupervisedModule], rows: int) -> None:
    tokens = [-x for row in LOG_PROBS[:rows] for x in row]
    preference = 0.1 * PREFERENCE if kind is HydraSFT else 0.0
    module = typed(kind)
    alone, _, _ = module.losses(BATCH)
    assert float(alone) == pytest.approx(sum(tokens) / len(tokens) + preference)
    on_two_ranks(module, elsewhere=31.0)
    # The trainer averages the ranks' gradients: half of each sum over both ranks' tokens.
    both, _, _ = module.losses(BATCH)
    assert float(both) == pytest.approx(sum(tokens) / ((len(tokens) + 31) / 2) + preference)
    on_two_ranks(module, elsewhere=31.0, training=False)
    assert float(module.losses(BATCH)[0]) == pytest.approx(float(alone))  # validation's mean is the batch's own


def test_a_reward_models_loss_raises_the_chosen_over_the_rejected() -> None:
    loss, _, updates = typed(RewardModel).losses(BATCH)
    assert float(loss) == pytest.approx(PREFERENCE)
    chosen, rejected = (x.tolist() for x in updates["accuracy"])
    assert (chosen, rejected) == (REWARDS[:2], REWARDS[2:])


@pytest.mark.parametrize("gamma", [None, 0.0, 0.7])
def test_hydra_sfts_loss(gamma: float | None) -> None:
    module = typed(HydraSFT, **({} if gamma is None else {"gamma": gamma}))
    loss, parts, _ = module.losses(BATCH)
    language = -sum(x for row in LOG_PROBS[:2] for x in row) / 5
    assert float(parts["cross_entropy"]) == pytest.approx(language)
    assert float(parts["preference"]) == pytest.approx(PREFERENCE)
    assert float(loss) == pytest.approx(language + (0.1 if gamma is None else gamma) * PREFERENCE)
    (lm_mask,) = module.asked
    assert lm_mask.tolist() == [*MASK[:2].tolist(), [False] * 3, [False] * 3]


def ratios() -> list[float]:
    return [sum(p) - sum(q) for p, q in zip(LOG_PROBS, REFERENCE, strict=True)]


@pytest.mark.parametrize("settings", [{}, {"beta": 0.6}, {"beta": 0.6, "label_smoothing": 0.2}])
def test_dpos_loss_and_implicit_rewards(settings: dict[str, float]) -> None:
    beta, swapped = settings.get("beta", 0.1), settings.get("label_smoothing", 0.0)
    rewards = [beta * ratio for ratio in ratios()]
    margins = [rewards[0] - rewards[2], rewards[1] - rewards[3]]
    expected = [-(1 - swapped) * log_sigmoid(m) - swapped * log_sigmoid(-m) for m in margins]
    loss, parts, updates = typed(DPO, **settings).losses(BATCH)
    assert float(loss) == pytest.approx(sum(expected) / 2, rel=1e-5)
    assert float(parts["chosen_reward"]) == pytest.approx(sum(rewards[:2]) / 2, rel=1e-5)
    assert float(parts["rejected_reward"]) == pytest.approx(sum(rewards[2:]) / 2, rel=1e-5)
    assert torch.cat(updates["margin"]).tolist() == pytest.approx(rewards, rel=1e-5)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (SFT, {"perplexity": math.exp(9.6 / 9)}),
        (RewardModel, {"loss": PREFERENCE, "accuracy": 0.5, "margin": (1.25 - 1.25) / 2}),
        (HydraSFT, {"perplexity": math.exp(5.1 / 5), "accuracy": 0.5, "margin": 0.0}),
        (DPO, {"accuracy": 0.5, "margin": 0.1 * (0.3 + 1.0 + 1.2 - 1.3) / 2}),
    ],
)
@pytest.mark.parametrize("prefix", ["val", "test"])
def test_what_is_logged_of_held_out_data(prefix: str, kind: type[SupervisedModule], expected: dict[str, float]) -> None:
    module, logged, averaged = typed(kind), {}, set()

    def log(name: str, value: Any, sync_dist: bool = False, **options: Any) -> None:
        logged[name] = value
        averaged.update({name} if sync_dist else ())

    module.log = log
    {"val": module.validation_step, "test": module.test_step}[prefix](BATCH, 0)
    numbers = {name: float(v.compute() if hasattr(v, "compute") else v) for name, v in logged.items()}
    assert {name: numbers[f"{prefix}/{name}"] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert set(logged) == {f"{prefix}/{name}" for name in {"loss", *module.metrics}}
    assert averaged == {f"{prefix}/loss"}  # the metrics know of the other ranks themselves
    averaged.clear()
    module.training_step(BATCH, 0)
    assert "train/loss" in averaged
    assert averaged == {name for name in logged if name.startswith("train/")}


def test_what_is_predicted_of_a_sequence() -> None:
    rows = typed(HydraSFT).predict_step(BATCH, 0)
    assert [row["actor"] for row in rows] == pytest.approx([sum(row) / len(row) for row in LOG_PROBS])
    assert [row["reward"] for row in rows] == pytest.approx(REWARDS)


@pytest.mark.parametrize(
    ("kind", "data", "message"),
    [
        (SFT, PreferenceData, "SFT is trained on InstructionData, not on PreferenceData"),
        (RewardModel, InstructionData, "RewardModel is trained on PreferenceData, not on InstructionData"),
        (DPO, PromptData, "DPO is trained on PreferenceData, not on PromptData"),
        (SFT, InstructionData, None),
        (HydraSFT, PreferenceData, None),
    ],
)
def test_data_of_another_kind_are_refused(kind: type[SupervisedModule], data: type, message: str | None) -> None:
    module: Any = kind(model=TINY, optimizer=adamw())
    module._trainer = SimpleNamespace(
        datamodule=data(train="rows.jsonl"), precision="32-true", state=SimpleNamespace(fn=None)
    )
    problems = module.problems()
    assert len(problems) == (message is not None)
    assert message is None or message in problems[0]
