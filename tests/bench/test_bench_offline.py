"""`bench/offline/measure.py` counts a foreign kernel as its own host code launches it."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from kl_kernels.lab.codegen import sass
from kl_kernels.lab.codegen.chips import CHIPS

LOGITS = 8192 * 128256


@pytest.fixture(scope="module")
def counted():
    """Figures of the kernels in foreign_kernel.py, and what it says about their launches."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("foreign_kernel.py")
    env["PYTHONPATH"] = str(script.parent.parent)
    command = [sys.executable, "-W", "ignore", str(script)]
    done = subprocess.run(command, env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def test_launches_are_what_the_host_code_chooses_on_an_h200(counted):
    _, said = counted
    assert said == "sum_of_exponentials {'num_warps': 8} scaled {}\n"


def test_a_foreign_kernel_is_counted_per_logit(counted):
    row = counted[0]["sum_of_exponentials"]
    assert (row["reads"], row["written"], row["num_warps"]) == (2, 0, 8)
    maximum, total = row["loops"]
    assert (maximum["mufu"], total["mufu"]) == (0, 1)
    for loop in (maximum, total):
        assert loop["load_bytes"] == 16
        assert loop["loads"] == 1 / 8
        assert loop["units"] == 4096 / (32 * 8)
        assert (loop["barriers"], loop["shuffles"]) == (0, 0)
        assert 2 < loop["instructions"] < 10  # unpack, compare, and 2^(x - m) and its sum
    assert row["instructions"] == maximum["instructions"] + total["instructions"]
    assert (row["stack"], row["spills"]) == (0, 0)


def test_a_kernel_without_a_loop_is_counted_as_a_whole(counted):
    row = counted[0]["scaled"]
    # The row's factor is read, too, but once for the whole tile.
    assert (row["reads"], row["written"]) == (1, 2)
    (loop,) = row["loops"]
    assert loop["units"] == 2048 / (32 * 4)


def test_the_least_time_follows_from_the_counts(counted):
    bandwidth = CHIPS["h200"].bandwidth
    assert counted[0]["scaled"]["least_ms"] == pytest.approx(1e3 * LOGITS * 4 / bandwidth)
    row = counted[0]["sum_of_exponentials"]
    # 792 rows in flight (6 blocks on each of 132 SMs) are 203 MB: the L2 holds none when the
    # second loop begins at a row's start.
    assert row["l2_hits"] == 0
    assert row["limits_ms"]["memory"] == pytest.approx(1e3 * LOGITS * 4 / bandwidth)


def test_what_is_not_the_expected_code_is_refused(counted):
    assert counted[0]["one loop"].endswith("2 loops that read memory, not ('one',)")
    assert counted[0]["four bytes"] == "a loop reads 2 bytes per tile's unit, not 4"


def test_a_program_is_counted_without_its_padding():
    listing = """
        /*0000*/  LDG.E.128 R4, [R2.64] ;
        /*0010*/  @P0 BRA 0x30 ;
        /*0020*/  STL [R1], R4 ;
        /*0030*/  EXIT ;
        /*0040*/  BRA 0x40;
        /*0050*/  NOP;
    """
    program = sass.program(listing, units=8)
    assert program.opcodes == Counter({"LDG.E.128": 1, "BRA": 1, "STL": 1, "EXIT": 1})
    assert (program.read, program.widest_load) == (2, 16)
