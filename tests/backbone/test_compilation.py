"""Compiled layers: the same numbers in every role, and decoding left alone."""

import shutil

import pytest
import torch
from helpers import make_ppo

from lit_rlhf import TransformersEngine
from lit_rlhf.backbone import BackboneSpec, LoraArgs, build_backbone, compile_layers, find_layout

ROLES = ("actor", "critic", "reference")


def read(backbone, length):
    generator = torch.Generator().manual_seed(length)
    tokens = torch.randint(3, 200, (3, 4 + length), generator=generator)
    mask = torch.arange(length) < torch.tensor([[length], [1], [2]])
    attention = torch.cat([torch.ones(3, 4).bool(), mask], 1)
    out = {}
    for role in ROLES:
        with torch.no_grad():
            out[f"{role} frozen"] = backbone((role,), tokens, attention, mask)[role]
    for role in ROLES[:2]:
        backbone.zero_grad()
        backbone((role,), tokens, attention, mask)[role].sum().backward()
        out |= {f"{role} {n}": p.grad.clone() for n, p in backbone.named_parameters() if p.grad is not None}
    return out


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on the CPU needs a C++ compiler")
def test_compiled_layers_compute_the_same():
    torch._dynamo.reset()
    layout = find_layout("hydra").restricted_to(ROLES)
    backbone = build_backbone(BackboneSpec("random:tiny", lora=LoraArgs(r=4)), layout)
    for name, parameter in backbone.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    torch.nn.init.normal_(backbone.heads["value"].weight)
    plain = [read(backbone, length) for length in (5, 9)]
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compile_layers(backbone)
    compiled = [read(backbone, length) for length in (5, 9)]
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
    assert graphs >= 3  # something was compiled: each set, with or without gradients
    for ours, theirs in zip(compiled, plain, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            scale = float(value.abs().max())
            torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-4 * scale, msg=name)
    tokens = torch.randint(3, 200, (2, 4))
    with backbone.use("actor") as model:
        model.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == graphs


def test_it_refuses_recomputation_before_anything_is_loaded():
    with pytest.raises(ValueError, match="compile_layers and gradient_checkpointing cannot be combined"):
        make_ppo(compile_layers=True, gradient_checkpointing=True).check_settings()


def test_it_refuses_a_compiled_engine_too():
    with pytest.raises(ValueError, match=r"compile_layers and engine\.compile cannot be combined"):
        make_ppo(compile_layers=True, engine=TransformersEngine(cache="static", compile=True)).check_settings()
