"""Statistics of a linear head's logits, tile by tile, and the kernels of a tile's gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kl_kernels.algebra.parts import (
    Whole,
    local_token_ids,
    merge_parts,
    pack,
)
from kl_kernels.partitioned.functions import Inputs, Saved, Upstream
from kl_kernels.partitioned.gradients import Write, differentiate, scale_for
from kl_kernels.partitioned.products import GradientPrecision
from kl_kernels.partitioned.shards import Shard, add_shards, exchange, whole_rows
from kl_kernels.partitioned.tiles import Head, Rows, TilePlan, Tiles, bytes_of, plan_tiles
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
    """Options of a linear head: transforms of the logits, and how the work is done."""

    temperature: float
    ref_temperature: float
    softcap: float | None
    ref_softcap: float | None
    memory_budget: int  # bytes
    gradient_precision: GradientPrecision
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
        heads = self._heads(inputs)
        with full_precision(heads[0].weight):
            return fold_heads(heads, rows, token_ids, self.options)

    def spread(self, value: Tensor, rows: Rows) -> Tensor:  # [1, n]
        return rows.put(value[0], value.dtype)

    def mixture_sums(self, inputs: Inputs, rows: Rows, whole: Whole, beta: float) -> Tensor:
        heads = self._heads(inputs)
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
        heads = self._heads(inputs)
        if upstream.kl is None and upstream.forward_kl is None:
            del heads[1:]  # the reference's logits are not computed a second time
        of_rows = Upstream(*(None if g is None else rows.take(g)[None] for g in upstream))
        scale = scale_for(heads[0].multiplication, of_rows)
        if scale is not None:
            of_rows = Upstream(*(None if g is None else g * scale for g in of_rows))
        slices = SavedSlices(saved)

        def write(logits: Sequence[Tensor], which: slice, ids: Tensor, gradient: Tensor) -> None:
            g = Upstream(*(None if g is None else g[:, which] for g in of_rows))
            _write_kl_gradient(logits, ids, self.options, g, slices.of(which), gradient)

        ids = _counted_from(self.options.shard, rows.take(token_ids)[None])
        tokens_matter = upstream.logprob is not None
        return self._differentiate(heads, rows, ids, write, needs, scale, tokens_matter)

    def jsd_gradients(
        self,
        inputs: Inputs,
        rows: Rows,
        saved: Saved,
        beta: float,
        grad_jsd: Tensor,
        needs: Sequence[bool],
    ) -> list[Tensor | None]:
        heads = self._heads(inputs)
        grad = rows.take(grad_jsd)[None]
        scale = scale_for(heads[0].multiplication, [grad])
        grad = grad if scale is None else grad * scale
        slices = SavedSlices(saved)

        def write(logits: Sequence[Tensor], which: slice, _ids: Tensor, gradient: Tensor) -> None:
            s = slices.of(which)
            args = TokenJSDBackwardArgs(
                grad_jsd=grad[:, which],
                logits=logits[0][None],
                ref_logits=logits[1][None],
                mask=None,
                policy_state=s.policy_state,
                ref_state=s.ref_state,
                mixture_kl=s.kl,
                beta=beta,
                temperature=self.options.temperature,
                ref_temperature=self.options.ref_temperature,
                softcap=self.options.softcap,
                ref_softcap=self.options.ref_softcap,
                grad_logits=gradient[None],
            )
            torch.ops.kl_kernels.token_jsd_backward_(*args, self.options.backend)

        ids = torch.zeros((1, rows.n), dtype=torch.int64, device=grad.device)  # no token matters
        return self._differentiate(heads, rows, ids, write, needs, scale, tokens_matter=False)

    def _heads(self, inputs: Inputs) -> list[Head]:
        hidden, weight, bias, *reference = inputs
        precision = self.options.gradient_precision
        heads = [Head(hidden, weight, bias, precision)]
        if reference[0] is not None:
            heads.append(Head(reference[0], reference[1], reference[2], precision))
        return heads

    def _differentiate(
        self,
        heads: list[Head],
        rows: Rows,
        token_ids: Tensor,
        write: Write,
        needs: Sequence[bool],
        scale: Tensor | None,
        tokens_matter: bool,
    ) -> list[Tensor | None]:
        with torch.no_grad(), full_precision(heads[0].weight):
            grad_hidden, *others = differentiate(
                heads,
                rows,
                token_ids,
                write,
                needs[:3],
                tokens_matter=tokens_matter,
                scale=scale,
                memory_budget=self.options.memory_budget,
                backend=self.options.backend,
            )
        if grad_hidden is not None:
            if self.options.shard is not None:
                # All ranks' logits come from the same hidden states.
                dist.all_reduce(grad_hidden, group=self.options.shard.group)
            grad_hidden = rows.put(grad_hidden, heads[0].hidden.dtype)
        return [grad_hidden, *others]


def full_precision(weight: Tensor) -> AbstractContextManager[object]:
    """Autocast would round factors and tiles to its own dtype."""
    if weight.is_meta:  # there is no autocast
        return nullcontext()
    return torch.autocast(weight.device.type, enabled=False)


class SavedSlices:
    """Saved statistics of rows, as kernels take them: copied for each slice of the rows once."""

    def __init__(self, saved: Saved):
        self._saved = saved
        self._known: dict[tuple[int, int], Saved] = {}

    def of(self, which: slice) -> Saved:
        key = which.start, which.stop
        if key not in self._known:
            self._known[key] = Saved(*(v[..., which].contiguous() for v in self._saved))
        return self._known[key]


def _plan(heads: list[Head], rows: Rows, options: HeadOptions) -> TilePlan:
    return plan_tiles(rows.n, len(heads[0].weight), bytes_of(heads), options.memory_budget)


def fold_heads(heads: list[Head], rows: Rows, token_ids: Tensor, options: HeadOptions) -> Whole:
    """Finished rows under the mask, each [1, n]."""
    plan = _plan(heads, rows, options)
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

    # An eighth of the budget for states that wait to be merged, and for their float64 copies.
    room = options.memory_budget // 8
    found, dtype = _few(states(), len(heads) > 1, room), heads[0].tile_dtype
    if options.shard is None:
        return whole_rows(found, None, None, dtype, options.backend)
    state = pack(merge_parts(found), has_ref=len(heads) > 1, dtype=dtype)
    vocab_size = len(heads[0].weight)
    return exchange(state, options.shard, vocab_size, global_ids, None, options.backend)


def _few(states: Iterator[Tensor], has_ref: bool, room: int) -> Tensor:  # [F, 1, n] each
    """As many states as there is room for, [parts, F, 1, n]: merging takes fifty operations."""
    waiting: list[Tensor] = []
    for state in states:
        if len(waiting) >= max(2, room // (12 * state.numel() + 1)):
            merged = merge_parts(torch.stack(waiting))
            waiting = [pack(merged, has_ref=has_ref, dtype=torch.float64)]
        waiting.append(state.double() if waiting and waiting[0].dtype != state.dtype else state)
    return torch.stack(waiting)


def mixture_sums(
    heads: list[Head], rows: Rows, whole: Whole, beta: float, options: HeadOptions
) -> Tensor:
    """Sums of the rows under the mask, [len(MIXTURE_SUMS), 1, n]; multiplies the logits again."""
    plan = _plan(heads, rows, options)
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


def _write_kl_gradient(
    logits: Sequence[Tensor],  # [rows, columns] of the policy and, maybe, of the reference
    token_ids: Tensor,  # [1, rows]
    options: HeadOptions,
    upstream: Upstream,  # each [1, rows]
    saved: Saved,
    gradient: Tensor,  # [rows, columns]
) -> None:
    policy, *reference = (of_model[None] for of_model in logits)
    args = TokenKLBackwardArgs(
        grad_logprob=upstream.logprob,
        grad_kl=upstream.kl,
        grad_forward_kl=upstream.forward_kl,
        grad_entropy=upstream.entropy,
        logits=policy,
        ref_logits=reference[0] if reference else policy,
        token_ids=token_ids,
        mask=None,
        policy_state=saved.policy_state,
        ref_state=saved.ref_state,
        kl=saved.kl,
        entropy=saved.entropy,
        temperature=options.temperature,
        ref_temperature=options.ref_temperature,
        softcap=options.softcap,
        ref_softcap=options.ref_softcap,
        part=True,
        grad_logits=gradient[None],
    )
    if reference:
        torch.ops.kl_kernels.token_kl_backward_(*args, options.backend)
    else:
        stats = pick(TokenStatsBackwardArgs, args)
        torch.ops.kl_kernels.token_stats_backward_(*stats, options.backend)
