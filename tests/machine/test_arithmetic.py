"""Floating-point results of instructions, against rationals rounded by the definition."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from . import arithmetic as A
from .exact import rounded, same

f4, f8 = np.float32, np.float64
BITS = {f4: np.uint32, f8: np.uint64}
KINDS = {f4: "f4", f8: "f8"}
SPECIALS = [0.0, -0.0, 1.0, -1.0, 2.5, math.inf, -math.inf, math.nan]


def numbers(kind, n, seed=0):
    """Every exponent is equally likely; some are infinite or NaN."""
    random = np.random.default_rng(seed)
    return random.integers(0, np.iinfo(BITS[kind]).max, n, BITS[kind], endpoint=True).view(kind)


def scalar_fma(a, b, c, kind, down=False):
    """One a b + c by the definition of IEEE 754."""
    a, b, c = float(a), float(b), float(c)
    if not all(map(math.isfinite, (a, b, c))):
        with np.errstate(invalid="ignore"):
            finite = math.isfinite(a) and math.isfinite(b)
            return float(c if finite else f8(a) * f8(b) + f8(c))
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if exact:
        return rounded(exact, kind, down)
    negative_product = math.copysign(1, a) != math.copysign(1, b)
    if negative_product == (math.copysign(1, c) < 0):
        return -0.0 if negative_product else 0.0
    return -0.0 if down else 0.0


def check_fma(function, a, b, c, down=False):
    kind = a.dtype.type
    with np.errstate(all="ignore"):
        found = function(a, b, c)
    expected = [scalar_fma(*x, KINDS[kind], down) for x in zip(a, b, c)]
    assert found.dtype == kind
    wrong = [
        (float(x), float(y), float(z), float(f), e)
        for x, y, z, f, e in zip(a, b, c, found, expected)
        if not same(f, f8(e).astype(kind))
    ]
    assert not wrong


FUSED = [
    pytest.param(A.fma, f4, False, id="f32"),
    pytest.param(A.fma_down, f4, True, id="f32 down"),
    pytest.param(A.fma_double, f8, False, id="f64"),
]


@pytest.mark.parametrize(("function", "kind", "down"), FUSED)
def test_fma_of_any_numbers(function, kind, down):
    check_fma(function, *(numbers(kind, 2000, seed) for seed in range(3)), down)


@pytest.mark.parametrize(("function", "kind", "down"), FUSED)
def test_fma_of_special_numbers(function, kind, down):
    triples = np.array(list(itertools.product(SPECIALS, repeat=3)), kind)
    check_fma(function, *triples.T.copy(), down)


@pytest.mark.parametrize(("function", "kind", "down"), FUSED)
def test_fma_is_rounded_once(function, kind, down):
    """Products that are half a unit of the sum, or a square of a unit more or less than that."""
    unit = np.finfo(kind).eps
    root = 2.0 ** -((np.finfo(kind).nmant + 1) // 2)
    other = unit / 2 / root
    cases = []
    for sign, c, k, j in itertools.product(
        (1, -1), (1, 1 + unit, 1.5, 1.5 + unit), (-1, 0, 1), (-1, 0, 1)
    ):
        cases.append((sign * root * (1 + k * unit), other * (1 + j * unit), c))
    scales = [1.0, 2.0**-60, 2.0**60]
    triples = np.array([(a, b * s, c * s) for (a, b, c) in cases for s in scales], kind)
    check_fma(function, *triples.T.copy(), down)


@pytest.mark.parametrize(("function", "kind", "down"), FUSED)
def test_fma_cancels(function, kind, down):
    """The sum is the rounding error of the product, or of its neighbours."""
    a, b = (1 + np.random.default_rng(seed).random(300).astype(kind) for seed in (1, 2))
    product = a * b
    for c in (product, np.nextafter(product, kind(0)), np.nextafter(product, kind(9))):
        check_fma(function, a, b, -c, down)


@pytest.mark.parametrize(("function", "kind", "down"), FUSED)
def test_fma_beside_the_ends_of_the_range(function, kind, down):
    info = np.finfo(kind)
    factors = [1, -1, 1 + info.eps, 0.5, 1.5, 2, -2]
    small = [info.smallest_subnormal * k for k in (0, 1, -1, 2, 3)] + [info.tiny, -info.tiny]
    large = [0, info.max, -info.max, info.max * info.eps / 4, -info.max * info.eps / 4]
    for ends in (small, large):
        triples = np.array(list(itertools.product(ends, factors, ends)), kind)
        check_fma(function, *triples.T.copy(), down)


@pytest.mark.parametrize(("function", "kind", "down"), FUSED)
def test_fma_to_subnormal_numbers_is_rounded_once(function, kind, down):
    """Products of half the smallest number, or a square of a unit less."""
    info = np.finfo(kind)
    root = 2.0 ** (round(math.log2(info.smallest_subnormal)) // 2)
    other = float(info.smallest_subnormal) / root / 2
    sums = [sign * k * info.smallest_subnormal for sign in (1, -1) for k in (1, 200, 201, 5000)]
    factors = [(1, 1), (1 + info.eps, 1 - info.eps), (1 - info.eps, -1 - info.eps)]
    triples = np.array([(root * x, other * y, c) for c in sums for x, y in factors], kind)
    check_fma(function, *triples.T.copy(), down)


def test_fma_of_constants_and_arrays():
    x = np.array([1, 2], f4)
    assert A.fma(x, f4(3), f4(1)).tolist() == [4, 7]
    assert A.fma_down(x, f4(3), f4(1)).tolist() == [4, 7]
    assert A.fma_double(x.astype(f8), f8(3), f8(1)).tolist() == [4, 7]


def test_subnormal_numbers_are_flushed():
    info = np.finfo(f4)
    below = np.nextafter(info.tiny, f4(0))
    x = np.array([info.smallest_subnormal, below, info.tiny, 0, 1, np.inf, np.nan], f4)
    flushed = np.array([0, 0, info.tiny, 0, 1, np.inf, np.nan], f4)
    assert same(A.ftz(x), flushed)
    assert same(A.ftz(-x), -flushed)


def test_every_nan_becomes_one():
    x = np.array([0x7F800001, 0xFFC00000, 0x7FFFFFFF, 0x7F800000, 0x3F800000], np.uint32)
    found = A.nan(x.view(f4)).view(np.uint32).tolist()
    assert found == [0x7FFFFFFF] * 3 + [0x7F800000, 0x3F800000]


def largest(a, b, nan):
    """The larger of two; a NaN is the result, or is ignored."""
    if math.isnan(a) or math.isnan(b):
        return math.nan if nan else b if math.isnan(a) else a
    if a == b == 0:
        return 0.0 if math.copysign(1, a) > 0 or math.copysign(1, b) > 0 else -0.0
    return max(a, b)


@pytest.mark.parametrize("kind", [f4, f8])
@pytest.mark.parametrize("nan", [False, True])
def test_extremes(kind, nan):
    pairs = list(itertools.product([*SPECIALS, float(np.finfo(kind).tiny) / 2], repeat=2))
    a, b = np.array(pairs, kind).T.copy()
    suffix = "_nan" if nan else ""
    expected = [largest(x, y, nan) for x, y in pairs]
    assert same(getattr(A, f"maximum{suffix}")(a, b), np.array(expected, kind))
    expected = [-largest(-x, -y, nan) for x, y in pairs]
    assert same(getattr(A, f"minimum{suffix}")(a, b), np.array(expected, kind))


@pytest.mark.parametrize("name", ["maximum", "minimum", "maximum_nan", "minimum_nan"])
def test_an_extreme_that_is_nan_is_the_one_of_instructions(name):
    nan = np.array([0xFFC00001], np.uint32).view(f4)
    assert getattr(A, name)(nan, nan).view(np.uint32) == 0x7FFFFFFF
