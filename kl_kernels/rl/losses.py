"""PPO's clipped losses, and one way to turn per-token losses into a number."""

from __future__ import annotations

import torch
from torch import Tensor

from kl_kernels.checks import (
    check_batch,
    check_choice,
    check_finite,
    check_like,
    check_logprobs,
    check_mask,
    check_non_negative,
    check_number,
    check_positive,
)
from kl_kernels.rl.masked import masked_mean, masked_var, select
from kl_kernels.rl.straight_through import clamp_value
from kl_kernels.schemas import output_dtype

AGGREGATIONS = (
    "token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
)


def token_weights(
    mask: Tensor,  # [B, T]
    aggregation: str,
    denominator: float | Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The weight of each token's loss in the aggregated one, [B, T], 0 where masked.

    With N tokens and S sequences under the mask (sequences without tokens do not count), and L the
    tokens of a token's own sequence:

        "token-mean"               1 / N
        "seq-mean-token-sum"       1 / S
        "seq-mean-token-mean"      1 / (S L)
        "seq-mean-token-sum-norm"  1 / (S T)     T = mask.shape[1], padding included

    `denominator` takes the place of N in the first, of S in the others. The last is Dr. GRPO's
    (Liu et al. 2025, arXiv 2503.20783): T stands for a constant generation budget, so it is only
    constant if every batch is padded to the same T; otherwise use "seq-mean-token-sum" with
    denominator = sequences * budget.
    """
    check_choice("aggregation", aggregation, AGGREGATIONS)
    if denominator is not None and not isinstance(denominator, Tensor):
        denominator = check_number("denominator", denominator)
    check_batch("mask", mask)
    mask = mask.bool()
    lengths = mask.sum(1, keepdim=True)
    if denominator is None:
        count = mask.sum() if aggregation == "token-mean" else (lengths > 0).sum()
        denominator = count.clamp_min(1)
    elif not isinstance(denominator, Tensor):
        check_positive("denominator", denominator)
    weights = mask.to(dtype) / denominator
    if aggregation == "seq-mean-token-mean":
        weights = weights / lengths.clamp_min(1)
    if aggregation == "seq-mean-token-sum-norm":
        weights = weights / max(mask.shape[1], 1)
    return weights


def aggregate(
    loss_per_token: Tensor,  # [B, T]
    mask: Tensor,  # [B, T]
    aggregation: str = "token-mean",
    denominator: float | Tensor | None = None,
) -> Tensor:
    """The per-token losses as one number: the sum of them times their `token_weights`.

    Each row is one sequence. To the "seq-mean" aggregations a packed row, [1, N] with several
    sequences one after the other, is a single long one: unpack such rows to [B, T] first.

    Args:
        loss_per_token: any float dtype.
        mask: bool, or numbers that are 0 or 1; NaN where it is 0 reaches neither result nor
            gradient.
        aggregation: "token-mean", "seq-mean-token-sum", "seq-mean-token-mean" or
            "seq-mean-token-sum-norm", as verl names them; see `token_weights`.
        denominator: the number of tokens ("token-mean") or of sequences (the others) in the whole
            batch this one is a part of, a number or 0-dim tensor above 0. Then the losses of
            micro-batches, and of data-parallel ranks, add up to the loss of the whole; where
            gradients are averaged over ranks (DDP), pass the global count over the number of
            ranks. None: the count of this batch.

    Returns:
        0-dim float32 (float64 for float64 losses); 0 where nothing is unmasked.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or range.
    """
    check_batch("loss_per_token", loss_per_token)
    check_like("mask", mask, "loss_per_token", loss_per_token)
    mask = check_mask("mask", mask)
    dtype = output_dtype(loss_per_token)
    weights = token_weights(mask, aggregation, denominator, dtype=dtype)
    return (select(loss_per_token, mask, dtype) * weights).sum()


def ppo_policy_loss(
    logprobs: Tensor,  # [B, T]
    old_logprobs: Tensor,  # [B, T]
    advantages: Tensor,  # [B, T]
    mask: Tensor,  # [B, T]
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    weights: Tensor | None = None,  # [B, T]
    aggregation: str = "token-mean",
    denominator: float | Tensor | None = None,
    log_ratio_clamp: float | None = 20.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped policy loss. With r = exp(logprobs - old_logprobs) and A the advantage,

        loss = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))
        loss = min(loss, -A dual_clip)      where A < 0, if dual_clip is set

    (Schulman et al. 2017, arXiv 1707.06347, equation 7; clip_low != clip_high: DAPO, Yu et al.
    2025, arXiv 2503.14476; dual clip: Ye et al. 2020, arXiv 1912.09729.) Where a clip decides, the
    token's gradient is 0.

    Args:
        logprobs: log-probability of each token under the policy; any float dtype. The only argument
            that gets a gradient.
        old_logprobs: the same under the policy that sampled the tokens.
        advantages: as `compute_gae` makes them, usually whitened.
        mask: bool, or numbers that are 0 or 1; NaN where it is 0 reaches neither loss nor gradient.
        clip_low: the ratio is clipped below at 1 - clip_low; 0 or above.
        clip_high: the ratio is clipped above at 1 + clip_high; 0 or above.
        dual_clip: bound of the ratio where A < 0, above 1; 3 is usual. None: no bound.
        weights: importance weights that correct for the engine that sampled (TIS, Yao et al. 2025),
            constants that multiply each token's loss after clipping.
        aggregation: see `aggregate`.
        denominator: the count of the whole batch, see `aggregate`.
        log_ratio_clamp: log r is clamped to [-log_ratio_clamp, log_ratio_clamp] so that r stays
            finite. The gradient passes, as r at the clamp: without `dual_clip` a token that became
            far too likely with A < 0 keeps being pulled back. None: no clamp.

    Returns:
        (loss, metrics): a 0-dim float32 loss (float64 for float64 logprobs), and 0-dim detached
        tensors over the unmasked tokens of this call (0 if there are none):
        clip_fraction (of tokens whose clipped loss is the larger), clip_fraction_dual (where
        dual_clip decides), approx_kl (k3 of KL(old || policy), never negative), approx_kl_k1
        (its plain mean of old - new log-probabilities), ratio_mean, ratio_max.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or range.
    """
    check_batch("logprobs", logprobs)
    check_like("old_logprobs", old_logprobs, "logprobs", logprobs)
    check_like("advantages", advantages, "logprobs", logprobs)
    check_like("mask", mask, "logprobs", logprobs)
    mask = check_mask("mask", mask)
    check_logprobs("old_logprobs", old_logprobs, mask)
    clip_low, clip_high, dual_clip, log_ratio_clamp = check_clipping(
        clip_low, clip_high, dual_clip, log_ratio_clamp
    )
    dtype = output_dtype(logprobs)
    log_ratio = select(logprobs.to(dtype) - old_logprobs.detach().to(dtype), mask, dtype)
    log_ratio = clamp_value(log_ratio, log_ratio_clamp)
    ratio = log_ratio.exp()
    advantages = select(advantages.detach(), mask, dtype)

    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(unclipped, clipped)
    dual_clipped = torch.zeros_like(mask, dtype=torch.bool)
    if dual_clip is not None:
        bound = -advantages * dual_clip
        dual_clipped = (advantages < 0) & (loss > bound)
        loss = torch.where(dual_clipped, bound, loss)
    if weights is not None:
        check_like("weights", weights, "logprobs", logprobs)
        loss = loss * select(weights.detach(), mask, dtype)

    with torch.no_grad():
        metrics = {
            "clip_fraction": masked_mean((clipped > unclipped).to(dtype), mask),
            "clip_fraction_dual": masked_mean(dual_clipped.to(dtype), mask),
            "approx_kl": masked_mean(torch.expm1(log_ratio) - log_ratio, mask),
            "approx_kl_k1": masked_mean(-log_ratio, mask),
            "ratio_mean": masked_mean(ratio, mask),
            "ratio_max": _masked_max(ratio, mask),
        }
    return aggregate(loss, mask, aggregation, denominator), metrics


def ppo_value_loss(
    values: Tensor,  # [B, T]
    old_values: Tensor | None,  # [B, T]
    returns: Tensor,  # [B, T]
    mask: Tensor,  # [B, T]
    *,
    clip_range: float | None = 0.2,
    aggregation: str = "token-mean",
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped value loss, max((v - R)^2, (v_clipped - R)^2) / 2 per token.

    v_clipped = clip(v, old_values - clip_range, old_values + clip_range), as in OpenAI's baselines
    (ppo2) and TRL; where the clipped error is the larger, the token's gradient is 0.

    Args:
        values: the value function's estimates; any float dtype. The only argument that gets a
            gradient.
        old_values: its estimates at the time of the rollout; may be None without `clip_range`.
        returns: as `compute_gae` makes them.
        mask: bool, or numbers that are 0 or 1; NaN where it is 0 reaches neither loss nor gradient.
        clip_range: how far a value may move, in units of reward, above 0. None: no clipping.
        aggregation: see `aggregate`.
        denominator: the count of the whole batch, see `aggregate`.

    Returns:
        (loss, metrics): a 0-dim float32 loss (float64 for float64 values), and 0-dim detached
        tensors over the unmasked tokens of this call (0 if there are none): clip_fraction,
        value_mean, return_mean, explained_variance = 1 - var(R - v) / var(R) (1 is perfect, 0 is
        no better than a constant; 0 where R does not vary).

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or range.
    """
    check_batch("values", values)
    check_like("returns", returns, "values", values)
    check_like("mask", mask, "values", values)
    mask = check_mask("mask", mask)
    dtype = output_dtype(values)
    v = select(values, mask, dtype)
    target = select(returns.detach(), mask, dtype)
    unclipped = clipped = (v - target).square()
    if clip_range is not None:
        clip_range = check_positive("clip_range", clip_range)
        if old_values is None:
            raise ValueError("old_values is None, but clip_range is set; pass both or neither")
        check_like("old_values", old_values, "values", values)
        old = select(old_values.detach(), mask, dtype)
        clipped = (v.clamp(old - clip_range, old + clip_range) - target).square()
    loss = torch.maximum(unclipped, clipped) / 2

    with torch.no_grad():
        return_var = masked_var(target, mask)
        unexplained = masked_var(target - v, mask) / return_var
        metrics = {
            "clip_fraction": masked_mean((clipped > unclipped).to(dtype), mask),
            "value_mean": masked_mean(v, mask),
            "return_mean": masked_mean(target, mask),
            "explained_variance": torch.where(return_var > 0, 1 - unexplained, 0.0),
        }
    return aggregate(loss, mask, aggregation, denominator), metrics


def check_clipping(
    clip_low: float, clip_high: float, dual_clip: float | None, log_ratio_clamp: float | None
) -> tuple[float, float, float | None, float | None]:
    """The four as Python floats."""
    clip_low = check_non_negative("clip_low", clip_low)
    clip_high = check_non_negative("clip_high", clip_high)
    if log_ratio_clamp is not None:
        log_ratio_clamp = check_positive("log_ratio_clamp", log_ratio_clamp)
    if dual_clip is not None:
        dual_clip = check_finite("dual_clip", dual_clip)
        if dual_clip <= 1:
            raise ValueError(f"dual_clip is {dual_clip}; it has to be above 1")
    return clip_low, clip_high, dual_clip, log_ratio_clamp


def _masked_max(x: Tensor, mask: Tensor) -> Tensor:
    """The largest of positive values under the mask, 0 if there is none."""
    return select(x, mask, x.dtype).amax() if x.numel() else x.new_zeros(())
