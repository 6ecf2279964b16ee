"""kl_kernels beside its peers, operation by operation: `make bench`.

A contender is timed when its results were found right in float64, on the tensors it is timed with;
a peer that is wrong, or fails, is left out with its reason. If ours is wrong, the benchmark fails.
Before each of its rounds ours runs once, so that the ratio of the two is one of neighbours in time.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from conftest import Collected, median_of_pairs

from bench.common.machine import page_faults
from bench.common.timing import timed
from bench.peers.compare import (
    DEVICE,
    Case,
    Wrong,
    benchmarks,
    check,
    extra_bytes,
    free_memory,
    memory_of,
    name_of,
    too_large,
)
from bench.peers.contenders import OURS, Call, Contender, Unavailable, contenders

SECONDS, FEWEST, MOST = 0.7, 7, 40  # a contender's time, and its least and most rounds


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    pairs = benchmarks(*map(metafunc.config.getoption, ("--full", "--only")))
    names = [name_of(str(case), contender.name) for case, contender in pairs]
    metafunc.parametrize(("case", "contender"), pairs, ids=names)


class Ours:
    """The call that all others are held against, and the case whose tensors are there."""

    case: Case | None = None
    call: Call | None = None

    @classmethod
    def of(cls, case: Case) -> Call:
        if cls.case is not case:
            if cls.case is not None:
                cls.case.forget()
            cls.case, cls.call = case, contenders(case.operation.name)[0].ready()
        return cls.call


@pytest.fixture(scope="session")
def memory_of_all(request: pytest.FixtureRequest) -> Callable[[str], dict[str, int]]:
    """Return a function from a family to the memory of all its calls in this run."""

    @cache
    def of(family: str) -> dict[str, int]:
        asked = [item.callspec.params for item in request.session.items]
        mine = {str(p["case"]): p["case"] for p in asked if p["contender"].family == family}
        free = free_memory()
        return memory_of(family, [c for c in mine.values() if not too_large(c.size, free)])

    return of


def test_operation(
    benchmark: Any,
    collected: Collected,
    memory_of_all: Callable[[str], dict[str, int]],
    case: Case,
    contender: Contender,
) -> None:
    operation = case.operation.name

    def leave_out(reason: str) -> None:
        collected.leave_out(operation, contender.name, reason)
        pytest.skip(reason)

    if collected.is_over:
        leave_out("the time was up")
    if reason := too_large(case.size, free_memory()):
        leave_out(reason)
    ours = Ours.of(case)
    try:
        call = ours if contender.name == OURS else contender.ready()
        errors = check(case, contender, call)
    except Exception as error:
        if contender.name == OURS:
            raise
        expected = isinstance(error, (ImportError, Unavailable, Wrong))
        told = str(error).strip() or "no message"
        leave_out(told if expected else f"{type(error).__name__}: {told.splitlines()[0]}")

    x = case.inputs
    cold = torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE) if DEVICE == "cuda" else None
    ours_took: list[float] = []
    took: list[float] = []
    faults: list[int] = []

    def before() -> None:
        """Ours, in the same round."""
        if contender.name != OURS:
            ours_took.append(timed(ours, x, cold))

    def run() -> None:
        faults_before = page_faults()
        took.append(timed(call, x, cold))
        faults.append(page_faults() - faults_before)

    ours(x), run()
    once = timed(call, x, cold)
    rounds = int(min(MOST, max(FEWEST, SECONDS / once)))
    benchmark.group = str(case)
    benchmark.pedantic(run, setup=before, rounds=rounds, iterations=1)
    took = took[-rounds:]
    median = statistics.median(took)
    if DEVICE == "cuda":
        extra = extra_bytes(call, x)
    else:
        extra = memory_of_all(contender.family)[f"{contender.name}: {case}"]
    rate = case.n_bytes / median
    row = {
        "operation": operation,
        "contender": contender.name,
        "family": contender.family,
        "size": str(case.size),
        **vars(case.size),
        "dtype": str(case.dtype).removeprefix("torch."),
        "median_ms": 1e3 * median,
        "fastest_ms": 1e3 * min(took),
        "slowest_ms": 1e3 * max(took),
        "rounds": rounds,
        "ratio": median_of_pairs(took, ours_took) if ours_took else 1.0,
        "gb_per_s": rate / 1e9,
        "share": rate / collected.read_bytes_per_s,
        "extra_mb": extra / 1e6,
        "page_faults": sum(faults[-rounds:]) / rounds,
        **errors,
        "note": contender.note,
    }
    benchmark.extra_info.update(row)
    collected.add(row)
