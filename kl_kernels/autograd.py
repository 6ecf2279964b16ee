"""The operators' gradients.

Undefined upstream gradients stay None, so that a backward kernel can skip what nobody asked for;
without any gradient to pass on, nothing runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kl_kernels import transforms
from kl_kernels.ops import are_neighbours, library, new_gradient


def gradient_buffer(logits: Tensor, inplace_backward: bool) -> Tensor:
    """Where the gradient is to go: over the logits if that is asked for and possible.

    Kernels read a copy of logits that are not neighbours in memory: nothing to be had there.
    """
    if not (inplace_backward and are_neighbours(logits)):
        return new_gradient(logits)
    # Whoever else saved these logits for a backward of their own is told that they are gone.
    torch.autograd.graph.increment_version(logits)
    return logits.detach()


def _run_backward(
    name: str, args: tuple[Any, ...], logits: Tensor, inplace_backward: bool, backend: str | None
) -> Tensor:
    if not inplace_backward or transforms.are_active():  # what they are given stays as it is
        result: Tensor = operator(name)(*args, backend)
        return result
    grad_logits = gradient_buffer(logits, inplace_backward)
    getattr(torch.ops.kl_kernels, name + "_")(*args, grad_logits, backend)
    return grad_logits


def token_stats_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, token_ids, mask, *ctx.options = inputs
    logprob, entropy, policy_state = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(policy_state)
    ctx.save_for_backward(logits, token_ids, mask, policy_state, entropy)


def token_stats_grad(
    ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None, *, part: bool = False
) -> Tensor | None:
    if grad_logprob is None and grad_entropy is None:
        return None
    logits, *saved = ctx.saved_tensors
    temperature, softcap, *how = ctx.options
    args = grad_logprob, grad_entropy, logits, *saved, temperature, softcap, part
    return _run_backward("token_stats_backward", args, logits, *how)


def _token_stats_backward(
    ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None, _state: None
) -> tuple[Tensor | None, ...]:
    return token_stats_grad(ctx, grad_logprob, grad_entropy), *[None] * 6


def _token_kl_save(
    ctx: Any, inputs: tuple[Any, ...], kl: Tensor, entropy: Tensor, states: tuple[Tensor, Tensor]
) -> None:
    logits, ref_logits, token_ids, mask, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, ref_logits, token_ids, mask, *states, kl, entropy)


def token_kl_grad(
    ctx: Any,
    grad_logprob: Tensor | None,
    grad_kl: Tensor | None,
    grad_forward_kl: Tensor | None,
    grad_entropy: Tensor | None,
    *,
    part: bool = False,
) -> Tensor | None:
    logits, ref_logits, token_ids, mask, policy_state, ref_state, kl, entropy = ctx.saved_tensors
    temperature, ref_temperature, softcap, ref_softcap, *how = ctx.options
    args: tuple[Any, ...]
    if grad_kl is not None or grad_forward_kl is not None:
        args = (
            grad_logprob, grad_kl, grad_forward_kl, grad_entropy,
            logits, ref_logits, token_ids, mask, policy_state, ref_state, kl, entropy,
            temperature, ref_temperature, softcap, ref_softcap, part,
        )  # fmt: skip
        return _run_backward("token_kl_backward", args, logits, *how)
    if grad_logprob is not None or grad_entropy is not None:
        # No KL gradient: the reference logits are not read a second time.
        args = (
            grad_logprob, grad_entropy,
            logits, token_ids, mask, policy_state, entropy, temperature, softcap, part,
        )  # fmt: skip
        return _run_backward("token_stats_backward", args, logits, *how)
    return None


def token_kl_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logprob, ref_logprob, kl, forward_kl, entropy, policy_state, ref_state = output
    ctx.mark_non_differentiable(ref_logprob, policy_state, ref_state)
    _token_kl_save(ctx, inputs, kl, entropy, (policy_state, ref_state))


def _token_kl_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_logprob, _, grad_kl, grad_forward_kl, grad_entropy, *_ = grads
    grad_logits = token_kl_grad(ctx, grad_logprob, grad_kl, grad_forward_kl, grad_entropy)
    return grad_logits, *[None] * 9


def token_jsd_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, ref_logits, mask, *ctx.options = inputs
    _, mixture_kl, policy_state, ref_state = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mixture_kl, policy_state, ref_state)
    ctx.save_for_backward(logits, ref_logits, mask, policy_state, ref_state, mixture_kl)


def token_jsd_grad(ctx: Any, grad_jsd: Tensor | None) -> Tensor | None:
    if grad_jsd is None:
        return None
    logits, *saved = ctx.saved_tensors
    *numbers, inplace_backward, backend = ctx.options
    args = grad_jsd, logits, *saved, *numbers
    return _run_backward("token_jsd_backward", args, logits, inplace_backward, backend)


def _token_jsd_backward(ctx: Any, grad_jsd: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    return token_jsd_grad(ctx, grad_jsd), *[None] * 9


def _kl_rewards_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    rewards, correction, logprob, ref_logprob, kl, forward_kl, entropy, *states = output
    ctx.mark_non_differentiable(rewards, correction, ref_logprob, *states)
    # The epilogue's own arguments (scores ... kl_clip) carry no gradient: drop them.
    _token_kl_save(ctx, (*inputs[:4], *inputs[9:]), kl, entropy, (states[0], states[1]))


def _kl_rewards_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    _, _, grad_logprob, _, grad_kl, grad_forward_kl, grad_entropy, *_ = grads
    grad_logits = token_kl_grad(ctx, grad_logprob, grad_kl, grad_forward_kl, grad_entropy)
    return grad_logits, *[None] * 14


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pass


def _no_second_derivative(ctx: Any, grad: Tensor) -> None:
    raise RuntimeError(
        "kl_kernels has no second derivatives: a fused operator is differentiable once"
    )


_FUNCTIONS = {}  # what `torch.func` differentiates in the place of the operators

for _name, _setup, _backward in (
    ("token_stats", token_stats_setup, _token_stats_backward),
    ("token_kl", token_kl_setup, _token_kl_backward),
    ("token_jsd", token_jsd_setup, _token_jsd_backward),
    ("kl_rewards", _kl_rewards_setup, _kl_rewards_backward),
    ("token_stats_backward", _backward_setup, _no_second_derivative),
    ("token_kl_backward", _backward_setup, _no_second_derivative),
    ("token_jsd_backward", _backward_setup, _no_second_derivative),
):
    torch.library.register_autograd(
        f"kl_kernels::{_name}", _backward, setup_context=_setup, lib=library
    )
    _FUNCTIONS[_name] = transforms.function(_name, _setup, _backward)


def operator(name: str) -> Callable[..., Any]:
    """The operator `name`, in a form that `torch.func` can differentiate where it is at work."""
    if transforms.are_active():
        apply: Callable[..., Any] = _FUNCTIONS[name].apply
        return apply
    whole: Callable[..., Any] = getattr(torch.ops.kl_kernels, name)
    return whole


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, _of: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        _no_second_derivative(ctx, grad)


def once(gradient: Tensor | None, of: Tensor | None) -> Tensor | None:
    """The gradient, not differentiable again with respect to what it is the gradient of.

    (`once_differentiable` looks at upstream gradients alone. Where those are constants, it would
    let the second derivative silently be 0.)
    """
    if gradient is None or not torch.is_grad_enabled():  # no create_graph
        return gradient
    result: Tensor = _Once.apply(gradient, of)
    return result


class PolicyLoss(torch.autograd.Function):
    """The operator `policy_loss`, whose gradient is there before anybody asks for it."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, inplace_backward: bool, backend: str | None, *args: Any
    ) -> tuple[Tensor, Tensor]:
        """(loss, terms), from the operator's arguments but for `logits` and `grad_logits`."""
        gradient = gradient_buffer(logits, inplace_backward) if ctx.needs_input_grad[0] else None
        terms = torch.ops.kl_kernels.policy_loss(logits.detach(), *args, gradient, backend)
        ctx.save_for_backward(gradient)  # and not the logits, which can go
        ctx.backend = backend
        ctx.mark_non_differentiable(terms)
        return terms[0].sum(), terms

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _terms: None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph
            _no_second_derivative(ctx, grad_loss)
        (gradient,) = ctx.saved_tensors
        # It is given away, scaled in place: a second backward is to be refused.
        torch.autograd.graph.increment_version(gradient)
        torch.ops.kl_kernels.scale_gradient(gradient, grad_loss, ctx.backend)
        return gradient, *[None] * (len(ctx.needs_input_grad) - 1)
