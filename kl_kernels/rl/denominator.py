"""Divisor of every rank's loss with which averaged gradients are those of the whole batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from kl_kernels.checks import check_choice, check_mask, check_plain
from kl_kernels.rl.collectives import n_ranks_of
from kl_kernels.rl.losses import AGGREGATIONS, Aggregation, count
from kl_kernels.rl.sequences import sequences_of

if TYPE_CHECKING:  # not in every build of torch
    from torch.distributed import ProcessGroup


def global_denominator(
    mask: Tensor,  # [B, T]
    aggregation: Aggregation = "token-mean",
    *,
    group: ProcessGroup | None = None,
    cu_seqlens: Tensor | None = None,  # [S + 1]
) -> Tensor:
    """The `denominator` of a loss over a batch that is spread over ranks, micro-batches or both.

    The number of tokens ("token-mean") or of sequences (the other aggregations) under the masks of
    all ranks, divided by the number of ranks. DDP, FSDP2 and Megatron average gradients over the
    ranks; with this denominator the average is the gradient of one process over the whole batch,
    however unequal the ranks' counts are. (Dividing each rank's loss by its own count weighs tokens
    by their rank; dividing by the count of all ranks makes gradients too small by their number.)

    Call it once per optimizer step, on every rank, with the mask of all the rank's micro-batches,
    and pass it to the loss of each of them. It takes one collective, of one number.

    Args:
        mask: [B, T] bool, or numbers that are 0 or 1 (looked at on a CPU alone), all of this rank's
            batch. Sequences without tokens do not count. A rank may have no tokens; it must call
            all the same, and run its backward.
        aggregation: that of the loss: "token-mean", "seq-mean-token-sum", "seq-mean-token-mean" or
            "seq-mean-token-sum-norm" (which also divides by T: pad all ranks to the same T).
        group: the ranks that gradients are averaged over. None: all ranks of the default process
            group, or this process alone where torch.distributed is not initialised. Ranks that
            share their data (tensor or pipeline parallel) may be in it: they leave the quotient
            as it is.
        cu_seqlens: [S + 1] int32 or int64 of packed sequences, ascending from 0 to N (looked at on
            a CPU alone): sequence s has the tokens from cu_seqlens[s] to before cu_seqlens[s + 1],
            and the mask is [N] or [1, N]. None: each row is one.

    Returns:
        0-dim float32 on the mask's device, the same on all ranks; 0 where no rank has tokens.

    Raises:
        TypeError, ValueError: mask is not a [B, T] tensor, the aggregation is not one of those
            above, or this process is not in the group.

    Examples:
        >>> import torch, kl_kernels
        >>> mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]])
        >>> kl_kernels.global_denominator(mask)
        tensor(4.)
        >>> kl_kernels.global_denominator(mask, "seq-mean-token-mean")
        tensor(2.)
    """
    check_choice("aggregation", aggregation, AGGREGATIONS)
    sequences = sequences_of("mask", mask, cu_seqlens)
    check_plain("mask", mask)
    total = count(check_mask("mask", mask), aggregation, sequences)
    n_ranks = 1
    if group is not None or (dist.is_available() and dist.is_initialized()):
        n_ranks = n_ranks_of(group)
        dist.all_reduce(total, group=group)
    return total.to(torch.float32) / n_ranks
