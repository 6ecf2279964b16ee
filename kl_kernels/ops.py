"""The operators: one list of schemas, and for each its implementation, its fake and its gradient.

`torch.ops.kl_kernels.*` exists once this file is imported, compiled library or not. Logits are
[B, T, V] with any strides as long as neighbouring logits are neighbours in memory (a copy is made
otherwise); everything per token is [B, T]. Shaping, checking and naming is `functional.py`'s job.

A *state* is the pair a row's gradient needs besides the logits, stacked as [2, B, T] float32: the
anchor (near the row's largest logit, in log2 units) and the sum of 2^(logit - anchor).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kl_kernels import dispatch
from kl_kernels.schemas import KERNELS, output_dtype

library = torch.library.Library("kl_kernels", "DEF")


def _laid_out(arg: Any) -> Any:
    """Kernels may rely on this: logits have stride 1 over V, everything per token is contiguous."""
    if not isinstance(arg, Tensor):
        return arg
    is_logits = arg.ndim == 3 and arg.is_floating_point()
    if is_logits and (arg.stride(-1) == 1 or arg.shape[-1] == 1):
        return arg
    return arg.contiguous()


def _implement(name: str) -> None:
    """Define operator `name`: its kernel's arguments, then the backend that is to run it."""
    library.define(name + KERNELS[name].replace(")", ", str? backend)", 1))

    def implementation(*args: Any) -> Any:
        *kernel_args, backend = args
        tensors = [arg for arg in kernel_args if isinstance(arg, Tensor)]
        kernel = getattr(dispatch.choose(backend, tensors), name)
        return kernel(*(_laid_out(arg) for arg in kernel_args))

    # CompositeExplicitAutograd: one entry for every device; the backend is chosen inside.
    library.impl(name, implementation, "CompositeExplicitAutograd")


for _name in KERNELS:
    _implement(_name)


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


@_fake("kl_rewards")
def _(logits: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return (*(_per_token(logits) for _ in range(7)), _state(logits), _state(logits))


@_fake("token_stats_backward")
def _(grad_logprob: Any, grad_entropy: Any, logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


@_fake("token_kl_backward")
def _(g0: Any, g1: Any, g2: Any, g3: Any, logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


@_fake("gae")
def _(rewards: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rewards), torch.empty_like(rewards)


# Gradients. Undefined upstream gradients stay None, so that a backward kernel can skip what nobody
# asked for; without any gradient to pass on, nothing runs.


def _token_stats_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, token_ids, mask, *ctx.options = inputs
    logprob, entropy, policy_state = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(policy_state)
    ctx.save_for_backward(logits, token_ids, mask, policy_state, entropy)


def _token_stats_backward(
    ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None, _state: None
) -> tuple[Tensor | None, ...]:
    logits, token_ids, mask, policy_state, entropy = ctx.saved_tensors
    grad_logits = None
    if grad_logprob is not None or grad_entropy is not None:
        grad_logits = torch.ops.kl_kernels.token_stats_backward(
            grad_logprob, grad_entropy,
            logits, token_ids, mask, policy_state, entropy, *ctx.options,
        )  # fmt: skip
    return grad_logits, *[None] * 5


def _token_kl_save(
    ctx: Any, inputs: tuple[Any, ...], kl: Tensor, entropy: Tensor, states: tuple[Tensor, Tensor]
) -> None:
    logits, ref_logits, token_ids, mask, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, ref_logits, token_ids, mask, *states, kl, entropy)


def _token_kl_grad(
    ctx: Any,
    grad_logprob: Tensor | None,
    grad_kl: Tensor | None,
    grad_forward_kl: Tensor | None,
    grad_entropy: Tensor | None,
) -> Tensor | None:
    logits, ref_logits, token_ids, mask, policy_state, ref_state, kl, entropy = ctx.saved_tensors
    temperature, ref_temperature, softcap, ref_softcap, backend = ctx.options
    if grad_kl is not None or grad_forward_kl is not None:
        return torch.ops.kl_kernels.token_kl_backward(
            grad_logprob, grad_kl, grad_forward_kl, grad_entropy,
            logits, ref_logits, token_ids, mask, policy_state, ref_state, kl, entropy,
            *ctx.options,
        )  # fmt: skip
    if grad_logprob is not None or grad_entropy is not None:
        # No KL gradient: the reference logits are not read a second time.
        return torch.ops.kl_kernels.token_stats_backward(
            grad_logprob, grad_entropy,
            logits, token_ids, mask, policy_state, entropy, temperature, softcap, backend,
        )  # fmt: skip
    return None


def _token_kl_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logprob, ref_logprob, kl, forward_kl, entropy, policy_state, ref_state = output
    ctx.mark_non_differentiable(ref_logprob, policy_state, ref_state)
    _token_kl_save(ctx, inputs, kl, entropy, (policy_state, ref_state))


def _token_kl_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_logprob, _, grad_kl, grad_forward_kl, grad_entropy, *_ = grads
    grad_logits = _token_kl_grad(ctx, grad_logprob, grad_kl, grad_forward_kl, grad_entropy)
    return grad_logits, *[None] * 8


def _kl_rewards_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    rewards, correction, logprob, ref_logprob, kl, forward_kl, entropy, *states = output
    ctx.mark_non_differentiable(rewards, correction, ref_logprob, *states)
    # The epilogue's own arguments (scores ... kl_clip) carry no gradient: drop them.
    _token_kl_save(ctx, (*inputs[:4], *inputs[9:]), kl, entropy, (states[0], states[1]))


def _kl_rewards_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    _, _, grad_logprob, _, grad_kl, grad_forward_kl, grad_entropy, *_ = grads
    grad_logits = _token_kl_grad(ctx, grad_logprob, grad_kl, grad_forward_kl, grad_entropy)
    return grad_logits, *[None] * 13


for _name, _setup, _backward in (
    ("token_stats", _token_stats_setup, _token_stats_backward),
    ("token_kl", _token_kl_setup, _token_kl_backward),
    ("kl_rewards", _kl_rewards_setup, _kl_rewards_backward),
):
    torch.library.register_autograd(
        f"kl_kernels::{_name}", _backward, setup_context=_setup, lib=library
    )


def _no_second_derivative(ctx: Any, grad: Tensor) -> None:
    raise RuntimeError(
        "kl_kernels has no second derivatives: a fused operator is differentiable once"
    )


for _name in ("token_stats_backward", "token_kl_backward"):
    torch.library.register_autograd(f"kl_kernels::{_name}", _no_second_derivative, lib=library)
