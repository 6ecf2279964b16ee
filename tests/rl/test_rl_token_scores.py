"""Scores of tokens and turns: each stays where it lies, and what is masked has none."""

import math

import pytest
import torch
from hypothesis import given, settings
from packed import PACKS

import kl_kernels
from kl_kernels import compute_rewards

FEW = settings(max_examples=40, deadline=None)
MASK = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]])
KL = torch.arange(12.0).view(3, 4) - 4


@FEW
@given(PACKS)
def test_a_token_s_reward_is_its_score_minus_its_kl(pack):
    mask = pack.mask()
    scores, kl = (pack.normal().masked_fill(~mask, math.nan) for _ in range(2))
    options = {"kl_coef": 0.25, "score_clip": 0.5, "kl_clip": 1.0}
    found = compute_rewards(scores, kl, mask, cu_seqlens=pack.cu_seqlens, **options)
    if scores.shape == (len(pack.lengths),):
        return  # one for each sequence: the test below
    for score, k, counts, reward in zip(*(x.flatten().tolist() for x in (scores, kl, mask, found))):
        clipped = max(min(score, 0.5), -0.5) - 0.25 * max(min(k, 1.0), -1.0)
        assert reward == pytest.approx(clipped if counts else 0.0, rel=1e-13)
    padded = compute_rewards(*map(pack.padded, (scores, kl, mask)), **options)
    assert torch.equal(found, pack.packed(padded))


@FEW
@given(PACKS)
def test_one_at_the_last_token_is_that_of_the_sequence(pack):
    mask, scores = pack.padded(pack.mask()), pack.scores()
    of_tokens = torch.zeros(mask.shape, dtype=torch.float64)
    for row, counts, score in zip(of_tokens, mask, scores):
        if counts.any():
            row[counts.nonzero()[-1]] = score
    kl = pack.padded(pack.normal())
    expected = compute_rewards(scores, kl, mask, 0.25)
    assert torch.equal(compute_rewards(of_tokens, kl, mask, 0.25), expected)


def test_as_many_sequences_as_tokens_are_told_apart_by_the_row():
    """The first has both tokens: [N] is one score for each sequence, [1, N] one for each token."""
    cu_seqlens, mask, scores = torch.tensor([0, 2, 2]), torch.ones(2), torch.tensor([3.0, 5.0])
    of_sequences = compute_rewards(scores, 0 * mask, mask, 0.1, cu_seqlens=cu_seqlens)
    assert of_sequences.tolist() == [0.0, 3.0]
    row = [x[None] for x in (scores, 0 * mask, mask)]
    assert compute_rewards(*row, 0.1, cu_seqlens=cu_seqlens).tolist() == [[3.0, 5.0]]
    of_sequences = compute_rewards(scores, *row[1:], 0.1, cu_seqlens=cu_seqlens)
    assert of_sequences.tolist() == [[0.0, 3.0]]


@pytest.mark.parametrize("score_position", ["after_last", torch.tensor([0, 0, 0])])
def test_they_have_their_positions(score_position):
    with pytest.raises(ValueError, match=r"score_position is given, but scores of shape \(3, 4\)"):
        compute_rewards(KL, KL, MASK, 0.1, score_position=score_position)
    with pytest.raises(ValueError, match="score_position is 'last'; accepted"):
        compute_rewards(KL, KL, MASK, 0.1, score_position="last")


@pytest.mark.parametrize(
    ("error", "scores", "message"),
    [
        (ValueError, torch.zeros(3, 5), r"scores has shape \(3, 5\)"),
        (ValueError, torch.zeros(4), r"scores has shape \(4,\)"),
        (ValueError, torch.zeros(3, 4, device="meta"), "scores is on meta, kl on cpu"),
        (TypeError, [[0.0] * 4] * 3, "scores is a list"),
        (TypeError, torch.zeros(3, 4, dtype=torch.complex64), "scores has dtype torch.complex64"),
    ],
)
def test_wrong_scores_are_named(error, scores, message):
    with pytest.raises(error, match=message):
        compute_rewards(scores, KL, MASK, 0.1)


def inputs():
    g = torch.Generator().manual_seed(0)
    logits, ref_logits = torch.randn(2, 3, 4, 17, generator=g)
    ids = torch.randint(17, (3, 4), generator=g)
    scores = torch.randn(3, 4, generator=g).masked_fill(MASK == 0, torch.nan)
    return logits, ref_logits, ids, scores


@pytest.mark.parametrize("kl_estimator", ["k1", "exact"])
@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_rewards_from_logits_are_those_from_their_kl(backend, kl_estimator):
    logits, ref_logits, ids, scores = inputs()
    options = {"kl_coef": 0.5, "score_clip": 0.75}
    found = kl_kernels.kl_rewards(
        logits, ref_logits, ids, scores, MASK,
        kl_estimator=kl_estimator, backend=backend, **options,
    )  # fmt: skip
    kl = found.kl if kl_estimator == "exact" else found.logprob - found.ref_logprob
    torch.testing.assert_close(found.rewards, compute_rewards(scores, kl, MASK, **options))
    torch.testing.assert_close(
        found.rewards + 0.5 * torch.where(MASK.bool(), kl, 0.0),
        torch.where(MASK.bool(), scores.clamp(-0.75, 0.75), 0.0),
    )


def test_packed_rewards_from_logits_are_those_of_rows():
    logits, ref_logits, ids, scores = inputs()
    rows = kl_kernels.kl_rewards(logits, ref_logits, ids, scores, MASK, kl_coef=0.5)
    for shape in ((12,), (1, 12)):
        flat = [x.reshape(*shape, -1) for x in (logits, ref_logits)]
        of_tokens = [x.reshape(shape) for x in (ids, scores, MASK)]
        packed = kl_kernels.kl_rewards(
            *flat, *of_tokens, kl_coef=0.5, cu_seqlens=torch.tensor([0, 4, 8, 12])
        )
        for row, pack in zip(rows, packed):
            torch.testing.assert_close(pack, row.reshape(shape), rtol=1e-6, atol=1e-6)


def test_no_columns_and_no_rows():
    for shape in ((2, 0), (0, 3)):
        empty = torch.zeros(shape)
        assert compute_rewards(empty, empty, empty, 0.1).shape == shape
        logits = torch.zeros(*shape, 5)
        found = kl_kernels.kl_rewards(logits, logits, empty.long(), empty, empty, kl_coef=0.1)
        assert found.rewards.shape == shape
