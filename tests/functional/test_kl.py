import math

import pytest
import torch

from lit_rlhf import AdaptiveKL, FixedKL, KLController
from lit_rlhf.functional import kl_estimate

MASK = torch.tensor([[True, True, False], [True, False, False]])
ESTIMATORS = ["k1", "k2", "k3"]


def pair():
    g = torch.Generator().manual_seed(0)
    return -torch.rand(2, 3, generator=g) * 4, -torch.rand(2, 3, generator=g) * 4


def test_hand_typed_numbers():
    log_probs, ref = torch.tensor([[0.5, -1.0, 3.0]]) - 4, torch.tensor([[0.0, 0.0, 0.0]]) - 4
    mask = torch.tensor([[True, True, False]])
    want = {"k1": [0.5, -1.0, 0.0], "k2": [0.125, 0.5, 0.0], "k3": [0.1065307, 0.7182818, 0.0]}
    for name, numbers in want.items():
        torch.testing.assert_close(kl_estimate(log_probs, ref, mask, name), torch.tensor([numbers]))


def test_against_a_loop():
    log_probs, ref = pair()
    for name in ESTIMATORS:
        got = kl_estimate(log_probs.double(), ref.double(), MASK, name)
        for b in range(2):
            for t in range(3):
                d = log_probs[b, t].item() - ref[b, t].item()
                want = {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[name] if MASK[b, t] else 0.0
                assert got[b, t].item() == pytest.approx(want, abs=1e-12)


def test_expectation_under_the_policy_is_the_kl_divergence():
    g = torch.Generator().manual_seed(0)
    log_p = torch.randn(1, 50, generator=g, dtype=torch.float64).log_softmax(-1)
    log_q = torch.randn(1, 50, generator=g, dtype=torch.float64).log_softmax(-1)
    every = torch.ones(1, 50, dtype=torch.bool)
    kl = (log_p.exp() * (log_p - log_q)).sum().item()
    for name in ("k1", "k3"):
        assert (log_p.exp() * kl_estimate(log_p, log_q, every, name)).sum().item() == pytest.approx(kl)
    assert (kl_estimate(log_p, log_q, every, "k3") >= 0).all()


def test_k3_stays_precise_and_not_negative_near_zero():
    log_probs = torch.full((1, 1), -2.0, dtype=torch.float64)
    k3 = kl_estimate(log_probs, log_probs - 1e-7, torch.ones(1, 1, dtype=torch.bool), "k3")
    assert k3.item() == pytest.approx(5e-15, rel=0.05)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_equal_policies_give_exactly_zero(estimator):
    log_probs, _ = pair()
    assert (kl_estimate(log_probs, log_probs, MASK, estimator) == 0).all()


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), -1e30])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_junk_changes_nothing_in_value_and_gradient(estimator, junk):
    log_probs, ref = pair()
    dirty, clean = torch.where(MASK, log_probs, junk).requires_grad_(), log_probs.clone().requires_grad_()
    out = kl_estimate(dirty, torch.where(MASK, ref, -junk), MASK, estimator)
    want = kl_estimate(clean, ref, MASK, estimator)
    assert torch.equal(out, want)
    assert (out[~MASK] == 0).all()
    out.sum().backward()
    want.sum().backward()
    assert torch.equal(dirty.grad, clean.grad)


def test_rows_are_independent():
    log_probs, ref = pair()
    rows = [kl_estimate(log_probs[i : i + 1], ref[i : i + 1], MASK[i : i + 1], "k3") for i in range(2)]
    assert torch.equal(torch.cat(rows), kl_estimate(log_probs, ref, MASK, "k3"))


def test_inputs_unchanged():
    log_probs, ref = pair()
    before = log_probs.clone(), ref.clone(), MASK.clone()
    kl_estimate(log_probs, ref, MASK, "k3")
    assert torch.equal(log_probs, before[0])
    assert torch.equal(ref, before[1])
    assert torch.equal(MASK, before[2])


def test_error_messages():
    log_probs, ref = pair()
    with pytest.raises(ValueError, match=r"ref_log_probs has shape \(2, 2\), but log_probs has shape \(2, 3\)"):
        kl_estimate(log_probs, ref[:, 1:], MASK)
    with pytest.raises(TypeError, match="mask must be bool"):
        kl_estimate(log_probs, ref, MASK.float())
    with pytest.raises(ValueError, match="estimator must be 'k1', 'k2' or 'k3', got 'k4'"):
        kl_estimate(log_probs, ref, MASK, "k4")


# --- controllers ---


def test_fixed_stays():
    control = FixedKL(0.05)
    control.update(100.0, 64)
    assert control.value == 0.05


def test_adaptive_by_hand():
    control = AdaptiveKL(coefficient=0.2, target=6.0, horizon=1000.0)
    control.update(6.6, 100)  # error 0.1
    assert control.value == pytest.approx(0.2 * 1.01)
    control.update(60.0, 100)  # error clipped to 0.2
    assert control.value == pytest.approx(0.2 * 1.01 * 1.02)
    control.update(-5.0, 100)  # error clipped to -0.2
    assert control.value == pytest.approx(0.2 * 1.01 * 1.02 * 0.98)
    control.update(6.0, 100)
    assert control.value == pytest.approx(0.2 * 1.01 * 1.02 * 0.98)


def test_target_and_horizon_by_hand():
    control = AdaptiveKL(coefficient=0.5, target=2.0, horizon=400.0)
    control.update(2.2, 100)  # error 0.1, a quarter of the horizon
    assert control.value == pytest.approx(0.5 * 1.025)


def test_coefficients_that_are_not_given_are_the_papers():
    assert FixedKL().value == 0.05
    control = AdaptiveKL()  # Ziegler et al.: 6 nats, ten thousand episodes
    assert control.value == 0.2
    control.update(6.6, 100)
    assert control.value == pytest.approx(0.2 * 1.001)


@pytest.mark.parametrize("horizon", [2.0, 1.6])
def test_an_iteration_too_long_for_the_horizon_is_a_problem_before_it_is_an_error(horizon):
    control, most = AdaptiveKL(horizon=horizon), math.ceil(5 * horizon) - 1
    assert control.problems(most) == []
    control.update(0.0, most)
    assert control.value > 0
    (problem,) = control.problems(most + 1)
    assert f"above a fifth of an iteration's {most + 1} responses" in problem
    with pytest.raises(ValueError, match="n must lie in"):
        control.update(0.0, most + 1)


def test_a_fixed_coefficient_is_no_state():
    first, second = FixedKL(0.3), FixedKL(0.1)
    second.load_state_dict(first.state_dict())
    assert (first.value, second.value) == (0.3, 0.1)


def test_state_goes_on_in_another_controller():
    first, second = AdaptiveKL(coefficient=0.3), AdaptiveKL(coefficient=0.1)
    first.update(9.0, 64)
    state = first.state_dict()
    assert all(type(v) is float for v in state.values())
    second.load_state_dict(state)
    assert second.value == first.value
    first.update(1.0, 64)
    second.update(1.0, 64)
    assert second.value == first.value


def test_controllers_can_be_subclassed():
    class Doubling(KLController):
        def update(self, kl, n):
            self._value *= 2

    control = Doubling(0.25)
    control.update(1.0, 1)
    assert control.value == 0.5
    with pytest.raises(TypeError, match="abstract"):
        KLController(0.1)


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (FixedKL, {"coefficient": -0.1}, "coefficient must be finite and not negative, got -0.1"),
        (FixedKL, {"coefficient": math.nan}, "coefficient must be finite"),
        (AdaptiveKL, {"coefficient": 0.0}, "coefficient must be finite and positive, got 0.0"),
        (AdaptiveKL, {"target": 0}, "target must be finite and positive, got 0.0"),
        (AdaptiveKL, {"horizon": -1}, "horizon must be finite and positive, got -1.0"),
    ],
)
def test_constructor_errors(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_update_and_load_errors():
    control = AdaptiveKL(horizon=100.0)
    with pytest.raises(ValueError, match="kl must be finite, got nan"):
        control.update(math.nan, 1)
    with pytest.raises(ValueError, match=r"n must lie in \[0, 5 \* horizon = 500.0\), got 500"):
        control.update(1.0, 500)
    with pytest.raises(ValueError, match=r"coefficient must be finite and not negative, got -1.0"):
        control.load_state_dict({"coefficient": -1.0})
    assert FixedKL(0.0).value == 0.0
