"""The verbs of `row.py` on rows that list a few entries each, one row's after the other's.

Nothing that is computed here of a row without entries is a number. Sums are in the order of the
entries, so that they depend on their own row alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kl_kernels.algebra.row import (
    EMPTY_ANCHOR,
    Coefficients,
    Finished,
    RowState,
    backward,
    finish,
    from_anchor,
    summands,
)


class Segments(NamedTuple):
    """Rows of entries; row r has those from offsets[r] to before offsets[r + 1]."""

    offsets: Tensor  # [rows + 1] int64
    row: Tensor  # [nnz] the row of each entry

    @classmethod
    def of(cls, offsets: Tensor, n_entries: int) -> Segments:
        """Rows without any access out of bounds, even by offsets that nobody has looked at."""
        offsets = offsets.long().clamp(0, n_entries).cummax(0).values
        entries = torch.arange(n_entries, device=offsets.device)
        row = torch.searchsorted(offsets, entries, right=True) - 1
        return cls(offsets, row.clamp(0, max(len(offsets) - 2, 0)))

    def sum(self, values: Tensor) -> Tensor:  # [nnz] -> [rows]
        return torch.segment_reduce(values, "sum", offsets=self.offsets, initial=0.0)

    def max(self, values: Tensor) -> Tensor:  # [nnz] -> [rows]
        """The largest; -inf of no values."""
        return torch.segment_reduce(values, "max", offsets=self.offsets, initial=-torch.inf)

    def only(self, values: Tensor, chosen: Tensor) -> Tensor:  # [nnz], [nnz] bool -> [rows]
        """The value of the one entry that is chosen; -inf where none is."""
        return self.max(values.masked_fill(~chosen, -torch.inf))


class Entries(NamedTuple):
    """Scaled logits of the entries, in log2 units, each [nnz] float64."""

    x: Tensor
    y: Tensor
    is_token: Tensor  # bool: the entry is its row's token
    segments: Segments

    def finish(self) -> tuple[RowState, Finished]:
        """Anchors, sums and statistics of each row; a token that is not listed has -inf."""
        s = self.segments
        anchor, ref_anchor = (s.max(v).clamp_min(EMPTY_ANCHOR) for v in (self.x, self.y))
        terms = summands(self.x[:, None], self.y[:, None], anchor[s.row], ref_anchor[s.row])
        state = RowState(anchor, ref_anchor, *(s.sum(term[:, 0]) for term in terms))
        return state, finish(state, s.only(self.x, self.is_token), s.only(self.y, self.is_token))

    def backward(self, state: RowState, c: Coefficients, own: Tensor) -> Tensor:  # -> [nnz]
        """The gradient of each entry, with `own` [rows] added to that of the row's token."""
        row = self.segments.row
        tx = from_anchor(self.x[:, None], state.anchor[row])
        ty = from_anchor(self.y[:, None], state.ref_anchor[row])
        gradient = backward(tx, ty, Coefficients(*(v[row] for v in c)))[:, 0]
        return torch.where(self.is_token, gradient + own[row], gradient)
