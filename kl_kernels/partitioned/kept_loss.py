"""The policy loss over kept sets, whose gradient is there before anybody asks for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kl_kernels.algebra.epilogues import policy_losses
from kl_kernels.algebra.row import Finished
from kl_kernels.ops.autograd import given_away, only_first
from kl_kernels.partitioned.functions import upstream_of
from kl_kernels.partitioned.kept import KeptArgs, KeptOutputs
from kl_kernels.partitioned.kept_operators import kept_gradient
from kl_kernels.schemas import Execution, PolicyLossArgs


class KeptPolicyLoss(torch.autograd.Function):
    """(loss, terms [8, B, T]) of the logits, which `kept` and `a` hold as well, detached."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,  # [B, T, V]
        kept: KeptArgs,
        a: PolicyLossArgs,
        execution: Execution,
    ) -> tuple[Tensor, Tensor]:
        out = KeptOutputs(*torch.ops.kl_kernels.kept_kl(*kept, *execution))
        terms, g = policy_losses(Finished(*out[: len(Finished._fields)]), a)
        gradient = None
        if ctx.needs_input_grad[0]:
            gradient = kept_gradient(kept, out, upstream_of(g, a, out.kl.dtype), execution)
        of_tokens = torch.where(a.mask, torch.stack(terms), 0.0).to(out.kl.dtype)
        ctx.save_for_backward(gradient)
        ctx.backend = execution.backend
        ctx.mark_non_differentiable(of_tokens)
        return of_tokens[0].sum(), of_tokens

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _terms: None) -> tuple[Tensor | None, ...]:
        return only_first(ctx, *given_away(ctx, grad_loss))
