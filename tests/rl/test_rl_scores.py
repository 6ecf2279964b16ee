"""Penalties on how a sequence ended and how long it is, token by token in plain Python."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kl_kernels import length_normalized_scores, missing_eos_penalty, overlong_penalty

SCORES = torch.tensor([1.5, -2.0, 0.0])
ENDED = torch.tensor([True, False, False])


def test_subtract_lowers_and_replace_forgets_the_score():
    assert missing_eos_penalty(SCORES, ENDED, 1.0).tolist() == [1.5, -3.0, -1.0]
    replaced = missing_eos_penalty(SCORES, ENDED, 1.0, mode="replace")
    assert replaced.tolist() == [1.5, -1.0, -1.0]


def test_ended_may_be_numeric_and_scores_of_any_width():
    assert torch.equal(missing_eos_penalty(SCORES, ENDED.int(), 2.0), torch.tensor([1.5, -4, -2]))
    assert missing_eos_penalty(SCORES.double(), ENDED, 1.0).dtype == torch.float64
    assert missing_eos_penalty(SCORES.bfloat16(), ENDED, 1.0).dtype == torch.float32
    assert not missing_eos_penalty(SCORES.clone().requires_grad_(), ENDED, 1.0).requires_grad


def test_a_score_that_is_replaced_may_be_nan():
    scores = torch.tensor([1.0, math.nan])
    ended = torch.tensor([True, False])
    assert missing_eos_penalty(scores, ended, 1.0, mode="replace").tolist() == [1.0, -1.0]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=8),
    st.integers(1, 40),
    st.integers(1, 40),
    st.floats(0, 4),
)
def test_the_overlong_penalty_of_dapo(lengths, max_length, buffer, factor):
    buffer = min(buffer, max_length)
    start = max_length - buffer

    def expected(length):
        if length <= start:
            return 0.0
        return factor * (start - length) / buffer if length <= max_length else -factor

    penalty = overlong_penalty(torch.tensor(lengths), max_length, buffer, factor=factor)
    assert penalty.tolist() == pytest.approx([expected(n) for n in lengths], rel=1e-6, abs=1e-6)


def test_the_overlong_penalty_is_at_most_one_unless_told_otherwise():
    lengths = torch.tensor([5, 9, 30])
    assert overlong_penalty(lengths, 10, 5).tolist() == [0.0, pytest.approx(-0.8), -1.0]


def test_a_normalised_sum_of_log_probabilities_is_their_mean():
    logprobs = torch.randn(4, 6, dtype=torch.float64)
    mask = torch.tensor([[1] * 6, [1, 0, 1, 1, 0, 0], [0, 0, 0, 1, 0, 0], [0] * 6])
    scores = (logprobs * mask).sum(1)
    means = [row[m.bool()].mean().item() if m.any() else 0.0 for row, m in zip(logprobs, mask)]
    assert length_normalized_scores(scores, mask).tolist() == pytest.approx(means, rel=1e-12)
    assert torch.equal(length_normalized_scores(scores, mask, exponent=0), scores)
    half = length_normalized_scores(scores, mask, exponent=0.5)
    assert half[1].item() == pytest.approx(scores[1].item() / math.sqrt(3), rel=1e-12)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: missing_eos_penalty(SCORES, ENDED, -1.0), ValueError, "penalty is -1"),
        (lambda: missing_eos_penalty(SCORES, ENDED, math.nan), ValueError, "penalty is nan"),
        (lambda: missing_eos_penalty(SCORES, ENDED[:2], 1.0), ValueError, "ended has shape"),
        (lambda: missing_eos_penalty(SCORES[None], ENDED, 1.0), ValueError, "scores has shape"),
        (lambda: missing_eos_penalty([1.0], ENDED, 1.0), TypeError, "scores is a list"),
        (
            lambda: missing_eos_penalty(SCORES, ENDED, 1.0, mode="drop"),
            ValueError,
            "mode is 'drop'; accepted: 'subtract', 'replace'",
        ),
        (lambda: overlong_penalty(SCORES, 0, 1), ValueError, "max_length is 0"),
        (lambda: overlong_penalty(SCORES, 8, 0), ValueError, "buffer is 0; accepted: 1 to"),
        (lambda: overlong_penalty(SCORES, 8, 9), ValueError, "buffer is 9; accepted: 1 to"),
        (lambda: overlong_penalty(SCORES, 8, 4, factor=-1), ValueError, "factor is -1"),
        (lambda: overlong_penalty(torch.ones(2, 2), 8, 4), ValueError, "lengths has shape"),
        (
            lambda: length_normalized_scores(SCORES, torch.ones(2, 4)),
            ValueError,
            "scores has shape",
        ),
        (
            lambda: length_normalized_scores(SCORES, torch.ones(3, 4), exponent=math.inf),
            ValueError,
            "exponent is inf",
        ),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
