"""Instructions on integers, as hand-made PTX, against Python's integers."""

import math
import operator
from fractions import Fraction

import numpy as np
import pytest

from .hand_made import evaluate

TYPES = {
    "u16": np.uint16, "s16": np.int16, "u32": np.uint32, "s32": np.int32, "u64": np.uint64,
    "s64": np.int64, "b16": np.uint16, "b32": np.uint32, "b64": np.uint64,
}  # fmt: skip
INTEGERS = ["u16", "s16", "u32", "s32", "u64", "s64"]
STEM = {2: "h", 4: "r", 8: "d"}


def values(name):
    info = np.iinfo(TYPES[name])
    found = {info.min, info.max, info.max - 1, info.max // 3, 0, 1, 2, 5}
    return np.array(sorted(found | ({-1, -5} if info.min else set())), TYPES[name])


def grid(*names):
    """Every combination of edges, as one array per operand."""
    meshes = np.meshgrid(*map(values, names), indexing="ij")
    return [mesh.ravel() for mesh in meshes]


def wrapped(results, kind):
    bits = 8 * np.dtype(kind).itemsize
    return np.array([int(x) & (2**bits - 1) for x in results], f"u{bits // 8}")


def register(k, name):
    return f"%{STEM[np.dtype(TYPES[name]).itemsize]}{k}"


def statement(op, result, *names):
    """An instruction from operands 10, 11, ... to result 9."""
    operands = ", ".join(register(10 + k, name) for k, name in enumerate(names))
    return f"{op} {register(9, result)}, {operands};"


def check_integers(op, reference, result, *names):
    operands = grid(*names)
    expected = wrapped((reference(*map(int, x)) for x in zip(*operands)), TYPES[result])
    size = np.dtype(TYPES[result]).itemsize
    assert np.array_equal(evaluate(statement(op, result, *names), *operands, size=size), expected)


BITWISE = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}
BINARY = {
    "add": operator.add, "sub": operator.sub, "mul.lo": operator.mul, "min": min, "max": max,
}  # fmt: skip


@pytest.mark.parametrize("op", BINARY)
@pytest.mark.parametrize("name", INTEGERS)
def test_integers_wrap(op, name):
    check_integers(f"{op}.{name}", BINARY[op], name, name, name)


@pytest.mark.parametrize("name", ["u16", "s16", "u32", "s32"])
def test_wide_and_high_products(name):
    wide = f"{name[0]}{2 * int(name[1:])}"
    check_integers(f"mul.wide.{name}", operator.mul, wide, name, name)
    check_integers(f"mul.hi.{name}", lambda a, b: a * b >> int(name[1:]), name, name, name)
    check_integers(f"mad.wide.{name}", lambda a, b, c: a * b + c, wide, name, name, wide)


@pytest.mark.parametrize("name", ["u16", "s32", "u64"])
def test_sums_of_products(name):
    check_integers(f"mad.lo.{name}", lambda a, b, c: a * b + c, name, name, name, name)


@pytest.mark.parametrize("name", INTEGERS)
def test_quotients_and_remainders(name):
    a, b = grid(name, name)
    a, b = a[b != 0], b[b != 0]
    size = a.itemsize
    quotients = [math.trunc(Fraction(int(x), int(y))) for x, y in zip(a, b)]
    remainders = [int(x) - int(y) * q for x, y, q in zip(a, b, quotients)]
    for op, expected in (("div", quotients), ("rem", remainders)):
        found = evaluate(statement(f"{op}.{name}", name, name, name), a, b, size=size)
        assert np.array_equal(found, wrapped(expected, a.dtype))


@pytest.mark.parametrize("name", ["b16", "b32", "b64"])
def test_bits(name):
    for op, reference in BITWISE.items():
        check_integers(f"{op}.{name}", reference, name, name, name)
    check_integers(f"not.{name}", operator.invert, name, name)


@pytest.mark.parametrize("name", ["s16", "s32", "s64"])
def test_signs(name):
    check_integers(f"neg.{name}", operator.neg, name, name)
    check_integers(f"abs.{name}", abs, name, name)


AMOUNTS = np.array([0, 1, 15, 16, 31, 32, 33, 63, 64, 255, 2**31, 2**32 - 1], np.uint32)


@pytest.mark.parametrize("bits", [16, 32, 64])
@pytest.mark.parametrize("op", ["shl.b", "shr.u", "shr.s"])
@pytest.mark.parametrize("immediate", [False, True])
def test_shifts_past_the_width(bits, op, immediate):
    name = {"b": "u", "u": "u", "s": "s"}[op[-1]] + str(bits)
    a, by = (x.ravel() for x in np.meshgrid(values(name), AMOUNTS))
    shift = operator.lshift if op == "shl.b" else operator.rshift
    expected = [shift(int(x), min(int(n), bits)) for x, n in zip(a, by)]
    x, result = register(10, name), register(9, name)
    if immediate:
        found = np.concatenate(
            [
                evaluate(f"{op}{bits} {result}, {x}, {n};", a[by == n], size=a.itemsize)
                for n in AMOUNTS
            ]
        )
        expected = [e for n in AMOUNTS for e, m in zip(expected, by) if m == n]
    else:
        found = evaluate(f"{op}{bits} {result}, {x}, %r11;", a, by, size=a.itemsize)
    assert np.array_equal(found, wrapped(expected, a.dtype))


def test_operations_on_bits_and_bytes():
    words = np.array([0, 1, 0x80000000, 0xFFFFFFFF, 0x12345678, 0x89ABCDEF], np.uint32)
    other, by = words[::-1].copy(), np.array([0, 1, 8, 31, 32, 37], np.uint32)
    table = [(int(x), int(y), int(n)) for x, y, n in zip(words, other, by)]
    left = [((y << 32 | x) << n % 32 >> 32) & 0xFFFFFFFF for x, y, n in table]
    right = [(y << 32 | x) >> n % 32 & 0xFFFFFFFF for x, y, n in table]
    assert evaluate("shf.l.wrap.b32 %r9, %r10, %r11, %r12;", words, other, by).tolist() == left
    assert evaluate("shf.r.wrap.b32 %r9, %r10, %r11, %r12;", words, other, by).tolist() == right
    bytes_of = [(x.to_bytes(4, "little"), y.to_bytes(4, "little")) for x, y, _ in table]
    swapped = [int.from_bytes([y[3], x[0], y[0], x[1]], "little") for x, y in bytes_of]
    assert evaluate("prmt.b32 %r9, %r10, %r11, 0x1407;", words, other).tolist() == swapped
    fields = [x >> 5 & 0x7F for x, _, _ in table]
    assert evaluate("bfe.u32 %r9, %r10, 5, 7;", words).tolist() == fields
    signed = wrapped([f - 128 if f >= 64 else f for f in fields], np.int32)
    assert np.array_equal(evaluate("bfe.s32 %r9, %r10, 5, 7;", words), signed)
