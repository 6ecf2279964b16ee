"""The jobs that are timed on a GPU: what runs, beside what, and what the right answer is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import kl_kernels
from bench.common.formulas import (
    OUTPUTS,
    STATS,
    Call,
    check_gradient,
    check_values,
    eager,
    eager_gradient,
    eager_logprob_gradient,
    eager_stats,
    eager_stats_gradient,
    gradient_of,
    one_visit,
    two_visits,
    with_gradient,
)
from bench.peers.definitions import JSD_BETA, jensen_shannon

CHECKED_ROWS = 4
CHUNK = 256  # rows whose float32 copies are made at a time


class Buffers(NamedTuple):
    """The tensors that one launch reads."""

    logits: Tensor  # [T, V]
    ref_logits: Tensor  # [T, V]
    token_ids: Tensor  # [T]
    log_sum: Tensor  # [T]
    ref_log_sum: Tensor  # [T]
    kl: Tensor  # [T]
    entropy: Tensor  # [T]
    saved: dict[str, tuple[Tensor, ...]]  # by backend: upstream gradient, what `token_kl` saves

    def rows(self, n: int) -> Buffers:
        """The last `n`: those a kernel with 32-bit offsets would get wrong."""
        return Buffers(*(t[-n:].contiguous() for t in self[:7]), saved={})


def make_buffers(
    n_rows: int,
    vocab_size: int,
    backends: tuple[str, ...],
    device: str,
    seed: int,
    dtype: torch.dtype = torch.bfloat16,
) -> Buffers:
    """A policy not far from its reference, tokens sampled from it."""
    g = torch.Generator(device).manual_seed(seed)
    logits, ref_logits = (
        torch.empty(n_rows, vocab_size, dtype=dtype, device=device) for _ in range(2)
    )
    token_ids = torch.empty(n_rows, dtype=torch.int64, device=device)
    log_sum, ref_log_sum, kl, entropy = (torch.empty(n_rows, device=device) for _ in range(4))
    for start in range(0, n_rows, CHUNK):
        part = slice(start, start + CHUNK)
        shape = logits[part].shape
        y = 3 * torch.randn(shape, generator=g, device=device)
        x = y + 0.3 * torch.randn(shape, generator=g, device=device)
        logits[part], ref_logits[part] = x, y
        x, y = logits[part].float(), ref_logits[part].float()
        waiting = torch.empty_like(x).exponential_(generator=g)
        token_ids[part] = (x - waiting.log()).argmax(-1)  # as likely as their probabilities
        log_sum[part], ref_log_sum[part] = x.logsumexp(-1), y.logsumexp(-1)
        p = (x - log_sum[part, None]).exp()
        kl[part] = (p * (x - y)).sum(-1) - log_sum[part] + ref_log_sum[part]
        entropy[part] = log_sum[part] - (p * x).sum(-1)
    saved: dict[str, tuple[Tensor, ...]] = {}
    for backend in backends:
        *_, kl_ours, _, entropy_ours, policy_state, ref_state = torch.ops.kl_kernels.token_kl(
            logits[None],
            ref_logits[None],
            token_ids[None],
            None,
            1.0,
            1.0,
            None,
            None,
            False,
            backend,
        )
        ones = torch.ones_like(kl_ours)
        saved[backend] = (ones, policy_state, ref_state, kl_ours, entropy_ours)
    return Buffers(logits, ref_logits, token_ids, log_sum, ref_log_sum, kl, entropy, saved)


Launch = Callable[[Buffers], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Job:
    reads: int  # tensors of logits that must be read at the least
    writes: int
    outputs: tuple[str, ...]  # per token, in order
    is_gradient: bool  # True: the gradient of the sum of `outputs`, instead of them
    ours: Callable[[str], Launch]  # by backend
    formula: Callable[..., tuple[Tensor, ...]]  # takes `arguments`, and a dtype to compute in
    arguments: tuple[str, ...]  # fields of Buffers

    def plain(self, formula: Callable[..., tuple[Tensor, ...]]) -> Launch:
        """A contender made of torch operators."""

        def launch(b: Buffers) -> tuple[Tensor, ...]:
            with torch.no_grad():
                return formula(*(getattr(b, name) for name in self.arguments))

        return launch

    def check(self, launch: Launch, b: Buffers) -> None:
        """Raise unless the last rows of what `launch` makes of `b` are right in float64."""
        got = [t.reshape(len(b.token_ids), -1)[-CHECKED_ROWS:] for t in launch(b)]
        few = b.rows(CHECKED_ROWS)
        if not self.is_gradient:
            truth = self.formula(*(getattr(few, name) for name in self.arguments), torch.float64)
            for name, value, true in zip(self.outputs, got, truth):
                check_values(name, value.squeeze(-1), true)
            return
        check_gradient(got[0], self.true_gradient(few))

    def true_gradient(self, few: Buffers) -> Tensor:  # [T, V] float64
        """By autograd: the formulas of gradients are not what they are checked with."""
        x = few.logits.double().requires_grad_()
        truth = dict(zip(OUTPUTS, eager(x, few.ref_logits, few.token_ids, torch.float64)))
        total = sum(truth[name].sum() for name in self.outputs)
        return torch.autograd.grad(total, x)[0]


def _token_kl(backend: str) -> Launch:
    def launch(b: Buffers) -> tuple[Tensor, ...]:
        return kl_kernels.token_kl(b.logits, b.ref_logits, b.token_ids, backend=backend)

    return launch


def _token_stats(backend: str) -> Launch:
    def launch(b: Buffers) -> tuple[Tensor, ...]:
        return kl_kernels.token_stats(b.logits, b.token_ids, backend=backend)

    return launch


def _token_jsd(backend: str) -> Launch:
    def launch(b: Buffers) -> tuple[Tensor, ...]:
        return (kl_kernels.token_jsd(b.logits, b.ref_logits, beta=JSD_BETA, backend=backend),)

    return launch


def _kl_backward(backend: str) -> Launch:
    def launch(b: Buffers) -> tuple[Tensor, ...]:
        upstream, policy_state, ref_state, kl, entropy = b.saved[backend]
        logits, ref_logits, token_ids = (t[None] for t in b[:3])
        grad = torch.ops.kl_kernels.token_kl_backward(
            upstream, upstream, None, None, logits, ref_logits, token_ids, None,
            policy_state, ref_state, kl, entropy, 1.0, 1.0, None, None, False, backend,
        )  # fmt: skip
        return (grad,)

    return launch


def _stats_backward(backend: str, with_entropy: bool) -> Launch:
    def launch(b: Buffers) -> tuple[Tensor, ...]:
        upstream, policy_state, _, _, entropy = b.saved[backend]
        grad = torch.ops.kl_kernels.token_stats_backward(
            upstream,
            upstream if with_entropy else None,
            b.logits[None],
            b.token_ids[None],
            None,
            policy_state,
            entropy,
            1.0,
            None,
            False,
            backend,
        )
        return (grad,)

    return launch


def _both(backend: str) -> Launch:
    return _gradient_of(lambda *arguments: kl_kernels.token_kl(*arguments, backend=backend))


def _gradient_of(formula: Callable[..., tuple[Tensor, ...]]) -> Launch:
    return _on_pair(with_gradient(formula))


def _on_pair(call: Call) -> Launch:
    def launch(b: Buffers) -> tuple[Tensor, ...]:
        return call(b.logits.detach().requires_grad_(), b.ref_logits, b.token_ids)

    return launch


def _one_visit(backend: str) -> Launch:
    return _on_pair(gradient_of(partial(one_visit, backend=backend)))


def eager_jsd(
    logits: Tensor,  # [T, V]
    ref_logits: Tensor,  # [T, V]
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, ...]:  # jsd at beta = JSD_BETA, [T]
    return (jensen_shannon(logits.to(dtype), ref_logits.to(dtype))["jsd"],)


class WithGradient(Job):
    """Forward and backward of logprob + kl + entropy, through autograd."""

    def plain(self, formula: Callable[..., tuple[Tensor, ...]]) -> Launch:
        return _gradient_of(formula)


class PolicyLoss(Job):
    """A clipped loss with KL and entropy, and its gradient, through autograd."""

    def plain(self, formula: Callable[..., tuple[Tensor, ...]]) -> Launch:
        return _on_pair(gradient_of(two_visits(formula)))

    def true_gradient(self, few: Buffers) -> Tensor:  # [T, V] float64
        x = few.logits.double().requires_grad_()
        exact = partial(eager, dtype=torch.float64)
        return gradient_of(two_visits(exact))(x, few.ref_logits, few.token_ids)[0]

    def check(self, launch: Launch, b: Buffers) -> None:
        """The loss is a mean over all rows, of which only the last are checked."""
        few = b.rows(CHECKED_ROWS)
        share = len(few.token_ids) / len(b.token_ids)
        got = launch(b)[0][-CHECKED_ROWS:].double() / share
        check_gradient(got.to(b.logits.dtype), self.true_gradient(few))


ONE, PAIR = ("logits", "token_ids"), ("logits", "ref_logits", "token_ids")
ALL = ("logprob", "kl", "entropy")
JOBS = {
    "token_kl": Job(2, 0, OUTPUTS, False, _token_kl, eager, PAIR),
    "token_stats": Job(1, 0, STATS, False, _token_stats, eager_stats, ONE),
    "KL gradient": Job(
        2, 1, ("logprob", "kl"), True, _kl_backward, eager_gradient,
        (*PAIR, "log_sum", "ref_log_sum", "kl"),
    ),
    "policy loss": PolicyLoss(2, 1, ALL, True, _one_visit, eager, PAIR),
    "logprob gradient": Job(
        1, 1, ("logprob",), True, lambda name: _stats_backward(name, False),
        eager_logprob_gradient, (*ONE, "log_sum"),
    ),
    "stats gradient": Job(
        1, 1, STATS, True, lambda name: _stats_backward(name, True), eager_stats_gradient,
        (*ONE, "log_sum", "entropy"),
    ),
    "token_jsd": Job(2, 0, ("jsd",), False, _token_jsd, eager_jsd, PAIR[:2]),
    "token_kl + gradient": WithGradient(4, 1, ALL, True, _both, eager, PAIR),
}  # fmt: skip
