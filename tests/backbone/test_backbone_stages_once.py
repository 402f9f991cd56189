"""Every checkpoint of a chain is opened once, every base model loaded once for all trunks that start alike."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import TINY, make_ppo, make_trainer
from stage_helpers import REWARD, SFT, lora

from lit_rlhf import LoraArgs, PromptData
from lit_rlhf.backbone import (
    LAYOUTS,
    BackboneSpec,
    build_backbone,
    find_layout,
    fingerprint_parents,
    read_stages,
    stage_checkpoints,
    supervised_layout,
)
from lit_rlhf.checkpoints import CheckpointError, records


@pytest.fixture
def opened(monkeypatch):
    """Count, by name, how often a checkpoint file is opened and a base model is loaded."""
    counts = Counter()

    def counted(function):
        def call(path, *args, **kwargs):
            counts[Path(path).name] += 1
            return function(path, *args, **kwargs)

        return call

    monkeypatch.setattr(records, "load_file", counted(records.load_file))
    monkeypatch.setattr(stage_checkpoints, "load_language_model", counted(stage_checkpoints.load_language_model))
    return counts


@pytest.fixture
def chain(run_stage, base_model, sft):
    """Three stages, each on the one before: SFT, SFT again, a LoRA reward model; their records hold fingerprints."""
    spec = BackboneSpec(base_model, lora=lora(2), policy_checkpoint=sft[0])
    spec.fingerprints = fingerprint_parents(spec)
    second, _ = run_stage("second", spec, supervised_layout(SFT, lora=True), seed=5)
    spec = BackboneSpec(base_model, lora=lora(3), policy_checkpoint=second)
    spec.fingerprints = fingerprint_parents(spec)
    third, _ = run_stage("third", spec, supervised_layout(REWARD, lora=True), seed=6)
    return BackboneSpec(base_model, lora=lora(), policy_checkpoint=second, reward_checkpoint=third)


@pytest.mark.parametrize(
    ("layout", "bases"),
    [("pe", 1), ("lora", 2), ("dynamic_lora", 2), ("full", 2)],  # of the policy's weights, of the reward model's
)
def test_each_file_is_opened_once_and_equal_trunks_are_loaded_once(layout, bases, chain, opened):
    build_backbone(chain, LAYOUTS[layout])
    assert opened == {"sft.ckpt": 1, "second.ckpt": 1, "third.ckpt": 1, "base": bases}


def test_trunks_that_start_alike_share_no_weights(chain):
    backbone = build_backbone(chain, LAYOUTS["lora"])
    actor, reference = (backbone.language_model(name) for name in ("sft", "reference"))
    ours = {parameter.data_ptr() for parameter in actor.parameters()}
    assert ours.isdisjoint(parameter.data_ptr() for parameter in reference.parameters())


def test_what_was_read_and_checked_is_not_read_again(chain, opened):
    stages = read_stages(chain, LAYOUTS["pe"])
    assert "base" not in opened
    assert set(stages.fingerprints()) == {chain.policy_checkpoint, chain.reward_checkpoint}
    assert stages.fingerprints() == fingerprint_parents(chain)
    opened.clear()
    build_backbone(chain, LAYOUTS["pe"], stages=stages)
    assert opened == {"base": 1}


def test_a_file_that_the_layout_does_not_need_may_be_gone(run_stage, chain):
    """A policy trained against a reward model goes on without it."""
    path, _ = run_stage("ppo", chain, LAYOUTS["pe"])
    Path(chain.reward_checkpoint).unlink()
    spec = BackboneSpec(chain.model, lora=lora(), policy_checkpoint=path)
    assert len(read_stages(spec, supervised_layout(SFT, lora=True)).trunks["trunk"].stages) == 3
    with pytest.raises(CheckpointError, match=r"third\.ckpt does not exist"):
        read_stages(spec, supervised_layout(REWARD, lora=True))


def test_a_replaced_file_along_the_chain_is_refused_before_any_model_loads(chain, sft, opened):
    content = torch.load(sft[0])
    next(iter(content["state_dict"].values())).add_(1)
    torch.save(content, sft[0])
    with pytest.raises(ValueError, match=r"sft\.ckpt was replaced after a later stage was trained on it"):
        read_stages(chain, LAYOUTS["pe"])
    assert "base" not in opened


def test_a_run_opens_each_file_once(hydra_checkpoint, lora_reward_checkpoint, prompts: PromptData, tmp_path, opened):
    first, second = (tmp_path / f"{name}.ckpt" for name in ("hydra", "reward"))
    first.write_bytes(hydra_checkpoint.read_bytes())
    content = torch.load(lora_reward_checkpoint)
    content["lit_rlhf"]["spec"] |= {"policy_checkpoint": str(first), "fingerprints": {}}
    torch.save(content, second)
    module = make_ppo(layout="pe", policy_checkpoint=str(first), reward_checkpoint=str(second))
    make_trainer(tmp_path, 1).fit(module, prompts)
    assert opened == {"hydra.ckpt": 1, "reward.ckpt": 1, "random:tiny": 1}
    assert set(module.spec.fingerprints) == {str(first), str(second)}


def test_adapters_of_earlier_stages_lie_beside_a_trunk_they_cannot_be_merged_into(hydra_checkpoint, monkeypatch):
    """A quantized trunk, here loaded plain: actor and reference start where the merged ones do."""
    load = stage_checkpoints.TrunkWeights.load
    monkeypatch.setattr(
        stage_checkpoints.TrunkWeights, "load", lambda weights, dtype, *quantization: load(weights, dtype)
    )
    spec = BackboneSpec(TINY, None, "float32", LoraArgs(r=4), str(hydra_checkpoint))
    layout = find_layout("hydra").restricted_to(("actor", "reference"))
    merged = build_backbone(spec, layout)
    beside = build_backbone(replace(spec, quantization="nf4"), layout, stages=read_stages(spec, layout))
    tokens, mask = torch.arange(3, 21).view(2, 9), torch.ones(2, 4, dtype=torch.bool)
    with torch.no_grad():
        expected, got = (b(("actor", "reference"), tokens, tokens > 0, mask) for b in (merged, beside))
        bare = build_backbone(replace(spec, policy_checkpoint=None), layout)(("reference",), tokens, tokens > 0, mask)
    for role in ("actor", "reference"):
        torch.testing.assert_close(got[role], expected[role], rtol=1e-4, atol=1e-5)
        assert (got[role] - bare["reference"]).abs().max() > 1e-2
