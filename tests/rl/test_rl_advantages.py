"""`compute_gae` against a plain loop over each sequence with its masked tokens taken out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kl_kernels import compute_gae


def loop(rewards, values, gamma, lam):
    """Advantages of one sequence: sum over k of (gamma lam)^k delta_{t+k}, term by term."""
    values = [*values, 0.0]
    deltas = [r + gamma * values[t + 1] - values[t] for t, r in enumerate(rewards)]
    return [
        sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[t:]))
        for t in range(len(deltas))
    ]


def expected(rewards, values, mask, gamma, lam, masked):
    advantages = torch.zeros_like(rewards)
    for b in range(len(rewards)):
        keep = mask[b].bool()
        if masked == "skip":
            r, v = rewards[b, keep].tolist(), values[b, keep].tolist()
            advantages[b, keep] = torch.tensor(loop(r, v, gamma, lam), dtype=rewards.dtype)
        else:
            r, v = (torch.where(keep, x[b], 0.0).tolist() for x in (rewards, values))
            row = torch.tensor(loop(r, v, gamma, lam), dtype=rewards.dtype)
            advantages[b] = torch.where(keep, row, 0.0)
    return advantages


def batch(seed=0, n_batch=6, n_tokens=9):
    """Rewards, values and masks: full, right-padded, with holes, one token, empty, left-padded."""
    g = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, n_batch, n_tokens, generator=g, dtype=torch.float64)
    mask = torch.ones(n_batch, n_tokens, dtype=torch.bool)
    mask[1, 5:] = False
    mask[2, [0, 3, 4, 8]] = False
    mask[3, :] = False
    mask[3, 2] = True
    mask[4, :] = False
    mask[5, :4] = False
    return rewards, values, mask


@pytest.mark.parametrize("masked", ["skip", "zero"])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.9, 0.0)])
def test_advantages_and_returns_are_those_of_the_plain_loop(gamma, lam, masked):
    rewards, values, mask = batch()
    advantages, returns = compute_gae(rewards, values, mask, gamma=gamma, lam=lam, masked=masked)
    truth = expected(rewards, values, mask, gamma, lam, masked)
    torch.testing.assert_close(advantages, truth, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(
        returns, torch.where(mask, truth + values, 0.0), rtol=1e-13, atol=1e-13
    )
    assert (advantages[~mask] == 0).all()
    assert (returns[~mask] == 0).all()


def test_skip_and_zero_differ_at_holes_and_only_there():
    rewards, values, mask = batch()
    skip, zero = (
        compute_gae(rewards, values, mask, gamma=0.9, lam=0.8, masked=m)[0]
        for m in ("skip", "zero")
    )
    without_holes = [0, 1, 3, 4, 5]
    torch.testing.assert_close(skip[without_holes], zero[without_holes], rtol=1e-13, atol=1e-13)
    assert (skip[2] - zero[2]).abs().max() > 0.1


def test_without_discount_advantages_are_reward_to_go_minus_values():
    rewards, values, mask = batch()
    selected = torch.where(mask, rewards, 0.0)
    reward_to_go = selected.flip(1).cumsum(1).flip(1)
    for masked in ("skip", "zero"):
        advantages, returns = compute_gae(rewards, values, mask, gamma=1.0, lam=1.0, masked=masked)
        truth = torch.where(mask, reward_to_go, 0.0)
        torch.testing.assert_close(returns, truth, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(
            advantages, torch.where(mask, truth - values, 0.0), rtol=1e-13, atol=1e-13
        )


@settings(max_examples=50, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=12), st.integers(0, 2**31))
def test_inserting_masked_tokens_changes_nothing(mask, seed):
    g = torch.Generator().manual_seed(seed)
    mask = torch.tensor([mask])
    rewards, values = torch.randn(2, *mask.shape, generator=g, dtype=torch.float64)
    keep = mask[0]
    if not keep.any():
        keep = torch.ones_like(keep)  # compressing would leave no token: nothing to compare
        mask = keep[None]
    padded = compute_gae(rewards, values, mask, gamma=0.97, lam=0.9)
    compressed = compute_gae(rewards[:, keep], values[:, keep], mask[:, keep], gamma=0.97, lam=0.9)
    for p, c in zip(padded, compressed):
        assert torch.equal(p[:, keep], c)


@pytest.mark.parametrize("masked", ["skip", "zero"])
def test_nan_under_the_mask_changes_nothing(masked):
    rewards, values, mask = batch()
    dirty = (torch.where(mask, x, torch.nan) for x in (rewards, values))
    clean = compute_gae(rewards, values, mask, masked=masked)
    for d, c in zip(compute_gae(*dirty, mask, masked=masked), clean):
        assert torch.equal(d, c)


def test_numeric_masks_dtypes_and_no_gradient():
    rewards, values, mask = batch()
    advantages, returns = compute_gae(rewards, values, mask)
    numeric = compute_gae(rewards, values, mask.to(torch.int32))
    assert torch.equal(advantages, numeric[0])
    assert advantages.dtype == torch.float64
    low = compute_gae(rewards.bfloat16(), values.float().requires_grad_(), mask)
    assert all(t.dtype == torch.float32 and not t.requires_grad for t in low)
    rewards, values = rewards.float(), values.float()
    single = compute_gae(rewards, values, mask)
    double = compute_gae(rewards.double(), values.double(), mask)
    for s, d in zip(single, double):
        torch.testing.assert_close(s.double(), d, rtol=1e-6, atol=1e-6)


def test_score_after_the_last_token_needs_its_position_in_the_mask():
    rewards = torch.tensor([[0.0, 0.0, 1.0]])
    values = torch.zeros(1, 3)
    response = torch.tensor([[1, 1, 0]])
    with_score = torch.tensor([[1, 1, 1]])
    assert compute_gae(rewards, values, response, lam=1.0)[0].tolist() == [[0, 0, 0]]
    assert compute_gae(rewards, values, with_score, lam=1.0)[0].tolist() == [[1, 1, 1]]


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_nothing_in_nothing_out(shape):
    empty = torch.zeros(shape)
    for result in compute_gae(empty, empty, empty):
        assert result.shape == shape


@pytest.mark.parametrize(
    ("error", "options", "message"),
    [
        (ValueError, {"gamma": 1.5}, "gamma is 1.5"),
        (ValueError, {"lam": -0.1}, "lam is -0.1"),
        (ValueError, {"lam": float("nan")}, "lam is nan"),
        (ValueError, {"masked": "ignore"}, "'skip', 'zero'"),
        (ValueError, {"values": torch.zeros(6, 8)}, "values has shape"),
        (ValueError, {"mask": torch.ones(9)}, "mask has shape"),
        (ValueError, {"rewards": torch.zeros(9)}, "rewards has shape"),
        (TypeError, {"values": 0.0}, "values is a float"),
    ],
)
def test_bad_arguments_are_named(error, options, message):
    rewards, values, mask = batch()
    with pytest.raises(error, match=message):
        compute_gae(**{"rewards": rewards, "values": values, "mask": mask} | options)
