"""A policy loss with the signature of verl's."""

from __future__ import annotations

from typing import Any, Literal, cast

from torch import Tensor

from kl_kernels.checks import check_choice
from kl_kernels.rl.losses import AGGREGATIONS, Aggregation, ppo_policy_loss

LossAggMode = Literal["token-sum"] | Aggregation
LOSS_AGG_MODES: tuple[LossAggMode, ...] = ("token-sum", *AGGREGATIONS)


def policy_loss(
    old_log_prob: Tensor,  # [B, T]
    log_prob: Tensor,  # [B, T]
    advantages: Tensor,  # [B, T]
    response_mask: Tensor,  # [B, T]
    loss_agg_mode: LossAggMode = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,  # [B, T]
) -> tuple[Tensor, dict[str, float]]:
    """The "vanilla" policy loss of verl, by `ppo_policy_loss`.

    Args:
        old_log_prob: log-probability of each token under the policy that sampled it.
        log_prob: the same under the policy.
        advantages: of each token.
        response_mask: bool, or numbers that are 0 or 1; NaN elsewhere reaches nothing.
        loss_agg_mode: one of verl's: "token-mean", "token-sum", "seq-mean-token-sum",
            "seq-mean-token-mean" or "seq-mean-token-sum-norm".
        config: an ActorConfig: clip_ratio, clip_ratio_low, clip_ratio_high, clip_ratio_c and
            global_batch_info are read.
        rollout_is_weights: importance weights, constants.

    Returns:
        (loss, metrics): a 0-dim loss, and numbers under verl's names: actor/pg_clipfrac,
        actor/pg_clipfrac_lower, actor/ppo_kl, and actor/ppo_kl_k3, which is never negative.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or range; a count of the whole
            batch is missing where there is more than one data-parallel rank.
    """
    if config is None:
        raise ValueError("config is None; the loss needs an ActorConfig")
    low, high = (
        config.clip_ratio if ratio is None else ratio
        for ratio in (config.clip_ratio_low, config.clip_ratio_high)
    )
    aggregation, denominator = _aggregation(
        loss_agg_mode, response_mask, **config.global_batch_info
    )
    loss, metrics = ppo_policy_loss(
        log_prob,
        old_log_prob,
        advantages,
        response_mask,
        clip_low=low,
        clip_high=high,
        dual_clip=config.get("clip_ratio_c", 3.0),
        weights=rollout_is_weights,
        aggregation=aggregation,
        denominator=denominator,
    )
    return loss, {
        "actor/pg_clipfrac": metrics["clip_fraction"].item(),
        "actor/ppo_kl": metrics["approx_kl_k1"].item(),
        "actor/pg_clipfrac_lower": metrics["clip_fraction_dual"].item(),
        "actor/ppo_kl_k3": metrics["approx_kl"].item(),
    }


def _aggregation(
    mode: LossAggMode,
    mask: Tensor,  # [B, T]
    dp_size: int = 1,
    batch_num_tokens: int | Tensor | None = None,
    global_batch_size: int | Tensor | None = None,
    loss_scale_factor: int | None = None,
) -> tuple[Aggregation, float | Tensor | None]:
    """Return the aggregation and denominator of `aggregate` that match verl's `agg_loss`."""
    check_choice("loss_agg_mode", mode, LOSS_AGG_MODES)
    if mode == "token-sum":
        return "token-mean", 1 / dp_size
    aggregation = cast(Aggregation, mode)
    name = "batch_num_tokens" if mode == "token-mean" else "global_batch_size"
    count: Any = batch_num_tokens if mode == "token-mean" else global_batch_size
    if count is None:
        if dp_size > 1:
            raise ValueError(f"{name} is None; with dp_size {dp_size} the whole batch's is needed")
        if mode != "seq-mean-token-sum-norm" or loss_scale_factor is None:
            return aggregation, None
        count = mask.bool().any(1).sum().clamp_min(1)
    count = count / dp_size
    if mode == "seq-mean-token-sum-norm" and loss_scale_factor is not None:
        return "seq-mean-token-sum", count * loss_scale_factor
    return aggregation, count
