"""Each kind of fault is found in a kernel that has it, and in none that does not."""

import numpy as np
import pytest

from .hand_made import aligned, kernel, kinds, launch
from .memory import Layout

# Address of the thread's own number in p0, of 4 bytes.
OWN = "mul.wide.u32 %d8, %r0, 4; add.u64 %d9, %d0, %d8;\n"
# And in shared memory.
OWN_SHARED = "shl.b32 %r1, %r0, 2; mov.u32 %r2, memory; add.u32 %r3, %r2, %r1;\n"


def numbers(n=32, dtype=np.uint32):
    return aligned(n, dtype)


def test_threads_write_their_numbers():
    out = numbers(64)
    machine = launch(kernel(OWN + "st.global.u32 [%d9], %r0;"), [out], threads=64, fresh=[0])
    assert not machine.faults
    assert out.tolist() == list(range(64))
    assert machine.memory.unwritten("p0") == 0


def test_a_store_past_the_end():
    out = numbers(31)
    machine = launch(kernel(OWN + "st.global.u32 [%d9], %r0;"), [out])
    (fault,) = machine.faults
    assert (fault.kind, fault.count) == ("global out of bounds", 1)
    assert fault.text == "store of 4 bytes at byte 124 of p0 by thread 31"
    assert out.tolist() == list(range(31))


@pytest.mark.parametrize("access", ["ld.global.u32 %r4, [%d9];", "st.global.u32 [%d9], %r0;"])
def test_padding_between_rows_is_out_of_bounds(access):
    out = numbers(32)
    rows = [Layout(0, (4, 7), (32, 4), 4)]  # the eighth of each row is padding
    machine = launch(kernel(OWN + access), [out], layouts={0: rows})
    assert [(fault.kind, fault.count) for fault in machine.faults] == [("global out of bounds", 4)]


def test_an_address_of_no_tensor():
    machine = launch(kernel("mov.u64 %d9, 4096; ld.global.u32 %r4, [%d9];"), [numbers()])
    assert kinds(machine) == {"global out of bounds"}


def test_all_of_a_load_is_past_the_end_of_what_was_never_written():
    body = OWN + "ld.global.u32 %r4, [%d9+128];"
    assert kinds(launch(kernel(body), [numbers()], fresh=[0])) == {"global out of bounds"}


def test_a_misaligned_access():
    body = "add.u64 %d9, %d0, 2; ld.global.u32 %r4, [%d9];"
    assert kinds(launch(kernel(body), [numbers()])) == {"global misaligned"}
    assert not launch(kernel(body.replace("2;", "4;", 1)), [numbers()]).faults


def test_memory_that_was_never_written():
    body = OWN + "@%p1 st.global.u32 [%d9], %r0; ld.global.u32 %r4, [%d9];"
    some = "setp.lt.u32 %p1, %r0, {};\n"
    machine = launch(kernel(some.format(30) + body), [numbers()], fresh=[0])
    assert [(f.kind, f.count) for f in machine.faults] == [("global uninitialised", 2)]
    assert machine.memory.unwritten("p0") == 8
    assert not launch(kernel(some.format(32) + body), [numbers()], fresh=[0]).faults


def test_a_huge_stride_costs_what_is_touched():
    raw = np.zeros(1 << 33, np.uint8)  # nothing of it is there before it is touched
    far = [Layout(0, (2, 8), (1 << 32, 4), 4)]
    body = "mov.u64 %d8, 4294967296; add.u64 %d9, %d0, %d8; st.global.u32 [%d9], 7;"
    machine = launch(kernel(body), [raw], layouts={0: far}, fresh=[0])
    assert not machine.faults
    assert raw[1 << 32] == 7


# Shared memory: a neighbour's number, read through it.
TO_SHARED = OWN_SHARED + "st.shared.u32 [%r3], %r0;\n"
NEIGHBOURS = (
    "xor.b32 %r4, %r0, {}; shl.b32 %r4, %r4, 2; add.u32 %r5, %r2, %r4; ld.shared.u32 %r6, [%r5];\n"
    + OWN
    + "st.global.u32 [%d9], %r6;"
)


@pytest.mark.parametrize(
    ("barrier", "neighbour", "races"),
    [
        ("bar.sync 0;", 1, False),
        ("bar.sync 0;", 32, False),
        ("", 32, True),
        ("", 1, True),
        ("bar.warp.sync -1;", 1, False),
        ("bar.warp.sync -1;", 32, True),
    ],
)
def test_a_neighbours_number_needs_a_barrier(barrier, neighbour, races):
    out = numbers(64)
    code = kernel(TO_SHARED + barrier + NEIGHBOURS.format(neighbour), shared=256)
    machine = launch(code, [out], threads=64)
    assert kinds(machine) == ({"shared race"} if races else set())
    assert out.tolist() == [i ^ neighbour for i in range(64)]


def test_a_write_after_a_read_needs_a_barrier():
    body = TO_SHARED + "bar.sync 0;" + NEIGHBOURS.format(1) + "{} st.shared.u32 [%r3], 5;"
    racing = launch(kernel(body.format(""), shared=256), [numbers(64)], threads=64)
    ordered = launch(kernel(body.format("bar.sync 0;"), shared=256), [numbers(64)], threads=64)
    assert kinds(racing) == {"shared race"}
    assert not ordered.faults


def test_several_readers_count_as_well_as_one():
    everyone = OWN_SHARED + "@%p1 st.shared.u32 [%r2], 3; {} ld.shared.u32 %r6, [%r2]; {}"
    body = "setp.eq.u32 %p1, %r0, 0;\n" + everyone + "@%p1 st.shared.u32 [%r2], 4;"
    racing = kernel(body.format("bar.sync 0;", ""), shared=256)
    ordered = kernel(body.format("bar.sync 0;", "bar.sync 0;"), shared=256)
    assert kinds(launch(racing, [numbers()], threads=64)) == {"shared race"}
    assert not launch(ordered, [numbers()], threads=64).faults


def test_shared_memory_that_was_never_written():
    body = OWN_SHARED + "ld.shared.u32 %r6, [%r3];"
    assert kinds(launch(kernel(body, shared=128), [numbers()])) == {"shared uninitialised"}


def test_shared_memory_that_is_not_there():
    body = OWN_SHARED + "st.shared.u32 [%r3], %r0;"
    (fault,) = launch(kernel(body, shared=120), [numbers()]).faults
    assert (fault.kind, fault.count) == ("shared out of bounds", 2)


@pytest.mark.parametrize("access", ["st.shared.u32 [%r3], %r0;", "ld.shared.u32 %r6, [%r3];"])
def test_shared_memory_far_away_or_of_the_next_cta(access):
    """It stays as it is, and what is read there is none of its bytes."""
    write = OWN_SHARED + "st.shared.u32 [%r3], %r0; mov.u32 %r9, %ctaid.x;"
    to_the_next = "setp.eq.u32 %p1, %r9, 0; @%p1 add.u32 %r3, %r3, {};" + access
    read = "add.u32 %r3, %r2, %r1; ld.shared.u32 %r5, [%r3];" + OWN + "st.global.u32 [%d9], %r5;"
    for distance in (128, 1 << 30, -256):
        out = numbers()
        body = write + to_the_next.format(distance) + read
        assert kinds(launch(kernel(body, shared=128), [out], ctas=2)) >= {"shared out of bounds"}
        assert out.tolist() == list(range(32))


@pytest.mark.parametrize("space", ["shared", "global"])
def test_one_place_for_several_values(space):
    address = {"shared": "[%r2]", "global": "[%d0]"}[space]
    body = OWN_SHARED + "st.{}.u32 {}, {};"
    differing = launch(kernel(body.format(space, address, "%r0"), shared=4), [numbers()])
    equal = launch(kernel(body.format(space, address, "9"), shared=4), [numbers()])
    assert kinds(differing) == {f"{space} double write"}
    assert not equal.faults


def test_ctas_of_a_launch_are_not_ordered():
    """They all write the same places, then all read what one of them has written."""
    body = OWN + "mov.u32 %r7, %ctaid.x; {}"
    read_own = "ld.global.u32 %r4, [%d9]; st.global.u32 [%d9], %r7;"
    assert not launch(kernel(body.format(read_own)), [numbers()], ctas=1).faults
    assert kinds(launch(kernel(body.format(read_own)), [numbers()], ctas=2)) == {
        "global double write",
        "global race",
    }


def test_a_read_before_another_ctas_write():
    body = (
        "mov.u32 %r7, %ctaid.x; setp.eq.u32 %p1, %r7, 1;\n"
        "@!%p1 ld.global.u32 %r4, [%d0]; @%p1 bra WRITE; ret;\n"
        "WRITE: setp.eq.u32 %p2, %r0, 0; @%p2 st.global.u32 [%d0], 1;"
    )
    assert kinds(launch(kernel(body), [numbers()], ctas=2)) == {"global race"}


# Barriers.


def test_some_threads_have_exited_at_a_barrier():
    body = "setp.lt.u32 %p1, %r0, 32; @%p1 ret; bar.sync 0;"
    assert kinds(launch(kernel(body), [numbers()], threads=64)) == {"exited at barrier"}


def test_threads_wait_at_different_barriers():
    body = "setp.lt.u32 %p1, %r0, 32; @%p1 bra A; bar.sync 0; bra B; A: bar.sync 0; B:"
    assert kinds(launch(kernel(body), [numbers()], threads=64)) == {"different barriers"}


def test_shuffles_that_wait_for_each_other():
    shuffle = "shfl.sync.bfly.b32 %r5, %r0, 1, 31, -1;"
    body = f"setp.lt.u32 %p1, %r0, 16; @%p1 bra A; {shuffle} bra B; A: {shuffle} B:"
    assert kinds(launch(kernel(body), [numbers()])) == {"deadlock"}


def test_a_kernel_that_runs_for_ever(monkeypatch):
    from . import machine

    monkeypatch.setattr(machine, "STEPS", 1000)
    assert kinds(launch(kernel("A: bra A;"), [numbers()])) == {"runs for ever"}


# Asynchronous copies.

COPY = (
    "shl.b32 %r1, %r0, 4; mov.u32 %r2, memory; add.u32 %r3, %r2, %r1; mul.wide.u32 %d8, %r0, 16;\n"
    "add.u64 %d9, %d0, %d8; cp.async.cg.shared.global [%r3], [%d9], 16; cp.async.commit_group;\n"
)
READ = "xor.b32 %r4, %r3, {}; ld.shared.v4.u32 {{%r5, %r6, %r7, %r8}}, [%r4];"


@pytest.mark.parametrize(
    ("wait", "neighbour", "expected"),
    [
        ("cp.async.wait_group 0;", 0, set()),
        ("cp.async.wait_all;", 0, set()),
        ("cp.async.wait_group 0; bar.sync 0;", 16, set()),
        ("cp.async.wait_group 1;", 0, {"shared uninitialised", "copy never waited for"}),
        ("", 0, {"shared uninitialised", "copy never waited for"}),
        ("cp.async.wait_group 0;", 16, {"shared race"}),
    ],
)
def test_a_copy_is_there_once_it_was_waited_for(wait, neighbour, expected):
    code = kernel(COPY + wait + READ.format(neighbour), shared=512)
    assert kinds(launch(code, [numbers(128)])) == expected


# Clusters: thread i reads the number that its like in the other CTA has written.

ARRIVE, WAIT = "barrier.cluster.arrive.release.aligned;", "barrier.cluster.wait.acquire.aligned;"
REMOTE = (
    "cvta.shared.u64 %d10, memory; add.u64 %d10, %d10, %d8; mov.u32 %r7, %cluster_ctarank;\n"
    "xor.b32 %r8, %r7, 1; mapa.u64 %d11, %d10, %r8; ld.u32 %r9, [%d11];\n"
)
WRITTEN = (
    "mov.u32 %r7, %ctaid.x; shl.b32 %r7, %r7, 8; add.u32 %r10, %r0, %r7;\n"
    "mul.wide.u32 %d8, %r0, 4;" + OWN_SHARED + "st.shared.u32 [%r3], %r10;\n"
)


def clustered(first, last):
    """The numbers read, and the faults, with these statements before and after the reads."""
    out = numbers(64)
    store = (
        "mov.u32 %r7, %ctaid.x; shl.b32 %r7, %r7, 5; add.u32 %r7, %r7, %r0;\n"
        "mul.wide.u32 %d8, %r7, 4; add.u64 %d9, %d0, %d8; st.global.u32 [%d9], %r9;"
    )
    code = kernel(WRITTEN + first + REMOTE + last + store, shared=128)
    machine = launch(code, [out], ctas=2, cluster=2)
    return out, machine


def test_another_ctas_memory_between_two_barriers():
    out, machine = clustered(ARRIVE + WAIT, ARRIVE + WAIT)
    assert not machine.faults
    assert out.tolist() == [256 + i for i in range(32)] + list(range(32))


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [
        ("", ARRIVE + WAIT, {"shared race"}),
        ("bar.sync 0;", ARRIVE + WAIT, {"shared race"}),
        (ARRIVE + WAIT, "", {"shared memory of an exited CTA"}),
        (ARRIVE.replace("release", "relaxed") + WAIT, ARRIVE + WAIT, {"shared race"}),
        (WAIT, "", {"deadlock"}),
        (ARRIVE + WAIT, ARRIVE, {"shared memory of an exited CTA", "cluster barrier"}),
    ],
)
def test_another_ctas_memory_needs_barriers(first, last, expected):
    _, machine = clustered(first, last)
    assert kinds(machine) >= expected
    assert kinds(machine) <= expected | {"shared memory of an exited CTA"}


def test_a_rank_that_is_not_in_the_cluster():
    code = kernel("cvta.shared.u64 %d10, memory; mapa.u64 %d11, %d10, 2;", shared=16)
    assert kinds(launch(code, [numbers()], ctas=2, cluster=2)) == {"mapa"}


def test_padding_that_nobody_wants_may_be_anything():
    """Nvcc copies a struct of 12 bytes by 16, and says so."""
    body = (
        "mov.u32 %r2, memory; st.shared.v2.u32 [%r2], {1, 2}; st.shared.u32 [%r2+8], 3;\n"
        "bar.sync 0; {}\n"
        "ld.shared.v4.u32 {%r4, %r5, %r6, %r7}, [%r2]; st.global.u32 [%d0], %r6;"
    )
    some = body.replace("{}", '.pragma "used_bytes_mask 4095";')
    out = numbers()
    assert not launch(kernel(some, shared=16), [out]).faults
    assert out[0] == 3
    everything = launch(kernel(body.replace("{}", ""), shared=16), [out])
    assert kinds(everything) == {"shared uninitialised"}
