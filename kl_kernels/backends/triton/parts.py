"""Rows whose vocabulary comes in parts: `algebra/parts.py` in one kernel, in float64.

A few numbers per row and part: what a launch costs, not arithmetic, is the time of it.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from kl_kernels.backends.triton.fold import rows_of_program, store
from kl_kernels.backends.triton.math import FARTHEST_ANCHOR, INF, KEEP_NAN, LN2


class PartState(NamedTuple):
    """One part's state of rows [ROWS], in float64; see `schemas.STATE_FIELDS`."""

    anchor: tl.tensor
    sx: tl.tensor
    ex: tl.tensor
    token_tx: tl.tensor
    ref_anchor: tl.tensor
    sy: tl.tensor
    rk: tl.tensor
    fk: tl.tensor
    token_ty: tl.tensor


@triton.jit
def load_field(part_ptr, field: tl.constexpr, n_rows, counts):
    return tl.load(part_ptr + field * n_rows, counts, 0.0).to(tl.float64)


@triton.jit
def load_part(part_ptr, n_rows, counts, HAS_REF: tl.constexpr):
    """Without a reference the policy is its own."""
    anchor = load_field(part_ptr, 0, n_rows, counts)
    sx = load_field(part_ptr, 1, n_rows, counts)
    ex = load_field(part_ptr, 2, n_rows, counts)
    tx = load_field(part_ptr, 3, n_rows, counts)
    ref_anchor, sy, rk, fk, ty = anchor, sx, tl.zeros_like(sx), tl.zeros_like(sx), tx
    if HAS_REF:
        ref_anchor = load_field(part_ptr, 4, n_rows, counts)
        sy = load_field(part_ptr, 5, n_rows, counts)
        rk = load_field(part_ptr, 6, n_rows, counts)
        fk = load_field(part_ptr, 7, n_rows, counts)
        ty = load_field(part_ptr, 8, n_rows, counts)
    return PartState(anchor, sx, ex, tx, ref_anchor, sy, rk, fk, ty)


@triton.jit
def moved(s, anchor, ref_anchor):
    """The same state measured from other anchors; an infinite sum stays infinite."""
    da, db = anchor - s.anchor, ref_anchor - s.ref_anchor
    ca, cb = tl.exp2(-da), tl.exp2(-db)
    return PartState(
        anchor,
        ca * s.sx,
        ca * (s.ex - da * s.sx),
        s.token_tx - da,
        ref_anchor,
        cb * s.sy,
        tl.where(s.rk == INF, s.rk, ca * (s.rk - (da - db) * s.sx)),
        tl.where(s.fk == INF, s.fk, cb * (s.fk - (db - da) * s.sy)),
        s.token_ty - db,
    )


@triton.jit
def tile_the_vocabulary(ranges_ptr, n_parts, PARTS: tl.constexpr):
    """Whether each part begins where those before it end: together they are 0 to V - 1."""
    own, other = tl.arange(0, PARTS)[:, None], tl.arange(0, PARTS)[None, :]
    start = tl.load(ranges_ptr + 2 * own, own < n_parts, 0.0)
    other_start = tl.load(ranges_ptr + 2 * other, other < n_parts, float("inf"))
    size = tl.load(ranges_ptr + 2 * other + 1, other < n_parts, 0.0)
    before = (other_start < start) | ((other_start == start) & (other < own))
    end = tl.sum(tl.where(before, size.to(tl.float64), 0.0), 1)[:, None]
    misplaced = (end != start) & (own < n_parts)
    return tl.sum(misplaced.to(tl.int32)) == 0


@triton.jit(do_not_specialize=["n_rows", "n_parts"])
def finish_parts_kernel(
    states_ptr,  # [parts, 9 or 4, B, T]
    ranges_ptr,  # [parts, 2] or None
    mask_ptr,  # [B, T] or None
    logprob_ptr,  # [B, T]
    ref_logprob_ptr,  # [B, T]
    kl_ptr,  # [B, T]
    forward_kl_ptr,  # [B, T]
    entropy_ptr,  # [B, T]
    policy_state_ptr,  # [2, B, T]
    ref_state_ptr,  # [2, B, T]
    n_rows,
    n_parts,
    HAS_REF: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One thread per row: merge the parts in order, finish, store; masked rows are exactly 0."""
    FIELDS: tl.constexpr = 9 if HAS_REF else 4
    rows, valid, counts = rows_of_program(mask_ptr, n_rows, ROWS)
    stride = FIELDS * n_rows.to(tl.int64)
    part_ptr = states_ptr + rows
    first = load_part(part_ptr, n_rows, counts, HAS_REF)
    anchor, ref_anchor = first.anchor, first.ref_anchor
    holders = (first.token_tx != INF).to(tl.int32)
    for i in range(1, n_parts):
        s = load_part(part_ptr + i * stride, n_rows, counts, HAS_REF)
        anchor = tl.maximum(anchor, s.anchor, KEEP_NAN)
        ref_anchor = tl.maximum(ref_anchor, s.ref_anchor, KEEP_NAN)
        holders += (s.token_tx != INF).to(tl.int32)
    s = moved(first, anchor, ref_anchor)
    sx, sy, ex, rk, fk, tx, ty = s.sx, s.sy, s.ex, s.rk, s.fk, s.token_tx, s.token_ty
    for i in range(1, n_parts):
        part = load_part(part_ptr + i * stride, n_rows, counts, HAS_REF)
        s = moved(part, anchor, ref_anchor)
        sx += s.sx
        sy += s.sy
        ex += s.ex
        rk += s.rk
        fk += s.fk
        tx = tl.minimum(tx, s.token_tx, KEEP_NAN)
        ty = tl.minimum(ty, s.token_ty, KEEP_NAN)

    right = holders == 1
    if ranges_ptr is not None:
        right = right & tile_the_vocabulary(ranges_ptr, n_parts, PARTS)
    nan = float("nan")
    sx = tl.where(right & (tl.abs(anchor) <= FARTHEST_ANCHOR), sx, nan)
    sy = tl.where(right & (tl.abs(ref_anchor) <= FARTHEST_ANCHOR), sy, nan)
    ln_sx, ln_sy = tl.log(sx), tl.log(sy)
    kl = rk / sx * LN2 - (ln_sx - ln_sy)
    forward_kl = fk / sy * LN2 + (ln_sx - ln_sy)
    store(logprob_ptr + rows, tx * LN2 - ln_sx, counts, valid)
    store(ref_logprob_ptr + rows, ty * LN2 - ln_sy, counts, valid)
    store(kl_ptr + rows, tl.maximum(kl, 0.0, KEEP_NAN), counts, valid)
    store(forward_kl_ptr + rows, tl.maximum(forward_kl, 0.0, KEEP_NAN), counts, valid)
    entropy = tl.maximum(ln_sx - ex / sx * LN2, 0.0, KEEP_NAN)
    store(entropy_ptr + rows, entropy, counts, valid)
    store(policy_state_ptr + rows, tl.where(right, anchor, nan), counts, valid)
    store(policy_state_ptr + n_rows + rows, sx, counts, valid)
    store(ref_state_ptr + rows, tl.where(right, ref_anchor, nan), counts, valid)
    store(ref_state_ptr + n_rows + rows, sy, counts, valid)
