"""The policy loss of linear heads and its gradients, some rows at a time.

A block of rows has all of its logits in one float32 tile. It is folded, each row's loss is known,
and the gradient is written over the logits; then that is multiplied with both factors. Logits are
so multiplied once where statistics with a later gradient need them twice: three products in all,
two with a frozen head.

With a sharded vocabulary the tile has a rank's own logits, and the states of its rows are exchanged
before the loss is known: one collective for each block, and one for the gradient of the hidden
states.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kl_kernels.algebra.parts import local_token_ids
from kl_kernels.ops.library import casts_gradients
from kl_kernels.partitioned.gradients import NarrowTiles, add_at_tokens, scale_for
from kl_kernels.partitioned.heads import HeadOptions
from kl_kernels.partitioned.loss_of_rows import largest_shard, loss_of_rows
from kl_kernels.partitioned.products import Terms, multiply
from kl_kernels.partitioned.shards import Shard
from kl_kernels.partitioned.tiles import ALIGNMENT, Head, Rows, TilePlan, Tiles, bytes_of
from kl_kernels.schemas import NO_TOKEN, POLICY_LOSS_TERMS, PolicyLossArgs

PER_TOKEN = (
    *("token_ids", "old_logprobs", "advantages", "token_weights", "importance_weights"),
    "ref_logprobs",
)


def plan_rows(
    heads: list[Head], n_rows: int, vocab_size: int, memory_budget: int, *, gradient: bool
) -> TilePlan:
    """Rows that fit `memory_budget` with all of their logits, and columns of the weight's terms.

    `vocab_size` is the heads', or that of the largest shard: the others take blocks like its own.
    """
    own_size, per = len(heads[0].weight), bytes_of(heads, gradient=gradient)
    columns = vocab_size
    if per.column:
        columns = min(vocab_size, max(1, memory_budget // 4 // per.column))
        if columns > ALIGNMENT:
            columns -= columns % ALIGNMENT
    of_row = vocab_size * per.logit + per.row
    rows = (memory_budget - columns * per.column) // of_row
    if rows < 1:
        least = of_row + min(columns, ALIGNMENT) * per.column
        raise ValueError(
            f"memory_budget is {memory_budget}; accepted: from about {least} bytes on, which a row "
            "of these heads' logits takes"
        )
    if rows > ALIGNMENT:
        rows -= rows % ALIGNMENT
    return TilePlan(n_rows, own_size, max(1, min(rows, n_rows)), min(columns, own_size))


def loss_and_gradients(
    heads: list[Head],
    rows: Rows,
    args: PolicyLossArgs,
    options: HeadOptions,
    needs: Sequence[bool],
) -> tuple[Tensor, list[Tensor | None]]:
    """The loss's terms [8, B, T], and its gradients of hidden, weight and bias, where needed.

    Logits and mask of `args` are filled in here, for a block of rows at a time.
    """
    policy, how, shard = heads[0], heads[0].multiplication, options.shard
    taken: dict[str, Any] = {
        name: None if (value := getattr(args, name)) is None else rows.take(value)[None]
        for name in PER_TOKEN
    }
    scale = scale_for(how, [taken["advantages"] * taken["token_weights"]]) if any(needs) else None
    if scale is not None:
        taken["token_weights"] = taken["token_weights"] * scale
    args = args._replace(**taken)
    start, own_size = 0, len(policy.weight)
    largest = own_size
    if shard is not None:
        largest = largest_shard(own_size, rows.n, shard, policy.weight.device)
        start = shard.start
    own_ids = local_token_ids(args.token_ids, start, own_size)
    plan = plan_rows(heads, rows.n, largest, options.memory_budget, gradient=any(needs))
    tiles = [Tiles(head, rows, plan) for head in heads]
    blocks = [
        head.weight.new_empty((plan.rows, plan.vocab_size), dtype=head.tile_dtype) for head in heads
    ]
    gradients = None
    if any(needs):
        casts = shard is None and casts_gradients(options.backend, blocks[0])
        gradients = _Gradients(policy, rows, own_ids, plan, needs, shard, casts=casts)
    terms = policy.hidden.new_empty((len(POLICY_LOSS_TERMS), rows.n), dtype=policy.tile_dtype)
    for which in plan.row_slices():
        n = which.stop - which.start
        hidden = [of_head.hidden(which) for of_head in tiles]
        for columns in plan.column_slices():
            for of_head, block, h in zip(tiles, blocks, hidden):
                of_head.at(columns)
                of_head.write(block[:n, columns], h)
        logits = [block[:n][None] for block in blocks]
        of_rows: dict[str, Any] = {
            name: None if t is None else t[:, which] for name, t in taken.items()
        }
        written, own = None, None
        if gradients is not None:
            written, own = gradients.room(blocks[0][:n], which)
        of_block = args._replace(
            logits=logits[0],
            ref_logits=logits[1] if len(logits) > 1 else None,
            mask=torch.ones((1, n), dtype=torch.bool, device=policy.hidden.device),
            own_gradient=own,
            grad_logits=None if written is None else written[None],
            **of_rows,
        )
        terms[:, which] = loss_of_rows(of_block, options)[:, 0]
        if gradients is not None and written is not None:
            gradients.add(written, which, hidden[0], tiles[0])
    results: list[Tensor | None] = [None] * 3
    if gradients is not None:
        results = gradients.finished(tiles[0].all_hidden, scale)
    if scale is not None:
        terms[0] /= scale
    return rows.put(terms.t(), terms.dtype).movedim(-1, 0).contiguous(), results


class _Gradients:
    """Sums of the gradients of hidden states, weight and bias over blocks of rows."""

    def __init__(
        self,
        head: Head,
        rows: Rows,
        token_ids: Tensor,  # [1, n] counted from the head's first row; NO_TOKEN where it has none
        plan: TilePlan,
        needs: Sequence[bool],
        shard: Shard | None,
        *,
        casts: bool,  # the loss's backend writes gradients in another dtype than the logits'
    ):
        self._head, self._rows, self._plan, self._shard = head, rows, plan, shard
        self._ids, self._has_token = token_ids[0], token_ids[0] != NO_TOKEN
        self._columns = torch.where(self._has_token, self._ids, 0)
        dtype = head.tile_dtype
        self._narrow = NarrowTiles(head, plan.rows * plan.vocab_size, casts=casts)
        self._errors = self._own = None
        if self._narrow.are_rounded:
            self._errors = head.hidden.new_zeros((rows.n, 1), dtype=dtype)
        if self._narrow.are_written_rounded:
            self._own = head.hidden.new_empty((1, rows.n), dtype=dtype)
        needs_hidden, needs_weight, needs_bias = needs
        self._hidden = self._weight = self._bias = None
        if needs_hidden:
            shape = rows.n, head.hidden.shape[-1]
            self._hidden = head.hidden.new_empty(shape, dtype=dtype)
        if needs_weight:
            self._weight = torch.empty_like(head.weight, dtype=dtype)
        if needs_bias and head.bias is not None:
            self._bias = torch.zeros_like(head.bias, dtype=dtype)

    def room(self, tile: Tensor, which: slice) -> tuple[Tensor, Tensor | None]:
        """Memory for the gradient of a tile of logits [rows, V], and for the tokens' own entries.

        They are asked for where the gradient is rounded as it is written.
        """
        return self._narrow.room(tile), None if self._own is None else self._own[:, which]

    def add(self, written: Tensor, which: slice, hidden: Terms, tiles: Tiles) -> None:
        """Multiply the gradient of a block's logits [rows, V] with both factors."""
        gradient = self._narrow.terms(written)
        if self._errors is not None:
            at = self._columns[which, None]
            own = written.gather(1, at) if self._own is None else self._own[0, which, None]
            errors = own - gradient[0].gather(1, at)
            self._errors[which] = torch.where(self._has_token[which, None], errors, 0.0)
        if self._bias is not None:
            for term in gradient:
                self._bias += term.sum(0, dtype=self._bias.dtype)
        for columns in self._plan.column_slices():
            part = tuple(term[:, columns] for term in gradient)
            if self._hidden is not None:
                tiles.at(columns)
                multiply(part, tiles.weight, self._hidden[which], add=columns.start > 0)
            if self._weight is not None:
                transposed = tuple(term.t() for term in part)
                multiply(transposed, hidden, self._weight[columns], add=which.start > 0)

    def finished(self, all_hidden: Tensor, scale: Tensor | None) -> list[Tensor | None]:
        """Put back what rounding took from the tokens' own entries, and round the sums."""
        hidden, weight, bias = self._hidden, self._weight, self._bias
        head, errors = self._head, self._errors
        if hidden is not None:
            if errors is not None:
                hidden.addcmul_(errors, head.weight[self._columns].to(hidden.dtype))
            if self._shard is not None:
                # All ranks' logits come from the same hidden states.
                dist.all_reduce(hidden, group=self._shard.group)
            hidden = self._rows.put(_scaled(hidden, scale), head.hidden.dtype)
        if weight is not None:
            if errors is not None:
                add_at_tokens(weight, all_hidden * errors, self._columns)
            weight = _scaled(weight, scale).to(head.weight.dtype)
        if bias is not None and head.bias is not None:
            if errors is not None:
                add_at_tokens(bias, errors[:, 0], self._columns)
            bias = _scaled(bias, scale).to(head.bias.dtype)
        return [hidden, weight, bias]


def _scaled(sums: Tensor, scale: Tensor | None) -> Tensor:
    return sums if scale is None else sums.div_(scale)
