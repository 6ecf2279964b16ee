"""The logits of a linear head, a tile at a time: how large tiles are, and how they are multiplied.

A tile is [rows, columns] of the logits of a head, rows being tokens and columns vocabulary, in
float32 (float64 for float64 heads). It is never rounded to the dtype of its factors: logits of
bfloat16 have three significant digits, and training with them is biased.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

# Columns start at multiples of this, so that a tile's rows keep the alignment kernels like.
ALIGNMENT = 64

P = ParamSpec("P")
R = TypeVar("R")


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, left alone by torch.compile. (That decorator would take its types away.)"""
    reason = "tracing would unroll the loop over tiles"
    wrapped: Callable[P, R] = torch.compiler.disable(function, reason=reason)
    return wrapped


class Head(NamedTuple):
    """A linear head and its input: logits = hidden @ weight.T + bias."""

    hidden: Tensor  # [B, T, d]
    weight: Tensor  # [V, d]
    bias: Tensor | None  # [V]

    @property
    def tile_dtype(self) -> torch.dtype:
        wide = torch.float64 in (self.hidden.dtype, self.weight.dtype)
        return torch.float64 if wide else torch.float32

    @property
    def multiplies_narrow(self) -> bool:
        """Whether the device multiplies the factors as they are, accumulating a float32 tile."""
        return (
            self.hidden.is_cuda
            and self.hidden.dtype == self.weight.dtype
            and self.weight.dtype in (torch.bfloat16, torch.float16)
        )


class Rows:
    """The tokens that count, numbered from 0: all of [B, T], or those under a mask."""

    def __init__(self, token_ids: Tensor, mask: Tensor | None):  # [B, T]
        self.shape = token_ids.shape
        self.index = None if mask is None else mask.nonzero(as_tuple=True)
        self.n = token_ids.numel() if self.index is None else len(self.index[0])

    def take(self, tensor: Tensor, which: slice | None = None) -> Tensor:  # [B, T, ...]
        """[n, ...]: a view of the tensor where that is possible."""
        which = slice(0, self.n) if which is None else which
        if self.index is not None:
            return tensor[tuple(i[which] for i in self.index)]
        if self.shape[0] == 1 or tensor.stride(0) == self.shape[1] * tensor.stride(1):
            return tensor.flatten(0, 1)[which]
        flat = torch.arange(which.start, which.stop, device=tensor.device)
        return tensor[flat // self.shape[1], flat % self.shape[1]]

    def put(self, values: Tensor, dtype: torch.dtype) -> Tensor:  # [n, ...]
        """[B, T, ...] of that dtype, 0 where a row does not count."""
        shape = (*self.shape, *values.shape[1:])
        if self.index is None:
            return values.to(dtype).view(shape)
        result = values.new_zeros(shape, dtype=dtype)
        result[self.index] = values.to(dtype)
        return result


@dataclass(frozen=True)
class TilePlan:
    """Sizes of the tiles that rows and columns are cut into."""

    n_rows: int
    vocab_size: int
    rows: int  # rows of a tile, at most
    columns: int

    def row_slices(self) -> Iterator[slice]:
        return _slices(self.n_rows, self.rows)

    def column_slices(self) -> Iterator[slice]:
        return _slices(self.vocab_size, self.columns)


def _slices(n: int, step: int) -> Iterator[slice]:
    """Yield one empty slice when n is 0, so that callers need no special case."""
    return (slice(start, min(start + step, n)) for start in range(0, max(n, 1), step))


def plan_tiles(
    heads: list[Head], n_rows: int, memory_budget: int, *, weight_gradient: bool = False
) -> TilePlan:
    """The largest tiles that fit `memory_budget` bytes, as near to square as that can be.

    Square tiles read the least of the factors per logit. The budget is for a tile per head and for
    what a row or a column takes besides: copies of the factors in the tile's dtype, and the sums
    that are to become the gradient of the first head's weight.
    """
    size = max(head.tile_dtype.itemsize for head in heads)
    per_logit = len(heads) * size
    # Rows may be gathered before they are copied.
    per_row = sum(head.hidden.shape[-1] * (head.hidden.itemsize + size) for head in heads)
    copied = [head.weight for head in heads if head.weight.dtype != head.tile_dtype]
    if weight_gradient and heads[0].weight.dtype != heads[0].tile_dtype:
        copied.append(heads[0].weight)
    per_column = sum(weight.shape[1] * size for weight in copied)
    least = per_logit + per_row + per_column
    if memory_budget < least:
        raise ValueError(
            f"memory_budget is {memory_budget}; accepted: from {least} bytes on, which a single "
            "logit of these heads takes together with copies of its factors"
        )
    # A square tile: per_logit side^2 + (per_row + per_column) side = memory_budget.
    half = (per_row + per_column) / (2 * per_logit)
    side = int(math.sqrt(half * half + memory_budget / per_logit) - half)
    vocab_size = heads[0].weight.shape[0]
    rows = max(1, min(n_rows, side))
    columns = (memory_budget - rows * per_row) // (rows * per_logit + per_column)
    if columns >= vocab_size:  # there is room for more rows
        columns = vocab_size
        rows = (memory_budget - columns * per_column) // (columns * per_logit + per_row)
        rows = max(1, min(n_rows, rows))
    return TilePlan(n_rows, vocab_size, _even(n_rows, rows), _even(vocab_size, columns, ALIGNMENT))


def _even(n: int, most: int, multiple: int = 1) -> int:
    """`most` or less, so that the last of the pieces of n is not a sliver."""
    if most >= n:
        return max(n, 1)
    if most < multiple:
        return most
    most -= most % multiple
    return math.ceil(n / math.ceil(n / most) / multiple) * multiple


class Tiles:
    """The tiles of a head, each written over the one before; `at` chooses their columns."""

    def __init__(self, head: Head, rows: Rows, plan: TilePlan):
        self._head, self._rows = head, rows
        self._tile = self._buffer(plan.rows * plan.columns)
        self._copy = self._buffer(0)
        if head.weight.dtype != head.tile_dtype:
            self._copy = self._buffer(plan.columns * head.weight.shape[1])

    def _buffer(self, numel: int) -> Tensor:
        return self._head.weight.new_empty(numel, dtype=self._head.tile_dtype)

    def at(self, columns: slice) -> None:
        self._columns = columns
        self._narrow_weight = self._head.weight[columns]
        self._weight: Tensor | None = None

    @property
    def weight(self) -> Tensor:  # [columns, d]
        """In the tile's dtype."""
        if self._weight is None:
            self._weight = narrow = self._narrow_weight
            if self._copy.numel():
                self._weight = self._copy[: narrow.numel()].view(narrow.shape).copy_(narrow)
        return self._weight

    def hidden(self, rows: slice) -> Tensor:  # [rows, d]
        """In the tile's dtype."""
        return self._rows.take(self._head.hidden, rows).to(self._head.tile_dtype)

    def logits(self, rows: slice, hidden: Tensor | None = None) -> Tensor:
        """[rows, columns], until the next call. `hidden` of these rows may be at hand already."""
        head, shape = self._head, (rows.stop - rows.start, len(self._narrow_weight))
        tile = self._tile[: math.prod(shape)].view(shape)
        if head.multiplies_narrow:
            narrow = self._rows.take(head.hidden, rows)
            torch.mm(narrow, self._narrow_weight.t(), out_dtype=tile.dtype, out=tile)
        else:
            hidden = self.hidden(rows) if hidden is None else hidden
            torch.mm(hidden, self.weight.t(), out=tile)
        return tile if head.bias is None else tile.add_(head.bias[self._columns])
