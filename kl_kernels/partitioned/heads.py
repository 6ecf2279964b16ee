"""Statistics of a linear head's logits and their gradients, tile by tile.

Vocabulary is the outer loop and tokens the inner one, forward and backward. A stretch of the weight
is then brought to float32 once, and its gradient is complete when the inner loop ends: of the
largest gradient no more than that stretch is held in float32. The gradient of the hidden states is
a sum over the vocabulary, in float32 until the outer loop ends; that is [tokens, d], where tokens
outside would hold the weight's [V, d].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kl_kernels.algebra.parts import (
    Whole,
    finish_parts,
    local_token_ids,
    merge_parts,
    pack,
)
from kl_kernels.partitioned.functions import Inputs, Saved, Upstream
from kl_kernels.partitioned.shards import Shard, add_shards, exchange
from kl_kernels.partitioned.tiles import Head, Rows, Tiles, plan_tiles
from kl_kernels.schemas import (
    MIXTURE_SUMS,
    BackendName,
    FoldPartArgs,
    MixturePartArgs,
    TokenJSDBackwardArgs,
    TokenKLBackwardArgs,
    TokenStatsBackwardArgs,
    pick,
)


@dataclass(frozen=True)
class HeadOptions:
    """HeadOptions of a linear head: transforms of the logits, and how the work is done."""

    temperature: float
    ref_temperature: float
    softcap: float | None
    ref_softcap: float | None
    memory_budget: int  # bytes
    backend: BackendName | None
    shard: Shard | None = None  # part of the vocabulary that the heads hold; None: all of it


class LinearHeads(NamedTuple):
    """Parts that are tiles of linear heads' logits.

    Inputs: hidden [B, T, d], weight [V, d], bias [V], then the same of the reference, or None.
    """

    options: HeadOptions

    def rows(self, like: Tensor, mask: Tensor | None) -> Rows:
        return Rows(like, mask)

    def fold(self, inputs: Inputs, token_ids: Tensor, rows: Rows) -> Whole:
        heads = heads_of(*inputs)
        with full_precision(heads[0].weight):
            return fold_heads(heads, rows, token_ids, self.options)

    def spread(self, value: Tensor, rows: Rows) -> Tensor:  # [1, n]
        return rows.put(value[0], value.dtype)

    def mixture_sums(self, inputs: Inputs, rows: Rows, whole: Whole, beta: float) -> Tensor:
        heads = heads_of(*inputs)
        with full_precision(heads[0].weight):
            return mixture_sums(heads, rows, whole, beta, self.options)

    def kl_gradients(
        self,
        inputs: Inputs,
        token_ids: Tensor,
        rows: Rows,
        saved: Saved,
        upstream: Upstream,
        needs: Sequence[bool],
    ) -> list[Tensor | None]:
        heads = heads_of(*inputs)
        if upstream.kl is None and upstream.forward_kl is None:
            del heads[1:]  # the reference's logits are not computed a second time
        of_rows = Upstream(*(None if g is None else rows.take(g)[None] for g in upstream))
        ids = _counted_from(self.options.shard, rows.take(token_ids)[None])

        def over_logits(tile: Tensor, ref_tiles: list[Tensor], place: Place) -> None:
            columns, which = place
            own_ids = local_token_ids(ids, columns.start, columns.stop - columns.start)
            _write_kl_gradient(tile, ref_tiles, own_ids, which, self.options, of_rows, saved)

        return self._differentiate(heads, rows, over_logits, needs)

    def jsd_gradients(
        self,
        inputs: Inputs,
        rows: Rows,
        saved: Saved,
        beta: float,
        grad_jsd: Tensor,
        needs: Sequence[bool],
    ) -> list[Tensor | None]:
        heads = heads_of(*inputs)
        grad = rows.take(grad_jsd)[None]

        def over_logits(tile: Tensor, ref_tiles: list[Tensor], place: Place) -> None:
            s = _of_rows(saved, place.rows)
            args = TokenJSDBackwardArgs(
                grad_jsd=grad[:, place.rows].contiguous(),
                logits=tile[None],
                ref_logits=ref_tiles[0][None],
                mask=None,
                policy_state=s.policy_state,
                ref_state=s.ref_state,
                mixture_kl=s.kl,
                beta=beta,
                temperature=self.options.temperature,
                ref_temperature=self.options.ref_temperature,
                softcap=self.options.softcap,
                ref_softcap=self.options.ref_softcap,
                grad_logits=tile[None],
            )
            torch.ops.kl_kernels.token_jsd_backward_(*args, self.options.backend)

        return self._differentiate(heads, rows, over_logits, needs)

    def _differentiate(
        self, heads: list[Head], rows: Rows, over_logits: OverLogits, needs: Sequence[bool]
    ) -> list[Tensor | None]:
        with torch.no_grad(), full_precision(heads[0].weight):
            return differentiate(heads, rows, self.options, over_logits, needs[:3])


def heads_of(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
) -> list[Head]:
    policy = Head(hidden, weight, bias)
    if ref_hidden is None or ref_weight is None:
        return [policy]
    return [policy, Head(ref_hidden, ref_weight, ref_bias)]


def full_precision(weight: Tensor) -> torch.autocast:
    """Autocast would round factors and tiles to its own dtype."""
    return torch.autocast(weight.device.type, enabled=False)


def fold_heads(heads: list[Head], rows: Rows, token_ids: Tensor, options: HeadOptions) -> Whole:
    """Finished rows under the mask, each [1, n]."""
    plan = plan_tiles(heads, rows.n, options.memory_budget)
    tiles = [Tiles(head, rows, plan) for head in heads]
    global_ids = rows.take(token_ids)[None]
    ids = _counted_from(options.shard, global_ids)

    def fold(own_ids: Tensor, which: slice) -> Tensor:  # [F, 1, rows]
        logits = [of_head.logits(which)[None] for of_head in tiles]
        args = FoldPartArgs(
            logits=logits[0],
            ref_logits=logits[1] if len(logits) > 1 else None,
            token_ids=own_ids[:, which],
            mask=None,
            temperature=options.temperature,
            ref_temperature=options.ref_temperature,
            softcap=options.softcap,
            ref_softcap=options.ref_softcap,
        )
        state: Tensor = torch.ops.kl_kernels.fold_part(*args, options.backend)
        return state

    def states() -> Iterator[Tensor]:  # [F, 1, n]
        for columns in plan.column_slices():
            for of_head in tiles:
                of_head.at(columns)
            own_ids = local_token_ids(ids, columns.start, columns.stop - columns.start)
            yield torch.cat([fold(own_ids, which) for which in plan.row_slices()], dim=-1)

    part, dtype = merge_parts(states()), heads[0].tile_dtype
    if options.shard is not None:
        state = pack(part, has_ref=len(heads) > 1, dtype=dtype)
        part = exchange(state, options.shard, len(heads[0].weight), global_ids, None)
    return finish_parts(part, None, dtype)


def mixture_sums(
    heads: list[Head], rows: Rows, whole: Whole, beta: float, options: HeadOptions
) -> Tensor:
    """Sums of the rows under the mask, [len(MIXTURE_SUMS), 1, n]; multiplies the logits again."""
    plan = plan_tiles(heads, rows.n, options.memory_budget)
    tiles = [Tiles(head, rows, plan) for head in heads]
    states = whole.policy_state, whole.ref_state
    total = whole.policy_state.new_zeros((len(MIXTURE_SUMS), 1, rows.n), dtype=torch.float64)

    def sums(which: slice) -> Tensor:  # [len(MIXTURE_SUMS), 1, rows]
        logits, ref_logits = (of_head.logits(which)[None] for of_head in tiles)
        policy_state, ref_state = (state[..., which].contiguous() for state in states)
        args = MixturePartArgs(
            logits=logits,
            ref_logits=ref_logits,
            mask=None,
            policy_state=policy_state,
            ref_state=ref_state,
            beta=beta,
            temperature=options.temperature,
            ref_temperature=options.ref_temperature,
            softcap=options.softcap,
            ref_softcap=options.ref_softcap,
        )
        found: Tensor = torch.ops.kl_kernels.mixture_part(*args, options.backend)
        return found

    for columns in plan.column_slices():
        for of_head in tiles:
            of_head.at(columns)
        parts = [sums(which) for which in plan.row_slices()]
        total += torch.cat(parts, dim=-1)
    if options.shard is not None:
        total = add_shards(total, options.shard)
    return total.to(heads[0].tile_dtype)


def _counted_from(shard: Shard | None, token_ids: Tensor) -> Tensor:
    return token_ids if shard is None else token_ids - shard.start


class Place(NamedTuple):
    """Row and vocabulary slices of one tile."""

    columns: slice
    rows: slice


OverLogits = Callable[[Tensor, list[Tensor], Place], None]


def differentiate(
    heads: list[Head],
    rows: Rows,
    options: HeadOptions,
    over_logits: OverLogits,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of the first head's hidden [B, T, d], weight [V, d] and bias [V], if needed.

    `over_logits` gets a tile of the first head's logits, [rows, columns], a list of the others'
    and their place, and writes the gradient over the first. That is then multiplied with each
    factor.
    """
    policy = heads[0]
    needs_hidden, needs_weight, needs_bias = needs
    plan = plan_tiles(heads, rows.n, options.memory_budget, weight_gradient=needs_weight)
    tiles = [Tiles(head, rows, plan) for head in heads]
    dtype = policy.tile_dtype
    grad_hidden = None
    if needs_hidden:
        grad_hidden = policy.hidden.new_zeros((rows.n, policy.hidden.shape[-1]), dtype=dtype)
    grad_weight = _GradientByColumns(policy.weight, plan.columns, dtype) if needs_weight else None
    grad_bias = None
    if needs_bias and policy.bias is not None:
        grad_bias = _GradientByColumns(policy.bias, plan.columns, dtype)
    for columns in plan.column_slices():
        for of_head in tiles:
            of_head.at(columns)
        for which in plan.row_slices():
            hidden = tiles[0].hidden(which) if grad_weight is not None else None
            tile, *others = (
                of_head.logits(which, known) for of_head, known in zip(tiles, (hidden, None))
            )
            over_logits(tile, others, Place(columns, which))
            if grad_hidden is not None:
                grad_hidden[which].addmm_(tile, tiles[0].weight)
            if grad_weight is not None and hidden is not None:
                grad_weight.sums(columns).addmm_(tile.t(), hidden)
            if grad_bias is not None:
                grad_bias.sums(columns).add_(tile.sum(0))
        for gradient in (grad_weight, grad_bias):
            if gradient is not None:
                gradient.store(columns)
    if grad_hidden is not None and options.shard is not None:
        # All ranks' logits come from the same hidden states.
        dist.all_reduce(grad_hidden, group=options.shard.group)
    return [
        None if grad_hidden is None else rows.put(grad_hidden, policy.hidden.dtype),
        None if grad_weight is None else grad_weight.gradient,
        None if grad_bias is None else grad_bias.gradient,
    ]


def _of_rows(saved: Saved, which: slice) -> Saved:
    return Saved(*(value[..., which].contiguous() for value in saved))


def _write_kl_gradient(
    tile: Tensor,  # [rows, columns]
    ref_tiles: list[Tensor],  # the reference's, or none
    token_ids: Tensor,  # [1, n]
    which: slice,
    options: HeadOptions,
    upstream: Upstream,  # each [1, n]
    saved: Saved,
) -> None:
    """Write the gradient of the policy's logits over them."""
    g = Upstream(*(None if g is None else g[:, which] for g in upstream))
    s = _of_rows(saved, which)
    args = TokenKLBackwardArgs(
        grad_logprob=g.logprob,
        grad_kl=g.kl,
        grad_forward_kl=g.forward_kl,
        grad_entropy=g.entropy,
        logits=tile[None],
        ref_logits=ref_tiles[0][None] if ref_tiles else tile[None],
        token_ids=token_ids[:, which],
        mask=None,
        policy_state=s.policy_state,
        ref_state=s.ref_state,
        kl=s.kl,
        entropy=s.entropy,
        temperature=options.temperature,
        ref_temperature=options.ref_temperature,
        softcap=options.softcap,
        ref_softcap=options.ref_softcap,
        part=True,
        grad_logits=tile[None],
    )
    if ref_tiles:
        torch.ops.kl_kernels.token_kl_backward_(*args, options.backend)
    else:
        stats = pick(TokenStatsBackwardArgs, args)
        torch.ops.kl_kernels.token_stats_backward_(*stats, options.backend)


class _GradientByColumns:
    """The gradient of a weight or bias, summed over the tokens one stretch after the other."""

    def __init__(self, tensor: Tensor, n_columns: int, dtype: torch.dtype):  # [V, ...]
        self.gradient = tensor.new_empty(tensor.shape)
        self._sums = self.gradient  # the gradient itself, where the dtype allows that
        if tensor.dtype != dtype:
            self._sums = tensor.new_empty((n_columns, *tensor.shape[1:]), dtype=dtype)
        self._started = -1

    def sums(self, columns: slice) -> Tensor:  # [columns, ...]
        """Return the sums of these columns, to be added to."""
        if self._sums is self.gradient:
            sums = self._sums[columns]
        else:
            sums = self._sums[: columns.stop - columns.start]
        if self._started != columns.start:
            sums.zero_()
            self._started = columns.start
        return sums

    def store(self, columns: slice) -> None:
        """Round the complete sums of these columns into the gradient."""
        if self._sums is not self.gradient:
            self.gradient[columns] = self.sums(columns)
