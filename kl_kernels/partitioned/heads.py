"""Statistics of a linear head's logits, tile by tile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kl_kernels.algebra.parts import (
    Whole,
    merge_parts,
    pack,
)
from kl_kernels.partitioned.shards import Shard, add_shards, exchange, whole_rows
from kl_kernels.partitioned.tiles import (
    Head,
    Rows,
    TilePlan,
    Tiles,
    TokensByColumns,
    bytes_of,
    plan_tiles,
)
from kl_kernels.schemas import MIXTURE_SUMS, FoldPartArgs, MixturePartArgs


class HeadOptions(NamedTuple):
    """Options of a linear head: transforms of the logits, and how the work is done.

    They are arguments of torch operators, and of the types that those may have.
    """

    temperature: float
    ref_temperature: float
    softcap: float | None
    ref_softcap: float | None
    memory_budget: int  # bytes
    gradient_precision: str  # a GradientPrecision
    backend: str | None  # a BackendName
    group: str | None = None  # name of the process group that the vocabulary is sharded over
    vocab_start: int = 0  # the global token id of the heads' first row

    @property
    def shard(self) -> Shard | None:
        """Part of the vocabulary that the heads hold; None: all of it."""
        if self.group is None:
            return None
        from torch.distributed import distributed_c10d  # not in every build

        resolve: Any = distributed_c10d._resolve_process_group  # the name has a type of its own
        return Shard(resolve(self.group), self.vocab_start)


class Factors(NamedTuple):
    """The inputs of the policy's head and of the reference's, if there is one."""

    hidden: Tensor  # [B, T, d]
    weight: Tensor  # [V, d]
    bias: Tensor | None  # [V]
    ref_hidden: Tensor | None  # [B, T, ref_d]
    ref_weight: Tensor | None  # [V, ref_d]
    ref_bias: Tensor | None  # [V]

    def heads(self, options: HeadOptions) -> list[Head]:
        """The policy's head and, if there is one, the reference's."""
        precision = options.gradient_precision
        heads = [Head(self.hidden, self.weight, self.bias, precision)]
        if self.ref_hidden is not None and self.ref_weight is not None:
            heads.append(Head(self.ref_hidden, self.ref_weight, self.ref_bias, precision))
        return heads


def full_precision(weight: Tensor) -> AbstractContextManager[object]:
    """Autocast would round factors and tiles to its own dtype."""
    if weight.is_meta:  # there is no autocast
        return nullcontext()
    return torch.autocast(weight.device.type, enabled=False)


def _plan(heads: list[Head], rows: Rows, options: HeadOptions) -> TilePlan:
    return plan_tiles(rows.n, len(heads[0].weight), bytes_of(heads), options.memory_budget)


def fold_heads(heads: list[Head], rows: Rows, token_ids: Tensor, options: HeadOptions) -> Whole:
    """Finished rows under the mask, each [1, n]."""
    plan = _plan(heads, rows, options)
    tiles = [Tiles(head, rows, plan) for head in heads]
    global_ids = rows.take(token_ids)[None]
    shard = options.shard
    tokens = TokensByColumns(counted_from(shard, global_ids), plan)

    def fold(own_ids: Tensor, which: slice) -> Tensor:  # [F, 1, rows]
        return fold_logits([of_head.logits(which) for of_head in tiles], own_ids[:, which], options)

    def states() -> Iterator[Tensor]:  # [F, 1, n]
        for columns in plan.column_slices():
            for of_head in tiles:
                of_head.at(columns)
            own_ids = tokens.of(columns)
            yield torch.cat([fold(own_ids, which) for which in plan.row_slices()], dim=-1)

    # An eighth of the budget for states that wait to be merged, and for their float64 copies.
    room = options.memory_budget // 8
    found, dtype = _few(states(), len(heads) > 1, room), heads[0].tile_dtype
    if shard is None:
        return whole_rows(found, None, None, dtype, options.backend)
    state = pack(merge_parts(found), has_ref=len(heads) > 1, dtype=dtype)
    vocab_size = len(heads[0].weight)
    return exchange(state, shard, vocab_size, global_ids, None, options.backend)


def fold_logits(
    logits: Sequence[Tensor],  # [rows, columns] of the policy and, maybe, of the reference
    token_ids: Tensor,  # [1, rows]
    options: HeadOptions,
) -> Tensor:
    """The state of a part, [F, 1, rows]."""
    policy, *reference = (of_model[None] for of_model in logits)
    args = FoldPartArgs(
        logits=policy,
        ref_logits=reference[0] if reference else None,
        token_ids=token_ids,
        mask=None,
        temperature=options.temperature,
        ref_temperature=options.ref_temperature,
        softcap=options.softcap,
        ref_softcap=options.ref_softcap,
    )
    state: Tensor = torch.ops.kl_kernels.fold_part(*args, options.backend)
    return state


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
    heads: list[Head],
    rows: Rows,
    states: tuple[Tensor, Tensor],  # [2, 1, n] of the policy and of the reference
    beta: float,
    options: HeadOptions,
) -> Tensor:
    """Sums of the rows under the mask, [len(MIXTURE_SUMS), 1, n]; multiplies the logits again."""
    plan = _plan(heads, rows, options)
    tiles = [Tiles(head, rows, plan) for head in heads]
    total = states[0].new_zeros((len(MIXTURE_SUMS), 1, rows.n), dtype=torch.float64)

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
    if (shard := options.shard) is not None:
        total = add_shards(total, shard)
    return total.to(heads[0].tile_dtype)


def counted_from(shard: Shard | None, token_ids: Tensor) -> Tensor:
    return token_ids if shard is None else token_ids - shard.start
