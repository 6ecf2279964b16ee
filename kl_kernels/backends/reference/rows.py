"""Logits as the reference backend reads them: rows in groups, vocabulary in blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kl_kernels.algebra.row import (
    EMPTY_ANCHOR,
    FARTHEST_ANCHOR,
    LogitTransform,
    RowState,
    empty_state,
    fold,
    from_anchor,
    merge,
    move,
)

EMPTY_SAVED_ANCHOR = -1.0e38  # the anchor of an all -inf part, in float32
BLOCK_V = 8192
GROUP_ELEMENTS = 1 << 21  # rows are taken in groups of about this many logits per block

RowIndex = tuple[Tensor, Tensor]  # the indices b and t of n rows, [n] each


class Models(NamedTuple):
    """Policy and reference: their logits and what is done to them."""

    logits: Tensor  # [B, T, V]
    ref_logits: Tensor  # [B, T, V]
    policy: LogitTransform
    ref: LogitTransform

    @classmethod
    def of(cls, args: Any) -> Models:
        """The models of an operator's arguments. A policy without a reference is its own."""
        policy = LogitTransform(args.temperature, args.softcap)
        if getattr(args, "ref_logits", None) is None:
            return cls(args.logits, args.logits, policy, policy)
        ref = LogitTransform(args.ref_temperature, args.ref_softcap)
        return cls(args.logits, args.ref_logits, policy, ref)

    def read(self, rows: RowIndex, columns: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Both models' logits there, in log2 units."""
        here = (*rows, columns)
        return self.policy(self.logits[here]), self.ref(self.ref_logits[here])

    def from_anchors(
        self, rows: RowIndex, block: slice, anchor: Tensor, ref_anchor: Tensor
    ) -> tuple[Tensor, Tensor]:
        x, y = self.read(rows, block)
        return from_anchor(x, anchor), from_anchor(y, ref_anchor)

    def fold(self, rows: RowIndex, skipped_ids: Tensor | None = None) -> RowState:  # [n, K]
        state = empty_state(len(rows[0]), self.logits.device)
        for block in blocks(self.logits):
            x, y = self.read(rows, block)
            if skipped_ids is not None:
                x, y = (_without(logits, skipped_ids - block.start) for logits in (x, y))
            state = merge(state, fold(x, y))
        return state

    def store(self, gradient: Tensor, rows: RowIndex, block: slice, grad_logits: Tensor) -> None:
        """Write the gradient of capped logits as that of the logits themselves."""
        here = (*rows, block)
        logits = self.logits[here]  # before they are written over
        grad_logits[here] = (gradient * self.policy.softcap_grad(logits)).to(grad_logits.dtype)


def as_saved(s: RowState, dtype: torch.dtype) -> RowState:
    """The saved anchor is what backward will subtract, so the saved sums must belong to it.

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


def _without(x: Tensor, ids: Tensor) -> Tensor:  # [n, block], [n, K]
    """Rule out tokens, counted from the block's first; those of other blocks change nothing."""
    n = x.shape[-1]
    elsewhere = (ids < 0) | (ids >= n)
    padded = torch.nn.functional.pad(x, (0, 1))
    return padded.scatter(-1, ids.masked_fill(elsewhere, n), -torch.inf)[:, :n]


def row_groups(logits: Tensor, mask: Tensor | None) -> Iterator[RowIndex]:
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


def rows_of_state(state: Tensor, rows: RowIndex) -> tuple[Tensor, Tensor]:  # [2, B, T]
    """The anchors and sums that were saved of those rows, [n] float64."""
    anchor, total = (field[rows].double() for field in state.unbind())
    return anchor, total
