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

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kl_kernels.algebra.epilogues import rewards_of
from kl_kernels.algebra.parts import (
    Whole,
    finish_parts,
    held_once,
    local_token_ids,
    merge_parts,
    tile_the_vocabulary,
)
from kl_kernels.algebra.row import Finished
from kl_kernels.checks import check_integer, refuse_transforms
from kl_kernels.ops import autograd
from kl_kernels.partitioned.functions import (
    Inputs,
    PartitionedJSD,
    PartitionedKL,
    Saved,
    Upstream,
)
from kl_kernels.schemas import (
    Execution,
    FinishPartsArgs,
    FoldPartArgs,
    KLRewardsArgs,
    MixturePartArgs,
    TokenJSDArgs,
    TokenJSDBackwardArgs,
    TokenKLArgs,
    TokenKLBackwardArgs,
    TokenStatsArgs,
    pick,
)

# torch 2.13 renamed it, and warns of the old name. Builds without distributed have neither.
all_gather: Any = getattr(dist, "all_gather_single", getattr(dist, "all_gather_into_tensor", None))


class Shard(NamedTuple):
    """Where this rank's logits lie in the vocabulary."""

    group: dist.ProcessGroup
    start: int  # the global id of its first logit


def operator_over(
    name: str, logits: Tensor, group: dist.ProcessGroup | None, vocab_start: int | None
) -> Callable[..., Any]:
    """The operator `name`, of whole logits or, with a group, of this rank's.

    The results are the operator's; behind them, states that whole logits alone have.

    Raises:
        TypeError, ValueError: `vocab_start` without a group, below 0 or no int, or a group that
            this rank is not in.
    """
    if group is not None:
        refuse_transforms(f"{name} with a group")
        return partial(_SHARDED[name], shard_of(logits.shape[-1], group, vocab_start))
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


def exchange(
    state: Tensor,  # [F, B, T]
    shard: Shard,
    vocab_size: int,  # this shard's
    token_ids: Tensor,  # [B, T]
    mask: Tensor | None,  # [B, T]
    backend: str | None,
) -> Whole:
    """The whole vocabulary's rows, by one collective that brings the shards' ranges along."""
    n_ranks = dist.get_world_size(shard.group)
    # Filled where they are, as a copy from the host would synchronise; exact up to 2^24.
    own_range = (state.new_full((1,), float(n)) for n in (shard.start, vocab_size))
    packed = torch.cat([state.flatten(), *own_range])
    gathered = packed.new_empty(n_ranks * len(packed))
    all_gather(gathered, packed, group=shard.group)
    states, ranges = gathered.view(n_ranks, -1).split([state.numel(), 2], dim=1)
    states = states.reshape(n_ranks, *state.shape)
    # Asking a GPU would synchronise; asking while torch.compile traces would break the graph.
    if state.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_shards(tile_the_vocabulary(ranges), ranges)
        held = held_once(states)
        n_tokens = ranges[:, 1].sum()
        _check_held_once(held if mask is None else held | ~mask, token_ids, n_tokens)
    return whole_rows(states, ranges, mask, state.dtype, backend)


def whole_rows(
    states: Tensor,  # [parts, F, B, T]
    ranges: Tensor | None,  # [parts, 2]
    mask: Tensor | None,  # [B, T]
    dtype: torch.dtype,
    backend: str | None,
) -> Whole:
    """Rows of `dtype` from the states of their parts; see `schemas.FinishPartsArgs`."""
    if states.dtype != dtype:  # some are merged already, with more digits than kernels take
        return finish_parts(merge_parts(states), mask, dtype)
    args = FinishPartsArgs(states, ranges, mask)
    *outputs, policy_state, ref_state = torch.ops.kl_kernels.finish_parts(*args, backend)
    return Whole(Finished(*outputs), policy_state, ref_state)


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
            f"the ranks' logits are of the token ids {held}; together they must be 0 to V - 1, "
            "each once (pass vocab_start where shards are not equal in size)"
        )


def _check_held_once(held_once: Tensor, token_ids: Tensor, vocab_size: Tensor) -> None:
    if not held_once.all():
        raise ValueError(
            f"token_ids holds {int(token_ids[~held_once][0])} at an unmasked position, which not "
            f"one of the ranks holds; accepted: 0 to {int(vocab_size) - 1}, on all ranks the same"
        )


class ShardedLogits(NamedTuple):
    """Parts that are shards of the logits, one on each rank.

    Inputs: logits [B, T, V_local], and the reference's, or None.
    """

    shard: Shard
    temperature: float
    ref_temperature: float
    softcap: float | None
    ref_softcap: float | None
    execution: Execution

    @classmethod
    def of(cls, shard: Shard, a: Any, execution: Execution) -> ShardedLogits:
        """The shard of an operator's arguments."""
        if not hasattr(a, "ref_logits"):
            return cls(shard, a.temperature, a.temperature, a.softcap, None, execution)
        transforms = a.temperature, a.ref_temperature, a.softcap, a.ref_softcap
        return cls(shard, *transforms, execution)

    def rows(self, which: Tensor | None) -> Tensor | None:
        return which  # a mask: kernels skip what it rules out

    def fold(self, inputs: Inputs, token_ids: Tensor, rows: Tensor | None) -> Whole:
        logits, ref_logits = inputs
        vocab_size = logits.shape[-1]
        args = FoldPartArgs(
            logits=logits,
            ref_logits=ref_logits,
            token_ids=local_token_ids(token_ids, self.shard.start, vocab_size),
            mask=rows,
            temperature=self.temperature,
            ref_temperature=self.ref_temperature,
            softcap=self.softcap,
            ref_softcap=self.ref_softcap,
        )
        state = torch.ops.kl_kernels.fold_part(*args, self.execution.backend)
        return exchange(state, self.shard, vocab_size, token_ids, rows, self.execution.backend)

    def mixture_sums(
        self, inputs: Inputs, rows: Tensor | None, whole: Whole, beta: float
    ) -> Tensor:
        logits, ref_logits = inputs
        args = MixturePartArgs(
            logits=logits,
            ref_logits=ref_logits,
            mask=rows,
            policy_state=whole.policy_state,
            ref_state=whole.ref_state,
            beta=beta,
            temperature=self.temperature,
            ref_temperature=self.ref_temperature,
            softcap=self.softcap,
            ref_softcap=self.ref_softcap,
        )
        sums = torch.ops.kl_kernels.mixture_part(*args, self.execution.backend)
        return add_shards(sums.double(), self.shard).to(sums.dtype)

    def kl_gradients(
        self,
        inputs: Inputs,
        token_ids: Tensor,
        rows: Tensor | None,
        saved: Saved,
        upstream: Upstream,
        needs: Sequence[bool],
    ) -> list[Tensor | None]:
        logits, ref_logits = inputs
        args = TokenKLBackwardArgs(
            grad_logprob=upstream.logprob,
            grad_kl=upstream.kl,
            grad_forward_kl=upstream.forward_kl,
            grad_entropy=upstream.entropy,
            logits=logits,
            ref_logits=ref_logits,
            token_ids=local_token_ids(token_ids, self.shard.start, logits.shape[-1]),
            mask=rows,
            policy_state=saved.policy_state,
            ref_state=saved.ref_state,
            kl=saved.kl,
            entropy=saved.entropy,
            temperature=self.temperature,
            ref_temperature=self.ref_temperature,
            softcap=self.softcap,
            ref_softcap=self.ref_softcap,
            part=True,
            grad_logits=autograd.LATER,
        )
        return [autograd.kl_gradient(args, self.execution)]

    def jsd_gradients(
        self,
        inputs: Inputs,
        rows: Tensor | None,
        saved: Saved,
        beta: float,
        grad_jsd: Tensor,
        needs: Sequence[bool],
    ) -> list[Tensor | None]:
        logits, ref_logits = inputs
        args = TokenJSDBackwardArgs(
            grad_jsd=grad_jsd,
            logits=logits,
            ref_logits=ref_logits,
            mask=rows,
            policy_state=saved.policy_state,
            ref_state=saved.ref_state,
            mixture_kl=saved.kl,
            beta=beta,
            temperature=self.temperature,
            ref_temperature=self.ref_temperature,
            softcap=self.softcap,
            ref_softcap=self.ref_softcap,
            grad_logits=autograd.LATER,
        )
        return [autograd.run_backward("token_jsd_backward", args, self.execution)]


# The operators of logits that are sharded: the same arguments, and the results without the states.


def _token_stats(shard: Shard, *inputs: Any) -> tuple[Tensor, ...]:
    a, execution = autograd.with_execution(TokenStatsArgs, inputs)
    parts = ShardedLogits.of(shard, a, execution)
    logprob, _, _, _, entropy = PartitionedKL.apply(parts, a.token_ids, a.mask, a.logits, None)
    return logprob, entropy


def _token_kl(shard: Shard, *inputs: Any) -> tuple[Tensor, ...]:
    a, execution = autograd.with_execution(TokenKLArgs, inputs)
    parts = ShardedLogits.of(shard, a, execution)
    outputs: tuple[Tensor, ...] = PartitionedKL.apply(
        parts, a.token_ids, a.mask, a.logits, a.ref_logits
    )
    return outputs


def _token_jsd(shard: Shard, *inputs: Any) -> tuple[Tensor, ...]:
    a, execution = autograd.with_execution(TokenJSDArgs, inputs)
    parts = ShardedLogits.of(shard, a, execution)
    jsd, _ = PartitionedJSD.apply(parts, a.mask, a.beta, a.logits, a.ref_logits)
    return (jsd,)


def _kl_rewards(shard: Shard, *inputs: Any) -> tuple[Tensor, ...]:
    a, execution = autograd.with_execution(KLRewardsArgs, inputs)
    outputs = _token_kl(shard, *pick(TokenKLArgs, a), *execution)
    return *rewards_of(outputs, a), *outputs


_SHARDED: dict[str, Callable[..., Any]] = {
    "token_stats": _token_stats,
    "token_kl": _token_kl,
    "token_jsd": _token_jsd,
    "kl_rewards": _kl_rewards,
}
