"""How the reference backend takes logits: rows in groups, the vocabulary in blocks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kl_kernels.algebra import (
    EMPTY_ANCHOR,
    FARTHEST_ANCHOR,
    RowState,
    Scale,
    empty_state,
    fold,
    merge,
    move,
)

EMPTY_SAVED_ANCHOR = -1.0e38  # of an all -inf part, in float32
BLOCK_V = 8192
GROUP_ELEMENTS = 1 << 21  # rows are taken in groups of about this many logits per block


def fold_rows(
    policy: Scale,
    ref: Scale,
    logits: Tensor,  # [B, T, V]
    ref_logits: Tensor,  # [B, T, V]
    rows: tuple[Tensor, Tensor],
) -> RowState:
    state = empty_state(len(rows[0]), logits.device)
    for block in blocks(logits):
        here = (*rows, block)
        state = merge(state, fold(policy(logits[here]), ref(ref_logits[here])))
    return state


def as_saved(s: RowState, dtype: torch.dtype) -> RowState:
    """The saved anchor is what backward will subtract, so the saved sums have to belong to it.

    Beyond reach it is the next number above, from which sums are small or 0: so a part of a row
    that lies far below the others adds nothing, where an overflow would make all of the row NaN.
    """
    lowest = EMPTY_ANCHOR if dtype == torch.float64 else EMPTY_SAVED_ANCHOR

    def saved(anchor: Tensor) -> Tensor:
        kept = anchor.clamp_min(lowest)
        nearest = kept.to(dtype)
        up = (kept.abs() > FARTHEST_ANCHOR) & (nearest.double() < kept)
        above = torch.nextafter(nearest, torch.full_like(nearest, torch.inf))
        return torch.where(up, above, nearest).double()

    return move(s, saved(s.anchor), saved(s.ref_anchor))


def row_groups(logits: Tensor, mask: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Indices (b, t) of the rows to work on, a bounded number at a time."""
    n_batch, n_tokens, vocab_size = logits.shape
    if mask is None:
        mask = torch.ones(n_batch, n_tokens, dtype=torch.bool, device=logits.device)
    group = max(1, GROUP_ELEMENTS // min(vocab_size, BLOCK_V))
    b, t = mask.nonzero(as_tuple=True)
    if len(b):
        yield from zip(b.split(group), t.split(group))


def blocks(logits: Tensor) -> Iterator[slice]:
    vocab_size = logits.shape[-1]
    for start in range(0, vocab_size, BLOCK_V):
        yield slice(start, min(start + BLOCK_V, vocab_size))
