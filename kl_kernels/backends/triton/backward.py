"""The backward kernel: one more pass over the logits gives the gradient of any mix of outputs.

A logit's gradient does not depend on which logits it is computed with. So vectors are those that
memory has aligned, wherever a row begins, and offsets are counted from the row's first. (Sums are
rounded in their order: a fold counts from the row's first logit, to be the same wherever that is.)
"""

import triton
import triton.language as tl

from kl_kernels.backends.triton.math import (
    NO_TOKEN,
    Differentiated,
    Saved,
    Upstream,
    anchored,
    backward,
    coefficients,
    soft_capped,
    soft_capped_grad,
)
from kl_kernels.backends.triton.tiles import (
    SIZES,
    Model,
    Tile,
    first_vector,
    logits_before_vectors,
    outside_vectors,
    row_pointer,
    step_offsets,
    vectors_of_tile,
    whole_tiles,
)


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
    raw = tl.load(x.ptr + offsets, mask, eviction_policy=EVICTION).to(tl.float32)
    tx = anchored(soft_capped(raw, x.softcap), x.k, c.anchor)
    ty = tx
    if of.KL or of.FORWARD_KL:
        ref_raw = tl.load(y.ptr + offsets, mask, eviction_policy=EVICTION).to(tl.float32)
        ty = anchored(soft_capped(ref_raw, y.softcap), y.k, c.ref_anchor)
    return soft_capped_grad(backward(tx, ty, c, of), raw, x.softcap)


@triton.jit
def write_gradient(
    grad_row, offsets, mask, x, y, c, of: tl.constexpr, READ: tl.constexpr, WRITE: tl.constexpr
):
    """READ, WRITE: how soon caches may forget the logits, and what is written."""
    grad = gradient(x, y, offsets, mask, c, of, READ)
    store_gradient(grad_row, offsets, mask, grad, WRITE)


@triton.jit
def store_gradient(grad_row, offsets, mask, grad, EVICTION: tl.constexpr):
    grad = grad.to(grad_row.dtype.element_ty)
    tl.store(grad_row + offsets, grad, mask, eviction_policy=EVICTION)


@triton.jit
def store_zeros(grad_row, before, start, end, tile: tl.constexpr):
    """Zeros from `start` to `end`, and for the `before` logits before the row's first vector."""
    zeros = tl.zeros((tile.STEPS * tile.N, tile.LANE), grad_row.dtype.element_ty)
    for i in range(start, end, tile.STEPS * tile.N * tile.LANE):
        offsets, whole = vectors_of_tile(i, end, tile)
        tl.store(grad_row + offsets, zeros, whole)
    if tile.LANE > 1:
        offsets, there = outside_vectors(before, end, tile)
        zeros = tl.zeros((tile.N,), grad_row.dtype.element_ty)
        tl.store(grad_row + offsets, zeros, there)


@triton.jit
def split_of_vectors(split, end, before, SPLIT: tl.constexpr):
    """Where a split starts and ends, and the logits before the first vector if they are its own."""
    start = split * SPLIT
    return start, tl.minimum(start + SPLIT, end), tl.where(split == 0, before, 0)


@triton.jit
def own_gradient(x, y, token, here, slope, c, of: tl.constexpr):
    """The whole gradient of the token's own logit, to be stored after all others.

    Computed before any is stored: the gradient may overwrite the logits. The barrier keeps every
    other thread from doing so before this one has read.
    """
    grad = gradient(x, y, token, here, c, of, "")
    raw = tl.load(x.ptr + token, here).to(tl.float32)
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
    of: tl.constexpr = Differentiated(
        grad_kl_ptr is not None, grad_forward_kl_ptr is not None, grad_entropy_ptr is not None
    )
    tile: tl.constexpr = Tile(STEPS, N, LANE)
    row, split = tl.program_id(0) // n_splits, tl.program_id(0) % n_splits
    g_row = row_pointer(grad_logits_ptr, row, n_tokens, grad_batch_stride, grad_token_stride, 1)
    skipped = logits_before_vectors(g_row, LANE)
    g_row = first_vector(g_row, skipped, LANE)
    start, end, before = split_of_vectors(split, vocab_size - skipped, skipped, SPLIT)

    if mask_ptr is not None:  # noqa: SIM102  only the outer test is known at compile time
        if tl.load(mask_ptr + row) == 0:
            store_zeros(g_row, before, start, end, tile)
            return

    x_row = row_pointer(logits_ptr, row, n_tokens, batch_stride, token_stride, 1)
    x = Model(first_vector(x_row, skipped, LANE), k, softcap)
    g_logprob = upstream(grad_logprob_ptr, row)
    anchor, sx = tl.load(policy_state_ptr + row), tl.load(policy_state_ptr + n_rows + row)
    y, ref_anchor, sy, kl = x, anchor, sx, sx
    if HAS_REF:
        y_row = row_pointer(ref_ptr, row, n_tokens, ref_batch_stride, ref_token_stride, 1)
        y = Model(first_vector(y_row, skipped, LANE), ref_k, ref_softcap)
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

    token -= skipped
    here = (token >= start - before) & (token < end)
    own = 0.0
    if grad_logprob_ptr is not None:
        own = own_gradient(x, y, token, here, g_logprob / temperature, c, of)

    TILE: tl.constexpr = STEPS * N * LANE
    offsets = step_offsets(0, STEPS * N, LANE)
    last = start + whole_tiles(end - start, tile)
    for i in range(start, last, TILE):
        write_gradient(g_row, i + offsets, None, x, y, c, of, "", "")
    at, whole = vectors_of_tile(last, end, tile)
    write_gradient(g_row, at, whole, x, y, c, of, "", "")
    if LANE > 1:
        few, there = outside_vectors(before, end, tile)
        write_gradient(g_row, few, there, x, y, c, of, "", "")

    if grad_logprob_ptr is not None:
        store_own(g_row, token, here, own)
