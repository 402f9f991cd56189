import math

import pytest
import torch

from lit_rlhf.metrics import PairwiseAccuracy, RewardMargin, TokenPerplexity


def batches(kind):
    g = torch.Generator().manual_seed(0)
    shapes = [(4, 6), (1, 6), (3, 2)] if kind is TokenPerplexity else [(5,), (1,), (8,)]
    out = []
    for shape in shapes:
        a, b = torch.randn(shape, generator=g), torch.randn(shape, generator=g)
        out.append((-a.abs(), b > 0) if kind is TokenPerplexity else (a.round(), b.round()))
    return out


every_metric = pytest.mark.parametrize("kind", [TokenPerplexity, PairwiseAccuracy, RewardMargin])


def test_perplexity_by_hand():
    metric = TokenPerplexity()
    mask = torch.tensor([[True, True, False]])
    metric.update(torch.tensor([[0.5, 0.25, 0.9]]).log(), mask)
    metric.update(torch.tensor([[0.125]]).log(), torch.tensor([[True]]))
    assert metric.compute().item() == pytest.approx(4.0)  # (2 * 4 * 8) ** (1 / 3), tokens weigh alike


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), -1e30])
def test_perplexity_ignores_junk(junk):
    metric = TokenPerplexity()
    metric.update(torch.tensor([[math.log(0.5), junk]]), torch.tensor([[True, False]]))
    assert metric.compute().item() == pytest.approx(2.0)


def test_pairwise_accuracy_by_hand():
    metric = PairwiseAccuracy()
    metric.update(torch.tensor([1.0, 0.0, 2.0, 5.0]), torch.tensor([0.0, 1.0, 2.0, 4.0]))
    assert metric.compute().item() == 0.625  # win, loss, tie, win


def test_reward_margin_by_hand():
    metric = RewardMargin()
    metric.update(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.0]))
    metric.update(torch.tensor([8.0]), torch.tensor([0.0]))
    assert metric.compute().item() == 2.0


@every_metric
def test_merging_two_states_equals_joint(kind):
    data = batches(kind)
    joint, one, two = kind(), kind(), kind()
    for item in data:
        joint.update(*item)
    one.update(*data[0])
    one.update(*data[1])
    two.update(*data[2])
    one.merge_state(two)
    torch.testing.assert_close(one.compute(), joint.compute())


@every_metric
def test_states_are_summed_over_ranks(kind):
    metric = kind()
    assert all(r is not None and r.__name__ == "dim_zero_sum" for r in metric._reductions.values())


@every_metric
def test_forward_gives_the_batch_and_keeps_the_total(kind):
    data = batches(kind)
    metric, joint = kind(), kind()
    for item in data:
        alone = kind()
        alone.update(*item)
        joint.update(*item)
        torch.testing.assert_close(metric(*item), alone.compute())
    torch.testing.assert_close(metric.compute(), joint.compute())


@every_metric
@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_reset_and_nothing_seen(kind):
    metric = kind()
    metric.update(*batches(kind)[0])
    metric.reset()
    assert metric.compute().isnan()
    metric.update(*(x[:0] for x in batches(kind)[0]))
    metric.reset()
    assert metric.compute().isnan()


@every_metric
def test_half_precision_and_grad_inputs_unchanged(kind):
    first, second = batches(kind)[0]
    low = first.bfloat16().requires_grad_()
    before = low.detach().clone(), second.clone()
    metric = kind()
    metric.update(low, second)
    assert metric.compute().dtype == torch.float32
    assert not metric.compute().requires_grad
    assert torch.equal(low, before[0])
    assert torch.equal(second, before[1])


def test_error_messages():
    with pytest.raises(ValueError, match=r"mask has shape \(1, 2\), but log_probs has shape \(1, 3\)"):
        TokenPerplexity().update(torch.zeros(1, 3), torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(TypeError, match="mask must be bool"):
        TokenPerplexity().update(torch.zeros(1, 3), torch.ones(1, 3))
    for kind in (PairwiseAccuracy, RewardMargin):
        with pytest.raises(ValueError, match=r"rejected_scores has shape \(2,\), but chosen_scores has shape \(3,\)"):
            kind().update(torch.zeros(3), torch.zeros(2))
        with pytest.raises(ValueError, match=r"chosen_scores must have 1 dimension\(s\), got shape \(3, 1\)"):
            kind().update(torch.zeros(3, 1), torch.zeros(3, 1))


def test_sums_are_float64_inside_a_module_that_was_moved():
    module = torch.nn.ModuleDict({"margin": RewardMargin()}).to("cpu")
    module["margin"].update(torch.tensor([2.0**24, -(2.0**24)]), torch.tensor([-1.0, 0.0]))
    assert float(module["margin"].compute()) == 0.5  # float32 rounds the first difference to 2 ** 24
