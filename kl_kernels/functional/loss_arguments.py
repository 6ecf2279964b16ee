"""Prepare the arguments of the policy loss, and read its metrics."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from kl_kernels import checks
from kl_kernels.functional.arguments import (
    Models,
    as_tokens,
    needs_gradient,
    prepare_token_ids,
)
from kl_kernels.rl.losses import Aggregation, check_clipping, token_weights
from kl_kernels.schemas import ESTIMATORS, POLICY_LOSS_TERMS, PolicyLossArgs, output_dtype

LossEstimator = Literal["exact", "k2", "k3"]
ImportanceSamplingLevel = Literal["token", "sequence"]


def prepare_loss(
    logits: Tensor,  # [B, T, V]; packed also [N, V], and everything per token [N]
    models: Models,
    token_ids: Tensor,  # [B, T]
    old_logprobs: Tensor | None,  # [B, T]
    advantages: Tensor,  # [B, T]
    mask: Tensor,  # [B, T]
    *,
    ref_logprobs: Tensor | None,  # [B, T]
    kl_loss_coef: float,
    kl_estimator: LossEstimator,
    entropy_coef: float,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    weights: Tensor | None,  # [B, T]
    importance_sampling_level: ImportanceSamplingLevel,
    aggregation: Aggregation,
    denominator: float | Tensor | None,
    log_ratio_clamp: float | None,
    loss_scale: float | Tensor | None,
    cu_seqlens: Tensor | None,  # [S + 1]
) -> tuple[PolicyLossArgs, float | Tensor | None]:
    """Check and shape everything but the models, which are ready; also return `loss_scale`.

    Shapes and devices must agree with those of `logits`, whatever these are; `fused_policy_loss`
    says what the arguments mean.
    """
    ids = prepare_token_ids(token_ids, logits)
    checks.check_per_token("advantages", advantages, logits)
    checks.check_per_token("mask", mask, logits)
    mask = checks.check_mask("mask", mask)
    clip_low, clip_high, dual_clip, log_ratio_clamp = check_clipping(
        clip_low, clip_high, dual_clip, log_ratio_clamp
    )
    entropy_coef = checks.check_finite("entropy_coef", entropy_coef)
    _check_level(importance_sampling_level)
    loss_scale = _check_scale(logits, loss_scale)
    dtype = output_dtype(logits)

    def constant(name: str, value: Tensor | None) -> Tensor | None:  # [B, T]
        if value is None:
            return None
        checks.check_per_token(name, value, logits)
        return as_tokens(value.detach().to(dtype))

    for name, given in (("old_logprobs", old_logprobs), ("ref_logprobs", ref_logprobs)):
        if given is not None:
            checks.check_per_token(name, given, logits)
            checks.check_logprobs(name, given, mask)
    has_kl = models.ref_logits is not None or ref_logprobs is not None
    scaled_weights = as_tokens(
        token_weights(mask, aggregation, denominator, cu_seqlens=cu_seqlens, dtype=dtype)
    )
    if loss_scale is not None:
        scaled_weights = scaled_weights * loss_scale
    args = PolicyLossArgs(
        token_ids=ids,
        mask=as_tokens(mask),
        old_logprobs=constant("old_logprobs", old_logprobs),
        advantages=as_tokens(advantages.detach().to(dtype)),
        token_weights=scaled_weights,
        importance_weights=constant("weights", weights),
        ref_logprobs=constant("ref_logprobs", ref_logprobs),
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        log_ratio_clamp=log_ratio_clamp,
        kl_coef=checks.check_non_negative("kl_loss_coef", kl_loss_coef),
        kl_estimator=ESTIMATORS.index(kl_estimator if has_kl else "exact"),
        entropy_coef=entropy_coef,
        own_gradient=None,
        grad_logits=None,
        **models._asdict(),
    )
    return args, loss_scale


def metrics_of(terms: Tensor, args: PolicyLossArgs) -> dict[str, Tensor]:  # [terms, B, T]
    """Means of the terms over the tokens under the mask."""
    means = terms[1:].flatten(1).sum(1) / args.mask.sum().clamp_min(1)
    metrics = dict(zip(POLICY_LOSS_TERMS[1:], means.unbind()))
    ratio = terms[POLICY_LOSS_TERMS.index("ratio_mean")]
    metrics["ratio_max"] = ratio.amax() if ratio.numel() else means.new_zeros(())
    if args.ref_logits is None and args.ref_logprobs is None:
        del metrics["kl"]
    return metrics


def _check_level(level: str) -> None:
    checks.check_choice("importance_sampling_level", level, get_args(ImportanceSamplingLevel))
    if level == "sequence":
        raise ValueError(
            "importance_sampling_level is 'sequence'; a sequence's ratio (GSPO) needs all of its "
            "tokens before the gradient of any, so one visit of the logits cannot do; accepted: "
            "'token'. Compute the loss from token_kl(...).logprob instead"
        )


def _check_scale(logits: Tensor, loss_scale: float | Tensor | None) -> float | Tensor | None:
    """`loss_scale`; what is a tensor stays one, so that no GPU is waited for."""
    if loss_scale is None:
        if logits.dtype == torch.float16 and needs_gradient(logits):
            raise ValueError(
                "loss_scale is None and logits are float16, in which gradients of 1 / tokens "
                "underflow; pass what the loss will be multiplied by (GradScaler.get_scale())"
            )
        return None
    if not isinstance(loss_scale, Tensor):
        return checks.check_positive("loss_scale", loss_scale)
    checks.check_tensor("loss_scale", loss_scale)
    if loss_scale.ndim != 0:
        raise ValueError(f"loss_scale has shape {tuple(loss_scale.shape)}; it must be 0-dim")
    if checks.values_are_at_hand(loss_scale):
        return checks.check_positive("loss_scale", loss_scale)
    return loss_scale


def check_kl(
    has_ref: bool,
    has_ref_logprobs: bool,
    kl_loss_coef: float,
    kl_estimator: str,
    of: str = "logits",
) -> None:
    """Check the KL's arguments against the reference that is given as ref_`of`, or by numbers."""
    checks.check_non_negative("kl_loss_coef", kl_loss_coef)
    checks.check_choice("kl_estimator", kl_estimator, get_args(LossEstimator))
    if has_ref and has_ref_logprobs:
        raise ValueError(f"ref_{of} and ref_logprobs are both given; pass one of them")
    if kl_estimator == "exact" and has_ref_logprobs:
        raise ValueError(
            "kl_estimator is 'exact' and ref_logprobs is given; the KL over the vocabulary needs "
            f"ref_{of}, 'k2' and 'k3' need ref_logprobs"
        )
    if kl_loss_coef != 0 and not has_ref and not has_ref_logprobs:
        raise ValueError(
            f"kl_loss_coef is {kl_loss_coef} without a reference; pass ref_{of}, or ref_logprobs"
        )
