"""The algebra in plain PyTorch, written to be read: every other backend is checked against it.

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

All arithmetic here is float64 whatever the logits' dtype; vocabulary is taken in blocks and rows
in groups, so memory stays bounded. Formulas: softmax and its derivatives are elementary; KL(p||q)
and entropy as sums over anchored weights follow from log p = ln2 tx - ln sum w.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kl_kernels.checks import check_token_range
from kl_kernels.schemas import ESTIMATORS, output_dtype

EXACT = ESTIMATORS.index("exact")
LN2 = math.log(2.0)
LOG2E = 1.0 / LN2

# Stands for -inf after subtracting an anchor: 2^FLOOR is 0, yet FLOOR - FLOOR is 0 and not NaN.
FLOOR = -1.0e301
# The anchor of an empty state, above FLOOR so that -inf data cannot look like a maximum.
EMPTY_ANCHOR = -1.0e300

BLOCK_V = 8192
GROUP_ELEMENTS = 1 << 21  # rows are taken in groups of about this many logits per block


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
    """The state of one block.

    p = 0 adds nothing to anything. KL is infinite by support, not by size: some x > -inf where
    y = -inf; forward KL likewise with the roles exchanged.
    """
    anchor = x.amax(-1).clamp_min(EMPTY_ANCHOR)
    ref_anchor = y.amax(-1).clamp_min(EMPTY_ANCHOR)
    tx, ty = from_anchor(x, anchor), from_anchor(y, ref_anchor)
    w, u = torch.exp2(tx), torch.exp2(ty)
    no_x, no_y = x == -torch.inf, y == -torch.inf
    reverse = torch.where(no_y, torch.inf, w * (tx - ty)).masked_fill(no_x, 0.0)
    forward = torch.where(no_x, torch.inf, u * (ty - tx)).masked_fill(no_y, 0.0)
    return RowState(
        anchor,
        ref_anchor,
        sx=w.sum(-1),
        sy=u.sum(-1),
        ex=(w * tx).masked_fill(no_x, 0.0).sum(-1),
        rk=reverse.sum(-1),
        fk=forward.sum(-1),
    )


def from_anchor(x: Tensor, anchor: Tensor) -> Tensor:  # [n, block], [n]
    return (x - anchor[:, None]).clamp_min(FLOOR)


def merge(s: RowState, t: RowState) -> RowState:
    """Bring both states to common anchors and add. Associative up to rounding."""
    anchor = torch.maximum(s.anchor, t.anchor)
    ref_anchor = torch.maximum(s.ref_anchor, t.ref_anchor)
    moved = (_move(s, anchor, ref_anchor), _move(t, anchor, ref_anchor))
    return RowState(anchor, ref_anchor, *(a + b for a, b in zip(moved[0][2:], moved[1][2:])))


def _move(s: RowState, anchor: Tensor, ref_anchor: Tensor) -> RowState:
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
    """What `finish` makes of a state, each [n] float64; KL and entropy are never negative."""

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


def reward_epilogue(
    f: Finished, kl_coef: float, estimator: int, kl_clip: float | None
) -> tuple[Tensor, Tensor]:
    """The KL reward of each token, without the score, and what to add to its advantage.

    Exact KL does not depend on the sampled token, so as a reward it pulls that token nowhere; the
    correction -kl_coef (k1 - exact) gives the token its own share of the policy gradient.
    Estimators after Schulman (2020), "Approximating KL divergence".
    """
    k1 = f.logprob - f.ref_logprob
    estimate = (k1, f.kl, k1 * k1 / 2, torch.expm1(-k1) + k1, k1.abs())[estimator]
    if kl_clip is not None:
        k1, estimate = k1.clamp(-kl_clip, kl_clip), estimate.clamp(-kl_clip, kl_clip)
    # Without a penalty an infinite KL is nobody's business: 0 * inf would be NaN.
    shortfall = k1 - estimate if estimator == EXACT else torch.zeros_like(k1)
    if kl_coef == 0:
        return torch.zeros_like(estimate), torch.zeros_like(shortfall)
    return -kl_coef * estimate, -kl_coef * shortfall


# The backend: the operators of `schemas.KERNELS`, made of the verbs above. Only rows under the mask
# are read; all others are exactly 0.


def token_stats(
    logits: Tensor,  # [B, T, V]
    token_ids: Tensor,  # [B, T]
    mask: Tensor | None,  # [B, T]
    temperature: float,
    softcap: float | None,
) -> tuple[Tensor, ...]:
    # A policy alone is its own reference.
    logprob, _, _, _, entropy, policy_state, _ = token_kl(
        logits, logits, token_ids, mask, temperature, temperature, softcap, softcap
    )
    return logprob, entropy, policy_state


def token_kl(
    logits: Tensor,  # [B, T, V]
    ref_logits: Tensor,  # [B, T, V]
    token_ids: Tensor,  # [B, T]
    mask: Tensor | None,  # [B, T]
    temperature: float,
    ref_temperature: float,
    softcap: float | None,
    ref_softcap: float | None,
) -> tuple[Tensor, ...]:
    check_token_range(token_ids, mask, logits.shape[-1])
    policy, ref = Scale(temperature, softcap), Scale(ref_temperature, ref_softcap)
    finished = logits.new_zeros((5, *token_ids.shape), dtype=output_dtype(logits))
    states = logits.new_zeros((2, 2, *token_ids.shape), dtype=output_dtype(logits))
    for rows in _row_groups(logits, mask):
        state = empty_state(len(rows[0]), logits.device)
        for block in _blocks(logits):
            here = (*rows, block)
            state = merge(state, fold(policy(logits[here]), ref(ref_logits[here])))
        # The saved anchor is what backward will subtract, so the saved sum has to belong to it.
        saved = _move(state, *(a.to(states.dtype).double() for a in state[:2]))
        token = (*rows, token_ids[rows])
        result = finish(state, policy(logits[token]), ref(ref_logits[token]))
        for i, value in enumerate(result):
            finished[i][rows] = value.to(finished.dtype)
        for i, value in enumerate((saved.anchor, saved.sx, saved.ref_anchor, saved.sy)):
            states[i // 2, i % 2][rows] = value.to(states.dtype)
    # Outputs of an operator may not share memory.
    return tuple(t.clone() for t in (*finished, *states))


def token_stats_backward(
    grad_logprob: Tensor | None,  # [B, T]
    grad_entropy: Tensor | None,  # [B, T]
    logits: Tensor,  # [B, T, V]
    token_ids: Tensor,  # [B, T]
    mask: Tensor | None,  # [B, T]
    policy_state: Tensor,  # [2, B, T]
    entropy: Tensor,  # [B, T]
    temperature: float,
    softcap: float | None,
) -> Tensor:
    return token_kl_backward(
        grad_logprob, None, None, grad_entropy,
        logits, logits, token_ids, mask, policy_state, policy_state, torch.zeros_like(entropy),
        entropy, temperature, temperature, softcap, softcap,
    )  # fmt: skip


def token_kl_backward(
    grad_logprob: Tensor | None,  # [B, T]
    grad_kl: Tensor | None,  # [B, T]
    grad_forward_kl: Tensor | None,  # [B, T]
    grad_entropy: Tensor | None,  # [B, T]
    logits: Tensor,  # [B, T, V]
    ref_logits: Tensor,  # [B, T, V]
    token_ids: Tensor,  # [B, T]
    mask: Tensor | None,  # [B, T]
    policy_state: Tensor,  # [2, B, T]
    ref_state: Tensor,  # [2, B, T]
    kl: Tensor,  # [B, T]
    entropy: Tensor,  # [B, T]
    temperature: float,
    ref_temperature: float,
    softcap: float | None,
    ref_softcap: float | None,
) -> Tensor:
    policy, ref = Scale(temperature, softcap), Scale(ref_temperature, ref_softcap)
    grad_logits = logits.new_zeros(logits.shape)
    grads = (grad_logprob, grad_kl, grad_forward_kl, grad_entropy)
    for rows in _row_groups(logits, mask):
        zero = torch.zeros(len(rows[0]), dtype=torch.float64, device=logits.device)
        upstream = Upstream(*(zero if g is None else g[rows].double() for g in grads))
        flat = rows[0] * logits.shape[1] + rows[1]
        (anchor, sx), (ref_anchor, sy) = (
            state.flatten(1)[:, flat].double() for state in (policy_state, ref_state)
        )
        c = coefficients(upstream, sx, sy, kl[rows].double(), entropy[rows].double(), temperature)
        for block in _blocks(logits):
            here = (*rows, block)
            tx = from_anchor(policy(logits[here]), anchor)
            ty = from_anchor(ref(ref_logits[here]), ref_anchor)
            grad = backward(tx, ty, c)
            own = token_ids[rows] - block.start
            has = ((own >= 0) & (own < grad.shape[-1])).nonzero().squeeze(-1)
            grad[has, own[has]] += upstream.logprob[has] / temperature
            grad_logits[here] = (grad * policy.softcap_grad(logits[here])).to(logits.dtype)
    return grad_logits


def kl_rewards(
    logits: Tensor,  # [B, T, V]
    ref_logits: Tensor,  # [B, T, V]
    token_ids: Tensor,  # [B, T]
    mask: Tensor,  # [B, T]
    scores: Tensor,  # [B]
    score_index: Tensor,  # [B], -1 for nowhere
    kl_coef: float,
    estimator: int,
    kl_clip: float | None,
    *scales: float | None,
) -> tuple[Tensor, ...]:
    outputs = token_kl(logits, ref_logits, token_ids, mask, *scales)  # type: ignore[arg-type]
    rewards, correction = reward_epilogue(Finished(*outputs[:5]), kl_coef, estimator, kl_clip)
    position = torch.arange(mask.shape[1], device=mask.device)
    at_score = position == score_index[:, None]
    rewards = torch.where(mask, rewards, 0.0) + torch.where(at_score, scores[:, None], 0.0)
    return rewards, torch.where(mask, correction, 0.0), *outputs


def gae(
    rewards: Tensor,  # [B, T]
    values: Tensor,  # [B, T]
    mask: Tensor,  # [B, T]
    gamma: float,
    lam: float,
    skip_masked: bool,
) -> tuple[Tensor, Tensor]:
    """Schulman et al. (2016), equation 16, from the last token back; 0 follows the last token.

    Skipping hands a masked token's successor on to its predecessor, as if it were not there.
    Otherwise masked rewards and values count as 0, and time passes over them.
    """
    r, v = (torch.where(mask, t, 0.0).double() for t in (rewards, values))
    advantages = torch.zeros_like(r)
    next_value, next_advantage = r.new_zeros(len(r)), r.new_zeros(len(r))
    for t in reversed(range(r.shape[1])):
        delta = r[:, t] + gamma * next_value - v[:, t]
        advantage = delta + gamma * lam * next_advantage
        counts = mask[:, t] | (not skip_masked)
        next_value = torch.where(counts, v[:, t], next_value)
        next_advantage = torch.where(counts, advantage, next_advantage)
        advantages[:, t] = torch.where(mask[:, t], advantage, 0.0)
    returns = torch.where(mask, advantages + v, 0.0)
    return advantages.to(rewards.dtype), returns.to(rewards.dtype)


class Scale(NamedTuple):
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


def _row_groups(logits: Tensor, mask: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Indices (b, t) of the rows to work on, a bounded number at a time."""
    n_batch, n_tokens, vocab_size = logits.shape
    if mask is None:
        mask = torch.ones(n_batch, n_tokens, dtype=torch.bool, device=logits.device)
    group = max(1, GROUP_ELEMENTS // min(vocab_size, BLOCK_V))
    b, t = mask.nonzero(as_tuple=True)
    if len(b):
        yield from zip(b.split(group), t.split(group))


def _blocks(logits: Tensor) -> Iterator[slice]:
    vocab_size = logits.shape[-1]
    for start in range(0, vocab_size, BLOCK_V):
        yield slice(start, min(start + BLOCK_V, vocab_size))
