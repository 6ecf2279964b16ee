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
    fold_tile,
    lane_max,
    lane_min,
    load,
    load_pair,
    row_pointer,
)


@triton.jit
def fold_anchored(
    x_ptr, y_ptr, xt, yt, n_full, n_rest, k, ref_k, softcap, ref_softcap,
    STEPS: tl.constexpr, N: tl.constexpr, LANE: tl.constexpr, HAS_REF: tl.constexpr,
):  # fmt: skip
    """The state of `n_full` tiles and `n_rest` logits of a last one, and whether it is sound.

    The anchor is fixed before the loop, at the larger of the first tile's maximum and the sampled
    token's logit, which is nearly always near the row's largest.
    """
    TILE: tl.constexpr = STEPS * N * LANE
    x, y = load_pair(
        x_ptr, y_ptr, softcap, ref_softcap, n_full * TILE + n_rest, STEPS, N, LANE, HAS_REF
    )  # fmt: skip
    anchor = tl.maximum(tl.maximum(tl.max(lane_max(x), 0), xt) * k, EMPTY_ANCHOR)
    ref_anchor = tl.maximum(tl.maximum(tl.max(lane_max(y), 0), yt) * ref_k, EMPTY_ANCHOR)
    # A row that rules tokens out mostly does so in the first tile too; unguarded, it would be
    # folded in vain. (The last tile is guarded: there are the columns a vocabulary is padded by.)
    hopeless = tl.min(tl.minimum(lane_min(x) * k, lane_min(y) * ref_k), 0) == -INF
    n_tried = tl.where(hopeless, 0, n_full)
    s = empty_state(anchor, ref_anchor, N)
    for _ in range(n_tried):
        x, y = load_pair(x_ptr, y_ptr, softcap, ref_softcap, None, STEPS, N, LANE, HAS_REF)
        s = fold_tile(s, x, y, k, ref_k, HAS_REF, False)
        x_ptr += TILE
        y_ptr += TILE
    x, y = load_pair(x_ptr, y_ptr, softcap, ref_softcap, n_rest, STEPS, N, LANE, HAS_REF)
    s = fold_tile(s, x, y, k, ref_k, HAS_REF, True)
    s = add_all(s, anchor, ref_anchor)
    return s, is_sound(s, HAS_REF) & (n_tried == n_full)


@triton.jit
def fold_raised(s, x, y, k, ref_k, HAS_REF: tl.constexpr):
    """Raise each lane's anchors to its running maximum, then fold."""
    anchor = tl.maximum(s.anchor, lane_max(x) * k)
    ref_anchor = s.ref_anchor
    if HAS_REF:
        ref_anchor = tl.maximum(ref_anchor, lane_max(y) * ref_k)
    return fold_tile(move(s, anchor, ref_anchor, HAS_REF), x, y, k, ref_k, HAS_REF, True)


@triton.jit
def fold_running_max(
    x_ptr, y_ptr, n_full, n_rest, k, ref_k, softcap, ref_softcap,
    STEPS: tl.constexpr, N: tl.constexpr, LANE: tl.constexpr, HAS_REF: tl.constexpr,
):  # fmt: skip
    """The same state, whatever the logits hold."""
    s = empty_state(EMPTY_ANCHOR, EMPTY_ANCHOR, N)
    for _ in range(n_full):
        x, y = load_pair(x_ptr, y_ptr, softcap, ref_softcap, None, STEPS, N, LANE, HAS_REF)
        s = fold_raised(s, x, y, k, ref_k, HAS_REF)
        x_ptr += STEPS * N * LANE
        y_ptr += STEPS * N * LANE
    x, y = load_pair(x_ptr, y_ptr, softcap, ref_softcap, n_rest, STEPS, N, LANE, HAS_REF)
    return merge_all(fold_raised(s, x, y, k, ref_k, HAS_REF), HAS_REF)


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


# Sizes that change from batch to batch must not compile anew; LANE says what is known of strides.
@triton.jit(
    do_not_specialize=[
        "n_rows", "n_tokens", "n_splits",
        "batch_stride", "token_stride", "ref_batch_stride", "ref_token_stride",
    ]
)  # fmt: skip
def fold_kernel(
    logits_ptr,  # [B, T, V]
    ref_ptr,  # [B, T, V] or None
    token_ids_ptr,  # [B, T]
    mask_ptr,  # [B, T] or None
    states_ptr,  # [fields, splits, B T]
    n_rows, n_tokens, vocab_size, n_splits,
    batch_stride, token_stride, ref_batch_stride, ref_token_stride,
    k, ref_k, softcap, ref_softcap,
    SPLIT: tl.constexpr, STEPS: tl.constexpr, N: tl.constexpr, LANE: tl.constexpr,
):  # fmt: skip
    """One program per row and split of the vocabulary: fold it, store its state."""
    HAS_REF: tl.constexpr = ref_ptr is not None
    row, split = tl.program_id(0) // n_splits, tl.program_id(0) % n_splits
    if mask_ptr is not None:  # noqa: SIM102  only the outer test is known at compile time
        if tl.load(mask_ptr + row) == 0:
            return
    x_row = row_pointer(logits_ptr, row, n_tokens, batch_stride, token_stride, LANE)
    y_row = x_row
    if HAS_REF:
        y_row = row_pointer(ref_ptr, row, n_tokens, ref_batch_stride, ref_token_stride, LANE)
    token = tl.load(token_ids_ptr + row)
    token = tl.minimum(tl.maximum(token, 0), vocab_size - 1)
    xt = load(x_row, token, softcap)
    yt = xt
    if HAS_REF:
        yt = load(y_row, token, ref_softcap)
    start = split * SPLIT
    size = tl.minimum(SPLIT, vocab_size - start)
    n_full = (size - 1) // (STEPS * N * LANE)
    n_rest = size - n_full * (STEPS * N * LANE)
    x_ptr, y_ptr = x_row + start, y_row + start
    s, sound = fold_anchored(
        x_ptr, y_ptr, xt, yt, n_full, n_rest, k, ref_k, softcap, ref_softcap,
        STEPS, N, LANE, HAS_REF,
    )  # fmt: skip
    if not sound:
        s = fold_running_max(
            x_ptr, y_ptr, n_full, n_rest, k, ref_k, softcap, ref_softcap, STEPS, N, LANE, HAS_REF
        )  # fmt: skip
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
def token_logit(
    logits_ptr, rows, token, counts, n_tokens, vocab_size, batch_stride, token_stride, softcap
):  # fmt: skip
    """The tokens' logits after softcap, NaN where there is no such token."""
    in_range = (token >= 0) & (token < vocab_size)
    row_ptr = row_pointer(logits_ptr, rows, n_tokens, batch_stride, token_stride, 1)
    return tl.where(in_range, load(row_ptr, token, softcap, counts & in_range), float("nan"))


@triton.jit(
    do_not_specialize=[
        "n_rows", "n_tokens", "n_splits",
        "batch_stride", "token_stride", "ref_batch_stride", "ref_token_stride",
    ]
)  # fmt: skip
def finish_kernel(
    states_ptr,  # [fields, splits, B T]
    logits_ptr,  # [B, T, V]
    ref_ptr,  # [B, T, V] or None
    token_ids_ptr,  # [B, T]
    mask_ptr,  # [B, T] or None
    logprob_ptr, ref_logprob_ptr, kl_ptr, forward_kl_ptr, entropy_ptr,  # [B, T]; None without ref
    policy_state_ptr, ref_state_ptr,  # [2, B, T]
    rewards_ptr, correction_ptr,  # [B, T], or None: no reward epilogue
    scores_ptr, score_index_ptr,  # [B]
    n_rows, n_tokens, vocab_size, n_splits,
    batch_stride, token_stride, ref_batch_stride, ref_token_stride,
    k, ref_k, softcap, ref_softcap, kl_coef, kl_clip,
    ESTIMATOR: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One thread per row: merge the splits in order, finish, store; masked rows are exactly 0."""
    HAS_REF: tl.constexpr = ref_ptr is not None
    rows, valid, counts = rows_of_program(mask_ptr, n_rows, ROWS)
    s = within_reach(merge_splits(states_ptr, rows, counts, n_rows, n_splits, HAS_REF))
    token = tl.load(token_ids_ptr + rows, counts, 0)
    xt = token_logit(
        logits_ptr, rows, token, counts, n_tokens, vocab_size, batch_stride, token_stride, softcap
    )  # fmt: skip
    yt = xt
    if HAS_REF:
        yt = token_logit(
            ref_ptr, rows, token, counts, n_tokens, vocab_size,
            ref_batch_stride, ref_token_stride, ref_softcap,
        )  # fmt: skip
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


@triton.jit(
    do_not_specialize=[
        "n_rows", "n_tokens", "n_splits",
        "batch_stride", "token_stride", "ref_batch_stride", "ref_token_stride",
    ]
)  # fmt: skip
def part_kernel(
    states_ptr,  # [fields, splits, B T]
    logits_ptr,  # [B, T, V]
    ref_ptr,  # [B, T, V] or None
    token_ids_ptr,  # [B, T]
    mask_ptr,  # [B, T] or None
    state_ptr,  # [9 or 4, B, T]: schemas.STATE_FIELDS
    n_rows, n_tokens, vocab_size, n_splits,
    batch_stride, token_stride, ref_batch_stride, ref_token_stride,
    k, ref_k, softcap, ref_softcap,
    ROWS: tl.constexpr,
):  # fmt: skip
    """One thread per row: merge the splits in order, store; masked rows are exactly 0."""
    HAS_REF: tl.constexpr = ref_ptr is not None
    rows, valid, counts = rows_of_program(mask_ptr, n_rows, ROWS)
    s = merge_splits(states_ptr, rows, counts, n_rows, n_splits, HAS_REF)
    token = tl.load(token_ids_ptr + rows, counts, 0)
    outside = token == NO_TOKEN
    xt = token_logit(
        logits_ptr, rows, token, counts, n_tokens, vocab_size, batch_stride, token_stride, softcap
    )  # fmt: skip
    to = state_ptr + rows
    stride = n_rows.to(tl.int64)
    store(to, s.anchor, counts, valid)
    store(to + stride, s.sx, counts, valid)
    store(to + 2 * stride, s.ex, counts, valid)
    store(to + 3 * stride, tl.where(outside, INF, tl.fma(xt, k, -s.anchor)), counts, valid)
    if HAS_REF:
        yt = token_logit(
            ref_ptr, rows, token, counts, n_tokens, vocab_size,
            ref_batch_stride, ref_token_stride, ref_softcap,
        )  # fmt: skip
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
