"""Floating-point results of instructions, on arrays of one value per thread.

Exact instructions are rounded once. Approximate ones are rounded to nearest, or are as far from
that as the PTX ISA allows, or anything in between: `approximation`.

Bounds: https://docs.nvidia.com/cuda/parallel-thread-execution/#floating-point-instructions-ex2,
#floating-point-instructions-lg2, -rcp, -rcp-approx-ftz-f64, -div
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction

import numpy as np
from numpy import float32 as f4
from numpy import float64 as f8
from numpy import int32 as i4
from numpy import int64 as i8
from numpy import ndarray
from numpy import uint32 as u4
from numpy import uint64 as u8

TINY = f4(2.0**-126)  # the least normal number
NAN = u4(0x7FFFFFFF).view(f4)  # results that are NaN are this one
MAGNITUDE = i4(0x7FFFFFFF)


class Approximation:
    """The distance of approximate instructions from the rounded result; set by `approximation`."""

    mode = "exact"


@contextmanager
def approximation(mode: str) -> Iterator[None]:
    """Make approximate instructions err.

    Args:
        mode: "exact" rounds to nearest; "up" and "down" err by the whole bound; "hash" by anything
            within it, by a hash of the operand.

    Raises:
        ValueError: there is no such mode.

    >>> one = np.ones(1, f4)
    >>> with approximation("up"):
    ...     (ex2(one) - 2) / 2**-22
    array([2.], dtype=float32)
    """
    if mode not in ("exact", "up", "down", "hash"):
        raise ValueError(f"mode must be exact, up, down or hash, got {mode!r}")
    before, Approximation.mode = Approximation.mode, mode
    try:
        yield
    finally:
        Approximation.mode = before


def units(operand: ndarray, bound: int) -> ndarray | int:
    """Choose an error between -bound and bound, in units of the caller's."""
    if Approximation.mode == "hash":
        mixed = np.ascontiguousarray(operand).view(u4) * u4(2654435761)
        mixed = (mixed ^ (mixed >> u4(15))) * u4(2246822519)
        return (mixed >> u4(8)).astype(i4) % i4(2 * bound + 1) - i4(bound)
    return {"exact": 0, "up": bound, "down": -bound}[Approximation.mode]


def shifted(result: ndarray, operand: ndarray, bound: int) -> ndarray:
    """Move finite results by up to `bound` units in the last place; zeros stay exact."""
    if Approximation.mode == "exact":
        return result
    moved = ordered(result) + np.asarray(units(operand, bound), i4)
    limit = ordered(f4(np.finfo(f4).max))
    moved = unordered(np.clip(moved, -limit, limit))
    return np.where(np.isfinite(result) & (result != 0), moved, result)


def ordered(x: ndarray) -> ndarray:
    """Integers in the order of the floats."""
    bits = x.view(i4)
    return np.where(bits < 0, -(bits & MAGNITUDE), bits)


def unordered(x: ndarray) -> ndarray:
    return np.where(x < 0, -x | ~MAGNITUDE, x).astype(i4).view(f4)


def ftz(x: ndarray) -> ndarray:
    """Flush subnormal numbers to zeros of the same sign."""
    tiny = np.abs(x) < TINY
    return np.where(tiny, np.copysign(f4(0), x), x) if tiny.any() else x


def nan(x: ndarray) -> ndarray:
    """Replace every NaN by the one that instructions return."""
    unequal = x != x
    return np.where(unequal, NAN, x) if unequal.any() else x


def flushing(function: Callable, *operands: ndarray, flush: bool) -> ndarray:
    """Call with operands and result flushed, if at all."""
    if not flush:
        return function(*operands)
    return ftz(function(*map(ftz, operands)))


# --- sums of products


def two_sum(a: ndarray, b: ndarray) -> tuple[ndarray, ndarray]:
    """Split a + b into its rounded value and the error (Knuth 1969)."""
    total = a + b
    other = total - a
    return total, (a - (total - other)) + (b - other)


def to_odd(total: ndarray, error: ndarray) -> ndarray:
    """Round total + error to odd instead: rounding again, to fewer bits, is then right.

    Boldo and Melquiond, Emulation of FMA and correctly rounded sums, 2008.
    """
    total = np.ascontiguousarray(total)
    bits = total.view(i8)
    inexact = np.isfinite(total) & np.isfinite(error) & (error != 0) & (bits & 1 == 0)
    return (bits + np.where(inexact, np.where((error > 0) == (total > 0), 1, -1), 0)).view(f8)


def product_sum(a: ndarray, b: ndarray, c: ndarray) -> ndarray:
    """Exact a b + c of float32, rounded to odd where float32 could be in doubt."""
    product = np.multiply(a, b, dtype=f8)  # exact
    total = np.asarray(product + c)
    half = total.view(i8) & i8(0x1FFFFFFF) == i8(0x10000000)
    doubtful = half | (np.abs(total) < TINY) & (total != 0)
    if doubtful.any():
        product, c = (np.broadcast_to(x, total.shape)[doubtful] for x in (product, c))
        total[doubtful] = to_odd(*two_sum(product, c.astype(f8)))
    return total


def fma(a: ndarray, b: ndarray, c: ndarray) -> ndarray:
    """Float32 a b + c, rounded once, to nearest even."""
    return nan(product_sum(a, b, c).astype(f4))


def fma_down(a: ndarray, b: ndarray, c: ndarray) -> ndarray:
    """Float32 a b + c, rounded once, towards -inf."""
    product, c = np.broadcast_arrays(np.multiply(a, b, dtype=f8), np.asarray(c, f8))
    exact = to_odd(*two_sum(product, c))
    exact = np.where((exact == 0) & (np.signbit(product) | np.signbit(c)), -0.0, exact)
    result = exact.astype(f4)
    return nan(np.where(result > exact, np.nextafter(result, f4(-np.inf)), result))


def two_product(a: ndarray, b: ndarray) -> tuple[ndarray, ndarray]:
    """Split a b into its rounded value and the error (Dekker 1971)."""
    halves = []
    for x in (a, b):
        scaled = x * 134217729.0  # 2^27 + 1
        high = scaled - (scaled - x)
        halves.append((high, x - high))
    (ah, al), (bh, bl) = halves
    product = a * b
    return product, ((ah * bh - product) + ah * bl + al * bh) + al * bl


def fma_double(a: ndarray, b: ndarray, c: ndarray) -> ndarray:
    """Float64 a b + c, rounded once, to nearest even."""
    a, b, c = np.broadcast_arrays(*(np.asarray(x, f8) for x in (a, b, c)))
    product, error = two_product(a, b)
    middle, low = two_sum(c, error)
    high, rest = two_sum(product, middle)
    result = high + to_odd(*two_sum(rest, low))
    sizes = [np.abs(x) for x in (a, b, c)]
    extreme = (np.maximum.reduce(sizes) > 2.0**400) | (np.abs(product) < 2.0**-900)
    if extreme.any():
        result = np.where(extreme, a * b + c, result)
        finite = extreme & np.isfinite(a) & np.isfinite(b) & np.isfinite(c)
        for at in zip(*np.nonzero(finite & (a != 0) & (b != 0))):
            exact = Fraction(float(a[at])) * Fraction(float(b[at])) + Fraction(float(c[at]))
            try:
                result[at] = float(exact) if exact else 0.0
            except OverflowError:
                result[at] = np.inf if exact > 0 else -np.inf
    return result


# --- approximate instructions


def ex2(x: ndarray, flush: bool = False) -> ndarray:
    """2^x, within 2 units in the last place; exact at 0."""

    def function(x: ndarray) -> ndarray:
        result = np.exp2(x.astype(f8)).astype(f4)
        return nan(np.where(x == 0, f4(1), shifted(result, x, 2)))

    return flushing(function, x, flush=flush)


def lg2(x: ndarray, flush: bool = False) -> ndarray:
    """log2(x), within 2^-22: absolute between 1/2 and 2, relative elsewhere."""

    def function(x: ndarray) -> ndarray:
        exact = np.log2(x.astype(f8))
        if Approximation.mode == "exact":
            return nan(exact.astype(f4))
        near = (x > 0.5) & (x < 2)
        bound = np.where(near, 2.0**-22, np.abs(exact) * 2.0**-22)
        result = (exact + bound * (np.asarray(units(x, 64)) / 64)).astype(f4)
        result = np.where(np.isfinite(exact), result, exact).astype(f4)
        left = np.abs(result - exact) > bound  # by rounding
        return nan(np.where(left, np.nextafter(result, exact.astype(f4)), result))

    return flushing(function, x, flush=flush)


def rcp(x: ndarray, flush: bool = False) -> ndarray:
    """1 / x, within 1 unit in the last place."""

    def function(x: ndarray) -> ndarray:
        return nan(shifted((1.0 / x.astype(f8)).astype(f4), x, 1))

    return flushing(function, x, flush=flush)


def divide(a: ndarray, b: ndarray, flush: bool = False, scaled: bool = True) -> ndarray:
    """A / b, within 2 units in the last place.

    Args:
        a: Float32 [threads].
        b: Float32 [threads].
        flush: Subnormal operands and results are zeros.
        scaled: div.full; else div.approx, a * (1 / b), where 1 / b underflows for |b| > 2^126.
    """

    def function(a: ndarray, b: ndarray) -> ndarray:
        a, b = np.broadcast_arrays(a, b)
        result = shifted((a.astype(f8) / b).astype(f4), b, 2)
        if not scaled:
            large = (np.abs(b) > f4(2.0**126)) & np.isfinite(b)
            zero = np.copysign(f4(0), a) * np.copysign(f4(1), b)
            result = np.where(large, np.where(np.isinf(a), NAN, zero), result)
        return nan(result)

    return flushing(function, a, b, flush=flush)


def rcp_double(x: ndarray) -> ndarray:
    """1 / x of the upper halves of float64: 20 bits of mantissa; subnormals are zeros.

    No bound is published: perturbed by one unit of those 20 bits.
    """
    upper = (x.view(u8) & u8(0xFFFFFFFF00000000)).view(f8)
    upper = np.where(np.abs(upper) < 2.0**-1022, np.copysign(0.0, x), upper)
    result = 1.0 / upper
    moved = (result.view(i8) >> i8(32)) + np.asarray(units(upper.astype(f4), 1), i8)
    ordinary = np.isfinite(result) & (np.abs(result) >= 2.0**-1022)
    result = np.where(ordinary, (moved << i8(32)).view(f8), result)
    result = np.where(np.abs(result) < 2.0**-1022, np.copysign(0.0, result), result)
    return np.where(np.isnan(x), np.nan, result)


# --- the larger, the smaller


def maximum(a: ndarray, b: ndarray) -> ndarray:
    """Larger of two; a number, if one is NaN; +0 is larger than -0."""
    return nan(_signed_zero(np.fmax(a, b), a, b, np.bitwise_and))


def minimum(a: ndarray, b: ndarray) -> ndarray:
    """Smaller of two; a number, if one is NaN; -0 is smaller than +0."""
    return nan(_signed_zero(np.fmin(a, b), a, b, np.bitwise_or))


def maximum_nan(a: ndarray, b: ndarray) -> ndarray:
    """Larger of two; NaN, if one is."""
    return nan(_signed_zero(np.maximum(a, b), a, b, np.bitwise_and))


def minimum_nan(a: ndarray, b: ndarray) -> ndarray:
    """Smaller of two; NaN, if one is."""
    return nan(_signed_zero(np.minimum(a, b), a, b, np.bitwise_or))


def _signed_zero(result: ndarray, a: ndarray, b: ndarray, signs: np.ufunc) -> ndarray:
    if not (result == 0).any():
        return result
    integers = i4 if result.dtype == f4 else i8
    zero = signs(a.view(integers), b.view(integers)).view(result.dtype)
    return np.where((a == 0) & (b == 0), zero, result)
