"""The cost of estimates of the KL: the logits each must read, and its time, side by side."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from kl_kernels import selective_log_softmax, token_kl

ROUNDS = 41


def _eager_sampled(logits: Tensor, ref_logits: Tensor, token_ids: Tensor) -> Tensor:
    a, b = (x.log_softmax(-1).gather(-1, token_ids[..., None]) for x in (logits, ref_logits))
    return (a - b).squeeze(-1)


def _eager_exact(logits: Tensor, ref_logits: Tensor, token_ids: Tensor) -> Tensor:
    logp, logq = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    return (logp.exp() * (logp - logq)).sum(-1)


def _fused_sampled(logits: Tensor, ref_logits: Tensor, token_ids: Tensor) -> Tensor:
    return selective_log_softmax(logits, token_ids) - selective_log_softmax(ref_logits, token_ids)


def _fused_exact(logits: Tensor, ref_logits: Tensor, token_ids: Tensor) -> Tensor:
    return token_kl(logits, ref_logits, token_ids).kl


CONTENDERS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "exact (and k1, k2, k3, entropy), fused: `token_kl`": _fused_exact,
    "k1, k2, k3, fused: `selective_log_softmax` twice": _fused_sampled,
    "k1, k2, k3, torch eager": _eager_sampled,
    "exact, torch eager": _eager_exact,
}


@torch.no_grad()
def measure_cost(n_rows: int, n_tokens: int, vocab_size: int) -> dict[str, Any]:
    """Medians of interleaved rounds in ms, and medians of each round's ratios to the first."""
    generator = torch.Generator().manual_seed(0)
    shape = (n_rows, n_tokens, vocab_size)
    logits, ref_logits = (torch.randn(shape, generator=generator) for _ in range(2))
    token_ids = torch.randint(vocab_size, shape[:2], generator=generator)
    times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for _ in range(ROUNDS + 1):
        for name, contender in CONTENDERS.items():
            started = time.perf_counter()
            contender(logits, ref_logits, token_ids)
            times[name].append(1000 * (time.perf_counter() - started))
    first = times[next(iter(CONTENDERS))][1:]  # the first round warms up
    return {
        "tokens": n_rows * n_tokens,
        "vocab_size": vocab_size,
        "mb_of_logits": 2 * logits.nbytes / 1e6,
        "threads": torch.get_num_threads(),
        "contenders": {
            name: {
                "ms": median(measured[1:]),
                "ratio": median(a / b for a, b in zip(measured[1:], first)),
            }
            for name, measured in times.items()
        },
    }
