"""Every layout: trunks, adapters, passes, bytes; and what a malformed layout says."""

import copy
from collections import Counter

import pytest
import torch

from lit_rlhf.backbone import LAYOUTS, Backbone, Layout, LoraArgs, Role, Trunk, supervised_layout

ROLES = ("actor", "critic", "reference", "reward")
NO_CRITIC = ("actor", "reference", "reward")
# Trunks and adapters; then both without a critic.
TABLE = {
    "full": (4, 0, 3, 0),
    "lora": (4, 2, 3, 1),
    "dynamic_lora": (2, 2, 2, 1),
    "pe": (1, 3, 1, 2),
    "j_hydra": (1, 1, 1, 1),
    "hydra": (1, 2, 1, 1),
}
# Trunk passes that serve all roles, on which trunks.
PASSES = {
    "full": {"actor": 1, "critic": 1, "reference": 1, "reward": 1},
    "lora": {"sft": 1, "reward_model": 1, "reference": 1, "reward": 1},
    "dynamic_lora": {"sft": 2, "reward_model": 2},
    "pe": {"sft": 4},
    "j_hydra": {"hydra": 2},
    "hydra": {"hydra": 3},
}
LLAMA_LINEARS = {"q_proj": (32, 32), "k_proj": (32, 16), "v_proj": (32, 16), "o_proj": (32, 32)} | {
    "gate_proj": (32, 48), "up_proj": (32, 48), "down_proj": (48, 32)
}  # fmt: skip
LAYERS = 2


def lora_bytes(r):
    return 4 * LAYERS * sum(r * (inputs + outputs) for inputs, outputs in LLAMA_LINEARS.values())


HEAD_BYTES = 4 * (32 + 1)


def sets_of(layout):
    return {(role.trunk, role.adapter) for role in layout.roles.values() if role.adapter is not None}


def test_the_table_is_complete():
    assert set(LAYOUTS) == set(TABLE)
    for name, layout in LAYOUTS.items():
        assert tuple(layout.roles) == ROLES, name


@pytest.mark.parametrize("name", TABLE)
def test_trunks_and_adapters_are_those_of_the_table(name):
    layout, bare = LAYOUTS[name], LAYOUTS[name].restricted_to(NO_CRITIC)
    assert (len(layout.trunks), len(sets_of(layout)), len(bare.trunks), len(sets_of(bare))) == TABLE[name]
    assert {role: where.head for role, where in layout.roles.items()} == {
        "actor": "lm", "critic": "value", "reference": "lm", "reward": "reward"
    }  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_each_distinct_trunk_and_set_costs_one_pass(name, make_backbone, batch):
    backbone = make_backbone(name)
    calls = Counter()
    for trunk in backbone.trunks:
        hook = lambda *_, trunk=trunk: calls.update([trunk])  # noqa: E731
        backbone.language_model(trunk).base_model.register_forward_pre_hook(hook)
    with torch.no_grad():
        together = backbone(ROLES, *batch)
    assert calls == PASSES[name]
    assert len(backbone.passes(ROLES)) == sum(PASSES[name].values())
    with torch.no_grad():
        alone = {role: backbone((role,), *batch)[role] for role in ROLES}
    for role in ROLES:
        assert torch.equal(together[role], alone[role]), role
    if name == "hydra":
        calls.clear()
        backbone(("reference", "reward"), *batch)
        assert calls == {"hydra": 1}


def test_every_distinct_role_reads_something_of_its_own(make_backbone, batch):
    """In `pe` no two roles share a set; a switch that is not thrown would make two of them equal."""
    backbone = make_backbone("pe")
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if ".reward." in name and "lora_B" in name:
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    layout = Layout(
        {f"{name}_lm": Role("sft", role.adapter, "lm") for name, role in backbone.layout.roles.items()},
        {"sft": Trunk()},
    )
    backbone.layout = layout
    read = backbone(list(layout.roles), *batch)
    for first in layout.roles:
        for second in layout.roles:
            if first != second:
                assert (read[first] - read[second]).abs().max() > 1e-3, (first, second)


@pytest.mark.parametrize("name", TABLE)
def test_trainables_are_listed_by_name(name, make_backbone):
    expected = {
        "full": {("actor", None), ("critic", None)},
        "lora": {("sft", "actor"), ("reward_model", "critic")},
        "dynamic_lora": {("sft", "actor"), ("reward_model", "critic")},
        "pe": {("sft", "actor"), ("sft", "critic")},
        "j_hydra": {("hydra", "shared")},
        "hydra": {("hydra", "actor"), ("hydra", "critic")},
    }[name]
    backbone = make_backbone(name)
    found = {"heads.value.weight", "heads.value.bias"}
    for trunk, adapter in expected:
        prefix = f"trunks.{trunk}."
        if adapter is None:
            found |= {prefix + key for key, _ in backbone.trunks[trunk].named_parameters()}
        else:
            for layer in range(LAYERS):
                for module in LLAMA_LINEARS:
                    part = "self_attn" if module[0] in "qkvo" else "mlp"
                    where = f"{prefix}base_model.model.model.layers.{layer}.{part}.{module}"
                    found |= {f"{where}.lora_{half}.{adapter}.weight" for half in "AB"}
    assert set(backbone.trainable_names) == found
    assert len(backbone.trainable_names) == len(found)
    assert {key for key, p in backbone.named_parameters() if p.requires_grad} == found


def test_role_parameters_are_what_the_role_reads(make_backbone, batch):
    """By gradient: exactly the listed parameters receive one."""
    for name in TABLE:
        for role in ROLES:
            backbone = make_backbone(name)
            read = backbone((role,), *batch)[role]
            if read.requires_grad:
                read.sum().backward()
            reached = {key for key, p in backbone.named_parameters() if p.grad is not None}
            assert set(backbone.role_parameters(role)) == reached, (name, role)


def test_hydra_holds_one_trunk_two_sets_and_two_heads(make_model, make_backbone, storage_bytes):
    plain = make_model()
    trunk = storage_bytes(plain)
    assert trunk == 4 * sum(p.numel() for p in plain.parameters()) + sum(
        b.untyped_storage().nbytes() for b in {b.data_ptr(): b for b in plain.buffers()}.values()
    )
    for r in (2, 8):
        backbone = make_backbone("hydra", model=plain, lora=LoraArgs(r=r))
        assert storage_bytes(backbone) == trunk + 2 * lora_bytes(r) + 2 * HEAD_BYTES


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("tied", [False, True])
def test_bytes_of_every_layout(name, tied, make_model, make_backbone, storage_bytes):
    plain = make_model(tie_word_embeddings=tied)
    trunk, output_embedding = storage_bytes(plain), 0 if tied else 4 * 128 * 32
    backbone = make_backbone(name, model=plain, lora=LoraArgs(r=4))
    trunks, sets = TABLE[name][:2]
    # Trunks that only scalar heads read drop their output embedding, unless it is the input embedding.
    scalar = {"full": 2, "lora": 2, "dynamic_lora": 1}.get(name, 0)
    expected = trunks * trunk - scalar * output_embedding + sets * lora_bytes(4) + 2 * HEAD_BYTES
    assert storage_bytes(backbone) == expected


@pytest.mark.parametrize("name", TABLE)
def test_adamw_state_belongs_to_trainables_only(name, make_backbone, batch):
    backbone = make_backbone(name)
    before = {key: p.detach().clone() for key, p in backbone.named_parameters()}
    optimizer = torch.optim.AdamW(backbone.parameters(), lr=0.01, weight_decay=0.1)
    read = backbone(("actor", "critic"), *batch)
    (read["actor"].sum() + read["critic"].sum()).backward()
    optimizer.step()
    trainable = {key: p for key, p in backbone.named_parameters() if key in set(backbone.trainable_names)}
    stepped = [p for p in trainable.values() if p.grad is not None]
    # The actor's full trunk and the critic's both get gradients everywhere; so do adapters and value head.
    assert len(stepped) == len(trainable)
    moments = [v for state in optimizer.state.values() for key, v in state.items() if key != "step"]
    assert sum(v.nbytes for v in moments) == 2 * sum(p.nbytes for p in trainable.values())
    for key, p in backbone.named_parameters():
        assert torch.equal(p, before[key]) == (key not in trainable), key


def test_restricted_layout_drops_what_nobody_reads(make_backbone):
    layout = LAYOUTS["pe"].restricted_to(["actor", "reference"])
    assert layout.loaded_adapters == frozenset()
    assert layout.trained_heads == frozenset()
    backbone = make_backbone(layout)
    assert list(backbone.heads) == []
    assert backbone.layout.adapters("sft") == ["actor"]
    assert all(".actor." in name for name in backbone.trainable_names)
    with pytest.raises(KeyError, match="judge"):
        layout.restricted_to(["judge"])


def test_layout_refuses_trunks_that_do_not_match_its_roles():
    with pytest.raises(ValueError, match=r"use the trunks \['a'\], but trunks lists \['a', 'b'\]"):
        Layout({"actor": Role("a", None, "lm")}, {"a": Trunk(), "b": Trunk()})
    with pytest.raises(ValueError, match=r"trunks lists \[\]"):
        Layout({"actor": Role("a", None, "lm")}, {})


def test_layout_refuses_lora_on_a_trained_trunk():
    with pytest.raises(ValueError, match="'actor' puts adapter 'x' on a trained trunk"):
        Layout({"actor": Role("a", "x", "lm")}, {"a": Trunk(trained=True)})


def test_layouts_are_frozen():
    with pytest.raises(AttributeError):
        LAYOUTS["hydra"].loaded_adapters = frozenset({"actor"})


@pytest.mark.parametrize("lora", [True, False])
def test_supervised_layout_is_one_trunk_read_in_one_pass(lora, make_backbone, batch):
    layout = supervised_layout({"actor": "lm", "reward": "reward"}, lora)
    backbone = make_backbone(layout)
    assert len(backbone.passes(["actor", "reward"])) == 1
    assert {"heads.reward.weight", "heads.reward.bias"} <= set(backbone.trainable_names)
    in_trunk = [name for name in backbone.trainable_names if name.startswith("trunks.")]
    assert in_trunk
    assert all(".lora_" in name for name in in_trunk) is lora
    read = backbone(("actor", "reward"), *batch)
    (read["actor"].sum() + read["reward"].sum()).backward()
    assert {name for name, p in backbone.named_parameters() if p.grad is not None} == set(backbone.trainable_names)


def test_lora_layout_without_lora_settings_says_so(make_model):
    with pytest.raises(ValueError, match="trains adapter 'actor', but no lora settings"):
        Backbone(LAYOUTS["hydra"], {"hydra": make_model()})


def test_a_seventh_layout_is_one_table_entry(make_model, make_backbone, batch):
    """Two policies on one trunk, one of them with two heads."""
    layout = Layout(
        {"actor": Role("t", "a", "lm"), "rival": Role("t", "b", "lm"), "critic": Role("t", "a", "value")},
        {"t": Trunk()},
    )
    backbone = make_backbone(layout)
    read = backbone(("actor", "rival", "critic"), *batch)
    assert set(read) == {"actor", "rival", "critic"}
    assert not torch.equal(read["actor"], read["rival"])
    assert backbone.passes(("actor", "rival", "critic")) == {
        ("t", "a"): ["actor", "critic"],
        ("t", "b"): ["rival"],
    }


def test_trunks_of_a_layout_are_independent(make_model):
    model = make_model()
    layout = LAYOUTS["full"]
    backbone = Backbone(layout, {name: copy.deepcopy(model) for name in layout.trunks})
    pointers = [p.data_ptr() for p in backbone.parameters()]
    assert len(pointers) == len(set(pointers))
