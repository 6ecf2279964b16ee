"""Autograd functions of a vocabulary in parts: one for KL, one for a mixture's divergence.

The parts are a shard of the logits on each rank (`shards.ShardedLogits`), or tiles that a linear
head makes one at a time (`heads.LinearHeads`). Both fold their parts into the states of whole rows,
and both turn the upstream gradients of rows into gradients of their inputs; all else is here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from kl_kernels.algebra.parts import Whole, any_token
from kl_kernels.ops.autograd import once

Inputs = Sequence[Any]  # tensors, of which those of a reference may be None


class Upstream(NamedTuple):
    """Gradient of the loss with respect to each output, each [B, T]."""

    logprob: Tensor | None
    kl: Tensor | None
    forward_kl: Tensor | None
    entropy: Tensor | None


class Saved(NamedTuple):
    """Statistics of the folded rows that backward needs, each [...] or, states, [2, ...]."""

    policy_state: Tensor
    ref_state: Tensor
    kl: Tensor  # for a mixture KL(policy || mixture)
    entropy: Tensor


class Parts(Protocol):
    """A vocabulary that comes in parts."""

    def rows(self, like: Tensor, mask: Tensor | None) -> Any:
        """Find the rows to fold, of the shape of `like` [B, T]; once, as this may synchronise."""

    def fold(self, inputs: Inputs, token_ids: Tensor, rows: Any) -> Whole:
        """Fold the parts into whole rows."""

    def spread(self, value: Tensor, rows: Any) -> Tensor:
        """Bring a value of the folded rows to [B, T], 0 where masked."""

    def mixture_sums(self, inputs: Inputs, rows: Any, whole: Whole, beta: float) -> Tensor:
        """Sum both divergences of a mixture over the parts, [len(MIXTURE_SUMS), ...]."""

    def kl_gradients(
        self,
        inputs: Inputs,
        token_ids: Tensor,
        rows: Any,
        saved: Saved,
        upstream: Upstream,
        needs: Sequence[bool],
    ) -> Sequence[Tensor | None]:
        """Return the gradients of the policy's inputs, the first ones."""

    def jsd_gradients(
        self,
        inputs: Inputs,
        rows: Any,
        saved: Saved,
        beta: float,
        grad_jsd: Tensor,
        needs: Sequence[bool],
    ) -> Sequence[Tensor | None]:
        """Return the gradients of the policy's inputs, the first ones."""


class PartitionedKL(torch.autograd.Function):
    """(logprob, ref_logprob, kl, forward_kl, entropy), each [B, T].

    The reference is a constant; without one, logprob and entropy alone mean anything.
    """

    @staticmethod
    def forward(
        ctx: Any, parts: Parts, token_ids: Tensor, mask: Tensor | None, *inputs: Tensor | None
    ) -> tuple[Tensor, ...]:
        rows = parts.rows(token_ids, mask)
        whole = parts.fold(inputs, token_ids, rows)
        outputs = tuple(parts.spread(value, rows) for value in whole.outputs)
        ctx.parts, ctx.rows = parts, rows
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(outputs[1])
        saved = Saved(whole.policy_state, whole.ref_state, whole.outputs.kl, whole.outputs.entropy)
        ctx.save_for_backward(token_ids, mask, *saved, *inputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        logprob, _, kl, forward_kl, entropy = grads
        upstream = Upstream(logprob, kl, forward_kl, entropy)
        if all(grad is None for grad in upstream):
            return (None,) * len(ctx.needs_input_grad)
        token_ids, mask, *rest = ctx.saved_tensors
        saved, inputs = Saved(*rest[:4]), rest[4:]
        needs = ctx.needs_input_grad[3:]
        gradients = ctx.parts.kl_gradients(inputs, token_ids, ctx.rows, saved, upstream, needs)
        return _behind(3, ctx, inputs, gradients)


class PartitionedJSD(torch.autograd.Function):
    """(divergence, the policy's entropy), each [B, T], for 0 < beta < 1."""

    @staticmethod
    def forward(
        ctx: Any, parts: Parts, mask: Tensor | None, beta: float, *inputs: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        token_ids = any_token(inputs[0])  # type: ignore[arg-type]
        rows = parts.rows(token_ids, mask)
        whole = parts.fold(inputs, token_ids, rows)
        jsd, mixture_kl = parts.mixture_sums(inputs, rows, whole, beta).unbind()
        entropy = parts.spread(whole.outputs.entropy, rows)
        ctx.parts, ctx.rows, ctx.beta = parts, rows, beta
        ctx.mark_non_differentiable(entropy)
        saved = Saved(whole.policy_state, whole.ref_state, mixture_kl, whole.outputs.entropy)
        ctx.save_for_backward(mask, *saved, *inputs)
        return parts.spread(jsd.clamp_min(0.0), rows), entropy

    @staticmethod
    def backward(ctx: Any, grad_jsd: Tensor, _entropy: None) -> tuple[Tensor | None, ...]:
        mask, *rest = ctx.saved_tensors
        saved, inputs = Saved(*rest[:4]), rest[4:]
        needs = ctx.needs_input_grad[3:]
        gradients = ctx.parts.jsd_gradients(inputs, ctx.rows, saved, ctx.beta, grad_jsd, needs)
        return _behind(3, ctx, inputs, gradients)


def _behind(
    n: int, ctx: Any, inputs: Inputs, gradients: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """The gradients of the inputs behind the first n arguments; None for all others."""
    found = [once(gradient, of) for gradient, of in zip(gradients, inputs)]
    return *[None] * n, *found, *[None] * (len(ctx.needs_input_grad) - n - len(found))
