"""Tiles, in which a row's logits are read: each a tuple of [N, LANE] tensors.

N is the number of threads. LANE neighbouring logits belong to one thread, which reads them at once
(16 bytes), so that every sum over a tile stays within threads.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from kl_kernels.backends.triton.math import fold, soft_capped

# Arguments that change from batch to batch must not compile a kernel anew; LANE says what is known
# of strides.
SIZES = [
    "n_rows",
    "n_tokens",
    "n_splits",
    "batch_stride",
    "token_stride",
    "ref_batch_stride",
    "ref_token_stride",
    "grad_batch_stride",
    "grad_token_stride",
]


class Model(NamedTuple):
    """A row's logits under one model, and what makes log2 units of them."""

    ptr: tl.tensor  # the row's first logit
    k: tl.tensor  # log2(e) / temperature
    softcap: tl.tensor  # or None


class Tile(NamedTuple):
    """Logits that a program reads at a time: STEPS loads of LANE logits by N threads."""

    STEPS: tl.constexpr
    N: tl.constexpr
    LANE: tl.constexpr


@triton.jit
def row_pointer(ptr, row, n_tokens, batch_stride, token_stride, LANE: tl.constexpr):
    """The first logit of row b * n_tokens + t; the launcher picked LANE to make the hint true."""
    b, t = row // n_tokens, row % n_tokens
    offset = b.to(tl.int64) * batch_stride + t.to(tl.int64) * token_stride
    return ptr + tl.multiple_of(offset, LANE)


@triton.jit
def logits_before_vectors(row, LANE: tl.constexpr):
    """Number of logits between a row's start and the next address that LANE of them align at."""
    BYTES: tl.constexpr = row.dtype.element_ty.primitive_bitwidth // 8
    return (-(row.to(tl.int64) // BYTES) & (LANE - 1)).to(tl.int32)


@triton.jit
def first_vector(row, before, LANE: tl.constexpr):
    """The row's first vector, `before` logits from its start."""
    BYTES: tl.constexpr = row.dtype.element_ty.primitive_bitwidth // 8
    return tl.multiple_of(row + before, LANE * BYTES)


@triton.jit
def last_tile(size, tile: tl.constexpr):
    """Where the last tile of `size` logits starts; it has at least one."""
    TILE: tl.constexpr = tile.STEPS * tile.N * tile.LANE
    return (size - 1) // TILE * TILE


@triton.jit
def whole_tiles(size, tile: tl.constexpr):
    """Logits in whole tiles; none of a negative `size`."""
    TILE: tl.constexpr = tile.STEPS * tile.N * tile.LANE
    return tl.maximum(size, 0) // TILE * TILE


@triton.jit
def load(x, offsets, mask=None):
    """Logits in float32 after softcap; -inf, which counts for nothing, where the mask is False."""
    if mask is None:
        logits = tl.load(x.ptr + offsets)
    else:
        logits = tl.load(x.ptr + offsets, mask, float("-inf"))
    return soft_capped(logits.to(tl.float32), x.softcap)


@triton.jit
def step_offsets(step, N: tl.constexpr, LANE: tl.constexpr):  # [N, LANE]
    lanes = tl.arange(0, N)[:, None] * LANE + tl.arange(0, LANE)[None, :]
    return step * (N * LANE) + lanes


@triton.jit
def vectors_of_tile(start, end, tile: tl.constexpr):  # [STEPS * N, LANE], [STEPS * N, 1]
    """Offsets of the tile at `start`, and which of its vectors end before `end`: whole ones."""
    offsets = start + step_offsets(0, tile.STEPS * tile.N, tile.LANE)
    vectors = start + tl.arange(0, tile.STEPS * tile.N)[:, None] * tile.LANE
    return offsets, vectors + tile.LANE <= end


@triton.jit
def outside_vectors(before, end, tile: tl.constexpr):  # [N], [N]
    """Offsets of the logits in no vector, one per thread: the `before` there are before the first
    vector, and fewer than LANE behind the last one that ends before `end`; which there are.
    """
    i = tl.arange(0, tile.N) - before
    offsets = tl.where(i < 0, i, tl.maximum(end, 0) // tile.LANE * tile.LANE + i)
    return offsets, offsets < end


@triton.jit
def load_tile(x, start, size, tile: tl.constexpr):
    """The row's logits from `start` on, -inf behind `size` of them unless that is None.

    A tuple, because Triton 3.6 takes a [STEPS, N, LANE] tensor apart through shared memory. Of rows
    that are not aligned it is one [N, STEPS] tensor: Triton's coalescing looks at the whole kernel
    for each load that is written down, and eight of them took minutes to compile.
    """
    x = Model(x.ptr + start, x.k, x.softcap)
    result = ()
    for step in tl.static_range(1 if tile.LANE == 1 else tile.STEPS):
        if tile.LANE == 1:
            steps = tl.arange(0, tile.STEPS)[None, :] * tile.N
            offsets = tl.arange(0, tile.N)[:, None] + steps
        else:
            offsets = step_offsets(step, tile.N, tile.LANE)
        mask = None
        if size is not None:
            mask = offsets < size
        result = result + (load(x, offsets, mask),)  # noqa: RUF005  kernels know no stars
    return result


@triton.jit
def load_pair(x, y, start, size, tile: tl.constexpr, HAS_REF: tl.constexpr):
    """The tiles of both models, the policy's twice without a reference."""
    policy = load_tile(x, start, size, tile)
    ref = policy
    if HAS_REF:
        ref = load_tile(y, start, size, tile)
    return policy, ref


@triton.jit
def place_in_tile(offset, tile: tl.constexpr):
    """The thread that `load_tile` brings a logit to, and which of that thread's logits it is."""
    vector = offset // tile.LANE
    return vector % tile.N, vector // tile.N * tile.LANE + offset % tile.LANE


@triton.jit
def rule_out(xs, bits, tile: tl.constexpr):
    """The tile without the logits whose bit is set in their thread's `bits` [N]."""
    result = ()
    for step in tl.static_range(len(xs)):
        own = step * tile.LANE + tl.arange(0, xs[0].shape[1])
        chosen = ((bits[:, None] >> own[None, :]) & 1) != 0
        result = result + (tl.where(chosen, float("-inf"), xs[step]),)  # noqa: RUF005
    return result


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
