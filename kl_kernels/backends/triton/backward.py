"""The backward kernel: one more look at the logits gives the gradient of any mix of outputs."""

import triton
import triton.language as tl

from kl_kernels.backends.triton.math import (
    NO_TOKEN,
    anchored,
    backward,
    coefficients,
    soft_capped,
    soft_capped_grad,
)
from kl_kernels.backends.triton.tiles import row_pointer, step_offsets


@triton.jit
def upstream(grad_ptr, row):
    """The row's upstream gradient, 0 where there is none."""
    grad = 0.0
    if grad_ptr is not None:
        grad = tl.load(grad_ptr + row).to(tl.float32)
    return grad


@triton.jit
def gradient_of(
    raw, ref_raw, c, anchor, ref_anchor, k, ref_k, softcap, ref_softcap,
    HAS_KL: tl.constexpr, HAS_FORWARD_KL: tl.constexpr, HAS_ENTROPY: tl.constexpr,
):  # fmt: skip
    """The float32 gradient at these logits, without the token's own + g_logprob / temperature."""
    tx = anchored(soft_capped(raw, softcap), k, anchor)
    ty = tx
    if HAS_KL or HAS_FORWARD_KL:
        ty = anchored(soft_capped(ref_raw, ref_softcap), ref_k, ref_anchor)
    grad = backward(tx, ty, c, HAS_KL, HAS_FORWARD_KL, HAS_ENTROPY)
    return soft_capped_grad(grad, raw, softcap)


@triton.jit
def gradient(
    x_row, y_row, offsets, mask, c, anchor, ref_anchor, k, ref_k, softcap, ref_softcap,
    HAS_KL: tl.constexpr, HAS_FORWARD_KL: tl.constexpr, HAS_ENTROPY: tl.constexpr,
    EVICTION: tl.constexpr,
):  # fmt: skip
    """The same at `offsets` of the row. EVICTION: how soon caches may forget the logits."""
    raw = tl.load(x_row + offsets, mask, eviction_policy=EVICTION).to(tl.float32)
    ref_raw = raw
    if HAS_KL or HAS_FORWARD_KL:
        ref_raw = tl.load(y_row + offsets, mask, eviction_policy=EVICTION).to(tl.float32)
    return gradient_of(
        raw, ref_raw, c, anchor, ref_anchor, k, ref_k, softcap, ref_softcap,
        HAS_KL, HAS_FORWARD_KL, HAS_ENTROPY,
    )  # fmt: skip


@triton.jit
def store_zeros(
    grad_row, start, end, STEPS: tl.constexpr, N: tl.constexpr, LANE: tl.constexpr
):  # fmt: skip
    TILE: tl.constexpr = STEPS * N * LANE
    tile = step_offsets(0, STEPS * N, LANE)
    zeros = tl.zeros((STEPS * N, LANE), grad_row.dtype.element_ty)
    last = end - (end - start) % TILE
    for i in range(start, last, TILE):
        tl.store(grad_row + i + tile, zeros)
    tl.store(grad_row + last + tile, zeros, last + tile < end)


@triton.jit
def own_gradient(
    x_row, y_row, token, here, slope, c, anchor, ref_anchor, k, ref_k, softcap, ref_softcap,
    HAS_KL: tl.constexpr, HAS_FORWARD_KL: tl.constexpr, HAS_ENTROPY: tl.constexpr,
):  # fmt: skip
    """The whole gradient of the token's own logit, to be stored after all others.

    Computed before any is stored: the gradient may overwrite the logits. The barrier keeps every
    other thread from doing so before this one has read.
    """
    grad = gradient(
        x_row, y_row, token, here, c, anchor, ref_anchor, k, ref_k, softcap, ref_softcap,
        HAS_KL, HAS_FORWARD_KL, HAS_ENTROPY, "",
    )  # fmt: skip
    raw = tl.load(x_row + token, here).to(tl.float32)
    grad += soft_capped_grad(slope, raw, softcap)
    tl.debug_barrier()
    return grad


@triton.jit
def store_own(grad_row, token, here, own):
    # The barrier orders this store after another thread's to the same address.
    tl.debug_barrier()
    tl.store(grad_row + token, own.to(grad_row.dtype.element_ty), here)


@triton.jit(
    do_not_specialize=[
        "n_rows", "n_tokens", "n_splits",
        "batch_stride", "token_stride", "ref_batch_stride", "ref_token_stride",
        "grad_batch_stride", "grad_token_stride",
    ]
)  # fmt: skip
def backward_kernel(
    grad_logprob_ptr, grad_kl_ptr, grad_forward_kl_ptr, grad_entropy_ptr,  # [B, T] or None
    logits_ptr,  # [B, T, V]
    ref_ptr,  # [B, T, V], or None: neither KL has a gradient
    token_ids_ptr,  # [B, T]
    mask_ptr,  # [B, T] or None
    policy_state_ptr, ref_state_ptr,  # [2, B, T]; ref_state and kl None with ref
    kl_ptr, entropy_ptr,  # [B, T]
    grad_logits_ptr,  # [B, T, V], may be logits_ptr: each logit is read before its place is written
    n_rows, n_tokens, vocab_size, n_splits,
    batch_stride, token_stride, ref_batch_stride, ref_token_stride,
    grad_batch_stride, grad_token_stride,
    temperature, k, ref_k, softcap, ref_softcap,
    SPLIT: tl.constexpr, STEPS: tl.constexpr, N: tl.constexpr, LANE: tl.constexpr,
):  # fmt: skip
    """One program per row and split of the vocabulary."""
    HAS_REF: tl.constexpr = ref_ptr is not None
    HAS_KL: tl.constexpr = grad_kl_ptr is not None
    HAS_FORWARD_KL: tl.constexpr = grad_forward_kl_ptr is not None
    HAS_ENTROPY: tl.constexpr = grad_entropy_ptr is not None
    row, split = tl.program_id(0) // n_splits, tl.program_id(0) % n_splits
    TILE: tl.constexpr = STEPS * N * LANE
    tile = step_offsets(0, STEPS * N, LANE)
    start = split * SPLIT
    end = tl.minimum(start + SPLIT, vocab_size)
    last = end - (end - start) % TILE
    grad_row = row_pointer(
        grad_logits_ptr, row, n_tokens, grad_batch_stride, grad_token_stride, LANE
    )  # fmt: skip

    if mask_ptr is not None:  # noqa: SIM102  only the outer test is known at compile time
        if tl.load(mask_ptr + row) == 0:
            store_zeros(grad_row, start, end, STEPS, N, LANE)
            return

    x_row = row_pointer(logits_ptr, row, n_tokens, batch_stride, token_stride, LANE)
    g_logprob = upstream(grad_logprob_ptr, row)
    anchor, sx = tl.load(policy_state_ptr + row), tl.load(policy_state_ptr + n_rows + row)
    y_row, ref_anchor, sy, kl = x_row, anchor, sx, sx
    if HAS_REF:
        y_row = row_pointer(ref_ptr, row, n_tokens, ref_batch_stride, ref_token_stride, LANE)
        ref_anchor, sy = tl.load(ref_state_ptr + row), tl.load(ref_state_ptr + n_rows + row)
        kl = tl.load(kl_ptr + row)
    token = tl.load(token_ids_ptr + row)
    # An id out of range shows as NaN, but not where its gradient is not wanted, nor elsewhere.
    misplaced = ((token < 0) | (token >= vocab_size)) & (g_logprob != 0.0) & (token != NO_TOKEN)
    c = coefficients(
        tl.where(misplaced, float("nan"), g_logprob), upstream(grad_kl_ptr, row),
        upstream(grad_forward_kl_ptr, row), upstream(grad_entropy_ptr, row),
        sx, sy, kl, tl.load(entropy_ptr + row), temperature, HAS_REF,
    )  # fmt: skip

    here = (token >= start) & (token < end)
    own = 0.0
    if grad_logprob_ptr is not None:
        own = own_gradient(
            x_row, y_row, token, here, g_logprob / temperature,
            c, anchor, ref_anchor, k, ref_k, softcap, ref_softcap,
            HAS_KL, HAS_FORWARD_KL, HAS_ENTROPY,
        )  # fmt: skip

    for i in range(start, last, TILE):
        grad = gradient(
            x_row, y_row, i + tile, None, c, anchor, ref_anchor, k, ref_k, softcap, ref_softcap,
            HAS_KL, HAS_FORWARD_KL, HAS_ENTROPY, "",
        )  # fmt: skip
        tl.store(grad_row + i + tile, grad.to(grad_logits_ptr.dtype.element_ty))
    rest = last + tile
    grad = gradient(
        x_row, y_row, rest, rest < end, c, anchor, ref_anchor, k, ref_k, softcap, ref_softcap,
        HAS_KL, HAS_FORWARD_KL, HAS_ENTROPY, "",
    )  # fmt: skip
    tl.store(grad_row + rest, grad.to(grad_logits_ptr.dtype.element_ty), rest < end)

    if grad_logprob_ptr is not None:
        store_own(grad_row, token, here, own)
