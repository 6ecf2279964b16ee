"""Sums over the ranks of a process group, differentiable.

Gradients are those of the sum of all ranks' losses, so backward is a sum over the ranks as well and
must run on all of them. DDP and FSDP then divide gradients by the number of ranks: what is
trained on is the mean of the ranks' losses, as everywhere in data parallelism.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from kl_kernels.checks import check_plain

if TYPE_CHECKING:  # not in every build of torch
    from torch.distributed import ProcessGroup


def n_ranks_of(group: ProcessGroup | None) -> int:
    """The number of ranks of a group, None: of all; an error where this process is none of them."""
    n_ranks = dist.get_world_size(group)
    if n_ranks < 1:
        raise ValueError("group does not hold this process; pass one that it is a member of")
    return n_ranks


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return sum_over_ranks(grad, ctx.group), None


def sum_over_ranks(x: Tensor, group: ProcessGroup) -> Tensor:  # [...] -> [...]
    check_plain("what is summed over group", x)
    total: Tensor = _Sum.apply(x, group)
    return total


def from_all_ranks(x: Tensor, group: ProcessGroup) -> Tensor:  # [...] -> [R, ...]
    """Every rank's x: a sum in which each rank has a row of its own."""
    check_plain("what is gathered over group", x)
    own = torch.zeros(dist.get_world_size(group), *x.shape, dtype=x.dtype, device=x.device)
    own_row = torch.arange(len(own), device=x.device) == dist.get_rank(group)
    return sum_over_ranks(torch.where(own_row.view(-1, *[1] * x.ndim), x, own), group)
