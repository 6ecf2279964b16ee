"""The algebra of one row (token) in plain PyTorch, written to be read.

Per row (token), x and y are the policy's and the reference's logits after softcap, and
k = log2(e) / temperature turns them into log2 units. Each is measured from an *anchor*, a number
near the row's largest scaled logit, so that nothing overflows and large common offsets cancel:

    tx = k x - A     w = 2^tx     p = w / sum w     (policy)
    ty = k y - B     u = 2^ty     q = u / sum u     (reference)

A row's state is its anchors and five sums over the vocabulary; four verbs work on it:

    fold      absorb a block of the vocabulary
    merge     join the states of two parts of the vocabulary
    finish    turn a state into log-probabilities, KL divergences and entropy
    backward  the gradient of any mix of those, with one more look at the logits

All arithmetic here is float64 whatever the logits' dtype. Formulas: softmax and its derivatives
are elementary; KL(p||q) and entropy as sums over anchored weights follow from
log p = ln2 tx - ln sum w.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

LN2 = math.log(2.0)
LOG2E = 1.0 / LN2

# Stands for -inf after subtracting an anchor: 2^FLOOR is 0, yet FLOOR - FLOOR is 0 and not NaN.
FLOOR = -1.0e301
# The anchor of an empty state, above FLOOR so that -inf data cannot look like a maximum.
EMPTY_ANCHOR = -1.0e300
# From here on two float32 anchors are 2^8 apart, and weights of logits between them overflow.
FARTHEST_ANCHOR = 2.0**31


class RowState(NamedTuple):
    """Anchors and sums over the vocabulary seen so far, each [n] float64."""

    anchor: Tensor  # A
    ref_anchor: Tensor  # B
    sx: Tensor  # sum w
    sy: Tensor  # sum u
    ex: Tensor  # sum w tx
    rk: Tensor  # sum w (tx - ty)
    fk: Tensor  # sum u (ty - tx)


def empty_state(n_rows: int, device: torch.device) -> RowState:
    zero = torch.zeros(n_rows, dtype=torch.float64, device=device)
    return RowState(zero + EMPTY_ANCHOR, zero + EMPTY_ANCHOR, zero, zero, zero, zero, zero)


def fold(x: Tensor, y: Tensor) -> RowState:  # [n, block] scaled logits, log2 units
    """The state of one block."""
    anchor = x.amax(-1).clamp_min(EMPTY_ANCHOR)
    ref_anchor = y.amax(-1).clamp_min(EMPTY_ANCHOR)
    terms = summands(x, y, anchor, ref_anchor)
    return RowState(anchor, ref_anchor, *(term.sum(-1) for term in terms))


def summands(
    x: Tensor,  # [n, block] scaled logits, log2 units
    y: Tensor,
    anchor: Tensor,  # [n]
    ref_anchor: Tensor,
) -> tuple[Tensor, ...]:
    """The terms of a state's five sums, each [n, block].

    p = 0 adds nothing to anything. KL is infinite by support, not by size: some x > -inf where
    y = -inf; forward KL likewise with the roles exchanged.
    """
    tx, ty = from_anchor(x, anchor), from_anchor(y, ref_anchor)
    w, u = torch.exp2(tx), torch.exp2(ty)
    no_x, no_y = x == -torch.inf, y == -torch.inf
    reverse = torch.where(no_y, torch.inf, w * (tx - ty)).masked_fill(no_x, 0.0)
    forward = torch.where(no_x, torch.inf, u * (ty - tx)).masked_fill(no_y, 0.0)
    return w, u, w * tx, reverse, forward


def from_anchor(x: Tensor, anchor: Tensor) -> Tensor:  # [n, block], [n]
    return (x - anchor[:, None]).clamp_min(FLOOR)


def merge(s: RowState, t: RowState) -> RowState:
    """Bring both states to common anchors and add. Associative up to rounding."""
    anchor = torch.maximum(s.anchor, t.anchor)
    ref_anchor = torch.maximum(s.ref_anchor, t.ref_anchor)
    moved = (move(s, anchor, ref_anchor), move(t, anchor, ref_anchor))
    return RowState(anchor, ref_anchor, *(a + b for a, b in zip(moved[0][2:], moved[1][2:])))


def move(s: RowState, anchor: Tensor, ref_anchor: Tensor) -> RowState:
    """The same sums measured from other anchors: tx becomes tx - da, w becomes w 2^-da.

    An infinite sum stays infinite: scaling it by an underflowed 2^-da would make it NaN.
    """
    da, db = anchor - s.anchor, ref_anchor - s.ref_anchor
    ca, cb = torch.exp2(-da), torch.exp2(-db)
    return RowState(
        anchor,
        ref_anchor,
        sx=ca * s.sx,
        sy=cb * s.sy,
        ex=ca * (s.ex - da * s.sx),
        rk=torch.where(s.rk == torch.inf, s.rk, ca * (s.rk - (da - db) * s.sx)),
        fk=torch.where(s.fk == torch.inf, s.fk, cb * (s.fk - (db - da) * s.sy)),
    )


class Finished(NamedTuple):
    """Statistics of finished rows, each [n] float64; KL and entropy are never negative."""

    logprob: Tensor
    ref_logprob: Tensor
    kl: Tensor
    forward_kl: Tensor
    entropy: Tensor


def finish(s: RowState, xt: Tensor, yt: Tensor) -> Finished:  # xt, yt: [n] the token's scaled logit
    ln_sx, ln_sy = torch.log(s.sx), torch.log(s.sy)
    return Finished(
        logprob=LN2 * (xt - s.anchor) - ln_sx,
        ref_logprob=LN2 * (yt - s.ref_anchor) - ln_sy,
        kl=(LN2 * s.rk / s.sx - (ln_sx - ln_sy)).clamp_min(0.0),
        forward_kl=(LN2 * s.fk / s.sy + (ln_sx - ln_sy)).clamp_min(0.0),
        entropy=(ln_sx - LN2 * s.ex / s.sx).clamp_min(0.0),
    )


def within_reach(s: RowState, dtype: torch.dtype) -> RowState:
    """NaN for sums whose anchor is too far from 0 to be a number of `dtype`."""
    if dtype == torch.float64:
        return s
    sx, sy = (
        total.masked_fill(~(anchor.abs() <= FARTHEST_ANCHOR), torch.nan)
        for total, anchor in ((s.sx, s.anchor), (s.sy, s.ref_anchor))
    )
    return s._replace(sx=sx, sy=sy)


class Upstream(NamedTuple):
    """The loss's gradient with respect to each output, each [n] float64 (zeros where unused)."""

    logprob: Tensor
    kl: Tensor
    forward_kl: Tensor
    entropy: Tensor


class Coefficients(NamedTuple):
    """A row's gradient is w (a + b tx + c ty) - d u, each [n]."""

    a: Tensor
    b: Tensor
    c: Tensor
    d: Tensor


def coefficients(
    g: Upstream, sx: Tensor, sy: Tensor, kl: Tensor, entropy: Tensor, temperature: float
) -> Coefficients:
    """From d logprob = [i = token] - p, d kl = p (log p - log q - kl), d forward_kl = p - q and
    d entropy = -p (log p + entropy), each over the temperature, with p = w/sx and q = u/sy.
    """
    ln_sx, ln_sy = torch.log(sx), torch.log(sy)
    # A zero upstream gradient is selected away before it meets an infinite kl; any other makes the
    # whole row NaN, since an infinite kl has no gradient.
    kl = kl.masked_fill(kl == torch.inf, torch.nan)
    kl_term = torch.where(g.kl == 0, 0.0, g.kl * (ln_sy - ln_sx - kl))
    entropy_term = torch.where(g.entropy == 0, 0.0, g.entropy * (ln_sx - entropy))
    return Coefficients(
        a=(kl_term + entropy_term - g.logprob + g.forward_kl) / (temperature * sx),
        b=LN2 * (g.kl - g.entropy) / (temperature * sx),
        c=-LN2 * g.kl / (temperature * sx),
        d=g.forward_kl / (temperature * sy),
    )


def backward(tx: Tensor, ty: Tensor, c: Coefficients) -> Tensor:  # [n, block] log2 units
    """The gradient of one block of logits, all but the token's own + g_logprob / temperature."""
    a, b, kl, d = (v[:, None] for v in c)
    return torch.exp2(tx) * (a + b * tx + kl * ty) - d * torch.exp2(ty)


class LogitTransform(NamedTuple):
    """From raw logits to log2 units: softcap, then temperature."""

    temperature: float
    softcap: float | None

    def __call__(self, logits: Tensor) -> Tensor:
        return self._capped(logits.double()) * (LOG2E / self.temperature)

    def _capped(self, x: Tensor) -> Tensor:
        """-inf stays -inf (a token ruled out) and +inf stays +inf (an error to be seen)."""
        if self.softcap is None:
            return x
        return torch.where(x.isinf(), x, self.softcap * torch.tanh(x / self.softcap))

    def softcap_grad(self, logits: Tensor) -> Tensor | float:
        if self.softcap is None:
            return 1.0
        return 1.0 - torch.tanh(logits.double() / self.softcap) ** 2
