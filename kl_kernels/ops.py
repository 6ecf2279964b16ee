"""The operators: one list of schemas, and for each its implementation and its fake.

`torch.ops.kl_kernels.*` exists once this file is imported, compiled library or not. Logits are
[B, T, V] with any strides as long as neighbouring logits are neighbours in memory (a copy is made
otherwise); everything per token is [B, T]. Shaping, checking and naming is `functional.py`'s job.

A *state* is the pair a row's gradient needs besides the logits, stacked as [2, B, T] float32: the
anchor (near the row's largest logit, in log2 units) and the sum of 2^(logit - anchor).

Backward kernels write into a buffer they are given: a new one, or with `inplace_backward` the
logits themselves. `autograd.py` registers the gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kl_kernels import dispatch
from kl_kernels.schemas import (
    ALONE_FIELDS,
    KERNELS,
    MIXTURE_SUMS,
    POLICY_LOSS_TERMS,
    STATE_FIELDS,
    output_dtype,
)

library = torch.library.Library("kl_kernels", "DEF")


def _laid_out(arg: Any) -> Any:
    """Kernels may rely on this: logits have stride 1 over V, everything per token is contiguous."""
    if not isinstance(arg, Tensor) or (_is_logits(arg) and are_neighbours(arg)):
        return arg
    return arg.contiguous()


def _is_logits(arg: Any) -> bool:
    return isinstance(arg, Tensor) and arg.ndim == 3 and arg.is_floating_point()


def are_neighbours(logits: Tensor) -> bool:
    """Whether neighbouring logits are neighbours in memory."""
    return logits.stride(-1) == 1 or logits.shape[-1] == 1


def _define(name: str, schema: str, implementation: Any) -> None:
    library.define(name + schema)
    # CompositeExplicitAutograd: one entry for every device; the backend is chosen inside.
    library.impl(name, implementation, "CompositeExplicitAutograd")


def _with_options(schema: str, *options: str) -> str:
    """The schema with `options` after its arguments."""
    arguments, returns = schema.split(") -> ")
    return f"{arguments.rstrip()}, {', '.join(options)}) -> {returns}"


def _run(name: str, args: Sequence[Any], backend: str | None) -> Any:
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    return getattr(dispatch.choose(backend, tensors), name)(*map(_laid_out, args))


def _define_plain(name: str) -> None:
    """The kernel's arguments, then the backend that is to run it."""

    def implementation(*args: Any) -> Any:
        return _run(name, args[:-1], args[-1])

    _define(name, _with_options(KERNELS[name], "str? backend"), implementation)


def _define_differentiable(name: str) -> None:
    """The same with `inplace_backward`, which is the gradient formula's business alone."""

    def implementation(*args: Any) -> Any:
        return _run(name, args[:-2], args[-1])

    schema = _with_options(KERNELS[name], "bool inplace_backward", "str? backend")
    _define(name, schema, implementation)


def _define_backward(name: str) -> None:
    """`name` returns a new gradient, `name_` writes into the buffer it is given."""
    schema = _with_options(KERNELS[name], "str? backend")

    def in_place(*args: Any) -> None:
        _run(name, args[:-1], args[-1])

    def implementation(*args: Any) -> Tensor:
        *kernel_args, backend = args
        grad_logits = new_gradient(next(filter(_is_logits, kernel_args)))
        _run(name, (*kernel_args, grad_logits), backend)
        return grad_logits

    _define(name + "_", schema, in_place)
    arguments, _, options = schema.partition("Tensor(a!) grad_logits, ")
    _define(name, arguments + options.replace("()", "Tensor grad_logits"), implementation)


def new_gradient(logits: Tensor) -> Tensor:
    """Uninitialised and contiguous, whatever the logits' strides."""
    return logits.new_empty(logits.shape)


for _name in ("token_stats", "token_kl", "token_jsd", "kl_rewards"):
    _define_differentiable(_name)
for _name in ("token_stats_backward", "token_kl_backward", "token_jsd_backward"):
    _define_backward(_name)
for _name in ("fold_part", "mixture_part", "policy_loss", "scale_gradient", "gae"):
    _define_plain(_name)


# Fakes: shapes and dtypes without data, for torch.compile and meta tensors.


def _per_token(logits: Tensor) -> Tensor:  # [B, T]
    return logits.new_empty(logits.shape[:-1], dtype=output_dtype(logits))


def _state(logits: Tensor) -> Tensor:  # [2, B, T]
    return logits.new_empty((2, *logits.shape[:-1]), dtype=output_dtype(logits))


def _fake(name: str) -> Any:
    return torch.library.register_fake(f"kl_kernels::{name}", lib=library)


@_fake("token_stats")
def _(logits: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return _per_token(logits), _per_token(logits), _state(logits)


@_fake("token_kl")
def _(logits: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return (*(_per_token(logits) for _ in range(5)), _state(logits), _state(logits))


@_fake("token_jsd")
def _(logits: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return _per_token(logits), _per_token(logits), _state(logits), _state(logits)


@_fake("kl_rewards")
def _(logits: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return (*(_per_token(logits) for _ in range(7)), _state(logits), _state(logits))


@_fake("token_stats_backward")
def _(grad_logprob: Any, grad_entropy: Any, logits: Tensor, *_: Any) -> Tensor:
    return new_gradient(logits)


@_fake("token_kl_backward")
def _(g0: Any, g1: Any, g2: Any, g3: Any, logits: Tensor, *_: Any) -> Tensor:
    return new_gradient(logits)


@_fake("token_jsd_backward")
def _(grad_jsd: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return new_gradient(logits)


@_fake("token_stats_backward_")
@_fake("token_kl_backward_")
@_fake("token_jsd_backward_")
@_fake("scale_gradient")
def _(*_: Any) -> None:
    pass


@_fake("fold_part")
def _(logits: Tensor, ref_logits: Tensor | None, *_: Any) -> Tensor:
    n_fields = ALONE_FIELDS if ref_logits is None else len(STATE_FIELDS)
    return logits.new_empty((n_fields, *logits.shape[:-1]), dtype=output_dtype(logits))


@_fake("mixture_part")
def _(logits: Tensor, *_: Any) -> Tensor:
    shape = (len(MIXTURE_SUMS), *logits.shape[:-1])
    return logits.new_empty(shape, dtype=output_dtype(logits))


@_fake("policy_loss")
def _(logits: Tensor, *_: Any) -> Tensor:
    shape = (len(POLICY_LOSS_TERMS), *logits.shape[:-1])
    return logits.new_empty(shape, dtype=output_dtype(logits))


@_fake("gae")
def _(rewards: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rewards), torch.empty_like(rewards)
