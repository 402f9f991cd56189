"""Layouts of one's own: found by import path, validated, trained, saved as data."""

import pytest
import torch
from stage_helpers import HYDRA, read

from lit_rlhf.backbone import (
    LAYOUTS,
    BackboneSpec,
    Layout,
    LoraArgs,
    Role,
    StageCheckpoint,
    Trunk,
    build_backbone,
    find_layout,
    read_stages,
    supervised_layout,
)

# The actor's trunk is trained as a whole, the critic is an adapter on the frozen start, which is also the reference.
SPLIT = """
from lit_rlhf.backbone import Layout, Role, Trunk

SPLIT = Layout(
    roles={
        "actor": Role("own", None, "lm"),
        "critic": Role("frozen", "critic", "value"),
        "reference": Role("frozen", None, "lm"),
        "reward": Role("frozen", None, "reward"),
    },
    trunks={"own": Trunk("policy", trained=True), "frozen": Trunk("policy")},
)
NUMBER = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module of layouts in a folder on sys.path; return its name."""

    def module(name, text):
        folder = tmp_path / "modules"
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / f"{name}.py").write_text(text)
        monkeypatch.syspath_prepend(folder)
        return name

    return module


@pytest.mark.parametrize("name", LAYOUTS)
def test_names_of_the_table(name):
    layout = find_layout(name)
    assert layout is LAYOUTS[name]
    assert layout.trains_lora == (name != "full")


@pytest.mark.parametrize(
    ("layout", "trained"),
    [
        (LAYOUTS["full"], []),
        (LAYOUTS["pe"], ["actor", "critic"]),
        (LAYOUTS["j_hydra"], ["shared"]),
        (LAYOUTS["pe"].restricted_to(["reference", "reward"]), []),
        (supervised_layout(HYDRA, lora=True), ["sft"]),
        (supervised_layout(HYDRA, lora=False), []),
    ],
)
def test_trained_sets(layout, trained):
    assert layout.trained_adapters == trained
    assert layout.trains_lora == bool(trained)


def test_import_path(module):
    module("layouts_one", SPLIT)
    layout = find_layout("layouts_one.SPLIT")
    assert layout.trains_lora
    assert (layout.trained_adapters, layout.trained_trunks) == (["critic"], ["own"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "hydraa",
            r"must be one of full, lora, dynamic_lora, pe, j_hydra, hydra, or the import path of .*got 'hydraa'",
        ),
        ("", "got ''"),
        (".SPLIT", r"got '\.SPLIT'"),
        ("no_such_module.SPLIT", "layout 'no_such_module.SPLIT': no module named 'no_such_module'"),
        ("layouts_two.sub.SPLIT", "no module named 'layouts_two.sub'"),
        ("layouts_two.SPLITT", r"module layouts_two has no 'SPLITT'; its layouts are \['SPLIT'\]"),
        ("layouts_two.NUMBER", "layout 'layouts_two.NUMBER' must be a Layout, got int"),
        ("layouts_two.Layout", "must be a Layout, got type"),
    ],
)
def test_what_is_no_layout(name, message, module):
    module("layouts_two", SPLIT)
    with pytest.raises(ValueError, match=message):
        find_layout(name)


def test_a_module_whose_own_import_fails_says_so(module):
    module("layouts_three", "import no_such_dependency\n" + SPLIT)
    with pytest.raises(ModuleNotFoundError, match="No module named 'no_such_dependency'"):
        find_layout("layouts_three.SPLIT")


def actor(**changes):
    return {"actor": Role("a", None, "lm"), **{n: Role(*r) for n, r in changes.items()}}


@pytest.mark.parametrize(
    ("roles", "trunks", "options", "message"),
    [
        ({}, {}, {}, "it has no roles"),
        ({"actor": ("a", None, "lm")}, {"a": Trunk()}, {}, "role 'actor' must be a Role, got tuple"),
        (actor(), {"a": "policy"}, {}, "trunk 'a' must be a Trunk, got str"),
        (
            actor(critic=("b", "c", "value")),
            {"a": Trunk()},
            {},
            r"use the trunks \['a', 'b'\], but trunks lists \['a'\]",
        ),
        (
            actor(judge=("a", None, "vaule")),
            {"a": Trunk()},
            {},
            "'judge' has head 'vaule'; heads are lm, reward, value",
        ),
        (actor(critic=("a", "c", "reward")), {"a": Trunk()}, {}, "role 'critic' must have head 'value', not 'reward'"),
        ({"actor": Role("a", None, "value")}, {"a": Trunk()}, {}, "role 'actor' must have head 'lm', not 'value'"),
        (actor(), {"a": Trunk("polcy")}, {}, "trunk 'a' starts from 'polcy'; artifacts are policy, reward"),
        (actor(), {"a": Trunk()}, {"trained_heads": frozenset({"lm"})}, r"trained_heads lists \['lm'\]"),
        (
            actor(),
            {"a": Trunk()},
            {"loaded_adapters": frozenset({"r"})},
            r"loaded_adapters lists \['r'\], which no role",
        ),
        (actor(rival=("a", "my.set", "lm")), {"a": Trunk()}, {}, r"adapter name 'my\.set' must be letters"),
        (actor(rival=("a", "lora_x", "lm")), {"a": Trunk()}, {}, "not begin with 'lora_'"),
        (actor(rival=("a", "start", "lm")), {"a": Trunk()}, {}, "an adapter cannot be called 'start'"),
        ({"actor": Role("a b", None, "lm")}, {"a b": Trunk()}, {}, "trunk name 'a b' must be letters"),
        (actor(rival=("a", "x", "lm")), {"a": Trunk(trained=True)}, {}, "'rival' puts adapter 'x' on a trained trunk"),
        (
            actor(reference=("a", None, "lm")),
            {"a": Trunk(trained=True)},
            {},
            "role 'reference' uses weights that are tr",
        ),
        (actor(reference=("a", "x", "lm")), {"a": Trunk()}, {}, "role 'reference' uses weights that are trained"),
        (
            actor(reward=("a", "x", "reward")),
            {"a": Trunk()},
            {},
            "role 'reward' uses a fixed head on weights that are",
        ),
        (
            actor(reward=("b", "r", "reward")),
            {"a": Trunk(), "b": Trunk("reward")},
            {"loaded_adapters": frozenset({"r"})},
            "starts from the reward model and holds it already",
        ),
    ],
)
def test_layouts_that_contradict_themselves(roles, trunks, options, message):
    with pytest.raises(ValueError, match=message):
        Layout(roles, trunks, **options)


def test_everything_wrong_is_listed():
    with pytest.raises(ValueError, match=r"'critic' must have head(.|\n)*artifacts are policy"):
        Layout(actor(critic=("a", "c", "lm")), {"a": Trunk("polcy")})


def test_restricting_to_a_missing_role_names_the_roles():
    with pytest.raises(KeyError, match=r"has the roles \['actor'\], not 'critic'"):
        Layout(actor(), {"a": Trunk()}).restricted_to(["actor", "critic"])


def test_a_reward_set_may_be_read_with_a_trained_head():
    """A critic on the reward model's frozen set: only its head is trained."""
    layout = Layout(
        actor(critic=("a", "r", "value"), reward=("a", "r", "reward")),
        {"a": Trunk()},
        loaded_adapters=frozenset({"r"}),
    )
    assert not layout.trains_lora


def test_stages_with_a_custom_layout(module, run_stage, base_model, batch):
    """Trained trunk and adapter in one stage; the record holds the layout as data, so the module may be gone."""
    module("layouts_four", SPLIT)
    path, sft = run_stage("sft", BackboneSpec(base_model, lora=LoraArgs(r=4)), supervised_layout(HYDRA, lora=True))
    layout = find_layout("layouts_four.SPLIT")
    settings = LoraArgs(r=4, use_dora=True, ranks={"critic": 2})
    spec = BackboneSpec(base_model, lora=settings, policy_checkpoint=path)
    ended = read(sft, ("actor", "reward"), batch)
    started = read(build_backbone(spec, layout), ("actor", "reference", "reward"), batch)
    torch.testing.assert_close(started["actor"], ended["actor"], atol=1e-5, rtol=1e-5)
    assert torch.equal(started["actor"], started["reference"])
    torch.testing.assert_close(started["reward"], ended["reward"], atol=1e-5, rtol=1e-5)
    second, backbone = run_stage("ppo", spec, layout, seed=4)
    found = read(backbone, ("actor", "critic", "reference"), batch)
    assert torch.equal(found["reference"], started["reference"])
    assert (found["actor"] - started["actor"]).abs().max() > 0.05
    ours = StageCheckpoint.read(second)
    assert ours.layout == layout
    inputs = {"input_ids": batch.tokens, "attention_mask": batch.attention_mask.long()}
    for role in ("actor", "critic", "reference"):
        with torch.no_grad(), backbone.use(role) as model:
            hidden = model.base_model(**inputs).last_hidden_state
            merged = ours.role_model(role).merged()
            torch.testing.assert_close(merged.base_model(**inputs).last_hidden_state, hidden, atol=1e-4, rtol=1e-4)
    assert ours.adapter("critic").args == settings.for_adapter("critic")
    assert ours.adapter("actor") is None
    again = build_backbone(BackboneSpec(base_model, lora=LoraArgs(r=4), policy_checkpoint=second), sft.layout)
    torch.testing.assert_close(read(again, ("actor",), batch)["actor"], found["actor"], atol=1e-5, rtol=1e-5)


def test_custom_layout_with_its_artifacts_missing(base_model):
    layout = Layout(actor(reward=("a", "r", "reward")), {"a": Trunk()}, loaded_adapters=frozenset({"r"}))
    with pytest.raises(ValueError, match="needs a trained reward head"):
        read_stages(BackboneSpec(base_model), layout)
