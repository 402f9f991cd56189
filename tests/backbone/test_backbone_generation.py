"""Responses to one prompt share the pass over it, in every family, with the actor's adapter on."""

import shutil

import pytest
import torch
from conftest import EOS, FAMILIES
from transformers import AutoConfig, AutoModelForCausalLM

from lit_rlhf.rollout import Sampling, decoding, generate
from lit_rlhf.rollout.static import StaticDecoder


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_prompt_pass_changes_no_token(family, make_backbone, batch):
    backbone = make_backbone("hydra", family)
    prompts, attention = batch.tokens[:, :6], batch.attention_mask[:, :6]
    settings = Sampling(max_new_tokens=7, min_new_tokens=7)
    lengths = []
    with backbone.use("actor") as model:
        count = model.get_input_embeddings().register_forward_hook(
            lambda module, args, out: lengths.append(args[0].shape)
        )
        alone = generate(model, prompts, attention, settings, EOS, [EOS], samples=0, greedy=True)
        lengths.clear()
        both = generate(model, prompts, attention, settings, EOS, [EOS], samples=3, greedy=True)
        count.remove()
    assert torch.equal(both.greedy.tokens, alone.tokens)
    # Every prompt is read once; the copies begin with their first response token.
    assert lengths[0] == (4, 6)
    assert lengths[1] == (16, 1)


# Gemma-2 and Mistral with a window shorter than the prompt: their cache forgets.
WINDOWS = {"gemma2": {"sliding_window": 4}, "qwen2": {"use_sliding_window": True, "sliding_window": 4}}
ENDS = list(range(2, 14))


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_ended_leave_the_batch_and_change_no_token(family, make_model, make_backbone, batch, monkeypatch):
    model = make_model(family, **WINDOWS.get(family, {}), max_window_layers=0)
    backbone = make_backbone("hydra", family, model=model)
    prompts, attention = batch.tokens[:, :6], batch.attention_mask[:, :6]
    widths, runs = [], []
    for part in (decoding.SHRINK_BELOW, 0.0):
        monkeypatch.setattr(decoding, "SHRINK_BELOW", part)
        torch.manual_seed(4)
        with backbone.use("actor") as model:
            hook = model.get_input_embeddings().register_forward_hook(lambda m, args, out: widths.append(len(args[0])))
            runs.append(generate(model, prompts, attention, Sampling(20), EOS, ENDS, samples=3, keep_log_probs=True))
            hook.remove()
    assert min(widths) < 6 <= 12 == max(widths)
    shrunk, whole = runs
    assert torch.equal(shrunk.tokens, whole.tokens)
    torch.testing.assert_close(shrunk.log_probs, whole.log_probs, atol=2e-5, rtol=0)
    read = backbone(("actor",), shrunk.tokens, shrunk.attention_mask, shrunk.mask)["actor"]
    torch.testing.assert_close(shrunk.log_probs, read.masked_fill(~shrunk.mask, 0.0), atol=5e-5, rtol=0)


SLOW = [f for f in FAMILIES if f not in ("llama", "gemma2", "bloom")]


@pytest.mark.parametrize(
    "family", ["llama", "gemma2", "bloom", *(pytest.param(f, marks=pytest.mark.slow) for f in SLOW)]
)
def test_a_static_cache_changes_no_token(family, make_model, make_backbone, batch):
    """Whichever adapter is on; for fewer rows than it has, and with its sliding windows full or not."""
    model = make_model(family, **WINDOWS.get(family, {}), max_window_layers=0)
    backbone = make_backbone("j_hydra", family, model=model)
    prompts, attention = batch.tokens[:, :6], batch.attention_mask[:, :6]
    static = StaticDecoder()
    seen = []
    for role, rows, copies in (("actor", 4, 3), ("reference", 4, 1), ("actor", 3, 1)):
        runs = []
        for decoder in (None, static):
            torch.manual_seed(4)
            with backbone.use(role) as model:
                inputs = (model, prompts[:rows], attention[:rows], Sampling(20), EOS, ENDS)
                options = {"samples": copies, "greedy": True, "keep_log_probs": True}
                runs.append(generate(*inputs, **options, decoder=decoder))
        dynamic, fixed = runs
        assert torch.equal(dynamic.tokens, fixed.tokens)
        assert torch.equal(dynamic.greedy.tokens, fixed.greedy.tokens)
        torch.testing.assert_close(dynamic.log_probs, fixed.log_probs, atol=2e-5, rtol=0)
        seen.append(fixed.tokens)
    assert not torch.equal(seen[1][:3], seen[2])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_a_compiled_step_changes_no_token_and_is_compiled_once_per_adapter(make_model, make_backbone, batch):
    backbone = make_backbone("j_hydra", model=make_model(num_hidden_layers=1))
    prompts, attention = batch.tokens[:, :6], batch.attention_mask[:, :6]
    compiled = StaticDecoder(compile=True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    counts, caches = [], []
    for role, rows in (("actor", 4), ("reference", 4), ("actor", 3), ("reference", 4), ("actor", 4)):
        runs = []
        for decoder in (None, compiled):
            torch.manual_seed(4)
            with backbone.use(role) as model:
                runs.append(generate(model, prompts[:rows], attention[:rows], Sampling(12), EOS, ENDS, decoder=decoder))
        assert torch.equal(runs[0].tokens, runs[1].tokens)
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        caches.append(compiled._kept.layers[0].keys.data_ptr())
    assert counts == [1, 2, 2, 2, 2]
    assert len(set(caches)) == 1
    with backbone.use("actor") as model:
        generate(model, prompts, attention, Sampling(90), EOS, ENDS, decoder=compiled)
    assert compiled._kept.layers[0].keys.shape[2] == 128


def test_a_family_without_a_static_cache_is_named():
    settings = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "vocab_size": 128}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **settings)).eval()
    tokens = torch.randint(3, 128, (2, 5))
    with pytest.raises(ValueError, match=r"MambaForCausalLM cannot be decoded with a static cache .*cache to dynamic"):
        generate(model, tokens, torch.ones_like(tokens).bool(), Sampling(), 0, [2], decoder=StaticDecoder())
