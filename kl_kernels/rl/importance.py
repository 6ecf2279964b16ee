"""Importance weights for tokens that another engine sampled than the one that trains.

An inference engine rounds differently, so its policy is not quite the trainer's even with the same
weights, and tokens are sampled from the one and trained on as if from the other. The weight

    w = policy / rollout,  policies of the trainer and of the engine, at the time of the rollout

corrects the expectation, at the price of variance where it is large. Two ways to bound it:

    "truncate"  w' = min(w, high)                       TIS (Yao et al. 2025; Ionides 2008)
    "mask"      w' = w where low <= w <= high, else 0    IcePop (Ling team, 2025)

Either way a weight that cannot be known is 0: an engine that returns NaN for a token has not said
how likely it was, so nothing learned from that token could be corrected.
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from kl_kernels.algebra.epilogues import k3_of
from kl_kernels.checks import (
    check_choice,
    check_like,
    check_logprobs,
    check_mask,
    check_non_negative,
    check_number,
)
from kl_kernels.rl.log_ratio import masked_log_ratio
from kl_kernels.rl.masked import masked_mean, select
from kl_kernels.rl.sequences import sequences_of
from kl_kernels.schemas import output_dtype

WeightMode = Literal["truncate", "mask"]
WeightLevel = Literal["token", "sequence", "geometric"]
BOUNDS: dict[WeightMode, tuple[float, float]] = {  # (low, high), as published
    "truncate": (0.0, 2.0),
    "mask": (0.5, 5.0),
}


def importance_weights(
    logprobs: Tensor,  # [B, T]
    rollout_logprobs: Tensor,  # [B, T]
    mask: Tensor,  # [B, T]
    *,
    mode: WeightMode = "truncate",
    level: WeightLevel = "token",
    low: float | None = None,
    high: float | None = None,
    cu_seqlens: Tensor | None = None,  # [S + 1]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Bounded importance weights of the tokens, which the policy losses take as `weights`.

    The weight is w = exp(logprobs - rollout_logprobs), of a token or of a sequence, within bounds.

    A token whose log-probability is NaN on either side gets the weight 0 in both modes, and counts
    in bounded_fraction; at the levels "sequence" and "geometric" its whole sequence does, as their
    w is a product over all its tokens. The other metrics leave out what is not known. That is no
    error, since engines do leave out log-probabilities, and it hides none: where the trainer's own
    are NaN the loss is NaN whatever the weights. Watch bounded_fraction.

    A token that both sides rule out (-inf) has w = 1.

    Args:
        logprobs: [B, T] log-probability of each sampled token under the trainer's policy, before
            its first step, in nats; any float dtype. (Not the policy in training: its ratio to
            this one is what the loss clips.)
        rollout_logprobs: [B, T] the same as the engine that sampled the token gave it, of the
            distribution it sampled from: with the same temperature, and no top-k or top-p.
        mask: [B, T] bool, or numbers that are 0 or 1; NaN where it is 0 reaches nothing.
        mode: "truncate" (w above `high` becomes `high`) or "mask" (w out of bounds becomes 0).
        level: what w is the ratio of. "token": of a token. "sequence": of the whole response, the
            product over its tokens. "geometric": its geometric mean over the tokens, which does
            not grow with length. A sequence's tokens share its weight.
        low: bound from below, 0 or above. None: 0 for "truncate", 0.5 for "mask". For "truncate"
            a smaller w becomes `low`.
        high: bound from above, at least `low`. None: 2 for "truncate", 5 for "mask".
        cu_seqlens: [S + 1] int32 or int64 of packed sequences, ascending from 0 to N (looked at on
            a CPU alone): sequence s has the tokens from cu_seqlens[s] to before cu_seqlens[s + 1].
            Everything that is [B, T] here is then [N] or [1, N]. None: each row is one.

    Returns:
        (weights, metrics): [B, T] float32 (float64 for float64 logprobs), 0 where masked, without
        gradient; and 0-dim tensors over unmasked tokens: weight_mean (of w, before its bounds),
        weight_max, bounded_fraction (of tokens whose w is outside, or not known), k1 and k3 of
        KL(rollout || policy), in nats per token.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or range.

    Examples:
        >>> import torch, kl_kernels
        >>> engine = torch.tensor([[0.5, 0.1, float("nan")]]).log()
        >>> trainer = torch.tensor([[0.4, 0.5, 0.5]]).log()
        >>> weights, metrics = kl_kernels.importance_weights(trainer, engine, torch.ones(1, 3))
        >>> weights
        tensor([[0.8000, 2.0000, 0.0000]])
        >>> metrics["bounded_fraction"]
        tensor(0.6667)
    """
    sequences = sequences_of("logprobs", logprobs, cu_seqlens)
    check_like("rollout_logprobs", rollout_logprobs, "logprobs", logprobs)
    check_like("mask", mask, "logprobs", logprobs)
    mask = check_mask("mask", mask)
    check_logprobs("rollout_logprobs", rollout_logprobs, mask)
    check_choice("mode", mode, get_args(WeightMode))
    check_choice("level", level, get_args(WeightLevel))
    low = check_non_negative("low", BOUNDS[mode][0] if low is None else low)
    high = check_number("high", BOUNDS[mode][1] if high is None else high)
    if not high >= low:
        raise ValueError(f"high is {high}; it must be at least low, {low}")

    dtype = output_dtype(logprobs)
    token_log = masked_log_ratio(logprobs.detach(), rollout_logprobs, mask)
    log_weight = token_log
    if level != "token":
        log_weight = sequences.sums(token_log)
        if level == "geometric":
            log_weight = log_weight / sequences.sums(mask).clamp_min(1)
        log_weight = sequences.at_tokens(log_weight).expand_as(token_log)
    known = mask.bool() & ~log_weight.isnan()
    weight = select(log_weight.exp(), known, dtype)

    outside = ~known | (weight < low) | (weight > high)
    bounded = weight.clamp(low, high) if mode == "truncate" else weight.masked_fill(outside, 0.0)
    known_token = mask.bool() & ~token_log.isnan()
    return select(bounded, known, dtype), {
        "weight_mean": masked_mean(weight, known),
        "weight_max": weight.amax() if weight.numel() else weight.new_zeros(()),
        "bounded_fraction": masked_mean(outside.to(dtype), mask),
        "k1": masked_mean(-token_log, known_token),
        "k3": masked_mean(k3_of(-token_log), known_token),
    }
