"""Linear heads as inputs: logits = hidden @ weight.T, which a contender may never store."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import linear

from bench.peers.definitions import (
    Results,
    Size,
    grpo_loss,
    jensen_shannon,
    policy_statistics,
    statistics,
    with_gradients,
    with_means,
)

LOGITS_CHECKED = 1 << 27  # at most, in float64
ROWS_AT_A_TIME = 64  # whose logits are made for what sampling would have left


@dataclass(frozen=True)
class HeadInputs:
    """Hidden states and heads of two models. Logits are about unit size.

    Gradients are taken in those of hidden states and weight that require one.
    """

    hidden: Tensor  # [N, d]
    weight: Tensor  # [V, d]
    ref_hidden: Tensor  # [N, d]
    ref_weight: Tensor  # [V, d]
    token_ids: Tensor  # [N]

    def head(self) -> HeadInputs:
        """Return as many of the first tokens as can be checked."""
        rows = max(1, LOGITS_CHECKED // len(self.weight))
        if rows >= len(self.hidden):
            return self
        hidden, ref_hidden = self.hidden.detach()[:rows], self.ref_hidden[:rows]
        hidden.requires_grad_(self.hidden.requires_grad)
        return HeadInputs(hidden, self.weight, ref_hidden, self.ref_weight, self.token_ids[:rows])

    def wanting(self, gradients: tuple[str, ...]) -> HeadInputs:
        """Require these gradients and no others."""
        for name in ("hidden", "weight"):
            getattr(self, name).requires_grad_(name in gradients)
        return self

    @property
    def n_responses(self) -> int:
        """B of the N = B T tokens, for those who want to know."""
        n = len(self.hidden)
        return next(b for b in (4, 2, 1) if n % b == 0 and (n >= 16 * b or b == 1))

    def by_response(self, rows: Tensor) -> Tensor:  # [N, ...]
        """[B, T, ...]"""
        return rows.unflatten(0, (self.n_responses, -1))

    @cached_property
    def logprobs(self) -> Tensor:  # [B, T] float32
        weight = self.weight.detach().float()
        found = [
            linear(hidden.float(), weight).log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1)
            for hidden, ids in zip(
                self.hidden.detach().split(ROWS_AT_A_TIME), self.token_ids.split(ROWS_AT_A_TIME)
            )
        ]
        return self.by_response(torch.cat(found))

    @cached_property
    def old_logprobs(self) -> Tensor:  # [B, T]
        """Probability ratios near 1."""
        return self.logprobs + 0.02 * self._normal(1, *self.logprobs.shape)

    @cached_property
    def ref_logprobs(self) -> Tensor:  # [B, T]
        return self.logprobs + 0.3 * self._normal(2, *self.logprobs.shape)

    @cached_property
    def advantages(self) -> Tensor:  # [B]
        return self._normal(3, self.n_responses)

    @cached_property
    def mask(self) -> Tensor:  # [B, T] all True
        return torch.ones_like(self.logprobs, dtype=torch.bool)

    def _normal(self, seed: int, *shape: int) -> Tensor:
        device = self.hidden.device
        generator = torch.Generator(device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=device)


def make_heads(size: Size, dtype: torch.dtype, device: str) -> HeadInputs:
    generator = torch.Generator(device).manual_seed(0)

    def normal(n: int) -> Tensor:
        x = torch.randn(n, size.width, generator=generator, device=device)
        return (x * size.width**-0.25).to(dtype)

    hidden, ref_hidden = normal(size.rows), normal(size.rows)
    weight, ref_weight = normal(size.vocab_size), normal(size.vocab_size)
    token_ids = torch.randint(size.vocab_size, (size.rows,), generator=generator, device=device)
    return HeadInputs(
        hidden.requires_grad_(), weight.requires_grad_(), ref_hidden, ref_weight, token_ids
    )


def stats_truth(x: HeadInputs, names: Iterable[str]) -> Results:
    """Return the policy's statistics, and the gradients of the sum of those in `names`."""
    hidden, weight = _wide(x.hidden), _wide(x.weight)
    stats = with_means(policy_statistics(hidden @ weight.T, x.token_ids))
    return stats | with_gradients({name: stats[name] for name in names}, hidden, weight)


def kl_truth(x: HeadInputs, names: Iterable[str]) -> Results:
    hidden, weight = _wide(x.hidden), _wide(x.weight)
    ref_logits = _wide(x.ref_hidden) @ _wide(x.ref_weight).T
    stats = with_means(statistics(hidden @ weight.T, ref_logits, x.token_ids))
    return stats | with_gradients({name: stats[name] for name in names}, hidden, weight)


def jsd_truth(x: HeadInputs, names: Iterable[str]) -> Results:
    hidden, weight = _wide(x.hidden), _wide(x.weight)
    ref_logits = _wide(x.ref_hidden) @ _wide(x.ref_weight).T
    found = with_means(jensen_shannon(hidden @ weight.T, ref_logits))
    return found | with_gradients({name: found[name] for name in names}, hidden, weight)


def loss_truth(x: HeadInputs, names: Iterable[str]) -> Results:
    hidden, weight = _wide(x.hidden), _wide(x.weight)
    logprob = policy_statistics(hidden @ weight.T, x.token_ids)["logprob"]
    return with_gradients({"loss": grpo_loss(x.by_response(logprob), x)}, hidden, weight)


def _wide(factor: Tensor) -> Tensor:
    """In float64, and a leaf."""
    return factor.detach().double().requires_grad_(factor.requires_grad)
