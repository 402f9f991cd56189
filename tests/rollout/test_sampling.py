"""The inverse-CDF draw: exact, never a token without probability, and with transformers' top-k and top-p."""

import pytest
import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from lit_rlhf.rollout import Sampling
from lit_rlhf.rollout.sampling import BLOCK, Sampler, inverse_cdf


def make_sampler(rows: int, steps: int = 1, greedy: torch.Tensor | None = None, **settings: object) -> Sampler:
    sampling = Sampling(**{"min_new_tokens": 0, **settings})  # type: ignore[arg-type]
    greedy = torch.zeros(rows, dtype=torch.bool) if greedy is None else greedy
    return Sampler(sampling, torch.rand(rows, steps, dtype=torch.float64), greedy, torch.tensor([2]))


@pytest.mark.parametrize("vocabulary", [7, BLOCK, 3 * BLOCK + 11])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_frequencies_are_those_of_the_softmax(vocabulary: int, temperature: float) -> None:
    torch.manual_seed(0)
    draws = 60000
    logits = torch.randn(vocabulary)
    tokens, _ = make_sampler(draws, temperature=temperature)(logits.expand(draws, -1), 0, torch.arange(draws))
    expected = (logits.double() / temperature).softmax(0) * draws
    # Rare tokens count as one class, so that every class expects enough draws.
    rare = expected < 8
    classes = torch.cat([expected[~rare], expected[rare].sum()[None]]).clamp_min(1e-9)
    found = torch.bincount(tokens, minlength=vocabulary).double()
    counts = torch.cat([found[~rare], found[rare].sum()[None]])
    chi_squared = float(((counts - classes) ** 2 / classes).sum())
    freedom = len(classes) - 1
    assert chi_squared < freedom + 5 * (2 * freedom) ** 0.5
    # The statistic has power: frequencies at another temperature fail it.
    other = (logits.double() / (temperature * 1.1)).softmax(0) * draws
    assert float(((found - other) ** 2 / other).sum()) > freedom + 5 * (2 * freedom) ** 0.5


def test_the_inverse_cdf_steps_where_the_cumulated_weights_do() -> None:
    weights = torch.tensor([1.0, 0.0, 2.0, 0.0, 5.0, 0.0]).repeat(1, 100)  # 600 entries, three blocks
    cumulated = weights[0].double().cumsum(0) / weights.double().sum()
    uniforms = torch.linspace(0, 1, 9973, dtype=torch.float64)[:-1] + 1e-7
    found = inverse_cdf(weights.expand(len(uniforms), -1), uniforms)
    assert torch.equal(found, torch.searchsorted(cumulated, uniforms, right=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("uniform", [0.0, 2.0**-24, 0.5, 1 - 2.0**-24, 1 - 2.0**-53, 1.0])
def test_a_token_without_probability_is_never_chosen(uniform: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        # Weights as awkward to add up as they come: 24 orders of magnitude, most of them zero, both ends too.
        weights = torch.rand(8, 2000, generator=generator) * 10 ** (torch.rand(8, 2000, generator=generator) * 24 - 24)
        weights[torch.rand(8, 2000, generator=generator) < 0.9] = 0
        weights[:, :300] = weights[:, -300:] = 0
        found = inverse_cdf(weights, torch.full((8,), uniform, dtype=dtype))
        assert (weights.gather(1, found[:, None]) > 0).all()


@pytest.mark.parametrize("settings", [{"top_k": 5}, {"top_p": 0.7}, {"top_p": 0.999}, {"top_k": 40, "top_p": 0.8}])
def test_top_k_and_top_p_leave_the_tokens_that_transformers_leaves(settings: dict) -> None:
    torch.manual_seed(0)
    logits = 2 * torch.randn(16, 3000)
    kept = Sampling(**settings).weights(logits.softmax(1)) > 0
    scores = logits
    if "top_k" in settings:
        scores = TopKLogitsWarper(settings["top_k"])(None, scores)  # type: ignore[arg-type]
    if "top_p" in settings:
        scores = TopPLogitsWarper(settings["top_p"])(None, scores)  # type: ignore[arg-type]
    assert torch.equal(kept, scores.isfinite())
    assert kept.sum() < kept.numel()


def test_every_drawn_token_is_among_those_left() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 3000).expand(5000, -1)
    sampler = make_sampler(5000, top_k=6, top_p=0.9)
    tokens, _ = sampler(logits, 0, torch.arange(5000))
    left = (sampler.sampling.weights(logits[:1].softmax(1))[0] > 0).nonzero()[:, 0]
    assert 1 < len(left) <= 6
    assert sorted(set(tokens.tolist())) == left.tolist()


def test_log_probs_are_the_policys_own_even_of_tokens_whose_probability_underflows() -> None:
    logits = torch.tensor([[0.0, -3.0, 400.0], [1.0, 2.0, 3.0]])
    sampler = make_sampler(2, greedy=torch.tensor([True, True]), min_new_tokens=1, max_new_tokens=2, temperature=2.0)
    tokens, log_probs = sampler(logits, 0, torch.arange(2))  # token 2 is the EOS, forbidden in the first step
    assert tokens.tolist() == [0, 1]
    expected = (logits.double() / 2).log_softmax(1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(log_probs.double(), expected, atol=1e-5, rtol=0)
    later, _ = sampler(logits, 1, torch.arange(2))
    assert later.tolist() == [2, 2]


def test_a_row_draws_the_same_whatever_rows_stand_beside_it() -> None:
    torch.manual_seed(0)
    sampler = make_sampler(6, steps=4, max_new_tokens=4)
    logits = torch.randn(6, 500)
    together, _ = sampler(logits, 3, torch.arange(6))
    rows = torch.tensor([5, 0, 2])
    some, _ = sampler(logits[rows], 3, rows)
    assert torch.equal(some, together[rows])


def test_greedy_rows_leave_the_others_as_they_are() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 500)
    sampler = make_sampler(4)
    sampled, _ = sampler(logits, 0, torch.arange(4))
    sampler = Sampler(sampler.sampling, sampler.uniforms, torch.tensor([True, False, True, False]), sampler.eos_ids)
    mixed, _ = sampler(logits, 0, torch.arange(4))
    assert mixed.tolist() == [logits[0].argmax(), sampled[1], logits[2].argmax(), sampled[3]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"top_p": 0.5}])
def test_logits_that_are_not_finite_are_an_error_at_the_end(bad: float, settings: dict) -> None:
    sampler = make_sampler(3, **settings)
    logits = torch.randn(3, 300)
    sampler(logits, 0, torch.arange(3))
    sampler.check()
    logits[1, 77] = bad
    sampler(logits, 0, torch.arange(3))
    with pytest.raises(RuntimeError, match="logits are not finite"):
        sampler.check()
