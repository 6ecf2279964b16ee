"""Statistics over kept sets: of each row only the tokens that it lists count.

A set is small, a few tokens of a vocabulary of 100,000: what is computed of it is plain torch on
its entries, in float64. Rows that list nothing are over the whole vocabulary and go to the
kernels, with all others masked; so do references over the whole vocabulary. The gradient is what
the kernels write, zeros in the rows they were not to read, with the entries put into it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kl_kernels.algebra.row import (
    LN2,
    Finished,
    LogitTransform,
    RowState,
    Upstream,
    coefficients,
)
from kl_kernels.algebra.segments import Entries, Segments
from kl_kernels.schemas import (
    Execution,
    TokenKLArgs,
    TokenKLOutputs,
    TokenStatsArgs,
    TokenStatsOutputs,
    pick,
)


class KeptArgs(NamedTuple):
    """Fields of `TokenKLArgs`, and the set of each row."""

    logits: Tensor  # [B, T, V]
    ref_logits: Tensor | None  # [B, T, V]
    token_ids: Tensor  # [B, T]
    mask: Tensor | None  # [B, T]
    kept_ids: Tensor  # [nnz] int64
    offsets: Tensor  # [B T + 1] int64
    ref_is_whole: bool  # the reference is over the whole vocabulary
    temperature: float
    ref_temperature: float
    softcap: float | None
    ref_softcap: float | None

    def segments(self) -> Segments:
        return Segments.of(self.offsets, len(self.kept_ids))

    def rows(self, *, listed: bool) -> Tensor:  # [B, T]
        """Rows under the mask that list something, or that list nothing."""
        counts = self.offsets.diff().view(self.token_ids.shape)
        rows = counts > 0 if listed else counts == 0
        return rows if self.mask is None else rows & self.mask


class KeptOutputs(NamedTuple):
    """Fields of `TokenKLOutputs`, with states of the rows that list nothing.

    `ref_share` is the probability that the reference gives to the set; 1 if it is over the set.
    Without a reference all that is the reference's means nothing.
    """

    logprob: Tensor  # [B, T]
    ref_logprob: Tensor  # [B, T]
    kl: Tensor  # [B, T]
    forward_kl: Tensor  # [B, T]
    entropy: Tensor  # [B, T]
    policy_state: Tensor  # [2, B, T]
    ref_state: Tensor  # [2, B, T]
    ref_share: Tensor  # [B, T]


class KeptBackwardArgs(NamedTuple):
    """The gradient of each entry's logit, [nnz]."""

    grad_logprob: Tensor | None  # [B, T]
    grad_kl: Tensor | None  # [B, T]
    grad_forward_kl: Tensor | None  # [B, T]
    grad_entropy: Tensor | None  # [B, T]
    logits: Tensor  # [B, T, V]
    ref_logits: Tensor | None  # [B, T, V]
    token_ids: Tensor  # [B, T]
    mask: Tensor | None  # [B, T]
    kept_ids: Tensor  # [nnz]
    offsets: Tensor  # [B T + 1]
    ref_is_whole: bool
    ref_share: Tensor  # [B, T]
    temperature: float
    ref_temperature: float
    softcap: float | None
    ref_softcap: float | None


Places = tuple[Tensor, Tensor, Tensor]  # the indices b, t and v of n logits, [n] each


def places_of(row: Tensor, ids: Tensor, shape: torch.Size) -> Places:
    """Indices of logits; ids that are none become 0."""
    n_tokens = max(shape[1], 1)
    inside = (ids >= 0) & (ids < shape[2])
    return row // n_tokens, row % n_tokens, ids.where(inside, 0)


def _entries(a: KeptArgs) -> Entries:
    """The entries of both models; of a policy without a reference, twice its own.

    An id that is none, which only a CPU looks for, makes its row NaN.
    """
    s = a.segments()
    places = places_of(s.row, a.kept_ids, a.logits.shape)
    outside = places[2] != a.kept_ids

    def read(logits: Tensor, transform: LogitTransform) -> Tensor:
        return transform(logits[places]).masked_fill(outside, torch.nan)

    x = read(a.logits, LogitTransform(a.temperature, a.softcap))
    y = x
    if a.ref_logits is not None:
        y = read(a.ref_logits, LogitTransform(a.ref_temperature, a.ref_softcap))
    return Entries(x, y, a.kept_ids == a.token_ids.flatten()[s.row], s)


def _of_whole_reference(
    a: KeptArgs,
    ref_logits: Tensor,  # [B, T, V]
    e: Entries,
    state: RowState,
    f: Finished,
    backend: str | None,
) -> tuple[Finished, Tensor]:
    """The statistics, and the probability of the set, under a reference over all tokens.

    The kernels tell the log-probability of the set's likeliest token. All others follow from
    differences of logits, in which what the kernels round, of logits far from 0, cancels.
    """
    likeliest = e.y == state.ref_anchor[e.segments.row]
    ids = e.segments.only(a.kept_ids.double(), likeliest).clamp_min(0).long()
    args = TokenStatsArgs(
        logits=ref_logits,
        token_ids=ids.view_as(a.token_ids),
        mask=a.rows(listed=True),
        temperature=a.ref_temperature,
        softcap=a.ref_softcap,
    )
    execution = Execution(inplace_backward=False, backend=backend)
    first = torch.ops.kl_kernels.token_stats(*args, *execution)[0].flatten().double()
    log_share = (first + state.sy.log()).clamp_max(0.0)
    # The KL to a reference that rules the set out is infinite; by differences it would be NaN.
    kl = torch.where(log_share == -torch.inf, torch.inf, f.kl - log_share)
    row = torch.arange(len(first), device=first.device)
    own = a.token_ids.flatten()
    places = places_of(row, own, a.logits.shape)
    y = LogitTransform(a.ref_temperature, a.ref_softcap)(ref_logits[places])
    y = y.masked_fill(places[2] != own, -torch.inf)
    is_whole = a.offsets.diff() == a.logits.shape[-1]
    whole = f._replace(
        ref_logprob=LN2 * (y - state.ref_anchor) + first,
        kl=kl,
        forward_kl=torch.where(is_whole, f.forward_kl, torch.inf),
    )
    return whole, log_share.exp()


def kept_kl(*args: Any) -> tuple[Tensor, ...]:
    *given, _, backend = args
    a = KeptArgs(*given)
    with torch.no_grad():
        e = _entries(a)
        state, f = e.finish()
        share = torch.ones_like(f.kl)
        if a.ref_is_whole and a.ref_logits is not None:
            f, share = _of_whole_reference(a, a.ref_logits, e, state, f, backend)
        dense, listed = _of_whole_rows(a, backend), a.rows(listed=True)

        def either(kept: Tensor, other: Tensor) -> Tensor:  # [B T], [B, T]
            return torch.where(listed, kept.view_as(other).to(other.dtype), other)

        outputs = map(either, f, dense[: len(f)])
        return *outputs, *dense[len(f) :], either(share, torch.ones_like(dense.kl))


def _of_whole_rows(a: KeptArgs, backend: str | None) -> TokenKLOutputs:
    """Statistics of the rows that list nothing; 0 in all others."""
    rows = a._replace(mask=a.rows(listed=False))
    execution = Execution(inplace_backward=False, backend=backend)
    if a.ref_logits is not None:
        both = torch.ops.kl_kernels.token_kl(*pick(TokenKLArgs, rows), *execution)
        return TokenKLOutputs(*both)
    one = torch.ops.kl_kernels.token_stats(*pick(TokenStatsArgs, rows), *execution)
    of_policy = TokenStatsOutputs(*one)._asdict()
    return TokenKLOutputs(
        **of_policy,
        ref_logprob=torch.zeros_like(one[0]),
        kl=torch.zeros_like(one[0]),
        forward_kl=torch.zeros_like(one[0]),
        ref_state=torch.zeros_like(one[2]),
    )


def kept_kl_backward(*args: Any) -> Tensor:
    a = KeptBackwardArgs(*args)
    has_kl = a.grad_kl is not None or a.grad_forward_kl is not None
    rows = pick(KeptArgs, a)
    if not has_kl:  # the reference's logits are not read again
        rows = rows._replace(ref_logits=None)
    with torch.no_grad():
        e, listed = _entries(rows), rows.rows(listed=True).flatten()
        state, f = e.finish()

        def flat(grad: Tensor | None) -> Tensor:
            return torch.zeros_like(f.kl) if grad is None else grad.flatten().double()

        g = Upstream(*map(flat, a[:4]))
        c = coefficients(g, state.sx, state.sy, f.kl, f.entropy, a.temperature)
        # Forward KL has the derivative p - q, and q over all tokens is less than q over the set.
        d = torch.where(g.forward_kl == 0, 0.0, c.d * a.ref_share.flatten())
        gradient = e.backward(state, c._replace(d=d), g.logprob / a.temperature)
        places = places_of(e.segments.row, a.kept_ids, a.logits.shape)
        slope = LogitTransform(a.temperature, a.softcap).softcap_grad(a.logits[places])
        gradient = torch.where(listed[e.segments.row], gradient * slope, 0.0)
        return gradient.to(a.logits.dtype)
