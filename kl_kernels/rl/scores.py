"""Adjustments of a sequence's score before it becomes a reward: for its length and its ending."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from kl_kernels.checks import (
    check_choice,
    check_finite,
    check_mask,
    check_non_negative,
    check_number,
    check_per_sequence,
    check_positive,
    check_tensor,
)
from kl_kernels.rl.sequences import sequences_of
from kl_kernels.schemas import output_dtype

MissingEOS = Literal["subtract", "replace"]


def missing_eos_penalty(
    scores: Tensor,  # [B]
    ended: Tensor,  # [B]
    penalty: float,
    *,
    mode: MissingEOS = "subtract",
) -> Tensor:
    """Scores of sequences that were cut off instead of ending, lowered or replaced.

    A reward model has no say on half an answer, and a policy that learns not to end is not worth
    its score. "subtract": score - penalty, as TRL. "replace": -penalty whatever the score, as
    OpenAI's summarisation work (Stiennon et al. 2020; 1 there) and torchtune (3).

    Args:
        scores: [B] any float dtype.
        ended: [B] bool, or numbers that are 0 or 1; 1 where the sequence holds its EOS, or any
            other token or text that ends it: the caller knows which count.
        penalty: in units of the score, 0 or above.
        mode: "subtract" or "replace".

    Returns:
        [B] float32 (float64 for float64 scores), without gradient.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or range.

    Examples:
        >>> import torch, kl_kernels
        >>> scores, ended = torch.tensor([2.0, 2.0]), torch.tensor([True, False])
        >>> kl_kernels.missing_eos_penalty(scores, ended, 1.0)
        tensor([2., 1.])
    """
    _check_scores(scores)
    check_per_sequence("ended", ended, "scores", scores)
    ended = check_mask("ended", ended)
    penalty = check_non_negative("penalty", penalty)
    check_choice("mode", mode, get_args(MissingEOS))
    scores = scores.detach().to(output_dtype(scores))
    cut_off = scores - penalty if mode == "subtract" else torch.full_like(scores, -penalty)
    return torch.where(ended, scores, cut_off)


def overlong_penalty(
    lengths: Tensor,  # [B]
    max_length: float,
    buffer: float,
    *,
    factor: float = 1.0,
) -> Tensor:
    """A penalty that grows with length over the last `buffer` tokens; add it to the scores.

        0                                                 length <= max_length - buffer
        -factor (length - (max_length - buffer)) / buffer     up to max_length
        -factor                                           beyond

    DAPO's soft overlong punishment (Yu et al. 2025, arXiv 2503.14476, equation 13).

    Args:
        lengths: [B] tokens of each response, any real dtype; `mask.sum(1)`. Packed sequences that
            are responses from end to end have `cu_seqlens.diff()`, [S].
        max_length: the length from which the whole penalty is due, above 0.
        buffer: tokens before it over which the penalty grows, 1 to max_length.
        factor: the whole penalty, in units of the score, 0 or above.

    Returns:
        [B] float32, 0 or below.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or range.

    Examples:
        >>> import torch, kl_kernels
        >>> lengths = torch.tensor([400, 450, 600])
        >>> penalty = kl_kernels.overlong_penalty(lengths, max_length=500, buffer=200)
        >>> penalty.tolist()
        [-0.5, -0.75, -1.0]
    """
    _check_scores(lengths, "lengths")
    max_length = check_positive("max_length", max_length)
    buffer = check_number("buffer", buffer)
    if not 1 <= buffer <= max_length:
        raise ValueError(f"buffer is {buffer:g}; accepted: 1 to max_length, {max_length:g}")
    factor = check_non_negative("factor", factor)
    over = (lengths.detach().float() - (max_length - buffer)) / buffer
    return -factor * over.clamp(0, 1)


def length_normalized_scores(
    scores: Tensor,  # [B]
    mask: Tensor,  # [B, T]
    *,
    exponent: float = 1.0,
    cu_seqlens: Tensor | None = None,  # [S + 1]
) -> Tensor:
    """Scores divided by length^exponent, so that a sum over tokens does not pay for more of them.

    Exponent 1 makes a sum of log-probabilities their mean (as SimPO's reward is, Meng et al. 2024,
    arXiv 2405.14734); below 1 is beam search's milder form (Wu et al. 2016, arXiv 1609.08144).

    Args:
        scores: [B] any float dtype; with cu_seqlens [S].
        mask: [B, T] bool, or numbers that are 0 or 1; 1 at response tokens. Without any, the
            score stays. With cu_seqlens [N] or [1, N].
        exponent: finite; 0 changes nothing.
        cu_seqlens: [S + 1] int32 or int64 of packed sequences, ascending from 0 to N (looked at on
            a CPU alone): sequence s has the tokens from cu_seqlens[s] to before cu_seqlens[s + 1].
            None: each row is one.

    Returns:
        [B] float32 (float64 for float64 scores), without gradient.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or range.

    Examples:
        >>> import torch, kl_kernels
        >>> scores = torch.tensor([6.0, 6.0])
        >>> mask = torch.tensor([[True, True, True], [True, False, False]])
        >>> kl_kernels.length_normalized_scores(scores, mask)
        tensor([2., 6.])
    """
    sequences = sequences_of("mask", mask, cu_seqlens)
    sequences.check_scores("scores", scores)
    mask = check_mask("mask", mask)
    exponent = check_finite("exponent", exponent)
    dtype = output_dtype(scores)
    lengths = sequences.sums(mask).clamp_min(1).to(dtype)
    return scores.detach().to(dtype) / lengths**exponent


def _check_scores(scores: Tensor, name: str = "scores") -> None:
    check_tensor(name, scores)
    if scores.ndim != 1:
        raise ValueError(f"{name} has shape {tuple(scores.shape)}; it must be [B]")
