"""The KL of a batch as one number, in a unit that is said."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from kl_kernels.checks import check_like, check_mask, check_measured
from kl_kernels.rl.collectives import sum_over_ranks
from kl_kernels.rl.masked import select
from kl_kernels.rl.sequences import sequences_of

if TYPE_CHECKING:  # not in every build of torch
    from torch.distributed import ProcessGroup

Unit = Literal["sequence_sum", "token_mean"]
UNITS = get_args(Unit)


def measure_kl(
    kl: Tensor | float,
    mask: Tensor | None,
    unit: str,
    group: ProcessGroup | None = None,
    cu_seqlens: Tensor | None = None,  # [S + 1]
) -> float | None:
    """The KL of a batch in nats: "sequence_sum" or "token_mean"; None where no token has one.

    A [B, T] tensor of per-token KL is reduced here: "sequence_sum" sums each sequence and averages
    over sequences that have tokens, "token_mean" averages over all tokens. A plain number (or 0-dim
    tensor) is taken as being in that unit. With `group`, sequences and tokens of all its ranks are
    summed by one collective; a number leaves open how many it stands for, and is refused. With
    `cu_seqlens` the tensor is [N] or [1, N], of packed sequences.
    """
    if not isinstance(kl, Tensor) or kl.ndim == 0:
        if mask is not None:
            raise ValueError(
                "mask is given, but kl is a single number; it needs [B, T] per-token KL"
            )
        if group is not None:
            raise ValueError(
                "group is given, but kl is a single number; it needs [B, T] per-token KL and a mask"
            )
        if cu_seqlens is not None:
            raise ValueError(
                "cu_seqlens is given, but kl is a single number; it needs [N] per-token KL and a "
                "mask"
            )
        return check_measured("kl", kl)
    sequences = sequences_of("kl", kl, cu_seqlens)
    if mask is None:
        raise ValueError(f"kl has shape {tuple(kl.shape)}, so it needs a mask of that shape")
    check_like("mask", mask, "kl", kl)
    mask = check_mask("mask", mask)
    total = select(kl, mask, torch.float64).sum()
    n_tokens, n_sequences = mask.sum(), sequences.with_tokens(mask)
    sums = torch.stack([total, n_tokens.double(), n_sequences.double()])
    if group is not None:
        sums = sum_over_ranks(sums.detach(), group)
    total, n_tokens, n_sequences = sums.tolist()
    if n_tokens == 0:
        return None  # and not 0, which would be a policy that has not moved
    return float(total / (n_tokens if unit == "token_mean" else n_sequences))


def has_tokens(mask: Tensor, group: ProcessGroup | None) -> bool:  # [B, T]
    """Whether the mask, or with `group` that of any of its ranks, leaves a token to measure."""
    found = mask.bool().any().double()
    return bool(found if group is None else sum_over_ranks(found, group))
