"""The fused LoRA layer against PEFT's own forward and backward pass."""

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from lit_rlhf.backbone.lora_linear import LoraLinear, _LoraLinear, use_fused_layers


def make_layers(dtype=torch.float32, bias=True, names=("first",), adapter_dtype=torch.float32, **config):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20, bias=bias)).to(dtype)
    for name in names:
        inject_adapter_in_model(LoraConfig(r=4, lora_alpha=6, target_modules=["0"], **config), model, name)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data = torch.randn(parameter.shape).to(adapter_dtype)
    fused = copy.deepcopy(model)
    use_fused_layers(fused)
    for both in (model, fused):
        both[0].set_adapter([names[0]])
        both[0].base_layer.requires_grad_(False)
    return model, fused


def run(model, x):
    x = x.clone().requires_grad_()
    y = model(x)
    weights = torch.linspace(-1, 1, y.numel(), device=y.device, dtype=y.dtype).view(y.shape)
    (y * weights).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return y.detach(), x.grad, gradients


def assert_same(ours, theirs, **tolerance):
    torch.testing.assert_close(ours[0], theirs[0], **tolerance)
    torch.testing.assert_close(ours[1], theirs[1], **tolerance)
    assert ours[2].keys() == theirs[2].keys()
    assert len(ours[2]) == 2
    for name, gradient in theirs[2].items():
        torch.testing.assert_close(ours[2][name], gradient, **tolerance)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 3, 12), (0, 12)])
def test_equals_peft_in_float64(bias, shape):
    model, fused = make_layers(torch.float64, bias, adapter_dtype=torch.float64)
    x = torch.randn(*shape, dtype=torch.float64)
    assert_same(run(fused, x), run(model, x), rtol=1e-12, atol=1e-12)


def test_equals_peft_with_a_bfloat16_trunk_and_float32_sets():
    model, fused = make_layers(torch.bfloat16)
    x = torch.randn(2, 3, 12).bfloat16()
    ours, theirs = run(fused, x), run(model, x)
    assert ours[0].dtype == ours[1].dtype == torch.bfloat16
    assert all(gradient.dtype == torch.float32 for gradient in ours[2].values())
    assert_same(ours, theirs, rtol=2e-2, atol=2e-1)


def test_no_gradient_mode_gives_the_same_numbers():
    _, fused = make_layers()
    x = torch.randn(3, 12)
    with torch.no_grad():
        without = fused(x)
    assert torch.equal(without, fused(x).detach())


def test_gradients_by_finite_differences():
    _, fused = make_layers(torch.float64, adapter_dtype=torch.float64)
    base, a, b = fused[0].base_layer, fused[0].lora_A["first"].weight, fused[0].lora_B["first"].weight
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)

    def function(x, a, b):
        return _LoraLinear.apply(x, base.weight, base.bias, a, b, 1.5)

    assert torch.autograd.gradcheck(function, (x, a, b))


def test_a_frozen_set_gets_no_gradient_but_passes_it_on():
    model, fused = make_layers()
    for both in (model, fused):
        both[0].requires_grad_(False)
    ours, theirs = run(fused, torch.ones(3, 12)), run(model, torch.ones(3, 12))
    assert ours[2] == theirs[2] == {}
    torch.testing.assert_close(ours[1], theirs[1])


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize("case", ["off", "two sets", "dora", "dropout", "merged", "trained trunk", "autocast"])
def test_every_other_case_is_pefts_own(case):
    config = {"dora": {"use_dora": True}, "dropout": {"lora_dropout": 0.5}}.get(case, {})
    model, fused = make_layers(names=("first", "second"), **config)
    x = torch.randn(4, 12)
    for both in (model, fused):
        both.eval() if case == "merged" else None
        if case == "off":
            both[0].enable_adapters(False)
        if case == "two sets":
            both[0].set_adapter(["first", "second"])
        if case == "merged":
            both[0].merge()
        if case == "trained trunk":
            both[0].base_layer.requires_grad_(True)
    results = []
    for both in (model, fused):
        torch.manual_seed(1)
        with torch.autocast("cpu", enabled=case == "autocast"):
            y = both(x)
        y.float().square().sum().backward() if y.requires_grad else None
        results.append((y.detach(), {n: p.grad for n, p in both.named_parameters() if p.grad is not None}))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1].keys() == results[1][1].keys()
    assert all(torch.equal(results[0][1][n], g) for n, g in results[1][1].items())


def test_keeps_its_input_and_the_small_product_alone():
    model, fused = make_layers(torch.bfloat16, bias=False)
    x = torch.randn(64, 12).bfloat16().requires_grad_()

    def saved(module):
        kept = {}

        def pack(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = module(x)
        for parameter in module.parameters():
            kept.pop(parameter.untyped_storage().data_ptr(), None)
        kept.pop(x.untyped_storage().data_ptr(), None)
        return y, sum(kept.values())

    assert saved(fused)[1] == 64 * 4 * 4
    assert saved(model)[1] >= 64 * 12 * 4


def test_layers_of_other_kinds_stay_pefts():
    class Own(nn.Linear):
        pass

    torch.manual_seed(0)
    model = nn.Sequential(Own(12, 20))
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["0"]), model)
    use_fused_layers(model)
    assert isinstance(model[0], LoraLinear)
    assert model[0]._single_adapter(torch.zeros(1, 12)) is None
