from pathlib import Path

import pytest
import torch

from lit_rlhf.functional import gae, group_normalize, leave_one_out, remax_returns, returns_to_go, token_rewards

JUNK = [float("nan"), float("inf"), -1e30]


def batch(lengths=(7, 1, 0, 12, 4), width=12, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    rewards, values = (torch.randn(len(lengths), width, generator=g, dtype=torch.float64) for _ in range(2))
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return rewards.to(dtype), values.to(dtype), mask


def loop_gae(rewards, values, mask, gamma, lam):
    advantages, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)
    for b in range(len(rewards)):
        running = following = 0.0
        for t in reversed(range(int(mask[b].sum()))):
            delta = rewards[b, t].item() + gamma * following - values[b, t].item()
            running = delta + gamma * lam * running
            following = values[b, t].item()
            advantages[b, t], returns[b, t] = running, running + following
    return advantages, returns


# --- gae ---


def test_gae_by_hand():
    rewards, values = torch.tensor([[0.0, 0.0, 1.0, 7.0]]), torch.tensor([[0.5, 0.25, 0.75, 7.0]])
    mask = torch.tensor([[True, True, True, False]])
    # deltas -0.25, 0.5, 0.25 at gamma 1; lambda 0.5: 0.25, 0.5 + 0.125, -0.25 + 0.3125
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=0.5)
    assert advantages.tolist() == [[0.0625, 0.625, 0.25, 0.0]]
    assert returns.tolist() == [[0.5625, 0.875, 1.0, 0.0]]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.99, 0.95), (1.0, 1.0), (0.9, 0.0), (0.0, 1.0), (0.5, 0.5)])
@pytest.mark.parametrize("width", [12, 13, 16, 17])
def test_gae_against_a_loop(gamma, lam, width):
    rewards, values, mask = batch(width=width)
    for got, want in zip(
        gae(rewards, values, mask, gamma, lam), loop_gae(rewards, values, mask, gamma, lam), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_gae_float32_over_a_long_row():
    rewards, values, mask = batch(lengths=(3000, 1234), width=3000)
    want = loop_gae(rewards.float().double(), values.float().double(), mask, 1.0, 0.95)
    for got, exact in zip(gae(rewards.float(), values.float(), mask, 1.0, 0.95), want, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=1e-6)


def test_gae_lambda_one_gives_reward_to_go():
    rewards, values, mask = batch()
    returns = gae(rewards, values, mask, 0.9, 1.0)[1]
    torch.testing.assert_close(returns, returns_to_go(rewards, mask, 0.9))


@pytest.mark.parametrize("junk", JUNK)
def test_gae_ignores_junk_in_value_and_gradient(junk):
    rewards, values, mask = batch()
    dirty = [torch.where(mask, x, junk).requires_grad_() for x in (rewards, values)]
    clean = [x.clone().requires_grad_() for x in (rewards, values)]
    got, want = gae(*dirty, mask, 0.99, 0.95), gae(*clean, mask, 0.99, 0.95)
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)
        assert (g[~mask] == 0).all()
    sum(g.square().sum() for g in got).backward()
    sum(w.square().sum() for w in want).backward()
    for d, c in zip(dirty, clean, strict=True):
        assert torch.equal(d.grad, c.grad)


def test_gae_rows_are_independent_and_width_does_not_matter():
    rewards, values, mask = batch()
    whole = gae(rewards, values, mask, 1.0, 0.95)[0]
    for b, length in enumerate((7, 1, 0, 12, 4)):
        row = gae(rewards[b : b + 1, :length], values[b : b + 1, :length], mask[b : b + 1, :length], 1.0, 0.95)[0]
        torch.testing.assert_close(row, whole[b : b + 1, :length])


def test_gae_of_left_padded_rows_is_the_same():
    rewards, values, mask = (x.flip(-1) for x in batch(lengths=(5, 3)))
    right = [torch.stack([x[0, -5:], torch.nn.functional.pad(x[1, -3:], (0, 2))]) for x in (rewards, values)]
    got = gae(rewards, values, mask, 0.9, 0.8)[0]
    want = gae(*right, torch.arange(5) < torch.tensor([[5], [3]]), 0.9, 0.8)[0]
    torch.testing.assert_close(got[0, -5:], want[0])
    torch.testing.assert_close(got[1, -3:], want[1, :3])


def test_gae_result_types():
    rewards, values, mask = batch(dtype=torch.bfloat16)
    assert all(x.dtype == torch.float32 for x in gae(rewards, values, mask, 1.0, 0.95))


# --- token_rewards ---


def test_token_rewards_by_hand():
    kl = torch.tensor([[0.5, 1.0, 2.0], [3.0, 9.0, 9.0], [9.0, 9.0, 9.0]])
    mask = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    got = token_rewards(torch.tensor([10.0, 20.0, 30.0]), kl, mask, 0.1)
    torch.testing.assert_close(got, torch.tensor([[-0.05, -0.1, 9.8], [19.7, 0.0, 0.0], [0.0, 0.0, 0.0]]))


def test_token_rewards_against_a_loop():
    kl, _, mask = batch()
    scores = torch.arange(5.0, dtype=torch.float64)
    want = torch.zeros_like(kl)
    for b in range(5):
        n = int(mask[b].sum())
        for t in range(n):
            want[b, t] = -0.3 * kl[b, t] + (scores[b] if t == n - 1 else 0.0)
    torch.testing.assert_close(token_rewards(scores, kl, mask, 0.3), want)


@pytest.mark.parametrize("junk", JUNK)
def test_token_rewards_ignore_junk_in_value_and_gradient(junk):
    kl, _, mask = batch()
    scores = torch.arange(5.0, dtype=torch.float64)
    dirty_kl = torch.where(mask, kl, junk).requires_grad_()
    dirty_scores = torch.where(mask.any(-1), scores, junk).requires_grad_()
    got = token_rewards(dirty_scores, dirty_kl, mask, 0.3)
    assert torch.equal(got, token_rewards(scores, kl, mask, 0.3))
    assert (got[~mask] == 0).all()
    got.sum().backward()
    torch.testing.assert_close(dirty_kl.grad, -0.3 * mask.double())
    assert dirty_scores.grad.tolist() == [1.0, 1.0, 0.0, 1.0, 1.0]


# --- returns_to_go ---


def test_returns_to_go_by_hand():
    mask = torch.tensor([[True, True, True, False]])
    got = returns_to_go(torch.tensor([[1.0, 2.0, 4.0, 99.0]]), mask, 0.5)
    assert got.tolist() == [[3.0, 4.0, 4.0, 0.0]]


@pytest.mark.parametrize("gamma", [1.0, 0.97, 0.0])
def test_returns_to_go_against_a_loop(gamma):
    rewards, _, mask = batch()
    want = torch.zeros_like(rewards)
    for b in range(5):
        running = 0.0
        for t in reversed(range(int(mask[b].sum()))):
            running = rewards[b, t].item() + gamma * running
            want[b, t] = running
    torch.testing.assert_close(returns_to_go(rewards, mask, gamma), want)


@pytest.mark.parametrize("junk", JUNK)
def test_returns_to_go_ignore_junk(junk):
    rewards, _, mask = batch()
    dirty = torch.where(mask, rewards, junk).requires_grad_()
    got = returns_to_go(dirty, mask, 0.9)
    assert torch.equal(got, returns_to_go(rewards, mask, 0.9))
    got.sum().backward()
    assert dirty.grad.isfinite().all()
    assert (dirty.grad[~mask] == 0).all()


# --- ReMax ---


def remax_literally(gain, log_probs, ref_log_probs, length, gamma, beta):
    """The return of the ReMax authors' code, token by token: t runs from 1 to T."""
    row = []
    for t in range(1, length + 1):
        own_kl = log_probs[t - 1] - ref_log_probs[t - 1]
        row.append(gamma ** (length - t + 1) * gain - beta * own_kl)
    return row


def test_remax_returns_by_hand():
    mask = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    kl = torch.tensor([[1.0, 2.0, 3.0], [4.0, 99.0, 99.0], [99.0, 99.0, 99.0]])
    got = remax_returns(torch.tensor([8.0, -2.0, 5.0]), kl, mask, 0.5, 0.1)
    torch.testing.assert_close(got, torch.tensor([[0.9, 1.8, 3.7], [-1.4, 0.0, 0.0], [0.0, 0.0, 0.0]]))


@pytest.mark.parametrize(("gamma", "beta"), [(0.99, 0.05), (1.0, 0.0), (0.9, 1.0)])
def test_remax_returns_against_the_formula(gamma, beta):
    log_probs, reference, mask = batch()
    gain = torch.randn(5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = remax_returns(gain, log_probs - reference, mask, gamma, beta)
    for b, length in enumerate((7, 1, 0, 12, 4)):
        want = remax_literally(gain[b].item(), log_probs[b].tolist(), reference[b].tolist(), length, gamma, beta)
        assert got[b, :length].tolist() == pytest.approx(want, rel=1e-12)
        assert (got[b, length:] == 0).all()


@pytest.mark.parametrize("junk", JUNK)
def test_remax_returns_ignore_junk(junk):
    kl, _, mask = batch()
    gain = torch.arange(5.0, dtype=torch.float64)
    dirty = remax_returns(torch.where(mask.any(-1), gain, junk), torch.where(mask, kl, junk), mask, 0.99, 0.05)
    assert torch.equal(dirty, remax_returns(gain, kl, mask, 0.99, 0.05))


# --- groups ---


def test_leave_one_out_by_hand():
    # others' means: 2.5, 2, 1.5 | 0, 0, 3
    got = leave_one_out(torch.tensor([1.0, 2.0, 3.0, 6.0, 0.0, 0.0]), 3)
    assert got.tolist() == [-1.5, 0.0, 1.5, 6.0, -3.0, -3.0]


@pytest.mark.parametrize("group_size", [2, 3, 6])
def test_leave_one_out_against_a_loop(group_size):
    rewards = torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = leave_one_out(rewards, group_size)
    for i in range(12):
        start = i - i % group_size
        others = [rewards[j].item() for j in range(start, start + group_size) if j != i]
        assert got[i].item() == pytest.approx(rewards[i].item() - sum(others) / len(others))


def test_group_normalize_by_hand():
    rewards = torch.tensor([1.0, 3.0, 5.0, 5.0])
    got = group_normalize(rewards, 2, eps=0.0)
    assert got[:2].tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5])  # deviation sqrt(2), unbiased
    assert group_normalize(rewards, 2).tolist()[2:] == [0.0, 0.0]
    assert group_normalize(rewards, 2, by_std=False).tolist() == [-1.0, 1.0, 0.0, 0.0]


def test_group_normalize_against_a_loop():
    rewards = torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = group_normalize(rewards, 4, eps=1e-4)
    for start in range(0, 12, 4):
        group = rewards[start : start + 4].tolist()
        mean = sum(group) / 4
        deviation = (sum((x - mean) ** 2 for x in group) / 3) ** 0.5
        assert got[start : start + 4].tolist() == pytest.approx([(x - mean) / (deviation + 1e-4) for x in group])


def test_the_old_spelling_of_group_normalize_is_imported_with_a_warning():
    with pytest.warns(DeprecationWarning, match="is now group_normalize") as caught:
        from lit_rlhf.functional import group_normalise
    assert group_normalise is group_normalize
    assert {Path(warning.filename).name for warning in caught} == {Path(__file__).name}
    with pytest.raises(ImportError, match="group_normalised"):
        from lit_rlhf.functional import group_normalised  # noqa: F401


@pytest.mark.parametrize("function", [leave_one_out, group_normalize])
def test_groups_are_independent_and_bad_sizes_are_named(function):
    rewards = torch.randn(8)
    parts = torch.cat([function(rewards[:4], 4), function(rewards[4:], 4)])
    torch.testing.assert_close(parts, function(rewards, 4))
    assert function(rewards.bfloat16(), 2).dtype == torch.float32
    for size in (1, 3):
        with pytest.raises(ValueError, match=f"group_size must be at least 2 and divide the 8 rewards, got {size}"):
            function(rewards, size)


# --- all three ---


def test_microbatches_give_the_rows_of_the_whole():
    rewards, values, mask = batch()
    scores = torch.arange(5.0)
    for function in (
        lambda s: gae(rewards[s], values[s], mask[s], 1.0, 0.95)[1],
        lambda s: returns_to_go(rewards[s], mask[s], 0.9),
        lambda s: token_rewards(scores[s], rewards[s], mask[s], 0.1),
    ):
        parts = torch.cat([function(slice(0, 2)), function(slice(2, 5))])
        assert torch.equal(parts, function(slice(0, 5)))


def test_empty_batches():
    rewards, values, mask = batch()
    for part in ((slice(0, 0),), (slice(None), slice(0, 0))):
        r, v, m = rewards[part], values[part], mask[part]
        assert gae(r, v, m, 1.0, 0.95)[0].shape == r.shape
        assert returns_to_go(r, m, 1.0).shape == r.shape
        assert token_rewards(torch.zeros(len(r)), r, m, 0.1).shape == r.shape


def test_inputs_unchanged():
    tensors = (torch.arange(5.0), *batch())
    before = [t.clone() for t in tensors]
    scores, rewards, values, mask = tensors
    gae(rewards, values, mask, 1.0, 0.95)
    returns_to_go(rewards, mask, 1.0)
    token_rewards(scores, rewards, mask, 0.1)
    for t, b in zip(tensors, before, strict=True):
        assert torch.equal(t, b)


def test_error_messages():
    rewards, values, mask = batch()
    with pytest.raises(ValueError, match=r"values has shape \(5, 11\), but rewards has shape \(5, 12\)"):
        gae(rewards, values[:, 1:], mask, 1.0, 0.95)
    with pytest.raises(ValueError, match=r"gamma must lie in \[0, 1\], got 1.5"):
        gae(rewards, values, mask, 1.5, 0.95)
    with pytest.raises(ValueError, match=r"lam must lie in \[0, 1\], got -1"):
        gae(rewards, values, mask, 1.0, -1)
    with pytest.raises(TypeError, match="mask must be bool"):
        gae(rewards, values, mask.double(), 1.0, 0.95)
    with pytest.raises(ValueError, match=r"mask has shape \(4, 12\), but rewards has shape \(5, 12\)"):
        returns_to_go(rewards, mask[1:], 1.0)
    with pytest.raises(ValueError, match=r"scores has shape \(4,\), but kl has shape \(5, 12\)"):
        token_rewards(torch.zeros(4), rewards, mask, 0.1)
    with pytest.raises(ValueError, match=r"scores must have 1 dimension\(s\), got shape \(5, 1\)"):
        token_rewards(torch.zeros(5, 1), rewards, mask, 0.1)
