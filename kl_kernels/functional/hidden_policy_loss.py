"""The policy loss of a linear head, and its gradient, without the logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kl_kernels import checks
from kl_kernels.functional.arguments import Models, as_rows, check_batch_of_rows
from kl_kernels.functional.dtensor_heads import loss_takes_dtensor_heads
from kl_kernels.functional.hidden import linear_token_stats
from kl_kernels.functional.hidden_arguments import (
    as_autocast,
    prepare_head,
    prepare_heads,
    prepare_which,
)
from kl_kernels.functional.loss_arguments import (
    ImportanceSamplingLevel,
    LossEstimator,
    check_kl,
    metrics_of,
    prepare_loss,
)
from kl_kernels.partitioned.loss_operator import HeadPolicyLoss
from kl_kernels.partitioned.products import GradientPrecision
from kl_kernels.rl.losses import Aggregation
from kl_kernels.schemas import BackendName

if TYPE_CHECKING:  # not in every build of torch
    from torch.distributed import ProcessGroup

# Bytes of memory_budget=None. Every block of rows reads and writes all sums of the weight's
# gradient: with fewer than a thousand rows, a GPU takes longer for that than for the product.
MEMORY_BUDGETS = {"cpu": 64 << 20, "cuda": 1 << 30}


@loss_takes_dtensor_heads
def linear_policy_loss(
    hidden: Tensor,  # [B, T, d]
    weight: Tensor,  # [V, d]
    token_ids: Tensor,  # [B, T]
    old_logprobs: Tensor | None,  # [B, T]
    advantages: Tensor,  # [B, T]
    mask: Tensor,  # [B, T]
    *,
    ref_hidden: Tensor | None = None,  # [B, T, ref_d]
    ref_weight: Tensor | None = None,  # [V, ref_d]
    ref_logprobs: Tensor | None = None,  # [B, T]
    bias: Tensor | None = None,  # [V]
    ref_bias: Tensor | None = None,  # [V]
    kl_loss_coef: float = 0.0,
    kl_estimator: LossEstimator = "exact",
    entropy_coef: float = 0.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    weights: Tensor | None = None,  # [B, T]
    importance_sampling_level: ImportanceSamplingLevel = "token",
    aggregation: Aggregation = "token-mean",
    denominator: float | Tensor | None = None,
    log_ratio_clamp: float | None = 20.0,
    loss_scale: float | Tensor | None = None,
    temperature: float = 1.0,
    ref_temperature: float | None = None,
    softcap: float | None = None,
    ref_softcap: float | None = None,
    logit_scale: float = 1.0,
    ref_logit_scale: float | None = None,
    memory_budget: int | None = None,
    gradient_precision: GradientPrecision = "narrow",
    cu_seqlens: Tensor | None = None,  # [S + 1]
    group: ProcessGroup | None = None,
    vocab_start: int | None = None,
    row_index: Tensor | None = None,  # [n]
    backend: BackendName | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's or GRPO's clipped loss with KL and entropy, and its gradients, from hidden states.

    The result is that of `fused_policy_loss` on logits = logit_scale (hidden @ weight.T + bias),
    which exist for a block of rows at a time: multiplied, read once, and overwritten by their
    gradient, which is multiplied with both factors at once. Three matrix products in all, two with
    a frozen head, where statistics whose loss comes later take four and three. The formula is
    there; gradients are computed in this very call, and `backward` hands them out, multiplied by
    the upstream gradient where that is not 1.

    So a loss that is divided by k accumulation steps before `backward` has its gradients, of which
    the weight's is [V, d], read and written once more. Pass `loss_scale=1 / k` and divide all the
    same; or a `denominator` that counts all micro-batches, and do not divide.

    With a group each rank multiplies its own columns' logits alone, and all ranks return the same
    loss and metrics, to the bit. One collective for each block of rows brings at most 36 bytes of
    a row together, one sums the gradient of the hidden states, and a small one comes first, which
    the host waits for: blocks are as large on all ranks as on the one with the largest shard.
    `backward` sends nothing. DTensors: `dtensor_heads.py` says whose tokens the loss is of.

    Rows where the mask is 0 are not multiplied. Finding the others synchronises a GPU. Memory,
    beyond inputs, gradients and `memory_budget`: the gradients in float32, where they have another
    dtype, until they are rounded once; the hidden states that count, where a mask keeps them apart.

    Args:
        hidden: [B, T, d] the policy's hidden states; float32, bfloat16, float16 or float64. Row t
            must hold the state that `token_ids[:, t]` was sampled from.
        weight: [V, d] of the policy's head; the same dtypes, not necessarily that of `hidden`. An
            adapter on the head (LoRA) is not in its weight: pass the sum with the adapter's.
        token_ids: [B, T] the sampled tokens; int64 or int32, in [0, V) where the mask is True.
        old_logprobs: [B, T] log-probabilities under the policy that sampled. None: this policy.
        advantages: [B, T] taken as constants.
        mask: [B, T] bool, or numbers that are 0 or 1: 1 at response tokens.
        ref_hidden: [B, T, ref_d] the reference's hidden states, with `ref_weight`; must not require
            grad. With "k2" and "k3" they give the token's log-probability.
        ref_weight: [V, ref_d] of the reference's head; must not require grad.
        ref_logprobs: [B, T] the reference's log-probabilities in their place, for "k2" and "k3".
        bias: [V] of the policy's head. None: no bias.
        ref_bias: [V] of the reference's head. None: no bias.
        kl_loss_coef: coefficient of the KL to the reference in the loss; finite, 0 or above.
        kl_estimator: "exact", "k2" or "k3".
        entropy_coef: coefficient of the entropy bonus; finite.
        clip_low: the ratio is clipped below at 1 - clip_low; 0 or above.
        clip_high: the ratio is clipped above at 1 + clip_high; 0 or above.
        dual_clip: the loss is at most -A dual_clip where A < 0; above 1. None: no bound.
        weights: [B, T] importance weights, constants. None: 1.
        importance_sampling_level: "token"; "sequence" is refused.
        aggregation: "token-mean", "seq-mean-token-sum", "seq-mean-token-mean" or
            "seq-mean-token-sum-norm", which of packed sequences divides by the longest's length.
        denominator: takes the place of the number of tokens or sequences where this call sees a
            part of the batch. None: the count of this call.
        log_ratio_clamp: the log-ratio is clamped to plus and minus this. Above 0. None: no clamp.
        loss_scale: the factor that the loss will be multiplied by before `backward`, above 0; the
            gradients are stored multiplied by it. None: 1.
        temperature: divides the logits; finite and above 0.
        ref_temperature: divides the reference's logits. None: the policy's temperature.
        softcap: soft cap of the policy, after `logit_scale` and before the temperature. None: none.
        ref_softcap: soft cap of the reference. None: none.
        logit_scale: multiplies the policy's logits; finite and above 0.
        ref_logit_scale: multiplies the reference's logits. None: the policy's logit_scale.
        memory_budget: bytes for a block of rows with all of their logits, for each head, and copies
            of their factors. None: 64 MiB on a CPU, 1 GiB elsewhere.
        gradient_precision: of the products that make gradients, "narrow", "split" or "float32", as
            in `linear_token_stats`.
        cu_seqlens: [S + 1] int32 or int64 of packed sequences, ascending from 0 to N (looked at on
            a CPU alone): sequence s has the rows from cu_seqlens[s] to before cu_seqlens[s + 1].
            Hidden states are then [N, d] or [1, N, d], and what is [B, T] here is [N] or [1, N].
            None: each row of [B, T] is one.
        group: the process group that the vocabulary is sharded over: weights and biases are this
            rank's rows; hidden states, everything per token and all options are the same on all
            ranks, and so is what requires grad. None: the heads are whole.
        vocab_start: with a group, the global token id of this rank's first row. None: all shards
            are of one size, and in the order of the ranks.
        row_index: [n] int64 or int32 positions of the rows that count in the flattened ones,
            `mask.flatten().nonzero()[:, 0]`: without a group nobody then waits for a GPU, and a
            CUDA graph can be captured. None: they are looked for.
        backend: "cuda", "triton", "cpu" or "reference". None: the best one that takes the tensors.

    Returns:
        (loss, metrics), as from `fused_policy_loss`.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range,
            memory_budget is too small for a row, or a group's ranks count other numbers of tokens.
        RuntimeError: `backward` is called a second time: the first gave the gradients away.

    Examples:
        >>> import torch, kl_kernels
        >>> hidden = torch.zeros(1, 2, 3, requires_grad=True)
        >>> weight = torch.eye(4, 3, requires_grad=True)
        >>> token_ids, mask = torch.tensor([[1, 3]]), torch.ones(1, 2, dtype=torch.bool)
        >>> loss, metrics = kl_kernels.linear_policy_loss(
        ...     hidden, weight, token_ids, None, torch.tensor([[1.0, -1.0]]), mask
        ... )
        >>> loss.backward()
        >>> hidden.grad[0, 0].tolist()  # -A ([token] - p) @ weight / 2
        [0.125, -0.375, 0.125]
        >>> round(metrics["entropy"].item(), 4)
        1.3863
    """
    check_batch_of_rows("hidden", hidden, "d", cu_seqlens)
    _check_factors(ref_hidden, ref_weight, ref_bias)
    if memory_budget is None:
        memory_budget = MEMORY_BUDGETS.get(hidden.device.type, MEMORY_BUDGETS["cuda"])
    has_ref = ref_hidden is not None
    check_kl(has_ref, ref_logprobs is not None, kl_loss_coef, kl_estimator, of="hidden")
    scales: dict[str, Any] = {
        "temperature": temperature,
        "softcap": softcap,
        "logit_scale": logit_scale,
    }
    given: dict[str, Any] = {"memory_budget": memory_budget}
    given["gradient_precision"] = gradient_precision
    where: dict[str, Any] = {"group": group, "vocab_start": vocab_start}
    given |= {**where, "backend": backend}
    reference: tuple[Tensor | None, ...] = (None, None, None)
    if ref_hidden is None or ref_weight is None:
        options = prepare_head(hidden, weight, bias, **scales, **given)
    else:
        options = prepare_heads(
            hidden,
            weight,
            bias,
            ref_hidden,
            ref_weight,
            ref_bias,
            ref_temperature=ref_temperature,
            ref_softcap=ref_softcap,
            ref_logit_scale=ref_logit_scale,
            **scales,
            **given,
        )
        if kl_estimator == "exact":
            reference = as_rows(ref_hidden), ref_weight, ref_bias
        else:
            ref_logprobs = linear_token_stats(
                ref_hidden,
                ref_weight,
                token_ids,
                mask,
                bias=ref_bias,
                temperature=options.ref_temperature,
                softcap=options.ref_softcap,
                memory_budget=memory_budget,
                backend=backend,
                row_index=row_index,
                **where,
            ).logprob
    # Stands for logits, which everything per token must agree with.
    like = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    like = like.detach().expand(*hidden.shape[:-1], len(weight))
    models = Models(
        as_rows(like),
        None if reference[0] is None else as_rows(like),
        options.temperature,
        options.ref_temperature,
        options.softcap,
        options.ref_softcap,
    )
    args, loss_scale = prepare_loss(
        like,
        models,
        token_ids,
        old_logprobs,
        advantages,
        mask,
        ref_logprobs=ref_logprobs,
        kl_loss_coef=kl_loss_coef,
        kl_estimator=kl_estimator,
        entropy_coef=entropy_coef,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        weights=weights,
        importance_sampling_level=importance_sampling_level,
        aggregation=aggregation,
        denominator=denominator,
        log_ratio_clamp=log_ratio_clamp,
        loss_scale=loss_scale,
        cu_seqlens=cu_seqlens,
    )
    if options.group is None:
        checks.check_token_range(args.token_ids, args.mask, len(weight))
    factors = *as_autocast(as_rows(hidden), weight, bias), *as_autocast(*reference)
    if not torch.is_grad_enabled():
        # The function is told of requires_grad alone, and would make gradients.
        factors = tuple(None if factor is None else factor.detach() for factor in factors)
    rows = prepare_which(mask, row_index, hidden).rows
    loss, terms = HeadPolicyLoss.apply(options, args, rows, *factors)
    if loss_scale is not None:
        loss = loss / loss_scale
    return loss, metrics_of(terms, args)


def _check_factors(
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
) -> None:
    if (ref_hidden is None) != (ref_weight is None):
        given, missing = ("ref_weight", "ref_hidden")[:: 1 if ref_hidden is None else -1]
        raise ValueError(f"{given} is given and {missing} is None; a reference's head takes both")
    if ref_bias is not None and ref_hidden is None:
        raise ValueError(
            "ref_bias is given and ref_hidden is None; it belongs to a reference's head"
        )
