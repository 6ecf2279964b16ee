"""The algebra of `algebra` as device functions, in float32.

Notation is the reference's: tx = k x - A, w = 2^tx for the policy, ty = k y - B, u = 2^ty for the
reference. What float32 changes:

* tx and ty are always one fma, here and in the backward: A is k max(x) rounded, and only the same
  rounding everywhere lets it cancel. (At an offset of 1e4 a rounded product costs 1e-4.)
* A state is [N], one per thread, while the vocabulary is read; the threads' states are merged after
  the loop.
* Infinite KL is kept apart from the sums, as the largest and the least x - y: infinite where one of
  the distributions has no support, NaN (dropped by maximum and minimum) where both have none.
* Forward KL is summed with its sign turned, so that it shares tx - ty with KL in every compiler.

All functions work elementwise on states and logits of one shape, unless they say otherwise.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from kl_kernels import schemas
from kl_kernels.algebra import row as algebra

# A constant stands right of the tensor it multiplies: the interpreter makes constants of products
# the other way round.
LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
INF = tl.constexpr(float("inf"))
NO_TOKEN = tl.constexpr(schemas.NO_TOKEN)

# Stands for -inf after subtracting an anchor: 2^FLOOR is 0, yet FLOOR - FLOOR is 0 and not NaN, and
# a whole vocabulary of -FLOOR does not overflow.
FLOOR = tl.constexpr(-1.0e30)
# The anchor of an empty state: below any logit that counts, and rescaling from it stays finite.
EMPTY_ANCHOR = tl.constexpr(-1.0e32)
FARTHEST_ANCHOR = tl.constexpr(algebra.FARTHEST_ANCHOR)
# Anchored sums above this are folded again with a running maximum: entropy and log-probability are
# differences of terms as large as the sum's logarithm.
LARGE_SUM = tl.constexpr(1048576.0)

# A maximum drops NaN unless told not to.
KEEP_NAN = tl.constexpr(tl.PropagateNan.ALL)


class RowState(NamedTuple):
    """Anchors and sums over the vocabulary seen so far; see `algebra.RowState`."""

    anchor: tl.tensor
    ref_anchor: tl.tensor
    sx: tl.tensor
    sy: tl.tensor
    ex: tl.tensor
    rk: tl.tensor  # sum w (tx - ty)
    fk: tl.tensor  # sum u (tx - ty)
    gap: tl.tensor  # max (x - y); +inf: KL is infinite by support
    least_gap: tl.tensor  # min (x - y); -inf: so is forward KL


@triton.jit
def empty_state(anchor, ref_anchor, N: tl.constexpr):
    """N states of no vocabulary at all, [N], at the given anchors (scalars)."""
    zero = tl.zeros((N,), tl.float32)
    return RowState(
        zero + anchor, zero + ref_anchor, zero, zero, zero, zero, zero, zero - INF, zero + INF
    )


@triton.jit
def fold(s, x, y, k, ref_k, HAS_REF: tl.constexpr, GUARDED: tl.constexpr):
    """Absorb one logit of each model, anchors unchanged.

    GUARDED takes -inf as it is meant: p = 0 adds nothing. Unguarded it makes a sum non-finite.
    """
    sy, rk, fk, gap, least_gap = s.sy, s.rk, s.fk, s.gap, s.least_gap
    tx = tl.fma(x, k, -s.anchor)
    if GUARDED:
        tx = tl.maximum(tx, FLOOR, KEEP_NAN)
    w = tl.exp2(tx)
    sx = s.sx + w
    ex = tl.fma(w, tx, s.ex)
    if HAS_REF:
        ty = tl.fma(y, ref_k, -s.ref_anchor)
        if GUARDED:
            ty = tl.maximum(ty, FLOOR, KEEP_NAN)
            gap = tl.maximum(gap, x - y)
            least_gap = tl.minimum(least_gap, x - y)
        u = tl.exp2(ty)
        sy += u
        rk = tl.fma(w, tx - ty, rk)
        fk = tl.fma(u, tx - ty, fk)
    return RowState(s.anchor, s.ref_anchor, sx, sy, ex, rk, fk, gap, least_gap)


@triton.jit
def move(s, anchor, ref_anchor, HAS_REF: tl.constexpr):
    """The same sums measured from other anchors: tx becomes tx - da, w becomes w 2^-da."""
    sy, rk, fk = s.sy, s.rk, s.fk
    da = anchor - s.anchor
    ca = tl.exp2(-da)
    sx = ca * s.sx
    ex = ca * tl.fma(-da, s.sx, s.ex)
    if HAS_REF:
        db = ref_anchor - s.ref_anchor
        cb = tl.exp2(-db)
        sy = cb * s.sy
        rk = ca * tl.fma(db - da, s.sx, s.rk)
        fk = cb * tl.fma(db - da, s.sy, s.fk)
    return RowState(anchor, ref_anchor, sx, sy, ex, rk, fk, s.gap, s.least_gap)


@triton.jit
def merge(s, t, HAS_REF: tl.constexpr):
    """Bring both states to common anchors and add. Associative up to rounding."""
    anchor = tl.maximum(s.anchor, t.anchor)
    ref_anchor = tl.maximum(s.ref_anchor, t.ref_anchor)
    s = move(s, anchor, ref_anchor, HAS_REF)
    t = move(t, anchor, ref_anchor, HAS_REF)
    return RowState(
        anchor,
        ref_anchor,
        s.sx + t.sx,
        s.sy + t.sy,
        s.ex + t.ex,
        s.rk + t.rk,
        s.fk + t.fk,
        tl.maximum(s.gap, t.gap),
        tl.minimum(s.least_gap, t.least_gap),
    )


@triton.jit
def merge_all(s, HAS_REF: tl.constexpr):
    """The states [N] as one."""
    anchor, ref_anchor = tl.max(s.anchor, 0), tl.max(s.ref_anchor, 0)
    return add_all(move(s, anchor, ref_anchor, HAS_REF), anchor, ref_anchor)


@triton.jit
def sum_of_threads(x):
    """The sum of x [N], one number per thread, with the same bits in every thread.

    It starts as x plus another thread's x. Where x is a product, a compiler that may fuse makes
    fma(a, b, the other's product) of that, which the other thread rounds differently. A product
    plus 0 is fused already, and has nothing left to fuse.
    """
    return tl.sum(x + 0.0, 0)


@triton.jit
def add_all(s, anchor, ref_anchor):
    """The states [N], which share these anchors (scalars), as one."""
    return RowState(
        anchor,
        ref_anchor,
        sum_of_threads(s.sx),
        sum_of_threads(s.sy),
        sum_of_threads(s.ex),
        sum_of_threads(s.rk),
        sum_of_threads(s.fk),
        tl.max(s.gap, 0),
        tl.min(s.least_gap, 0),
    )


@triton.jit
def is_sound(s, HAS_REF: tl.constexpr):
    """Whether the anchors of an unguarded fold were well chosen and nothing needed guarding."""
    sound = (s.sx <= LARGE_SUM) & (tl.abs(s.ex) < INF)
    if HAS_REF:
        sound &= (s.sy <= LARGE_SUM) & (tl.abs(s.rk) < INF) & (tl.abs(s.fk) < INF)
    return sound


class Finished(NamedTuple):
    """Statistics of a finished row, in nats; KL and entropy are never negative."""

    logprob: tl.tensor
    ref_logprob: tl.tensor
    kl: tl.tensor
    forward_kl: tl.tensor
    entropy: tl.tensor


@triton.jit
def log_ratio(a, b):
    """ln(a / b). Each logarithm of a sum is rounded by as much as 5e-7: a KL of 1e-5 of a flat row
    would be off by a tenth. Where the two are close, a - b is exact; the rest is Kahan's log1p.
    """
    relative = tl.div_rn(a - b, b)
    u = 1.0 + relative
    rounded = tl.where(u == 1.0, 1.0, u - 1.0)
    near = tl.where(u == 1.0, relative, tl.log(u) * tl.div_rn(relative, rounded))
    return tl.where(tl.abs(relative) < 0.5, near, tl.log(tl.div_rn(a, b)))


@triton.jit
def within_reach(s):
    """NaN for sums whose anchor is farther from 0 than float32 anchors reach."""
    sx = tl.where(tl.abs(s.anchor) <= FARTHEST_ANCHOR, s.sx, float("nan"))
    sy = tl.where(tl.abs(s.ref_anchor) <= FARTHEST_ANCHOR, s.sy, float("nan"))
    return RowState(s.anchor, s.ref_anchor, sx, sy, s.ex, s.rk, s.fk, s.gap, s.least_gap)


@triton.jit
def finish(s, xt, yt, k, ref_k, HAS_REF: tl.constexpr):
    """xt, yt: the token's logits, after softcap. Without a reference only the policy's count.

    Quotients are rounded: a GPU's own are off by up to two units in the last place.
    """
    ln_sx = tl.log(s.sx)
    logprob = tl.fma(xt, k, -s.anchor) * LN2 - ln_sx
    entropy = tl.maximum(ln_sx - tl.div_rn(s.ex, s.sx) * LN2, 0.0, KEEP_NAN)
    ref_logprob, kl, forward_kl = logprob, logprob, logprob
    if HAS_REF:
        ln_ratio = log_ratio(s.sx, s.sy)
        ref_logprob = tl.fma(yt, ref_k, -s.ref_anchor) * LN2 - tl.log(s.sy)
        # Infinity is added, not selected: a row that is NaN for another reason stays NaN.
        kl = tl.div_rn(s.rk, s.sx) * LN2 - ln_ratio + tl.where(s.gap == INF, INF, 0.0)
        forward_kl = ln_ratio - tl.div_rn(s.fk, s.sy) * LN2
        forward_kl += tl.where(s.least_gap == -INF, INF, 0.0)
        kl = tl.maximum(kl, 0.0, KEEP_NAN)
        forward_kl = tl.maximum(forward_kl, 0.0, KEEP_NAN)
    return Finished(logprob, ref_logprob, kl, forward_kl, entropy)


class Saved(NamedTuple):
    """Numbers of a finished row that its gradient needs."""

    anchor: tl.tensor
    ref_anchor: tl.tensor
    sx: tl.tensor
    sy: tl.tensor
    kl: tl.tensor
    entropy: tl.tensor


class Upstream(NamedTuple):
    """The gradient of a loss with respect to a row's statistics."""

    logprob: tl.tensor
    kl: tl.tensor
    forward_kl: tl.tensor
    entropy: tl.tensor


class Differentiated(NamedTuple):
    """Statistics that have a gradient besides the log-probability."""

    KL: tl.constexpr
    FORWARD_KL: tl.constexpr
    ENTROPY: tl.constexpr


class Coefficients(NamedTuple):
    """A row's gradient is w (a + b tx + c (tx - ty)) - d u, tx and ty measured from the anchors.

    The reference's formula with b and c exchanged for their sum and -c: where policy and reference
    are equal, the KL's gradient is exactly 0.
    """

    anchor: tl.tensor
    ref_anchor: tl.tensor
    a: tl.tensor
    b: tl.tensor
    c: tl.tensor
    d: tl.tensor


@triton.jit
def coefficients(g, row, temperature, HAS_REF: tl.constexpr):
    """`g`: `Upstream`, `row`: `Saved`. The gradient of an infinite KL is NaN.

    See `algebra.coefficients`.
    """
    a = tl.where(g.entropy == 0.0, 0.0, g.entropy * (tl.log(row.sx) - row.entropy)) - g.logprob
    d = 0.0
    if HAS_REF:
        kl_term = g.kl * (log_ratio(row.sy, row.sx) - row.kl) + (row.kl - row.kl)
        a += tl.where(g.kl == 0.0, 0.0, kl_term) + g.forward_kl
        d = tl.div_rn(g.forward_kl, temperature * row.sy)
    scale = tl.div_rn(1.0, temperature * row.sx)
    b, c = -scale * LN2 * g.entropy, scale * LN2 * g.kl
    return Coefficients(row.anchor, row.ref_anchor, a * scale, b, c, d)


@triton.jit
def anchored(x, k, anchor):
    """Log2 units from the anchor, -inf at the floor."""
    return tl.maximum(tl.fma(x, k, -anchor), FLOOR, KEEP_NAN)


@triton.jit
def backward(tx, ty, c, of: tl.constexpr):
    """The gradient, all but the token's own + g_logprob / temperature."""
    slope = c.a
    if of.ENTROPY:
        slope = tl.fma(tx, c.b, slope)
    if of.KL:
        slope = tl.fma(tx - ty, c.c, slope)
    grad = tl.exp2(tx) * slope
    if of.FORWARD_KL:
        grad = tl.fma(tl.exp2(ty), -c.d, grad)
    return grad


@triton.jit
def soft_capped(x, softcap):
    """The softcap's tanh, nothing where softcap is None; infinities stay (see `epilogues.py`).

    tanh near 0 is a polynomial in z^2, minimax on |z| < 0.55 (relative error 4e-8): the quotient
    would cancel there.
    """
    if softcap is not None:
        z = x / softcap
        small = tl.fma(z * z, 0.01645873, -0.05268413)
        small = tl.fma(z * z, small, 0.13320942)
        small = tl.fma(z * z, small, -0.33332957)
        small = tl.fma(z * z * z, small, z)
        e = tl.exp2(tl.abs(z) * (-2.0 * LOG2E))
        large = (1.0 - e) / (1.0 + e)
        tanh = tl.where(tl.abs(z) < 0.55, small, tl.where(z < 0.0, -large, large))
        x = tl.where(tl.abs(x) == INF, x, softcap * tanh)
    return x


@triton.jit
def soft_capped_grad(grad, x, softcap):
    """`grad` with respect to x, given `grad` with respect to soft_capped(x): 1 / cosh^2."""
    if softcap is not None:
        e = tl.exp2(tl.abs(x / softcap) * (-2.0 * LOG2E))
        grad *= 4.0 * e / ((1.0 + e) * (1.0 + e))
    return grad
