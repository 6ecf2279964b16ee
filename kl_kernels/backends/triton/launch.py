"""The operators: allocate the outputs, choose sizes, launch. No host synchronisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kl_kernels.backends.triton.backward import backward_kernel
from kl_kernels.backends.triton.fold import (
    PARTIAL_FIELDS,
    PARTIAL_FIELDS_WITHOUT_REF,
    finish_kernel,
    fold_kernel,
)
from kl_kernels.backends.triton.loss import policy_loss_kernel
from kl_kernels.backends.triton.math import LOG2E
from kl_kernels.backends.triton.scale import scale_kernel
from kl_kernels.backends.triton.scan import gae_kernel
from kl_kernels.checks import check_token_range
from kl_kernels.schemas import (
    POLICY_LOSS_TERMS,
    FoldPartArgs,
    GAEArgs,
    GAEOutputs,
    KLRewardsArgs,
    KLRewardsOutputs,
    PolicyLossArgs,
    ScaleGradientArgs,
    TokenKLArgs,
    TokenKLBackwardArgs,
    TokenKLOutputs,
    TokenStatsArgs,
    TokenStatsBackwardArgs,
    TokenStatsOutputs,
    output_dtype,
    pick,
)


@dataclass(frozen=True)
class LaunchConfig:
    """Sizes of the kernels' work, each a power of two."""

    # One lane per thread and two loads of 16 bytes per tile: enough bytes in flight, within 64
    # registers. Rows that are read logit by logit need more loads. (16 of them would have as many
    # bytes in flight in bfloat16, but take 96 registers, and more work around the loop.)
    num_warps: int = 4
    lanes: int = 128
    steps: int = 2
    unaligned_steps: int = 8
    # Predicted, not measured: by Little's law an H200's SM needs 29 kB on their way (4.8 TB/s over
    # 132 SMs, at 800 ns). V = 128k makes eight programs of a row, 64 rows 3.9 for each SM, and each
    # program waits for 8 kB: 32 kB. Splits of 32768 would have 16 of them. Smaller ones would have
    # more, but the work around the loop is some 400 instructions a thread, beside 7 for each of 128
    # logits or 15 for each pair: 10 and 18 for each, of 14 and 28 that an H200 has slots for.
    fold_split: int = 16384
    # No work around the loop to speak of.
    backward_split: int = 16384
    # A program has a whole row, and is as wide as can be: with 64 registers each it fills an SM,
    # so that few rows share the L2 until their second look. An H200 has 50 MiB for 132 rows, 397 kB
    # each. At V = 128256 in bf16 a row has 257 kB, a pair 513 kB. Predicted, not measured, with all
    # rows in step: the second look hits
    #     all of the row, 397 / 513 = 77 % of the pair, if what is read for the last time and what
    #     is written makes room at once, as it is asked to (evict-first);
    #     397 / (257 + 257) = 77 % of the row, 397 / (513 + 257) = 52 % of the pair, if not.
    # Two programs of 512 threads per SM would halve that, but fill each other's pauses. Two loads
    # of 16 bytes by 1024 threads keep 32 kB in flight, of the 29 kB that an H200's SM needs.
    policy_loss_lanes: int = 1024
    policy_loss_warps: int = 32
    # Eight to an SM of an H200, enough to fill it; few, because mostly they only see a factor of 1.
    scale_programs: int = 1056
    finish_rows: int = 128
    gae_block: int = 512


# AMD's warps have 64 threads.
CONFIG = (
    LaunchConfig() if torch.version.hip is None else LaunchConfig(num_warps=2, policy_loss_warps=16)
)
VECTOR_BYTES = 16  # the widest load of one thread

# Explicit because Triton's default is about to change: without fusion a fold costs a fifth more.
# One stage: there is nothing to pipeline through shared memory.
COMPILE: dict[str, Any] = {"enable_fp_fusion": True, "num_stages": 1}


def token_stats(a: TokenStatsArgs) -> TokenStatsOutputs:
    out = TokenStatsOutputs(per_token(a.logits), per_token(a.logits), per_token(a.logits, 2))
    _fold_and_finish(a, out)
    return out


def token_kl(a: TokenKLArgs) -> TokenKLOutputs:
    out = _kl_outputs(a.logits)
    _fold_and_finish(a, out)
    return out


def kl_rewards(a: KLRewardsArgs) -> KLRewardsOutputs:
    rewards, correction, out = per_token(a.logits), per_token(a.logits), _kl_outputs(a.logits)
    _fold_and_finish(
        a,
        out,
        rewards_ptr=rewards,
        correction_ptr=correction,
        scores_ptr=a.scores,
        score_index_ptr=a.score_index,
        kl_coef=a.kl_coef,
        kl_clip=a.kl_clip,
        ESTIMATOR=a.estimator,
    )
    return KLRewardsOutputs(rewards, correction, *out)


NO_REWARDS: dict[str, Any] = {
    "rewards_ptr": None,
    "correction_ptr": None,
    "scores_ptr": None,
    "score_index_ptr": None,
    "kl_coef": 0.0,
    "kl_clip": None,
    "ESTIMATOR": 0,
}


def _kl_outputs(logits: Tensor) -> TokenKLOutputs:
    states = {"policy_state": per_token(logits, 2), "ref_state": per_token(logits, 2)}
    fields = [field for field in TokenKLOutputs._fields if field not in states]
    return TokenKLOutputs(**{field: per_token(logits) for field in fields}, **states)


def _fold_and_finish(
    a: TokenStatsArgs | TokenKLArgs | KLRewardsArgs,
    out: TokenStatsOutputs | TokenKLOutputs,
    **rewards: Any,
) -> None:
    """Write the outputs; `rewards` are the arguments of `finish_kernel`'s reward epilogue."""
    check_token_range(a.token_ids, a.mask, a.logits.shape[-1])
    n_rows = a.token_ids.numel()
    if n_rows == 0:
        return
    with torch.cuda.device_of(a.logits):
        finish_kernel[(-(-n_rows // CONFIG.finish_rows),)](
            states_ptr=fold(a),
            **models_of(a),
            **splits_of(a, CONFIG.fold_split),
            token_ids_ptr=a.token_ids,
            mask_ptr=a.mask,
            **{f"{field}_ptr": getattr(out, field, None) for field in TokenKLOutputs._fields},
            **(NO_REWARDS | rewards),
            ROWS=CONFIG.finish_rows,
            num_warps=CONFIG.num_warps,
            **COMPILE,
        )


def fold(a: TokenStatsArgs | TokenKLArgs | KLRewardsArgs | FoldPartArgs) -> Tensor:
    """The states of all splits, [fields, splits, B T]."""
    ref_logits = getattr(a, "ref_logits", None)
    states = states_of_splits(a)
    sizes = splits_of(a, CONFIG.fold_split)
    fold_kernel[(sizes["n_rows"] * sizes["n_splits"],)](
        states_ptr=states,
        **models_of(a),
        **sizes,
        token_ids_ptr=a.token_ids,
        mask_ptr=a.mask,
        SPLIT=CONFIG.fold_split,
        **fold_tile_of(a.logits, ref_logits),
        **COMPILE,
    )
    return states


def fold_tile_of(logits: Tensor, ref_logits: Tensor | None) -> dict[str, int]:
    """The tile of `fold_kernel`: a model alone has as many bytes on their way as a pair.

    56 registers instead of 40. Twice a pair's would be 96, and half as many programs on an SM.
    """
    tile = tile_of(logits, ref_logits)
    if ref_logits is None and tile["LANE"] > 1:
        tile["STEPS"] *= 2
    return tile


def states_of_splits(a: Any) -> Tensor:
    """Room for the states of all splits."""
    has_ref = getattr(a, "ref_logits", None) is not None
    sizes = splits_of(a, CONFIG.fold_split)
    n_fields = PARTIAL_FIELDS if has_ref else PARTIAL_FIELDS_WITHOUT_REF
    shape = (n_fields, sizes["n_splits"], sizes["n_rows"])
    return torch.empty(shape, dtype=torch.float32, device=a.logits.device)


def token_stats_backward(a: TokenStatsBackwardArgs) -> None:
    _backward(a)


def token_kl_backward(a: TokenKLBackwardArgs) -> None:
    if a.grad_kl is None and a.grad_forward_kl is None:
        _backward(pick(TokenStatsBackwardArgs, a))  # the reference is not read
    else:
        _backward(a)


def _backward(a: TokenStatsBackwardArgs | TokenKLBackwardArgs) -> None:
    sizes = splits_of(a, CONFIG.backward_split)
    if sizes["n_rows"] == 0:
        return
    with torch.cuda.device_of(a.logits):
        backward_kernel[(sizes["n_rows"] * sizes["n_splits"],)](
            grad_logprob_ptr=a.grad_logprob,
            grad_kl_ptr=getattr(a, "grad_kl", None),
            grad_forward_kl_ptr=getattr(a, "grad_forward_kl", None),
            grad_entropy_ptr=a.grad_entropy,
            **models_of(a),
            **sizes,
            token_ids_ptr=a.token_ids,
            mask_ptr=a.mask,
            policy_state_ptr=a.policy_state,
            ref_state_ptr=getattr(a, "ref_state", None),
            kl_ptr=getattr(a, "kl", None),
            entropy_ptr=a.entropy,
            **gradient_of(a.grad_logits),
            temperature=a.temperature,
            SPLIT=CONFIG.backward_split,
            **gradient_tile_of(a.logits, getattr(a, "ref_logits", None), a.grad_logits),
            **COMPILE,
        )


def policy_loss(a: PolicyLossArgs) -> Tensor:
    check_token_range(a.token_ids, a.mask, a.logits.shape[-1])
    terms = per_token(a.logits, len(POLICY_LOSS_TERMS))
    if a.token_ids.numel() == 0:
        return terms
    with torch.cuda.device_of(a.logits):
        policy_loss_kernel[(a.token_ids.numel(),)](
            **models_of(a),
            **rows_of(a.logits),
            token_ids_ptr=a.token_ids,
            mask_ptr=a.mask,
            old_logprob_ptr=a.old_logprobs,
            advantage_ptr=a.advantages,
            token_weight_ptr=a.token_weights,
            importance_weight_ptr=a.importance_weights,
            ref_logprob_ptr=a.ref_logprobs,
            terms_ptr=terms,
            own_gradient_ptr=a.own_gradient,
            **gradient_of(a.grad_logits),
            temperature=a.temperature,
            clip_low=a.clip_low,
            clip_high=a.clip_high,
            dual_clip=a.dual_clip,
            log_ratio_clamp=a.log_ratio_clamp,
            kl_coef=a.kl_coef,
            entropy_coef=a.entropy_coef,
            ESTIMATOR=a.kl_estimator,
            HAS_KL=a.kl_coef != 0,
            HAS_ENTROPY=a.entropy_coef != 0,
            **whole_row_tile(a.logits, a.ref_logits),
            **_second_look(a),
            **COMPILE,
        )
    return terms


def scale_gradient(a: ScaleGradientArgs) -> None:
    if a.gradient.numel() == 0:
        return
    batch_stride, token_stride, _ = a.gradient.stride()
    with torch.cuda.device_of(a.gradient):
        scale_kernel[(CONFIG.scale_programs,)](
            gradient_ptr=a.gradient,
            factor_ptr=a.factor,
            **rows_of(a.gradient),
            batch_stride=batch_stride,
            token_stride=token_stride,
            **tile_of(a.gradient),
            **COMPILE,
        )


def gae(a: GAEArgs) -> GAEOutputs:
    out = GAEOutputs(torch.empty_like(a.rewards), torch.empty_like(a.rewards))
    n_sequences, n_tokens = a.rewards.shape
    if a.rewards.numel():
        with torch.cuda.device_of(a.rewards):
            gae_kernel[(n_sequences,)](
                rewards_ptr=a.rewards,
                values_ptr=a.values,
                mask_ptr=a.mask,
                advantages_ptr=out.advantages,
                returns_ptr=out.returns,
                n_tokens=n_tokens,
                gamma=a.gamma,
                lam=a.lam,
                SKIP_MASKED=a.skip_masked,
                BLOCK_T=CONFIG.gae_block,
                num_warps=CONFIG.num_warps,
                **COMPILE,
            )
    return out


def per_token(logits: Tensor, *leading: int) -> Tensor:
    """Room for numbers of each token, [*leading, B, T]."""
    shape = (*leading, *logits.shape[:-1])
    return torch.empty(shape, dtype=output_dtype(logits), device=logits.device)


# Kernel arguments by the names they have in every kernel.


def models_of(a: Any) -> dict[str, Any]:
    """The logits of an operator's arguments, with their strides and what is done to them."""
    ref_logits = getattr(a, "ref_logits", None)
    ref_temperature = a.temperature if ref_logits is None else a.ref_temperature
    ref_strides = (a.logits if ref_logits is None else ref_logits).stride()
    return {
        "logits_ptr": a.logits,
        "ref_ptr": ref_logits,
        "batch_stride": a.logits.stride(0),
        "token_stride": a.logits.stride(1),
        "ref_batch_stride": ref_strides[0],
        "ref_token_stride": ref_strides[1],
        "k": LOG2E.value / a.temperature,
        "ref_k": LOG2E.value / ref_temperature,
        "softcap": a.softcap,
        "ref_softcap": None if ref_logits is None else a.ref_softcap,
    }


def rows_of(logits: Tensor) -> dict[str, int]:  # [B, T, V]
    n_batch, n_tokens, vocab_size = logits.shape
    return {"n_rows": n_batch * n_tokens, "n_tokens": n_tokens, "vocab_size": vocab_size}


def splits_of(a: Any, split: int) -> dict[str, int]:
    return {**rows_of(a.logits), "n_splits": -(-a.logits.shape[-1] // split)}


def gradient_of(grad_logits: Tensor | None) -> dict[str, Any]:  # [B, T, V]
    batch_stride, token_stride = (0, 0) if grad_logits is None else grad_logits.stride()[:2]
    return {
        "grad_logits_ptr": grad_logits,
        "grad_batch_stride": batch_stride,
        "grad_token_stride": token_stride,
    }


def tile_of(*tensors: Tensor | None) -> dict[str, int]:
    """The [STEPS, N, LANE] that one program reads at a time, in loads as wide as rows are aligned.

    Rows that are not are read logit by logit: see "Rows that begin anywhere" in docs/kernels.md.
    """
    logits = [t for t in tensors if t is not None]
    return _tile(_lane_of(logits) if all(map(_rows_are_aligned, logits)) else 1)


def gradient_tile_of(*tensors: Tensor | None) -> dict[str, int]:
    """The same for a gradient, whose vectors begin at the first aligned logit of each row.

    That must be the same logit in all tensors, as it is where they share their strides.
    """
    logits = [t for t in tensors if t is not None]
    return _tile(_lane_of(logits) if _have_the_same_vectors(logits) else 1)


def _tile(lane: int) -> dict[str, int]:
    steps = CONFIG.steps if lane > 1 else CONFIG.unaligned_steps
    return {"STEPS": steps, "N": CONFIG.lanes, "LANE": lane, "num_warps": CONFIG.num_warps}


def _lane_of(logits: list[Tensor]) -> int:
    """The widest dtype decides, so that both tensors of a pair are read in the same pattern."""
    return VECTOR_BYTES // max(t.itemsize for t in logits)


def whole_row_tile(*tensors: Tensor | None) -> dict[str, int]:
    lanes, num_warps = CONFIG.policy_loss_lanes, CONFIG.policy_loss_warps
    return {**tile_of(*tensors), "N": lanes, "num_warps": num_warps}


def _second_look(a: PolicyLossArgs) -> dict[str, int]:
    """The tile of the policy loss's gradient: as many logits as the fold's."""
    fold = tile_of(a.logits, a.ref_logits)
    lane = gradient_tile_of(a.logits, a.ref_logits, a.grad_logits)["LANE"]
    return {"GRAD_STEPS": max(fold["STEPS"] * fold["LANE"] // lane, 1), "GRAD_LANE": lane}


def _have_the_same_vectors(logits: list[Tensor]) -> bool:  # [B, T, V] each
    """Whether the same logits of each row are aligned in all of the tensors."""
    lane, sizes = _lane_of(logits), logits[0].shape[:2]
    first_rows = {t.data_ptr() // t.itemsize % lane for t in logits}
    steps = {
        tuple(stride % lane for size, stride in zip(sizes, t.stride()) if size > 1) for t in logits
    }
    return len(first_rows) == len(steps) == 1


def _rows_are_aligned(t: Tensor) -> bool:  # [B, T, V]
    """Whether every row starts at a multiple of the widest load.

    The answer holds for any rows of the tensor, and for an expanded row as for its copies (a stride
    of 0 counts as V), so that a row's rounding does not depend on the company it is in.
    """
    steps = [(stride or t.shape[-1]) * t.itemsize for stride in t.stride()[:2]]
    return all(start % VECTOR_BYTES == 0 for start in (t.data_ptr(), *steps))
