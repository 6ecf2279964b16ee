"""Comparisons, choices, moves, memory and branches, as hand-made PTX; the rest is refused."""

import itertools
import math
import operator

import numpy as np
import pytest

from .hand_made import aligned, evaluate, kernel, launch

ORDERED = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le,
    "gt": operator.gt, "ge": operator.ge,
}  # fmt: skip
UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
CHOOSE = "selp.b32 %r9, 1, 0, %p1;"


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_integer_comparisons(kind):
    numpy_kind = np.dtype(kind.replace("s", "i")[0] + str(int(kind[1:]) // 8))
    info = np.iinfo(numpy_kind)
    pairs = list(itertools.product([info.min, info.max, 0, 1, info.max // 2], repeat=2))
    a, b = np.array(pairs, numpy_kind).T.copy()
    stem = {2: "h", 4: "r", 8: "d"}[numpy_kind.itemsize]
    names = {name: name for name in ORDERED} | (UNSIGNED if kind[0] == "u" else {})
    for name, means in names.items():
        body = f"setp.{name}.{kind} %p1, %{stem}10, %{stem}11; {CHOOSE}"
        assert evaluate(body, a, b).tolist() == [ORDERED[means](x, y) for x, y in pairs]


@pytest.mark.parametrize("kind", ["f32", "ftz.f32", "f64"])
def test_comparisons_with_nan(kind):
    """`eq` and its like are false for NaN, `equ` and its like are true."""
    numbers = [0.0, -0.0, 1.0, -1.0, 1e-40, math.inf, math.nan]
    pairs = list(itertools.product(numbers, repeat=2))
    numpy_kind, stem = (np.float64, "d") if kind == "f64" else (np.float32, "r")
    a, b = np.array(pairs, numpy_kind).T.copy()
    if kind == "ftz.f32":
        pairs = [tuple(0.0 if abs(x) == 1e-40 else x for x in pair) for pair in pairs]
    unordered = [math.isnan(x) or math.isnan(y) for x, y in pairs]

    def found(name):
        return evaluate(f"setp.{name}.{kind} %p1, %{stem}10, %{stem}11; {CHOOSE}", a, b).tolist()

    for name, compare in ORDERED.items():
        holds = [compare(x, y) for x, y in pairs]
        assert found(name) == [h and not nan for h, nan in zip(holds, unordered)]
        assert found(f"{name}u") == [h or nan for h, nan in zip(holds, unordered)]
    assert found("nan") == unordered
    assert found("num") == [not nan for nan in unordered]


def test_comparisons_joined_with_a_predicate():
    a, b = np.array([0, 0, 1, 1], np.uint32), np.array([0, 1, 0, 1], np.uint32)
    for name, join in (("and", operator.and_), ("or", operator.or_), ("xor", operator.xor)):
        body = (
            f"setp.ne.u32 %p2, %r11, 0; setp.eq.{name}.u32 %p1, %r10, 1, %p2; "
            f"{name}.pred %p3, %p1, %p2; not.pred %p4, %p3; mov.pred %p5, %p4; "
            "selp.b32 %r1, 1, 0, %p1; selp.b32 %r2, 2, 0, %p5; add.u32 %r9, %r1, %r2;"
        )
        first = [join(int(x), int(y)) for x, y in zip(a, b)]
        second = [1 - join(x, int(y)) for x, y in zip(first, b)]
        expected = [x + 2 * y for x, y in zip(first, second)]
        assert evaluate(body, a, b).tolist() == expected


@pytest.mark.parametrize(("size", "stem"), [(2, "h"), (4, "r"), (8, "d")])
def test_choices(size, stem):
    a, b = np.arange(64).astype(f"u{size}"), np.arange(100, 164).astype(f"u{size}")
    body = (
        "setp.lt.u32 %p1, %r0, 20;"
        f"selp.b{8 * size} %{stem}9, %{stem}10, %{stem}11, %p1;"
        f"@!%p1 add.u{8 * size} %{stem}9, %{stem}9, 1;"
    )
    expected = [i if i < 20 else 101 + i for i in range(64)]
    assert evaluate(body, a, b, size=size).tolist() == expected


def test_guarded_instructions_keep_the_old_value():
    x = np.arange(64).astype(np.uint32)
    body = (
        "mov.u32 %r9, 5; and.b32 %r1, %r10, 3; setp.eq.u32 %p1, %r1, 3;"
        "@%p1 mov.u32 %r9, %r10; @!%p1 setp.eq.u32 %p1, %r1, 1; @%p1 add.u32 %r9, %r9, 1000;"
    )
    expected = [{3: 1000 + i, 1: 1005}.get(i % 4, 5) for i in range(64)]
    assert evaluate(body, x).tolist() == expected


def test_constants_alone():
    body = (
        "mov.u32 %r1, 7; add.u32 %r2, 3, 4; shl.b32 %r3, 1, 3; sub.s32 %r4, 5, 9;"
        "selp.b32 %r5, 1, 0, %p1; xor.b32 %r9, %r1, %r2; add.u32 %r9, %r9, %r3;"
        "add.u32 %r9, %r9, %r4; add.u32 %r9, %r9, %r10;"
    )
    x = np.arange(40).astype(np.uint32)
    assert evaluate(body, x).tolist() == [4 + i for i in range(40)]
    for statement, result in (("shl.b32 %r9, 1, 3;", 8), ("shr.u32 %r9, 1, -1;", 0)):
        assert evaluate(statement, x).tolist() == [result] * 40


def test_moves_that_pack_and_unpack():
    x, y = np.array([0x12345678, 0xFFFF0001], np.uint32), np.array([7, 0x80000000], np.uint32)
    joined = evaluate("mov.b64 %d9, {%r10, %r11};", x, y, size=8)
    assert joined.tolist() == [int(b) << 32 | int(a) for a, b in zip(x, y)]
    assert evaluate("mov.b64 {_, %r9}, %d10;", joined).tolist() == y.tolist()
    swapped = evaluate("mov.b32 {%h1, %h2}, %r10; mov.b32 %r9, {%h2, %h1};", x)
    assert swapped.tolist() == [0x56781234, 0x0001FFFF]


# Memory.


@pytest.mark.parametrize("bits", [8, 16, 32, 64])
@pytest.mark.parametrize("kind", ["u", "s"])
def test_narrow_numbers_are_extended(bits, kind):
    """Loads fill a register of 64 bits; a narrow store takes its lowest."""
    source, out = aligned(32, f"{kind.replace('s', 'i')}{bits // 8}"), aligned(32, np.uint64)
    source[:] = (np.arange(32) * (2**bits // 32 + 1)).astype(np.uint64).astype(source.dtype)
    back = aligned(32, source.dtype)
    body = (
        f"mul.wide.u32 %d9, %r0, {bits // 8}; add.u64 %d10, %d0, %d9; add.u64 %d11, %d2, %d9;"
        "mul.wide.u32 %d12, %r0, 8; add.u64 %d12, %d1, %d12;"
        f"ld.global.{kind}{bits} %d13, [%d10]; st.global.u64 [%d12], %d13;"
        f"st.global.{kind}{bits} [%d11], %d13;"
    )
    assert not launch(kernel(body, n_pointers=3), [source, out, back]).faults
    assert np.array_equal(out, source.astype(np.int64 if kind == "s" else np.uint64).view("u8"))
    assert np.array_equal(back, source)


@pytest.mark.parametrize(("count", "bits"), [(2, 8), (4, 8), (2, 16), (4, 16), (2, 32), (4, 32)])
@pytest.mark.parametrize("space", ["global", "shared"])
def test_vectors(count, bits, space):
    """Each thread moves a vector, its parts in reverse."""
    size = count * bits // 8
    source, out = (aligned(32 * count, f"u{bits // 8}") for _ in range(2))
    source[:] = np.random.default_rng(3).integers(0, 2**bits, len(source))
    parts = [f"%{'r' if bits == 32 else 'h'}{k}" for k in range(1, count + 1)]
    load, store = ", ".join(parts), ", ".join(parts[::-1])
    kind = f"v{count}.b{bits}"
    body = (
        f"mul.wide.u32 %d9, %r0, {size}; add.u64 %d10, %d0, %d9; add.u64 %d11, %d1, %d9;"
        f"ld.global.nc.{kind} {{{load}}}, [%d10];"
    )
    if space == "shared":
        body += (
            f"mov.u32 %r20, memory; mad.lo.u32 %r21, %r0, {size}, %r20;"
            f"st.shared.{kind} [%r21+0], {{{load}}}; ld.volatile.shared.{kind} {{{load}}}, [%r21];"
        )
    body += f"st.global.{kind} [%d11], {{{store}}};"
    code = kernel(body, n_pointers=2, shared=32 * size)
    assert not launch(code, [source, out]).faults
    assert np.array_equal(out.reshape(32, count), source.reshape(32, count)[:, ::-1])


def test_guarded_accesses_and_offsets():
    source, out = aligned(34, np.uint32), aligned(32, np.uint32, 9)
    source[:] = np.arange(34) * 10
    body = (
        "mul.wide.u32 %d9, %r0, 4; add.u64 %d10, %d0, %d9; add.u64 %d11, %d1, %d9;"
        "setp.lt.u32 %p1, %r0, 8; setp.ge.u32 %p2, %r0, 4; mov.u32 %r1, 5;"
        "@%p1 ld.global.u32 %r1, [%d10+8]; add.u64 %d11, %d11, 64;"
        "setp.lt.u32 %p3, %r0, 16; and.pred %p2, %p2, %p3; @%p2 st.global.u32 [%d11+-64], %r1;"
    )
    assert not launch(kernel(body, n_pointers=2), [source, out]).faults
    expected = [9] * 4 + [10 * (i + 2) for i in range(4, 8)] + [5] * 8 + [9] * 16
    assert out.tolist() == expected


def test_generic_addresses_reach_both_memories():
    out = aligned(32, np.uint32)
    body = (
        "mov.u32 %r1, memory; mad.lo.u32 %r2, %r0, 4, %r1; cvt.u64.u32 %d8, %r2;"
        "cvta.shared.u64 %d9, %d8; cvta.to.shared.u64 %d10, %d9; cvt.u32.u64 %r3, %d10;"
        "mad.lo.u32 %r4, %r0, 3, 1; st.u32 [%d9], %r4; ld.shared.u32 %r5, [%r3];"
        "cvta.to.global.u64 %d11, %d0; mul.wide.u32 %d12, %r0, 4; add.u64 %d11, %d11, %d12;"
        "setp.gt.u32 %p1, %r0, 15; selp.b64 %d13, %d9, %d11, %p1; st.u32 [%d13], %r5;"
        "ld.u32 %r6, [%d13]; st.global.u32 [%d11], %r6;"
    )
    assert not launch(kernel(body, shared=128), [out]).faults
    assert out.tolist() == [3 * i + 1 for i in range(32)]


def test_special_registers():
    out = aligned(6 * 128, np.uint32)
    names = ("%tid.x", "%ctaid.x", "%laneid", "%ntid.x", "%nctaid.x", "%cluster_ctarank")
    body = (
        "mov.u32 %r1, %ctaid.x; mad.lo.u32 %r2, %r1, 64, %r0; mul.wide.u32 %d8, %r2, 24;"
        "add.u64 %d9, %d0, %d8;"
    )
    for k, name in enumerate(names):
        body += f"mov.u32 %r{10 + k}, {name}; st.global.u32 [%d9+{4 * k}], %r{10 + k};"
    assert not launch(kernel(body), [out], threads=64, ctas=2, cluster=2).faults
    expected = [[t, c, t % 32, 64, 2, c] for c in range(2) for t in range(64)]
    assert out.reshape(128, 6).tolist() == expected


# Branches.


def test_loops_of_different_lengths():
    """Collatz: threads leave their loop at different times, through an inner branch."""
    out = aligned(64, np.uint32)
    body = (
        "add.u32 %r1, %r0, 1; mov.u32 %r2, 0;\n"
        "LOOP: setp.eq.u32 %p1, %r1, 1; @%p1 bra DONE;\n"
        "add.u32 %r2, %r2, 1; and.b32 %r3, %r1, 1; setp.eq.u32 %p2, %r3, 0; @%p2 bra.uni EVEN;\n"
        "mad.lo.u32 %r1, %r1, 3, 1; bra LOOP;\n"
        "EVEN: shr.u32 %r1, %r1, 1; bra LOOP;\n"
        "DONE: mul.wide.u32 %d8, %r0, 4; add.u64 %d9, %d0, %d8; st.global.u32 [%d9], %r2;"
    )

    def steps(n):
        return 0 if n == 1 else 1 + steps(n // 2 if n % 2 == 0 else 3 * n + 1)

    assert not launch(kernel(body), [out], threads=64).faults
    assert out.tolist() == [steps(i + 1) for i in range(64)]


def test_copies_change_apart():
    """A register and its copy, of which some threads change one in a branch."""
    out = aligned(32, np.uint32)
    body = (
        "mov.u32 %r1, %r0; setp.lt.u32 %p1, %r0, 9; @%p1 bra A; bra B; A: add.u32 %r1, %r1, 50;\n"
        "B: mad.lo.u32 %r2, %r0, 1000, %r1; mul.wide.u32 %d8, %r0, 4; add.u64 %d9, %d0, %d8;\n"
        "st.global.u32 [%d9], %r2;"
    )
    assert not launch(kernel(body), [out]).faults
    assert out.tolist() == [1001 * i + 50 * (i < 9) for i in range(32)]


def test_threads_that_leave_early_write_nothing_more():
    out = aligned(32, np.uint32, 7)
    body = (
        "setp.gt.u32 %p1, %r0, 9; @%p1 ret; setp.lt.u32 %p2, %r0, 3; @!%p2 bra A; exit;\n"
        "A: mul.wide.u32 %d8, %r0, 4; add.u64 %d9, %d0, %d8; st.global.u32 [%d9], %r0;"
    )
    assert not launch(kernel(body), [out]).faults
    assert out.tolist() == [i if 3 <= i < 10 else 7 for i in range(32)]


@pytest.mark.parametrize(("vote", "expected"), [("or", any), ("and", all)])
@pytest.mark.parametrize("limit", [0, 1, 63, 64])
def test_barriers_that_vote(vote, expected, limit):
    out = aligned(64, np.uint32)
    body = (
        f"setp.lt.u32 %p1, %r0, {limit}; bar.red.{vote}.pred %p2, 0, %p1;"
        "selp.b32 %r1, 1, 0, %p2; mul.wide.u32 %d8, %r0, 4; add.u64 %d9, %d0, %d8;"
        "st.global.u32 [%d9], %r1;"
    )
    assert not launch(kernel(body), [out], threads=64).faults
    assert set(out.tolist()) == {int(expected(i < limit for i in range(64)))}
