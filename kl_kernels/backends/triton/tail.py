"""The forward kernel of rows without some of their tokens: `fold.py`'s states of each split.

The tokens are not planted in a copy of the logits, nor subtracted from a sum of all, which would
leave nothing but rounding where they are most of it. Their ids ascend, as the tiles do: of each
tile, a thread keeps the bits of those of its logits that are to be ruled out.

Compiled for sm_90 in bfloat16, a tile takes 8.4 instructions per logit of a thread, some 4 more
where it holds ids, and 34 per id and thread: 64 ids in 63 tiles make 13 in all, of the 14 that an
H200 has slots for in the time of 2 bytes. Memory binds up to there (predicted, not measured).
"""

from typing import NamedTuple

import triton
import triton.language as tl

from kl_kernels.backends.triton.fold import fold_raised, store_state
from kl_kernels.backends.triton.math import (
    EMPTY_ANCHOR,
    Statistics,
    add_all,
    empty_state,
    is_sound,
    merge_all,
)
from kl_kernels.backends.triton.tiles import (
    SIZES,
    Model,
    Tile,
    fold_tile,
    lane_max,
    last_tile,
    load_tile,
    place_in_tile,
    row_pointer,
    rule_out,
)


class Skipped(NamedTuple):
    """Ids that ascend, counted from the first logit of a split."""

    ptr: tl.tensor  # the row's first id
    start: tl.tensor  # where the split begins
    first: tl.tensor  # number of ids before the split
    n: tl.tensor  # number of ids of the row


@triton.jit
def first_id_of(ids_ptr, start, n_ids, N: tl.constexpr):
    """The number of the row's ids below `start`."""
    below = 0
    for i in range(0, n_ids, N):
        which = i + tl.arange(0, N)
        ids = tl.load(ids_ptr + which, which < n_ids, start)
        below += tl.sum((ids < start).to(tl.int32), 0)
    return below


@triton.jit
def load_id(skipped, which, otherwise):
    """The id counted from the split, `otherwise` behind the last of them."""
    there = which < skipped.n
    id = tl.load(skipped.ptr + which, there, 0) - skipped.start
    return tl.where(there, id, otherwise)


@triton.jit
def tail_tile(x, start, size, skipped, which, tile: tl.constexpr):
    """The tile at `start` without the ids from the `which`-th on; the first id behind the tile."""
    TILE: tl.constexpr = tile.STEPS * tile.N * tile.LANE
    xs = load_tile(x, start, size, tile)
    end = start + TILE
    before = which
    bits = tl.zeros((tile.N,), tl.int32)
    id = load_id(skipped, which, end)
    while id < end:
        thread, own = place_in_tile((id - start).to(tl.int32), tile)
        bits = bits | tl.where(tl.arange(0, tile.N) == thread, 1 << own, 0)
        which += 1
        id = load_id(skipped, which, end)
    if which > before:  # most tiles have none
        xs = rule_out(xs, bits, tile)
    return xs, which


@triton.jit
def fold_tail_anchored(x, size, skipped, tile: tl.constexpr):
    """`fold.fold_anchored` around the first tile's largest logit, guarded: it meets -inf."""
    TILE: tl.constexpr = tile.STEPS * tile.N * tile.LANE
    last = last_tile(size, tile)
    xs, which = tail_tile(x, 0, size, skipped, skipped.first, tile)
    anchor = tl.maximum(tl.max(lane_max(xs), 0) * x.k, EMPTY_ANCHOR)
    s = empty_state(anchor, anchor, tile.N)
    which = skipped.first
    for i in range(0, last, TILE):
        xs, which = tail_tile(x, i, None, skipped, which, tile)
        s = fold_tile(s, xs, xs, x.k, x.k, False, True)
    xs, which = tail_tile(x, last, size - last, skipped, which, tile)
    s = fold_tile(s, xs, xs, x.k, x.k, False, True)
    s = add_all(s, anchor, anchor)
    of: tl.constexpr = Statistics(False, False, True)
    return s, is_sound(s, of, False)


@triton.jit
def fold_tail_running_max(x, size, skipped, tile: tl.constexpr):
    """The same state, whatever the logits hold."""
    last = last_tile(size, tile)
    s = empty_state(EMPTY_ANCHOR, EMPTY_ANCHOR, tile.N)
    which = skipped.first
    for i in range(0, last, tile.STEPS * tile.N * tile.LANE):
        xs, which = tail_tile(x, i, None, skipped, which, tile)
        s = fold_raised(s, xs, xs, x.k, x.k, False)
    xs, which = tail_tile(x, last, size - last, skipped, which, tile)
    return merge_all(fold_raised(s, xs, xs, x.k, x.k, False), False)


@triton.jit(do_not_specialize=[*SIZES, "n_ids"])
def tail_kernel(
    logits_ptr,  # [B, T, V]
    skipped_ptr,  # [B, T, K]
    mask_ptr,  # [B, T] or None
    states_ptr,  # [fields, splits, B T]
    n_rows,
    n_tokens,
    vocab_size,
    n_splits,
    n_ids,
    batch_stride,
    token_stride,
    k,
    softcap,
    SPLIT: tl.constexpr,
    STEPS: tl.constexpr,
    N: tl.constexpr,
    LANE: tl.constexpr,
):
    """One program per row and split of the vocabulary: fold it, store its state."""
    tile: tl.constexpr = Tile(STEPS, N, LANE)
    row, split = tl.program_id(0) // n_splits, tl.program_id(0) % n_splits
    if mask_ptr is not None:  # noqa: SIM102  only the outer test is known at compile time
        if tl.load(mask_ptr + row) == 0:
            return
    start = split * SPLIT
    size = tl.minimum(SPLIT, vocab_size - start)
    x_row = row_pointer(logits_ptr, row, n_tokens, batch_stride, token_stride, LANE)
    x = Model(x_row + start, k, softcap)
    ids_ptr = skipped_ptr + row.to(tl.int64) * n_ids
    skipped = Skipped(ids_ptr, start, first_id_of(ids_ptr, start, n_ids, N), n_ids)
    s, sound = fold_tail_anchored(x, size, skipped, tile)
    if not sound:
        s = fold_tail_running_max(x, size, skipped, tile)
    state_ptr = states_ptr + split.to(tl.int64) * n_rows + row
    store_state(state_ptr, n_rows.to(tl.int64) * n_splits, s, False)
