"""Growth of the cpu backend's time and memory with the vocabulary and with the rows.

Three jobs: `token_kl` (five outputs), the same with the gradient of logprob + kl + entropy, and
`fused_policy_loss` with its gradient; eager PyTorch beside them, and torch.compile (one program for
all shapes) beside the first. Every round times each contender at each size once, without page
faults. Growth is the slope of log time over log size: 1 is linear. Memory is the peak on top of the
inputs, in a process per job and contender.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.common.bootstrap import Array, interval
from bench.common.formulas import Call, eager, gradient_of, make_inputs, one_visit, ours, two_visits
from bench.common.formulas import with_gradient as gradient
from bench.common.machine import PeakMemory, record
from kl_kernels.lab.documents import Block, Heading, Picture, Table, Text

JOBS = ("forward", "forward+backward", "policy loss")
OURS, EAGER, COMPILED = "kl_kernels", "eager", "torch.compile"
DTYPE = torch.bfloat16
# The sizes that grow, and those that stay constant meanwhile.
AXES: dict[str, list[tuple[int, int]]] = {  # (rows, vocab size)
    "vocab_size": [(32, 1 << i) for i in range(11, 19)],
    "rows": [(1 << i, 16384) for i in range(10)],
}
FIXED_SHARE = 0.1  # part of the time; a larger fixed cost hides the growth
FEWEST = 3  # sizes of a fit


def contenders(job: str) -> dict[str, Call]:
    if job == "policy loss":
        return {OURS: gradient_of(one_visit), EAGER: gradient_of(two_visits(eager))}
    run: Callable[[Call], Call] = torch.no_grad() if job == "forward" else gradient
    found = {OURS: run(ours), EAGER: run(eager)}
    if job == "forward":
        found[COMPILED] = run(torch.compile(eager, dynamic=True))
    return found


# Time.


def timings(rounds: int) -> list[dict[str, Any]]:
    """A curve for each job, axis and contender: seconds of each round at each size."""
    curves = []
    for axis, shapes in AXES.items():
        inputs = [make_inputs(*shape, DTYPE) for shape in shapes]
        for job in JOBS:
            calls = contenders(job)
            seconds = np.array([one_round(calls, inputs) for _ in range(rounds + 1)])[1:]  # warm
            for i, name in enumerate(calls):
                curve = {"job": job, "axis": axis, "contender": name}
                curves.append(curve | growth(sizes(axis), seconds[:, i]))
                print(time_line(curves[-1]), flush=True)
    return curves


def one_round(calls: dict[str, Call], inputs: list[tuple[Any, ...]]) -> list[list[float]]:
    """Seconds by contender and size. A contender's sizes follow one another, after a first call
    that is not timed: it pays for what the contender before it left behind.
    """
    seconds: list[list[float]] = [[] for _ in calls]
    for taken, call in zip(seconds, calls.values()):
        call(*inputs[0])
        for tensors in inputs:
            start = time.perf_counter()
            call(*tensors)
            taken.append(time.perf_counter() - start)
    return seconds


def keep_freed_memory() -> None:
    """Otherwise large results get new pages at every call, which the system clears at its price.

    glibc: no block is a mapping of its own (M_MMAP_MAX), and the heap never shrinks
    (M_TRIM_THRESHOLD).
    """
    libc = ctypes.CDLL(None)
    if not (libc.mallopt(-4, 0) and libc.mallopt(-1, 2**31 - 1)):
        raise RuntimeError("mallopt refuses: times would hold page faults")


def sizes(axis: str) -> list[int]:
    return [shape[1 if axis == "vocab_size" else 0] for shape in AXES[axis]]


def growth(size: list[int], seconds: Array) -> dict[str, Any]:
    """Fit one curve's slope, from seconds [rounds, sizes], where the fixed cost is small."""
    medians = np.median(seconds, 0)
    first = first_of_growth(size, medians)

    def slope(rounds: Array) -> float:
        return log_slope(size[first:], np.median(rounds, 0)[first:])

    low, high = interval(seconds, slope)
    return {
        "sizes": size,
        "median_ms": (1e3 * medians).tolist(),
        "fastest_ms": (1e3 * seconds.min(0)).tolist(),
        "slowest_ms": (1e3 * seconds.max(0)).tolist(),
        "fitted_from": size[first],
        "slope": slope(seconds),
        "slope_low": low,
        "slope_high": high,
        "fixed_ms": 1e3 * line(size, medians)[0],
    }


def log_slope(size: list[int], seconds: Array) -> float:
    """The exponent of seconds ~ size^exponent: least squares on logarithms."""
    return float(np.polyfit(np.log(size), np.log(seconds), 1)[0])


def line(size: list[int], seconds: Array) -> tuple[float, float]:
    """(fixed, per unit) of seconds = fixed + per unit * size, with the least relative squares."""
    matrix = np.stack([np.ones(len(size)), np.asarray(size, float)], 1) / seconds[:, None]
    (fixed, per_unit), *_ = np.linalg.lstsq(matrix, np.ones(len(size)), rcond=None)
    return max(0.0, float(fixed)), float(per_unit)


def first_of_growth(size: list[int], seconds: Array) -> int:
    """The first size at which the fixed cost takes less than FIXED_SHARE of the time."""
    fixed, _ = line(size, seconds)
    found = [i for i, total in enumerate(seconds) if fixed < FIXED_SHARE * total]
    return min(found[0] if found else len(size), len(size) - FEWEST)


def time_line(curve: dict[str, Any]) -> str:
    return (
        f"{curve['job']:18}{curve['axis']:12}{curve['contender']:15}"
        f"{curve['median_ms'][0]:9.3f} to {curve['median_ms'][-1]:9.2f} ms, slope "
        f"{curve['slope']:.3f} [{curve['slope_low']:.3f}, {curve['slope_high']:.3f}] "
        f"from {curve['fitted_from']}"
    )


# Memory.


def memory(job: str, contender: str) -> dict[str, Any]:
    """Peak bytes on top of the inputs, and those of the results, at every size: in this process."""
    call = contenders(job)[contender]
    call(*make_inputs(4, 1024, DTYPE))  # loads what is loaded at the first call
    found: dict[str, Any] = {"job": job, "contender": contender}
    for axis, shapes in AXES.items():
        peaks, results = [], []
        for shape in shapes:
            tensors = make_inputs(*shape, DTYPE)
            with PeakMemory() as peak:
                out = call(*tensors)
            peaks.append(peak.extra)
            results.append(sum(t.nbytes for t in out))
            del out
        found[axis] = {"sizes": sizes(axis), "peak_bytes": peaks, "result_bytes": results}
    return found


def memory_in_its_own_process(job: str, contender: str) -> dict[str, Any]:
    command = [sys.executable, "-m", __spec__.name, "--memory-of", job, contender]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# Pictures and tables.


def pictures(results: dict[str, Any]) -> dict[str, bytes]:
    """SVG, by name."""
    # Imported here: the processes that memory is measured in draw nothing.
    from bench.cpu.growth_figures import memory_picture, time_picture

    return {"growth_time": time_picture(results), "growth_memory": memory_picture(results)}


def blocks(results: dict[str, Any]) -> list[Block]:
    header = ("job", "with", "contender", "slope (95 % interval)", "fitted from", "fixed cost")
    rows = [
        (
            curve["job"],
            {"vocab_size": "vocabulary", "rows": "rows"}[curve["axis"]],
            curve["contender"],
            f"{curve['slope']:.2f} ({curve['slope_low']:.2f} to {curve['slope_high']:.2f})",
            f"{curve['fitted_from']}",
            f"{curve['fixed_ms']:.2f} ms",
        )
        for curve in results["time"]
    ]
    return [
        Heading("Growth with the vocabulary and with the rows"),
        Text(
            "A slope of 1 on logarithmic axes is linear growth: twice the logits, twice the time. "
            "It is fitted by least squares to the logarithms, from the size on at which the fixed "
            f"cost of a call is less than {FIXED_SHARE:.0%} of its time; the fixed cost is that of "
            "a straight line through all sizes."
        ),
        Picture("growth_time", "Time of a call against the vocabulary and against the rows"),
        Table(header, rows),
        Picture("growth_memory", "Memory of a call on top of its inputs"),
        Text(
            "Times are without page faults: the allocator keeps what is freed. Memory is the peak "
            "on top of the inputs, in a process per job and contender; dashed: "
            "what the results alone take. "
            f"bfloat16 logits on {results['device']}, {results['threads']} thread(s), medians of "
            f"{results['rounds']} interleaved rounds; commit {results['commit']}. From "
            "`bench/results/growth.json`, made by `make bench-growth`."
        ),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    # One: a second joins in above some size, which bends the curve.
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory-of", nargs=2, metavar=("JOB", "CONTENDER"), help="this alone")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parents[1] / "results" / "growth.json"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(json.dumps(memory(*args.memory_of)))
        return 0
    results = record() | {"rounds": args.rounds, "dtype": str(DTYPE).removeprefix("torch.")}
    results["memory"] = [
        memory_in_its_own_process(job, name) for job in JOBS for name in (OURS, EAGER)
    ]
    keep_freed_memory()
    results["time"] = timings(args.rounds)
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
