"""Instructions of whole warps, against loops over their lanes."""

import numpy as np
import pytest

from .hand_made import aligned, kernel, kinds, launch

OWN = "mul.wide.u32 %d8, %r0, 4; add.u64 %d9, %d0, %d8;\n"


def run(body, n_values=32, shared=0, threads=32):
    out = aligned(n_values, np.uint32)
    machine = launch(kernel(OWN + body, shared=shared), [out], threads=threads)
    return out, machine


def source(kind, lane, by, clamp):
    """The lane read and whether it is in range: the manual's program for shfl.sync, in Python."""
    high, segment = clamp & 31, (clamp >> 8) & 31
    most, least = (lane & segment) | (high & ~segment), lane & segment
    found = {
        "up": lane - by,
        "down": lane + by,
        "bfly": lane ^ by,
        "idx": least | (by & ~segment),
    }[kind]
    inside = found >= most if kind == "up" else found <= most
    return (found, True) if inside else (lane, False)


@pytest.mark.parametrize("kind", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("by", [0, 1, 5, 16, 31])
@pytest.mark.parametrize("width", [32, 8])
def test_shuffles_read_the_lanes_of_the_manual(kind, by, width):
    clamp = ((32 - width) << 8) | (0 if kind == "up" else 31)
    body = (
        "mul.lo.u32 %r1, %r0, 3;\n"
        f"shfl.sync.{kind}.b32 %r2|%p1, %r1, {by}, {clamp}, -1; selp.b32 %r3, 1000, 0, %p1;\n"
        "add.u32 %r2, %r2, %r3; st.global.u32 [%d9], %r2;"
    )
    out, machine = run(body)
    assert not machine.faults
    expected = [source(kind, lane, by, clamp) for lane in range(32)]
    assert out.tolist() == [3 * lane + 1000 * inside for lane, inside in expected]


def test_a_shuffle_from_a_lane_that_the_mask_leaves_out():
    body = "shfl.sync.bfly.b32 %r2, %r0, 1, 31, {}; st.global.u32 [%d9], %r2;"
    assert kinds(run(body.format(0xFFFFFFFF))[1]) == set()
    assert kinds(run(body.format(0x55555555))[1]) == {"shuffle"}


def test_a_shuffle_from_a_thread_that_has_exited():
    body = "setp.gt.u32 %p1, %r0, 15; @%p1 ret; shfl.sync.bfly.b32 %r2, %r0, {}, 31, 65535;"
    assert not run(body.format(8))[1].faults
    assert kinds(run(body.format(16))[1]) == {"shuffle"}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("add", lambda x: x.sum()), ("min", np.min), ("max", np.max)],
)
def test_reductions_are_of_a_warp(kind, expected):
    body = f"sub.s32 %r1, %r0, 40; redux.sync.{kind}.s32 %r2, %r1, -1; st.global.u32 [%d9], %r2;"
    out, machine = run(body, n_values=64, threads=64)
    assert not machine.faults
    values = np.arange(64) - 40
    for warp in (slice(0, 32), slice(32, 64)):
        assert set(out[warp].view(np.int32).tolist()) == {int(expected(values[warp]))}


def test_a_reduction_whose_mask_is_not_those_who_are_there():
    assert kinds(run("redux.sync.add.s32 %r2, %r0, 15;")[1]) == {"reduction"}


@pytest.mark.parametrize("trans", [False, True])
def test_matrices_are_dealt_out(trans):
    """Four matrices of 8 x 8 numbers 100 k + 8 i + j."""
    modifier = ".trans" if trans else ""
    body = (  # thread t stores row t % 8 of matrix t // 8, 16 bytes
        "shr.u32 %r1, %r0, 3; and.b32 %r2, %r0, 7; mul.lo.u32 %r3, %r1, 100; shl.b32 %r4, %r2, 3;\n"
        "add.u32 %r5, %r3, %r4; mad.lo.u32 %r6, %r5, 65537, 65536;\n"
        "add.u32 %r7, %r6, 131074; add.u32 %r8, %r7, 131074; add.u32 %r9, %r8, 131074;\n"
        "mov.u32 %r10, memory; shl.b32 %r11, %r0, 4; add.u32 %r12, %r10, %r11;\n"
        "st.shared.v4.b32 [%r12], {%r6, %r7, %r8, %r9}; bar.sync 0;\n"
        f"ldmatrix.sync.aligned.m8n8.x4{modifier}.shared.b16 {{%r20, %r21, %r22, %r23}}, [%r12];\n"
        "shl.b32 %r13, %r0, 4; cvt.u64.u32 %d10, %r13; add.u64 %d11, %d0, %d10;\n"
        "st.global.v4.b32 [%d11], {%r20, %r21, %r22, %r23};"
    )
    out, machine = run(body, n_values=128, shared=512)
    assert not machine.faults
    halves = out.view(np.uint16).reshape(32, 4, 2)
    for t in range(32):
        for k in range(4):
            row, column = t // 4, 2 * (t % 4)
            places = [(row, column), (row, column + 1)]
            if trans:
                places = [(j, i) for i, j in places]
            assert halves[t, k].tolist() == [100 * k + 8 * i + j for i, j in places]


def test_stored_matrices_are_loaded_again():
    body = (
        "mov.u32 %r10, memory; shl.b32 %r11, %r0, 4; add.u32 %r12, %r10, %r11;\n"
        "mul.lo.u32 %r1, %r0, 7; add.u32 %r2, %r1, 1000;\n"
        "stmatrix.sync.aligned.m8n8.x2.shared.b16 [%r12], {%r1, %r2}; bar.sync 0;\n"
        "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r3, %r4}, [%r12]; add.u32 %r5, %r3, %r4;\n"
        "st.global.u32 [%d9], %r5;"
    )
    out, machine = run(body, shared=512)
    assert not machine.faults
    assert out.tolist() == [14 * i + 1000 for i in range(32)]
