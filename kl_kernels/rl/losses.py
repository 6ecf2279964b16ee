"""PPO's clipped losses, and one way to turn per-token losses into a number."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from kl_kernels.algebra.epilogues import k3_of
from kl_kernels.checks import (
    check_choice,
    check_finite,
    check_like,
    check_logprobs,
    check_mask,
    check_non_negative,
    check_number,
    check_positive,
    check_same_device,
    values_are_at_hand,
)
from kl_kernels.rl.log_ratio import masked_log_ratio
from kl_kernels.rl.masked import masked_mean, masked_var, select
from kl_kernels.rl.sequences import Sequences, sequences_of
from kl_kernels.rl.straight_through import clamp_value
from kl_kernels.schemas import output_dtype

Aggregation = Literal[
    "token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
]
AGGREGATIONS: tuple[Aggregation, ...] = get_args(Aggregation)


def token_weights(
    mask: Tensor,  # [B, T]
    aggregation: Aggregation,
    denominator: float | Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,  # [S + 1]
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The weight of each token's loss in the aggregated one, [B, T], 0 where masked.

    With N tokens and S sequences under the mask (sequences without tokens do not count), and L the
    tokens of a token's own sequence:

        "token-mean"               1 / N
        "seq-mean-token-sum"       1 / S
        "seq-mean-token-mean"      1 / (S L)
        "seq-mean-token-sum-norm"  1 / (S T)     T = mask.shape[1], padding included; of packed
                                                 sequences the length of the longest

    `denominator` takes the place of N in the first, of S in the others: with several ranks or
    micro-batches, what `global_denominator` makes of their masks. The last is Dr. GRPO's
    (Liu et al. 2025, arXiv 2503.20783): T stands for a constant generation budget, so it is only
    constant if every batch is padded to the same T; otherwise use "seq-mean-token-sum" with
    denominator = sequences * budget.
    """
    return _weights(mask, aggregation, denominator, sequences_of("mask", mask, cu_seqlens), dtype)


def _weights(
    mask: Tensor,  # [B, T]
    aggregation: Aggregation,
    denominator: float | Tensor | None,
    sequences: Sequences,
    dtype: torch.dtype,
) -> Tensor:
    check_choice("aggregation", aggregation, AGGREGATIONS)
    mask = mask.bool()
    if denominator is None:
        denominator = count(mask, aggregation, sequences).clamp_min(1)
    else:
        denominator = _checked_denominator(denominator, mask)
    # Selected, as the count of a batch without tokens is 0, and so would be 0 / 0.
    weights = torch.where(mask, mask.to(dtype) / denominator, 0.0)
    if aggregation == "seq-mean-token-mean":
        weights = weights / sequences.at_tokens(sequences.sums(mask)).clamp_min(1)
    if aggregation == "seq-mean-token-sum-norm" and weights.numel():
        weights = weights / sequences.longest
    return weights


def _checked_denominator(
    denominator: float | Tensor,  # []
    mask: Tensor,  # [B, T] bool
) -> float | Tensor:
    """A count of tokens or sequences: above 0, or 0 where the mask has none either.

    Looking at the values on a GPU would wait for it; tokens over a count of 0 are infinite there.
    """
    if isinstance(denominator, Tensor):
        if denominator.ndim != 0:
            shape = tuple(denominator.shape)
            raise ValueError(f"denominator has shape {shape}; it must be a number or 0-dim")
        if denominator.device.type != "cpu":
            check_same_device("denominator", denominator, "mask", mask)
        if not values_are_at_hand(denominator):
            return denominator
        given, value = denominator.item(), float(denominator)
    else:
        given, value = denominator, check_number("denominator", denominator)
        denominator = value
    if 0 < value < math.inf:
        return denominator
    if value == 0 and not (values_are_at_hand(mask) and mask.any()):
        return denominator
    raise ValueError(
        f"denominator is {given}; it must be a finite number above 0, or 0 with a mask that has no "
        "token"
    )


def count(
    mask: Tensor,  # [B, T] bool
    aggregation: Aggregation,
    sequences: Sequences,
) -> Tensor:  # []
    """Number of tokens, or of sequences that have any: the aggregation is a mean over them."""
    return mask.sum() if aggregation == "token-mean" else sequences.with_tokens(mask)


def aggregate(
    loss_per_token: Tensor,  # [B, T]
    mask: Tensor,  # [B, T]
    aggregation: Aggregation = "token-mean",
    denominator: float | Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,  # [S + 1]
) -> Tensor:
    """Sum of the per-token losses, each times its weight: one number to call `backward` on.

    Args:
        loss_per_token: [B, T] any float dtype; each row is one sequence. With cu_seqlens [N] or
            [1, N], as the mask.
        mask: [B, T] bool, or numbers that are 0 or 1; NaN where it is 0 reaches neither result nor
            gradient.
        aggregation: "token-mean" (mean over all tokens), "seq-mean-token-sum" (sum of each
            sequence, mean over sequences), "seq-mean-token-mean" (mean of each sequence, mean over
            sequences) or "seq-mean-token-sum-norm" (the second divided by T, of packed sequences by
            the length of the longest), as verl names them.
        denominator: what the losses of a batch's parts are divided by, a number or 0-dim tensor
            above 0, so that their gradients are those of the whole batch; or 0, where the batch has
            no token and the loss is 0. Micro-batches of one process: the batch's number of tokens
            ("token-mean") or of sequences (the others). Data-parallel ranks: that of all ranks over
            the number of ranks, as DDP and FSDP average gradients; `global_denominator` makes both.
            None: the count of this batch.
        cu_seqlens: [S + 1] int32 or int64 of packed sequences, ascending from 0 to N (looked at on
            a CPU alone): sequence s has the tokens from cu_seqlens[s] to before cu_seqlens[s + 1].
            None: each row is one.

    Returns:
        0-dim float32 (float64 for float64 losses); 0 where nothing is unmasked.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or range; on a CPU
            also a denominator of 0 beside tokens.

    Examples:
        >>> import torch
        >>> from kl_kernels.rl.losses import aggregate
        >>> loss = torch.tensor([[1.0, 2.0, 3.0], [6.0, 0.0, 0.0]])
        >>> mask = torch.tensor([[True, True, True], [True, False, False]])
        >>> aggregate(loss, mask), aggregate(loss, mask, "seq-mean-token-mean")
        (tensor(3.), tensor(4.))
    """
    sequences = sequences_of("loss_per_token", loss_per_token, cu_seqlens)
    check_like("mask", mask, "loss_per_token", loss_per_token)
    mask = check_mask("mask", mask)
    return _aggregated(loss_per_token, mask, aggregation, denominator, sequences)


def _aggregated(
    loss_per_token: Tensor,  # [B, T]
    mask: Tensor,  # [B, T] bool
    aggregation: Aggregation,
    denominator: float | Tensor | None,
    sequences: Sequences,
) -> Tensor:  # []
    dtype = output_dtype(loss_per_token)
    weights = _weights(mask, aggregation, denominator, sequences, dtype)
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
    aggregation: Aggregation = "token-mean",
    denominator: float | Tensor | None = None,
    log_ratio_clamp: float | None = 20.0,
    cu_seqlens: Tensor | None = None,  # [S + 1]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped policy loss of PPO. With r = exp(logprobs - old_logprobs) and A the advantage,

        loss = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high))
        loss = min(loss, -A dual_clip)      where A < 0, if dual_clip is set

    (Schulman et al. 2017, arXiv 1707.06347, equation 7; clip_low != clip_high: DAPO, Yu et al.
    2025, arXiv 2503.14476; dual clip: Ye et al. 2020, arXiv 1912.09729.) Where a clip decides, the
    token's gradient is 0. So it is of a token that both policies rule out (log-probability -inf):
    its ratio is 1, and stays 1.

    Args:
        logprobs: [B, T] log-probability of each token under the policy, in nats; any float dtype.
            The only argument that gets a gradient.
        old_logprobs: [B, T] the same under the policy that sampled the tokens.
        advantages: [B, T] as `compute_gae` makes them, usually whitened.
        mask: [B, T] bool, or numbers that are 0 or 1; NaN where it is 0 reaches neither loss nor
            gradient.
        clip_low: the ratio is clipped below at 1 - clip_low; 0 or above.
        clip_high: the ratio is clipped above at 1 + clip_high; 0 or above.
        dual_clip: bound of the ratio where A < 0, above 1; 3 is usual. None: no bound.
        weights: [B, T] importance weights that correct for the engine that sampled (TIS, Yao et al.
            2025), constants that multiply each token's loss after clipping.
        aggregation: "token-mean" (mean over all tokens), "seq-mean-token-sum" (sum of each
            sequence, mean over sequences), "seq-mean-token-mean" (mean of each sequence, mean over
            sequences) or "seq-mean-token-sum-norm" (the second divided by T).
        denominator: with micro-batches or ranks, the count of the whole batch that
            `global_denominator` returns, a number or 0-dim tensor; 0 where no token is in it, which
            is a loss of 0. None: the count of this batch.
        log_ratio_clamp: log r is clamped to [-log_ratio_clamp, log_ratio_clamp] so that r stays
            finite. The gradient passes, as r at the clamp: without `dual_clip` a token that became
            far too likely with A < 0 keeps being pulled back. None: no clamp.
        cu_seqlens: [S + 1] int32 or int64 of packed sequences, ascending from 0 to N (looked at on
            a CPU alone): sequence s has the tokens from cu_seqlens[s] to before cu_seqlens[s + 1].
            Everything that is [B, T] here is then [N] or [1, N]. None: each row is one.

    Returns:
        (loss, metrics): a 0-dim float32 loss (float64 for float64 logprobs), and 0-dim detached
        tensors over the unmasked tokens of this call (0 if there are none):
        clip_fraction (of tokens whose clipped loss is the larger), clip_fraction_dual (where
        dual_clip decides), approx_kl (k3 of KL(old || policy), never negative), approx_kl_k1
        (its plain mean of old - new log-probabilities), ratio_mean, ratio_max.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or range.

    Examples:
        >>> import torch, kl_kernels
        >>> old = torch.tensor([[0.5, 0.5]]).log()
        >>> new = torch.tensor([[0.75, 0.5]]).log()  # ratios 1.5, which is clipped at 1.2, and 1
        >>> loss, metrics = kl_kernels.ppo_policy_loss(new, old, torch.ones(1, 2), torch.ones(1, 2))
        >>> loss, metrics["clip_fraction"]
        (tensor(-1.1000), tensor(0.5000))
    """
    sequences = sequences_of("logprobs", logprobs, cu_seqlens)
    check_like("old_logprobs", old_logprobs, "logprobs", logprobs)
    check_like("advantages", advantages, "logprobs", logprobs)
    check_like("mask", mask, "logprobs", logprobs)
    mask = check_mask("mask", mask)
    check_logprobs("old_logprobs", old_logprobs, mask)
    clip_low, clip_high, dual_clip, log_ratio_clamp = check_clipping(
        clip_low, clip_high, dual_clip, log_ratio_clamp
    )
    dtype = output_dtype(logprobs)
    log_ratio = clamp_value(masked_log_ratio(logprobs, old_logprobs, mask), log_ratio_clamp)
    ratio = log_ratio.detach().exp()
    advantages = select(advantages.detach(), mask, dtype)

    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    clip_decides = clipped > unclipped
    loss = torch.where(clip_decides, clipped, unclipped)
    dual_clipped = torch.zeros_like(mask, dtype=torch.bool)
    if dual_clip is not None:
        bound = -advantages * dual_clip
        dual_clipped = (advantages < 0) & (loss > bound)
        loss = torch.where(dual_clipped, bound, loss)
    # The log-ratio is selected before exp, whose gradient would be 0 * inf where it overflows.
    constant = clip_decides | dual_clipped
    loss = torch.where(constant, loss, -advantages * log_ratio.masked_fill(constant, 0.0).exp())
    if weights is not None:
        check_like("weights", weights, "logprobs", logprobs)
        loss = loss * select(weights.detach(), mask, dtype)

    with torch.no_grad():
        metrics = {
            "clip_fraction": masked_mean(clip_decides.to(dtype), mask),
            "clip_fraction_dual": masked_mean(dual_clipped.to(dtype), mask),
            "approx_kl": masked_mean(k3_of(-log_ratio), mask),
            "approx_kl_k1": masked_mean(-log_ratio, mask),
            "ratio_mean": masked_mean(ratio, mask),
            "ratio_max": _masked_max(ratio, mask),
        }
    return _aggregated(loss, mask, aggregation, denominator, sequences), metrics


def ppo_value_loss(
    values: Tensor,  # [B, T]
    old_values: Tensor | None,  # [B, T]
    returns: Tensor,  # [B, T]
    mask: Tensor,  # [B, T]
    *,
    clip_range: float | None = 0.2,
    aggregation: Aggregation = "token-mean",
    denominator: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,  # [S + 1]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped value loss of PPO, max((v - R)^2, (v_clipped - R)^2) / 2 per token.

    v_clipped = clip(v, old_values - clip_range, old_values + clip_range), as in OpenAI's baselines
    (ppo2) and TRL; where the clipped error is the larger, the token's gradient is 0.

    Args:
        values: [B, T] the value function's estimates; any float dtype. The only argument that gets
            a gradient.
        old_values: [B, T] its estimates at the time of the rollout; may be None without
            `clip_range`.
        returns: [B, T] as `compute_gae` makes them.
        mask: [B, T] bool, or numbers that are 0 or 1; NaN where it is 0 reaches neither loss nor
            gradient.
        clip_range: how far a value may move, in units of reward, above 0. None: no clipping.
        aggregation: "token-mean" (mean over all tokens), "seq-mean-token-sum" (sum of each
            sequence, mean over sequences), "seq-mean-token-mean" (mean of each sequence, mean over
            sequences) or "seq-mean-token-sum-norm" (the second divided by T).
        denominator: with micro-batches or ranks, the count of the whole batch that
            `global_denominator` returns, a number or 0-dim tensor; 0 where no token is in it, which
            is a loss of 0. None: the count of this batch.
        cu_seqlens: [S + 1] int32 or int64 of packed sequences, ascending from 0 to N (looked at on
            a CPU alone): sequence s has the tokens from cu_seqlens[s] to before cu_seqlens[s + 1].
            Everything that is [B, T] here is then [N] or [1, N]. None: each row is one.

    Returns:
        (loss, metrics): a 0-dim float32 loss (float64 for float64 values), and 0-dim detached
        tensors over the unmasked tokens of this call (0 if there are none): clip_fraction,
        value_mean, return_mean, explained_variance = 1 - var(R - v) / var(R) (1 is perfect, 0 is
        no better than a constant; 0 where R does not vary).

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or range.

    Examples:
        >>> import torch, kl_kernels
        >>> values, returns = torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 2.0]])
        >>> loss, _ = kl_kernels.ppo_value_loss(values, values, returns, torch.ones(1, 2))
        >>> loss
        tensor(0.2500)
    """
    sequences = sequences_of("values", values, cu_seqlens)
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
    return _aggregated(loss, mask, aggregation, denominator, sequences), metrics


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
            raise ValueError(f"dual_clip is {dual_clip}; it must be above 1")
    return clip_low, clip_high, dual_clip, log_ratio_clamp


def _masked_max(x: Tensor, mask: Tensor) -> Tensor:
    """The largest of positive values under the mask, 0 if there is none."""
    return select(x, mask, x.dtype).amax() if x.numel() else x.new_zeros(())
