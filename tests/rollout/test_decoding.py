"""The token loop against a plain one: rows that end leave it, and no token changes by that."""

from typing import Any

import pytest
import torch
from helpers import TINY
from transformers import AutoConfig, AutoModelForCausalLM

from lit_rlhf.backbone import load_language_model
from lit_rlhf.rollout import Sampling, decoding, generate

# One token in thirteen ends a response, so that rows end at very different lengths.
PAD, EOS = 0, list(range(900, 980))


def prompt_batch(rows: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(10, 900, (rows, 6), generator=generator)
    mask = torch.arange(6) >= torch.arange(rows)[:, None] % 5
    return tokens.masked_fill(~mask, PAD), mask


@pytest.fixture
def widths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every decoding step."""
    seen: list[int] = []
    step = decoding.DynamicDecoder.step

    def counted(self: decoding.DynamicDecoder, tokens: torch.Tensor) -> torch.Tensor:
        seen.append(len(tokens))
        return step(self, tokens)

    monkeypatch.setattr(decoding.DynamicDecoder, "step", counted)
    return seen


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8, "top_p": 0.9}, {"top_k": 20, "min_new_tokens": 4}])
def test_rows_that_ended_leave_the_batch_and_change_no_token(
    settings: dict, widths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, arguments = load_language_model(TINY), prompt_batch()
    sampling = Sampling(**{"max_new_tokens": 40, **settings})

    def run() -> object:
        torch.manual_seed(5)
        return generate(model, *arguments, sampling, PAD, EOS, samples=2, greedy=True, keep_log_probs=True)

    shrunk = run()
    assert widths[0] == 36
    assert widths == sorted(widths, reverse=True)
    assert len(set(widths)) >= 3
    widths.clear()
    monkeypatch.setattr(decoding, "SHRINK_BELOW", 0.0)
    whole = run()
    assert set(widths) == {36}
    assert torch.equal(shrunk.tokens, whole.tokens)
    assert torch.equal(shrunk.greedy.tokens, whole.greedy.tokens)
    assert torch.equal(shrunk.mask, whole.mask)
    assert shrunk.mask.sum(dim=1).unique().numel() > 5
    torch.testing.assert_close(shrunk.log_probs, whole.log_probs, atol=2e-5, rtol=0)


def test_looking_seldom_whether_rows_have_ended_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where every look makes the host wait."""
    model, arguments = load_language_model(TINY), prompt_batch(4)
    runs = []
    for every in (1, 7):
        monkeypatch.setattr(decoding, "CHECK_EVERY", {"cpu": every})
        torch.manual_seed(5)
        runs.append(generate(model, *arguments, Sampling(max_new_tokens=60), PAD, EOS, keep_log_probs=True))
    often, seldom = runs
    assert often.tokens.shape[1] < 6 + 60
    assert torch.equal(often.tokens, seldom.tokens)
    assert torch.equal(often.truncated, seldom.truncated)
    torch.testing.assert_close(often.log_probs, seldom.log_probs, atol=2e-5, rtol=0)


def test_tokens_depend_neither_on_the_batch_size_nor_on_a_greedy_row_beside_them() -> None:
    model, arguments = load_language_model(TINY), prompt_batch()
    runs = []
    for options in ({}, {"batch_size": 5}, {"greedy": True}):
        torch.manual_seed(1)
        runs.append(generate(model, *arguments, Sampling(max_new_tokens=20), PAD, EOS, samples=2, **options))
    assert torch.equal(runs[0].tokens, runs[1].tokens)
    assert torch.equal(runs[0].tokens, runs[2].tokens)


def test_a_seed_repeats_and_another_one_differs() -> None:
    model, arguments = load_language_model(TINY), prompt_batch()
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(generate(model, *arguments, Sampling(max_new_tokens=20), PAD, EOS).tokens)
    assert torch.equal(runs[0], runs[1])
    assert runs[0].shape != runs[2].shape or not torch.equal(runs[0], runs[2])


RECURRENT = {
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "vocab_size": 128},
    "lfm2": {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 48, "vocab_size": 128, "layer_types": ["conv", "full_attention"],
    },
}  # fmt: skip


@pytest.mark.parametrize("family", RECURRENT)
def test_models_with_other_states_than_keys_and_values_are_decoded_by_transformers(family: str) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, **RECURRENT[family], tie_word_embeddings=False, pad_token_id=0, eos_token_id=2
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    tokens = torch.randint(3, 128, (3, 5))
    mask = torch.ones_like(tokens).bool()
    settings = Sampling(max_new_tokens=9, min_new_tokens=3)
    torch.manual_seed(2)
    out = generate(model, tokens, mask, settings, 0, [2], samples=2, greedy=True, keep_log_probs=True)
    assert out.greedy is not None
    assert out.log_probs is not None
    alone = model.generate(tokens, attention_mask=mask.long(), do_sample=False, max_new_tokens=9, min_new_tokens=3)
    for row in range(3):
        length = int(out.greedy.mask[row].sum())
        assert out.greedy.tokens[row, : 5 + length].tolist() == alone[row, : 5 + length].tolist()
    for row in range(6):
        length = int(out.mask[row].sum())
        ids = out.tokens[row, : 5 + length]
        with torch.no_grad():
            whole = model(ids[None]).logits[0].log_softmax(-1)[:-1].gather(1, ids[1:, None])[-length:, 0]
        torch.testing.assert_close(out.log_probs[row, :length], whole, atol=1e-4, rtol=0)
    assert len({tuple(row) for row in out.tokens.tolist()}) == 6


def test_transformers_ends_and_pads_responses_as_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model("mamba", **RECURRENT["mamba"], pad_token_id=0, eos_token_id=2)
    model = AutoModelForCausalLM.from_config(config).eval()
    whole, in_step = model.generate, []

    def watched(*arguments: Any, synced_gpus: bool, **options: Any) -> Any:
        in_step.append(synced_gpus)
        return whole(*arguments, **options)

    monkeypatch.setattr(model, "generate", watched)
    tokens = torch.randint(3, 128, (6, 5))
    eos, pad = [2, *range(60, 70)], 1
    out = generate(model, tokens, torch.ones_like(tokens).bool(), Sampling(max_new_tokens=40), pad, eos, in_step=True)
    assert in_step == [True]
    ends = out.tokens[:, 5:][out.mask & torch.isin(out.tokens[:, 5:], torch.tensor(eos))]
    assert len(ends) == int((~out.truncated).sum()) > 2
    assert set(ends.tolist()) - {2}
    assert (~out.mask).any()
    assert (out.tokens[:, 5:][~out.mask] == pad).all()
