"""Tiles, in which a row's logits are read: each a tuple of [N, LANE] tensors.

N is the number of threads. LANE neighbouring logits belong to one thread, which reads them at once
(16 bytes), so that every sum over a tile stays within threads.
"""

import triton
import triton.language as tl

from kl_kernels.backends.triton.math import fold, soft_capped


@triton.jit
def row_pointer(logits_ptr, row, n_tokens, batch_stride, token_stride, LANE: tl.constexpr):
    """The first logit of row b * n_tokens + t; the launcher picked LANE to make the hint true."""
    b, t = row // n_tokens, row % n_tokens
    offset = b.to(tl.int64) * batch_stride + t.to(tl.int64) * token_stride
    return logits_ptr + tl.multiple_of(offset, LANE)


@triton.jit
def load(ptr, offsets, softcap, mask=None):
    """Logits in float32 after softcap; -inf, which counts for nothing, where the mask is False."""
    if mask is None:
        x = tl.load(ptr + offsets)
    else:
        x = tl.load(ptr + offsets, mask, float("-inf"))
    return soft_capped(x.to(tl.float32), softcap)


@triton.jit
def step_offsets(step, N: tl.constexpr, LANE: tl.constexpr):  # [N, LANE]
    lanes = tl.arange(0, N)[:, None] * LANE + tl.arange(0, LANE)[None, :]
    return step * (N * LANE) + lanes


@triton.jit
def load_tile(ptr, softcap, n_rest, STEPS: tl.constexpr, N: tl.constexpr, LANE: tl.constexpr):
    """STEPS N LANE logits, only `n_rest` of them unless that is None.

    A tuple, because Triton 3.6 takes a [STEPS, N, LANE] tensor apart through shared memory. Of rows
    that are not aligned it is one [N, STEPS] tensor: Triton's coalescing looks at the whole kernel
    for each load that is written down, and eight of them took minutes to compile.
    """
    tile = ()
    for step in tl.static_range(1 if LANE == 1 else STEPS):
        if LANE == 1:
            offsets = tl.arange(0, N)[:, None] + tl.arange(0, STEPS)[None, :] * N
        else:
            offsets = step_offsets(step, N, LANE)
        mask = None
        if n_rest is not None:
            mask = offsets < n_rest
        x = load(ptr, offsets, softcap, mask)
        tile = tile + (x,)  # noqa: RUF005  kernels know no stars
    return tile


@triton.jit
def load_pair(
    x_ptr, y_ptr, softcap, ref_softcap, n_rest,
    STEPS: tl.constexpr, N: tl.constexpr, LANE: tl.constexpr, HAS_REF: tl.constexpr,
):  # fmt: skip
    x = load_tile(x_ptr, softcap, n_rest, STEPS, N, LANE)
    y = x
    if HAS_REF:
        y = load_tile(y_ptr, ref_softcap, n_rest, STEPS, N, LANE)
    return x, y


@triton.jit
def fold_tile(s, x, y, k, ref_k, HAS_REF: tl.constexpr, GUARDED: tl.constexpr):
    """Absorb the tiles x, y into the states `s` [N]."""
    for step in tl.static_range(len(x)):
        s = fold_columns(s, x[step], y[step], k, ref_k, HAS_REF, GUARDED)
    return s


@triton.jit
def fold_columns(s, x, y, k, ref_k, HAS_REF: tl.constexpr, GUARDED: tl.constexpr):
    """Absorb x, y [N, WIDTH] into `s` [N], one column after the other.

    A chain of fma per sum: a reduction would multiply and add apart, and hold the tile's products
    in registers meanwhile.
    """
    if x.shape[1] == 1:
        s = fold(s, only_column(x), only_column(y), k, ref_k, HAS_REF, GUARDED)
    else:
        x0, x1 = halves(x)
        y0, y1 = halves(y)
        s = fold_columns(s, x0, y0, k, ref_k, HAS_REF, GUARDED)
        s = fold_columns(s, x1, y1, k, ref_k, HAS_REF, GUARDED)
    return s


@triton.jit
def only_column(x):  # [N, 1] -> [N]
    return tl.reshape(x, (x.shape[0],))


@triton.jit
def halves(x):  # [N, WIDTH] -> two [N, WIDTH / 2], even and odd columns
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))


@triton.jit
def lane_max(tile):  # -> [N], NaN dropped
    result = tl.max(tile[0], 1)
    for step in tl.static_range(1, len(tile)):
        result = tl.maximum(result, tl.max(tile[step], 1))
    return result


@triton.jit
def lane_min(tile):  # -> [N], NaN dropped
    result = tl.min(tile[0], 1)
    for step in tl.static_range(1, len(tile)):
        result = tl.minimum(result, tl.min(tile[step], 1))
    return result
