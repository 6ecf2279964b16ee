"""The operators as torch knows them: registration, and fakes.

`torch.ops.kl_kernels.*` exists once this file is imported, compiled library or not. Logits are
[B, T, V] with any strides as long as neighbouring logits are neighbours in memory (a copy is made
otherwise); everything per token is [B, T]. Shaping, checking and naming is `logits.py`'s job.

A *state* is the pair a row's gradient needs besides the logits, stacked as [2, B, T] float32: the
anchor (near the row's largest logit, in log2 units) and the sum of 2^(logit - anchor).

Backward operators write into a buffer they are given: a new one, or with `inplace_backward` the
logits themselves. `autograd.py` registers the gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kl_kernels.backends import dispatch
from kl_kernels.backends.dispatch import casts_gradients as casts_gradients
from kl_kernels.schemas import (
    MIXTURE_SUMS,
    OPERATORS,
    POLICY_LOSS_TERMS,
    Execution,
    TokenKLOutputs,
    argument_types,
    output_dtype,
    schema,
    state_fields,
    tensor_fields,
)

library = torch.library.Library("kl_kernels", "DEF")

BACKEND = "str? backend"


def are_neighbours(logits: Tensor) -> bool:
    """Whether neighbouring logits are neighbours in memory."""
    return logits.stride(-1) == 1 or logits.shape[-1] == 1


LOGITS = {"logits", "ref_logits", "grad_logits", "gradient"}
# Each operator's class of arguments, and (place, whether it is logits) of its tensors.
LAYOUTS = {
    name: (args, tuple((i, args._fields[i] in LOGITS) for i in tensor_fields(args)))
    for name, (args, _) in OPERATORS.items()
}


def _run(name: str, args: Sequence[Any], backend: str | None) -> Any:
    """Run the operator on what kernels may rely on.

    Logits have stride 1 over V, everything per token is contiguous.
    """
    cls, places = LAYOUTS[name]
    laid_out, tensors = list(args), []
    for i, is_logits in places:
        tensor = laid_out[i]
        if tensor is not None:
            if not is_logits or not are_neighbours(tensor):
                laid_out[i] = tensor = tensor.contiguous()
            tensors.append(tensor)
    return getattr(dispatch.choose(backend, tensors), name)(cls(*laid_out))


def define(name: str, schema: str, implementation: Any, fake: Any) -> None:
    library.define(name + schema)
    # CompositeExplicitAutograd: one entry for every device; the backend is chosen inside.
    library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"kl_kernels::{name}", fake, lib=library)


def _define_plain(name: str, fake: Any) -> None:
    """The operator's arguments, then the backend that is to run it."""

    def implementation(*args: Any) -> Any:
        return _run(name, args[:-1], args[-1])

    define(name, schema(name, BACKEND), implementation, fake)


def _define_differentiable(name: str) -> None:
    """The operator's arguments, then those of `Execution`."""
    n, outputs = len(OPERATORS[name].args._fields), OPERATORS[name].outputs

    def implementation(*args: Any) -> Any:
        return _run(name, args[:n], args[-1])  # the gradient alone may be in place

    def fake(logits: Tensor, *_: Any) -> Any:
        is_state = [field.endswith("_state") for field in outputs._fields]
        return tuple(_per_token(logits, 2) if s else _per_token(logits) for s in is_state)

    options = (f"{kind} {option}" for option, kind in argument_types(Execution).items())
    define(name, schema(name, *options), implementation, fake)


def _define_backward(name: str) -> None:
    """`name` returns a new gradient, `name_` writes into the buffer it is given."""
    logits_at = OPERATORS[name].args._fields.index("logits")

    def in_place(*args: Any) -> None:
        _run(name, args[:-1], args[-1])

    def implementation(*args: Any) -> Tensor:
        *given, backend = args
        grad_logits = new_gradient(args[logits_at])
        _run(name, (*given, grad_logits), backend)
        return grad_logits

    def fake(*args: Any) -> Tensor:
        return new_gradient(args[logits_at])

    define(name, schema(name, BACKEND, returns_gradient=True), implementation, fake)
    define(name + "_", schema(name, BACKEND), in_place, _nothing)


def new_gradient(logits: Tensor) -> Tensor:
    """Uninitialised and contiguous, whatever the logits' strides."""
    return logits.new_empty(logits.shape)


# Fakes: shapes and dtypes without data, for torch.compile and meta tensors.


def _per_token(logits: Tensor, *leading: int) -> Tensor:  # [*leading, B, T]
    return logits.new_empty((*leading, *logits.shape[:-1]), dtype=output_dtype(logits))


def _nothing(*_: Any) -> None:
    pass


def _state_of_part(logits: Tensor, ref_logits: Tensor | None, *_: Any) -> Tensor:
    return _per_token(logits, len(state_fields(ref_logits is not None)))


def _state_of_tail(logits: Tensor, *_: Any) -> Tensor:
    return _per_token(logits, len(state_fields(has_ref=False)))


def _outputs_of_parts(states: Tensor, *_: Any) -> tuple[Tensor, ...]:
    shape = states.shape[2:]
    leading = ((2,) if field.endswith("_state") else () for field in TokenKLOutputs._fields)
    return tuple(states.new_empty((*first, *shape)) for first in leading)


def _sums_of_part(logits: Tensor, *_: Any) -> Tensor:
    return _per_token(logits, len(MIXTURE_SUMS))


def _loss_terms(logits: Tensor, *_: Any) -> Tensor:
    return _per_token(logits, len(POLICY_LOSS_TERMS))


def _advantages_and_returns(rewards: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rewards), torch.empty_like(rewards)


for _name in ("token_stats", "token_kl", "token_jsd", "kl_rewards"):
    _define_differentiable(_name)
for _name in ("token_stats_backward", "token_kl_backward", "token_jsd_backward"):
    _define_backward(_name)
_define_plain("fold_part", _state_of_part)
_define_plain("fold_tail", _state_of_tail)
_define_plain("finish_parts", _outputs_of_parts)
_define_plain("mixture_part", _sums_of_part)
_define_plain("policy_loss", _loss_terms)
_define_plain("scale_gradient", _nothing)
_define_plain("gae", _advantages_and_returns)
