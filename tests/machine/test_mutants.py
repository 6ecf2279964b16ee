"""Every kind of change to PTX, made to a few lines, shows as the fault that it must show as."""

from collections import namedtuple
from unittest.mock import patch

import numpy as np
import pytest
import torch

from . import machine
from .blocks import Kernel
from .hand_made import aligned, kernel, kinds, launch
from .mutants import kernel_name
from .mutations import applied, mutations, other_constant
from .parse import Immediate
from .replay import Mutant, copied, places_of

OWN = "mul.wide.u32 %d8, %r0, 4; add.u64 %d9, %d0, %d8;\n"
OUT = "st.global.u32 [%d9], {};"
SOME = "setp.lt.u32 %p1, %r0, 63;\n"  # the array has a place less than there are threads
SHARED = "shl.b32 %r1, %r0, 2; mov.u32 %r2, memory; mad.lo.u32 %r3, %r0, 4, %r2;\n"
OTHER_WARP = "xor.b32 %r4, %r1, 128; add.u32 %r5, %r2, %r4;"
COPY = (
    "mul.wide.u32 %d4, %r0, 16; add.u64 %d5, %d1, %d4; shl.b32 %r1, %r0, 4; mov.u32 %r2, memory;\n"
    "add.u32 %r3, %r2, %r1; cp.async.cg.shared.global [%r3], [%d5], 16; cp.async.commit_group;\n"
)
VALUE = "value"
Arguments = namedtuple("Arguments", "one two alone none number")
# By the kind of change: statements in which one line, the last that has a place for it, is changed.
CASES = {
    "barrier removed": (
        SHARED + "st.shared.u32 [%r3], %r0; bar.sync 0;" + OTHER_WARP + "ld.shared.u32 %r6, [%r5];",
        "%r6", "shared race",
    ),
    "wait for a copy removed": (
        COPY + "cp.async.wait_group 0; ld.shared.u32 %r6, [%r3];", "%r6", "shared uninitialised",
    ),
    "shuffle from another lane": ("shfl.sync.bfly.b32 %r6, %r0, 16, 31, -1;", "%r6", VALUE),
    "ex2 or lg2 skipped": ("cvt.rn.f32.u32 %r6, %r0; ex2.approx.ftz.f32 %r6, %r6;", "%r6", VALUE),
    "store deleted": ("", "%r0", "unwritten"),
    "store repeated at the next address": ("", "%r0", "global race"),
    "store repeated with another value": ("", "%r0", VALUE),
    "add turned to sub": ("add.u32 %r6, %r0, 7;", "%r6", VALUE),
    "constant changed": ("add.u32 %r6, %r0, 7;", "%r6", VALUE),
    "predicate inverted": ("", "%r0", "global out of bounds"),
    "predicate dropped": ("", "%r0", "global out of bounds"),
    "bound off by one": ("", "%r0", "global out of bounds"),
}  # fmt: skip


def code_of(kind):
    body, result, _ = CASES[kind]
    return kernel(f"{OWN} {SOME} {body} @%p1 {OUT.format(result)}", n_pointers=2, shared=1024)


def run(code):
    """The kinds of faults, and the array that the kernel has written."""
    out, copied_from = aligned(63, np.uint32), aligned(256, np.uint32)
    copied_from[:] = np.arange(256)
    with patch.object(machine, "STEPS", 100):
        ran = launch(code, [out, copied_from], threads=64, fresh=[0])
    return kinds(ran) | ({"unwritten"} if ran.memory.unwritten("p0") else set()), out.tolist()


@pytest.mark.parametrize("kind", CASES)
def test_a_change_shows(kind):
    original = code_of(kind)
    faults, expected = run(original)
    assert not faults
    mutation = [m for m in mutations(original.function) if m.kind == kind][-1]
    faults, found = run(Mutant(applied(original.function, mutation), original))
    if CASES[kind][2] == VALUE:
        assert (faults, found == expected) == (set(), False)
    else:
        assert CASES[kind][2] in faults


def test_no_kind_is_left_out():
    assert {m.kind for kind in CASES for m in mutations(code_of(kind).function)} == set(CASES)


def test_a_loop_without_end_is_stopped():
    again = "AGAIN: setp.lt.u32 %p2, %r9, 5; add.u32 %r9, %r9, 1; @%p2 bra AGAIN;"
    original = kernel(f"mov.u32 %r9, 0; {again}")
    assert not launch(original, [aligned(1, np.uint32)]).faults
    (mutation,) = (m for m in mutations(original.function) if m.kind == "predicate dropped")
    assert run(Mutant(applied(original.function, mutation), original))[0] >= {"runs for ever"}


@pytest.mark.parametrize("kind", CASES)
def test_blocks_that_are_taken_over_change_nothing(kind):
    original = code_of(kind)
    for mutation in mutations(original.function):
        function = applied(original.function, mutation)
        assert run(Mutant(function, original)) == run(Kernel(function)), mutation


def test_a_store_without_a_thread_is_not_reached():
    code = kernel("setp.lt.u32 %p1, %r0, 0; @%p1 st.global.u32 [%d0], 1;\nst.global.u32 [%d0], 2;")
    counters = launch(code, [aligned(1, np.uint32)], counting=True).counters
    reached = [code.function.body[index] for index in places_of(code, counters)]
    assert [i.args[1].bits for i in reached if i.family == "st"] == [2]


@pytest.mark.parametrize(
    ("bits", "kind", "expected"),
    [
        (7, "int", 8),
        (0x3F800000, "f32", 0x3FC00000),
        (0, "f32", 0x3F800000),
        (0x7F800000, "f32", 0),
    ],
)
def test_constants_become_other_numbers(bits, kind, expected):
    assert other_constant(Immediate(bits, kind)) == Immediate(expected, kind)


def test_copied_arguments_share_memory_where_the_originals_do():
    base = torch.arange(12.0)
    one, two, alone = base.view(3, 4)[:, 1:], base[2:], torch.ones(2).expand(3, 2)
    arguments = copied(Arguments(one, two, alone, None, 0.5))
    assert arguments.one.equal(one)
    assert (arguments.one.stride(), arguments.one.storage_offset()) == ((4, 1), 1)
    assert arguments.alone.stride() == (0, 1)
    assert (arguments.none, arguments.number) == (None, 0.5)
    arguments.one[0, 1] = -1.0
    assert arguments.two[0] == -1.0
    assert base[2] == 2.0


def test_names_of_kernels():
    assert kernel_name("_ZN10kl_kernels13finish_kernelENS_4RowsE") == "finish_kernel"
    assert kernel_name("mix_backward_kernel") == "mix_backward_kernel"
