"""The contenders: outputs, gradient and policy loss, by the book and by the package."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import kl_kernels

OUTPUTS = ("logprob", "ref_logprob", "kl", "forward_kl", "entropy")
STATS = ("logprob", "entropy")
Call = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]


def eager(
    logits: Tensor,  # [T, V]
    ref_logits: Tensor,  # [T, V]
    token_ids: Tensor,  # [T]
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, ...]:  # the five outputs, each [T]
    log_p, log_q = (t.to(dtype).log_softmax(-1) for t in (logits, ref_logits))
    p, q = log_p.exp(), log_q.exp()
    here = token_ids[:, None]
    return (
        log_p.gather(-1, here).squeeze(-1),
        log_q.gather(-1, here).squeeze(-1),
        (p * (log_p - log_q)).sum(-1),
        (q * (log_q - log_p)).sum(-1),
        -(p * log_p).sum(-1),
    )


def eager_stats(
    logits: Tensor,  # [T, V]
    token_ids: Tensor,  # [T]
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, ...]:  # logprob, entropy, each [T]
    log_p = logits.to(dtype).log_softmax(-1)
    return log_p.gather(-1, token_ids[:, None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


def eager_gradient(
    logits: Tensor,  # [T, V]
    ref_logits: Tensor,  # [T, V]
    token_ids: Tensor,  # [T]
    log_sum: Tensor,  # [T]  logsumexp of the logits, saved by the forward pass
    ref_log_sum: Tensor,  # [T]
    kl: Tensor,  # [T]
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor]:  # [T, V]
    """The gradient of logprob + kl as one would write it by hand: pointwise, nothing to reduce."""
    log_p = logits.to(dtype) - log_sum[:, None]
    log_q = ref_logits.to(dtype) - ref_log_sum[:, None]
    here = torch.arange(logits.shape[-1], device=logits.device) == token_ids[:, None]
    grad = here.to(dtype) + log_p.exp() * (log_p - log_q - kl[:, None] - 1)
    return (grad.to(logits.dtype),)


def eager_logprob_gradient(
    logits: Tensor,  # [T, V]
    token_ids: Tensor,  # [T]
    log_sum: Tensor,  # [T]
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor]:  # [T, V]
    """The gradient of logprob, from what the forward pass saved."""
    here = torch.arange(logits.shape[-1], device=logits.device) == token_ids[:, None]
    p = (logits.to(dtype) - log_sum[:, None]).exp()
    return ((here.to(dtype) - p).to(logits.dtype),)


def eager_stats_gradient(
    logits: Tensor,  # [T, V]
    token_ids: Tensor,  # [T]
    log_sum: Tensor,  # [T]
    entropy: Tensor,  # [T]
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor]:  # [T, V]
    """The gradient of logprob + entropy, from what the forward pass saved."""
    here = torch.arange(logits.shape[-1], device=logits.device) == token_ids[:, None]
    log_p = logits.to(dtype) - log_sum[:, None]
    grad = here.to(dtype) - log_p.exp() * (log_p + entropy[:, None] + 1)
    return (grad.to(logits.dtype),)


def ours(logits: Tensor, ref_logits: Tensor, token_ids: Tensor) -> tuple[Tensor, ...]:
    return kl_kernels.token_kl(logits, ref_logits, token_ids, backend="cpu")


def on_policy(stats: Callable[[Tensor, Tensor], tuple[Tensor, ...]]) -> Call:
    """The same call as the others, of the policy alone."""
    return lambda logits, ref_logits, token_ids: stats(logits, token_ids)


@on_policy
def our_stats(logits: Tensor, token_ids: Tensor) -> tuple[Tensor, ...]:
    return kl_kernels.token_stats(logits, token_ids, backend="cpu")


def with_gradient(call: Call) -> Call:
    """The outputs, then the gradient of logprob + kl + entropy."""

    def run(logits: Tensor, ref_logits: Tensor, token_ids: Tensor) -> tuple[Tensor, ...]:
        logprob, _, kl, _, entropy = call(logits, ref_logits, token_ids)
        return torch.autograd.grad((logprob + kl + entropy).sum(), logits)

    return run


KL_LOSS_COEF, ENTROPY_COEF = 0.1, 0.01
PolicyLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


def two_visits(call: Call) -> PolicyLoss:
    """The loss from the outputs, as trainers have it: the logits are looked at again for it."""

    def loss(logits: Tensor, ref_logits: Tensor, token_ids: Tensor) -> Tensor:
        logprob, _, kl, _, entropy = (t[None] for t in call(logits, ref_logits, token_ids))
        advantages, mask = torch.ones_like(logprob), torch.ones_like(logprob)
        loss, _ = kl_kernels.ppo_policy_loss(logprob, logprob.detach(), advantages, mask)
        return loss + KL_LOSS_COEF * kl.mean() - ENTROPY_COEF * entropy.mean()

    return loss


def one_visit(
    logits: Tensor, ref_logits: Tensor, token_ids: Tensor, backend: str | None = None
) -> Tensor:
    advantages = mask = torch.ones(1, len(logits), device=logits.device)
    loss, _ = kl_kernels.fused_policy_loss(
        logits[None],
        token_ids[None],
        None,
        advantages,
        mask,
        ref_logits=ref_logits[None],
        kl_loss_coef=KL_LOSS_COEF,
        entropy_coef=ENTROPY_COEF,
        loss_scale=1.0,
        backend=backend,
    )
    return loss


def gradient_of(loss: PolicyLoss) -> Call:
    def run(logits: Tensor, ref_logits: Tensor, token_ids: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(logits, ref_logits, token_ids), logits)

    return run


def make_inputs(n_rows: int, vocab_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A policy not far from its reference, and tokens sampled from it."""
    generator = torch.Generator().manual_seed(0)
    ref_logits = 3 * torch.randn(n_rows, vocab_size, generator=generator)
    logits = ref_logits + 0.3 * torch.randn(n_rows, vocab_size, generator=generator)
    token_ids = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)
    return logits.to(dtype).requires_grad_(), ref_logits.to(dtype), token_ids


def check(n_rows: int, vocab_size: int, dtype: torch.dtype) -> None:
    """Ours against eager in float64, values and gradient: RuntimeError if they differ."""

    def truth(logits: Tensor, ref_logits: Tensor, token_ids: Tensor) -> tuple[Tensor, ...]:
        return eager(logits, ref_logits, token_ids, torch.float64)

    logits, ref_logits, token_ids = make_inputs(n_rows, vocab_size, dtype)
    wide = logits.detach().double().requires_grad_()
    got_all, true_all = ours(logits, ref_logits, token_ids), truth(wide, ref_logits, token_ids)
    for name, got, true in zip(OUTPUTS, got_all, true_all):
        check_values(name, got, true)
    true_stats = true_all[OUTPUTS.index("logprob")], true_all[OUTPUTS.index("entropy")]
    for name, got, true in zip(STATS, our_stats(logits, ref_logits, token_ids), true_stats):
        check_values(name, got, true)
    (grad,) = with_gradient(ours)(logits, ref_logits, token_ids)
    (true_grad,) = with_gradient(truth)(wide, ref_logits, token_ids)
    check_gradient(grad, true_grad)
    (grad,) = gradient_of(one_visit)(logits, ref_logits, token_ids)
    (true_grad,) = gradient_of(two_visits(truth))(wide, ref_logits, token_ids)
    check_gradient(grad, true_grad)


def check_values(name: str, got: Tensor, true: Tensor) -> None:  # [T], [T] float64
    floor = 3e-7 if "kl" in name else 2e-6
    if not (got - true).abs().le(floor + 2e-6 * true.abs()).all():
        raise RuntimeError(f"{name} is wrong: {got.tolist()}, not {true.tolist()}")


def check_gradient(got: Tensor, true: Tensor) -> None:  # [T, V], [T, V] float64
    error = float((got.double() - true).norm() / true.norm())
    if not error <= 1e-5 + torch.finfo(got.dtype).eps / 2:
        raise RuntimeError(f"the {got.dtype} gradient is wrong: off by {error:.1e} of its norm")
