"""`compute_gae` of answers that were cut off, against a loop that knows the value after the end."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import PACKS

from kl_kernels import compute_gae

CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def loop(rewards, values, after, gamma, lam):
    """Advantages of one sequence, each a sum over the rest of it: (gamma lam)^k delta_{t+k}."""
    following = [*values[1:], after]
    deltas = [r + gamma * v_next - v for r, v, v_next in zip(rewards, values, following)]
    return [
        sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[t:]))
        for t in range(len(deltas))
    ]


def expected(rewards, values, mask, after, gamma, lam, masked):  # [T] each, and a number
    """Advantages and returns of one sequence; "zero" ends at its last token, too."""
    found = torch.zeros_like(rewards)
    at = mask.nonzero().flatten().tolist()
    if not at:
        return found, found
    taken = at if masked == "skip" else list(range(at[-1] + 1))
    r, v = ([float(x[t]) if mask[t] else 0.0 for t in taken] for x in (rewards, values))
    for t, advantage in zip(taken, loop(r, v, after, gamma, lam)):
        found[t] = advantage if mask[t] else 0.0
    return found, torch.where(mask, found + values, 0.0)


@settings(max_examples=60, deadline=None)
@given(PACKS, st.sampled_from(["skip", "zero"]), st.floats(0, 1), st.floats(0, 1))
def test_each_sequence_goes_on_with_its_last_value(pack, masked, gamma, lam):
    mask, after = pack.mask(), pack.scores()
    rewards, values = (pack.normal().masked_fill(~mask, math.nan) for _ in range(2))
    how = {"gamma": gamma, "lam": lam, "masked": masked, "last_values": after}
    found = compute_gae(rewards, values, mask, cu_seqlens=pack.cu_seqlens, **how)
    padded = compute_gae(*map(pack.padded, (rewards, values, mask)), **how)
    for f, p in zip(found, padded):
        torch.testing.assert_close(f, pack.packed(p), **CLOSE)
    parts = zip(*map(pack.split, (*found, rewards, values, mask)), after.tolist())
    for advantages, returns, r, v, m, last_value in parts:
        truth = expected(r, v, m, last_value, gamma, lam, masked)
        torch.testing.assert_close((advantages, returns), truth, **CLOSE)


@pytest.mark.parametrize("masked", ["skip", "zero"])
@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_every_backend_bootstraps(backend, masked):
    g = torch.Generator().manual_seed(3)
    rewards, values = torch.randn(2, 4, 7, generator=g)
    after = torch.randn(4, generator=g)
    mask = torch.ones(4, 7, dtype=torch.bool)
    mask[1, 4:], mask[2, [0, 3, 6]], mask[3] = False, False, False
    how = {"gamma": 0.9, "lam": 0.8, "masked": masked}
    found = compute_gae(rewards, values, mask, last_values=after, backend=backend, **how)
    for b in range(4):
        of_row = rewards[b].double(), values[b].double(), mask[b], after[b].item()
        for f, truth in zip(found, expected(*of_row, **how)):
            torch.testing.assert_close(f[b].double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("masked", ["skip", "zero"])
def test_an_answer_cut_in_two_is_the_whole_one_without_lambda(masked):
    """With lam=0 nothing but the next value is looked at, so that of the other part is enough."""
    rewards, values = torch.randn(2, 3, 9, dtype=torch.float64)
    mask = torch.ones(3, 9)
    how = {"gamma": 0.9, "lam": 0.0, "masked": masked}
    whole = compute_gae(rewards, values, mask, **how)
    first = compute_gae(rewards[:, :5], values[:, :5], mask[:, :5], last_values=values[:, 5], **how)
    for w, f in zip(whole, first):
        assert torch.equal(w[:, :5], f)


def test_finished_answers_are_what_they_are_without_it():
    rewards, values = torch.randn(2, 3, 4)
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]])
    plain = compute_gae(rewards, values, mask)
    finished = torch.tensor([0.0, 0.0, torch.nan])  # the last has no token
    for p, f in zip(plain, compute_gae(rewards, values, mask, last_values=finished)):
        assert torch.equal(p, f)


def test_a_last_value_takes_no_gradient_and_keeps_the_dtype():
    x, mask = torch.ones(2, 3), torch.ones(2, 3)
    after = torch.ones(2, dtype=torch.float64, requires_grad=True)
    for found in compute_gae(x, x, mask, last_values=after):
        assert found.dtype == torch.float32
        assert not found.requires_grad


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_nothing_in_nothing_out(shape):
    empty = torch.zeros(shape)
    for found in compute_gae(empty, empty, empty, last_values=torch.ones(shape[0])):
        assert found.shape == shape


@pytest.mark.parametrize(
    ("error", "last_values", "cu_seqlens", "message"),
    [
        (ValueError, torch.ones(1, 4), None, r"last_values has shape \(1, 4\).* needs \(1,\)"),
        (ValueError, torch.ones(1), torch.tensor([0, 1, 4]), "last_values has .* needs .2,"),
        (ValueError, torch.ones(1, device="meta"), None, "last_values is on meta"),
        (TypeError, [0.5], None, "last_values is a list"),
    ],
)
def test_wrong_last_values_are_named(error, last_values, cu_seqlens, message):
    x = torch.ones(1, 4)
    with pytest.raises(error, match=message):
        compute_gae(x, x, x, last_values=last_values, cu_seqlens=cu_seqlens)
