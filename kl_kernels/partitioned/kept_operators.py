"""Kept sets as torch operators, and the gradient of the logits by them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kl_kernels.ops import autograd, library
from kl_kernels.partitioned.functions import Upstream
from kl_kernels.partitioned.kept import (
    KeptArgs,
    KeptBackwardArgs,
    KeptOutputs,
    kept_kl,
    kept_kl_backward,
    places_of,
)
from kl_kernels.schemas import (
    Execution,
    TokenKLArgs,
    TokenKLOutputs,
    output_dtype,
    pick,
    returned,
    schema_of,
    tensor_fields,
)


def kept_gradient(
    a: KeptArgs, out: KeptOutputs, upstream: Upstream, execution: Execution
) -> Tensor | None:
    """The gradient of the logits, [B, T, V]; None if no upstream gradient is given."""
    if all(grad is None for grad in upstream):
        return None
    of_entries = KeptBackwardArgs(*upstream, ref_share=out.ref_share, **a._asdict())
    entries = torch.ops.kl_kernels.kept_kl_backward(*of_entries)  # before logits are written over
    # (Reference logits are None only where no KL has a gradient.)
    of_rows = pick(TokenKLArgs, a._replace(mask=a.rows(listed=False)))
    backward = autograd.kl_backward_args(of_rows, pick(TokenKLOutputs, out), *upstream)
    gradient = autograd.kl_gradient(backward, execution)
    if gradient is not None:
        gradient[places_of(a.segments().row, a.kept_ids, a.logits.shape)] = entries
    return gradient


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    a, ctx.execution = autograd.with_execution(KeptArgs, inputs)
    out = KeptOutputs(*output)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(out.ref_logprob, out.policy_state, out.ref_state, out.ref_share)
    ctx.numbers = a._replace(**dict.fromkeys(TENSORS))
    ctx.save_for_backward(*(getattr(a, field) for field in TENSORS), *out)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    a = ctx.numbers._replace(**dict(zip(TENSORS, saved)))
    grad = KeptOutputs(*grads)  # type: ignore[arg-type]
    upstream = Upstream(grad.logprob, grad.kl, grad.forward_kl, grad.entropy)
    out = KeptOutputs(*saved[len(TENSORS) :])
    return autograd.only_first(ctx, kept_gradient(a, out, upstream, ctx.execution))


def _fake_outputs(logits: Tensor, *_: Any) -> tuple[Tensor, ...]:
    def per_token(*leading: int) -> Tensor:
        return logits.new_empty((*leading, *logits.shape[:-1]), dtype=output_dtype(logits))

    is_state = (field.endswith("_state") for field in KeptOutputs._fields)
    return tuple(per_token(2) if s else per_token() for s in is_state)


def _fake_entries(*args: Any) -> Tensor:
    a = KeptBackwardArgs(*args)
    return a.logits.new_empty(a.kept_ids.shape)


TENSORS = [KeptArgs._fields[i] for i in tensor_fields(KeptArgs)]

library.define(
    "kept_kl",
    schema_of(returned(KeptOutputs), KeptArgs, Execution),
    kept_kl,
    _fake_outputs,
)
library.define(
    "kept_kl_backward",
    schema_of(returned("gradient"), KeptBackwardArgs),
    kept_kl_backward,
    _fake_entries,
)
torch.library.register_autograd(
    "kl_kernels::kept_kl", _backward, setup_context=_setup, lib=library.library
)
torch.library.register_autograd(
    "kl_kernels::kept_kl_backward", autograd.no_second_derivative, lib=library.library
)
