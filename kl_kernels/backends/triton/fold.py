"""The forward kernels: `fold_kernel` makes a state of each split of a row, `finish_kernel` outputs.

`part_kernel` takes the place of the second where the logits are a part of a vocabulary: it merges
the splits, and leaves it at that.

Splits make enough programs of few rows, and confine a row's trouble to a part of it. Their size
comes from the vocabulary alone and they are merged in order, so a row's results never depend on how
many rows there are.
"""

import triton
import triton.language as tl

from kl_kernels.backends.triton.epilogues import reward_epilogue
from kl_kernels.backends.triton.math import (
    EMPTY_ANCHOR,
    INF,
    NO_TOKEN,
    RowState,
    Statistics,
    add_all,
    empty_state,
    finish,
    is_sound,
    merge,
    merge_all,
    move,
    within_reach,
)
from kl_kernels.backends.triton.tiles import (
    SIZES,
    Model,
    Tile,
    fold_tile,
    lane_max,
    lane_min,
    last_tile,
    load,
    load_pair,
    row_pointer,
)


@triton.jit
def fold_logits(x, y, xt, yt, size, tile: tl.constexpr, of: tl.constexpr, HAS_REF: tl.constexpr):
    """The state of the first `size` logits; xt, yt: the token's logits, wherever they are. `of`:
    `Statistics` that it is good for.

    The fast loop has fixed anchors. Where they turn out badly chosen, or logits need guarding, the
    loop with a running maximum reads the logits again.
    """
    s, sound = fold_anchored(x, y, xt, yt, size, tile, of, HAS_REF)
    if not sound:
        s = fold_running_max(x, y, size, tile, HAS_REF)
    return s


@triton.jit
def fold_anchored(x, y, xt, yt, size, tile: tl.constexpr, of: tl.constexpr, HAS_REF: tl.constexpr):
    """The state by anchors that are fixed before the loop, and whether it is sound.

    The anchor is the larger of the first tile's maximum and the sampled token's logit, which is
    nearly always near the row's largest.
    """
    TILE: tl.constexpr = tile.STEPS * tile.N * tile.LANE
    last = last_tile(size, tile)
    xs, ys = load_pair(x, y, 0, size, tile, HAS_REF)
    anchor = tl.maximum(tl.maximum(tl.max(lane_max(xs), 0), xt) * x.k, EMPTY_ANCHOR)
    ref_anchor = tl.maximum(tl.maximum(tl.max(lane_max(ys), 0), yt) * y.k, EMPTY_ANCHOR)
    # A row that rules tokens out mostly does so in the first tile too; unguarded, it would be
    # folded in vain. (The last tile is guarded: there are the columns a vocabulary is padded by.)
    hopeless = tl.min(tl.minimum(lane_min(xs) * x.k, lane_min(ys) * y.k), 0) == -INF
    tried = tl.where(hopeless, 0, last)
    s = empty_state(anchor, ref_anchor, tile.N)
    for i in range(0, tried, TILE):
        xs, ys = load_pair(x, y, i, None, tile, HAS_REF)
        s = fold_tile(s, xs, ys, x.k, y.k, HAS_REF, False)
    xs, ys = load_pair(x, y, last, size - last, tile, HAS_REF)
    s = fold_tile(s, xs, ys, x.k, y.k, HAS_REF, True)
    s = add_all(s, anchor, ref_anchor)
    return s, is_sound(s, of, HAS_REF) & (tried == last)


@triton.jit
def fold_raised(s, xs, ys, k, ref_k, HAS_REF: tl.constexpr):
    """Raise each lane's anchors to its running maximum, then fold."""
    anchor = tl.maximum(s.anchor, lane_max(xs) * k)
    ref_anchor = s.ref_anchor
    if HAS_REF:
        ref_anchor = tl.maximum(ref_anchor, lane_max(ys) * ref_k)
    return fold_tile(move(s, anchor, ref_anchor, HAS_REF), xs, ys, k, ref_k, HAS_REF, True)


@triton.jit
def fold_running_max(x, y, size, tile: tl.constexpr, HAS_REF: tl.constexpr):
    """The same state, whatever the logits hold."""
    last = last_tile(size, tile)
    s = empty_state(EMPTY_ANCHOR, EMPTY_ANCHOR, tile.N)
    for i in range(0, last, tile.STEPS * tile.N * tile.LANE):
        xs, ys = load_pair(x, y, i, None, tile, HAS_REF)
        s = fold_raised(s, xs, ys, x.k, y.k, HAS_REF)
    xs, ys = load_pair(x, y, last, size - last, tile, HAS_REF)
    return merge_all(fold_raised(s, xs, ys, x.k, y.k, HAS_REF), HAS_REF)


@triton.jit
def store_state(state_ptr, stride, s, HAS_REF: tl.constexpr):
    tl.store(state_ptr, s.anchor)
    tl.store(state_ptr + stride, s.sx)
    tl.store(state_ptr + 2 * stride, s.ex)
    if HAS_REF:
        tl.store(state_ptr + 3 * stride, s.ref_anchor)
        tl.store(state_ptr + 4 * stride, s.sy)
        tl.store(state_ptr + 5 * stride, s.rk)
        tl.store(state_ptr + 6 * stride, s.fk)
        tl.store(state_ptr + 7 * stride, s.gap)
        tl.store(state_ptr + 8 * stride, s.least_gap)


@triton.jit
def load_state(state_ptr, stride, mask, HAS_REF: tl.constexpr):
    anchor = tl.load(state_ptr, mask, 0.0)
    sx = tl.load(state_ptr + stride, mask, 1.0)
    ex = tl.load(state_ptr + 2 * stride, mask, 0.0)
    ref_anchor, sy, rk, fk, gap, least_gap = anchor, sx, ex, ex, ex, ex
    if HAS_REF:
        ref_anchor = tl.load(state_ptr + 3 * stride, mask, 0.0)
        sy = tl.load(state_ptr + 4 * stride, mask, 1.0)
        rk = tl.load(state_ptr + 5 * stride, mask, 0.0)
        fk = tl.load(state_ptr + 6 * stride, mask, 0.0)
        gap = tl.load(state_ptr + 7 * stride, mask, 0.0)
        least_gap = tl.load(state_ptr + 8 * stride, mask, 0.0)
    return RowState(anchor, ref_anchor, sx, sy, ex, rk, fk, gap, least_gap)


PARTIAL_FIELDS = 9  # fields of a split's state, which the two functions above agree on
PARTIAL_FIELDS_WITHOUT_REF = 3


@triton.jit(do_not_specialize=SIZES)
def fold_kernel(
    logits_ptr,  # [B, T, V]
    ref_ptr,  # [B, T, V] or None
    token_ids_ptr,  # [B, T]
    mask_ptr,  # [B, T] or None
    states_ptr,  # [fields, splits, B T]
    n_rows,
    n_tokens,
    vocab_size,
    n_splits,
    batch_stride,
    token_stride,
    ref_batch_stride,
    ref_token_stride,
    k,
    ref_k,
    softcap,
    ref_softcap,
    SPLIT: tl.constexpr,
    STEPS: tl.constexpr,
    N: tl.constexpr,
    LANE: tl.constexpr,
):
    """One program per row and split of the vocabulary: fold it, store its state."""
    HAS_REF: tl.constexpr = ref_ptr is not None
    tile: tl.constexpr = Tile(STEPS, N, LANE)
    row, split = tl.program_id(0) // n_splits, tl.program_id(0) % n_splits
    if mask_ptr is not None:  # noqa: SIM102  only the outer test is known at compile time
        if tl.load(mask_ptr + row) == 0:
            return
    x = Model(row_pointer(logits_ptr, row, n_tokens, batch_stride, token_stride, LANE), k, softcap)
    y = x
    if HAS_REF:
        y_row = row_pointer(ref_ptr, row, n_tokens, ref_batch_stride, ref_token_stride, LANE)
        y = Model(y_row, ref_k, ref_softcap)
    token = tl.load(token_ids_ptr + row)
    token = tl.minimum(tl.maximum(token, 0), vocab_size - 1)
    xt = load(x, token)
    yt = xt
    if HAS_REF:
        yt = load(y, token)
    start = split * SPLIT
    size = tl.minimum(SPLIT, vocab_size - start)
    x = Model(x.ptr + start, x.k, x.softcap)
    y = Model(y.ptr + start, y.k, y.softcap)
    of: tl.constexpr = Statistics(HAS_REF, HAS_REF, True)
    s = fold_logits(x, y, xt, yt, size, tile, of, HAS_REF)
    state_ptr = states_ptr + split.to(tl.int64) * n_rows + row
    store_state(state_ptr, n_rows.to(tl.int64) * n_splits, s, HAS_REF)


@triton.jit
def rows_of_program(mask_ptr, n_rows, ROWS: tl.constexpr):
    """One row per thread, [ROWS]; which of them there are, and which of those count."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = rows < n_rows
    counts = valid
    if mask_ptr is not None:
        counts = valid & (tl.load(mask_ptr + rows, valid, 0) != 0)
    return rows, valid, counts


@triton.jit
def merge_splits(states_ptr, rows, counts, n_rows, n_splits, HAS_REF: tl.constexpr):
    """The states of whole rows, one per thread, merged in the order of the splits."""
    stride = n_rows.to(tl.int64) * n_splits
    state_ptr = states_ptr + rows
    s = load_state(state_ptr, stride, counts, HAS_REF)
    for _ in range(1, n_splits):
        state_ptr += n_rows
        s = merge(s, load_state(state_ptr, stride, counts, HAS_REF), HAS_REF)
    return s


@triton.jit
def token_logit(x, token, counts, vocab_size):
    """The tokens' logits after softcap, NaN where there is no such token."""
    in_range = (token >= 0) & (token < vocab_size)
    return tl.where(in_range, load(x, token, counts & in_range), float("nan"))


@triton.jit(do_not_specialize=SIZES)
def finish_kernel(
    states_ptr,  # [fields, splits, B T]
    logits_ptr,  # [B, T, V]
    ref_ptr,  # [B, T, V] or None
    token_ids_ptr,  # [B, T]
    mask_ptr,  # [B, T] or None
    logprob_ptr,  # [B, T]
    ref_logprob_ptr,  # [B, T] or None
    kl_ptr,  # [B, T] or None
    forward_kl_ptr,  # [B, T] or None
    entropy_ptr,  # [B, T]
    policy_state_ptr,  # [2, B, T]
    ref_state_ptr,  # [2, B, T] or None
    rewards_ptr,  # [B, T], or None: no reward epilogue
    correction_ptr,  # [B, T] or None
    scores_ptr,  # [B] or None
    score_index_ptr,  # [B] or None
    n_rows,
    n_tokens,
    vocab_size,
    n_splits,
    batch_stride,
    token_stride,
    ref_batch_stride,
    ref_token_stride,
    k,
    ref_k,
    softcap,
    ref_softcap,
    kl_coef,
    kl_clip,
    ESTIMATOR: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One thread per row: merge the splits in order, finish, store; masked rows are exactly 0."""
    HAS_REF: tl.constexpr = ref_ptr is not None
    rows, valid, counts = rows_of_program(mask_ptr, n_rows, ROWS)
    s = within_reach(merge_splits(states_ptr, rows, counts, n_rows, n_splits, HAS_REF))
    token = tl.load(token_ids_ptr + rows, counts, 0)
    x = Model(row_pointer(logits_ptr, rows, n_tokens, batch_stride, token_stride, 1), k, softcap)
    xt = token_logit(x, token, counts, vocab_size)
    yt = xt
    if HAS_REF:
        y_rows = row_pointer(ref_ptr, rows, n_tokens, ref_batch_stride, ref_token_stride, 1)
        yt = token_logit(Model(y_rows, ref_k, ref_softcap), token, counts, vocab_size)
    f = finish(s, xt, yt, k, ref_k, HAS_REF)

    store(logprob_ptr + rows, f.logprob, counts, valid)
    store(entropy_ptr + rows, f.entropy, counts, valid)
    store(policy_state_ptr + rows, s.anchor, counts, valid)
    store(policy_state_ptr + n_rows + rows, s.sx, counts, valid)
    if HAS_REF:
        store(ref_logprob_ptr + rows, f.ref_logprob, counts, valid)
        store(kl_ptr + rows, f.kl, counts, valid)
        store(forward_kl_ptr + rows, f.forward_kl, counts, valid)
        store(ref_state_ptr + rows, s.ref_anchor, counts, valid)
        store(ref_state_ptr + n_rows + rows, s.sy, counts, valid)
    if rewards_ptr is not None:
        reward, correction = reward_epilogue(f, kl_coef, kl_clip, ESTIMATOR)
        b, t = rows // n_tokens, rows % n_tokens
        # The score may lie at a masked position (one after the last token).
        at_score = t == tl.load(score_index_ptr + b, valid, -1)
        score = tl.load(scores_ptr + b, valid & at_score, 0.0)
        reward = tl.where(counts, reward, 0.0) + score
        store(rewards_ptr + rows, reward, valid, valid)
        store(correction_ptr + rows, correction, counts, valid)


@triton.jit(do_not_specialize=SIZES)
def part_kernel(
    states_ptr,  # [fields, splits, B T]
    logits_ptr,  # [B, T, V]
    ref_ptr,  # [B, T, V] or None
    token_ids_ptr,  # [B, T]
    mask_ptr,  # [B, T] or None
    state_ptr,  # [9 or 4, B, T]: schemas.STATE_FIELDS
    n_rows,
    n_tokens,
    vocab_size,
    n_splits,
    batch_stride,
    token_stride,
    ref_batch_stride,
    ref_token_stride,
    k,
    ref_k,
    softcap,
    ref_softcap,
    ROWS: tl.constexpr,
):
    """One thread per row: merge the splits in order, store; masked rows are exactly 0."""
    HAS_REF: tl.constexpr = ref_ptr is not None
    rows, valid, counts = rows_of_program(mask_ptr, n_rows, ROWS)
    s = merge_splits(states_ptr, rows, counts, n_rows, n_splits, HAS_REF)
    token = tl.load(token_ids_ptr + rows, counts, 0)
    outside = token == NO_TOKEN
    x = Model(row_pointer(logits_ptr, rows, n_tokens, batch_stride, token_stride, 1), k, softcap)
    xt = token_logit(x, token, counts, vocab_size)
    to = state_ptr + rows
    stride = n_rows.to(tl.int64)
    store(to, s.anchor, counts, valid)
    store(to + stride, s.sx, counts, valid)
    store(to + 2 * stride, s.ex, counts, valid)
    store(to + 3 * stride, tl.where(outside, INF, tl.fma(xt, k, -s.anchor)), counts, valid)
    if HAS_REF:
        y_rows = row_pointer(ref_ptr, rows, n_tokens, ref_batch_stride, ref_token_stride, 1)
        yt = token_logit(Model(y_rows, ref_k, ref_softcap), token, counts, vocab_size)
        store(to + 4 * stride, s.ref_anchor, counts, valid)
        store(to + 5 * stride, s.sy, counts, valid)
        # Infinity is added, not selected: a row that is NaN for another reason stays NaN.
        rk = s.rk + tl.where(s.gap == INF, INF, 0.0)
        fk = tl.where(s.least_gap == -INF, INF, 0.0) - s.fk
        store(to + 6 * stride, rk, counts, valid)
        store(to + 7 * stride, fk, counts, valid)
        at_token = tl.where(outside, INF, tl.fma(yt, ref_k, -s.ref_anchor))
        store(to + 8 * stride, at_token, counts, valid)


@triton.jit
def store(ptr, value, counts, valid):
    """Selected, not multiplied: a masked row may hold anything."""
    tl.store(ptr, tl.where(counts, value, 0.0), valid)
