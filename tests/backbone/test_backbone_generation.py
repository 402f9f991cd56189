"""Responses to one prompt share the pass over it, in every family, with the actor's LoRA set on."""

import pytest
import torch
from conftest import EOS, FAMILIES

from lit_rlhf.rollout import Sampling, decoding, generate


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
