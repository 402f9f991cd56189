"""DPO: its loss, its reference, every layout, and that it learns."""

import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from helpers import LAYOUTS, TINY, adamw, make_trainer, silence

from lit_rlhf import DPO, LoraArgs, PreferenceData, PromptData


def make(**kwargs: Any) -> DPO:
    return DPO(model=TINY, **{"optimizer": adamw(3e-3), "lora": LoraArgs(r=4), **kwargs})


def a_batch(module: DPO, pairs: PreferenceData) -> dict[str, Any]:
    module.configure_model()
    pairs.tokenizer = module.tokenizer
    pairs.setup("fit")
    silence(module)
    return next(iter(pairs.train_dataloader()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_before_any_update_the_loss_is_log_2(layout: str, hydra_checkpoint: Path, pairs: PreferenceData) -> None:
    module = make(layout=layout, policy_checkpoint=str(hydra_checkpoint))
    loss, _, _ = module.losses(a_batch(module, pairs))
    assert float(loss) == pytest.approx(math.log(2), abs=1e-5)
    loss.backward()
    missing = [n for n, p in module.backbone.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    assert set(module.backbone.layout.roles) == {"actor", "reference"}
    assert len(module.backbone.heads) == 0


def test_the_loss_by_the_formula(hydra_checkpoint: Path, pairs: PreferenceData) -> None:
    module = make(policy_checkpoint=str(hydra_checkpoint), beta=0.3, label_smoothing=0.1)
    batch = a_batch(module, pairs)
    with torch.no_grad():
        for parameter in module.backbone.role_parameters("actor").values():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model = module.backbone.language_model("hydra")

        def log_prob(row: int, role: str) -> float:
            """Of the response tokens of one row, from the plain model, unpadded."""
            kept = batch["attention_mask"][row]
            tokens, count = batch["tokens"][row][kept], int(batch["mask"][row].sum())
            with module.backbone.use(role):
                logits = model(tokens[None]).logits[0].double().log_softmax(-1)
            return sum(float(logits[i - 1, tokens[i]]) for i in range(len(tokens) - count, len(tokens)))

        rows = len(batch["mask"])
        ratios = [log_prob(row, "actor") - log_prob(row, "reference") for row in range(rows)]
        total = 0.0
        for chosen, rejected in zip(ratios[: rows // 2], ratios[rows // 2 :], strict=True):
            z = 0.3 * (chosen - rejected)
            total += 0.9 * math.log1p(math.exp(-z)) + 0.1 * math.log1p(math.exp(z))
        loss, parts, _ = module.losses(batch)
    assert float(loss) == pytest.approx(total / (rows // 2), rel=1e-4)
    assert float(parts["chosen_reward"]) == pytest.approx(0.3 * sum(ratios[: rows // 2]) / (rows // 2), rel=1e-3)


@pytest.mark.parametrize("layout", ["full", "hydra"])
def test_it_prefers_the_chosen_and_its_reference_stays(
    layout: str, hydra_checkpoint: Path, pairs: PreferenceData, tmp_path: Path
) -> None:
    module = make(layout=layout, policy_checkpoint=str(hydra_checkpoint))
    batch = a_batch(module, pairs)
    with torch.no_grad():
        before = module.run_heads(batch)["reference"]
    fresh = make(layout=layout, policy_checkpoint=str(hydra_checkpoint))
    L.seed_everything(0, verbose=False)
    trainer = make_trainer(tmp_path, epochs=8, limit_val_batches=1.0)
    trainer.fit(fresh, pairs)
    assert float(trainer.callback_metrics["val/accuracy"]) == 1.0
    assert float(trainer.callback_metrics["val/margin"]) > 0.1
    with torch.no_grad():
        assert torch.equal(fresh.run_heads(batch)["reference"], before)


def test_a_dpo_checkpoint_is_a_policy_for_later_stages(
    hydra_checkpoint: Path, pairs: PreferenceData, prompts: PromptData, tmp_path: Path
) -> None:
    module = make(policy_checkpoint=str(hydra_checkpoint))
    trainer = make_trainer(tmp_path, epochs=2)
    trainer.fit(module, pairs)
    later = make(policy_checkpoint=str(tmp_path / "last.ckpt"))
    batch = a_batch(later, pairs)
    with torch.no_grad():
        torch.testing.assert_close(
            later.run_heads(batch)["reference"], module.run_heads(batch)["actor"], rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("settings", [{"beta": 0.0}, {"label_smoothing": 0.5}, {"label_smoothing": -0.1}])
def test_settings_out_of_range(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"beta must be positive|label_smoothing must be in \[0, 0.5\)"):
        make(**settings).check_settings()


def test_the_settings_of_the_adapter_reach_the_actor() -> None:
    module = make(lora=LoraArgs(r=3))
    module.configure_model()
    assert {min(p.shape) for p in module.backbone.role_parameters("actor").values()} == {3}
