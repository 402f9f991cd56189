"""Switching adapters: exact when off, flags untouched, restored on errors, seen by recomputation."""

import copy
from contextlib import nullcontext

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import GenerationConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from lit_rlhf.backbone import AdapterSwitch, LoraArgs

ROLES = ("actor", "critic", "reference", "reward")


def state_of(backbone):
    return [(m._active_adapter, m._disable_adapters) for m in backbone.modules() if isinstance(m, BaseTunerLayer)]


def flags_of(backbone):
    return {name: p.requires_grad for name, p in backbone.named_parameters()}


def gradients(backbone, batch, roles=("actor", "critic")):
    backbone.zero_grad()
    read = backbone(roles, *batch)
    weights = torch.linspace(0.5, 1.5, batch.mask.numel()).view_as(batch.mask)
    sum((read[role] * weights).square().sum() for role in roles).backward()
    return {name: p.grad.clone() for name, p in backbone.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("layout", ["hydra", "j_hydra", "dynamic_lora", "pe"])
def test_lora_off_is_bit_exact_after_updates(layout, family, dtype, make_model, make_backbone, randomize, batch):
    plain = make_model(family, dtype)
    backbone = make_backbone(layout, model=plain)
    lm, trunk = copy.deepcopy(plain), backbone.layout.roles["reference"].trunk
    inputs = {"input_ids": batch.tokens, "attention_mask": batch.attention_mask.long()}
    for seed in range(3):
        randomize(backbone, seed, scale=0.5)
        backbone(ROLES, *batch)
        with torch.no_grad(), backbone.use("reference") as model:
            assert torch.equal(model(**inputs).logits, lm(**inputs).logits)
            hidden = lm.base_model(**inputs, use_cache=False).last_hidden_state
            assert torch.equal(model.base_model(**inputs, use_cache=False).last_hidden_state, hidden)
    with torch.no_grad(), backbone.use("actor") as model:
        assert not torch.equal(model(**inputs).logits, lm(**inputs).logits)
    base = {k: v for k, v in backbone.language_model(trunk).state_dict().items() if "lora_" not in k}
    for key, value in plain.state_dict().items():
        found = base.get(key, base.get(f"{key.rpartition('.')[0]}.base_layer.{key.rpartition('.')[2]}"))
        assert torch.equal(found, value), key


@pytest.mark.parametrize("layout", ["full", "lora", "dynamic_lora", "pe", "j_hydra", "hydra"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_reading_never_touches_flags_or_switch_state(layout, checkpointing, make_backbone, batch):
    backbone = make_backbone(layout, gradient_checkpointing=checkpointing)
    flags, state = flags_of(backbone), state_of(backbone)
    for roles in (ROLES, ("reference",), ("critic", "actor")):
        backbone(roles, *batch)
        assert flags_of(backbone) == flags
    gradients(backbone, batch)
    for role in ROLES:
        with backbone.use(role):
            assert flags_of(backbone) == flags
    assert flags_of(backbone) == flags
    assert state_of(backbone) == state
    assert not any(module.training for module in backbone.modules())


def test_state_comes_back_on_exceptions(make_backbone):
    backbone = make_backbone("hydra", gradient_checkpointing=True)
    before = state_of(backbone)
    for role in ROLES:
        with pytest.raises(RuntimeError, match="boom"), backbone.use(role):
            raise RuntimeError("boom")
        assert state_of(backbone) == before


def test_state_and_eval_mode_come_back_when_a_forward_pass_fails(make_backbone, batch):
    backbone = make_backbone("hydra", gradient_checkpointing=True)
    before = state_of(backbone)

    def fail(*_):
        raise RuntimeError("out of memory, say")

    handle = backbone.language_model("hydra").base_model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        backbone(("critic",), *batch)
    handle.remove()
    assert state_of(backbone) == before
    assert not any(module.training for module in backbone.modules())
    backbone(("critic",), *batch)


def test_uses_nest(make_backbone):
    backbone = make_backbone("hydra")
    layer = next(m for m in backbone.modules() if isinstance(m, BaseTunerLayer))
    with backbone.use("actor"):
        with backbone.use("reference"):
            assert layer._disable_adapters
            with backbone.use("critic"):
                assert (layer._active_adapter, layer._disable_adapters) == (["critic"], False)
            assert layer._disable_adapters
        assert (layer._active_adapter, layer._disable_adapters) == (["actor"], False)


def test_switch_on_a_plain_model_is_lora_off(make_model):
    model = make_model()
    with AdapterSwitch(model).use(None):
        model(torch.arange(8).unsqueeze(0))


def invert(backbone):
    """Freeze what is trained and train what is frozen."""
    for parameter in backbone.parameters():
        parameter.requires_grad_(not parameter.requires_grad)


def leave_disable_adapter(backbone):
    with backbone.trunks["hydra"].disable_adapter():
        pass


SPOILERS = {
    "by hand": invert,
    "set_adapter": lambda backbone: backbone.trunks["hydra"].set_adapter("actor"),
    "set_adapter_inference": lambda backbone: backbone.trunks["hydra"].set_adapter("critic", inference_mode=True),
    "disable_adapter": leave_disable_adapter,
}


@pytest.mark.parametrize("spoil", SPOILERS)
def test_freeze_repairs_what_was_done_to_the_flags(spoil, make_backbone):
    """PEFT's own switches write them: leaving its disable_adapter() can freeze the critic for good."""
    backbone = make_backbone("hydra")
    flags = flags_of(backbone)
    SPOILERS[spoil](backbone)
    # Which flags PEFT changes is its own affair, and may become none.
    assert spoil != "by hand" or flags_of(backbone) != flags
    backbone.freeze()
    assert flags_of(backbone) == flags


def test_train_keeps_eval_mode_also_through_a_parent(make_backbone):
    backbone = make_backbone("hydra", "gpt2", gradient_checkpointing=True)
    parent = nn.ModuleDict({"backbone": backbone})
    parent.train()
    assert parent.training
    assert not any(module.training for module in backbone.modules())
    assert backbone.train() is backbone


# --- gradient checkpointing -----------------------------------------------------------

CASES = [
    (layout, family)
    for layout in ("hydra", "j_hydra", "full", "pe")
    for family in ("llama", "gpt2", "opt", "gpt_neox", "qwen3")
]  # fmt: skip


@pytest.mark.parametrize(("layout", "family"), CASES)
def test_checkpointing_changes_neither_values_nor_gradients(layout, family, make_model, make_backbone, batch):
    plain = make_model(family)
    off = make_backbone(layout, model=plain)
    on = make_backbone(layout, model=plain, gradient_checkpointing=True)
    # (Both sets in one joint loss; GPT-2 and OPT come with dropout 0.1.)
    with torch.no_grad():
        frozen = on(ROLES, *batch)
    read_off, read_on = off(ROLES, *batch), on(ROLES, *batch)
    for role in ROLES:
        assert torch.equal(read_on[role], read_off[role]), role
        assert torch.equal(read_on[role], frozen[role]), role
    expected, found = gradients(off, batch), gradients(on, batch)
    assert set(found) == set(expected) == set(off.trainable_names)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-5)
        assert gradient.abs().max() > 0, name


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "falcon"])
def test_layers_are_really_recomputed(family, make_backbone, batch):
    def layer_passes(checkpointing, grad=True):
        backbone = make_backbone("hydra", family, gradient_checkpointing=checkpointing)
        layers = [m for m in backbone.modules() if isinstance(m, GradientCheckpointingLayer)]
        assert len(layers) == 2
        calls = []
        for layer in layers:
            # A child's hook: the layer's own would miss that the layer ran inside the checkpoint.
            inner = next(child for child in layer.children() if not list(child.children()))
            inner.register_forward_hook(lambda *_: calls.append(1))
        if grad:
            gradients(backbone, batch)
        else:
            with torch.no_grad():
                backbone(("actor", "critic"), *batch)
        return len(calls)

    plain = layer_passes(False)
    assert plain in (4, 8)  # two roles, two layers (some inner modules run twice a layer)
    assert layer_passes(True) == 2 * plain
    assert layer_passes(True, grad=False) == plain


def test_gradients_are_wrong_without_our_checkpoint_context(make_model, make_backbone, batch, monkeypatch):
    """Recomputation under whichever set is on at backward: no error, wrong gradients. So the comparison can fail."""
    plain = make_model()
    expected = gradients(make_backbone("hydra", model=plain), batch)
    monkeypatch.setattr(AdapterSwitch, "checkpoint_context", lambda self: (nullcontext(), nullcontext()))
    naive = gradients(make_backbone("hydra", model=plain, gradient_checkpointing=True), batch)
    wrong = [n for n, g in expected.items() if n not in naive or not torch.allclose(naive[n], g, atol=1e-4, rtol=1e-3)]
    assert any("lora_" in name for name in wrong)


def test_checkpointed_gradients_ignore_the_set_that_is_on_at_backward(make_model, make_backbone, batch):
    plain = make_model()
    expected = gradients(make_backbone("hydra", model=plain), batch)
    backbone = make_backbone("hydra", model=plain, gradient_checkpointing=True)
    weights = torch.linspace(0.5, 1.5, batch.mask.numel()).view_as(batch.mask)
    for during in ROLES:
        backbone.zero_grad()
        read = backbone(("actor", "critic"), *batch)
        with backbone.use(during):
            before = state_of(backbone)
            sum((value * weights).square().sum() for value in read.values()).backward()
            assert state_of(backbone) == before
        for name, gradient in expected.items():
            torch.testing.assert_close(dict(backbone.named_parameters())[name].grad, gradient, atol=1e-6, rtol=1e-5)


def test_checkpointed_graph_can_be_walked_twice(make_model, make_backbone, batch):
    """For gradients of actor and critic apart, or any other use of retain_graph."""
    plain = make_model()

    def walk(checkpointing):
        backbone = make_backbone("hydra", model=plain, gradient_checkpointing=checkpointing)
        loss = sum(value.square().sum() for value in backbone(("actor", "critic"), *batch).values())
        parameters = [p for p in backbone.parameters() if p.requires_grad]
        first = torch.autograd.grad(loss, parameters, retain_graph=True)
        return first, torch.autograd.grad(loss, parameters)

    expected, _ = walk(False)
    first, second = walk(True)
    for a, b, c in zip(expected, first, second, strict=True):
        torch.testing.assert_close(b, a, atol=1e-6, rtol=1e-5)
        assert torch.equal(b, c)


@pytest.mark.parametrize(
    ("family", "dropouts"),
    [
        ("gpt2", ["attn_pdrop", "resid_pdrop", "embd_pdrop"]),
        ("opt", ["dropout", "attention_dropout", "layerdrop"]),
        ("falcon", ["hidden_dropout", "attention_dropout"]),
        ("gpt_neox", ["hidden_dropout", "attention_dropout"]),
    ],
)
def test_no_dropout_under_checkpointing(family, dropouts, make_model, make_backbone, batch):
    """A layer that is put in train mode to be checkpointed, and reads its own mode, drops activations."""
    heavy = make_model(family, **dict.fromkeys(dropouts, 0.5))
    expected = make_backbone("hydra", model=make_model(family, **dict.fromkeys(dropouts, 0.0)))(ROLES, *batch)
    read = make_backbone("hydra", model=heavy, gradient_checkpointing=True)(ROLES, *batch)
    for role in ROLES:
        assert torch.equal(read[role], expected[role]), role


# --- generation -----------------------------------------------------------------------


def greedy(model, batch, **kwargs):
    config = GenerationConfig(do_sample=False, max_new_tokens=6, pad_token_id=2, eos_token_id=2, **kwargs)
    prompt, mask = batch.tokens[:, :6], batch.attention_mask[:, :6].long()
    return model.generate(input_ids=prompt, attention_mask=mask, generation_config=config)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_generation_is_the_same_with_checkpointing(family, make_model, make_backbone, merged_by_hand, batch):
    """Older releases of transformers drop the KV cache of a checkpointed layer in train mode; ours keep eval mode."""
    plain = make_model(family)
    off = make_backbone("hydra", model=plain)
    on = make_backbone("hydra", model=plain, gradient_checkpointing=True)
    nn.ModuleList([on]).train()
    by_hand = greedy(merged_by_hand(plain, off, "hydra", "actor").float(), batch)
    with off.use("actor") as first, on.use("actor") as second:
        assert torch.equal(greedy(first, batch), by_hand)
        assert torch.equal(greedy(second, batch), by_hand)
    with on.use("reference") as reference:
        assert not torch.equal(greedy(reference, batch), by_hand)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_generation_differs_where_train_is_not_ours(checkpointing, make_model, make_backbone, batch, monkeypatch):
    """Our ``train`` keeps eval mode; with PyTorch's in its place dropout acts. So the test above can fail."""
    model = make_model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    backbone = make_backbone("hydra", model=model, gradient_checkpointing=checkpointing)
    with backbone.use("actor") as actor:
        right = greedy(actor, batch)
        nn.ModuleList([backbone]).train()
        assert torch.equal(greedy(actor, batch), right)
        monkeypatch.setattr(type(backbone), "train", nn.Module.train)
        nn.ModuleList([backbone]).train()
        torch.manual_seed(0)
        assert not torch.equal(greedy(actor, batch), right)


def test_sampling_settings_of_the_hub_do_not_leak_but_eos_is_kept(make_model, make_backbone):
    model = make_model()
    leak = GenerationConfig(top_k=5, repetition_penalty=1.5, min_p=0.3, eos_token_id=[2, 7], suppress_tokens=[9])
    model.generation_config = leak
    backbone = make_backbone("dynamic_lora", model=model)
    assert backbone.eos_token_ids == [2, 7]
    for trunk in backbone.trunks:
        left = backbone.language_model(trunk).generation_config
        assert (left.repetition_penalty, left.min_p, left.suppress_tokens, left.eos_token_id) == (None,) * 4
        assert left.top_k != 5


# --- LoRA settings --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "lora.r must be at least 1, got 0"),
        ({"r": -3}, "got -3"),
        ({"alpha": 0.0}, "lora.alpha must be positive"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"target_modules": ""}, "target_modules is empty"),
    ],
)
def test_lora_settings_are_validated(settings, message):
    with pytest.raises(ValueError, match=message):
        LoraArgs(**settings)


def test_targets_that_match_nothing_are_named(make_backbone):
    with pytest.raises(ValueError, match=r"no module is named 'no_such_layer'"):
        make_backbone("hydra", lora=LoraArgs(target_modules=["no_such_layer"]))


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}),
        (r".*\.self_attn\..*_proj", {"q_proj", "k_proj", "v_proj", "o_proj"}),
    ],
)
def test_targets(targets, expected, make_backbone):
    backbone = make_backbone("hydra", lora=LoraArgs(r=2, target_modules=targets))
    adapted = {name.rsplit(".", 4)[1] for name in backbone.trainable_names if ".lora_A." in name}
    assert adapted == expected


def test_lora_on_the_input_embedding_is_refused(make_backbone):
    """Its tensors have other names (lora_embedding_A): a checkpoint would lose them."""
    with pytest.raises(ValueError, match="embed_tokens"):
        make_backbone("hydra", lora=LoraArgs(r=2, target_modules=["embed_tokens", "q_proj"]))


@pytest.mark.parametrize("rslora", [False, True])
def test_scaling_and_dropout(rslora, make_backbone):
    backbone = make_backbone("hydra", lora=LoraArgs(r=4, alpha=6, use_rslora=rslora))
    layer = next(m for m in backbone.modules() if isinstance(m, BaseTunerLayer))
    assert layer.scaling == {"actor": 3.0 if rslora else 1.5, "critic": 3.0 if rslora else 1.5}
    assert not [m for m in layer.modules() if isinstance(m, nn.Dropout)]


def test_sets_start_at_zero_and_the_same_everywhere(make_model, make_backbone, batch):
    plain = make_model()
    torch.manual_seed(1)
    first = make_backbone("hydra", model=plain, update=False)
    torch.manual_seed(2)
    second = make_backbone("hydra", model=plain, update=False)
    for (name, ours), (_, theirs) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    read = first(("actor", "reference"), *batch)
    torch.testing.assert_close(read["actor"], read["reference"], atol=0, rtol=0)
