"""Approximate instructions: rounded once, or as far from that as the PTX ISA allows."""

import math

import numpy as np
import pytest

from . import arithmetic as A

f4 = np.float32
LARGEST = np.finfo(f4).max
TINY = np.finfo(f4).tiny
ULP_BOUNDS = {"ex2": 2, "rcp": 1, "divide": 2}


def operands(name, n=3000):
    """Numbers whose results are neither infinite nor subnormal, and the results in float80."""
    random = np.random.default_rng(5)
    if name == "ex2":
        x = random.uniform(-125, 127, n).astype(f4)
        return (x,), np.exp2(x.astype(np.longdouble))
    magnitudes = [np.exp2(random.uniform(-60, 60, n)) * random.choice([-1, 1], n) for _ in range(2)]
    a, b = (x.astype(f4) for x in magnitudes)
    if name == "rcp":
        return (a,), 1 / a.astype(np.longdouble)
    return (a, b), a.astype(np.longdouble) / b


def moved(x, steps):
    """The float so many floats above."""
    for _ in range(abs(steps)):
        x = np.nextafter(x, f4(math.copysign(math.inf, steps)))
    return x


@pytest.mark.parametrize("name", ULP_BOUNDS)
@pytest.mark.parametrize("flush", [False, True])
def test_within_units_in_the_last_place(name, flush):
    arguments, exact = operands(name)
    nearest, bound = exact.astype(f4), ULP_BOUNDS[name]
    function = getattr(A, name)
    assert np.array_equal(function(*arguments, flush), nearest)
    with A.approximation("up"):
        assert np.array_equal(function(*arguments, flush), moved(nearest, bound))
    with A.approximation("down"):
        assert np.array_equal(function(*arguments, flush), moved(nearest, -bound))
    with A.approximation("hash"):
        found = function(*arguments, flush)
    shares = [(found == moved(nearest, k)).mean() for k in range(-bound, bound + 1)]
    assert sum(shares) == 1
    assert min(shares) > 0.5 / len(shares)


LOGARITHMS = np.concatenate(
    [
        np.random.default_rng(6).uniform(0.5, 2, 2000),
        1 + np.random.default_rng(7).uniform(-1, 1, 500) * 2.0**-18,
        np.exp2(np.random.default_rng(8).uniform(-126, 127, 2000)),
        [0.5, 2, np.nextafter(f4(0.5), f4(1)), np.nextafter(f4(2), f4(1))],
    ]
).astype(f4)
LOGARITHMS = LOGARITHMS[LOGARITHMS != 1]


def test_a_logarithm_is_rounded_once():
    exact = np.log2(LOGARITHMS.astype(np.longdouble))
    assert np.array_equal(A.lg2(LOGARITHMS), exact.astype(f4))


@pytest.mark.parametrize(("mode", "sign"), [("up", 1), ("down", -1)])
def test_a_logarithm_reaches_its_bound(mode, sign):
    """No float is nearer to the bound without being beyond it."""
    exact = np.log2(LOGARITHMS.astype(np.longdouble))
    near = (LOGARITHMS > 0.5) & (LOGARITHMS < 2)
    bound = np.where(near, 1, abs(exact)) * 2.0**-22
    with A.approximation(mode):
        found = A.lg2(LOGARITHMS)
    slack = 2.0**-50 * np.maximum(1, abs(exact))  # float64 rounds, too
    assert ((found - exact) * sign <= bound + slack).all()
    assert ((moved(found, sign) - exact) * sign >= bound - slack).all()


def test_hashed_logarithms_are_within_their_bound():
    exact = np.log2(LOGARITHMS.astype(np.longdouble))
    near = (LOGARITHMS > 0.5) & (LOGARITHMS < 2)
    with A.approximation("hash"):
        error = (A.lg2(LOGARITHMS) - exact) / np.where(near, 1, abs(exact)) * 2.0**22
    assert abs(error).max() <= 1 + 1e-9
    assert np.histogram(error.astype(float), 8, (-1, 1))[0].min() > len(LOGARITHMS) / 16


SPECIAL = [
    ("ex2", 0.0, 1.0), ("ex2", -0.0, 1.0), ("ex2", math.inf, math.inf), ("ex2", -math.inf, 0.0),
    ("ex2", 200.0, math.inf), ("ex2", -200.0, 0.0),
    ("lg2", 0.0, -math.inf), ("lg2", -0.0, -math.inf), ("lg2", math.inf, math.inf),
    ("lg2", -1.0, math.nan),
    ("rcp", 0.0, math.inf), ("rcp", -0.0, -math.inf), ("rcp", math.inf, 0.0),
    ("rcp", -math.inf, -0.0),
]  # fmt: skip


@pytest.mark.parametrize("mode", ["exact", "up", "down", "hash"])
@pytest.mark.parametrize("flush", [False, True])
def test_special_numbers_have_exact_results(mode, flush):
    cases = [*SPECIAL, *((name, math.nan, math.nan) for name in ("ex2", "lg2", "rcp"))]
    with np.errstate(all="ignore"), A.approximation(mode):
        found = [getattr(A, name)(np.array([x], f4), flush)[0] for name, x, _ in cases]
    expected = np.array([result for *_, result in cases], f4)
    assert np.array_equal(found, expected, equal_nan=True)
    numbers = ~np.isnan(expected)
    assert np.array_equal(np.signbit(found)[numbers], np.signbit(expected)[numbers])


@pytest.mark.parametrize("mode", ["exact", "up", "down", "hash"])
@pytest.mark.parametrize("scaled", [False, True])
def test_special_quotients(mode, scaled):
    def quotient(a, b):
        with np.errstate(all="ignore"), A.approximation(mode):
            return float(A.divide(np.array([a], f4), np.array([b], f4), False, scaled)[0])

    assert quotient(1, 0) == math.inf
    assert quotient(-1, 0) == -math.inf
    assert quotient(1, math.inf) == 0
    assert math.isnan(quotient(0, 0))
    assert math.isnan(quotient(math.inf, math.inf))
    assert math.isnan(quotient(math.nan, 1))


def test_large_divisors_lose_the_quotient():
    """div.approx: 1 / b would be subnormal, so the result is 0, or NaN where a is infinite."""
    just = f4(2.0**126)
    above = np.nextafter(just, f4(math.inf))
    a = np.array([2.0**120, -(2.0**120), 2.0**120, -(2.0**120), math.inf, 2.0**120], f4)
    b = np.array([above, above, -above, -above, above, just], f4)
    found = A.divide(a, b, False, False)
    assert found[:4].tolist() == [0, 0, 0, 0]
    assert np.signbit(found[:4]).tolist() == [False, True, True, False]
    assert math.isnan(found[4])
    assert found[5] == 2.0**-6
    whole = A.divide(a, b, False, True)
    assert np.array_equal(whole[:4], (a[:4].astype(np.longdouble) / b[:4]).astype(f4))


def test_nothing_becomes_infinite_by_its_error():
    with A.approximation("up"):
        assert A.divide(np.full(1, LARGEST), np.ones(1, f4)) == LARGEST
    with A.approximation("down"):
        assert A.divide(np.full(1, -LARGEST), np.ones(1, f4)) == -LARGEST


def test_subnormal_operands_and_results_are_flushed():
    below = np.array([np.nextafter(TINY, f4(0)), -np.nextafter(TINY, f4(0))], f4)
    with np.errstate(all="ignore"):
        assert np.isfinite(A.lg2(below[:1], False)).all()
        assert A.lg2(below[:1], True) == -math.inf
        assert A.rcp(below, True).tolist() == [math.inf, -math.inf]
        assert np.isfinite(A.rcp(below, False)).all()
        assert A.rcp(np.array([LARGEST, -LARGEST]), True).tolist() == [0, 0]
        assert (A.rcp(np.array([LARGEST, -LARGEST]), False) != 0).all()
        assert A.ex2(np.full(1, -130, f4), True) == 0
        assert A.ex2(np.full(1, -130, f4), False) == 2.0**-130
        assert A.divide(np.full(2, TINY), np.array([2, -2], f4), True).tolist() == [0, 0]
        assert A.divide(np.full(1, TINY), np.full(1, 2, f4), False) == TINY / 2


@pytest.mark.parametrize(("mode", "units"), [("exact", 0), ("up", 1), ("down", -1)])
def test_the_reciprocal_of_a_double_has_20_bits(mode, units):
    random = np.random.default_rng(9)
    x = np.exp2(random.uniform(-900, 900, 1000)) * random.choice([-1, 1], 1000)
    with A.approximation(mode):
        found = A.rcp_double(x)
    assert (found.view(np.uint64) & np.uint64(0xFFFFFFFF) == 0).all()
    upper = (x.view(np.uint64) & np.uint64(0xFFFFFFFF00000000)).view(float)
    exact = abs(1 / upper)
    unit = np.exp2(np.floor(np.log2(exact)) - 20)
    error = (abs(found) - exact) / unit
    assert (error > units - 1.01).all()  # cut off after 20 bits
    assert (error <= units + 0.01).all()
    assert np.array_equal(np.signbit(found), np.signbit(x))


def test_reciprocals_of_special_doubles():
    x = [0.0, -0.0, math.inf, -math.inf, math.nan, 2.0**-1030, -(2.0**-1030), 2.0**1023.5]
    expected = [math.inf, -math.inf, 0.0, -0.0, math.nan, math.inf, -math.inf, 0.0]
    for mode in ("exact", "up", "down", "hash"):
        with np.errstate(all="ignore"), A.approximation(mode):
            found = A.rcp_double(np.array(x))
        assert np.array_equal(found, expected, equal_nan=True)
        assert np.array_equal(np.signbit(found[:4]), np.signbit(expected[:4]))


def test_modes_end_with_their_context():
    one = np.ones(1, f4)
    with A.approximation("up"):
        with pytest.raises(RuntimeError), A.approximation("down"):
            raise RuntimeError
        assert A.ex2(one) > 2
    assert A.ex2(one) == 2
    with pytest.raises(ValueError, match="mode must be exact, up, down or hash, got 'any'"):
        A.approximation("any").__enter__()
