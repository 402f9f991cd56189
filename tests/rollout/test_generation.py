"""Sampling: masks, padding, leaks of other people's settings, and the KV-cache trap."""

from typing import Any

import pytest
import torch
from helpers import TINY

from lit_rlhf.backbone import load_language_model
from lit_rlhf.rollout import Experience, Sampling, decoding, generate

PAD, EOS = 0, [2, 9]


def prompt_batch() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.tensor([[PAD, PAD, 40, 41], [50, 51, 52, 53], [PAD, 60, 61, 62]])
    return tokens, torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]], dtype=torch.bool)


def run(sampling: Sampling, greedy: bool = False, **kwargs: object) -> Experience:
    torch.manual_seed(0)
    model = load_language_model(TINY)
    samples = 0 if greedy else 1
    return generate(model, *prompt_batch(), sampling, PAD, EOS, samples=samples, greedy=greedy, **kwargs)  # type: ignore[arg-type]


def test_masks_end_with_the_first_eos_and_truncation_is_known() -> None:
    torch.manual_seed(1)
    model = load_language_model(TINY)
    # Make EOS likely: its embedding (tied to the output) scaled up in every direction the model uses.
    model.get_output_embeddings().weight.data[2] = 0
    tokens, attention = prompt_batch()
    out = generate(model, tokens.repeat(40, 1), attention.repeat(40, 1), Sampling(max_new_tokens=40), PAD, EOS)
    responses = out.tokens[:, 4:]
    assert out.truncated.any()
    assert not out.truncated.all()
    for row in range(len(out)):
        ids = responses[row].tolist()
        ends = [i for i, token in enumerate(ids) if token in EOS]
        length = ends[0] + 1 if ends else len(ids)
        assert out.mask[row].tolist() == [i < length for i in range(len(ids))]
        assert bool(out.truncated[row]) == (not ends)
        assert all(token == PAD for token in ids[length:])
    assert torch.equal(out.attention_mask[:, 4:], out.mask)


def test_greedy_does_not_depend_on_padding_or_batching() -> None:
    model = load_language_model(TINY)
    settings = Sampling(max_new_tokens=10)
    together = run(settings, greedy=True)
    split = run(settings, greedy=True, batch_size=2)
    assert torch.equal(together.tokens, split.tokens)
    tokens, attention = prompt_batch()
    for row in range(3):
        alone = tokens[row][attention[row]][None]
        single = generate(model, alone, torch.ones_like(alone).bool(), settings, PAD, EOS, samples=0, greedy=True)
        length = int(single.mask.sum())
        assert (
            together.tokens[row, 4 : 4 + length].tolist() == single.tokens[0, -single.mask.shape[1] :][:length].tolist()
        )


def test_sampling_draws_from_the_policy_itself() -> None:
    """Frequencies of the first token match the softmax: no top-k of 50 sneaks in from transformers' defaults."""
    model = load_language_model(TINY)
    tokens = torch.tensor([[40, 41]]).repeat(20000, 1)
    attention = torch.ones_like(tokens).bool()
    torch.manual_seed(0)
    out = generate(model, tokens, attention, Sampling(max_new_tokens=1, min_new_tokens=0), PAD, EOS)
    counts = torch.bincount(out.tokens[:, -1], minlength=1024).double()
    with torch.no_grad():
        expected = model(tokens[:1]).logits[0, -1].double().softmax(-1) * 20000
    assert int((counts > 0).sum()) > 200
    chi_squared = float(((counts - expected) ** 2 / expected).sum())
    # 1023 degrees of freedom: mean 1023, standard deviation 45.
    assert chi_squared < 1023 + 5 * 45


def test_the_hubs_sampling_settings_are_switched_off() -> None:
    model = load_language_model(TINY)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.top_k = 1
    torch.manual_seed(0)
    a = generate(model, *prompt_batch(), Sampling(max_new_tokens=8, min_new_tokens=8), PAD, EOS)
    assert len({tuple(row) for row in a.tokens[:, 4:].tolist()}) == 3
    greedy = generate(
        model, *prompt_batch(), Sampling(max_new_tokens=8, min_new_tokens=8), PAD, EOS, samples=0, greedy=True
    )
    assert not torch.equal(a.tokens, greedy.tokens)


def test_train_mode_is_refused() -> None:
    model = load_language_model(TINY).train()
    with pytest.raises(RuntimeError, match="eval mode"):
        generate(model, *prompt_batch(), Sampling(), PAD, EOS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"min_new_tokens": 65}, "min_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -1}, "top_k"),
    ],
)
def test_settings_out_of_range_are_named(arguments: dict, message: str) -> None:
    problem = Sampling(**arguments).problems()[0]
    assert f"sampling.{message}" in problem


def test_experience_slices_moves_and_names_what_is_missing() -> None:
    experience = run(Sampling(max_new_tokens=5))
    experience.scores = torch.tensor([1.0, 2.0, 3.0])
    picked = experience[torch.tensor([2, 0])]
    assert picked.scores.tolist() == [3.0, 1.0]
    assert torch.equal(picked.tokens, experience.tokens[[2, 0]])
    assert [len(part) for part in experience.split(2)] == [2, 1]
    assert experience[:2].tokens.data_ptr() == experience.tokens.data_ptr()
    assert experience.to(torch.device("cpu")).scores.tolist() == [1.0, 2.0, 3.0]
    with pytest.raises(ValueError, match="no values yet"):
        experience.require("values")


def test_several_samples_a_prompt_stand_together_and_differ() -> None:
    torch.manual_seed(0)
    model = load_language_model(TINY)
    tokens, attention = prompt_batch()
    out = generate(model, tokens, attention, Sampling(max_new_tokens=6), PAD, EOS, samples=3)
    assert torch.equal(out.tokens[:, :4], tokens.repeat_interleave(3, dim=0))
    assert len({tuple(row) for row in out.tokens.tolist()}) == 9
    split = generate(model, tokens, attention, Sampling(max_new_tokens=6), PAD, EOS, samples=3, batch_size=4)
    assert torch.equal(split.tokens[:, :4], out.tokens[:, :4])  # one prompt at a time, its samples together


def test_greedy_rows_of_a_sampling_call_are_those_of_a_greedy_call() -> None:
    torch.manual_seed(0)
    model = load_language_model(TINY)
    settings = Sampling(max_new_tokens=12, min_new_tokens=3, temperature=1.3, top_p=0.9, top_k=50)
    alone = run(settings, greedy=True)
    both = generate(model, *prompt_batch(), settings, PAD, EOS, samples=2, greedy=True)
    assert len(both) == 6
    assert both.greedy is not None
    for row in range(3):
        length = int(alone.mask[row].sum())
        assert int(both.greedy.mask[row].sum()) == length
        assert both.greedy.tokens[row, 4 : 4 + length].tolist() == alone.tokens[row, 4 : 4 + length].tolist()
    assert not torch.equal(both.tokens[0::2], both.greedy.tokens)


def test_nothing_to_decode_is_an_error() -> None:
    with pytest.raises(ValueError, match="samples is 0 and greedy is False"):
        generate(load_language_model(TINY), *prompt_batch(), Sampling(), PAD, EOS, samples=0)


def test_samples_of_one_prompt_are_drawn_from_the_policy_itself() -> None:
    """The shared pass over the prompt changes no probability: frequencies of the first token against the softmax."""
    torch.manual_seed(0)
    model = load_language_model(TINY)
    model.get_output_embeddings().weight.data *= 20  # few likely tokens
    tokens, attention = prompt_batch()
    out = generate(model, tokens, attention, Sampling(max_new_tokens=1, min_new_tokens=0), PAD, EOS, samples=4000)
    for row in range(3):
        alone = tokens[row][attention[row]][None]
        with torch.no_grad():
            expected = model(alone).logits[0, -1].softmax(0)
        drawn = out.tokens[row * 4000 : (row + 1) * 4000, 4].bincount(minlength=len(expected)) / 4000
        spread = (expected * (1 - expected) / 4000).sqrt()
        assert ((drawn - expected).abs() <= 5 * spread + 1e-3).all()
        assert expected.max() > 0.05


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_kept_log_probs_are_those_of_a_pass_over_the_response(temperature: float) -> None:
    """Of the policy itself: no top-p, top-k, shortest length or greedy row shows in them."""
    torch.manual_seed(0)
    model = load_language_model(TINY)
    settings = Sampling(max_new_tokens=12, min_new_tokens=5, temperature=temperature, top_p=0.8, top_k=30)
    out = generate(
        model, *prompt_batch(), settings, PAD, EOS, samples=2, greedy=True, batch_size=4, keep_log_probs=True
    )
    assert out.log_probs is not None
    assert out.greedy is not None
    assert not hasattr(out.greedy, "log_probs")
    for row in range(len(out)):
        kept, length = out.attention_mask[row], int(out.mask[row].sum())
        ids = out.tokens[row][kept]
        with torch.no_grad():
            logits = model(ids[None]).logits[0].double() / temperature
        whole = logits.log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
        torch.testing.assert_close(out.log_probs[row, :length].double(), whole[-length:], atol=2e-5, rtol=0)
        assert (out.log_probs[row, length:] == 0).all()


def test_no_eos_before_the_shortest_length() -> None:
    torch.manual_seed(1)
    model = load_language_model(TINY)
    model.get_output_embeddings().weight.data[2] = 0
    tokens, attention = prompt_batch()
    arguments = (model, tokens.repeat(200, 1), attention.repeat(200, 1))
    free = generate(*arguments, Sampling(max_new_tokens=20, min_new_tokens=1), PAD, EOS)
    held = generate(*arguments, Sampling(max_new_tokens=20, min_new_tokens=9), PAD, EOS)
    assert free.mask.sum(dim=1).min() < 9
    assert held.mask.sum(dim=1).min() >= 9


def rows_read(model: Any) -> list[int]:
    """Return a list that takes in the rows of each forward pass."""
    rows: list[int] = []
    model.register_forward_pre_hook(lambda _, __, inputs: rows.append(len(inputs["input_ids"])), with_kwargs=True)
    return rows


@pytest.mark.parametrize(
    ("batch_size", "samples", "greedy", "prompts", "most"),
    [
        (None, 2, False, [3], 6),
        (1, 1, False, [1, 1, 1], 1),
        (5, 2, False, [2, 1], 4),
        (6, 2, True, [2, 1], 6),
        (2, 3, False, [1, 1, 1], 3),  # the responses to one prompt are never parted
    ],
)
def test_no_more_sequences_than_the_batch_size_are_decoded_at_once(
    batch_size: int | None, samples: int, greedy: bool, prompts: list[int], most: int
) -> None:
    model = load_language_model(TINY)
    rows = rows_read(model)
    settings = Sampling(max_new_tokens=4, min_new_tokens=4)
    generate(model, *prompt_batch(), settings, PAD, EOS, samples=samples, greedy=greedy, batch_size=batch_size)
    assert rows[::4] == prompts  # each prompt is read once, whatever the number of its responses
    assert rows[1] == most == max(rows)


def test_an_error_while_decoding_leaves_no_cache_behind() -> None:
    class Breaks(decoding.DynamicDecoder):
        def step(self, tokens: torch.Tensor) -> torch.Tensor:
            assert self._cache is not None
            raise RuntimeError("out of memory")

    decoder = Breaks()
    with pytest.raises(RuntimeError, match="out of memory"):
        generate(load_language_model(TINY), *prompt_batch(), Sampling(max_new_tokens=4), PAD, EOS, decoder=decoder)
    assert decoder._cache is None


def test_padding_is_the_tokenizers_also_where_batches_of_other_widths_are_joined() -> None:
    torch.manual_seed(1)
    ends = list(range(100, 1024, 8))  # one token in nine ends a response
    settings = Sampling(max_new_tokens=20, min_new_tokens=0)
    out = generate(load_language_model(TINY), *prompt_batch(), settings, 7, ends, samples=4, batch_size=4)
    responses = out.tokens[:, 4:]
    longest = [int(part.sum(dim=1).max()) for part in out.mask.split(4)]
    assert len(set(longest)) > 1  # a batch of its own for each prompt
    assert (responses[~out.mask] == 7).all()


def test_ranks_in_step_decode_until_the_last_of_them_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here another rank needs seven tokens, where this one's responses end at once."""
    asked: list[int] = []

    def all_reduce(flag: torch.Tensor, op: Any) -> None:
        asked.append(int(flag))
        flag.fill_(max(int(flag), int(len(asked) < 7)))

    monkeypatch.setattr(decoding.dist, "all_reduce", all_reduce)
    model = load_language_model(TINY)
    rows = rows_read(model)
    every = list(range(1024))  # whatever is sampled ends the response
    out = generate(model, *prompt_batch(), Sampling(max_new_tokens=20, min_new_tokens=0), PAD, every, in_step=True)
    assert asked == [0] * 7
    assert len(rows) == 7
    assert out.mask.sum(dim=1).tolist() == [1, 1, 1]
    assert out.tokens.shape[1] == 5
    generate(model, *prompt_batch(), Sampling(max_new_tokens=20, min_new_tokens=0), PAD, every)
    assert len(rows) == 8
