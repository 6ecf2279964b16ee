"""Counts, against what a human counts."""

import numpy as np
import pytest

from .counters import Counters, sectors, wavefronts
from .hand_made import aligned, kernel, launch

WARP = np.zeros(32, np.int64)
LANES = np.arange(32)


@pytest.mark.parametrize(
    ("at", "size", "expected"),
    [
        (4 * LANES, 4, 4),
        (4 * LANES + 4, 4, 5),
        (16 * LANES, 16, 16),
        (2 * LANES, 2, 2),
        (0 * LANES, 4, 1),
        (64 * LANES, 4, 32),
        (30 + 0 * LANES, 4, 2),  # on both sides of a border
    ],
)
def test_sectors_are_32_bytes(at, size, expected):
    assert sectors(at, size, WARP) == expected


@pytest.mark.parametrize(
    ("at", "size", "expected"),
    [
        (4 * LANES, 4, 1),
        (0 * LANES, 4, 1),  # one word for all
        (8 * LANES, 4, 2),
        (128 * LANES, 4, 32),
        (8 * LANES, 8, 2),
        (16 * LANES, 16, 4),
        (2 * LANES, 2, 1),
    ],
)
def test_wavefronts_are_of_distinct_words_in_a_bank(at, size, expected):
    assert wavefronts(at, size, WARP) == expected


@pytest.mark.parametrize(
    ("at", "size", "expected"),
    [
        (4 * LANES, 4, 0),
        (0 * LANES, 4, 0),
        (8 * LANES, 4, 1),
        (128 * LANES, 4, 31),
        (16 * LANES, 8, 2),  # each half of the warp takes two
        (16 * LANES, 16, 0),
        (32 * LANES, 16, 4),
    ],
)
def test_conflicts_are_wavefronts_that_the_bytes_do_not_need(at, size, expected):
    counters = Counters()
    counters.count("f", "load", "shared", 1, at, size, WARP)
    assert counters.total("f", "load", "shared").conflicts == expected


def test_an_asynchronous_copy_stores_once():
    body = (
        "mul.wide.u32 %d1, %r0, 16; add.u64 %d1, %d0, %d1; shl.b32 %r1, %r0, 4;\n"
        "mov.u32 %r2, memory; add.u32 %r1, %r1, %r2;\n"
        "cp.async.cg.shared.global [%r1], [%d1], 16; cp.async.commit_group; cp.async.wait_group 0;"
    )
    code = kernel(body, shared=512)
    counters = launch(code, [aligned(128, np.uint32)], counting=True).counters
    stores = counters.total("f", "store", "shared")
    assert (stores.requests, stores.units, stores.n_bytes) == (1, 4, 512)


def test_warps_are_counted_apart():
    two = np.repeat([0, 1], 32)
    at = np.concatenate([4 * LANES, 4 * LANES])
    assert sectors(at, 4, two) == 8
    assert wavefronts(at, 4, two) == 2


def test_instructions_of_a_loop():
    """Each thread of two warps goes around as often as its warp's number says, and once more."""
    body = (
        "shr.u32 %r1, %r0, 5;\n"  # block 0, with a load of p0 and of %tid: 3 instructions
        "A: setp.eq.u32 %p1, %r1, 0; sub.u32 %r1, %r1, 1; @!%p1 bra A;\n"
        "mul.wide.u32 %d8, %r0, 4; add.u64 %d9, %d0, %d8; st.global.u32 [%d9], %r0;"
    )
    machine = launch(kernel(body), [aligned(64, np.uint32)], threads=64, counting=True)
    counters = machine.counters
    assert counters.launches["f"] == 1
    assert counters.thread_instructions["f"] == 64 * (3 + 3 + 4) + 32 * 3
    assert counters.warp_instructions["f"] == 2 * (3 + 3 + 4) + 3
    stores = counters.total("f", "store", "global")
    assert (stores.requests, stores.units, stores.n_bytes) == (2, 8, 256)
    assert counters.total("f", "load", "shared").requests == 0
