"""Instructions that the machine does not know are refused by name, and none is guessed."""

import numpy as np
import pytest

from .hand_made import aligned, kernel, launch


@pytest.mark.parametrize(
    "instruction",
    [
        "popc.b32 %r1, %r0;",
        "atom.global.add.u32 %r1, [%d0], 1;",
        "wgmma.fence.sync.aligned;",
        # Modifiers.
        "add.rz.f32 %r1, %r0, %r0;",
        "add.cc.u32 %r1, %r0, %r0;",
        "add.sat.s32 %r1, %r0, %r0;",
        "mad.hi.u32 %r1, %r0, %r0, %r0;",
        "mul.hi.u64 %d1, %d0, %d0;",
        "fma.rz.f32 %r1, %r0, %r0, %r0;",
        "fma.rm.f64 %d1, %d0, %d0, %d0;",
        "min.relu.bf16x2 %r1, %r0, %r0;",
        "prmt.b32.f4e %r1, %r0, %r0, %r0;",
        "shf.l.clamp.b32 %r1, %r0, %r0, %r0;",
        "setp.ltu.s32 %p1, %r0, %r0;",
        "setp.lo.f32 %p1, %r0, %r0;",
        "setp.lt.u32 %p1|%p2, %r0, %r0;",
        "cvt.s32.f32 %r1, %r0;",
        "cvt.rn.s32.f32 %r1, %r0;",
        "cvt.rz.f32.f64 %r1, %d0;",
        "cvt.f32.s32 %r1, %r0;",
        "cvt.sat.u8.s32 %r1, %r0;",
        "cvt.rn.sat.f32.s32 %r1, %r0;",
        "cvt.rz.bf16.f32 %h1, %r0;",
        "cvt.rn.relu.bf16x2.f32 %r1, %r0, %r0;",
        "ld.local.u32 %r1, [%d0];",
        "ld.shared::cluster.u32 %r1, [%r0];",
        "ld.global.v2.u32 %r1, [%d0];",
        "st.global.v2.u32 [%d0], %r0;",
        "bar.sync 1;",
        "bar.arrive 0, 32;",
        "bar.red.popc.u32 %r1, 0, %p1;",
        "@%p1 bar.sync 0;",
        "redux.sync.add.f32 %r1, %r0, -1;",
        # Types.
        "add.f16 %h1, %h0, %h0;",
        "add.bf16x2 %r1, %r0, %r0;",
        "mul.f32x2 %d1, %d0, %d0;",
        "mul.f16x2 %r1, %r0, %r0;",
        "sub.bf16 %h1, %h0, %h0;",
        "neg.bf16x2 %r1, %r0;",
        "abs.f16 %h1, %h0;",
        "setp.lt.bf16 %p1, %h0, %h0;",
        "max.f16x2 %r1, %r0, %r0;",
        "ex2.approx.f16 %h1, %h0;",
        "bfe.u64 %d1, %d0, 1, 2;",
        # Operands.
        "mov.u64 %d1, nowhere;",
        "add.u32 %r1, %h1, %r0;",
        "add.u32 %h1, %r0, %r0;",
        "add.f32 %r1, %r0, 1;",
        "add.u32 %r1, %p1, 1;",
        "ld.param.u32 %r1, [q];",
        "ld.global.u32 %r1, %d0;",
        "add.u32 %r99, %r0, 1;",
    ],
)
def test_is_refused(instruction):
    words = instruction.removeprefix("@%p1 ").rstrip(";").split(" ", 1)
    with pytest.raises(NotImplementedError) as refused:
        launch(kernel(f"setp.eq.u32 %p1, %r0, 0;\n{instruction}"), [aligned(32, np.uint32)])
    assert str(refused.value).startswith("line 5: ")
    assert words[0] in str(refused.value)


@pytest.mark.parametrize("name", ["%clock", "%r99"])
def test_special_registers_that_are_none(name):
    with pytest.raises(NotImplementedError, match=f"special register {name}"):
        launch(kernel(f"add.u32 %r1, {name}, 1;"), [aligned(32, np.uint32)])


def test_a_variable_whose_data_are_not_there():
    with pytest.raises(NotImplementedError, match=r"line 4: ld\.global\.u32 .*symbol table"):
        launch(kernel("ld.global.u32 %r1, [table];"), [aligned(32, np.uint32)])


def test_a_label_that_is_nowhere():
    with pytest.raises(KeyError, match="NOWHERE"):
        kernel("bra NOWHERE;")


@pytest.mark.parametrize(
    "configuration", [{"threads": 33}, {"ctas": 3, "cluster": 2}, {"threads": 64}]
)
def test_launches(configuration):
    code = kernel("")
    code.function.threads = 32
    with pytest.raises(NotImplementedError, match="threads"):
        launch(code, [aligned(32, np.uint32)], **configuration)
