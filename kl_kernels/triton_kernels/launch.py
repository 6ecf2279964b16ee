"""The operators: allocate the outputs, choose sizes, launch. No host synchronisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kl_kernels import schemas
from kl_kernels.checks import check_token_range
from kl_kernels.schemas import POLICY_LOSS_TERMS, output_dtype
from kl_kernels.triton_kernels.backward import backward_kernel
from kl_kernels.triton_kernels.fold import (
    POLICY_STATE_FIELDS,
    STATE_FIELDS,
    finish_kernel,
    fold_kernel,
    part_kernel,
)
from kl_kernels.triton_kernels.loss import policy_loss_kernel
from kl_kernels.triton_kernels.math import LOG2E
from kl_kernels.triton_kernels.scale import scale_kernel
from kl_kernels.triton_kernels.scan import gae_kernel


@dataclass(frozen=True)
class LaunchConfig:
    """Sizes of the kernels' work, each a power of two."""

    # One lane per thread and two loads of 16 bytes per tile: enough bytes in flight, within 64
    # registers. Rows that are not aligned are read logit by logit, so they need more loads.
    num_warps: int = 4
    lanes: int = 128
    steps: int = 2
    unaligned_steps: int = 8
    # 16 tiles of 2048 (bf16): the work around the loop stays small beside it, and V = 128k still
    # makes four programs of a row, so that a few hundred rows fill a GPU.
    fold_split: int = 32768
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


def token_stats(
    logits: Tensor,  # [B, T, V]
    token_ids: Tensor,  # [B, T]
    mask: Tensor | None,  # [B, T]
    temperature: float,
    softcap: float | None,
) -> tuple[Tensor, ...]:
    logprob, _, _, _, entropy, policy_state, _, _, _ = _forward(
        logits, None, token_ids, mask, temperature, temperature, softcap, None
    )
    return logprob, entropy, policy_state


def token_kl(
    logits: Tensor,  # [B, T, V]
    ref_logits: Tensor,  # [B, T, V]
    token_ids: Tensor,  # [B, T]
    mask: Tensor | None,  # [B, T]
    temperature: float,
    ref_temperature: float,
    softcap: float | None,
    ref_softcap: float | None,
) -> tuple[Tensor, ...]:
    *outputs, _, _ = _forward(
        logits, ref_logits, token_ids, mask, temperature, ref_temperature, softcap, ref_softcap
    )
    return tuple(outputs)


def kl_rewards(
    logits: Tensor,  # [B, T, V]
    ref_logits: Tensor,  # [B, T, V]
    token_ids: Tensor,  # [B, T]
    mask: Tensor,  # [B, T]
    scores: Tensor,  # [B]
    score_index: Tensor,  # [B]
    kl_coef: float,
    estimator: int,
    kl_clip: float | None,
    temperature: float,
    ref_temperature: float,
    softcap: float | None,
    ref_softcap: float | None,
) -> tuple[Tensor, ...]:
    *outputs, rewards, correction = _forward(
        logits, ref_logits, token_ids, mask, temperature, ref_temperature, softcap, ref_softcap,
        (scores, score_index, kl_coef, estimator, kl_clip),
    )  # fmt: skip
    return rewards, correction, *outputs


def _forward(
    logits: Tensor,  # [B, T, V]
    ref_logits: Tensor | None,  # [B, T, V]
    token_ids: Tensor,  # [B, T]
    mask: Tensor | None,  # [B, T]
    temperature: float,
    ref_temperature: float,
    softcap: float | None,
    ref_softcap: float | None,
    reward: tuple[Tensor, Tensor, float, int, float | None] | None = None,
) -> tuple[Any, ...]:
    """Outputs in the order of `token_kl`, then rewards and correction; None where not asked for."""
    check_token_range(token_ids, mask, logits.shape[-1])
    n_rows = token_ids.numel()
    has_ref = ref_logits is not None

    def outputs_if(wanted: bool, n: int) -> list[Tensor | None]:
        return [per_token(logits) if wanted else None for _ in range(n)]

    logprob, entropy, policy_state = per_token(logits), per_token(logits), per_token(logits, 2)
    ref_logprob, kl, forward_kl = outputs_if(has_ref, 3)
    ref_state = per_token(logits, 2) if has_ref else None
    rewards, correction = outputs_if(reward is not None, 2)
    scores, score_index, kl_coef, estimator, kl_clip = reward or (None, None, 0.0, 0, None)
    outputs = (logprob, ref_logprob, kl, forward_kl, entropy, policy_state, ref_state)
    if n_rows == 0:
        return *outputs, rewards, correction

    with torch.cuda.device_of(logits):
        states, sizes, scales = _fold(
            logits, ref_logits, token_ids, mask, temperature, ref_temperature, softcap, ref_softcap
        )
        finish_kernel[(-(-n_rows // CONFIG.finish_rows),)](
            states, logits, ref_logits, token_ids, mask,
            logprob, ref_logprob, kl, forward_kl, entropy, policy_state, ref_state,
            rewards, correction, scores, score_index, *sizes, *scales, kl_coef, kl_clip,
            ESTIMATOR=estimator, ROWS=CONFIG.finish_rows, num_warps=CONFIG.num_warps, **COMPILE,
        )  # fmt: skip
    return *outputs, rewards, correction


def _fold(
    logits: Tensor,  # [B, T, V]
    ref_logits: Tensor | None,  # [B, T, V]
    token_ids: Tensor,  # [B, T]
    mask: Tensor | None,  # [B, T]
    temperature: float,
    ref_temperature: float,
    softcap: float | None,
    ref_softcap: float | None,
) -> tuple[Tensor, tuple[int, ...], tuple[float | None, ...]]:
    """The states of all splits, and what else the kernel that merges them takes."""
    n_rows, vocab_size, split = token_ids.numel(), logits.shape[-1], CONFIG.fold_split
    n_splits = -(-vocab_size // split)
    fields = POLICY_STATE_FIELDS if ref_logits is None else STATE_FIELDS
    states = torch.empty((fields, n_splits, n_rows), dtype=torch.float32, device=logits.device)
    sizes = (n_rows, token_ids.shape[1], vocab_size, n_splits, *strides_of(logits, ref_logits))
    scales = (LOG2E.value / temperature, LOG2E.value / ref_temperature, softcap, ref_softcap)
    fold_kernel[(n_rows * n_splits,)](
        logits, ref_logits, token_ids, mask, states, *sizes, *scales,
        SPLIT=split, **tile_of(logits, ref_logits), **COMPILE,
    )  # fmt: skip
    return states, sizes, scales


def fold_part(
    logits: Tensor,  # [B, T, V]
    ref_logits: Tensor | None,  # [B, T, V]
    token_ids: Tensor,  # [B, T]
    mask: Tensor | None,  # [B, T]
    temperature: float,
    ref_temperature: float,
    softcap: float | None,
    ref_softcap: float | None,
) -> Tensor:
    here = token_ids != schemas.ELSEWHERE
    check_token_range(token_ids, here if mask is None else mask & here, logits.shape[-1])
    n_fields = schemas.ALONE_FIELDS if ref_logits is None else len(schemas.STATE_FIELDS)
    n_rows = token_ids.numel()
    state = per_token(logits, n_fields)
    if n_rows == 0:
        return state
    with torch.cuda.device_of(logits):
        states, sizes, scales = _fold(
            logits, ref_logits, token_ids, mask, temperature, ref_temperature, softcap, ref_softcap
        )
        part_kernel[(-(-n_rows // CONFIG.finish_rows),)](
            states, logits, ref_logits, token_ids, mask, state, *sizes, *scales,
            ROWS=CONFIG.finish_rows, num_warps=CONFIG.num_warps, **COMPILE,
        )  # fmt: skip
    return state


def token_stats_backward(
    grad_logprob: Tensor | None,  # [B, T]
    grad_entropy: Tensor | None,  # [B, T]
    logits: Tensor,  # [B, T, V]
    token_ids: Tensor,  # [B, T]
    mask: Tensor | None,  # [B, T]
    policy_state: Tensor,  # [2, B, T]
    entropy: Tensor,  # [B, T]
    temperature: float,
    softcap: float | None,
    part: bool,
    grad_logits: Tensor,  # [B, T, V], written; may be logits
) -> None:
    token_kl_backward(
        grad_logprob, None, None, grad_entropy,
        logits, None, token_ids, mask, policy_state, None, None,
        entropy, temperature, temperature, softcap, None, part, grad_logits,
    )  # fmt: skip


def token_kl_backward(
    grad_logprob: Tensor | None,  # [B, T]
    grad_kl: Tensor | None,  # [B, T]
    grad_forward_kl: Tensor | None,  # [B, T]
    grad_entropy: Tensor | None,  # [B, T]
    logits: Tensor,  # [B, T, V]
    ref_logits: Tensor | None,  # [B, T, V]
    token_ids: Tensor,  # [B, T]
    mask: Tensor | None,  # [B, T]
    policy_state: Tensor,  # [2, B, T]
    ref_state: Tensor | None,  # [2, B, T]
    kl: Tensor | None,  # [B, T]
    entropy: Tensor,  # [B, T]
    temperature: float,
    ref_temperature: float,
    softcap: float | None,
    ref_softcap: float | None,
    part: bool,
    grad_logits: Tensor,  # [B, T, V], written; may be logits
) -> None:
    """What belongs to the reference may be None where neither KL has a gradient."""
    if grad_kl is None and grad_forward_kl is None:
        ref_logits = ref_state = kl = None
    n_rows, vocab_size = token_ids.numel(), logits.shape[-1]
    if n_rows == 0:
        return
    split = CONFIG.backward_split
    n_splits = -(-vocab_size // split)
    with torch.cuda.device_of(logits):
        backward_kernel[(n_rows * n_splits,)](
            grad_logprob, grad_kl, grad_forward_kl, grad_entropy,
            logits, ref_logits, token_ids, mask, policy_state, ref_state, kl, entropy, grad_logits,
            n_rows, token_ids.shape[1], vocab_size, n_splits,
            *strides_of(logits, ref_logits), *grad_logits.stride()[:2],
            temperature, LOG2E.value / temperature, LOG2E.value / ref_temperature,
            softcap, ref_softcap,
            SPLIT=split, **tile_of(logits, ref_logits, grad_logits), **COMPILE,
        )  # fmt: skip


def policy_loss(
    logits: Tensor,  # [B, T, V]
    ref_logits: Tensor | None,  # [B, T, V]
    token_ids: Tensor,  # [B, T]
    mask: Tensor,  # [B, T]
    old_logprobs: Tensor | None,  # [B, T]
    advantages: Tensor,  # [B, T]
    token_weights: Tensor,  # [B, T]
    importance_weights: Tensor | None,  # [B, T]
    ref_logprobs: Tensor | None,  # [B, T]
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    log_ratio_clamp: float | None,
    kl_coef: float,
    kl_estimator: int,
    entropy_coef: float,
    temperature: float,
    ref_temperature: float,
    softcap: float | None,
    ref_softcap: float | None,
    grad_logits: Tensor | None,  # [B, T, V], written; may be logits
) -> Tensor:
    check_token_range(token_ids, mask, logits.shape[-1])
    n_rows, vocab_size = token_ids.numel(), logits.shape[-1]
    terms = per_token(logits, len(POLICY_LOSS_TERMS))
    if n_rows == 0:
        return terms
    grad_strides = (0, 0) if grad_logits is None else grad_logits.stride()[:2]
    with torch.cuda.device_of(logits):
        policy_loss_kernel[(n_rows,)](
            logits, ref_logits, token_ids, mask, old_logprobs, advantages, token_weights,
            importance_weights, ref_logprobs, terms, grad_logits,
            n_rows, token_ids.shape[1], vocab_size, *strides_of(logits, ref_logits), *grad_strides,
            temperature, LOG2E.value / temperature, LOG2E.value / ref_temperature,
            softcap, ref_softcap, clip_low, clip_high, dual_clip, log_ratio_clamp,
            kl_coef, entropy_coef,
            ESTIMATOR=kl_estimator, HAS_KL=kl_coef != 0, HAS_ENTROPY=entropy_coef != 0,
            **whole_row_tile(logits, ref_logits, grad_logits), **COMPILE,
        )  # fmt: skip
    return terms


def scale_gradient(gradient: Tensor, factor: Tensor) -> None:  # [B, T, V], []
    n_batch, n_tokens, vocab_size = gradient.shape
    if gradient.numel() == 0:
        return
    with torch.cuda.device_of(gradient):
        scale_kernel[(CONFIG.scale_programs,)](
            gradient, factor, n_batch * n_tokens, n_tokens, vocab_size, *gradient.stride()[:2],
            **tile_of(gradient), **COMPILE,
        )  # fmt: skip


def gae(
    rewards: Tensor,  # [B, T]
    values: Tensor,  # [B, T]
    mask: Tensor,  # [B, T]
    gamma: float,
    lam: float,
    skip_masked: bool,
) -> tuple[Tensor, Tensor]:
    advantages, returns = torch.empty_like(rewards), torch.empty_like(rewards)
    n_sequences, n_tokens = rewards.shape
    if rewards.numel():
        with torch.cuda.device_of(rewards):
            gae_kernel[(n_sequences,)](
                rewards, values, mask, advantages, returns, n_tokens, gamma, lam,
                SKIP_MASKED=skip_masked, BLOCK_T=CONFIG.gae_block,
                num_warps=CONFIG.num_warps, **COMPILE,
            )  # fmt: skip
    return advantages, returns


def per_token(logits: Tensor, *leading: int) -> Tensor:
    """Room for numbers of each token, [*leading, B, T]."""
    shape = (*leading, *logits.shape[:-1])
    return torch.empty(shape, dtype=output_dtype(logits), device=logits.device)


def strides_of(logits: Tensor, ref_logits: Tensor | None) -> tuple[int, ...]:
    ref_logits = logits if ref_logits is None else ref_logits
    return *logits.stride()[:2], *ref_logits.stride()[:2]


def tile_of(*tensors: Tensor | None) -> dict[str, int]:
    """The [STEPS, N, LANE] that one program reads at a time, in loads as wide as rows are aligned.

    The widest dtype decides, so that both tensors of a pair are read in the same pattern.
    """
    logits = [t for t in tensors if t is not None]
    lane, steps = VECTOR_BYTES // max(t.itemsize for t in logits), CONFIG.steps
    if not all(map(_rows_are_aligned, logits)):
        lane, steps = 1, CONFIG.unaligned_steps
    return {"STEPS": steps, "N": CONFIG.lanes, "LANE": lane, "num_warps": CONFIG.num_warps}


def whole_row_tile(*tensors: Tensor | None) -> dict[str, int]:
    lanes, num_warps = CONFIG.policy_loss_lanes, CONFIG.policy_loss_warps
    return {**tile_of(*tensors), "N": lanes, "num_warps": num_warps}


def _rows_are_aligned(t: Tensor) -> bool:  # [B, T, V]
    """Whether every row starts at a multiple of the widest load.

    The answer holds for any rows of the tensor, and for an expanded row as for its copies (a stride
    of 0 counts as V), so that a row's rounding does not depend on the company it is in.
    """
    steps = [(stride or t.shape[-1]) * t.itemsize for stride in t.stride()[:2]]
    return all(start % VECTOR_BYTES == 0 for start in (t.data_ptr(), *steps))
