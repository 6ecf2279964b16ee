"""The algebra by itself: states of parts merge into the state of the whole."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kl_kernels.algebra.row import RowState, empty_state, finish, fold, merge

NEG_INF = -math.inf
scaled_logit = st.one_of(st.floats(-60, 60), st.just(NEG_INF), st.floats(9990, 10010))


@st.composite
def rows(draw):
    """One row of policy and reference logits, and where to cut it."""
    n = draw(st.integers(1, 12))
    x = draw(st.lists(scaled_logit, min_size=n, max_size=n))
    y = draw(st.lists(scaled_logit, min_size=n, max_size=n))
    return tensor(x), tensor(y), draw(st.integers(0, n)), draw(st.integers(0, n))


def tensor(values):
    return torch.tensor([values], dtype=torch.float64)


def fold_part(x, y, start, stop):
    if start == stop:
        return empty_state(1, x.device)
    return fold(x[:, start:stop], y[:, start:stop])


def assert_same(s: RowState, t: RowState):
    """Equal as states: the anchors are those of the same maxima, and the sums agree."""
    for name, a, b in zip(RowState._fields, s, t):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, equal_nan=True, msg=name)


@settings(max_examples=300, deadline=None)
@given(rows())
def test_parts_merge_into_the_whole_in_any_grouping(row):
    x, y, i, j = row
    i, j = sorted((i, j))
    first, second, third = (fold_part(x, y, *cut) for cut in ((0, i), (i, j), (j, x.shape[1])))
    whole = fold(x, y)
    assert_same(merge(merge(first, second), third), whole)
    assert_same(merge(first, merge(second, third)), whole)
    assert_same(merge(merge(third, first), second), whole)


@settings(max_examples=300, deadline=None)
@given(rows())
def test_a_finished_state_is_the_definition_in_plain_floats(row):
    x, y, token, _ = row
    token = min(token, x.shape[1] - 1)
    got = finish(fold(x, y), x[:, token], y[:, token])
    xs, ys = ([v * math.log(2) for v in t[0].tolist()] for t in (x, y))
    if max(xs) == NEG_INF or max(ys) == NEG_INF:
        policy_gone = max(xs) == NEG_INF
        assert got.kl.isnan()
        assert got.entropy.isnan() == policy_gone
        return
    log_p, log_q = log_softmax(xs), log_softmax(ys)
    expected = {
        "logprob": log_p[token],
        "ref_logprob": log_q[token],
        "kl": divergence(log_p, log_q),
        "forward_kl": divergence(log_q, log_p),
        "entropy": -sum(math.exp(a) * a for a in log_p if a > NEG_INF),
    }
    for name, value in expected.items():
        assert float(getattr(got, name)) == pytest.approx(value, rel=1e-9, abs=1e-9), name


def log_softmax(values):
    top = max(values)
    log_sum = math.log(math.fsum(math.exp(v - top) for v in values))
    return [v - top - log_sum for v in values]


def divergence(log_p, log_q):
    """Sum of p (log p - log q) over p's support."""
    return math.fsum(
        math.exp(a) * (a - b) if b > NEG_INF else math.inf
        for a, b in zip(log_p, log_q)
        if a > NEG_INF
    )


def test_an_infinite_divergence_survives_an_anchor_that_moves_out_of_sight():
    """0 * inf: the weight 2^-da that rescales the sum underflows."""
    first = fold(tensor([0.0]), tensor([NEG_INF]))
    second = fold(tensor([5000.0]), tensor([0.0]))
    merged = merge(first, second)
    assert merged.rk == math.inf
    assert finish(merged, tensor([5000.0])[0], tensor([0.0])[0]).kl == math.inf


def test_divergence_and_entropy_are_never_negative():
    g = torch.Generator().manual_seed(0)
    x = 40 * torch.randn(2000, 8, dtype=torch.float64, generator=g)
    y = x + 1e-12 * torch.randn(2000, 8, dtype=torch.float64, generator=g)
    state = fold(x, y)
    raw = math.log(2) * state.rk / state.sx - torch.log(state.sx / state.sy)
    assert (raw < 0).any(), "the inputs are too easy: nothing was clamped"
    result = finish(state, x[:, 0], y[:, 0])
    assert (result.kl >= 0).all()
    assert (result.forward_kl >= 0).all()
    assert (result.entropy >= 0).all()


def test_rounding_cannot_make_the_entropy_of_a_certain_token_negative():
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    certain = RowState(zero, zero, sx=one, sy=one, ex=1e-16 * one, rk=zero, fk=zero)
    assert finish(certain, zero, zero).entropy == 0
