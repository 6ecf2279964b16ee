"""A row beside the mixture of policy and reference: its divergence, and the gradient of that.

`mix_kernel` has a whole row: it folds it, and looks at it a second time from its end back to its
start, so that what was read last is read again first, from the L2. Where states are given, the row
is finished and the logits a part of it: only the second look remains.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from kl_kernels.backends.triton.backward import (
    split_of_vectors,
    store_gradient,
    store_zeros,
)
from kl_kernels.backends.triton.fold import fold_logits
from kl_kernels.backends.triton.math import (
    INF,
    KEEP_NAN,
    LN2,
    soft_capped,
    soft_capped_grad,
    sum_of_threads,
    within_reach,
)
from kl_kernels.backends.triton.tiles import (
    SIZES,
    Model,
    Tile,
    first_vector,
    halves,
    last_tile,
    load_pair,
    logits_before_vectors,
    only_column,
    outside_vectors,
    row_pointer,
    step_offsets,
    vectors_of_tile,
    whole_tiles,
)

# Nothing of a row is 2^100 times smaller than its neighbour and counts.
MOST_FALL = tl.constexpr(100.0)

# The bits of a float.
ROOT_OF_HALF = tl.constexpr(0x3F3504F3)
EXPONENT = tl.constexpr(-(1 << 23))


class Mixture(NamedTuple):
    """A row's constants; see `csrc/common/mixture.h`."""

    anchor: tl.tensor
    ref_anchor: tl.tensor
    shift: tl.tensor  # log2(sx / sy); ty + shift is log2 q where tx is log2 p
    weight: tl.tensor  # 1 - beta
    ref_weight: tl.tensor  # beta


class Beside(NamedTuple):
    larger: tl.tensor  # the larger of p and q, times sx
    p: tl.tensor  # over the larger
    policy: tl.tensor  # log2(m / p)
    jsd: tl.tensor  # (1 - beta) p log2(m / p) + beta q log2(m / q), over the larger


@triton.jit
def log2(x):
    """Logarithm of a normal 0 < x <= 1, within 3e-7 of itself, in half of tl.log2's instructions.

    x = 2^k (1 + z) with 1 + z between the roots of 1/2 and 2, and log2(1 + z) is z times the
    polynomial of degree 8 that is minimax in relative error.
    """
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - ROOT_OF_HALF) & EXPONENT
    z = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
    q = tl.fma(z, 0.12583696842, -0.20726978779)
    q = tl.fma(q, z, 0.21571564674)
    q = tl.fma(q, z, -0.23894481361)
    q = tl.fma(q, z, 0.28791624308)
    q = tl.fma(q, z, -0.36070367694)
    q = tl.fma(q, z, 0.48091062903)
    q = tl.fma(q, z, -0.72134733200)
    q = tl.fma(q, z, 1.44269502163)
    return tl.fma(exponent.to(tl.float32), 2.0**-23, z * q)


@triton.jit
def beside_mixture(tx, ty, m):
    """The larger of p and q is the one to divide by: nothing overflows, equal logits give 0.

    With s = 2^-fall the ratio of the smaller to the larger and c its weight in the mixture,
    log2(m / larger) = log2(1 + c (s - 1)). The bound on `fall` also takes -inf - -inf = NaN, which
    has no weight.
    """
    moved = ty + m.shift
    q_is_larger = moved > tx
    fall = tl.minimum(tl.abs(moved - tx), MOST_FALL)
    s = tl.exp2(-fall)
    c = tl.where(q_is_larger, m.weight, m.ref_weight)
    of_mixture = tl.fma(s - 1.0, c, 1.0)
    of_larger = log2(of_mixture)
    return Beside(
        tl.exp2(tl.maximum(tx, moved)),
        tl.where(q_is_larger, s, 1.0),
        of_larger + tl.where(q_is_larger, fall, 0.0),
        tl.fma(of_mixture, of_larger, c * s * fall),
    )


@triton.jit
def mixture_of(anchor, ref_anchor, sx, sy, weight, ref_weight):
    # Rounded: of equal sums the GPU's own quotient is often 1 - 2^-24.
    return Mixture(anchor, ref_anchor, tl.log2(tl.div_rn(sx, sy)), weight, ref_weight)


@triton.jit
def mix_tile(jsd, kl, x, y, start, size, m, tile: tl.constexpr):
    """Add the tile at `start` to the sums [N]; `size` as in `load_tile`."""
    xs, ys = load_pair(x, y, start, size, tile, True)
    for step in tl.static_range(len(xs)):
        jsd, kl = mix_columns(jsd, kl, xs[step], ys[step], x.k, y.k, m)
    return jsd, kl


@triton.jit
def mix_columns(jsd, kl, xs, ys, k, ref_k, m):
    """Add xs, ys [N, WIDTH], one column after the other, as `tiles.fold_columns` does."""
    if xs.shape[1] == 1:
        tx = tl.fma(only_column(xs), k, -m.anchor)
        ty = tl.fma(only_column(ys), ref_k, -m.ref_anchor)
        b = beside_mixture(tx, ty, m)
        jsd = tl.fma(b.larger, b.jsd, jsd)
        kl = tl.fma(b.larger * b.p, b.policy, kl)
    else:
        x0, x1 = halves(xs)
        y0, y1 = halves(ys)
        jsd, kl = mix_columns(jsd, kl, x0, y0, k, ref_k, m)
        jsd, kl = mix_columns(jsd, kl, x1, y1, k, ref_k, m)
    return jsd, kl


@triton.jit(do_not_specialize=SIZES)
def mix_kernel(
    logits_ptr,  # [B, T, V]
    ref_ptr,  # [B, T, V]
    mask_ptr,  # [B, T] or None
    policy_state_ptr,  # [2, B, T]: written, or read where GIVEN
    ref_state_ptr,  # [2, B, T]: likewise
    jsd_ptr,  # [B, T]
    mixture_kl_ptr,  # [B, T]
    n_rows,
    n_tokens,
    vocab_size,
    batch_stride,
    token_stride,
    ref_batch_stride,
    ref_token_stride,
    weight,
    ref_weight,
    k,
    ref_k,
    softcap,
    ref_softcap,
    GIVEN: tl.constexpr,
    STEPS: tl.constexpr,
    N: tl.constexpr,
    LANE: tl.constexpr,
):
    """One program per row."""
    tile: tl.constexpr = Tile(STEPS, N, LANE)
    row = tl.program_id(0)
    policy_state_ptr += row
    ref_state_ptr += row
    if mask_ptr is not None:  # noqa: SIM102  only the outer test is known at compile time
        if tl.load(mask_ptr + row) == 0:
            tl.store(jsd_ptr + row, 0.0)
            tl.store(mixture_kl_ptr + row, 0.0)
            if not GIVEN:
                tl.store(policy_state_ptr, 0.0)
                tl.store(policy_state_ptr + n_rows, 0.0)
                tl.store(ref_state_ptr, 0.0)
                tl.store(ref_state_ptr + n_rows, 0.0)
            return

    x = Model(row_pointer(logits_ptr, row, n_tokens, batch_stride, token_stride, LANE), k, softcap)
    y_row = row_pointer(ref_ptr, row, n_tokens, ref_batch_stride, ref_token_stride, LANE)
    y = Model(y_row, ref_k, ref_softcap)
    if GIVEN:
        anchor, sx = tl.load(policy_state_ptr), tl.load(policy_state_ptr + n_rows)
        ref_anchor, sy = tl.load(ref_state_ptr), tl.load(ref_state_ptr + n_rows)
    else:
        state = within_reach(fold_logits(x, y, -INF, -INF, vocab_size, tile, True))
        anchor, sx, ref_anchor, sy = state.anchor, state.sx, state.ref_anchor, state.sy
        tl.store(policy_state_ptr, anchor)
        tl.store(policy_state_ptr + n_rows, sx)
        tl.store(ref_state_ptr, ref_anchor)
        tl.store(ref_state_ptr + n_rows, sy)

    m = mixture_of(anchor, ref_anchor, sx, sy, weight, ref_weight)
    zero = tl.zeros((N,), tl.float32)
    TILE: tl.constexpr = STEPS * N * LANE
    last = last_tile(vocab_size, tile)
    jsd, kl = mix_tile(zero, zero, x, y, last, vocab_size - last, m, tile)
    for i in range(0, last, TILE):
        jsd, kl = mix_tile(jsd, kl, x, y, last - TILE - i, None, m, tile)
    # NaN of a row is in its sums, and not in what is bounded.
    nan_of_row = m.shift - m.shift
    row_jsd = sum_of_threads(jsd) * (-LN2 / sx) + nan_of_row
    row_kl = sum_of_threads(kl) * (-LN2 / sx) + nan_of_row
    if not GIVEN:
        row_jsd = tl.maximum(row_jsd, 0.0, KEEP_NAN)
    tl.store(jsd_ptr + row, row_jsd)
    tl.store(mixture_kl_ptr + row, row_kl)


@triton.jit
def write_mixture_gradient(grad_row, offsets, mask, x, y, m, a, b):
    store_gradient(grad_row, offsets, mask, mixture_gradient(x, y, offsets, mask, m, a, b), "")


@triton.jit
def mixture_gradient(x, y, offsets, mask, m, a, b):
    """(1 - beta) p (log(p / m) - KL(p || m)), as 2^tx (a + b log2(m / p))."""
    raw = tl.load(x.ptr + offsets, mask).to(tl.float32)
    ref_raw = tl.load(y.ptr + offsets, mask).to(tl.float32)
    tx = tl.fma(soft_capped(raw, x.softcap), x.k, -m.anchor)
    ty = tl.fma(soft_capped(ref_raw, y.softcap), y.k, -m.ref_anchor)
    grad = tl.exp2(tx) * tl.fma(beside_mixture(tx, ty, m).policy, b, a)
    return soft_capped_grad(grad, raw, x.softcap)


@triton.jit(do_not_specialize=SIZES)
def mix_backward_kernel(
    grad_jsd_ptr,  # [B, T]
    logits_ptr,  # [B, T, V]
    ref_ptr,  # [B, T, V]
    mask_ptr,  # [B, T] or None
    policy_state_ptr,  # [2, B, T]
    ref_state_ptr,  # [2, B, T]
    mixture_kl_ptr,  # [B, T]
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
    weight,
    ref_weight,
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
    row, split = tl.program_id(0) // n_splits, tl.program_id(0) % n_splits
    tile: tl.constexpr = Tile(STEPS, N, LANE)
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
    y_row = row_pointer(ref_ptr, row, n_tokens, ref_batch_stride, ref_token_stride, 1)
    y = Model(first_vector(y_row, skipped, LANE), ref_k, ref_softcap)
    anchor, sx = tl.load(policy_state_ptr + row), tl.load(policy_state_ptr + n_rows + row)
    ref_anchor, sy = tl.load(ref_state_ptr + row), tl.load(ref_state_ptr + n_rows + row)
    m = mixture_of(anchor, ref_anchor, sx, sy, weight, ref_weight)
    scale = -tl.load(grad_jsd_ptr + row).to(tl.float32) * weight / (temperature * sx)
    a, b = scale * tl.load(mixture_kl_ptr + row) + (m.shift - m.shift), scale * LN2
    TILE: tl.constexpr = STEPS * N * LANE
    offsets = step_offsets(0, STEPS * N, LANE)
    last = start + whole_tiles(end - start, tile)
    for i in range(start, last, TILE):
        write_mixture_gradient(g_row, i + offsets, None, x, y, m, a, b)
    at, whole = vectors_of_tile(last, end, tile)
    write_mixture_gradient(g_row, at, whole, x, y, m, a, b)
    if LANE > 1:
        few, there = outside_vectors(before, end, tile)
        write_mixture_gradient(g_row, few, there, x, y, m, a, b)
