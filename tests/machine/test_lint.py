"""Butterflies whose threads would not agree on their sum are found, and no others."""

import pytest

from .lint import asymmetric_butterflies
from .parse import parse

HEAD = ".entry f() { .reg .pred %p<4>; .reg .b32 %r<32>; .reg .b64 %d<32>;\n"
SHUFFLE = "shfl.sync.bfly.b32 %r4, %r3, 16, 31, -1;\n"


def lines(body):
    return asymmetric_butterflies(parse(HEAD + body + "\n}")["f"])


@pytest.mark.parametrize("factors", ["%r1, %r2", "%r2, %r1"])
@pytest.mark.parametrize("kind", ["rn.f32", "rn.ftz.f32"])
@pytest.mark.parametrize("product", ["f32", "ftz.f32", "rn.f32"])
def test_a_product_fused_into_the_sum(factors, kind, product):
    body = f"mul.{product} %r3, %r1, %r2;\n{SHUFFLE}fma.{kind} %r5, {factors}, %r4;"
    assert lines(body) == [4]


def test_every_one_of_several():
    once = f"mul.f32 %r3, %r1, %r2;\n{SHUFFLE}fma.rn.f32 %r5, %r1, %r2, %r4;\n"
    assert lines(once + "add.f32 %r6, %r5, %r5;\n" + once) == [4, 8]


def test_moves_in_between():
    body = (
        "mov.b32 %r11, %r1; mov.b32 %r12, %r2; mul.f32 %r13, %r11, %r2; mov.b32 %r3, %r13;\n"
        f"{SHUFFLE} mov.b32 %r14, %r4; mov.b32 %r15, %r14; mul.f32 %r16, %r6, %r7;\n"
        "fma.rn.f32 %r5, %r12, %r11, %r15;"
    )
    assert lines(body) == [5]
    assert not lines(body.replace("mov.b32 %r12, %r2", "mov.b32 %r12, %r3"))


def test_a_factor_that_is_a_constant():
    body = f"mul.f32 %r3, %r1, 0f40400000;\n{SHUFFLE}fma.rn.f32 %r5, %r1, {{}}, %r4;"
    body = "ex2.approx.f32 %r1, %r9;" + body
    assert lines(body.format("0f40400000")) == [4]
    assert not lines(body.format("0f40800000"))


def test_doubles_whose_halves_are_shuffled():
    body = (
        "rcp.rn.f64 %d2, %d1; mul.f64 %d3, %d1, %d2; mov.b64 {%r1, %r2}, %d3;\n"
        "shfl.sync.down.b32 %r3|%p1, %r1, 16, 31, -1;\n"
        "shfl.sync.down.b32 %r4|%p1, %r2, 16, 31, -1;\n"
        "mov.b64 %d4, {%r3, %r4}; fma.rn.f64 %d5, %d1, %d2, %d4;"
    )
    assert lines(body) == [5]
    assert not lines(body.replace("%d1, %d2, %d4", "%d1, %d1, %d4"))


def test_pairs():
    body = (
        "mov.b64 %d1, {%r9, %r9}; ex2.approx.f32 %r9, %r8; mov.b64 %d2, {%r9, %r9};\n"
        "mul.f32x2 %d3, %d1, %d2; mov.b64 {%r1, %r2}, %d3;\n"
        "shfl.sync.bfly.b32 %r3, %r1, 8, 31, -1; shfl.sync.bfly.b32 %r4, %r2, 8, 31, -1;\n"
        "mov.b64 %d4, {%r3, %r4}; fma.rn.f32x2 %d5, %d1, %d2, %d4;"
    )
    assert lines(body) == [5]


def test_a_factor_from_a_loop():
    body = (
        "mov.b32 %r1, 0f00000000; ex2.approx.f32 %r2, %r9;\n"
        f"A: mul.f32 %r3, %r1, %r2;\n{SHUFFLE}fma.rn.f32 %r5, %r1, %r2, %r4;\n"
        "mov.b32 %r1, %r5; @%p1 bra A;"
    )
    assert lines(body) == [5]


@pytest.mark.parametrize(
    "body",
    [
        # A sum that is rounded by itself.
        f"mul.f32 %r3, %r1, %r2; {SHUFFLE} add.f32 %r5, %r3, %r4;",
        # The product of the sum, by another factor.
        f"mul.f32 %r3, %r1, %r2; {SHUFFLE} fma.rn.f32 %r5, %r1, %r6, %r4;",
        # Something else shuffled.
        f"mul.f32 %r7, %r1, %r2; ex2.approx.f32 %r3, %r1; {SHUFFLE} fma.rn.f32 %r5, %r1, %r2, %r4;",
        # A product that is not shuffled.
        "mul.f32 %r4, %r1, %r2; fma.rn.f32 %r5, %r1, %r2, %r4;",
        # A sum on its way.
        f"mul.f32 %r7, %r1, %r2; add.f32 %r3, %r7, %r1; {SHUFFLE} fma.rn.f32 %r5, %r1, %r2, %r4;",
    ],
)
def test_harmless(body):
    assert not lines("ex2.approx.f32 %r1, %r9; ex2.approx.f32 %r2, %r9; neg.f32 %r6, %r1;" + body)
