"""A policy and a reference beside the mixture of both, (1 - beta) p + beta q."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kl_kernels.algebra.row import LN2


class Mixed(NamedTuple):
    """Both models beside their mixture m = (1 - beta) p + beta q, each [n, block]; nats."""

    p: Tensor
    q: Tensor
    log_p_over_m: Tensor
    log_q_over_m: Tensor

    def jsd(self, beta: float) -> Tensor:
        """Each logit's share of beta KL(q || m) + (1 - beta) KL(p || m); 0 or more."""
        return beta * self.q * self.log_q_over_m + (1 - beta) * self.p * self.log_p_over_m


def mix(
    tx: Tensor,  # [n, block] log2 units
    ty: Tensor,  # [n, block]
    sx: Tensor,  # [n] of the whole row
    sy: Tensor,  # [n]
    beta: float,
) -> Mixed:
    """The larger of p and q is the one to divide by: nothing overflows, equal logits give 0.

    Of d = log q - log p <= 0: log(p/m) = -log(1 + beta (e^d - 1)) and log(q/m) = log(p/m) + d; with
    the roles exchanged otherwise. -inf, at the floor in both, has a finite d and no weight.
    """
    d = LN2 * (ty - tx) + (torch.log(sx) - torch.log(sy))[:, None]
    q_is_larger = d > 0
    # (`where` of two numbers would round them to float32.)
    of_smaller = torch.full_like(d, beta).masked_fill(q_is_larger, 1 - beta)
    of_larger = -torch.log1p(of_smaller * torch.expm1(-d.abs()))
    return Mixed(
        torch.exp2(tx) / sx[:, None],
        torch.exp2(ty) / sy[:, None],
        log_p_over_m=torch.where(q_is_larger, of_larger - d, of_larger),
        log_q_over_m=torch.where(q_is_larger, of_larger, of_larger + d),
    )
