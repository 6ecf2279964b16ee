"""Shaped rewards from per-token KL and scores of sequences or of tokens."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from kl_kernels.checks import (
    check_choice,
    check_like,
    check_mask,
    check_non_negative,
    check_plain,
    check_positive,
    check_tensor,
)
from kl_kernels.rl.sequences import Sequences, sequences_of
from kl_kernels.schemas import ESTIMATORS, output_dtype

ScorePosition = Literal["last_token", "after_last"]
UNBIASED_REWARDS = ("k1", "exact")


def compute_rewards(
    scores: Tensor,  # [B] or [B, T]
    kl: Tensor,  # [B, T]
    mask: Tensor,  # [B, T]
    kl_coef: float,
    *,
    score_position: ScorePosition | Tensor = "last_token",  # or [B]
    score_clip: float | None = None,
    kl_clip: float | None = None,
    cu_seqlens: Tensor | None = None,  # [S + 1]
) -> Tensor:
    """Shaped rewards, -kl_coef * KL per token plus the scores: `kl_rewards` without the logits.

    Use it where the per-token KL is at hand already. k1 is right as it is; exact KL needs its
    correction or a KL in the loss besides (see `kl_rewards`); k2, k3 and abs bias the policy
    gradient. Ziegler et al. (2019), arXiv 1909.08593, equation 2, token by token.

    A KL of NaN at a response token is a reward of NaN there (unless kl_coef is 0), since nothing
    tells what it should have been. Subtracting log-probabilities of -inf gives NaN, too: of a token
    that both models rule out `kl_penalty` gives a KL of 0.

    Args:
        scores: [B] one score per sequence, any dtype; a NaN stays in its sequence. Or [B, T], of
            tokens or turns: each stays where it lies, and those at masked positions do not count,
            even NaN. With cu_seqlens [S], or as kl is ([N] where S = N: one per sequence; [1, N]
            tells them apart).
        kl: [B, T] per-token KL(policy || reference) in nats, an estimate or exact; each row is one
            sequence. With cu_seqlens [N] or [1, N], as everything that is [B, T] here.
        mask: [B, T] bool, or numbers that are 0 or 1 (looked at on a CPU alone); 1 at response
            tokens. It may have holes (tool output), which change nothing; NaN where it is 0 changes
            nothing either.
        kl_coef: beta, finite, 0 or above; 0 leaves the score alone.
        score_position: "last_token" (last set position of the mask), "after_last" (one later, as
            TRL does; the last column, or the last position of a packed sequence, where there is no
            later one) or a tensor, [B] integers: a position in each sequence, -1 for nowhere. A
            response without tokens gets no reward anywhere. Scores of tokens have their positions:
            only the default goes with them.
        score_clip: scores are clamped to [-score_clip, score_clip], each by itself.
        kl_clip: each token's KL is clamped to [-kl_clip, kl_clip] before kl_coef, so that one token
            cannot outweigh the score; the tokens it clips feel no further pull.
        cu_seqlens: [S + 1] int32 or int64 of packed sequences, ascending from 0 to N (looked at on
            a CPU alone): sequence s has the tokens from cu_seqlens[s] to before cu_seqlens[s + 1].
            None: each row is one.

    Returns:
        [B, T] float32 (float64 for float64 kl), without gradient.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or range; on the CPU
            also an index outside [-1, T).

    Examples:
        >>> import torch, kl_kernels
        >>> scores, kl = torch.tensor([2.0]), torch.tensor([[0.5, 1.0, 0.0]])
        >>> mask = torch.tensor([[True, True, False]])
        >>> kl_kernels.compute_rewards(scores, kl, mask, kl_coef=1.0)
        tensor([[-0.5000,  1.0000,  0.0000]])
        >>> of_tokens = torch.tensor([[1.0, 2.0, torch.nan]])
        >>> kl_kernels.compute_rewards(of_tokens, kl, mask, kl_coef=1.0)
        tensor([[0.5000, 1.0000, 0.0000]])
    """
    sequences = sequences_of("kl", kl, cu_seqlens)
    check_plain("kl", kl)
    check_like("mask", mask, "kl", kl)
    check_scores(scores, "kl", kl, sequences)
    mask = check_mask("mask", mask)
    kl_coef = check_non_negative("kl_coef", kl_coef)
    dtype = output_dtype(kl)
    scores = clip_scores(scores.detach().to(dtype), score_clip)
    kl = kl.detach().to(dtype)
    if kl_clip is not None:
        kl_clip = check_positive("kl_clip", kl_clip)
        kl = kl.clamp(-kl_clip, kl_clip)
    # Selected: without a penalty an infinite KL must not matter, and 0 * inf would be NaN.
    penalty = torch.where(mask & (kl_coef != 0), -kl_coef * kl, 0.0)
    return penalty + token_scores(scores, score_position, mask, sequences)


def check_scores(scores: Tensor, name: str, tokens: Tensor, sequences: Sequences) -> None:
    """`scores` must be one for each token of `tokens`, or one for each sequence."""
    check_tensor("scores", scores)
    if sequences.are_of_tokens(scores):
        check_like("scores", scores, name, tokens)
    else:
        sequences.check_scores("scores", scores)


def check_reward_estimator(kl_estimator: str, *, biased: bool) -> None:
    check_choice("kl_estimator", kl_estimator, ESTIMATORS)
    if kl_estimator not in UNBIASED_REWARDS and not biased:
        raise ValueError(
            f"kl_estimator is {kl_estimator!r}, whose expected policy gradient as a reward is not "
            "that of the KL; use 'k1' or 'exact', or pass biased=True to have it all the same"
        )


def clip_scores(scores: Tensor, score_clip: float | None) -> Tensor:  # [B] or [B, T]
    if score_clip is None:
        return scores
    score_clip = check_positive("score_clip", score_clip)
    return scores.clamp(-score_clip, score_clip)


def token_scores(
    scores: Tensor,  # [B] or [B, T]
    score_position: str | Tensor,  # or [B]
    mask: Tensor,  # [B, T]
    sequences: Sequences,
) -> Tensor:  # [B, T]
    """The score of each token: its own under the mask, or that of its sequence in one position."""
    if not sequences.are_of_tokens(scores):
        return placed_scores(scores, score_indices(score_position, mask, sequences), sequences)
    if isinstance(score_position, Tensor) or score_position != "last_token":
        _check_position(score_position, sequences)
        raise ValueError(
            f"score_position is given, but scores of shape {tuple(scores.shape)} are of tokens, "
            "and stay where they lie; leave it out, or pass one score for each sequence"
        )
    return torch.where(mask, scores, 0.0)


def _check_position(score_position: str | Tensor, sequences: Sequences) -> None:  # or [B]
    if isinstance(score_position, Tensor):
        _check_indices(score_position, sequences)
    else:
        check_choice("score_position", score_position, get_args(ScorePosition))


def score_indices(
    score_position: str | Tensor,  # or [B]
    mask: Tensor,  # [B, T]
    sequences: Sequences,
) -> Tensor:  # [B] int64
    """Return the position of each sequence's score, -1 for a response without tokens.

    "after_last" is the position after the last token, or the last position where there is none.
    """
    _check_position(score_position, sequences)
    last = sequences.last(mask)
    if isinstance(score_position, Tensor):
        wanted = score_position.long()
    else:
        after = torch.minimum(last + 1, sequences.lengths() - 1)
        wanted = last if score_position == "last_token" else after
    return torch.where(last >= 0, wanted, -1)


def placed_scores(
    scores: Tensor,  # [B]
    index: Tensor,  # [B]
    sequences: Sequences,
) -> Tensor:  # [B, T]
    """Each sequence's score at its position, 0 elsewhere."""
    at_score = sequences.positions() == sequences.at_tokens(index)
    return torch.where(at_score, sequences.at_tokens(scores), 0.0)


def _check_indices(indices: Tensor, sequences: Sequences) -> None:
    if indices.dtype == torch.bool or indices.is_floating_point():
        raise TypeError(f"score_position has dtype {indices.dtype}; accepted: integers")
    sequences.check_scores("score_position", indices)
    if indices.device.type != "cpu":
        return  # looking at the values would synchronise; such a score goes nowhere
    lengths = sequences.lengths()
    outside = (indices < -1) | (indices >= lengths)
    if outside.any():
        raise ValueError(
            f"score_position holds {int(indices[outside][0])}; accepted: -1 (nowhere) to "
            f"{int(lengths[outside][0]) - 1}"
        )
