"""The policy loss and its gradient in one visit of the row.

A program folds a whole row, knows its loss and upstream gradient then, and computes the gradient
from the row's end back to its start, so that what was read last is read again first, from the L2.
"""

import triton
import triton.language as tl

from kl_kernels.backends.triton.backward import gradient, own_gradient, store_own, store_zeros
from kl_kernels.backends.triton.epilogues import EXACT, policy_loss_epilogue
from kl_kernels.backends.triton.fold import fold_anchored, fold_running_max
from kl_kernels.backends.triton.math import Finished, coefficients, finish, within_reach
from kl_kernels.backends.triton.tiles import load, row_pointer, step_offsets


@triton.jit
def per_token(ptr, row, default):
    value = default
    if ptr is not None:
        value = tl.load(ptr + row).to(tl.float32)
    return value


@triton.jit
def store_terms(terms_ptr, stride, terms):
    for i in tl.static_range(len(terms)):
        tl.store(terms_ptr + i * stride, terms[i])


@triton.jit(
    do_not_specialize=[
        "n_rows", "n_tokens",
        "batch_stride", "token_stride", "ref_batch_stride", "ref_token_stride",
        "grad_batch_stride", "grad_token_stride",
    ]
)  # fmt: skip
def policy_loss_kernel(
    logits_ptr,  # [B, T, V]
    ref_ptr,  # [B, T, V] or None
    token_ids_ptr, mask_ptr,  # [B, T]
    old_logprob_ptr,  # [B, T], or None: the ratio is 1
    advantage_ptr, token_weight_ptr,  # [B, T]
    importance_weight_ptr,  # [B, T] or None
    ref_logprob_ptr,  # [B, T], for k2 and k3
    terms_ptr,  # [8, B, T]
    grad_logits_ptr,  # [B, T, V], may be logits_ptr; None: no gradient
    n_rows, n_tokens, vocab_size,
    batch_stride, token_stride, ref_batch_stride, ref_token_stride,
    grad_batch_stride, grad_token_stride,
    temperature, k, ref_k, softcap, ref_softcap,
    clip_low, clip_high, dual_clip, log_ratio_clamp, kl_coef, entropy_coef,
    ESTIMATOR: tl.constexpr, HAS_KL: tl.constexpr, HAS_ENTROPY: tl.constexpr,
    STEPS: tl.constexpr, N: tl.constexpr, LANE: tl.constexpr,
):  # fmt: skip
    """One program per row. HAS_KL, HAS_ENTROPY: whether they are part of the loss."""
    HAS_REF: tl.constexpr = ref_ptr is not None
    HAS_KL_GRAD: tl.constexpr = HAS_KL and ESTIMATOR == EXACT
    TILE: tl.constexpr = STEPS * N * LANE
    row = tl.program_id(0)
    terms_ptr += row
    stride = n_rows.to(tl.int64)
    grad_row = terms_ptr
    if grad_logits_ptr is not None:
        grad_row = row_pointer(
            grad_logits_ptr, row, n_tokens, grad_batch_stride, grad_token_stride, LANE
        )  # fmt: skip
    if tl.load(mask_ptr + row) == 0:
        store_terms(terms_ptr, stride, (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0))
        if grad_logits_ptr is not None:
            store_zeros(grad_row, 0, vocab_size, STEPS, N, LANE)
        return

    x_row = row_pointer(logits_ptr, row, n_tokens, batch_stride, token_stride, LANE)
    y_row = x_row
    if HAS_REF:
        y_row = row_pointer(ref_ptr, row, n_tokens, ref_batch_stride, ref_token_stride, LANE)
    token = tl.load(token_ids_ptr + row)
    in_range = (token >= 0) & (token < vocab_size)
    token = tl.minimum(tl.maximum(token, 0), vocab_size - 1)
    xt = load(x_row, token, softcap)
    yt = xt
    if HAS_REF:
        yt = load(y_row, token, ref_softcap)
    n_full = (vocab_size - 1) // TILE
    n_rest = vocab_size - n_full * TILE
    s, sound = fold_anchored(
        x_row, y_row, xt, yt, n_full, n_rest, k, ref_k, softcap, ref_softcap,
        STEPS, N, LANE, HAS_REF,
    )  # fmt: skip
    if not sound:
        s = fold_running_max(
            x_row, y_row, n_full, n_rest, k, ref_k, softcap, ref_softcap, STEPS, N, LANE, HAS_REF
        )  # fmt: skip

    s = within_reach(s)
    # An id out of range shows as NaN, in the gradient too.
    f = finish(s, tl.where(in_range, xt, float("nan")), yt, k, ref_k, HAS_REF)
    if not HAS_REF:
        f = Finished(f.logprob, f.logprob, 0.0, 0.0, f.entropy)
    terms, g = policy_loss_epilogue(
        f, per_token(old_logprob_ptr, row, f.logprob), per_token(advantage_ptr, row, None),
        per_token(token_weight_ptr, row, None), per_token(importance_weight_ptr, row, 1.0),
        per_token(ref_logprob_ptr, row, f.logprob),
        clip_low, clip_high, dual_clip, log_ratio_clamp, kl_coef, entropy_coef,
        ESTIMATOR, HAS_KL, HAS_ENTROPY,
    )  # fmt: skip
    store_terms(terms_ptr, stride, terms)

    if grad_logits_ptr is not None:
        if (g.logprob == 0.0) & (g.kl == 0.0) & (g.entropy == 0.0):
            store_zeros(grad_row, 0, vocab_size, STEPS, N, LANE)
        else:
            c = coefficients(
                g.logprob, g.kl, 0.0, g.entropy, s.sx, s.sy, f.kl, f.entropy, temperature,
                HAS_KL_GRAD,
            )  # fmt: skip
            own = own_gradient(
                x_row, y_row, token, None, g.logprob / temperature,
                c, s.anchor, s.ref_anchor, k, ref_k, softcap, ref_softcap,
                HAS_KL_GRAD, False, HAS_ENTROPY,
            )  # fmt: skip
            start = n_full * TILE
            at = start + step_offsets(0, STEPS * N, LANE)
            grad = gradient(
                x_row, y_row, at, at < vocab_size,
                c, s.anchor, s.ref_anchor, k, ref_k, softcap, ref_softcap,
                HAS_KL_GRAD, False, HAS_ENTROPY, "evict_first",
            )  # fmt: skip
            tl.store(grad_row + at, grad.to(grad_row.dtype.element_ty), at < vocab_size)
            for _ in range(n_full):
                start -= TILE
                at = start + step_offsets(0, STEPS * N, LANE)
                grad = gradient(
                    x_row, y_row, at, None,
                    c, s.anchor, s.ref_anchor, k, ref_k, softcap, ref_softcap,
                    HAS_KL_GRAD, False, HAS_ENTROPY, "evict_first",
                )  # fmt: skip
                tl.store(
                    grad_row + at, grad.to(grad_row.dtype.element_ty),
                    eviction_policy="evict_first",
                )  # fmt: skip
            store_own(grad_row, token, None, own)
