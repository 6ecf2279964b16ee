"""Autograd functions of a vocabulary in parts: one for KL, one for a mixture's divergence.

The parts are a shard of the logits on each rank (`shards.ShardedLogits`), or tiles that heads make
one at a time (`operators.LinearHeads`). Both fold their parts into the states of whole rows, and
both turn the upstream gradients of rows into gradients of their inputs; all else is here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from kl_kernels.algebra import row
from kl_kernels.algebra.epilogues import EXACT
from kl_kernels.algebra.parts import Whole, any_token
from kl_kernels.ops.autograd import once
from kl_kernels.schemas import PolicyLossArgs

Inputs = Sequence[Any]  # tensors, of which those of a reference may be None


class Upstream(NamedTuple):
    """Gradient of the loss with respect to each output, each [B, T]."""

    logprob: Tensor | None
    kl: Tensor | None
    forward_kl: Tensor | None
    entropy: Tensor | None


def upstream_of(g: row.Upstream, a: PolicyLossArgs, dtype: torch.dtype) -> Upstream:
    """The gradients that the loss has, and None for those that are 0 by its coefficients."""
    kl_has_gradient = a.kl_coef != 0 and a.kl_estimator == EXACT
    return Upstream(
        g.logprob.to(dtype),
        g.kl.to(dtype) if kl_has_gradient else None,
        None,
        g.entropy.to(dtype) if a.entropy_coef != 0 else None,
    )


class Saved(NamedTuple):
    """Statistics of the folded rows that backward needs, each [B, T] or, states, [2, B, T]."""

    policy_state: Tensor
    ref_state: Tensor
    kl: Tensor  # for a mixture KL(policy || mixture)
    entropy: Tensor


class Parts(Protocol):
    """A vocabulary that comes in parts."""

    def rows(self, which: Tensor | None) -> Tensor | None:
        """Find the rows to fold; once, as this may synchronise."""

    def fold(self, inputs: Inputs, token_ids: Tensor, rows: Tensor | None) -> Whole:
        """Fold the parts into whole rows."""

    def mixture_sums(
        self, inputs: Inputs, rows: Tensor | None, whole: Whole, beta: float
    ) -> Tensor:
        """Sum both divergences of a mixture over the parts, [len(MIXTURE_SUMS), B, T]."""

    def kl_gradients(
        self,
        inputs: Inputs,
        token_ids: Tensor,
        rows: Tensor | None,
        saved: Saved,
        upstream: Upstream,
        needs: Sequence[bool],
    ) -> Sequence[Tensor | None]:
        """Return the gradients of the policy's inputs, the first ones."""

    def jsd_gradients(
        self,
        inputs: Inputs,
        rows: Tensor | None,
        saved: Saved,
        beta: float,
        grad_jsd: Tensor,
        needs: Sequence[bool],
    ) -> Sequence[Tensor | None]:
        """Return the gradients of the policy's inputs, the first ones."""


class PartitionedKL(torch.autograd.Function):
    """(logprob, ref_logprob, kl, forward_kl, entropy), each [B, T].

    The reference is a constant; without one, logprob and entropy alone mean anything. `which` is
    the mask, [B, T], or what else `parts` takes in its place.
    """

    @staticmethod
    def forward(
        ctx: Any, parts: Parts, token_ids: Tensor, which: Tensor | None, *inputs: Tensor | None
    ) -> tuple[Tensor, ...]:
        rows = parts.rows(which)
        whole = parts.fold(inputs, token_ids, rows)
        out = whole.outputs
        ctx.parts = parts
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(out.ref_logprob)
        saved = Saved(whole.policy_state, whole.ref_state, out.kl, out.entropy)
        ctx.save_for_backward(token_ids, rows, *saved, *inputs)
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        logprob, _, kl, forward_kl, entropy = grads
        upstream = Upstream(logprob, kl, forward_kl, entropy)
        if all(grad is None for grad in upstream):
            return (None,) * len(ctx.needs_input_grad)
        token_ids, rows, *rest = ctx.saved_tensors
        saved, inputs = Saved(*rest[:4]), rest[4:]
        needs = ctx.needs_input_grad[3:]
        gradients = ctx.parts.kl_gradients(inputs, token_ids, rows, saved, upstream, needs)
        return _behind(3, ctx, inputs, gradients)


class PartitionedJSD(torch.autograd.Function):
    """(divergence, the policy's entropy), each [B, T], for 0 < beta < 1."""

    @staticmethod
    def forward(
        ctx: Any, parts: Parts, which: Tensor | None, beta: float, *inputs: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        token_ids = any_token(inputs[0])  # type: ignore[arg-type]
        rows = parts.rows(which)
        whole = parts.fold(inputs, token_ids, rows)
        jsd, mixture_kl = parts.mixture_sums(inputs, rows, whole, beta).unbind()
        entropy = whole.outputs.entropy
        ctx.parts, ctx.beta = parts, beta
        ctx.mark_non_differentiable(entropy)
        saved = Saved(whole.policy_state, whole.ref_state, mixture_kl, entropy)
        ctx.save_for_backward(rows, *saved, *inputs)
        return jsd.clamp_min(0.0), entropy

    @staticmethod
    def backward(ctx: Any, grad_jsd: Tensor, _entropy: None) -> tuple[Tensor | None, ...]:
        rows, *rest = ctx.saved_tensors
        saved, inputs = Saved(*rest[:4]), rest[4:]
        needs = ctx.needs_input_grad[3:]
        gradients = ctx.parts.jsd_gradients(inputs, rows, saved, ctx.beta, grad_jsd, needs)
        return _behind(3, ctx, inputs, gradients)


def _behind(
    n: int, ctx: Any, inputs: Inputs, gradients: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """The gradients of the inputs behind the first n arguments; None for all others."""
    found = [once(gradient, of) for gradient, of in zip(gradients, inputs)]
    return *[None] * n, *found, *[None] * (len(ctx.needs_input_grad) - n - len(found))
