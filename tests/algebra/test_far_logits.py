"""Logits so large that float32 tells them apart by hundreds: what mathematics says, or NaN.

The gradients of those within reach are held against float64 in `test_far_gradients.py`.
"""

import math

import pytest
import torch

import kl_kernels
from kl_kernels.algebra.parts import finish_parts, local_token_ids, merge_parts
from kl_kernels.algebra.row import FARTHEST_ANCHOR

BACKENDS = ("reference", "cpu", "triton")
SIZES = (1e3, 1e6, 1e9, 3e9, 1e10, 1e12, 1e20, 1e30, 2e38)
EXACT = ("reference", "cpu")  # in their outputs, however far


def far(size, sign, vocab_size):
    """Rows whose logits are at such a distance from 0, some units in the last place apart."""
    g = torch.Generator().manual_seed(vocab_size)
    unit = math.ulp(size) * 2**29
    steps = torch.randint(4, (2, 3, vocab_size), generator=g)
    x = sign * (size - unit * steps.double()).float()
    y = x.clone()
    y[1] = y[1].roll(1, -1)
    return x, y, x.argmax(-1)


def truth(x, y, ids):
    log_p, log_q = (t.double().log_softmax(-1) for t in (x, y))
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    p, q = log_p.exp(), log_q.exp()
    return {
        "logprob": log_p.gather(-1, ids[..., None])[..., 0],
        "kl": (p * (log_p - log_q)).sum(-1),
        "entropy": -(p * log_p).sum(-1),
        "jsd": (p * (log_p - log_m) + q * (log_q - log_m)).sum(-1) / 2,
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("vocab_size", [1, 33, 2049])
def test_the_truth_or_nan(backend, size, sign, vocab_size):
    assert_true_or_nan(backend, size, sign, vocab_size)


def assert_true_or_nan(backend, size, sign, vocab_size, device="cpu"):
    x, y, ids = (t.to(device) for t in far(size, sign, vocab_size))
    close = {"rtol": 1e-5, "atol": 3e-6}
    leaf = x.clone().requires_grad_()
    found = kl_kernels.token_kl(leaf, y, ids, backend=backend)._asdict()
    found["jsd"] = kl_kernels.token_jsd(leaf, y, backend=backend)
    stats = kl_kernels.token_stats(leaf, ids, backend=backend)
    reaches = size / math.log(2) <= FARTHEST_ANCHOR
    for name, expected in truth(x, y, ids).items():
        exact = reaches or backend == "cpu" or (backend in EXACT and name != "jsd")
        for value in [found[name]] + ([getattr(stats, name)] if hasattr(stats, name) else []):
            value = value.detach().double()
            if exact:
                assert not value.isnan().any(), name
            right = torch.isclose(value, expected, **close) | value.isnan()
            assert right.all(), (name, value, expected)
    for name, output in (("logprob", stats.logprob), ("kl", found["kl"]), ("jsd", found["jsd"])):
        (grad,) = torch.autograd.grad(output.sum(), leaf)
        exact = reaches or (backend == "cpu" and name != "jsd")
        assert grad.isfinite().all() if exact else grad.isnan().all()


@pytest.mark.parametrize("parts", [2, 3])
def test_tokens_far_below_add_nothing(parts):
    """Padded vocabularies hold such tokens: lowest numbers, or -1e10."""
    torch.manual_seed(0)
    x = torch.randn(1, 2, 30)
    ids = torch.zeros(1, 2, dtype=torch.long)
    for low in (-1e10, torch.finfo(torch.float32).min):
        padded = torch.nn.functional.pad(x, (0, 30 * (parts - 1)), value=low)
        found = kl_kernels.token_stats(padded, ids)
        torch.testing.assert_close(found, kl_kernels.token_stats(x, ids))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("low", [-1e4, -1e9, -1e10, -1e30, torch.finfo(torch.float32).min])
def test_a_shard_of_nothing_but_far_logits_adds_nothing(backend, low):
    """The exception are the Triton kernels, whose float32 sums may make the row NaN."""
    torch.manual_seed(0)
    x, ids = torch.randn(1, 2, 30), torch.zeros(1, 2, dtype=torch.long)
    states = [
        torch.ops.kl_kernels.fold_part(
            shard,
            None,
            local_token_ids(ids, start, shard.shape[-1]),
            None,
            1.0,
            1.0,
            None,
            None,
            backend,
        )
        for start, shard in ((0, x), (30, torch.full((1, 2, 33), low)))
    ]
    found = finish_parts(merge_parts(torch.stack(states)), None, torch.float32).outputs
    for name, expected in kl_kernels.token_stats(x, ids)._asdict().items():
        value = getattr(found, name)
        assert (torch.isclose(value, expected, rtol=1e-6, atol=1e-6) | value.isnan()).all()
        reaches = abs(low) / math.log(2) <= FARTHEST_ANCHOR
        assert not value.isnan().any() or (backend not in EXACT and not reaches)


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("models", ["policy", "reference", "both"])
@pytest.mark.parametrize("low", [-1e10, -3.1e12, -1e30])
def test_a_part_far_below_in_either_model_leaves_a_kl_true(backend, models, low):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 1, 2, 63, generator=g)
    if models != "reference":
        x[..., 30:] = low
    if models != "policy":
        y[..., 30:] = low
    ids = torch.zeros(1, 2, dtype=torch.long)
    states = [
        torch.ops.kl_kernels.fold_part(
            x[..., part],
            y[..., part],
            local_token_ids(ids, part.start, 33),
            None,
            1.0,
            1.0,
            None,
            None,
            backend,
        )
        for part in (slice(0, 30), slice(30, 63))
    ]
    found = finish_parts(merge_parts(torch.stack(states)), None, torch.float32).outputs
    expected = kl_kernels.token_kl(x.double(), y.double(), ids, backend="reference")
    for name, value in expected._asdict().items():
        torch.testing.assert_close(
            getattr(found, name).double(), value, rtol=2e-6, atol=2e-6, msg=name
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [3e9, 1e10, 1e12])
def test_a_far_reference_leaves_the_policys_own_numbers_alone(backend, size):
    far_away, _, ids = far(size, 1, 33)
    x = (torch.randn(2, 3, 33, generator=torch.Generator().manual_seed(0)) * 3).requires_grad_()
    found = kl_kernels.token_kl(x, far_away, ids, backend=backend)
    expected = truth(x.detach(), far_away, ids)
    for name in ("logprob", "entropy"):
        torch.testing.assert_close(
            getattr(found, name).detach().double(), expected[name], rtol=1e-5, atol=3e-6
        )
    assert torch.autograd.grad(found.logprob.sum(), x, retain_graph=True)[0].isfinite().all()
    (grad,) = torch.autograd.grad(found.kl.sum(), x)
    assert grad.isfinite().all() if backend == "cpu" else grad.isnan().all()


def test_float64_reaches_farther():
    x, y, ids = (t.double() if t.is_floating_point() else t for t in far(1e12, 1, 33))
    x = x.requires_grad_()
    log_p, log_q = x.log_softmax(-1), y.log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)
    # Two parts, on states that hold all digits, give the same.
    parts = [slice(0, 20), slice(20, 33)]
    states = [
        torch.ops.kl_kernels.fold_part(
            x.detach()[..., part],
            y[..., part],
            local_token_ids(ids, part.start, 33),
            None,
            1.0,
            1.0,
            None,
            None,
            "reference",
        )
        for part in parts
    ]
    whole = finish_parts(merge_parts(torch.stack(states)), None, torch.float64).outputs
    found = kl_kernels.token_kl(x, y, ids)
    jsd = kl_kernels.token_jsd(x, y)
    for kl in (found.kl, whole.kl):
        torch.testing.assert_close(kl, expected, rtol=1e-8, atol=1e-12)
    for ours, theirs in ((found.kl, expected), (found.logprob, log_p.gather(-1, ids[..., None]))):
        grads = [torch.autograd.grad(of.sum(), x, retain_graph=True)[0] for of in (ours, theirs)]
        # At 1e12 float64's anchors are 1e-4 apart.
        torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-3)
    assert jsd.isfinite().all()
    assert torch.autograd.grad(jsd.sum(), x)[0].isfinite().all()
