"""The KL of a batch as one number, in a unit that is said."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from kl_kernels.checks import check_batch, check_like
from kl_kernels.rl.collectives import sum_over_ranks
from kl_kernels.rl.masked import select

if TYPE_CHECKING:  # not in every build of torch
    from torch.distributed import ProcessGroup

Unit = Literal["sequence_sum", "token_mean"]
UNITS = get_args(Unit)


def measure_kl(
    kl: Tensor | float,
    mask: Tensor | None,
    unit: str,
    group: ProcessGroup | None = None,
) -> float:
    """The KL of a batch in nats: "sequence_sum" or "token_mean".

    A [B, T] tensor of per-token KL is reduced here: "sequence_sum" sums each sequence and averages
    over sequences that have tokens, "token_mean" averages over all tokens. A plain number (or 0-dim
    tensor) is taken as being in that unit. With `group`, sequences and tokens of all its ranks are
    summed by one collective; a number leaves open how many it stands for, and is refused.
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
        return float(kl)
    check_batch("kl", kl)
    if mask is None:
        raise ValueError(f"kl has shape {tuple(kl.shape)}, so it needs a mask of that shape")
    check_like("mask", mask, "kl", kl)
    total = select(kl, mask, torch.float64).sum()
    n_tokens, n_sequences = mask.bool().sum(), mask.bool().any(1).sum()
    sums = torch.stack([total, n_tokens.double(), n_sequences.double()])
    if group is not None:
        sums = sum_over_ranks(sums.detach(), group)
    total, n_tokens, n_sequences = sums.tolist()
    return total / max(1, n_tokens if unit == "token_mean" else n_sequences)
