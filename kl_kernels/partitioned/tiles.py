"""The logits of a linear head, a tile at a time: how large tiles are, and how they are multiplied.

A tile is [rows, columns] of the logits of a head, rows being tokens and columns vocabulary, in
float32 (float64 for float64 heads). It is never rounded to the dtype of its factors: logits of
bfloat16 have three significant digits, and training with them is biased.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kl_kernels.partitioned.products import (
    Multiplication,
    Terms,
    multiplication,
    multiply,
    terms_of,
)
from kl_kernels.schemas import NO_TOKEN

# Rows and columns start at multiples of this, so that slices keep the alignment kernels like.
ALIGNMENT = 64


class Head(NamedTuple):
    """A linear head and its input: logits = hidden @ weight.T + bias."""

    hidden: Tensor  # [B, T, d]
    weight: Tensor  # [V, d]
    bias: Tensor | None  # [V]
    precision: str = "narrow"  # a GradientPrecision

    @property
    def tile_dtype(self) -> torch.dtype:
        wide = torch.float64 in (self.hidden.dtype, self.weight.dtype)
        return torch.float64 if wide else torch.float32

    @property
    def multiplication(self) -> Multiplication:
        return multiplication(self.hidden, self.weight, self.tile_dtype, self.precision)


class Rows:
    """The tokens that count, numbered from 0: all of [B, T], those under a mask, or those listed.

    Args:
        shape: of the tokens, (B, T).
        which: a mask, [B, T] bool, whose number of rows is waited for; positions in the flattened
            tokens, [n]; or None.
    """

    def __init__(self, shape: torch.Size, which: Tensor | None):
        self.shape = shape
        self.index = positions(which) if which is not None and which.dtype == torch.bool else which
        self.n = shape.numel() if self.index is None else len(self.index)

    def take(self, tensor: Tensor) -> Tensor:  # [B, T, ...]
        """[n, ...]: a view of the tensor where that is possible."""
        if self.index is None:
            return tensor.flatten(0, 1)
        if tensor.is_contiguous():
            return tensor.flatten(0, 1)[self.index]
        n_tokens = self.shape[1]  # flattening would copy what does not count, too
        return tensor[self.index // n_tokens, self.index % n_tokens]

    def put(self, values: Tensor, dtype: torch.dtype) -> Tensor:  # [n, ...]
        """[B, T, ...] of that dtype, 0 where a row does not count."""
        shape = (*self.shape, *values.shape[1:])
        if self.index is None:
            return values.to(dtype).view(shape)
        result = values.new_zeros((self.shape.numel(), *values.shape[1:]), dtype=dtype)
        result[self.index] = values.to(dtype)
        return result.view(shape)

    def take_last(self, values: Tensor) -> Tensor:  # [..., B, T]
        """[..., 1, n]: numbers of the rows, as kernels take them."""
        flat = values.flatten(-2)
        return (flat if self.index is None else flat[..., self.index])[..., None, :]

    def put_last(self, values: Tensor) -> Tensor:  # [..., 1, n]
        """[..., B, T], 0 where a row does not count."""
        shape = (*values.shape[:-2], *self.shape)
        if self.index is None:
            return values.view(shape)
        result = values.new_zeros((*values.shape[:-2], self.shape.numel()))
        result[..., self.index] = values[..., 0, :]
        return result.view(shape)


def positions(mask: Tensor) -> Tensor:  # [B, T] bool -> [n]
    """Positions in the flattened tokens of those that count."""
    return mask.flatten().nonzero()[:, 0]


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


class TokensByColumns:
    """Token ids counted from the start of a column slice, by two operations for each slice."""

    def __init__(self, token_ids: Tensor, plan: TilePlan):  # [1, n]
        self._columns = plan.columns
        inside = (token_ids >= 0) & (token_ids < plan.vocab_size)
        self._slice = torch.where(inside, token_ids // plan.columns, -1)
        self._local = token_ids % plan.columns

    def of(self, columns: slice, outside: int = NO_TOKEN) -> Tensor:  # [1, n]
        """Ids within `columns`; `outside` where another slice holds the token, or none."""
        mine = self._slice == columns.start // self._columns
        return torch.where(mine, self._local, outside)


class Bytes(NamedTuple):
    """Memory that tiles take, besides the factors, outputs and gradients themselves."""

    logit: int
    row: int
    column: int

    def of(self, rows: int, columns: int) -> int:
        return rows * columns * self.logit + rows * self.row + columns * self.column


def bytes_of(heads: list[Head], *, gradient: bool = False, weight_gradient: bool = False) -> Bytes:
    """Count a tile for each head, terms of factors that are made for it, and sums.

    Args:
        heads: the policy's head and, if there is one, the reference's.
        gradient: the policy's tile becomes terms of a gradient.
        weight_gradient: a gradient of the policy's weight is summed up.
    """
    logit = row = column = 0
    for head in heads:
        size, how = head.tile_dtype.itemsize, head.multiplication
        logit += size
        row += _made(head.hidden, how.dtype, how.hidden)
        column += _made(head.weight, how.dtype, how.weight)
    policy, how = heads[0], heads[0].multiplication
    if gradient and how.is_narrow(policy.tile_dtype):
        logit += how.gradient * how.dtype.itemsize
    if weight_gradient and policy.weight.dtype != policy.tile_dtype:
        column += policy.weight.shape[1] * policy.tile_dtype.itemsize
    return Bytes(logit, row, column)


def _made(factor: Tensor, dtype: torch.dtype, n: int) -> int:
    """Bytes of a row of the factor's terms, unless it is its own."""
    return 0 if factor.dtype == dtype else n * factor.shape[-1] * dtype.itemsize


def plan_tiles(n_rows: int, vocab_size: int, per: Bytes, memory_budget: int) -> TilePlan:
    """The largest tiles that fit `memory_budget` bytes, as near to square as that can be.

    Square tiles read the least of the factors per logit.
    """
    if memory_budget < per.of(1, 1):
        raise ValueError(
            f"memory_budget is {memory_budget}; accepted: from {per.of(1, 1)} bytes on, which a "
            "single logit of these heads takes together with copies of its factors"
        )
    # A square tile: logit side^2 + (row + column) side = memory_budget.
    half = (per.row + per.column) / (2 * per.logit)
    side = int(math.sqrt(half * half + memory_budget / per.logit) - half)
    rows = max(1, min(n_rows, side))
    columns = (memory_budget - rows * per.row) // (rows * per.logit + per.column)
    if columns >= vocab_size:  # there is room for more rows
        columns = vocab_size
        rows = (memory_budget - columns * per.column) // (columns * per.logit + per.row)
        rows = max(1, min(n_rows, rows))
    return TilePlan(
        n_rows, vocab_size, _even(n_rows, rows, ALIGNMENT), _even(vocab_size, columns, ALIGNMENT)
    )


def _even(n: int, most: int, multiple: int) -> int:
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
        self._head = head
        self._how = head.multiplication
        self.all_hidden = rows.take(head.hidden)  # [n, d]
        self._most = plan.rows * plan.columns
        self._tile: Tensor | None = None
        self._hidden_terms = self._terms(head.hidden, self._how.hidden, plan.rows)
        self._weight_terms = self._terms(head.weight, self._how.weight, plan.columns)

    def _terms(self, factor: Tensor, n: int, size: int) -> Tensor | None:  # [n, size, d]
        """Memory for terms, if they are not the factor itself."""
        if factor.dtype == self._how.dtype:
            return None
        return factor.new_empty((n, size, factor.shape[-1]), dtype=self._how.dtype)

    def at(self, columns: slice) -> None:
        self._columns = columns
        self.weight = terms_of(self._head.weight[columns], self._weight_terms)

    def hidden(self, rows: slice) -> Terms:  # [rows, d]
        return terms_of(self.all_hidden[rows], self._hidden_terms)

    def logits(self, rows: slice, hidden: Terms | None = None) -> Tensor:
        """[rows, columns], until the next call. `hidden` of these rows may be at hand already."""
        if self._tile is None:
            self._tile = self._head.weight.new_empty(self._most, dtype=self._head.tile_dtype)
        shape = (rows.stop - rows.start, self._columns.stop - self._columns.start)
        tile = self._tile[: math.prod(shape)].view(shape)
        self.write(tile, self.hidden(rows) if hidden is None else hidden)
        return tile

    def write(self, tile: Tensor, hidden: Terms) -> None:  # [rows, columns]
        """Write the logits of some rows."""
        multiply(hidden, tuple(term.t() for term in self.weight), tile, add=False)
        if self._head.bias is not None:
            tile.add_(self._head.bias[self._columns])
