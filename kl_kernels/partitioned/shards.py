"""Logits whose vocabulary is sharded over the ranks of a process group (tensor parallelism).

Each rank reads its own logits into a row state, one all-gather exchanges the states, and every rank
merges and finishes them alike: all ranks hold the same bits. (A mixture of both models is known
only then, so that token_jsd exchanges two sums of a second look as well.) In backward each rank
writes the gradient of its own logits, from its logits and the whole row's state: nothing is sent.

Per call and row, a rank sends its state once to each of the R - 1 others: 4 bytes for each field,
of which there are 9 with a reference and 4 without, and 8 bytes more per call. Eager tensor
parallelism sends no less: a maximum, a sum and a logit for the log-probability alone, in three
collectives that wait for each other.

What that comes to, by figures of one H200 (990 dense bf16 TFLOP/s, 4.8 TB/s, NVLink 450 GB/s each
way) at their limits, for 65,536 tokens, a vocabulary of 262,144 over 8 ranks and a hidden size of
8,192: the head's product takes 35.5 ms, reading both models' shards 1.8 ms, the wire 0.04 ms
(2.4 MB to each of 7 ranks).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from kl_kernels.algebra.epilogues import scored_rewards
from kl_kernels.algebra.parts import (
    Part,
    Whole,
    any_token,
    finish_parts,
    local_token_ids,
    merge_shards,
)
from kl_kernels.algebra.row import Finished
from kl_kernels.checks import check_integer, refuse_transforms
from kl_kernels.ops import autograd
from kl_kernels.schemas import (
    STATE_FIELDS,
    FoldPartArgs,
    KLRewardsArgs,
    MixturePartArgs,
    TokenJSDArgs,
    TokenJSDOutputs,
    TokenKLArgs,
    TokenKLOutputs,
    TokenStatsArgs,
    TokenStatsOutputs,
    output_dtype,
    pick,
)

# torch 2.13 renamed it, and warns of the old name. Builds without distributed have neither.
all_gather: Any = getattr(dist, "all_gather_single", getattr(dist, "all_gather_into_tensor", None))

TOKEN_TX = STATE_FIELDS.index("token_tx")


class Shard(NamedTuple):
    """Where this rank's logits lie in the vocabulary."""

    group: dist.ProcessGroup
    start: int  # the global id of its first logit


def operator_over(
    name: str, logits: Tensor, group: dist.ProcessGroup | None, vocab_start: int | None
) -> Callable[..., Any]:
    """The operator `name`, of whole logits or, with a group, of this rank's.

    Raises:
        TypeError, ValueError: `vocab_start` without a group, below 0 or no int, or a group that
            this rank is not in.
    """
    if group is not None:
        refuse_transforms(f"{name} with a group")
        return _sharded(name, shard_of(logits.shape[-1], group, vocab_start))
    check_no_vocab_start(vocab_start)
    return autograd.operator(name)


def check_no_vocab_start(vocab_start: int | None) -> None:
    if vocab_start is not None:
        raise ValueError(f"vocab_start is {vocab_start}, but there is no group; pass both")


def shard_of(vocab_size: int, group: dist.ProcessGroup, vocab_start: int | None) -> Shard:
    """This rank's shard of the group's vocabulary; raises as `operator_over` does."""
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError(f"group does not hold this process, rank {dist.get_rank()} of the world")
    if vocab_start is None:
        return Shard(group, rank * vocab_size)
    return Shard(group, check_integer("vocab_start", vocab_start, at_least=0))


def _fold_and_exchange(a: FoldPartArgs, shard: Shard, backend: str | None) -> Whole:
    """The finished rows, from this rank's logits and all ranks' token ids."""
    local = a._replace(token_ids=_local_ids(a, shard))
    state = torch.ops.kl_kernels.fold_part(*local, backend)
    part = exchange(state, shard, a.logits.shape[-1], a.token_ids, a.mask)
    return finish_parts(part, a.mask, output_dtype(a.logits))


def _local_ids(a: Any, shard: Shard) -> Tensor:  # [B, T]
    """The token ids counted from this shard's first."""
    return local_token_ids(a.token_ids, shard.start, a.logits.shape[-1])


def exchange(
    state: Tensor,  # [F, B, T]
    shard: Shard,
    vocab_size: int,  # this shard's
    token_ids: Tensor,  # [B, T]
    mask: Tensor | None,  # [B, T]
) -> Part:
    """The state of the whole vocabulary, by one collective that brings the shards' ranges along."""
    n_ranks = dist.get_world_size(shard.group)
    # Filled where they are, as a copy from the host would synchronise; exact up to 2^24.
    own_range = (state.new_full((1,), float(n)) for n in (shard.start, vocab_size))
    packed = torch.cat([state.flatten(), *own_range])
    gathered = packed.new_empty(n_ranks * len(packed))
    all_gather(gathered, packed, group=shard.group)
    states, ranges = gathered.view(n_ranks, -1).split([state.numel(), 2], dim=1)
    states = states.reshape(n_ranks, *state.shape)

    start, order = ranges[:, 0].sort()
    end = start + ranges[order, 1]
    tiled = (start[0] == 0) & (start[1:] == end[:-1]).all()
    # A masked row is held by every rank, or by none: it is not looked at.
    held_once = (states[:, TOKEN_TX] != torch.inf).sum(0) == 1
    # Asking a GPU would synchronise; asking while torch.compile traces would break the graph.
    if state.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_shards(tiled, ranges)
        _check_held_once(held_once if mask is None else held_once | ~mask, token_ids, end[-1])
    return merge_shards(torch.where(tiled & held_once, states, torch.nan))


def add_shards(sums: Tensor, shard: Shard) -> Tensor:
    """The sum over the ranks, in their order: an all-reduce may add in another on each of them."""
    n_ranks = dist.get_world_size(shard.group)
    gathered = sums.new_empty(n_ranks * sums.numel())
    all_gather(gathered, sums.flatten(), group=shard.group)
    return reduce(torch.add, gathered.view(n_ranks, *sums.shape).unbind())


def _check_shards(tiled: Tensor, ranges: Tensor) -> None:  # [], [R, 2]
    if not tiled:
        held = ", ".join(f"{start} to {start + n - 1}" for start, n in ranges.long().tolist())
        raise ValueError(
            f"the ranks' logits are of the token ids {held}; together they have to be 0 to V - 1, "
            "each once (pass vocab_start where shards are not equal in size)"
        )


def _check_held_once(held_once: Tensor, token_ids: Tensor, vocab_size: Tensor) -> None:
    if not held_once.all():
        raise ValueError(
            f"token_ids holds {int(token_ids[~held_once][0])} at an unmasked position, which not "
            f"one of the ranks holds; accepted: 0 to {int(vocab_size) - 1}, on all ranks the same"
        )


class _TokenStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        *of_operator, shard = inputs
        a, execution = autograd.with_execution(TokenStatsArgs, of_operator)
        fold = FoldPartArgs(
            logits=a.logits,
            ref_logits=None,
            token_ids=a.token_ids,
            mask=a.mask,
            temperature=a.temperature,
            ref_temperature=a.temperature,
            softcap=a.softcap,
            ref_softcap=None,
        )
        whole = _fold_and_exchange(fold, shard, execution.backend)
        out = TokenStatsOutputs(whole.outputs.logprob, whole.outputs.entropy, whole.policy_state)
        local = a._replace(token_ids=_local_ids(a, shard))
        autograd.save_token_stats(ctx, local, out, execution, part=True)
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return autograd.only_first(ctx, autograd.token_stats_grad(ctx, *grads))


class _TokenKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        *of_operator, shard = inputs
        a, execution = autograd.with_execution(TokenKLArgs, of_operator)
        whole = _fold_and_exchange(pick(FoldPartArgs, a), shard, execution.backend)
        out = TokenKLOutputs(*whole.outputs, whole.policy_state, whole.ref_state)
        local = a._replace(token_ids=_local_ids(a, shard))
        autograd.save_token_kl(ctx, local, out, execution, part=True)
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return autograd.only_first(ctx, autograd.token_kl_grad(ctx, *grads))


class _TokenJSD(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        *of_operator, shard = inputs
        a, execution = autograd.with_execution(TokenJSDArgs, of_operator)
        fold = FoldPartArgs(
            logits=a.logits,
            ref_logits=a.ref_logits,
            token_ids=any_token(a.logits),
            mask=a.mask,
            temperature=a.temperature,
            ref_temperature=a.ref_temperature,
            softcap=a.softcap,
            ref_softcap=a.ref_softcap,
        )
        whole = _fold_and_exchange(fold, shard, execution.backend)
        part = MixturePartArgs(
            logits=a.logits,
            ref_logits=a.ref_logits,
            mask=a.mask,
            policy_state=whole.policy_state,
            ref_state=whole.ref_state,
            beta=a.beta,
            temperature=a.temperature,
            ref_temperature=a.ref_temperature,
            softcap=a.softcap,
            ref_softcap=a.ref_softcap,
        )
        sums = torch.ops.kl_kernels.mixture_part(*part, execution.backend)
        jsd, mixture_kl = add_shards(sums.double(), shard).to(sums.dtype).unbind()
        jsd, mixture_kl = jsd.clamp_min(0.0), mixture_kl.clone()
        out = TokenJSDOutputs(jsd, mixture_kl, whole.policy_state, whole.ref_state)
        autograd.save_token_jsd(ctx, a, out, execution)
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return autograd.only_first(ctx, autograd.token_jsd_grad(ctx, *grads))


def _kl_rewards(*inputs: Any) -> tuple[Tensor, ...]:
    *of_operator, shard = inputs
    a, execution = autograd.with_execution(KLRewardsArgs, of_operator)
    out = TokenKLOutputs(*_TokenKL.apply(*pick(TokenKLArgs, a), *execution, shard))
    finished = Finished(*(value.detach().double() for value in pick(Finished, out)))
    rewards, correction = (t.to(out.kl.dtype) for t in scored_rewards(finished, a))
    return rewards, correction, *out


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "token_stats": _TokenStats.apply,
    "token_kl": _TokenKL.apply,
    "token_jsd": _TokenJSD.apply,
    "kl_rewards": _kl_rewards,
}


def _sharded(name: str, shard: Shard) -> Callable[..., Any]:
    function = _FUNCTIONS[name]
    return lambda *args: function(*args, shard)
