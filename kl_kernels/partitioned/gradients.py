"""Gradients of a linear head, tile by tile.

Vocabulary is the outer loop and tokens the inner one. Terms of a stretch of the weight are then
made once, and its gradient is complete when the inner loop ends: of the largest gradient no more
than that stretch is held in float32. The gradient of the hidden states is a sum over the
vocabulary, in float32 until the outer loop ends; that is [tokens, d], where tokens outside would
hold the weight's [V, d].

A gradient of logits that is multiplied in a narrow dtype is rounded, at random but for one thing:
the entry of a row's own token is by far its largest, and advantages that are equal are rounded
alike. What that rounding takes is known beforehand and put back: sums start from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from kl_kernels.ops.library import casts_gradients
from kl_kernels.partitioned.products import Multiplication, Terms, multiply, terms_of
from kl_kernels.partitioned.tiles import (
    Head,
    Rows,
    Tiles,
    TokensByColumns,
    bytes_of,
    plan_tiles,
)
from kl_kernels.schemas import NO_TOKEN

# (logits of each head [rows, columns], which rows, token ids [1, rows] counted from the first
# column, gradient [rows, columns]): writes the gradient of the first head's logits, which may be
# their own memory. The id is NO_TOKEN where another column holds the token.
Write = Callable[[Sequence[Tensor], slice, Tensor, Tensor], None]


def differentiate(
    heads: list[Head],
    rows: Rows,
    token_ids: Tensor,  # [1, n], counted from the heads' first column
    write: Write,
    needs: Sequence[bool],
    *,
    tokens_matter: bool,
    scale: Tensor | None,  # []
    memory_budget: int,
    backend: str | None,
) -> list[Tensor | None]:
    """Sum up the gradients of the first head's hidden states and, in their dtype, weight and bias.

    Args:
        heads: the policy's head and, if the gradient depends on it, the reference's.
        rows: the tokens that count.
        token_ids: [1, n] of those.
        write: writes the gradient of a tile's logits.
        needs: which of hidden, weight and bias have a gradient.
        tokens_matter: whether a row's own token has an entry unlike the others.
        scale: what `write` multiplies the gradients of logits by; None: nothing.
        memory_budget: bytes for tiles.
        backend: the backend that `write` runs on.

    Returns:
        Gradients of hidden [n, d] (in the tiles' dtype), weight [V, d] and bias [V]; None where not
        needed.
    """
    policy = heads[0]
    needs_hidden, needs_weight, needs_bias = needs
    per = bytes_of(heads, gradient=True, weight_gradient=needs_weight)
    plan = plan_tiles(rows.n, len(policy.weight), per, memory_budget)
    tiles = [Tiles(head, rows, plan) for head in heads]
    like = policy.weight.new_empty(0, dtype=policy.tile_dtype)
    narrow = NarrowTiles(policy, plan.rows * plan.columns, casts=casts_gradients(backend, like))
    tokens = TokensByColumns(token_ids, plan)
    put_back = None
    if narrow.are_rounded and tokens_matter and rows.n > 0:
        put_back = _OwnErrors(heads, tiles, token_ids, tokens, write)
    grad_hidden = None
    if needs_hidden:
        shape = rows.n, policy.hidden.shape[-1]
        grad_hidden = policy.hidden.new_empty(shape, dtype=policy.tile_dtype)
        if put_back is not None:
            grad_hidden.copy_(put_back.in_hidden())
    grad_weight = policy.weight.new_empty(policy.weight.shape) if needs_weight else None
    grad_bias = None
    if needs_bias and policy.bias is not None:
        grad_bias = policy.bias.new_empty(policy.bias.shape)
    for columns in plan.column_slices():
        for of_head in tiles:
            of_head.at(columns)
        ids = tokens.of(columns)
        sums = _Sums(policy, columns, put_back, weight=grad_weight, bias=grad_bias)
        for which in plan.row_slices():
            hidden = tiles[0].hidden(which)
            logits = [of_head.logits(which, h) for of_head, h in zip(tiles, (hidden, None))]
            written = narrow.room(logits[0])
            write(logits, which, ids[:, which], written)
            gradient = narrow.terms(written)
            if grad_hidden is not None:
                started = put_back is not None or columns.start > 0
                multiply(gradient, tiles[0].weight, grad_hidden[which], add=started)
            sums.add(gradient, hidden)
        sums.store(scale)
    if grad_hidden is not None and scale is not None:
        grad_hidden /= scale
    return [grad_hidden, grad_weight, grad_bias]


class NarrowTiles:
    """Terms of the gradient of a tile's logits, in memory that each tile uses again.

    Args:
        head: whose logits they are.
        most: logits of the largest tile.
        casts: whether a kernel writes gradients in another dtype than the logits'; those of one
            term are rounded by the kernel then, without a pass of their own.
    """

    def __init__(self, head: Head, most: int, *, casts: bool):
        how = head.multiplication
        is_narrow = how.is_narrow(head.tile_dtype)
        self.are_rounded = is_narrow and how.gradient == 1
        self.are_written_rounded = self.are_rounded and casts
        self._memory = None
        if is_narrow:
            self._memory = head.weight.new_empty((how.gradient, most), dtype=how.dtype)

    def room(self, tile: Tensor) -> Tensor:  # [rows, columns]
        """Memory for the gradient of a tile's logits, as it is written: maybe the tile itself."""
        if not self.are_written_rounded:
            return tile
        (rounded,) = self._of(tile)  # type: ignore[misc]
        return rounded

    def terms(self, written: Tensor) -> Terms:  # [rows, columns]
        """Terms of a gradient that was written to its room."""
        return (written,) if self.are_written_rounded else terms_of(written, self._of(written))

    def _of(self, tile: Tensor) -> Tensor | None:  # [terms, rows, columns]
        """Memory for the terms of a tile; None: the tile is the only one."""
        if self._memory is None:
            return None
        return self._memory[:, : tile.numel()].view(-1, *tile.shape)


class _OwnErrors:
    """The rounding errors of the tokens' own entries, and what they are worth in each gradient."""

    def __init__(
        self,
        heads: list[Head],
        tiles: list[Tiles],
        token_ids: Tensor,  # [1, n]
        tokens: TokensByColumns,
        write: Write,
    ):
        policy = heads[0]
        inside = (token_ids >= 0) & (token_ids < len(policy.weight))
        self._policy, self._tokens = policy, tokens
        self._columns = torch.where(inside, token_ids, 0)[0]
        self._hidden = tiles[0].all_hidden
        own = [self._own_logits(head, of.all_hidden) for head, of in zip(heads, tiles)]
        ids = torch.where(inside, 0, NO_TOKEN)
        write(own, slice(0, token_ids.numel()), ids, own[0])  # in float32, as one column
        rounded = own[0].to(policy.multiplication.dtype)
        self._errors = torch.where(inside.t(), own[0] - rounded, 0.0)  # [n, 1]

    @cached_property
    def _worth(self) -> Tensor:  # [n, d], of a weight's gradient alone
        return self._hidden * self._errors

    def _own_logits(self, head: Head, hidden: Tensor) -> Tensor:  # [n, 1]
        weight = head.weight[self._columns]
        logits = (hidden * weight.to(head.tile_dtype)).sum(-1, keepdim=True)
        return logits if head.bias is None else logits + head.bias[self._columns, None]

    def in_hidden(self) -> Tensor:  # [n, d]
        return self._errors * self._policy.weight[self._columns]

    def in_weight(self, columns: slice) -> Tensor:  # [columns, d]
        return self._sums_at_tokens(self._worth, columns)

    def in_bias(self, columns: slice) -> Tensor:  # [columns]
        return self._sums_at_tokens(self._errors, columns)[:, 0]

    def _sums_at_tokens(self, values: Tensor, columns: slice) -> Tensor:
        """Sum up the values [n, ...] of each token in the columns, as [columns, ...].

        Always in the same order, unlike `index_add_`.
        """
        n = columns.stop - columns.start
        ids = self._tokens.of(columns, outside=n)[0]
        return torch.ops.aten.embedding_dense_backward(values, ids, n + 1, n, False)[:n]


def add_at_tokens(sums: Tensor, values: Tensor, token_ids: Tensor) -> None:
    """Add the values [n, ...] of each token to its sum in [V, ...].

    Always in the same order, unlike `index_add_` of tokens that repeat; and nobody waits for the
    number of tokens that differ: there is room for n sums, of which those too many are 0.
    """
    if len(token_ids) == 0:
        return
    ids, order = token_ids.sort(stable=True)
    starts = torch.ones_like(ids, dtype=torch.bool)
    torch.ne(ids[1:], ids[:-1], out=starts[1:])
    which = starts.cumsum(0) - 1
    of_token = values[order].view(len(ids), -1)
    of_token = torch.ops.aten.embedding_dense_backward(of_token, which, len(ids), -1, False)
    target = torch.zeros_like(ids).scatter_(0, which, ids)
    sums.index_add_(0, target, of_token.view(values.shape))


class _Sums:
    """Sums over the tokens of some columns' gradients of weight and bias."""

    def __init__(
        self,
        head: Head,
        columns: slice,
        put_back: _OwnErrors | None,
        *,
        weight: Tensor | None,  # [V, d] the gradients that are to be stored, if needed
        bias: Tensor | None,  # [V]
    ):
        self._dtype, self._started = head.tile_dtype, put_back is not None
        self._weight = self._weight_sums = None if weight is None else weight[columns]
        self._bias = None if bias is None else bias[columns]
        self._bias_sums: Tensor | None = None
        if self._weight is not None and put_back is not None:
            self._weight_sums = put_back.in_weight(columns)
        elif self._weight is not None and self._weight.dtype != self._dtype:
            self._weight_sums = torch.empty_like(self._weight, dtype=self._dtype)
        if self._bias is not None and put_back is not None:
            self._bias_sums = put_back.in_bias(columns)

    def add(self, gradient: Terms, hidden: Terms) -> None:
        if self._weight_sums is not None:
            transposed = tuple(term.t() for term in gradient)
            multiply(transposed, hidden, self._weight_sums, add=self._started)
        if self._bias is not None:
            for term in gradient:
                of_rows = term.sum(0, dtype=self._dtype)
                self._bias_sums = of_rows if self._bias_sums is None else self._bias_sums + of_rows
        self._started = True

    def store(self, scale: Tensor | None) -> None:
        """Round the sums into the gradients, once they are complete."""
        for gradient, sums in ((self._weight, self._weight_sums), (self._bias, self._bias_sums)):
            if gradient is not None and sums is not None:
                if scale is not None:
                    sums /= scale
                if sums is not gradient:
                    gradient.copy_(sums)


LARGEST = 32.0  # upstream gradient after scaling: a KL of 1000 nats stays within float16


def scale_for(how: Multiplication, upstream: Sequence[Tensor | None]) -> Tensor | None:
    """A power of two that keeps float16 gradients of logits from underflow; [], on their device.

    None where gradients of logits are not float16. Without a finite upstream gradient it is 1.
    """
    present = [g for g in upstream if g is not None and g.numel() > 0]
    if how.dtype != torch.float16 or not present:
        return None
    largest = torch.stack([g.abs().amax() for g in present]).amax().float()
    usable = largest.isfinite() & (largest > 0)
    return torch.where(usable, torch.exp2(torch.floor(torch.log2(LARGEST / largest))), 1.0)
