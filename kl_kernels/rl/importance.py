"""Importance weights for tokens that another engine sampled than the one that trains.

An inference engine rounds differently, so its policy is not quite the trainer's even with the same
weights, and tokens are sampled from the one and trained on as if from the other. The weight

    w = policy / rollout,  policies of the trainer and of the engine, at the time of the rollout

corrects the expectation, at the price of variance where it is large. Two ways to bound it:

    "truncate"  w' = min(w, high)                       TIS (Yao et al. 2025; Ionides 2008)
    "mask"      w' = w where low <= w <= high, else 0    IcePop (Ling team, 2025)
"""

from __future__ import annotations

import torch
from torch import Tensor

from kl_kernels.checks import (
    check_batch,
    check_choice,
    check_like,
    check_logprobs,
    check_mask,
    check_non_negative,
    check_number,
)
from kl_kernels.rl.masked import masked_mean, select
from kl_kernels.schemas import output_dtype

MODES = {"truncate": (0.0, 2.0), "mask": (0.5, 5.0)}  # (low, high), as published
LEVELS = ("token", "sequence", "geometric")


def importance_weights(
    logprobs: Tensor,  # [B, T]
    rollout_logprobs: Tensor,  # [B, T]
    mask: Tensor,  # [B, T]
    *,
    mode: str = "truncate",
    level: str = "token",
    low: float | None = None,
    high: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The bounded importance weight of each token: `weights` of the policy losses.

    Args:
        logprobs: log-probability of each sampled token under the trainer's policy, before its
            first step; any float dtype. (Not the policy in training: its ratio to this one is what
            the loss clips.)
        rollout_logprobs: the same as the engine that sampled the token gave it, of the
            distribution it sampled from: with the same temperature, and no top-k or top-p.
        mask: bool, or numbers that are 0 or 1; NaN where it is 0 reaches nothing.
        mode: "truncate" or "mask", see above.
        level: what w is the ratio of. "token": of a token. "sequence": of the whole response, the
            product over its tokens. "geometric": its geometric mean over the tokens, which does
            not grow with length. A sequence's tokens share its weight. Each row is one sequence:
            with "sequence" and "geometric" a packed row, [1, N] with several sequences one after
            the other, would have one weight for all of them; unpack it to [B, T] first.
        low: bound from below, 0 or above. None: 0 for "truncate", 0.5 for "mask". For "truncate"
            a smaller w becomes `low`.
        high: bound from above, at least `low`. None: 2 for "truncate", 5 for "mask".

    Returns:
        (weights, metrics): [B, T] float32 (float64 for float64 logprobs), 0 where masked, without
        gradient; and 0-dim tensors over unmasked tokens: weight_mean (of w, before its bounds),
        weight_max, bounded_fraction (of tokens whose w is outside), k1 and k3 of
        KL(rollout || policy), in nats per token.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or range.
    """
    check_batch("logprobs", logprobs)
    check_like("rollout_logprobs", rollout_logprobs, "logprobs", logprobs)
    check_like("mask", mask, "logprobs", logprobs)
    mask = check_mask("mask", mask)
    check_logprobs("rollout_logprobs", rollout_logprobs, mask)
    check_choice("mode", mode, tuple(MODES))
    check_choice("level", level, LEVELS)
    low = check_non_negative("low", MODES[mode][0] if low is None else low)
    high = check_number("high", MODES[mode][1] if high is None else high)
    if not high >= low:
        raise ValueError(f"high is {high}; it has to be at least low, {low}")

    dtype = output_dtype(logprobs)
    token_log = logprobs.detach().to(dtype) - rollout_logprobs.detach().to(dtype)
    token_log = select(token_log, mask, dtype)
    log_weight = token_log
    if level != "token":
        log_weight = token_log.sum(1, keepdim=True)
        if level == "geometric":
            log_weight = log_weight / mask.bool().sum(1, keepdim=True).clamp_min(1)
        log_weight = log_weight.expand_as(token_log)
    weight = select(log_weight.exp(), mask, dtype)

    outside = ~((weight >= low) & (weight <= high))  # NaN is outside
    bounded = weight.clamp(low, high) if mode == "truncate" else weight.masked_fill(outside, 0.0)
    return select(bounded, mask, dtype), {
        "weight_mean": masked_mean(weight, mask),
        "weight_max": weight.amax() if weight.numel() else weight.new_zeros(()),
        "bounded_fraction": masked_mean(outside.to(dtype), mask),
        "k1": masked_mean(-token_log, mask),
        "k3": masked_mean(torch.expm1(token_log) - token_log, mask),
    }
