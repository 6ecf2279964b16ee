"""The policy loss and its gradient in one visit of the row.

A program folds a whole row, knows its loss and upstream gradient then, and computes the gradient
from the row's end back to its start, so that what was read last is read again first, from the L2.
"""

import triton
import triton.language as tl

from kl_kernels.backends.triton.backward import (
    own_gradient,
    store_own,
    store_zeros,
    write_gradient,
)
from kl_kernels.backends.triton.epilogues import (
    EXACT,
    PolicyLossParams,
    Token,
    policy_loss_epilogue,
)
from kl_kernels.backends.triton.fold import fold_logits
from kl_kernels.backends.triton.math import (
    Differentiated,
    Finished,
    Saved,
    coefficients,
    finish,
    within_reach,
)
from kl_kernels.backends.triton.tiles import (
    SIZES,
    Model,
    Tile,
    first_vector,
    load,
    logits_before_vectors,
    outside_vectors,
    row_pointer,
    step_offsets,
    vectors_of_tile,
    whole_tiles,
)


@triton.jit
def per_token(ptr, row, default):
    value = default
    if ptr is not None:
        value = tl.load(ptr + row).to(tl.float32)
    return value


@triton.jit
def store_per_token(ptr, row, value):
    if ptr is not None:
        tl.store(ptr + row, value)


@triton.jit
def store_terms(terms_ptr, stride, terms):
    for i in tl.static_range(len(terms)):
        tl.store(terms_ptr + i * stride, terms[i])


@triton.jit(do_not_specialize=SIZES)
def policy_loss_kernel(
    logits_ptr,  # [B, T, V]
    ref_ptr,  # [B, T, V] or None
    token_ids_ptr,  # [B, T]
    mask_ptr,  # [B, T]
    old_logprob_ptr,  # [B, T], or None: the ratio is 1
    advantage_ptr,  # [B, T]
    token_weight_ptr,  # [B, T]
    importance_weight_ptr,  # [B, T] or None
    ref_logprob_ptr,  # [B, T], for k2 and k3
    terms_ptr,  # [8, B, T]
    own_gradient_ptr,  # [B, T] the token's entry, not rounded; None: nobody asks
    grad_logits_ptr,  # [B, T, V], may be logits_ptr; None: no gradient
    n_rows,
    n_tokens,
    vocab_size,
    batch_stride,
    token_stride,
    ref_batch_stride,
    ref_token_stride,
    grad_batch_stride,
    grad_token_stride,
    temperature,
    k,
    ref_k,
    softcap,
    ref_softcap,
    clip_low,
    clip_high,
    dual_clip,
    log_ratio_clamp,
    kl_coef,
    entropy_coef,
    ESTIMATOR: tl.constexpr,
    HAS_KL: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    STEPS: tl.constexpr,
    N: tl.constexpr,
    LANE: tl.constexpr,
    GRAD_STEPS: tl.constexpr,
    GRAD_LANE: tl.constexpr,
):
    """One program per row. HAS_KL, HAS_ENTROPY: whether they are part of the loss."""
    HAS_REF: tl.constexpr = ref_ptr is not None
    tile: tl.constexpr = Tile(STEPS, N, LANE)
    grad_tile: tl.constexpr = Tile(GRAD_STEPS, N, GRAD_LANE)
    row = tl.program_id(0)
    terms_ptr += row
    stride = n_rows.to(tl.int64)
    g_row, before = terms_ptr, 0
    if grad_logits_ptr is not None:
        g_row = row_pointer(grad_logits_ptr, row, n_tokens, grad_batch_stride, grad_token_stride, 1)
        before = logits_before_vectors(g_row, GRAD_LANE)
        g_row = first_vector(g_row, before, GRAD_LANE)
    end = vocab_size - before
    if tl.load(mask_ptr + row) == 0:
        store_terms(terms_ptr, stride, (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0))
        store_per_token(own_gradient_ptr, row, 0.0)
        if grad_logits_ptr is not None:
            store_zeros(g_row, before, 0, end, grad_tile)
        return

    x = Model(row_pointer(logits_ptr, row, n_tokens, batch_stride, token_stride, LANE), k, softcap)
    y = x
    if HAS_REF:
        y_row = row_pointer(ref_ptr, row, n_tokens, ref_batch_stride, ref_token_stride, LANE)
        y = Model(y_row, ref_k, ref_softcap)
    token = tl.load(token_ids_ptr + row)
    # An id out of range shows as NaN, in the gradient too.
    in_range = (token >= 0) & (token < vocab_size)
    token = tl.minimum(tl.maximum(token, 0), vocab_size - 1)
    xt = tl.where(in_range, load(x, token), float("nan"))
    yt = xt
    if HAS_REF:
        yt = load(y, token)
    s = within_reach(fold_logits(x, y, xt, yt, vocab_size, tile, HAS_REF))
    f = finish(s, xt, yt, k, ref_k, HAS_REF)
    if not HAS_REF:
        f = Finished(f.logprob, f.logprob, 0.0, 0.0, f.entropy)
    told = Token(
        per_token(old_logprob_ptr, row, f.logprob),
        per_token(advantage_ptr, row, None),
        per_token(token_weight_ptr, row, None),
        per_token(importance_weight_ptr, row, 1.0),
        per_token(ref_logprob_ptr, row, f.logprob),
    )
    params = PolicyLossParams(
        clip_low, clip_high, dual_clip, log_ratio_clamp, kl_coef, entropy_coef
    )
    terms, g = policy_loss_epilogue(f, told, params, ESTIMATOR, HAS_KL, HAS_ENTROPY)
    store_terms(terms_ptr, stride, terms)

    if grad_logits_ptr is not None:
        if (g.logprob == 0.0) & (g.kl == 0.0) & (g.entropy == 0.0):
            store_per_token(own_gradient_ptr, row, 0.0)
            store_zeros(g_row, before, 0, end, grad_tile)
        else:
            of: tl.constexpr = Differentiated(HAS_KL and ESTIMATOR == EXACT, False, HAS_ENTROPY)
            saved = Saved(s.anchor, s.ref_anchor, s.sx, s.sy, f.kl, f.entropy)
            c = coefficients(g, saved, temperature, of.KL)
            x = Model(first_vector(x.ptr, before, GRAD_LANE), x.k, x.softcap)
            y = Model(first_vector(y.ptr, before, GRAD_LANE), y.k, y.softcap)
            token -= before
            own = own_gradient(x, y, token, None, g.logprob / temperature, c, of)
            TILE: tl.constexpr = GRAD_STEPS * N * GRAD_LANE
            last = whole_tiles(end, grad_tile)
            at, whole = vectors_of_tile(last, end, grad_tile)
            write_gradient(g_row, at, whole, x, y, c, of, "evict_first", "")
            if GRAD_LANE > 1:
                few, there = outside_vectors(before, end, grad_tile)
                write_gradient(g_row, few, there, x, y, c, of, "evict_first", "")
            for i in range(0, last, TILE):
                at = last - TILE - i + step_offsets(0, GRAD_STEPS * N, GRAD_LANE)
                write_gradient(g_row, at, None, x, y, c, of, "evict_first", "evict_first")
            store_own(g_row, token, None, own)
            store_per_token(own_gradient_ptr, row, own)
