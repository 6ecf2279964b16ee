"""Kept sets: made from three forms, and refused where they are none."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kl_kernels import Support


def sets_of(support):
    """The set of each row, as Python's."""
    ends = support.offsets.tolist()
    return [set(support.token_ids[a:b].tolist()) for a, b in pairwise(ends)]


def kept_by_a_sampler(logits, top_k, top_p, min_p, temperature):
    """One row's set, by a loop over its tokens from the least likely on."""
    p = (logits.double() / temperature).softmax(-1)
    left = {i for i in range(len(p)) if p[i] > 0}
    if min_p is not None:
        left = {i for i in left if p[i] >= min_p * p.max()}
    if top_k is not None and len(left) > top_k:
        least = sorted((float(p[i]) for i in left), reverse=True)[top_k - 1]
        left = {i for i in left if p[i] >= least}
    if top_p is not None and top_p < 1:
        total, below = sum(float(p[i]) for i in left), 0.0
        for i in sorted(left, key=lambda i: (float(p[i]), i)):
            below += float(p[i]) / total
            if below <= 1 - top_p and len(left) > 1:
                left = left - {i}
    return left if len(left) < len(p) else set()  # the whole vocabulary is not listed


BOUNDS = [
    {"top_k": 3},
    {"top_k": 100},
    {"top_p": 0.6},
    {"top_p": 1e-6},
    {"top_p": 1.0},
    {"min_p": 0.2},
    {"min_p": 0.0},
    {"top_k": 7, "top_p": 0.83, "min_p": 0.02},
    {},
]


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
def test_a_samplers_sets_are_those_of_a_loop(bounds):
    logits = torch.randn(2, 6, 23, generator=torch.manual_seed(0)).double() * 2
    logits[0, 1, 4:] = -torch.inf
    found = sets_of(Support.of(logits, temperature=0.7, **bounds))
    every = {"top_k": None, "top_p": None, "min_p": None, **bounds}
    for row, kept in zip(logits.flatten(0, 1), found, strict=True):
        assert kept == kept_by_a_sampler(row, temperature=0.7, **every)


def test_as_likely_as_min_p_asks_is_enough():
    assert sets_of(Support.of(torch.tensor([[2.0, 1.0, 2.0]]), min_p=1.0)) == [{0, 2}]


def test_ties_with_the_last_of_top_k_stay():
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]])
    assert sets_of(Support.of(logits, top_k=2)) == [{1, 2, 3}]


def test_of_ties_where_top_p_ends_those_with_larger_ids_stay():
    logits = torch.tensor([[0.25, 0.25, 0.25, 0.25]]).log()
    assert sets_of(Support.of(logits, top_p=0.5)) == [{2, 3}]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sets(st.integers(0, 8), max_size=8), min_size=1, max_size=6))
def test_padded_ids_and_a_mask_say_the_same(sets):
    padded = torch.full((len(sets), 8), -7)
    mask = torch.zeros(len(sets), 9, dtype=torch.bool)
    for row, kept in enumerate(sets):
        padded[row, : len(kept)] = torch.tensor(sorted(kept))
        mask[row, sorted(kept)] = True
    one, other = Support.from_padded(padded, pad=-7), Support.from_mask(mask)
    assert sets_of(one) == sets_of(other) == sets
    assert one.rows == len(sets)


def test_rows_of_any_shape_and_none():
    assert sets_of(Support.from_padded(torch.full((2, 2, 3), -1))) == [set()] * 4
    assert sets_of(Support.from_mask(torch.ones(1, 4, dtype=torch.bool))) == [set()]
    assert Support.from_mask(torch.zeros(0, 4, dtype=torch.bool)).rows == 0


def test_a_device_takes_both_tensors_along():
    moved = Support.from_padded(torch.tensor([[1, 2]])).to("meta")
    assert (moved.token_ids.device.type, moved.offsets.device.type) == ("meta", "meta")


def ids(*values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Support([1], ids(0, 1)), "token_ids is a list"),
        (lambda: Support(torch.ones(1), ids(0, 1)), "token_ids has dtype torch.float32"),
        (lambda: Support(ids(1), torch.ones(2)), "offsets has dtype torch.float32"),
        (lambda: Support(ids(1)[None], ids(0, 1)), r"token_ids has shape \(1, 1\)"),
        (lambda: Support(ids(1), ids(0, 1).to("meta")), "offsets is on meta"),
        (lambda: Support(ids(1), ids()), r"offsets has shape \(0,\)"),
        (lambda: Support(ids(1), ids(1, 1)), "offsets begins with 1; it must begin with 0"),
        (lambda: Support(ids(1, 2), ids(0, 2, 1, 2)), "offsets falls from 2 to 1 at row 1"),
        (lambda: Support(ids(1, 2), ids(0, 1)), "offsets ends with 1; token_ids of 2 needs 2"),
        (lambda: Support(ids(1, -4), ids(0, 1, 2)), "token_ids holds -4 in row 1"),
        (lambda: Support(ids(5, 3, 5, 5), ids(0, 1, 4)), "token_ids holds 5 twice in row 1"),
        (lambda: Support.from_padded(ids(1)[0]), "ids has shape"),
        (lambda: Support.from_padded(ids(1), pad=0.5), "pad is 0.5"),
        (lambda: Support.from_padded(ids(7, 7)), "token_ids holds 7 twice in row 0"),
        (lambda: Support.from_mask(ids(1)), "mask has dtype torch.int64; accepted: bool"),
        (lambda: Support.of(torch.zeros(2), top_p=0), "top_p is 0; it must be above 0"),
        (lambda: Support.of(torch.zeros(2), top_p=1.5), "top_p is 1.5; accepted: 0 to 1"),
        (lambda: Support.of(torch.zeros(2), top_k=0), "top_k is 0; it must be an integer, 1 or"),
        (lambda: Support.of(torch.zeros(2), min_p=-1), "min_p is -1"),
        (lambda: Support.of(torch.zeros(2), temperature=0), "temperature is 0"),
    ],
)
def test_what_is_no_set_is_named(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_int32_will_do():
    kept = Support(ids(3, 5, dtype=torch.int32), ids(0, 1, 2, dtype=torch.int32))
    assert sets_of(kept) == [{3}, {5}]
