"""From per-token KL and per-sequence scores to shaped rewards."""

from __future__ import annotations

import torch
from torch import Tensor

from kl_kernels.checks import check_choice, check_positive
from kl_kernels.schemas import ESTIMATORS

SCORE_POSITIONS = ("last_token", "after_last")
UNBIASED_REWARDS = ("k1", "exact")


def check_reward_estimator(kl_estimator: str, *, biased: bool) -> None:
    check_choice("kl_estimator", kl_estimator, ESTIMATORS)
    if kl_estimator not in UNBIASED_REWARDS and not biased:
        raise ValueError(
            f"kl_estimator is {kl_estimator!r}, whose expected policy gradient as a reward is not "
            "that of the KL; use 'k1' or 'exact', or pass biased=True to have it all the same"
        )


def clip_scores(scores: Tensor, score_clip: float | None) -> Tensor:  # [B]
    if score_clip is None:
        return scores
    check_positive("score_clip", score_clip)
    return scores.clamp(-score_clip, score_clip)


def score_indices(score_position: str | Tensor, mask: Tensor) -> Tensor:  # [B, T] -> [B] int64
    """Where each sequence's score goes, -1 for nowhere (a response without tokens).

    "after_last" is the position after the last token, or the last column where there is none.
    """
    n_tokens = mask.shape[1]
    positions = torch.arange(n_tokens, device=mask.device)
    last = (
        torch.where(mask, positions, -1).amax(1) if n_tokens else mask.new_full(mask.shape[:1], -1)
    )
    if isinstance(score_position, Tensor):
        if score_position.shape != last.shape:
            raise ValueError(
                f"score_position has shape {tuple(score_position.shape)}; "
                f"a mask of shape {tuple(mask.shape)} needs {tuple(last.shape)}"
            )
        wanted = score_position.long()
    else:
        check_choice("score_position", score_position, SCORE_POSITIONS)
        wanted = last if score_position == "last_token" else (last + 1).clamp_max(n_tokens - 1)
    return torch.where(last >= 0, wanted, -1)
