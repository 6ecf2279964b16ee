"""Instructions on floats and conversions, as hand-made PTX, against rounded rationals."""

import itertools
import math
import operator
from fractions import Fraction

import numpy as np
import pytest

from .arithmetic import approximation
from .exact import rounded, same
from .hand_made import evaluate

f4, f8 = np.float32, np.float64
TINY = float(np.finfo(f4).tiny)
FLOATS = [
    0.0, -0.0, 1.0, -1.0, 1.5, 1 / 3, -7e20, 3e38, TINY / 4, -TINY, 1 + 2.0**-23, math.inf,
    -math.inf, math.nan,
]  # fmt: skip
PAIRS = np.array(list(itertools.product(FLOATS, repeat=2)))
OPERATIONS = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv,
}  # fmt: skip


def flushed(x):
    return math.copysign(0.0, x) if abs(x) < TINY else x


def correct(op, a, b, kind):
    """One operation, rounded once; numpy's where IEEE 754 names the result."""
    with np.errstate(all="ignore"):
        named = float(OPERATIONS[op](f8(a), f8(b)))
    if not math.isfinite(a) or not math.isfinite(b) or (op == "div" and b == 0):
        return named
    exact = OPERATIONS[op](Fraction(a), Fraction(b))
    return rounded(exact, kind) if exact else named


@pytest.mark.parametrize("op", ["add.f32", "add.rn.f32", "sub.f32", "mul.rn.f32", "div.rn.f32"])
@pytest.mark.parametrize("flush", [False, True])
def test_operations_are_rounded_once(op, flush):
    a, b = PAIRS.T.astype(f4)
    family = op.split(".")[0]
    pairs = [(float(x), float(y)) for x, y in zip(a, b)]
    if flush:
        op = op.replace(".f32", ".ftz.f32")
        pairs = [(flushed(x), flushed(y)) for x, y in pairs]
    expected = [correct(family, *pair, "f4") for pair in pairs]
    expected = np.array([flushed(x) for x in expected] if flush else expected, f4)
    found = evaluate(f"{op} %r9, %r10, %r11;", a, b)
    assert same(found.view(f4), expected)
    assert set(found[np.isnan(expected)].tolist()) == {0x7FFFFFFF}


@pytest.mark.parametrize("op", ["add", "sub", "mul", "div.rn"])
def test_operations_of_doubles(op):
    a, b = PAIRS.T.copy()
    expected = [correct(op.split(".")[0], *map(float, pair), "f8") for pair in PAIRS]
    found = evaluate(f"{op}.f64 %d9, %d10, %d11;", a, b, size=8)
    assert same(found.view(f8), np.array(expected))


def test_a_subnormal_constant_is_flushed():
    x = np.array([0, 1, TINY], f4)
    found = evaluate("mul.ftz.f32 %r9, %r10, 0f00400000;", np.array([2.0**20], f4))
    assert found.view(f4) == 0
    found = evaluate("add.ftz.f32 %r9, %r10, 0f00400000;", x).view(f4)
    assert found.tolist() == x.tolist()


def test_saturation_is_to_between_0_and_1():
    x = np.array([-math.inf, -1, 0, 0.25, 0.75, 1, 2, math.inf, math.nan], f4)
    expected = [0, 0, 0, 0.5, 1, 1, 1, 1, 0]
    assert evaluate("add.sat.f32 %r9, %r10, %r10;", x).view(f4).tolist() == expected
    expected = [0, 0, 0, 0.25, 0.75, 1, 1, 1, 0]
    assert evaluate("cvt.sat.f32.f32 %r9, %r10;", x).view(f4).tolist() == expected


def test_fused_products_and_sums():
    a = np.array([1 + 2.0**-12, 3, TINY / 4], f4)
    b = np.array([1 + 2.0**-12, 5, 1], f4)
    c = np.array([-1 - 2.0**-11, 7, 0], f4)
    assert evaluate("fma.rn.f32 %r9, %r10, %r11, %r12;", a, b, c).view(f4).tolist() == [
        2.0**-24, 22, TINY / 4,
    ]  # fmt: skip
    found = evaluate("fma.rn.ftz.f32 %r9, %r10, %r11, %r12;", a, b, c).view(f4)
    assert found.tolist() == [2.0**-24, 22, 0]
    third = np.array([1 / 3], f4)
    down = evaluate("fma.rm.f32 %r9, %r10, %r10, 0f3F800000;", third).view(f4)
    assert down == f4(rounded(Fraction(float(third[0])) ** 2 + 1, "f4", down=True))
    doubles = evaluate(
        "fma.rn.f64 %d9, %d10, %d10, 0dBFF0000000000000;", np.array([1 + 2.0**-30]), size=8
    )
    assert doubles.view(f8) == 2.0**-29 + 2.0**-60


@pytest.mark.parametrize("op", ["max", "min"])
@pytest.mark.parametrize("modifier", ["", ".ftz", ".NaN"])
def test_extremes(op, modifier):
    a, b = PAIRS.T.astype(f4)
    found = evaluate(f"{op}{modifier}.f32 %r9, %r10, %r11;", a, b).view(f4)
    if modifier == ".ftz":
        a, b = (np.array([flushed(v) for v in x.tolist()], f4) for x in (a, b))
    choose = {"max": np.maximum, "min": np.minimum}[op]
    nan = np.isnan(a) | np.isnan(b)
    expected = choose(a, b)
    if modifier != ".NaN":
        expected = np.where(np.isnan(a), b, np.where(np.isnan(b), a, expected))
    else:
        assert np.isnan(found[nan]).all()
    zero = (a == 0) & (b == 0)  # whose sign `test_arithmetic` looks at
    assert same(found[~zero], expected[~zero])


def test_the_larger_size_with_the_sign_of_both():
    a, b = np.array([1, -3, 2, -2], f4), np.array([-2, -1, 5, 4], f4)
    found = evaluate("max.xorsign.abs.f32 %r9, %r10, %r11;", a, b)
    assert found.view(f4).tolist() == [-2, 3, 5, -4]


@pytest.mark.parametrize("bits", [32, 64])
def test_signs(bits):
    kind, register = {32: (f4, "%r"), 64: (f8, "%d")}[bits]
    x = np.array(FLOATS, kind)
    for op, expected in {"neg": -x, "abs": abs(x)}.items():
        found = evaluate(f"{op}.f{bits} {register}9, {register}10;", x, size=bits // 8)
        assert same(found.view(kind), expected)
    sizes, signs = PAIRS.T.astype(kind)
    body = f"copysign.f{bits} {register}9, {register}11, {register}10;"
    found = evaluate(body, sizes, signs, size=bits // 8)
    assert same(found.view(kind), np.copysign(sizes, signs))


def test_approximations_are_those_of_the_mode():
    x = np.array([0.5, 1, 3, 10], f4)
    exact = {
        "ex2.approx.f32 %r9, %r10": np.exp2(x), "lg2.approx.ftz.f32 %r9, %r10": np.log2(x),
        "rcp.approx.ftz.f32 %r9, %r10": 1 / x, "div.full.f32 %r9, %r10, 0f40400000": x / f4(3),
        "div.approx.f32 %r9, %r10, 0f40400000": x / f4(3),
    }  # fmt: skip
    for body, expected in exact.items():
        assert same(evaluate(f"{body};", x).view(f4), expected.astype(f4))
        with approximation("up"):
            assert (evaluate(f"{body};", x).view(f4) > expected).all()
    assert same(evaluate("rcp.rn.f32 %r9, %r10;", x).view(f4), 1 / x)
    doubles = evaluate("rcp.approx.ftz.f64 %d9, %d10;", np.array([4.0, -0.5]), size=8)
    assert doubles.view(f8).tolist() == [0.25, -2]


# --- conversions

ROUNDED = {"rni": round, "rmi": math.floor, "rpi": math.ceil, "rzi": math.trunc}


@pytest.mark.parametrize("rounding", ROUNDED)
def test_floats_to_integers(rounding):
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 0.49, -7.51, 1e9, -0.0], f4)
    expected = [ROUNDED[rounding](float(v)) for v in x]
    found = evaluate(f"cvt.{rounding}.s32.f32 %r9, %r10;", x)
    assert found.view(np.int32).tolist() == expected
    found = evaluate(f"cvt.{rounding}.f32.f32 %r9, %r10;", x).view(f4)
    assert same(found, np.array([math.copysign(e, v) for e, v in zip(expected, x)], f4))
    found = evaluate(f"cvt.{rounding}.s64.f64 %d9, %d10;", x.astype(f8), size=8)
    assert found.view(np.int64).tolist() == expected
    narrow = evaluate(f"cvt.{rounding}.u16.f32 %h9, %r10;", x, size=2)
    assert narrow.tolist() == [min(max(e, 0), 65535) for e in expected]


@pytest.mark.parametrize("source", ["u16", "s16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("to", ["f32", "f64"])
def test_integers_to_floats(source, to):
    kind = np.dtype(source.replace("s", "i")[0] + str(int(source[1:]) // 8))
    info = np.iinfo(kind)
    near = [2**24 + 1, 2**24 + 3, 2**53 + 1, 2**53 + 3, 2**40 + 2**16, 2**40 + 2**16 + 1]
    numbers = [info.min, info.max, info.max - 1, 0, 1, 5, *(x for x in near if x <= info.max)]
    stem, result = {2: "h", 4: "r", 8: "d"}[kind.itemsize], {"f32": "r", "f64": "d"}[to]
    body = f"cvt.rn.{to}.{source} %{result}9, %{stem}10;"
    found = evaluate(body, np.array(numbers, kind), size=int(to[1:]) // 8)
    expected = [rounded(Fraction(x), f"f{int(to[1:]) // 8}") for x in numbers]
    assert found.view(to.replace("32", "4").replace("64", "8")).tolist() == expected


def test_integers_to_integers():
    x = np.array([0, 1, 0x7F, 0x80, 0xFF, 0x8000, 0xFFFF, 0x80000000, 0xFFFFFF7F], np.uint32)
    for name in ("u8", "s8", "u16", "s16", "u32", "s32"):
        kind = np.dtype(name.replace("s", "i")[0] + str(int(name[1:]) // 8))
        low = x.astype(f"u{kind.itemsize}").view(kind)
        for to in ("u32", "s32"):
            found = evaluate(f"cvt.{to}.{name} %r9, %r10;", x)
            assert np.array_equal(found, low.astype(np.int64).astype(np.uint32))
        found = evaluate(f"cvt.s64.{name} %d9, %r10;", x, size=8)
        assert np.array_equal(found, low.astype(np.int64).astype(np.uint64))
    wide = np.array([2**63 + 7, 2**32 - 1, 2**16], np.uint64)
    assert evaluate("cvt.u32.u64 %r9, %d10;", wide).tolist() == [7, 2**32 - 1, 2**16]
    assert evaluate("cvt.u16.u64 %h9, %d10;", wide, size=2).tolist() == [7, 65535, 0]


def test_doubles_and_floats():
    x = np.array([1 / 3, 1e300, -1e300, 2.0**-149 * 1.5, 1 + 2.0**-24, TINY / 8, math.inf])
    expected = np.array([rounded(Fraction(v), "f4") for v in x[:-1]] + [math.inf], f4)
    assert same(evaluate("cvt.rn.f32.f64 %r9, %d10;", x).view(f4), expected)
    flush = np.array([flushed(float(v)) for v in expected], f4)
    assert same(evaluate("cvt.rn.ftz.f32.f64 %r9, %d10;", x).view(f4), flush)
    found = evaluate("cvt.f64.f32 %d9, %r10;", expected, size=8).view(f8)
    assert same(found, expected.astype(f8))
    found = evaluate("cvt.ftz.f64.f32 %d9, %r10;", expected, size=8).view(f8)
    assert same(found, flush.astype(f8))


@pytest.mark.parametrize(("half", "kind"), [("bf16", "bf16"), ("f16", "f2")])
def test_halves(half, kind):
    x = np.array([1 / 3, 1 + 2.0**-8, 1 + 2.0**-11, -5e4, 7e4, 1e-7, -0.0], f4)
    expected = np.array([rounded(Fraction(float(v)), kind) if v else v for v in x], f4)
    bits = evaluate(f"cvt.rn.{half}.f32 %h9, %r10;", x, size=2)
    assert same(evaluate(f"cvt.f32.{half} %r9, %h10;", bits).view(f4), expected)
    both = evaluate(f"cvt.rn.{half}x2.f32 %r9, %r10, %r11;", x, x[::-1].copy())
    assert np.array_equal(both >> np.uint32(16), bits)
    assert np.array_equal(both & np.uint32(0xFFFF), bits[::-1])


def test_extremes_of_pairs():
    a, b = np.array([0x3F80C000], np.uint32), np.array([0xBF807FC0], np.uint32)  # 1, -2; -1, NaN
    assert evaluate("max.bf16x2 %r9, %r10, %r11;", a, b) == 0x3F80C000
    assert evaluate("min.bf16x2 %r9, %r10, %r11;", a, b) == 0xBF80C000
    assert evaluate("max.NaN.bf16x2 %r9, %r10, %r11;", a, b) == 0x3F807FFF
