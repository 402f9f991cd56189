"""A later stage starts exactly where the earlier one ended, through any chain; wrong files say so."""

import copy
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_rlhf.backbone import (
    LAYOUTS,
    BackboneSpec,
    LoraArgs,
    StageCheckpoint,
    build_backbone,
    read_stages,
    supervised_layout,
)
from lit_rlhf.backbone.adapter_tensors import concatenate
from lit_rlhf.checkpoints.files import CheckpointError

ROLES = ("actor", "critic", "reference", "reward")
SFT = {"actor": "lm"}
REWARD = {"reward": "reward"}
HYDRA = {"actor": "lm", "reward": "reward"}


def lora(r=4, **changes):
    return LoraArgs(r=r, alpha=2 * r, **changes)


def close(ours, expected):
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def read(backbone, roles, batch):
    return backbone(roles, *batch)


@torch.no_grad()
def logits(model, batch):
    """Of the first row, which has no padding."""
    return model(input_ids=batch.tokens[:1]).logits


@pytest.fixture
def sft(run_stage, base_model):
    return run_stage("sft", BackboneSpec(base_model, lora=lora()), supervised_layout(SFT, lora=True))


@pytest.fixture
def hydra_sft(run_stage, base_model):
    return run_stage("hydra_sft", BackboneSpec(base_model, lora=lora()), supervised_layout(HYDRA, lora=True), seed=2)


@pytest.fixture
def reward_model(run_stage, base_model, sft):
    """LoRA reward model on the SFT checkpoint, other rank, scaling and targets than the SFT's."""
    settings = lora(3, use_rslora=True, target_modules=["q_proj", "o_proj"])
    spec = BackboneSpec(base_model, lora=settings, policy_checkpoint=sft[0])
    return run_stage("reward_model", spec, supervised_layout(REWARD, lora=True), seed=3)


@pytest.fixture
def ppo(run_stage, base_model, hydra_sft):
    settings = lora(2, use_rslora=True, target_modules=["q_proj", "v_proj", "up_proj"])
    spec = BackboneSpec(base_model, lora=settings, policy_checkpoint=hydra_sft[0])
    return run_stage("ppo", spec, LAYOUTS["hydra"], seed=4)


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
    with pytest.raises(ValueError, match="no LoRA set; export it with format 'merged'"):
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


# --- reward heads belong to the trunk they were trained on ----------------------------


@pytest.mark.parametrize("layout", ["hydra", "j_hydra"])
def test_reward_head_of_another_trunk_is_refused(layout, base_model, sft, reward_model, hydra_sft, ppo):
    """The head alone would be read on the policy's trunk: plausible scores that mean nothing."""
    for policy, reward in [
        (sft[0], reward_model[0]),
        (None, hydra_sft[0]),
        (hydra_sft[0], reward_model[0]),
        (ppo[0], None),
    ]:
        spec = BackboneSpec(base_model, lora=lora(), policy_checkpoint=policy, reward_checkpoint=reward)
        with pytest.raises(ValueError, match="trained on another trunk"):
            read_stages(spec, LAYOUTS[layout])
    read_stages(BackboneSpec(base_model, lora=lora(), policy_checkpoint=hydra_sft[0]), LAYOUTS[layout])
    both = BackboneSpec(base_model, lora=lora(), policy_checkpoint=hydra_sft[0], reward_checkpoint=hydra_sft[0])
    read_stages(both, LAYOUTS[layout])


def test_reward_head_left_behind_by_a_later_stage_is_refused(run_stage, base_model, hydra_sft):
    spec = BackboneSpec(base_model, lora=lora(), policy_checkpoint=hydra_sft[0])
    path, _ = run_stage("sft_again", spec, supervised_layout(SFT, lora=True))
    for layout in ("hydra", "dynamic_lora"):
        with pytest.raises(ValueError, match="trained on another trunk"):
            build_backbone(BackboneSpec(base_model, lora=lora(), policy_checkpoint=path), LAYOUTS[layout])
    spec = BackboneSpec(base_model, lora=lora(), policy_checkpoint=path, reward_checkpoint=hydra_sft[0])
    read_stages(spec, LAYOUTS["dynamic_lora"])


# --- errors ---------------------------------------------------------------------------


def test_missing_file(base_model):
    spec = BackboneSpec(base_model, lora=lora(), policy_checkpoint="/nowhere/last.ckpt")
    with pytest.raises(CheckpointError, match=r"/nowhere/last.ckpt does not exist; give the .ckpt file"):
        build_backbone(spec, LAYOUTS["hydra"])


def test_missing_file_along_the_chain(ppo, hydra_sft):
    Path(hydra_sft[0]).unlink()
    with pytest.raises(CheckpointError, match=r"hydra_sft.ckpt does not exist"):
        StageCheckpoint.read(ppo[0]).role_model("actor")


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.5, 0.99])
def test_torn_file(keep, sft):
    content = Path(sft[0]).read_bytes()
    Path(sft[0]).write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(ValueError, match=r"sft.ckpt (cannot be read: it is torn|is empty)"):
        StageCheckpoint.read(sft[0])


@pytest.mark.parametrize("content", [{"state_dict": {}}, [1, 2], {"lit_rlhf": {"format": 999}}, {"lit_rlhf": 3}])
def test_foreign_checkpoint(content, tmp_path):
    torch.save(content, tmp_path / "foreign.ckpt")
    with pytest.raises(
        ValueError,
        match=r"foreign.ckpt (was not written by|is a file of torch's but no checkpoint)",
    ):
        StageCheckpoint.read(tmp_path / "foreign.ckpt")


class Payload:
    ran = False

    def __reduce__(self):
        return (setattr, (Payload, "ran", True))


def test_pickled_code_is_refused(run_stage, base_model):
    spec = BackboneSpec(base_model, lora=lora())
    path, _ = run_stage("evil", spec, supervised_layout(SFT, lora=True), callbacks={"x": Payload()})
    with pytest.raises(ValueError, match=r"evil.ckpt is refused: it holds .*, and reading it could run code"):
        StageCheckpoint.read(path)
    assert not Payload.ran


def test_missing_reward_head(base_model, sft):
    for policy in (None, sft[0]):
        with pytest.raises(ValueError, match="needs a trained reward head: give policy_checkpoint a Hydra-SFT"):
            build_backbone(BackboneSpec(base_model, lora=lora(), policy_checkpoint=policy), LAYOUTS["hydra"])


def test_wrong_role(sft):
    with pytest.raises(ValueError, match=r"sft.ckpt holds the roles \['actor'\], not 'reward'"):
        StageCheckpoint.read(sft[0]).role_model("reward")
    with pytest.raises(ValueError, match="not 'judge'"):
        StageCheckpoint.read(sft[0]).adapter("judge")


def test_model_mismatch(make_model, tmp_path, hydra_sft):
    make_model(seed=5).save_pretrained(tmp_path / "rival")
    spec = BackboneSpec(str(tmp_path / "rival"), lora=lora(), policy_checkpoint=hydra_sft[0])
    with pytest.raises(ValueError, match=r"was trained from model '.*base', but model is '.*rival'"):
        build_backbone(spec, LAYOUTS["hydra"])


def test_policy_checkpoint_without_a_policy(base_model, reward_model):
    spec = BackboneSpec(base_model, lora=lora(), policy_checkpoint=reward_model[0])
    with pytest.raises(ValueError, match=r"reward_model.ckpt holds no policy \(no actor role\)"):
        build_backbone(spec, LAYOUTS["hydra"])


def test_pe_needs_a_lora_reward_model_of_the_same_policy(run_stage, base_model, sft, reward_model, hydra_sft):
    path, _ = run_stage("full_rm", BackboneSpec(base_model), supervised_layout(REWARD, lora=False))
    with pytest.raises(ValueError, match="give reward_checkpoint a RewardModel that was trained with lora"):
        build_backbone(BackboneSpec(base_model, lora=lora(), reward_checkpoint=path), LAYOUTS["pe"])
    with pytest.raises(ValueError, match="give reward_checkpoint a RewardModel that was trained with lora"):
        build_backbone(BackboneSpec(base_model, lora=lora(), policy_checkpoint=hydra_sft[0]), LAYOUTS["pe"])
    for policy in (None, hydra_sft[0]):
        spec = BackboneSpec(base_model, lora=lora(), policy_checkpoint=policy, reward_checkpoint=reward_model[0])
        with pytest.raises(ValueError, match=r"was trained on policy checkpoint .*sft.ckpt, not on"):
            build_backbone(spec, LAYOUTS["pe"])


def test_weights_that_do_not_fit_the_base_model(make_model, hydra_sft, base_model, run_stage):
    """The folder's model was replaced since."""
    full, _ = run_stage("full", BackboneSpec(base_model), supervised_layout(SFT, lora=False))
    make_model("gpt2").save_pretrained(base_model)
    with pytest.raises(ValueError, match=r"does not fit|not found in the base model"):
        StageCheckpoint.read(hydra_sft[0]).role_model("actor").merged()
    with pytest.raises(ValueError, match=r"full.ckpt does not fit"):
        StageCheckpoint.read(full).role_model("actor")


def test_lora_set_with_missing_tensors_is_refused(sft):
    content = torch.load(sft[0])
    content["state_dict"].pop(next(key for key in content["state_dict"] if "lora_B" in key))
    torch.save(content, sft[0])
    with pytest.raises(ValueError, match="LoRA set does not fit the model"):
        StageCheckpoint.read(sft[0]).role_model("actor").merged()


def test_reading_changes_no_file(ppo, hydra_sft):
    """Tensors are mapped from the file; merging and training must not write through."""
    before = [Path(path).read_bytes() for path in (ppo[0], hydra_sft[0])]
    stage = StageCheckpoint.read(ppo[0])
    backbone = build_backbone(copy.copy(stage.spec), stage.layout)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(1)
        for parameter in stage.role_model("actor").as_peft().parameters():
            parameter.add_(1)
    assert [Path(path).read_bytes() for path in (ppo[0], hydra_sft[0])] == before
