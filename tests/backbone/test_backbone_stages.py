"""A later stage starts exactly where the earlier one ended, through any chain."""

import os
from pathlib import Path

import pytest
import torch
from stage_helpers import HYDRA, REWARD, ROLES, SFT, close, logits, lora, read
from transformers import AutoModelForCausalLM

from lit_rlhf.backbone import LAYOUTS, BackboneSpec, StageCheckpoint, build_backbone, supervised_layout
from lit_rlhf.backbone.adapter_tensors import concatenate

# --- starting where the stage ended ---------------------------------------------------


@pytest.mark.parametrize("with_lora", [True, False])
@pytest.mark.parametrize("tied", [False, True])
def test_hydra_starts_where_hydra_sft_ended(with_lora, tied, run_stage, make_model, tmp_path, batch):
    make_model(tie_word_embeddings=tied).save_pretrained(tmp_path / "other")
    spec = BackboneSpec(str(tmp_path / "other"), lora=lora() if with_lora else None)
    path, stage = run_stage("hydra_sft", spec, supervised_layout(HYDRA, with_lora))
    ended = read(stage, ("actor", "reward"), batch)
    spec.policy_checkpoint, spec.lora = path, lora(2)
    backbone = build_backbone(spec, LAYOUTS["hydra"])
    found = read(backbone, ROLES, batch)
    for role, expected in (("reference", "actor"), ("actor", "actor"), ("reward", "reward")):
        if with_lora:
            close(found[role], ended[expected])
        else:
            assert torch.equal(found[role], ended[expected]), role
    # InstructGPT's practice: the value head starts from the reward head, as a copy.
    value, reward = backbone.heads["value"], backbone.heads["reward"]
    assert torch.equal(value.weight, reward.weight)
    assert torch.equal(value.bias, reward.bias)
    assert torch.equal(reward.weight, stage.heads["reward"].weight)
    assert value.weight.data_ptr() != reward.weight.data_ptr()
    plain = read(build_backbone(BackboneSpec(spec.model), supervised_layout(SFT, False)), ("actor",), batch)
    assert (plain["actor"] - ended["actor"]).abs().max() > 0.05  # the stage moved the model at all


@pytest.mark.parametrize("layout", ["full", "lora", "dynamic_lora", "j_hydra", "hydra"])
def test_every_layout_starts_from_hydra_sft_alone(layout, base_model, hydra_sft, batch):
    """Without a reward checkpoint the critic's and the reward's trunks start from the policy checkpoint."""
    path, stage = hydra_sft
    ended = read(stage, ("actor", "reward"), batch)
    spec = BackboneSpec(base_model, lora=None if layout == "full" else lora(), policy_checkpoint=path)
    found = read(build_backbone(spec, LAYOUTS[layout]), ROLES, batch)
    close(found["actor"], ended["actor"])
    close(found["reference"], ended["actor"])
    close(found["reward"], ended["reward"])
    at_last = found["critic"][batch.mask].abs()
    assert at_last.max() > 0.01


@pytest.mark.parametrize("layout", ["full", "lora", "dynamic_lora"])
def test_separate_reward_model(layout, base_model, sft, reward_model, batch):
    spec = BackboneSpec(
        base_model,
        lora=None if layout == "full" else lora(),
        policy_checkpoint=sft[0],
        reward_checkpoint=reward_model[0],
    )
    backbone = build_backbone(spec, LAYOUTS[layout])
    found = read(backbone, ROLES, batch)
    close(found["actor"], read(sft[1], ("actor",), batch)["actor"])
    close(found["reference"], found["actor"])
    close(found["reward"], read(reward_model[1], ("reward",), batch)["reward"])
    assert torch.equal(backbone.heads["value"].weight, reward_model[1].heads["reward"].weight)


@pytest.mark.parametrize("tied", [False, True])
def test_fully_trained_reward_model(tied, run_stage, make_model, tmp_path, batch):
    """Its trunk has no output embedding of its own (unless tied): nothing of it is in the checkpoint."""
    make_model(tie_word_embeddings=tied).save_pretrained(tmp_path / "other")
    base = str(tmp_path / "other")
    path, stage = run_stage("reward_model", BackboneSpec(base), supervised_layout(REWARD, lora=False))
    state = StageCheckpoint.read(path).state
    assert not any("lm_head" in key for key in state)
    spec = BackboneSpec(base, lora=lora(), reward_checkpoint=path)
    backbone = build_backbone(spec, LAYOUTS["dynamic_lora"])
    found = read(backbone, ROLES, batch)
    assert torch.equal(found["reward"], read(stage, ("reward",), batch)["reward"])
    plain = build_backbone(BackboneSpec(base), supervised_layout(SFT, lora=False))
    assert torch.equal(found["reference"], read(plain, ("actor",), batch)["actor"])


def test_pe_reads_the_reward_models_own_set_frozen(base_model, sft, reward_model, batch):
    spec = BackboneSpec(base_model, lora=lora(2), policy_checkpoint=sft[0], reward_checkpoint=reward_model[0])
    backbone = build_backbone(spec, LAYOUTS["pe"])
    found = read(backbone, ROLES, batch)
    close(found["reward"], read(reward_model[1], ("reward",), batch)["reward"])
    close(found["reference"], read(sft[1], ("actor",), batch)["actor"])
    frozen = {name: p for name, p in backbone.named_parameters() if ".reward." in name and "lora_" in name}
    saved = StageCheckpoint.read(reward_model[0]).adapter("reward")
    assert len(frozen) == len(saved.tensors) == 2 * 2 * 2  # A and B, two layers, two modules
    assert not any(p.requires_grad for p in frozen.values())
    assert not set(frozen) & set(backbone.trainable_names)
    for name, p in frozen.items():
        key = name.removeprefix("trunks.sft.").replace(".reward.weight", ".weight")
        assert torch.equal(p, saved.tensors[key]), name


def test_pe_on_the_bare_base_model(run_stage, base_model, batch):
    path, stage = run_stage("rm", BackboneSpec(base_model, lora=lora()), supervised_layout(REWARD, lora=True))
    backbone = build_backbone(BackboneSpec(base_model, lora=lora(), reward_checkpoint=path), LAYOUTS["pe"])
    assert torch.equal(read(backbone, ROLES, batch)["reward"], read(stage, ("reward",), batch)["reward"])


def test_reward_model_on_hydra_sft_continues_its_head(run_stage, base_model, hydra_sft):
    spec = BackboneSpec(base_model, lora=lora(), policy_checkpoint=hydra_sft[0])
    backbone = build_backbone(spec, supervised_layout(REWARD, lora=True))
    assert torch.equal(backbone.heads["reward"].weight, hydra_sft[1].heads["reward"].weight)


def test_value_head_starts_at_zero_without_a_reward_head(base_model, sft, batch):
    layout = LAYOUTS["hydra"].restricted_to(["actor", "critic", "reference"])
    spec = BackboneSpec(base_model, lora=lora(), policy_checkpoint=sft[0])
    assert read(build_backbone(spec, layout), ("critic",), batch)["critic"].eq(0).all()


def test_building_twice_gives_the_same_backbone(base_model, hydra_sft):
    spec = BackboneSpec(base_model, lora=lora(), policy_checkpoint=hydra_sft[0])
    first, second = (build_backbone(spec, LAYOUTS["hydra"]) for _ in range(2))
    for (name, ours), (_, theirs) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_a_built_backbone_takes_its_own_state_back(base_model, hydra_sft, ppo, batch):
    """Resuming: the frozen rest is rebuilt from the spec, the trained part comes from the checkpoint."""
    stage = StageCheckpoint.read(ppo[0])
    backbone = build_backbone(stage.spec, stage.layout)
    state = {key.removeprefix("backbone."): value for key, value in stage.state.items()}
    assert set(state) == set(backbone.trainable_names)
    backbone.load_state_dict(state, strict=False)
    ended, found = read(ppo[1], ROLES, batch), read(backbone, ROLES, batch)
    for role in ROLES:
        assert torch.equal(found[role], ended[role]), role


def test_dtype_of_the_later_stage_wins(base_model, hydra_sft, batch):
    spec = BackboneSpec(base_model, dtype="bfloat16", lora=lora(), policy_checkpoint=hydra_sft[0])
    backbone = build_backbone(spec, LAYOUTS["hydra"])
    trained = set(backbone.trainable_names)
    kinds = {(name in trained, p.dtype) for name, p in backbone.named_parameters() if name.startswith("trunks")}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    near = read(backbone, ("reference",), batch)["reference"] - read(hydra_sft[1], ("actor",), batch)["actor"]
    assert near.abs().max() < 0.3


# --- the chain of stages, and what export reads ---------------------------------------


def test_chain_is_found_through_the_record(base_model, hydra_sft, ppo, batch):
    stage = StageCheckpoint.read(ppo[0])
    assert stage.layout == LAYOUTS["hydra"]
    assert stage.spec.lora == lora(2, use_rslora=True, target_modules=["q_proj", "v_proj", "up_proj"])
    found = stage.role_model("actor")
    assert [s.args.r for s in found.adapters] == [4, 2]
    assert [s.args.r for s in stage.role_model("reference").adapters] == [4]
    plain = AutoModelForCausalLM.from_pretrained(base_model)
    for key, value in plain.state_dict().items():
        assert torch.equal(found.base.state_dict()[key], value), key
    close(stage.head_state("reward")["weight"], hydra_sft[1].heads["reward"].weight)
    close(stage.head_state("value")["weight"], ppo[1].heads["value"].weight)
    assert not torch.equal(stage.head_state("value")["weight"], stage.head_state("reward")["weight"])


@pytest.mark.parametrize("role", ["actor", "reference"])
@pytest.mark.parametrize("form", ["merged", "as_peft"])
def test_exported_model_equals_the_stack(role, form, ppo, batch):
    with torch.no_grad(), ppo[1].use(role) as model:
        expected = logits(model, batch)
    exported = getattr(StageCheckpoint.read(ppo[0]).role_model(role), form)()
    close(logits(exported.eval(), batch), expected)
    if form == "merged":
        assert not [name for name, _ in exported.named_parameters() if "lora" in name]
    else:
        ranks = {p.shape[0] for name, p in exported.named_parameters() if "lora_A" in name}
        assert ranks == ({6} if role == "actor" else {4})


def test_peft_export_survives_saving(ppo, base_model, tmp_path, batch):
    """PEFT alone, without this package, reads the folder."""
    from peft import PeftModel

    with torch.no_grad(), ppo[1].use("actor") as model:
        expected = logits(model, batch)
    StageCheckpoint.read(ppo[0]).role_model("actor").as_peft().save_pretrained(str(tmp_path / "adapter"))
    plain = AutoModelForCausalLM.from_pretrained(base_model)
    close(logits(PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval(), batch), expected)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
@pytest.mark.parametrize("form", ["merged", "as_peft"])
def test_two_sets_on_other_families(form, family, make_model, run_stage, tmp_path, batch):
    """GPT-2's Conv1D keeps weights transposed."""
    make_model(family).save_pretrained(tmp_path / "other")
    base = str(tmp_path / "other")
    first, _ = run_stage("one", BackboneSpec(base, lora=lora(3)), supervised_layout(HYDRA, lora=True))
    spec = BackboneSpec(base, lora=lora(2, use_rslora=True), policy_checkpoint=first)
    second, backbone = run_stage("two", spec, LAYOUTS["hydra"], seed=5)
    with torch.no_grad(), backbone.use("actor") as model:
        expected = logits(model, batch)
    close(logits(getattr(StageCheckpoint.read(second).role_model("actor"), form)().eval(), batch), expected)


def test_three_stages(base_model, run_stage, ppo, batch):
    """A second PPO on the first's actor, its reward a Python function."""
    layout = LAYOUTS["hydra"].restricted_to(["actor", "critic", "reference"])
    spec = BackboneSpec(base_model, lora=lora(1), policy_checkpoint=ppo[0])
    path, backbone = run_stage("again", spec, layout, seed=6)
    close(read(backbone, ("reference",), batch)["reference"], read(ppo[1], ("actor",), batch)["actor"])
    found = StageCheckpoint.read(path).role_model("actor")
    assert [s.args.r for s in found.adapters] == [4, 2, 1]
    with torch.no_grad(), backbone.use("actor") as model:
        close(logits(found.as_peft().eval(), batch), logits(model, batch))


def test_summed_set_is_exact_where_modules_differ(ppo, hydra_sft):
    """Against the update written out module by module, in float64."""
    found = StageCheckpoint.read(ppo[0]).role_model("actor")
    summed = concatenate(found.adapters)
    assert summed.scaling == 1
    for name in {key.rsplit(".lora_", 1)[0] for key in summed.tensors}:
        expected = sum(
            s.scaling * s.tensors[f"{name}.lora_B.weight"].double() @ s.tensors[f"{name}.lora_A.weight"].double()
            for s in found.adapters
            if f"{name}.lora_A.weight" in s.tensors
        )
        a, b = summed.tensors[f"{name}.lora_A.weight"], summed.tensors[f"{name}.lora_B.weight"]
        torch.testing.assert_close(b.double() @ a.double(), expected, atol=1e-6, rtol=1e-6)


def test_fully_trained_stage_has_no_set_to_export(run_stage, base_model, batch):
    path, backbone = run_stage("sft", BackboneSpec(base_model), supervised_layout(SFT, lora=False))
    found = StageCheckpoint.read(path).role_model("actor")
    with pytest.raises(ValueError, match="no adapter; export it with format 'merged'"):
        found.as_peft()
    with torch.no_grad(), backbone.use("actor") as model:
        assert torch.equal(logits(found.merged(), batch), logits(model, batch))


def test_full_training_on_top_of_lora(run_stage, base_model, sft, batch):
    spec = BackboneSpec(base_model, policy_checkpoint=sft[0])
    path, backbone = run_stage("full", spec, supervised_layout(HYDRA, lora=False), seed=8)
    with torch.no_grad(), backbone.use("actor") as model:
        expected = logits(model, batch)
    assert torch.equal(logits(StageCheckpoint.read(path).role_model("actor").merged(), batch), expected)


def test_roles_of_a_full_ppo_checkpoint(run_stage, base_model, hydra_sft, batch):
    spec = BackboneSpec(base_model, policy_checkpoint=hydra_sft[0])
    path, backbone = run_stage("ppo_full", spec, LAYOUTS["full"], seed=8)
    stage = StageCheckpoint.read(path)
    for role in ("actor", "reference"):
        with torch.no_grad(), backbone.use(role) as model:
            close(logits(stage.role_model(role).merged(), batch), logits(model, batch))
    ended = read(backbone, ROLES, batch)
    assert (ended["actor"] - ended["reference"]).abs().max() > 0.05
    # As a reward checkpoint of another run, it gives the reward model it used.
    spec = BackboneSpec(base_model, lora=lora(), reward_checkpoint=path)
    again = build_backbone(spec, LAYOUTS["dynamic_lora"])
    close(read(again, ("reward",), batch)["reward"], ended["reward"])


def test_reward_role_of_a_pe_checkpoint_reads_the_loaded_set(run_stage, base_model, sft, reward_model, batch):
    """The set is not in the file (it was not trained there); the reward checkpoint has it."""
    spec = BackboneSpec(base_model, lora=lora(2), policy_checkpoint=sft[0], reward_checkpoint=reward_model[0])
    path, backbone = run_stage("ppo_pe", spec, LAYOUTS["pe"], seed=9)
    with torch.no_grad(), backbone.use("reward") as model:
        expected = logits(model, batch)
    stage = StageCheckpoint.read(path)
    close(logits(stage.role_model("reward").as_peft().eval(), batch), expected)
    later = BackboneSpec(base_model, lora=lora(), reward_checkpoint=path)
    again = build_backbone(later, LAYOUTS["dynamic_lora"])
    close(read(again, ("reward",), batch)["reward"], read(backbone, ("reward",), batch)["reward"])


def test_record_holds_absolute_paths(run_stage, base_model, sft, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    spec = BackboneSpec(base_model, lora=lora(), policy_checkpoint=Path(sft[0]).name)
    path, _ = run_stage("second", spec, supervised_layout(SFT, lora=True))
    monkeypatch.chdir("/")
    stage = StageCheckpoint.read(path)
    assert stage.spec.policy_checkpoint == sft[0]
    assert len(stage.role_model("actor").adapters) == 2


def test_checkpoint_holds_trained_tensors_only(ppo):
    state = StageCheckpoint.read(ppo[0]).state
    assert all(".lora_" in key or key.startswith("backbone.heads.value.") for key in state)
    assert os.path.getsize(ppo[0]) < 60_000
