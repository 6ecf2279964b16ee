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
from kl_kernels.ops.autograd import given_away, only_first
from kl_kernels.partitioned.gradients import NarrowTiles, scale_for, sums_at_tokens
from kl_kernels.partitioned.heads import HeadOptions, full_precision
from kl_kernels.partitioned.loss_of_rows import largest_shard, loss_of_rows
from kl_kernels.partitioned.products import Terms, multiply
from kl_kernels.partitioned.shards import Shard
from kl_kernels.partitioned.tiles import ALIGNMENT, Head, Rows, TilePlan, Tiles, bytes_of
from kl_kernels.schemas import NO_TOKEN, POLICY_LOSS_TERMS, PolicyLossArgs

STORED_AT_ONCE = 8192  # columns of a gradient's sums whose corrections are there at a time
PER_TOKEN = (
    *("token_ids", "old_logprobs", "advantages", "token_weights", "importance_weights"),
    "ref_logprobs",
)


class HeadPolicyLoss(torch.autograd.Function):
    """(loss, terms [8, B, T]), whose gradients are computed in forward.

    Inputs: options, the arguments of the operator `policy_loss` without logits, then hidden
    [B, T, d], weight [V, d] and bias [V] of the policy and of the reference, or None.
    """

    @staticmethod
    def forward(
        ctx: Any, options: HeadOptions, args: PolicyLossArgs, *factors: Any
    ) -> tuple[Tensor, Tensor]:
        hidden, weight, bias, *reference = factors
        precision = options.gradient_precision
        heads = [Head(hidden, weight, bias, precision)]
        if reference[0] is not None:
            heads.append(Head(reference[0], reference[1], reference[2], precision))
        needs = ctx.needs_input_grad[2:5]
        with full_precision(heads[0].weight):
            terms, gradients = loss_and_gradients(heads, args, options, needs)
        ctx.save_for_backward(*gradients)
        ctx.backend = options.backend
        ctx.mark_non_differentiable(terms)
        return terms[0].sum(), terms

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _terms: None) -> tuple[Tensor | None, ...]:
        return only_first(ctx, None, None, *given_away(ctx, grad_loss))


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
    heads: list[Head], args: PolicyLossArgs, options: HeadOptions, needs: Sequence[bool]
) -> tuple[Tensor, list[Tensor | None]]:
    """The loss's terms [8, B, T], and its gradients of hidden, weight and bias, where needed."""
    policy, how, shard = heads[0], heads[0].multiplication, options.shard
    rows = Rows(args.token_ids.shape, args.mask)
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
    gradients = _Gradients(policy, rows, own_ids, plan, needs, shard) if any(needs) else None
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
        of_block = args._replace(
            logits=logits[0],
            ref_logits=logits[1] if len(logits) > 1 else None,
            mask=torch.ones((1, n), dtype=torch.bool, device=policy.hidden.device),
            grad_logits=None if gradients is None else logits[0],
            **of_rows,
        )
        terms[:, which] = loss_of_rows(of_block, options)[:, 0]
        if gradients is not None:
            gradients.add(blocks[0][:n], which, hidden[0], tiles[0])
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
    ):
        self._head, self._rows, self._plan, self._shard = head, rows, plan, shard
        self._ids, self._has_token = token_ids[0], token_ids[0] != NO_TOKEN
        self._columns = torch.where(self._has_token, self._ids, 0)
        dtype = head.tile_dtype
        self._narrow = NarrowTiles(head, plan.rows * plan.vocab_size)
        self._errors = None
        if self._narrow.are_rounded:
            self._errors = head.hidden.new_zeros((rows.n, 1), dtype=dtype)
        needs_hidden, needs_weight, needs_bias = needs
        self._hidden = self._weight = self._bias = None
        if needs_hidden:
            shape = rows.n, head.hidden.shape[-1]
            self._hidden = head.hidden.new_empty(shape, dtype=dtype)
        if needs_weight:
            self._weight = torch.empty_like(head.weight, dtype=dtype)
        if needs_bias and head.bias is not None:
            self._bias = torch.zeros_like(head.bias, dtype=dtype)

    def add(self, tile: Tensor, which: slice, hidden: Terms, tiles: Tiles) -> None:
        """Multiply the gradient of a block's logits [rows, V] with both factors."""
        gradient = self._narrow.terms(tile)
        if self._errors is not None:
            own = self._columns[which, None]
            errors = tile.gather(1, own) - gradient[0].gather(1, own)
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
            values = None if errors is None else all_hidden * errors
            weight = self._stored(weight, head.weight.dtype, values, scale)
        if bias is not None and head.bias is not None:
            bias = self._stored(bias[:, None], head.bias.dtype, errors, scale)[:, 0]
        return [hidden, weight, bias]

    def _stored(
        self, sums: Tensor, dtype: torch.dtype, errors: Tensor | None, scale: Tensor | None
    ) -> Tensor:
        """Sums over the tokens, with the errors of each, rounded once; [V, ...]."""
        if errors is None:
            return _scaled(sums, scale).to(dtype)
        gradient = sums.new_empty(sums.shape, dtype=dtype)
        for start in range(0, len(sums), STORED_AT_ONCE):
            columns = slice(start, min(start + STORED_AT_ONCE, len(sums)))
            found = sums_at_tokens(errors, self._ids, columns)
            if scale is None:
                torch.add(sums[columns], found, out=gradient[columns])
            else:
                torch.div(found.add_(sums[columns]), scale, out=gradient[columns])
        return gradient


def _scaled(sums: Tensor, scale: Tensor | None) -> Tensor:
    return sums if scale is None else sums.div_(scale)
