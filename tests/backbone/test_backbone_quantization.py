"""Quantized frozen trunks. Errors run everywhere; the rest needs bitsandbytes, and runs on CUDA where there is one."""

import importlib.util
import logging

import pytest
import torch
from helpers import quantization_device
from peft import PeftModel
from peft.utils.integrations import dequantize_module_weight
from torch import nn

from lit_rlhf.backbone import (
    LAYOUTS,
    BackboneSpec,
    LoraArgs,
    StageCheckpoint,
    build_backbone,
    load_language_model,
    read_stages,
    supervised_layout,
)
from lit_rlhf.backbone import quantization as room

ROLES = ("actor", "critic", "reference", "reward")
HYDRA = {"actor": "lm", "reward": "reward"}
KINDS = ["int8", "nf4"]
# Rows of whole blocks of 64 weights: bitsandbytes' CPU kernel reads shorter ones wrongly (0.50).
WIDE = {
    "llama": {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16},
    "gpt_neox": {"hidden_size": 64, "intermediate_size": 128},
    "gpt2": {"hidden_size": 64},
    "opt": {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128},
}


@pytest.fixture
def device():
    with quantization_device() as device:
        yield device


@pytest.fixture
def batch(batch, device):
    return type(batch)(*(part.to(device) for part in batch))


@pytest.fixture
def wide(make_model, tmp_path):
    """Folder of a random Llama."""
    make_model(**WIDE["llama"]).save_pretrained(tmp_path / "wide")
    return str(tmp_path / "wide")


def lora(r=4, **changes):
    return LoraArgs(r=r, alpha=2 * r, **changes)


@torch.no_grad()
def read(backbone, roles, batch):
    return backbone.to(batch.tokens.device)(roles, *batch)


@torch.no_grad()
def logits(model, batch):
    """On the CPU, wherever the model is."""
    return model(input_ids=batch.tokens[:1].to(model.device)).logits.cpu()


def close(ours, expected):
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-5)


# --- errors ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_whole_trunks_cannot_be_trained_quantized(kind):
    spec = BackboneSpec("./no_such_folder", quantization=kind)
    with pytest.raises(ValueError, match=rf"quantization {kind} needs frozen trunks, .* trains 'actor', 'critic'"):
        read_stages(spec, LAYOUTS["full"])
    with pytest.raises(ValueError, match="trains 'trunk' as a whole"):
        read_stages(spec, supervised_layout(HYDRA, lora=False))


def test_bitsandbytes_is_not_installed(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find_spec(name))
    spec = BackboneSpec("./no_such_folder", lora=lora(), quantization="nf4")
    with pytest.raises(ImportError, match="quantization nf4 needs: pip install bitsandbytes"):
        read_stages(spec, supervised_layout(HYDRA, lora=True))


def test_no_cuda_device(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    spec = BackboneSpec("./no_such_folder", lora=lora(), quantization="int8")
    with pytest.raises(ValueError, match="quantization int8 needs a CUDA device, and this machine has none"):
        build_backbone(spec, supervised_layout(HYDRA, lora=True))


def test_dora_needs_nf4(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(room, "_device_is_there", lambda: True)
    spec = BackboneSpec("./no_such_folder", lora=lora(use_dora=True), quantization="int8")
    with pytest.raises(ValueError, match=r"lora.use_dora does not work with quantization int8; choose nf4"):
        read_stages(spec, supervised_layout(HYDRA, lora=True))


# --- quantized trunks -----------------------------------------------------------------


@pytest.mark.parametrize("family", WIDE)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_stay_plain(kind, tied, family, device, make_model, tmp_path, batch):
    plain = make_model(family, tie_word_embeddings=tied, **WIDE[family])
    plain.save_pretrained(tmp_path / "model")
    model = load_language_model(str(tmp_path / "model"), "float32", kind)
    head = model.get_output_embeddings()
    assert type(head) is nn.Linear
    assert head.weight.dtype == torch.float32
    assert (head.weight is model.get_input_embeddings().weight) == tied
    kinds = {p.dtype for p in model.parameters()}
    assert kinds == {torch.float32, torch.int8 if kind == "int8" else torch.uint8}
    coarse = {n: m for n, m in model.named_modules() if type(m).__module__.startswith("bitsandbytes")}
    for name, module in coarse.items():
        exact = plain.get_submodule(name).weight
        found = dequantize_module_weight(module).cpu().view(-1, exact.numel())
        exact = (exact.T if family == "gpt2" else exact).reshape(1, -1)
        assert 0 < (found - exact).norm() / exact.norm() < (0.02 if kind == "int8" else 0.12), name
    assert len(coarse) >= 2 * 4
    assert logits(model, batch).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_random_weights_are_quantized_as_a_folder_of_them_is(kind, device, tmp_path, batch):
    load_language_model("random:tiny").save_pretrained(tmp_path / "model")
    ours, theirs = (
        load_language_model("random:tiny", "float32", kind),
        load_language_model(str(tmp_path / "model"), "float32", kind),
    )
    assert torch.equal(logits(ours, batch), logits(theirs, batch))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("int8", lora()),
        ("int8", lora(use_rslora=True, ranks={"critic": 2})),
        ("nf4", lora(ranks={"critic": 2})),
        ("nf4", lora(use_dora=True)),
    ],
)
def test_training_leaves_the_quantized_trunk_bit_exact(kind, settings, dtype, checkpointing, device, wide, batch):
    spec = BackboneSpec(wide, dtype=dtype, lora=settings, quantization=kind)
    layout = LAYOUTS["hydra"].restricted_to(["actor", "critic", "reference"])
    backbone = build_backbone(spec, layout, gradient_checkpointing=checkpointing).to(device)
    before = {name: p.detach().clone() for name, p in backbone.named_parameters()}
    alone = logits(load_language_model(wide, dtype, kind), batch)
    parameters = dict(backbone.named_parameters())
    optimizer = torch.optim.AdamW([parameters[name] for name in backbone.trainable_names], lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        found = backbone(("actor", "critic"), *batch)
        (found["actor"].sum() + (found["critic"] - 1).square().sum()).backward()
        optimizer.step()
    with torch.no_grad(), backbone.use("reference") as model:
        assert torch.equal(logits(model, batch), alone)
    with torch.no_grad(), backbone.use("actor") as model:
        assert not torch.equal(logits(model, batch), alone)
    trainable = set(backbone.trainable_names)
    for name, p in backbone.named_parameters():
        assert torch.equal(p, before[name]) == (name not in trainable), name
        assert name not in trainable or p.dtype == torch.float32, name


@pytest.mark.parametrize("layout", ["lora", "dynamic_lora", "hydra"])
@pytest.mark.parametrize("kind", KINDS)
def test_quantized_stages_in_a_chain(kind, layout, device, wide, run_stage, batch):
    """Each stage starts exactly where the one before ended: earlier sets are kept beside the trunk."""
    spec = BackboneSpec(wide, lora=lora(3), quantization=kind)
    first, hydra_sft = run_stage("one", spec, supervised_layout(HYDRA, lora=True))
    ended = read(hydra_sft, ("actor", "reward"), batch)
    spec = BackboneSpec(wide, lora=lora(2), policy_checkpoint=first, quantization=kind)
    found = read(build_backbone(spec, LAYOUTS[layout]), ROLES, batch)
    for role, expected in (("reference", "actor"), ("actor", "actor"), ("reward", "reward")):
        assert torch.equal(found[role], ended[expected]), role
    second, ppo = run_stage("two", spec, LAYOUTS[layout], seed=4)
    assert torch.equal(read(ppo, ("reference",), batch)["reference"], ended["actor"])
    assert not any(".start." in name for name in ppo.trainable_names)
    assert [name for name, _ in ppo.named_parameters() if ".start." in name]
    third = BackboneSpec(wide, lora=lora(1), policy_checkpoint=second, reward_checkpoint=second, quantization=kind)
    again = build_backbone(third, LAYOUTS["dynamic_lora"])
    close(read(again, ("reference",), batch)["reference"], read(ppo, ("actor",), batch)["actor"])
    state = {key.removeprefix("backbone."): value for key, value in StageCheckpoint.read(second).state.items()}
    resumed = build_backbone(spec, LAYOUTS[layout])
    assert set(state) == set(resumed.trainable_names)
    resumed.load_state_dict(state, strict=False)
    ended = read(ppo, ROLES, batch)
    for role, value in read(resumed, ROLES, batch).items():
        assert torch.equal(value, ended[role]), role


@pytest.mark.parametrize("kind", KINDS)
def test_exports_of_a_quantized_stage(kind, device, wide, run_stage, tmp_path, batch):
    """The adapter is exact on the base model quantized alike; merged, it is added to the plain weights."""
    first, _ = run_stage("one", BackboneSpec(wide, lora=lora(3)), supervised_layout(HYDRA, lora=True))
    spec = BackboneSpec(wide, lora=lora(2, use_rslora=True), policy_checkpoint=first, quantization=kind)
    second, ppo = run_stage("two", spec, LAYOUTS["hydra"], seed=4)
    with torch.no_grad(), ppo.use("actor") as model:
        expected = logits(model, batch)
    stage = StageCheckpoint.read(second)
    stage.role_model("actor").as_peft().save_pretrained(str(tmp_path / "adapter"))
    alike = PeftModel.from_pretrained(load_language_model(wide, "float32", kind), str(tmp_path / "adapter")).eval()
    close(logits(alike, batch), expected)
    plain = PeftModel.from_pretrained(load_language_model(wide), str(tmp_path / "adapter")).eval()
    merged = stage.role_model("actor").merged()
    assert not any(p.dtype in (torch.int8, torch.uint8) for p in merged.parameters())
    close(logits(merged, batch), logits(plain, batch))


def test_fully_trained_start_is_quantized_itself(device, wide, run_stage, batch):
    first, sft = run_stage("one", BackboneSpec(wide), supervised_layout(HYDRA, lora=False))
    spec = BackboneSpec(wide, lora=lora(), policy_checkpoint=first, quantization="int8")
    backbone = build_backbone(spec, LAYOUTS["hydra"])
    assert not any(".start." in name for name, _ in backbone.named_parameters())
    found, ended = read(backbone, ROLES, batch), read(sft, ("actor", "reward"), batch)
    plain = build_backbone(BackboneSpec(wide), supervised_layout(HYDRA, lora=False))
    rounding = (found["reference"] - ended["actor"]).abs().max()
    assert 0 < rounding < 0.2 * (read(plain, ("actor",), batch)["actor"] - ended["actor"]).abs().max()


def test_pe_reads_the_reward_models_set_on_a_quantized_trunk(device, wide, run_stage, batch):
    sft, _ = run_stage(
        "sft", BackboneSpec(wide, lora=lora(3), quantization="nf4"), supervised_layout({"actor": "lm"}, True)
    )
    spec = BackboneSpec(wide, lora=lora(2), policy_checkpoint=sft, quantization="nf4")
    path, reward_model = run_stage("rm", spec, supervised_layout({"reward": "reward"}, lora=True), seed=3)
    spec = BackboneSpec(wide, lora=lora(), policy_checkpoint=sft, reward_checkpoint=path, quantization="nf4")
    found = read(build_backbone(spec, LAYOUTS["pe"]), ROLES, batch)
    assert torch.equal(found["reward"], read(reward_model, ("reward",), batch)["reward"])


def test_dora_on_top_of_an_earlier_set_is_refused(device, wide, run_stage):
    first, _ = run_stage("one", BackboneSpec(wide, lora=lora()), supervised_layout(HYDRA, lora=True))
    spec = BackboneSpec(wide, lora=lora(use_dora=True), policy_checkpoint=first, quantization="nf4")
    with pytest.raises(ValueError, match=r"DoRA adapter 'actor' needs plain weights.*--format merged"):
        build_backbone(spec, LAYOUTS["hydra"])


def test_a_dora_stage_can_be_continued(device, wide, run_stage, batch):
    spec = BackboneSpec(wide, lora=lora(use_dora=True), quantization="nf4")
    first, sft = run_stage("one", spec, supervised_layout(HYDRA, lora=True))
    spec = BackboneSpec(wide, lora=lora(), policy_checkpoint=first, quantization="nf4")
    found = read(build_backbone(spec, LAYOUTS["hydra"]), ROLES, batch)
    assert torch.equal(found["reference"], read(sft, ("actor",), batch)["actor"])
    assert torch.equal(found["actor"], found["reference"])


def test_bitsandbytes_says_each_thing_once(device, wide, batch, caplog):
    """It would repeat its note on 16-bit rounding in every pass of every layer."""
    model = load_language_model(wide, "bfloat16", "int8")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            logits(model, batch)
    assert len([r for r in caplog.records if "MatMul8bitLt" in r.message]) <= 1
