"""The operators' gradients.

Undefined upstream gradients stay None, so that a backward kernel can skip what nobody asked for;
without any gradient to pass on, nothing runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kl_kernels.checks import transforms_are_active
from kl_kernels.ops import transforms
from kl_kernels.ops.library import are_neighbours, library, new_gradient
from kl_kernels.schemas import (
    OPERATORS,
    Execution,
    KLRewardsArgs,
    KLRewardsOutputs,
    PolicyLossArgs,
    ScaleGradientArgs,
    TokenJSDArgs,
    TokenJSDBackwardArgs,
    TokenJSDOutputs,
    TokenKLArgs,
    TokenKLBackwardArgs,
    TokenKLOutputs,
    TokenStatsArgs,
    TokenStatsBackwardArgs,
    TokenStatsOutputs,
    pick,
    tensor_fields,
)


def gradient_buffer(logits: Tensor, inplace_backward: bool) -> Tensor:
    """Where the gradient is to go: over the logits if that is asked for and possible.

    Kernels read a copy of logits that are not neighbours in memory: nothing to be had there.
    """
    if not (inplace_backward and are_neighbours(logits)):
        return new_gradient(logits)
    # Whoever else saved these logits for a backward of their own is told that they are gone.
    torch.autograd.graph.increment_version(logits)
    return logits.detach()


# Fields of a backward operator's arguments that backward fills in: those named grad_*.
LATER: Any = None


class Layout(NamedTuple):
    """Ways to take a backward operator's arguments apart, and to put them together again."""

    tensors: Callable[[Any], tuple[Tensor | None, ...]]
    numbers: Callable[[Any], tuple[Any, ...]]
    in_order: Callable[[Any], tuple[Any, ...]]  # takes gradients, tensors, numbers, grad_logits


def _layout(cls: type[Any]) -> Layout:
    fields: tuple[str, ...] = cls._fields
    later = [field for field in fields if field.startswith("grad_")]
    tensors = [fields[i] for i in tensor_fields(cls) if fields[i] not in later]
    numbers = [field for field in fields if field not in (*later, *tensors)]
    *gradients, grad_logits = later
    kept = [*gradients, *tensors, *numbers, grad_logits]
    return Layout(
        itemgetter(*map(fields.index, tensors)),
        itemgetter(*map(fields.index, numbers)),
        itemgetter(*map(kept.index, fields)),
    )


LAYOUTS = {
    args: _layout(args) for name, (args, _) in OPERATORS.items() if name.endswith("_backward")
}


def keep(ctx: Any, backward: Any) -> None:
    """Save the arguments of a backward operator; `kept` returns them."""
    cls = type(backward)
    ctx.save_for_backward(*LAYOUTS[cls].tensors(backward))
    ctx.kept = cls, LAYOUTS[cls].numbers(backward)


def kept(ctx: Any, *grads: Tensor | None) -> Any:
    """The arguments that `keep` saved, with upstream gradients as the first of them."""
    cls, numbers = ctx.kept
    return cls(*LAYOUTS[cls].in_order((*grads, *ctx.saved_tensors, *numbers, LATER)))


def only_first(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of the first inputs, and None for the others."""
    return *gradients, *[None] * (len(ctx.needs_input_grad) - len(gradients))


def with_execution(cls: type[Any], inputs: Sequence[Any]) -> tuple[Any, Execution]:
    n = len(cls._fields)
    return cls(*inputs[:n]), Execution(*inputs[n:])


def run_backward(name: str, args: tuple[Any, ...], execution: Execution) -> Tensor:
    """Run a backward operator whose arguments lack `grad_logits`, the last."""
    *given, _ = args
    logits = args.logits  # type: ignore[attr-defined]
    if not execution.inplace_backward or transforms_are_active():  # inputs stay as they are
        result: Tensor = operator(name)(*given, execution.backend)
        return result
    grad_logits = gradient_buffer(logits, inplace_backward=True)
    getattr(torch.ops.kl_kernels, name + "_")(*given, grad_logits, execution.backend)
    return grad_logits


def _token_stats_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    a, ctx.execution = with_execution(TokenStatsArgs, inputs)
    out = TokenStatsOutputs(*output)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(out.policy_state)
    backward = TokenStatsBackwardArgs(
        grad_logprob=LATER,
        grad_entropy=LATER,
        logits=a.logits,
        token_ids=a.token_ids,
        mask=a.mask,
        policy_state=out.policy_state,
        entropy=out.entropy,
        temperature=a.temperature,
        softcap=a.softcap,
        part=False,
        grad_logits=LATER,
    )
    keep(ctx, backward)


def _token_stats_backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
    grad = TokenStatsOutputs(*grads)
    if grad.logprob is None and grad.entropy is None:
        return only_first(ctx, None)
    backward = kept(ctx, grad.logprob, grad.entropy)
    return only_first(ctx, run_backward("token_stats_backward", backward, ctx.execution))


def _token_kl_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    a, ctx.execution = with_execution(TokenKLArgs, inputs)
    out = TokenKLOutputs(*output)
    ctx.mark_non_differentiable(out.ref_logprob, out.policy_state, out.ref_state)
    _keep_token_kl(ctx, a, out)


def _keep_token_kl(ctx: Any, a: TokenKLArgs, out: TokenKLOutputs) -> None:
    ctx.set_materialize_grads(False)
    keep(ctx, kl_backward_args(a, out, LATER, LATER, LATER, LATER))


def kl_backward_args(
    a: TokenKLArgs,
    out: TokenKLOutputs,
    grad_logprob: Tensor | None,  # [B, T]
    grad_kl: Tensor | None,
    grad_forward_kl: Tensor | None,
    grad_entropy: Tensor | None,
) -> TokenKLBackwardArgs:
    """Arguments that lack `grad_logits`."""
    return TokenKLBackwardArgs(
        grad_logprob=grad_logprob,
        grad_kl=grad_kl,
        grad_forward_kl=grad_forward_kl,
        grad_entropy=grad_entropy,
        logits=a.logits,
        ref_logits=a.ref_logits,
        token_ids=a.token_ids,
        mask=a.mask,
        policy_state=out.policy_state,
        ref_state=out.ref_state,
        kl=out.kl,
        entropy=out.entropy,
        temperature=a.temperature,
        ref_temperature=a.ref_temperature,
        softcap=a.softcap,
        ref_softcap=a.ref_softcap,
        part=False,
        grad_logits=LATER,
    )


def _token_kl_backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
    grad = TokenKLOutputs(*grads)
    backward = kept(ctx, grad.logprob, grad.kl, grad.forward_kl, grad.entropy)
    return only_first(ctx, kl_gradient(backward, ctx.execution))


def kl_gradient(a: TokenKLBackwardArgs, execution: Execution) -> Tensor | None:
    """The gradient of the logits, by arguments that lack `grad_logits`; None if none is wanted."""
    if a.grad_kl is not None or a.grad_forward_kl is not None:
        return run_backward("token_kl_backward", a, execution)
    if a.grad_logprob is not None or a.grad_entropy is not None:
        # Without a KL gradient the reference logits are not read a second time.
        return run_backward("token_stats_backward", pick(TokenStatsBackwardArgs, a), execution)
    return None


def _kl_rewards_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    a, ctx.execution = with_execution(KLRewardsArgs, inputs)
    out = KLRewardsOutputs(*output)
    ctx.mark_non_differentiable(
        out.rewards, out.advantage_correction, out.ref_logprob, out.policy_state, out.ref_state
    )
    _keep_token_kl(ctx, pick(TokenKLArgs, a), pick(TokenKLOutputs, out))


def _kl_rewards_backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
    return _token_kl_backward(ctx, *pick(TokenKLOutputs, KLRewardsOutputs(*grads)))


def _token_jsd_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    a, ctx.execution = with_execution(TokenJSDArgs, inputs)
    out = TokenJSDOutputs(*output)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(out.mixture_kl, out.policy_state, out.ref_state)
    backward = TokenJSDBackwardArgs(
        grad_jsd=LATER,
        logits=a.logits,
        ref_logits=a.ref_logits,
        mask=a.mask,
        policy_state=out.policy_state,
        ref_state=out.ref_state,
        mixture_kl=out.mixture_kl,
        beta=a.beta,
        temperature=a.temperature,
        ref_temperature=a.ref_temperature,
        softcap=a.softcap,
        ref_softcap=a.ref_softcap,
        grad_logits=LATER,
    )
    keep(ctx, backward)


def _token_jsd_backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
    grad = TokenJSDOutputs(*grads)
    if grad.jsd is None:
        return only_first(ctx, None)
    backward = kept(ctx, grad.jsd)
    return only_first(ctx, run_backward("token_jsd_backward", backward, ctx.execution))


def _backward_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pass


def no_second_derivative(ctx: Any, grad: Tensor) -> None:
    raise RuntimeError(
        "kl_kernels has no second derivatives: a fused operator is differentiable once"
    )


_FUNCTIONS = {}  # `torch.func` differentiates these in the place of the operators

for _name, _setup, _backward in (
    ("token_stats", _token_stats_setup, _token_stats_backward),
    ("token_kl", _token_kl_setup, _token_kl_backward),
    ("token_jsd", _token_jsd_setup, _token_jsd_backward),
    ("kl_rewards", _kl_rewards_setup, _kl_rewards_backward),
    ("token_stats_backward", _backward_setup, no_second_derivative),
    ("token_kl_backward", _backward_setup, no_second_derivative),
    ("token_jsd_backward", _backward_setup, no_second_derivative),
):
    torch.library.register_autograd(
        f"kl_kernels::{_name}", _backward, setup_context=_setup, lib=library
    )
    _FUNCTIONS[_name] = transforms.function(_name, _setup, _backward)


def operator(name: str) -> Callable[..., Any]:
    """The operator `name`, in a form that `torch.func` can differentiate where it is at work."""
    if transforms_are_active():
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
        no_second_derivative(ctx, grad)


def once(gradient: Tensor | None, of: Tensor | None) -> Tensor | None:
    """The gradient, not differentiable again with respect to what it is the gradient of.

    (`once_differentiable` looks at upstream gradients alone. Where those are constants, it would
    let the second derivative silently be 0.)
    """
    if gradient is None or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return gradient  # no create_graph
    result: Tensor = _Once.apply(gradient, of)
    return result


def given_away(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
    """The saved gradients of a loss, each of up to three dimensions, times that of the loss."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph
        no_second_derivative(ctx, grad_loss)
    gradients: tuple[Tensor | None, ...] = ctx.saved_tensors
    for gradient in gradients:
        if gradient is not None:
            # Scaled in place: a second backward is to be refused.
            torch.autograd.graph.increment_version(gradient)
            scale = ScaleGradientArgs(gradient[(None,) * (3 - gradient.ndim)], grad_loss)
            torch.ops.kl_kernels.scale_gradient(*scale, ctx.backend)
    return gradients


class PolicyLoss(torch.autograd.Function):
    """The operator `policy_loss`, whose gradient is there before anybody asks for it."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        """(loss, terms), from the operator's arguments, `grad_logits` None, and `Execution`."""
        a, execution = with_execution(PolicyLossArgs, inputs)
        if ctx.needs_input_grad[0]:
            buffer = gradient_buffer(a.logits, execution.inplace_backward)
            a = a._replace(logits=a.logits.detach(), grad_logits=buffer)
        terms = torch.ops.kl_kernels.policy_loss(*a, execution.backend)
        ctx.save_for_backward(a.grad_logits)  # and not the logits, which can go
        ctx.backend = execution.backend
        ctx.mark_non_differentiable(terms)
        return terms[0].sum(), terms

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _terms: None) -> tuple[Tensor | None, ...]:
        return only_first(ctx, *given_away(ctx, grad_loss))
