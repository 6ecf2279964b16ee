"""`compute_rewards`: where the score goes, what the KL costs, and what must not matter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kl_kernels import compute_rewards, kl_penalty

MASK = torch.tensor(
    [
        [1, 1, 1, 1],  # full
        [1, 1, 0, 0],  # right-padded
        [0, 1, 0, 1],  # left-padded, with a hole
        [0, 0, 0, 0],  # empty
        [0, 0, 1, 0],  # one token
    ]
)
SCORES = torch.tensor([1.0, -2.0, 3.0, 64.0, 5.0])


def positions(rewards):
    return [row.nonzero().flatten().tolist() for row in rewards]


@pytest.mark.parametrize(
    ("score_position", "expected"),
    [
        ("last_token", [[3], [1], [3], [], [2]]),
        ("after_last", [[3], [2], [3], [], [3]]),  # the last column where there is none later
        (torch.tensor([0, 3, -1, 2, 2]), [[0], [3], [], [], [2]]),
        (torch.tensor([0, 3, -1, 2, 2], dtype=torch.int32), [[0], [3], [], [], [2]]),
    ],
    ids=["last_token", "after_last", "int64", "int32"],
)
def test_the_score_goes_to_its_position_once_and_nowhere_if_empty(score_position, expected):
    rewards = compute_rewards(
        SCORES, torch.zeros(MASK.shape), MASK, 0.5, score_position=score_position
    )
    assert positions(rewards) == expected
    kept = [s if p else 0.0 for s, p in zip(SCORES.tolist(), expected)]
    assert rewards.sum(1).tolist() == kept


def test_the_kl_costs_kl_coef_each_token():
    kl = torch.arange(20.0).view(5, 4) - 5  # sampled KL may be negative
    rewards = compute_rewards(torch.zeros(5), kl, MASK, 0.5)
    assert torch.equal(rewards, torch.where(MASK.bool(), -0.5 * kl, 0.0))


def test_one_token_s_kl_is_clipped_before_the_coefficient():
    kl = torch.arange(20.0).view(5, 4) - 5
    rewards = compute_rewards(torch.zeros(5), kl, MASK, 0.5, kl_clip=3.0)
    expected = [[-0.5 * max(min(x, 3.0), -3.0) for x in row] for row in kl.tolist()]
    assert torch.equal(rewards, torch.where(MASK.bool(), torch.tensor(expected), 0.0))
    with pytest.raises(ValueError, match="kl_clip is 0"):
        compute_rewards(torch.zeros(5), kl, MASK, 0.5, kl_clip=0.0)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31),
    st.integers(1, 5),
    st.integers(1, 8),
    st.floats(0, 10),
    st.sampled_from(["last_token", "after_last"]),
)
def test_rewards_add_up_to_scores_minus_kl(seed, n_batch, n_tokens, kl_coef, score_position):
    g = torch.Generator().manual_seed(seed)
    kl = torch.randn(n_batch, n_tokens, generator=g, dtype=torch.float64)
    scores = torch.randn(n_batch, generator=g, dtype=torch.float64)
    mask = torch.rand(n_batch, n_tokens, generator=g) < 0.5
    rewards = compute_rewards(scores, kl, mask, kl_coef, score_position=score_position)
    total = scores[mask.any(1)].sum() - kl_coef * kl[mask].sum()
    torch.testing.assert_close(rewards.sum(), total, rtol=1e-12, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=10).filter(any), st.integers(0, 2**31))
def test_inserting_masked_tokens_changes_nothing(mask, seed):
    g = torch.Generator().manual_seed(seed)
    mask = torch.tensor([mask])
    kl = torch.randn(mask.shape, generator=g)
    score = torch.randn(1, generator=g)
    rewards = compute_rewards(score, torch.where(mask, kl, torch.nan), mask, 0.1)
    keep = mask[0]
    assert torch.equal(rewards[:, keep], compute_rewards(score, kl[:, keep], mask[:, keep], 0.1))
    assert (rewards[:, ~keep] == 0).all()


def test_scores_are_clipped_and_the_kl_is_not():
    kl = torch.full(MASK.shape, 10.0)
    rewards = compute_rewards(SCORES, kl, MASK, 1.0, score_clip=2.5)
    totals = (rewards + torch.where(MASK.bool(), kl, 0.0)).sum(1)
    assert totals.tolist() == [1.0, -2.0, 2.5, 0.0, 2.5]


def test_a_score_of_nan_stays_in_its_sequence_and_out_of_an_empty_one():
    scores = torch.tensor([1.0, torch.nan, 3.0, torch.nan, 5.0])
    rewards = compute_rewards(scores, torch.zeros(MASK.shape), MASK, 1.0)
    assert rewards.isnan().nonzero().tolist() == [[1, 1]]


def test_a_kl_of_nan_stays_at_its_token_and_kl_penalty_makes_none_of_a_ruled_out_one():
    logprobs = torch.full(MASK.shape, -1.0)
    logprobs[0, 1] = -torch.inf
    rewards = compute_rewards(SCORES, logprobs - logprobs, MASK, 0.1)
    assert rewards.isnan().nonzero().tolist() == [[0, 1]]
    assert compute_rewards(SCORES, logprobs - logprobs, MASK, 0.0).isfinite().all()
    of_none = compute_rewards(SCORES, torch.zeros(MASK.shape), MASK, 0.1)
    kl = kl_penalty(logprobs, logprobs)
    assert torch.equal(compute_rewards(SCORES, kl, MASK, 0.1), of_none)


def test_rewards_carry_no_gradient_and_have_the_working_dtype():
    kl = torch.ones(MASK.shape, requires_grad=True)
    scores = SCORES.clone().requires_grad_()
    assert not compute_rewards(scores, kl, MASK, 0.1).requires_grad
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        assert compute_rewards(SCORES.bfloat16(), kl.to(dtype), MASK, 0.1).dtype == expected
    numeric = compute_rewards(SCORES, kl, MASK * 1.0, 0.1)
    assert torch.equal(numeric, compute_rewards(SCORES, kl, MASK.bool(), 0.1))


@pytest.mark.parametrize("score_position", ["last_token", "after_last", torch.tensor([-1, -1])])
def test_no_columns(score_position):
    empty = torch.zeros(2, 0)
    rewards = compute_rewards(torch.ones(2), empty, empty, 0.1, score_position=score_position)
    assert rewards.shape == (2, 0)


@pytest.mark.parametrize(
    ("error", "options", "message"),
    [
        (ValueError, {"score_position": "last"}, "'last'"),
        (ValueError, {"score_position": torch.tensor([0, 0, 4, 0, 0])}, "holds 4; .* to 3"),
        (ValueError, {"score_position": torch.tensor([0, -2, 0, 0, 0])}, "holds -2"),
        (ValueError, {"score_position": torch.tensor([0, 0])}, "score_position has shape"),
        (TypeError, {"score_position": torch.zeros(5)}, "score_position has dtype"),
        (TypeError, {"score_position": torch.ones(5).bool()}, "score_position has dtype"),
        (ValueError, {"score_clip": 0.0}, "score_clip is 0"),
        (ValueError, {"kl_coef": float("nan")}, "kl_coef is nan"),
        (ValueError, {"scores": torch.zeros(5, 1)}, "scores has shape"),
        (ValueError, {"mask": torch.ones(5)}, "mask has shape"),
        (ValueError, {"kl": torch.zeros(5)}, "kl has shape"),
        (TypeError, {"scores": 1.0}, "scores is a float"),
    ],
)
def test_bad_arguments_are_named(error, options, message):
    arguments = {"scores": SCORES, "kl": torch.zeros(MASK.shape), "mask": MASK, "kl_coef": 0.1}
    with pytest.raises(error, match=message):
        compute_rewards(**arguments | options)
