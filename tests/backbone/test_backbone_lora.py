"""LoRA settings as real choices: rsLoRA, DoRA, ranks of their own, targets; trained, switched, saved, exported."""

import copy

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from stage_helpers import HYDRA, ROLES, logits, read
from transformers import AutoModelForCausalLM

from lit_rlhf.backbone import (
    LAYOUTS,
    Backbone,
    BackboneSpec,
    LoraArgs,
    StageCheckpoint,
    build_backbone,
    load_language_model,
    make_record,
    read_spec,
    read_stages,
    supervised_layout,
)

KINDS = {
    "plain": LoraArgs(r=4, alpha=6),
    "rslora": LoraArgs(r=4, alpha=6, use_rslora=True),
    "dora": LoraArgs(r=4, alpha=6, use_dora=True),
    "rsdora": LoraArgs(r=4, alpha=6, use_rslora=True, use_dora=True),
    "ranks": LoraArgs(r=4, alpha=6, ranks={"critic": 2, "actor": 3}),
    "ranks_rslora": LoraArgs(r=4, alpha=6, ranks={"critic": 2}, use_rslora=True),
    "names": LoraArgs(r=4, alpha=6, target_modules=["q_proj", "down_proj"]),
    "path": LoraArgs(r=4, alpha=6, target_modules=["layers.1.mlp.up_proj", "v_proj"]),
    "regex": LoraArgs(r=4, alpha=6, target_modules=r".*\.(q_proj|up_proj)", use_dora=True, ranks={"actor": 2}),
}


def sft_kind(kind):
    """The same kind for a stage that trains the adapter `sft`."""
    settings = copy.deepcopy(KINDS[kind])
    settings.ranks = {"sft": 3} if settings.ranks else {}
    return settings


def close(ours, expected):
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-5)


def train(backbone, batch, steps=2, lr=0.05):
    """Take real optimizer steps on actor and critic."""
    parameters = dict(backbone.named_parameters())
    optimizer = torch.optim.AdamW([parameters[name] for name in backbone.trainable_names], lr=lr)
    weights = torch.linspace(0.5, 1.5, batch.mask.numel()).view_as(batch.mask)
    for _ in range(steps):
        optimizer.zero_grad()
        found = backbone(("actor", "critic"), *batch)
        ((found["actor"] * weights).sum() + ((found["critic"] - weights) * batch.mask).square().sum()).backward()
        optimizer.step()


# --- training and switching -----------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_off_stays_bit_exact_through_training(kind, dtype, make_model, make_backbone, batch):
    plain = make_model(dtype=dtype)
    backbone = make_backbone("hydra", model=plain, update=False, lora=KINDS[kind])
    inputs = {"input_ids": batch.tokens, "attention_mask": batch.attention_mask.long()}
    with torch.no_grad():
        expected = plain(**inputs).logits
        for role in ROLES:  # new sets change nothing at all
            with backbone.use(role) as model:
                assert torch.equal(model(**inputs).logits, expected), role
    started = {name: p.detach().clone() for name, p in backbone.named_parameters()}
    train(backbone, batch)
    with torch.no_grad(), backbone.use("reference") as model:
        assert torch.equal(model(**inputs).logits, expected)
    apart = []
    for role in ("actor", "critic"):
        with torch.no_grad(), backbone.use(role) as model:
            apart.append(model(**inputs).logits)
    assert not torch.equal(apart[0], expected)
    assert not torch.equal(apart[1], expected)
    assert not torch.equal(*apart)
    trainable = set(backbone.trainable_names)
    for name, p in backbone.named_parameters():
        assert torch.equal(p, started[name]) == (name not in trainable), name
        assert name not in trainable or p.dtype == torch.float32, name


@pytest.mark.parametrize("kind", ["plain", "ranks", "dora", "regex"])
def test_sets_have_their_settings(kind, make_backbone):
    settings = KINDS[kind]
    backbone = make_backbone("hydra", update=False, lora=settings)
    for layer in (m for m in backbone.modules() if isinstance(m, LoraLayer)):
        for name in ("actor", "critic"):
            rank = settings.ranks.get(name, 4)
            assert layer.r[name] == layer.lora_A[name].weight.shape[0] == rank
            assert layer.scaling[name] == pytest.approx(1.5)
            assert (name in layer.lora_magnitude_vector) == settings.use_dora
    magnitudes = [name for name in backbone.trainable_names if "lora_magnitude_vector" in name]
    assert bool(magnitudes) == settings.use_dora
    assert set(magnitudes) <= set(backbone.role_parameters("actor")) | set(backbone.role_parameters("critic"))


@pytest.mark.parametrize("kind", ["dora", "ranks_rslora"])
def test_checkpointing_changes_no_gradient(kind, make_model, make_backbone, batch):
    """Under gradient checkpointing, where the backward pass must see the set of the forward pass."""
    plain, found = make_model(), []
    for checkpointing in (False, True):
        lora = KINDS[kind]
        backbone = make_backbone("hydra", model=plain, lora=lora, gradient_checkpointing=checkpointing)
        read = backbone(ROLES, *batch)
        (read["actor"].sum() + read["critic"].square().sum()).backward()
        found.append({name: p.grad for name, p in backbone.named_parameters() if p.grad is not None})
    assert set(found[0]) == set(found[1]) == set(backbone.trainable_names)
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


# --- settings -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "name", "expected"),
    [
        ({}, "critic", (16, 32.0, 2.0)),
        ({"ranks": {"critic": 4}}, "critic", (4, 8.0, 2.0)),
        ({"ranks": {"critic": 4}}, "actor", (16, 32.0, 2.0)),
        ({"ranks": {"critic": 64}, "alpha": 8.0}, "critic", (64, 32.0, 0.5)),
        ({"use_rslora": True}, "critic", (16, 32.0, 8.0)),
        ({"use_rslora": True, "ranks": {"critic": 4}}, "critic", (4, 8.0, 4.0)),  # (32 / 16) * sqrt(4)
    ],
)
def test_settings_of_one_set(settings, name, expected):
    found = LoraArgs(**settings).for_adapter(name)
    assert (found.r, found.alpha, found.scaling) == expected
    assert found.ranks == {}


def test_rank_below_one():
    with pytest.raises(ValueError, match="the rank of 'critic' must be at least 1, got 0"):
        LoraArgs(ranks={"critic": 0})


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (LAYOUTS["hydra"], r"names 'critc', but the adapters trained here are 'actor', 'critic'$"),
        (LAYOUTS["hydra"].restricted_to(["actor", "reference"]), r"trained here are 'actor'$"),
        (LAYOUTS["pe"], r"trained here are 'actor', 'critic'$"),  # its set `reward` is only read
        (LAYOUTS["full"], r"trained here are none$"),
    ],
)
def test_rank_of_a_set_that_does_not_exist(layout, message):
    """Found before any model is loaded: the model's name is wrong too."""
    spec = BackboneSpec("./no_such_folder", lora=LoraArgs(ranks={"critc": 4}))
    for build in (read_stages, build_backbone):
        with pytest.raises(ValueError, match=message):
            build(spec, layout)


def test_rank_of_a_set_that_is_only_read():
    with pytest.raises(ValueError, match="names 'reward'"):
        read_stages(BackboneSpec("x", lora=LoraArgs(ranks={"reward": 4})), LAYOUTS["pe"])


@pytest.mark.parametrize(
    ("targets", "family", "message"),
    [
        (
            ["q_proj", "typo_proj"],
            "llama",
            r"no module is named 'typo_proj'; linear layers of LlamaForCausalLM: down_pr",
        ),
        (["typo", "q_proj", "v_prj"], "llama", r"named 'typo', 'v_prj'; .*q_proj, up_proj, v_proj"),
        (["q_proj"], "gpt2", r"named 'q_proj'; linear layers of GPT2LMHeadModel: c_attn, c_fc, c_proj"),
        (["layers.7.mlp.up_proj"], "llama", r"named 'layers.7.mlp.up_proj'"),
        ("q_proj", "llama", r"no module path matches the regular expression \(a list names modules\) 'q_proj'"),
        (r".*\.(q|v", "llama", r"is not a regular expression"),
        (["mlp"], "llama", r"LlamaMLP"),
    ],
)
def test_targets_that_do_not_exist(targets, family, message, make_model):
    model = make_model(family)
    with pytest.raises(ValueError, match=message):
        Backbone(LAYOUTS["hydra"], {"hydra": model}, LoraArgs(target_modules=targets))


def test_target_named_by_the_layout_of_another_family_is_found_before_training(base_model):
    spec = BackboneSpec(base_model, lora=LoraArgs(target_modules=["q_proj", "c_attn"]))
    with pytest.raises(ValueError, match="'c_attn'"):
        build_backbone(spec, supervised_layout(HYDRA, lora=True))


# --- saved, reloaded, exported --------------------------------------------------------


@pytest.fixture
def chain(run_stage, base_model):
    """Hydra-SFT with one kind, then a PPO-like stage with another (None: the first stage alone)."""

    def chain(first, second):
        settings = sft_kind(first)
        path, backbone = run_stage("one", BackboneSpec(base_model, lora=settings), supervised_layout(HYDRA, lora=True))
        if second is not None:
            spec = BackboneSpec(base_model, lora=KINDS[second], policy_checkpoint=path)
            path, backbone = run_stage("two", spec, LAYOUTS["hydra"], seed=4)
        return path, backbone

    return chain


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_gives_the_same_outputs_back(kind, chain, batch):
    path, backbone = chain("plain", kind)
    stage = StageCheckpoint.read(path)
    assert stage.spec.lora == KINDS[kind]
    again = build_backbone(stage.spec, stage.layout)
    state = {key.removeprefix("backbone."): value for key, value in stage.state.items()}
    assert set(state) == set(again.trainable_names) == set(backbone.trainable_names)
    again.load_state_dict(state, strict=False)
    ended, found = read(backbone, ROLES, batch), read(again, ROLES, batch)
    for role in ROLES:
        assert torch.equal(found[role], ended[role]), role
    assert (ended["actor"] - ended["reference"]).abs().max() > 0.05


@pytest.mark.parametrize("first", KINDS)
def test_later_stage_starts_where_the_earlier_ended(first, chain, base_model, batch):
    path, stage = chain(first, None)
    ended = read(stage, ("actor", "reward"), batch)
    spec = BackboneSpec(base_model, lora=KINDS["ranks"], policy_checkpoint=path)
    found = read(build_backbone(spec, LAYOUTS["hydra"]), ROLES, batch)
    for role, expected in (("reference", "actor"), ("actor", "actor"), ("reward", "reward")):
        close(found[role], ended[expected])


@pytest.mark.parametrize("role", ["actor", "critic"])
@pytest.mark.parametrize("first", ["plain", "dora"])
@pytest.mark.parametrize("kind", ["rsdora", "ranks_rslora", "regex"])
def test_merged_export_of_a_chain(kind, first, role, chain, batch):
    path, backbone = chain(first, kind)
    with torch.no_grad(), backbone.use(role) as model:
        expected = logits(model, batch)
    merged = StageCheckpoint.read(path).role_model(role).merged()
    assert not [name for name, _ in merged.named_parameters() if "lora" in name]
    close(logits(merged.eval(), batch), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("kind", ["plain", "rslora", "dora", "rsdora", "ranks"])
def test_peft_reads_the_export_alone(kind, family, make_model, run_stage, tmp_path, batch):
    """Without this package; with DoRA's magnitudes under PEFT's own key, and back."""
    make_model(family).save_pretrained(tmp_path / "other")
    base = str(tmp_path / "other")
    spec = BackboneSpec(base, lora=sft_kind(kind))
    path, backbone = run_stage("one", spec, supervised_layout(HYDRA, lora=True))
    with torch.no_grad(), backbone.use("actor") as model:
        expected = logits(model, batch)
    exported = StageCheckpoint.read(path).role_model("actor").as_peft()
    exported.save_pretrained(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(logits(again, batch), expected)
    config = again.peft_config["default"]
    assert (config.r, config.use_dora, config.use_rslora) == (
        spec.lora.for_adapter("sft").r,
        spec.lora.use_dora,
        spec.lora.use_rslora,
    )
    saved = dict(again.named_parameters())
    magnitudes = [name for name in saved if "lora_magnitude_vector" in name]
    assert bool(magnitudes) == spec.lora.use_dora
    for name in magnitudes:
        ours = name.replace(".default.weight", ".sft.weight")
        assert torch.equal(saved[name], dict(backbone.trunks["trunk"].named_parameters())[ours]), name


@pytest.mark.parametrize("kind", ["plain", "rslora", "ranks", "names"])
@pytest.mark.parametrize("first", ["plain", "ranks_rslora"])
def test_stacked_sets_export_as_one(first, kind, chain, base_model, tmp_path, batch):
    path, backbone = chain(first, kind)
    with torch.no_grad(), backbone.use("actor") as model:
        expected = logits(model, batch)
    StageCheckpoint.read(path).role_model("actor").as_peft().save_pretrained(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(load_language_model(base_model), str(tmp_path / "adapter")).eval()
    close(logits(again, batch), expected)


@pytest.mark.parametrize(("first", "second"), [("plain", "dora"), ("dora", "plain"), ("dora", "rsdora")])
def test_stacked_dora_has_no_single_adapter(first, second, chain, batch):
    path, backbone = chain(first, second)
    found = StageCheckpoint.read(path).role_model("actor")
    with pytest.raises(ValueError, match="export with `--format merged`"):
        found.as_peft()
    with torch.no_grad(), backbone.use("actor") as model:
        expected = logits(model, batch)
    close(logits(found.for_inference().eval(), batch), expected)


@pytest.mark.parametrize("kind", ["plain", "dora"])
def test_model_for_inference_keeps_a_single_adapter_apart(kind, chain, batch):
    path, backbone = chain(kind, None)
    model = StageCheckpoint.read(path).role_model("actor").for_inference()
    assert [name for name, _ in model.named_parameters() if "lora_A" in name]
    with torch.no_grad(), backbone.use("actor") as ours:
        assert torch.equal(logits(model, batch), logits(ours, batch))


def test_dora_merges_to_what_its_paper_says(chain, base_model, batch):
    """``m * (W + s B A) / |W + s B A|``, rows apart, in float64."""
    path, backbone = chain("dora", None)
    layers = backbone.language_model("trunk").named_modules()
    by_hand = load_language_model(base_model).double()
    weights = dict(by_hand.named_modules())
    for name, layer in layers:
        if isinstance(layer, LoraLayer):
            update = layer.lora_B["sft"].weight.double() @ layer.lora_A["sft"].weight.double()
            direction = weights[name].weight.data + 1.5 * update
            magnitude = layer.lora_magnitude_vector["sft"].weight.double()
            weights[name].weight.data = magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True)
    merged = StageCheckpoint.read(path).role_model("actor").merged()
    for name, p in merged.named_parameters():
        torch.testing.assert_close(p.double(), by_hand.get_parameter(name), atol=1e-6, rtol=1e-5)
    close(logits(merged, batch), logits(by_hand, batch).float())


def test_pe_reads_a_dora_reward_model_frozen(run_stage, base_model, batch):
    spec = BackboneSpec(base_model, lora=LoraArgs(r=4, use_dora=True, ranks={"sft": 2}))
    path, stage = run_stage("rm", spec, supervised_layout({"reward": "reward"}, lora=True))
    spec = BackboneSpec(base_model, lora=LoraArgs(r=3), reward_checkpoint=path)
    backbone = build_backbone(spec, LAYOUTS["pe"])
    assert torch.equal(read(backbone, ROLES, batch)["reward"], read(stage, ("reward",), batch)["reward"])
    assert not any(".reward." in name or "magnitude" in name for name in backbone.trainable_names)


# --- records of earlier versions ------------------------------------------------------


def test_records_without_the_newer_fields_still_load(chain, batch):
    path, backbone = chain("rslora", "plain")
    content = torch.load(path)
    saved = content["lit_rlhf"]["spec"]
    del saved["quantization"], saved["lora"]["use_dora"], saved["lora"]["ranks"]
    torch.save(content, path)
    stage = StageCheckpoint.read(path)
    assert stage.spec.lora == KINDS["plain"]
    with torch.no_grad(), backbone.use("actor") as model:
        close(logits(stage.role_model("actor").merged(), batch), logits(model, batch))
    record = make_record("x", read_spec(saved), stage.layout, [])["spec"]
    assert record["quantization"] is None
    assert record["lora"]["ranks"] == {}
