"""What cannot be built from the given checkpoints is refused, and the message names the file."""

import copy
from pathlib import Path

import pytest
import torch
from stage_helpers import REWARD, SFT, lora

from lit_rlhf.backbone import LAYOUTS, BackboneSpec, StageCheckpoint, build_backbone, read_stages, supervised_layout
from lit_rlhf.checkpoints.files import CheckpointError

# --- reward heads belong to the trunk they were trained on ----------------------------


@pytest.mark.parametrize("layout", ["hydra", "j_hydra"])
def test_reward_head_of_another_trunk_is_refused(layout, base_model, sft, reward_model, hydra_sft, ppo):
    """The head alone would be used on the policy's trunk: plausible scores that mean nothing."""
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
    with pytest.raises(ValueError, match=r"sft.ckpt (cannot be read: it is truncated|is empty)"):
        StageCheckpoint.read(sft[0])


@pytest.mark.parametrize("content", [{"state_dict": {}}, [1, 2], {"lit_rlhf": {"format": 999}}, {"lit_rlhf": 3}])
def test_foreign_checkpoint(content, tmp_path):
    torch.save(content, tmp_path / "foreign.ckpt")
    with pytest.raises(
        ValueError,
        match=r"foreign.ckpt (was not written by|is a torch file but not a checkpoint)",
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


def test_adapter_with_missing_tensors_is_refused(sft):
    content = torch.load(sft[0])
    content["state_dict"].pop(next(key for key in content["state_dict"] if "lora_B" in key))
    torch.save(content, sft[0])
    with pytest.raises(ValueError, match="adapter does not fit the model"):
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
