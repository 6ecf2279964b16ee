"""Accesses to shared memory between barriers: which are races, byte by byte."""

import itertools

import numpy as np
import pytest

from . import races
from .hand_made import aligned, kernel, kinds, launch

# Thread 0 does the first, thread 32, of another warp, the second; %r2 is the array.
FIRST, SECOND = "@%p1 ", "@%p2 "
WRITES = {n: f"st.shared.u{8 * n} [%r2{{}}], {{}};" for n in (1, 2, 4)}
READS = {n: f"ld.shared.u{8 * n} %r9, [%r2{{}}];" for n in (1, 2, 4)}


def found(*statements, threads=64, **configuration):
    """Faults of statements after an array of 16 bytes was filled."""
    body = (
        "mov.u32 %r2, memory; setp.eq.u32 %p1, %r0, 0; setp.eq.u32 %p2, %r0, 32;"
        "@%p1 st.shared.v4.u32 [%r2], {1, 1, 1, 1}; bar.sync 0;\n"
    )
    code = kernel(body + "\n".join(statements), shared=16)
    return kinds(launch(code, [aligned(1, np.uint32)], threads=threads, **configuration))


def access(kind, n_bytes, offset, value=7):
    return (WRITES if kind == "write" else READS)[n_bytes].format(f"+{offset}", value)


@pytest.mark.parametrize("first", ["read", "write"])
@pytest.mark.parametrize("second", ["read", "write"])
@pytest.mark.parametrize("between", ["", "bar.warp.sync -1;", "bar.sync 0;"])
def test_two_warps_need_a_barrier_of_the_cta_if_one_writes(first, second, between):
    races = "write" in (first, second) and between != "bar.sync 0;"
    statements = FIRST + access(first, 4, 0), between, SECOND + access(second, 4, 0)
    assert found(*statements) == ({"shared race"} if races else set())


@pytest.mark.parametrize(
    ("size", "offset"), [(size, at) for size in (1, 2, 4) for at in range(0, 8, size)]
)
@pytest.mark.parametrize("kind", ["read", "write"])
def test_bytes_that_overlap_race(size, offset, kind):
    """Bytes 2 and 3 are written, then others of the same word or of the next."""
    overlap = set(range(offset, offset + size)) & {2, 3}
    statements = FIRST + access("write", 2, 2), SECOND + access(kind, size, offset)
    assert found(*statements) == ({"shared race"} if overlap else set())


def test_the_same_value_races_too_unless_it_is_one_instruction():
    one = "or.pred %p3, %p1, %p2; @%p3 " + access("write", 4, 0)
    assert not found(one)
    assert found(FIRST + access("write", 4, 0), SECOND + access("write", 4, 0)) == {"shared race"}


def test_a_thread_is_in_order_with_itself():
    statements = [access("write", 4, 0), access("read", 4, 0), access("write", 2, 2)]
    assert not found(*(FIRST + statement for statement in statements))


def test_a_barrier_orders_all_that_was_before_it():
    """The write two barriers ago, and a read since then by another thread."""
    write, read = access("write", 4, 0), access("read", 4, 0)
    assert not found(FIRST + write, "bar.sync 0;", read, "bar.sync 0;", SECOND + write)
    assert found(FIRST + write, "bar.sync 0;", read, SECOND + write) == {"shared race"}


def test_atomic_looking_updates_of_neighbours_are_none():
    """Each thread reads a word and writes it back, of which it means one byte."""
    body = "ld.shared.u32 %r4, [%r2]; add.u32 %r4, %r4, 1; {}st.shared.u32 [%r2], %r4;"
    assert found(FIRST + body.format(FIRST), SECOND + body.format(SECOND)) == {"shared race"}


def test_memory_of_the_ctas_is_apart():
    """The same address in two CTAs without a cluster."""
    assert not found(FIRST + access("write", 4, 0), FIRST + access("read", 4, 0), ctas=2)


REMOTE = (
    "cvta.shared.u64 %d10, memory; mov.u32 %r7, %cluster_ctarank; xor.b32 %r8, %r7, 1;"
    "mapa.u64 %d11, %d10, %r8; setp.eq.u32 %p3, %r7, 0; and.pred %p4, %p1, %p3;"
    "not.pred %p5, %p3; and.pred %p5, %p1, %p5;\n"
)
SYNC = "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;"


@pytest.mark.parametrize(
    ("theirs", "own", "between", "races"),
    [
        ("st.u32 [%d11+4], 5;", "ld.shared.u32 %r9, [%r2+4];", "", True),
        ("st.u32 [%d11+4], 5;", "ld.shared.u32 %r9, [%r2+4];", "bar.sync 0;", True),
        ("st.u32 [%d11+4], 5;", "ld.shared.u32 %r9, [%r2+4];", SYNC, False),
        ("st.u32 [%d11+4], 5;", "ld.shared.u32 %r9, [%r2+8];", "", False),
        ("st.u32 [%d11+4], 5;", "st.shared.u32 [%r2+4], 5;", "", True),
        ("st.u8 [%d11+4], 5;", "st.shared.u8 [%r2+5], 5;", "", False),
        ("ld.u32 %r9, [%d11+4];", "st.shared.u32 [%r2+4], 5;", "", True),
        ("ld.u32 %r9, [%d11+4];", "st.shared.u32 [%r2+4], 5;", SYNC, False),
        ("ld.u32 %r9, [%d11+4];", "ld.shared.u32 %r9, [%r2+4];", "", False),
    ],
)
def test_another_ctas_memory(theirs, own, between, races):
    """The first CTA accesses the second's, which accesses its own."""
    statements = REMOTE, SYNC, "@%p4 " + theirs, between, "@%p5 " + own, SYNC
    assert found(*statements, ctas=2, cluster=2) == ({"shared race"} if races else set())


def happens_before(earlier, later):
    """Order by barriers, of accesses (thread, cluster, CTA and warp barriers passed, writes)."""
    (a, *before, _), (b, *after, _) = earlier, later
    return (
        a == b
        or (a // 128 == b // 128 and before[0] < after[0])
        or (a // 64 == b // 64 and before[:2] < after[:2])
        or (a // 32 == b // 32 and before < after)
    )


@pytest.mark.parametrize("seed", range(12))
def test_records_of_a_byte_find_a_race_if_there_is_one(seed):
    """Single accesses by threads of two clusters of two CTAs, against all pairs."""
    random = np.random.default_rng(seed)
    outcomes = []
    for _ in range(150):
        records = {name: np.zeros(1, kind) for name, kind in races.FIELDS.items()}
        time, accesses, reported = [0, 0, 0], [], False
        for _ in range(5):
            level = random.choice([0, 1, 2], p=[0.2, 0.3, 0.5])
            if level < 2:  # a barrier that all threads pass
                time[level] += 1
                time[1] += level == 0
            near = random.random() < 0.9
            thread, writes = int(random.integers(128 if near else 256)), random.random() < 0.4
            accesses.append((thread, *time, writes))
            by = races.Threads(
                np.array([thread]), races.time_of(*(np.array([t]) for t in time)), 64, 128
            )
            reported |= bool(races.check(records, np.zeros(1, int), by, store=writes))
        real = any(
            (a[-1] or b[-1]) and not happens_before(a, b)
            for a, b in itertools.combinations(accesses, 2)
        )
        outcomes.append((real, reported))
    assert {real for real, _ in outcomes} == {True, False}
    assert [reported for _, reported in outcomes] == [real for real, _ in outcomes]
