"""Integer and conversion results, against Python's integers and loops over bits."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from . import integers as I
from .exact import rounded, same

f4, f8 = np.float32, np.float64
KINDS = [np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64]
WORDS = [0, 1, 0x80000000, 0xFFFFFFFF, 0x12345678, 0x89ABCDEF, 0x00FF8001]


def edges(kind):
    info = np.iinfo(kind)
    found = {info.min, info.min + 1, info.max, info.max - 1, info.max // 3, 0, 1, 2, 7}
    found |= {-1, -2, -7} if info.min else {info.max // 2 + 1}
    return sorted(found)


def pairs(kind):
    return list(itertools.product(edges(kind), repeat=2))


def wrapped(values, kind):
    """The lowest bits of Python's integers."""
    bits = np.iinfo(kind).bits
    return np.array([x & (2**bits - 1) for x in values], f"u{bits // 8}").view(kind)


def columns(table, *kinds):
    return [np.array(column, kind) for column, kind in zip(zip(*table), kinds)]


@pytest.mark.parametrize("kind", KINDS)
def test_division_truncates(kind):
    divisible = [(x, y) for x, y in pairs(kind) if y]
    a, b = columns(divisible, kind, kind)
    quotients = [math.trunc(Fraction(x, y)) for x, y in divisible]
    with np.errstate(all="ignore"):
        assert np.array_equal(I.quotient(a, b), wrapped(quotients, kind))
        remainders = [x - y * q for (x, y), q in zip(divisible, quotients)]
        assert np.array_equal(I.remainder(a, b), wrapped(remainders, kind))


def test_a_divisor_of_zero_raises_nothing():
    assert len(I.quotient(np.arange(3), np.zeros(3, int))) == 3


@pytest.mark.parametrize("kind", KINDS[:4])
def test_upper_halves_of_products(kind):
    a, b = columns(pairs(kind), kind, kind)
    expected = [x * y >> np.iinfo(kind).bits for x, y in pairs(kind)]
    assert np.array_equal(I.high_product(a, b), wrapped(expected, kind))


def test_permuted_bytes():
    """Each of the four places takes each of the sixteen selections."""
    a, b = 0x83722100, 0xFF0180AA
    pool = [*a.to_bytes(4, "little"), *b.to_bytes(4, "little")]
    selectors = [(k * 0x1111 + j * 0x0123) & 0xFFFF for k in range(16) for j in range(16)]

    def byte(code):
        chosen = pool[code & 7]
        return (0xFF if chosen >> 7 else 0) if code & 8 else chosen

    expected = [
        sum(byte(selector >> 4 * place & 15) << 8 * place for place in range(4))
        for selector in selectors
    ]
    found = I.permuted_bytes(np.uint32(a), np.uint32(b), np.array(selectors, np.uint32))
    assert found.tolist() == expected


@pytest.mark.parametrize("right", [False, True])
def test_funnels(right):
    table = list(itertools.product(WORDS[:6], WORDS[:6], [0, 1, 5, 31, 32, 33, 63, 2**32 - 1]))
    low, high, by = columns(table, *[np.uint32] * 3)
    expected = []
    for x, y, n in table:
        both = y << 32 | x
        n %= 32
        expected.append((both >> n if right else both << n >> 32) & 0xFFFFFFFF)
    assert I.funnel(low, high, by, right).tolist() == expected


@pytest.mark.parametrize("kind", [np.uint32, np.int32])
def test_bit_fields(kind):
    """The manual's loop for bfe, in Python."""
    places = [0, 1, 7, 8, 16, 30, 31, 32, 33, 64, 255, 256, 264]
    table = list(itertools.product(WORDS, places, places))
    words, position, length = columns(table, *[np.uint32] * 3)
    expected = []
    for a, pos, n in table:
        pos, n = pos & 255, n & 255
        signed = kind is np.int32 and n > 0
        sign = a >> min(pos + n - 1, 31) & 1 if signed else 0
        bits = [a >> (pos + i) & 1 if i < n and pos + i <= 31 else sign for i in range(32)]
        expected.append(sum(bit << i for i, bit in enumerate(bits)))
    found = I.field(words.view(kind), position, length)
    assert found.dtype == kind
    assert np.array_equal(found, wrapped(expected, kind))


HALVES = [
    pytest.param(I.to_bf16, I.from_bf16, "bf16", 7, id="bf16"),
    pytest.param(I.to_f16, I.from_f16, "f2", 10, id="f16"),
]


def value_of(bits, mantissa):
    """A 16-bit float from its sign, exponent and mantissa."""
    sign = -1.0 if bits >> 15 else 1.0
    exponent_bits = 15 - mantissa
    exponent = bits >> mantissa & ((1 << exponent_bits) - 1)
    fraction = bits & ((1 << mantissa) - 1)
    bias = (1 << (exponent_bits - 1)) - 1
    if exponent == (1 << exponent_bits) - 1:
        return sign * (math.nan if fraction else math.inf)
    if exponent:
        return sign * (1 + fraction / (1 << mantissa)) * 2.0 ** (exponent - bias)
    return sign * fraction / (1 << mantissa) * 2.0 ** (1 - bias)


@pytest.mark.parametrize(("to", "back", "kind", "mantissa"), HALVES)
def test_all_halves_have_their_values(to, back, kind, mantissa):
    bits = np.arange(1 << 16).astype(np.uint16)
    values = back(bits)
    assert values.dtype == f4
    assert same(values, np.array([value_of(b, mantissa) for b in range(1 << 16)], f4))
    expected = np.where(np.isnan(values), np.uint16(0x7FFF), bits)
    assert np.array_equal(to(values), expected)


@pytest.mark.parametrize(("to", "back", "kind", "mantissa"), HALVES)
def test_halves_are_rounded_to_even(to, back, kind, mantissa):
    """Numbers midway between two halves, those beside them, and any."""
    bits = np.arange(0, 1 << 15, 97).astype(np.uint16)
    values = back(bits)
    ends = np.isfinite(back(bits + np.uint16(1)))
    low, high = values[ends], back(bits + np.uint16(1))[ends]
    middle = ((low.astype(f8) + high) / 2).astype(f4)
    random = np.random.default_rng(1).integers(0, 2**32, 1000, np.uint32).view(f4)
    some = [middle, np.nextafter(middle, f4(0)), np.nextafter(middle, f4(np.inf))]
    largest = np.abs(values[np.isfinite(values)]).max()
    beyond = f4(largest) * np.array([1, 1.001, 1.002, 1.004, 1.01, np.inf], f4)
    x = np.concatenate([*some, beyond, random])
    x = np.concatenate([x, -x])[~np.isnan(np.concatenate([x, -x]))]
    with np.errstate(all="ignore"):
        found = back(to(x))
    expected = [rounded(Fraction(float(v)), kind) if np.isfinite(v) and v else float(v) for v in x]
    assert same(found, np.array(expected, f4))


def test_pairs_of_halves():
    words = np.array(WORDS, np.uint32)
    low, high = I.halves(words)
    assert low.tolist() == [w & 0xFFFF for w in WORDS]
    assert high.tolist() == [w >> 16 for w in WORDS]
    assert np.array_equal(I.joined(low, high), words)


@pytest.mark.parametrize(("name", "choose"), [("maximum_nan", max), ("minimum_nan", min)])
def test_extremes_of_pairs(name, choose):
    values = [0x3F80, 0xC000, 0x7F80, 0x0001, 0x8001, 0x7FC0]
    table = list(itertools.product(values, repeat=2))
    a, b = columns(table, np.uint32, np.uint32)

    def expected(x, y):
        if 0x7FC0 in (x, y):
            return 0x7FFF
        return choose(x, y, key=lambda bits: value_of(bits, 7))

    upper = [(y, x) for x, y in table]  # the other way round, in the upper halves
    found = I.packed_extreme(name, a | b << np.uint32(16), b | a << np.uint32(16))
    assert (found & np.uint32(0xFFFF)).tolist() == [expected(x, y) for x, y in table]
    assert (found >> np.uint32(16)).tolist() == [expected(x, y) for x, y in upper]


@pytest.mark.parametrize("source", [f4, f8])
@pytest.mark.parametrize("kind", [np.int8, np.uint8, *KINDS])
def test_floats_to_integers_saturate(kind, source):
    info = np.iinfo(kind)
    ends = [float(e) + d for e in (info.min, info.max) for d in (-1, 0, 1)]
    values = np.array([*ends, 0.0, -0.0, 3.0, -3.0, 1e30, -1e30, math.inf, -math.inf], source)
    with np.errstate(all="ignore"):
        found = I.from_float(values, kind)
        nan = I.from_float(np.array([math.nan], source), kind)
    assert found.dtype == kind
    expected = [
        (info.max if x > 0 else info.min) if math.isinf(x) else min(max(int(x), info.min), info.max)
        for x in map(float, values)
    ]
    assert found.tolist() == expected
    top = source == f8 or info.bits == 64
    assert np.array_equal(nan, wrapped([1 << (info.bits - 1) if top else 0], kind))
