"""What is exact: parameters, optimizer state, KV cache; lines in depth and batch; fitting; sharding; errors."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PretrainedConfig

from lit_rlhf.backbone import LAYOUTS, Backbone, LoraArgs, LoraSet
from lit_rlhf.planner import (
    SHAPES,
    LiveBytes,
    Planner,
    Setting,
    Simulation,
    count_parameters,
    kv_cache_bytes,
    load_config,
    make_rows,
)
from lit_rlhf.planner import plan as plan_module
from lit_rlhf.planner.shapes import with_depth

LORA = LoraArgs(r=3)
NAMES = ["sft", "lora_sft", *LAYOUTS]


def small(layers: int = 6, **changes: Any) -> LlamaConfig:
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    return LlamaConfig(**{**sizes, "num_key_value_heads": 2, "num_hidden_layers": layers, **changes})


def planned(config: PretrainedConfig, name: str, **settings: Any) -> tuple[Planner, Any]:
    setting = Setting(**{"batch_size": 4, "prompt_length": 40, "response_length": 48, "lora": LORA, **settings})
    (row,) = [row for row in make_rows(["all"], setting) if row.name == name]
    return Planner(config, setting), row


def really_built(config: PretrainedConfig, layout: Any, dtype: torch.dtype) -> Backbone:
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    trunks = {name: copy.deepcopy(model) for name in layout.trunks}
    return Backbone(layout, trunks, LORA, {name: LoraSet(LORA, {}) for name in layout.loaded_adapters})


def storages(tensors: Any) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("tied", "precision"), [(True, "float32"), (False, "bfloat16")])
def test_parameters_gradients_and_moments_are_those_of_the_built_backbone(
    name: str, tied: bool, precision: Any
) -> None:
    config = small(tie_word_embeddings=tied)
    planner, row = planned(config, name, precision=precision, adamw="fused")
    assert planner.depths == (2, 4)
    bytes_ = planner.predict(row).largest
    backbone = really_built(config, row.layout, getattr(torch, precision))
    trained = [p for p in backbone.parameters() if p.requires_grad]
    everything = storages([*backbone.parameters(), *backbone.buffers()])
    assert bytes_["trunks"] + bytes_["adapters"] == everything
    float32 = [p for n, p in backbone.named_parameters() if n.startswith("heads.") or ".lora_" in n]
    assert bytes_["adapters"] == storages(float32)
    assert planner.counts(row)["trained"] == storages(trained) <= bytes_["gradients"]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    moments = [s[k] for s in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")]
    assert bytes_["optimizer"] == storages(moments)


def test_foreach_adamw_holds_one_more_copy_of_the_trained_parameters_in_its_step() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(1000)) for _ in range(3)]
    optimizer = torch.optim.AdamW(parameters, foreach=True)
    live = LiveBytes(known=parameters)
    with live:
        for _ in range(2):
            for parameter in parameters:
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
    gradients_and_moments, one_copy = 3 * 3 * 4000, 3 * 4000
    assert live.peak("") == pytest.approx(gradients_and_moments + one_copy, abs=100)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_kv_cache_formula_is_a_real_cache(kv_heads: int) -> None:
    config = small(3, num_key_value_heads=kv_heads)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    cache = DynamicCache(config=config)
    model(input_ids=torch.zeros(2, 7, dtype=torch.long), past_key_values=cache, use_cache=True)
    held = storages(t for layer in cache.layers for t in (layer.keys, layer.values))
    assert kv_cache_bytes(config, 2, 7, "bfloat16") == held


def test_the_cache_is_full_at_the_end_of_generation() -> None:
    planner, row = planned(small(), "hydra", prompt_length=4, response_length=60)
    prediction = planner.predict(row)
    assert prediction.phases["generation"]["kv_cache"] == kv_cache_bytes(small(), 4, 64, "bfloat16")


QUICK = [("sft", True), ("hydra", False), ("full", False)]
OTHERS = [(name, checkpointing) for name in NAMES for checkpointing in (False, True)]


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS if case not in QUICK)],
)
def test_two_shallow_runs_give_the_numbers_of_the_whole_model(
    name: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    planner, row = planned(small(7), name, gradient_checkpointing=checkpointing)
    from_shallow = planner.predict(row)
    monkeypatch.setattr(plan_module, "DEPTHS", (2, 7))
    whole, _ = planned(small(7), name, gradient_checkpointing=checkpointing)
    assert (planner.depths, whole.depths) == ((2, 4), (7,))
    expected = whole.predict(row)
    assert {p: from_shallow.total(p) for p in from_shallow.phases} == {p: expected.total(p) for p in expected.phases}


@pytest.mark.parametrize("batch", [1, 70])
@pytest.mark.parametrize("name", ["hydra", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sft", "full"))])
def test_batches_lie_on_the_lines_between_those_that_are_run(name: str, batch: int) -> None:
    planner, row = planned(small(), name, batch_size=batch)
    assert planner.predict(row, interpolate=True).peak == pytest.approx(planner.predict(row).peak, rel=5e-3)


def test_the_fitted_batch_fits_and_the_next_does_not() -> None:
    fitted = []
    planner, row = planned(small(), "hydra")
    for budget in (1 << 18, 4 << 20, 16 << 20, 64 << 20):
        best = planner.largest_batch(row, budget)
        if best:
            at = [
                planner.predict(row, replace(planner.setting, batch_size=b), interpolate=True) for b in (best, best + 1)
            ]
            assert at[0].peak <= budget < at[1].peak
        fitted.append(best)
    assert fitted == sorted(fitted)
    assert fitted[0] == 0 < fitted[1]
    assert planner.largest_batch(row, 1 << 40, limit=1000) == 1000


def test_a_fixed_rollout_batch_is_left_alone_when_the_minibatch_is_fitted() -> None:
    planner, row = planned(small(), "hydra", rollout_batch_size=30)
    rollout = planner.predict(row).total("generation")
    assert planner.largest_batch(row, rollout - 1) == 0
    assert planner.largest_batch(row, 2 * rollout) > 0


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-7b", 6_738_415_616),
        ("llama2-13b", 13_015_864_320),
        ("llama3-8b", 8_030_261_248),
        ("opt-125m", 125_239_296),
        ("opt-350m", 331_196_416),
        ("opt-1.3b", 1_315_758_080),
        ("gpt2", 124_439_808),
        ("gpt2-xl", 1_557_611_200),
        ("smollm2-135m", 134_515_008),
        ("smollm2-1.7b", 1_711_376_384),
    ],
)
def test_built_in_shapes_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    assert Planner(load_config(name), Setting()).parameters == parameters


def test_every_built_in_shape_can_be_built() -> None:
    for name in SHAPES:
        config = with_depth(load_config(name), 1)
        assert count_parameters(Simulation(config, LAYOUTS["hydra"], LORA, "bfloat16").backbone)["trunks"] > 0


def test_without_a_critic_the_table_loses_its_column() -> None:
    setting = Setting(algorithm="remax", lora=LORA)
    rows = {row.name: row for row in make_rows(["all"], setting)}
    assert list(rows) == ["sft", "lora_sft", "full", "lora", "dynamic_lora", "pe", "hydra"]
    assert {n: len(r.layout.trunks) for n, r in rows.items() if n in LAYOUTS} == {
        "full": 3, "lora": 3, "dynamic_lora": 2, "pe": 1, "hydra": 1
    }  # fmt: skip
    planner, row = planned(small(), "hydra", algorithm="remax", prompt_length=40)
    with_critic, ppo_row = planned(small(), "hydra")
    assert planner.predict(row).peak < with_critic.predict(ppo_row).peak
    assert "value" not in {role.head for role in row.layout.roles.values()}


def test_a_reward_function_needs_no_reward_trunk() -> None:
    _, row = planned(small(), "full", reward_function=True)
    assert set(row.layout.trunks) == {"actor", "critic", "reference"}


def test_fsdp2_divides_and_ddp_does_not() -> None:
    planner, row = planned(small(), "full", adamw="fused")
    alone = planner.predict(row).largest
    ddp = planner.predict(row, replace(planner.setting, devices=4)).largest
    assert ddp["trunks"] == alone["trunks"]
    assert ddp["gradients"] == alone["gradients"] + planner.counts(row)["trained"]  # its buckets
    sharded = planner.predict(row, replace(planner.setting, devices=4, strategy="fsdp2")).largest
    for kind in ("trunks", "gradients", "optimizer"):
        assert sharded[kind] == pytest.approx(alone[kind] / 4, abs=2)
    assert sharded["activations"] == alone["activations"]
    backbone = really_built(small(), row.layout, torch.bfloat16)
    layer = sum(p.numel() * 2 for p in backbone.language_model("actor").model.layers[0].parameters())
    counts = count_parameters(backbone)
    assert counts["unit"] == layer
    assert sharded["gathered"] == sum(counts[p] for p in ("unit", "outside", "trained_unit", "trained_outside"))


def test_accumulated_gradients_stay_through_backward() -> None:
    planner, row = planned(small(), "sft", adamw="fused")
    assert planner.predict(row, replace(planner.setting, accumulate_grad_batches=4)).peak >= planner.predict(row).peak


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"rollout_batch_size": -1, "devices": 0}, "devices must be at least 1, got 0; rollout_batch_size"),
    ],
)
def test_settings_out_of_range_are_named_together(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Setting(**settings)


def test_more_tokens_than_the_model_reads_are_refused() -> None:
    with pytest.raises(ValueError, match="is 1100, but the model's context is 1024"):
        Planner(load_config("gpt2"), Setting(prompt_length=1000, response_length=100))


def test_an_unknown_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="layout must be one of"):
        make_rows(["hydraa"], Setting())


def test_the_tracker_counts_storages_once_and_forgets_them_when_freed() -> None:
    known = torch.zeros(50)
    live = LiveBytes(known=[known], vocabulary=7)
    with live:
        a = torch.zeros(10, 10)
        b = a.t()
        c = known.view(5, 10) + 1
        logits = torch.zeros(3, 7)
        assert live.current == 400 + 200 + 84
        assert live.peaks[""]["logits"] == 84
        live.enter("later")
        del a, c
        assert live.current == 400 + 84  # b keeps the storage
        live.move(logits, "kv_cache")
        del b
        torch.zeros(5)
    assert live.peak("later") == 684
    assert live.current == 84
