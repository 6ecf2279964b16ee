"""The backward kernel: one more pass over the logits gives the gradient of any mix of outputs."""

import triton
import triton.language as tl

from kl_kernels.backends.triton.math import (
    NO_TOKEN,
    Saved,
    Statistics,
    Upstream,
    anchored,
    backward,
    coefficients,
    soft_capped,
    soft_capped_grad,
    to_float32,
)
from kl_kernels.backends.triton.tiles import SIZES, Model, Tile, row_pointer, step_offsets


@triton.jit
def upstream(grad_ptr, row):
    """The row's upstream gradient, 0 where there is none."""
    grad = 0.0
    if grad_ptr is not None:
        grad = tl.load(grad_ptr + row).to(tl.float32)
    return grad


@triton.jit
def gradient(x, y, offsets, mask, c, of: tl.constexpr, EVICTION: tl.constexpr):
    """The float32 gradient at `offsets` of the row, without the token's + g_logprob / temperature.

    EVICTION: how soon caches may forget the logits.
    """
    raw = to_float32(tl.load(x.ptr + offsets, mask, eviction_policy=EVICTION))
    tx = anchored(soft_capped(raw, x.softcap), x.k, c.anchor)
    ty = tx
    if of.KL or of.FORWARD_KL:
        ref_raw = to_float32(tl.load(y.ptr + offsets, mask, eviction_policy=EVICTION))
        ty = anchored(soft_capped(ref_raw, y.softcap), y.k, c.ref_anchor)
    return soft_capped_grad(backward(tx, ty, c, of), raw, x.softcap)


@triton.jit
def store_gradient(grad_row, offsets, mask, grad, EVICTION: tl.constexpr):
    grad = grad.to(grad_row.dtype.element_ty)
    tl.store(grad_row + offsets, grad, mask, eviction_policy=EVICTION)


@triton.jit
def store_zeros(grad_row, start, end, tile: tl.constexpr):
    TILE: tl.constexpr = tile.STEPS * tile.N * tile.LANE
    offsets = step_offsets(0, tile.STEPS * tile.N, tile.LANE)
    zeros = tl.zeros((tile.STEPS * tile.N, tile.LANE), grad_row.dtype.element_ty)
    last = end - (end - start) % TILE
    for i in range(start, last, TILE):
        tl.store(grad_row + i + offsets, zeros)
    tl.store(grad_row + last + offsets, zeros, last + offsets < end)


@triton.jit
def own_gradient(x, y, token, here, slope, c, of: tl.constexpr):
    """The whole gradient of the token's own logit, to be stored after all others.

    Computed before any is stored: the gradient may overwrite the logits. The barrier keeps every
    other thread from doing so before this one has read.
    """
    grad = gradient(x, y, token, here, c, of, "")
    raw = to_float32(tl.load(x.ptr + token, here))
    grad += soft_capped_grad(slope, raw, x.softcap)
    tl.debug_barrier()
    return grad


@triton.jit
def store_own(grad_row, token, here, own):
    # The barrier orders this store after another thread's to the same address.
    tl.debug_barrier()
    tl.store(grad_row + token, own.to(grad_row.dtype.element_ty), here)


@triton.jit(do_not_specialize=SIZES)
def backward_kernel(
    grad_logprob_ptr,  # [B, T] or None
    grad_kl_ptr,  # [B, T] or None
    grad_forward_kl_ptr,  # [B, T] or None
    grad_entropy_ptr,  # [B, T] or None
    logits_ptr,  # [B, T, V]
    ref_ptr,  # [B, T, V], or None: neither KL has a gradient
    token_ids_ptr,  # [B, T]
    mask_ptr,  # [B, T] or None
    policy_state_ptr,  # [2, B, T]
    ref_state_ptr,  # [2, B, T]; None with ref
    kl_ptr,  # [B, T]; None with ref
    entropy_ptr,  # [B, T]
    grad_logits_ptr,  # [B, T, V], may be logits_ptr: each logit is read before its place is written
    n_rows,
    n_tokens,
    vocab_size,
    n_splits,
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
    SPLIT: tl.constexpr,
    STEPS: tl.constexpr,
    N: tl.constexpr,
    LANE: tl.constexpr,
):
    """One program per row and split of the vocabulary."""
    HAS_REF: tl.constexpr = ref_ptr is not None
    of: tl.constexpr = Statistics(
        grad_kl_ptr is not None, grad_forward_kl_ptr is not None, grad_entropy_ptr is not None
    )
    row, split = tl.program_id(0) // n_splits, tl.program_id(0) % n_splits
    start = split * SPLIT
    end = tl.minimum(start + SPLIT, vocab_size)
    g_row = row_pointer(grad_logits_ptr, row, n_tokens, grad_batch_stride, grad_token_stride, LANE)

    if mask_ptr is not None:  # noqa: SIM102  only the outer test is known at compile time
        if tl.load(mask_ptr + row) == 0:
            store_zeros(g_row, start, end, Tile(STEPS, N, LANE))
            return

    x = Model(row_pointer(logits_ptr, row, n_tokens, batch_stride, token_stride, LANE), k, softcap)
    g_logprob = upstream(grad_logprob_ptr, row)
    anchor, sx = tl.load(policy_state_ptr + row), tl.load(policy_state_ptr + n_rows + row)
    y, ref_anchor, sy, kl = x, anchor, sx, sx
    if HAS_REF:
        y_row = row_pointer(ref_ptr, row, n_tokens, ref_batch_stride, ref_token_stride, LANE)
        y = Model(y_row, ref_k, ref_softcap)
        ref_anchor, sy = tl.load(ref_state_ptr + row), tl.load(ref_state_ptr + n_rows + row)
        kl = tl.load(kl_ptr + row)
    token = tl.load(token_ids_ptr + row)
    # An id out of range shows as NaN, but not where its gradient is not wanted, nor elsewhere.
    misplaced = ((token < 0) | (token >= vocab_size)) & (g_logprob != 0.0) & (token != NO_TOKEN)
    g = Upstream(
        tl.where(misplaced, float("nan"), g_logprob),
        upstream(grad_kl_ptr, row),
        upstream(grad_forward_kl_ptr, row),
        upstream(grad_entropy_ptr, row),
    )
    saved = Saved(anchor, ref_anchor, sx, sy, kl, tl.load(entropy_ptr + row))
    c = coefficients(g, saved, temperature, HAS_REF)

    here = (token >= start) & (token < end)
    own = 0.0
    if grad_logprob_ptr is not None:
        own = own_gradient(x, y, token, here, g_logprob / temperature, c, of)

    TILE: tl.constexpr = STEPS * N * LANE
    tile = step_offsets(0, STEPS * N, LANE)
    last = end - (end - start) % TILE
    for i in range(start, last, TILE):
        store_gradient(g_row, i + tile, None, gradient(x, y, i + tile, None, c, of, ""), "")
    rest = last + tile
    store_gradient(g_row, rest, rest < end, gradient(x, y, rest, rest < end, c, of, ""), "")

    if grad_logprob_ptr is not None:
        store_own(g_row, token, here, own)
