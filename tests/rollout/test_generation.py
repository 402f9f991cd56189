"""Sampling: masks, padding, leaks of other people's settings, and the KV-cache trap."""

import pytest
import torch
from helpers import TINY

from lit_rlhf.backbone import load_language_model
from lit_rlhf.rollout import Experience, Sampling, generate

PAD, EOS = 0, [2, 9]


def prompt_batch() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.tensor([[PAD, PAD, 40, 41], [50, 51, 52, 53], [PAD, 60, 61, 62]])
    return tokens, torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]], dtype=torch.bool)


def run(sampling: Sampling, greedy: bool = False, **kwargs: object) -> Experience:
    torch.manual_seed(0)
    model = load_language_model(TINY)
    return generate(model, *prompt_batch(), sampling, PAD, EOS, greedy=greedy, **kwargs)  # type: ignore[arg-type]


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
        single = generate(model, alone, torch.ones_like(alone).bool(), settings, PAD, EOS, greedy=True)
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
    config = Sampling(max_new_tokens=3).to_config(PAD, EOS)
    model = load_language_model(TINY)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.top_k = 1
    torch.manual_seed(0)
    a = generate(model, *prompt_batch(), Sampling(max_new_tokens=8, min_new_tokens=8), PAD, EOS)
    assert config.top_k == 0
    assert len({tuple(row) for row in a.tokens[:, 4:].tolist()}) == 3
    greedy = generate(model, *prompt_batch(), Sampling(max_new_tokens=8, min_new_tokens=8), PAD, EOS, greedy=True)
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
