import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_rlhf.functional import token_log_probs

VARIANTS = {
    "plain": {},
    "scale": {"scale": 0.3},
    "softcap": {"softcap": 1.5},
    "temperature": {"temperature": 0.7},
    "all": {"scale": 1.7, "softcap": 2.5, "temperature": 1.3},
}


def naive(hidden, weight, targets, bias=None, scale=1.0, softcap=None, temperature=1.0):
    logits = torch.nn.functional.linear(hidden, weight, bias) * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    log_p = (logits / temperature).log_softmax(-1)
    return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def inputs(n=11, h=5, v=17, dtype=torch.float64, bias=True, seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, h, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(v, h, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    b = torch.randn(v, generator=g, dtype=torch.float64).to(dtype).requires_grad_() if bias else None
    return hidden, weight, torch.randint(v, (n,), generator=g), b


def test_hand_typed_numbers():
    # logits (0, ln 3): probabilities 1/4 and 3/4; entropy = ln 4 - 3/4 ln 3
    hidden, weight = torch.tensor([[1.0], [1.0]]), torch.tensor([[0.0], [1.0986123]])
    log_probs, entropy = token_log_probs(hidden, weight, torch.tensor([0, 1]), with_entropy=True)
    torch.testing.assert_close(log_probs, torch.tensor([-1.3862944, -0.2876821]))
    torch.testing.assert_close(entropy, torch.tensor([0.5623351, 0.5623351]))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk_size", [1, 4, 11, 128])
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_values_and_gradients_match_full_log_softmax(options, chunk_size, bias):
    hidden, weight, targets, b = inputs(bias=bias)
    leaves = [t for t in (hidden, weight, b) if t is not None]
    log_probs, entropy = token_log_probs(
        hidden, weight, targets, bias=b, chunk_size=chunk_size, with_entropy=True, **options
    )
    want_log_probs, want_entropy = naive(hidden, weight, targets, b, **options)
    torch.testing.assert_close(log_probs, want_log_probs)
    torch.testing.assert_close(entropy, want_entropy)
    g = torch.arange(1.0, 12.0, dtype=torch.float64)
    got = torch.autograd.grad((log_probs.exp() * g + entropy.square() * g.flip(0)).sum(), leaves)
    want = torch.autograd.grad((want_log_probs.exp() * g + want_entropy.square() * g.flip(0)).sum(), leaves)
    for a, e in zip(got, want, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("with_entropy", [False, True])
def test_gradcheck(options, with_entropy):
    hidden, weight, targets, bias = inputs(n=3, h=2, v=4)

    def run(h, w, b):
        out = token_log_probs(h, w, targets, bias=b, chunk_size=2, with_entropy=with_entropy, **options)
        return out if with_entropy else out[0]

    assert torch.autograd.gradcheck(run, (hidden, weight, bias))


def test_only_log_probs_used_although_entropy_was_asked_for():
    hidden, weight, targets, _ = inputs()
    token_log_probs(hidden, weight, targets, with_entropy=True)[0].sum().backward()
    want = torch.autograd.grad(naive(hidden, weight, targets)[0].sum(), hidden)[0]
    torch.testing.assert_close(hidden.grad, want)


@pytest.mark.skipif(not hasattr(torch.nn.functional, "linear_cross_entropy"), reason="older torch")
def test_matches_torch_linear_cross_entropy():
    hidden, weight, targets, bias = inputs(n=50, h=16, v=300, dtype=torch.float32)
    got = token_log_probs(hidden, weight, targets, bias=bias, chunk_size=16)[0]
    want = -torch.nn.functional.linear_cross_entropy(hidden, weight, targets, linear_bias=bias, reduction="none")
    torch.testing.assert_close(got, want)
    leaves = (hidden, weight, bias)
    for a, e in zip(torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), leaves), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


def test_bfloat16_inputs_give_float32_outputs():
    hidden, weight, targets, bias = inputs(n=40, h=32, v=200, dtype=torch.bfloat16)
    weight.data.mul_(0.2)
    log_probs, entropy = token_log_probs(hidden, weight, targets, bias=bias, chunk_size=16, with_entropy=True)
    want = naive(hidden.double(), weight.double(), targets, bias.double())
    assert log_probs.dtype == entropy.dtype == torch.float32
    assert (log_probs - want[0]).abs().max() < 0.02
    assert (entropy - want[1]).abs().max() < 0.02
    got = torch.autograd.grad((log_probs + entropy).sum(), (hidden, weight, bias))
    exact = torch.autograd.grad((want[0] + want[1]).sum(), (hidden, weight, bias))
    for a, e in zip(got, exact, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.double() - e.double()).norm() < 0.02 * e.double().norm()


def test_autocast_uses_its_dtype_in_both_directions():
    hidden, weight, targets, bias = inputs(n=20, h=16, v=50, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        log_probs = token_log_probs(hidden, weight, targets, bias=bias)[0]
    low = [t.detach().bfloat16() for t in (hidden, weight, bias)]
    assert log_probs.dtype == torch.float32
    assert torch.equal(log_probs, token_log_probs(low[0], low[1], targets, bias=low[2])[0])
    log_probs.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32
    want = torch.autograd.grad(naive(hidden, weight, targets, bias)[0].sum(), hidden)[0]
    assert (hidden.grad - want).norm() < 0.03 * want.norm()


@pytest.mark.parametrize("train_hidden", [True, False])
@pytest.mark.parametrize("train_weight", [True, False])
def test_gradients_only_where_required(train_hidden, train_weight):
    hidden, weight, targets, bias = inputs()
    hidden.requires_grad_(train_hidden)
    weight.requires_grad_(train_weight)
    token_log_probs(hidden, weight, targets, bias=bias)[0].sum().backward()
    assert (hidden.grad is not None) == train_hidden
    assert (weight.grad is not None) == train_weight


def test_no_tokens():
    hidden, weight, targets, bias = inputs(n=0)
    log_probs, entropy = token_log_probs(hidden, weight, targets, bias=bias, with_entropy=True)
    assert log_probs.shape == entropy.shape == (0,)
    (log_probs.sum() + entropy.sum()).backward()
    assert hidden.grad.shape == (0, 5)
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_chunk_size_does_not_change_float32_values():
    hidden, weight, targets, bias = inputs(n=100, h=8, v=64, dtype=torch.float32)
    results = [token_log_probs(hidden, weight, targets, bias=bias, chunk_size=c)[0] for c in (1, 7, 64, 500)]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-6, atol=1e-6)


def test_token_order_and_removal_change_nothing():
    hidden, weight, targets, _ = inputs()
    keep = torch.tensor([7, 2, 9])
    part = token_log_probs(hidden[keep], weight, targets[keep])[0]
    torch.testing.assert_close(part, token_log_probs(hidden, weight, targets)[0][keep])


def test_impossible_tokens_do_not_spoil_entropy_or_gradients():
    hidden, weight, targets, bias = inputs()
    bias = bias.detach()
    bias[3] = -torch.inf
    targets[targets == 3] = 4
    log_probs, entropy = token_log_probs(hidden, weight, targets, bias=bias, with_entropy=True)
    (log_probs + entropy).sum().backward()
    assert entropy.isfinite().all()
    assert hidden.grad.isfinite().all()
    rest = torch.arange(17) != 3
    shifted = targets - (targets > 3).long()
    want = token_log_probs(hidden, weight[rest], shifted, bias=bias[rest], with_entropy=True)
    torch.testing.assert_close(entropy, want[1])


def test_large_logits_stay_finite():
    hidden = torch.tensor([[1e4]], requires_grad=True)
    log_probs, entropy = token_log_probs(hidden, torch.tensor([[1.0], [-1.0]]), torch.tensor([0]), with_entropy=True)
    assert log_probs.item() == entropy.item() == 0.0


def test_inputs_unchanged():
    tensors = inputs()
    before = [t.detach().clone() for t in tensors]
    log_probs, entropy = token_log_probs(*tensors[:3], bias=tensors[3], softcap=2.0, with_entropy=True)
    (log_probs + entropy).sum().backward()
    for t, b in zip(tensors, before, strict=True):
        assert torch.equal(t, b)


def test_error_messages():
    hidden, weight, targets, bias = inputs()
    with pytest.raises(ValueError, match=r"targets has shape \(10,\), but hidden has shape \(11, 5\)"):
        token_log_probs(hidden, weight, targets[1:])
    with pytest.raises(ValueError, match=r"weight has shape \(17, 4\), but hidden has shape \(11, 5\)"):
        token_log_probs(hidden, weight[:, 1:], targets)
    with pytest.raises(ValueError, match=r"bias has shape \(16,\), but weight has shape \(17, 5\)"):
        token_log_probs(hidden, weight, targets, bias=bias[1:])
    with pytest.raises(ValueError, match=r"hidden must have 2 dimension\(s\), got shape \(1, 11, 5\)"):
        token_log_probs(hidden[None], weight, targets)
    with pytest.raises(ValueError, match=r"weight has dtype torch.bfloat16, but hidden has dtype torch.float64"):
        token_log_probs(hidden, weight.bfloat16(), targets)
    for name in ("softcap", "temperature", "chunk_size"):
        with pytest.raises(ValueError, match=f"{name} must be positive, got 0"):
            token_log_probs(hidden, weight, targets, **{name: 0})


class LiveBytes(TorchDispatchMode):
    """Sum of the storages that operators create, and its peak. Storages known before are not counted."""

    def __init__(self, known):
        super().__init__()
        self.known = {t.untyped_storage()._cdata for t in known}
        self.live, self.current, self.peak = {}, 0, 0

    def _add(self, tensor):
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.known and key not in self.live:
            self.live[key] = storage.nbytes()
            self.current += storage.nbytes()
            self.peak = max(self.peak, self.current)
            weakref.finalize(storage, self._free, key)

    def _free(self, key):
        self.current -= self.live.pop(key, 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf)
        return out


def peak_bytes(run, hidden, weight, targets, with_entropy):
    hidden = hidden.detach().requires_grad_()
    with LiveBytes([hidden, weight, targets]) as live:
        log_probs, entropy = run(hidden, weight, targets)
        (log_probs.sum() + entropy.sum() if with_entropy else log_probs.sum()).backward()
    return live.peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_peak_memory_is_at_most_a_quarter_of_full_log_softmax(dtype, with_entropy):
    def full(hidden, weight, targets):
        log_p = torch.nn.functional.linear(hidden, weight).float().log_softmax(-1)
        log_probs = log_p.gather(1, targets[:, None])[:, 0]
        return log_probs, -(log_p.exp() * log_p).sum(-1) if with_entropy else None

    def chunked(hidden, weight, targets):
        return token_log_probs(hidden, weight, targets, with_entropy=with_entropy)

    n, h, v, chunk = 512, 64, 49152, 128
    hidden, weight = torch.randn(n, h, dtype=dtype), torch.randn(v, h, dtype=dtype)
    targets = torch.randint(v, (n,))
    args = hidden, weight, targets, with_entropy
    naive_peak, peak = peak_bytes(full, *args), peak_bytes(chunked, *args)
    assert naive_peak > 2 * n * v * 4
    assert peak <= naive_peak / 4
    assert peak < 3 * chunk * v * 4  # "a few chunk * V floats"
    twice = torch.cat([hidden, hidden]), weight, torch.cat([targets, targets]), with_entropy
    assert peak_bytes(chunked, *twice) < 1.02 * peak  # and it does not grow with the number of tokens
