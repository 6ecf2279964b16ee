"""Kernels execute no more, and ask for no more of memory, than the committed results say."""

import json
import os
import subprocess
import sys
from copy import deepcopy

import numpy as np
import pytest

from .executed import RESULTS, ROOT, loops, plain, shares, shown_traffic, worse
from .hand_made import aligned, kernel, launch

COMMITTED = json.loads(RESULTS.read_text())["kernels"]


def test_kernels_are_no_worse_than_the_committed_results():
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests/backends")))
    command = [sys.executable, "-m", "machine.executed", "--check"]
    result = subprocess.run(
        command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert result.returncode == 0, result.stdout


def changed(path, factor, add=0.0):
    rows = deepcopy(COMMITTED[:1])
    *where, last = path
    place = rows[0]
    for name in where:
        place = place[name]
    place[last] = place[last] * factor + add
    return rows


@pytest.mark.parametrize(
    ("path", "factor", "add"),
    [
        (("instructions",), 1.05, 0),
        (("global load", "bytes"), 0.5, 0),
        (("global load", "sector_bytes_per_unit"), 1.5, 0),
        (("global store", "bytes"), 0.5, 0),
        (("shared load", "conflicts"), 1, 0.1),
        (("shared store", "conflicts"), 1, 0.1),
    ],
)
def test_what_is_worse_is_told(path, factor, add):
    (found,) = worse(COMMITTED, changed(path, factor, add))
    assert " ".join(path) in found


def test_what_is_equal_or_better_is_not_told():
    assert worse(COMMITTED, COMMITTED) == []
    assert worse(COMMITTED, changed(("instructions",), 0.5)) == []


def test_a_kernel_that_is_not_committed_is_told():
    (row,) = deepcopy(COMMITTED[:1])
    row["kernel"] = "another"
    assert len(worse(COMMITTED, [row])) == 1


def test_loops_are_those_that_read_memory():
    """Four bytes by each of 32 threads, in each of four rounds; then a loop that reads nothing."""
    body = (
        "mul.wide.u32 %d2, %r0, 4; add.u64 %d1, %d0, %d2; mov.u32 %r2, 0;\n"
        "A: ld.global.u32 %r1, [%d1]; add.u64 %d1, %d1, 128; add.u32 %r2, %r2, 1;\n"
        "setp.ne.u32 %p1, %r2, 4; @%p1 bra A;\n"
        "B: sub.u32 %r2, %r2, 1; setp.ne.u32 %p1, %r2, 0; @%p1 bra B;"
    )
    code = kernel(body)
    (found,) = loops(code)
    assert found[2] == "other"
    counters = launch(code, [aligned(160, np.uint32)], counting=True).counters
    assert shares(code, [found], counters, 160 * 4) == {"other": 128 / 160}
    assert shown_traffic("f", "global", "load", counters, 128) == {
        "requests_per_unit": round(4 / 128, 5),
        "sector_bytes_per_unit": 4.0,
        "bytes": 128.0,
        "sectors": 4.0,
    }


def test_what_is_read_once_does_not_blur_a_request():
    """One word for all threads, of one sector, beside twelve requests of four."""
    loads = "".join(f"\nld.global.u32 %r1, [%d1 + {128 * i}];" for i in range(12))
    body = f"ld.global.u32 %r2, [%d0]; mul.wide.u32 %d2, %r0, 4; add.u64 %d1, %d0, %d2; {loads}"
    counters = launch(kernel(body), [aligned(12 * 32, np.uint32)], counting=True).counters
    found = shown_traffic("f", "global", "load", counters, 12 * 32)
    assert (found["bytes"], found["sectors"]) == (128, 4)
    assert found["sector_bytes_per_unit"] == round(32 * (12 * 4 + 1) / (12 * 32), 3)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fold_kernel", "fold_kernel"),
        ("_ZN10kl_kernels11fold_kernelINS_6LaunchEfLb1EEEvNS_4RowsE", "fold_kernel"),
        ("_Z3addi", "add"),
    ],
)
def test_names_are_shown_plain(name, expected):
    assert plain(name) == expected
