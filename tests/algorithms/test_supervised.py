"""SFT, reward model and Hydra-SFT: losses against hand computation, metrics, learning, passes."""

import math
from pathlib import Path

import lightning as L
import pytest
import torch
from helpers import TINY, adamw, make_trainer
from torch.nn import functional as F

from lit_rlhf import SFT, HydraSFT, InstructionData, LoraArgs, PreferenceData, RewardModel
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
