"""The cpu backend beside torch.compile and eager, in one run, taking turns, warm and cold.

Four jobs: `token_stats` (two outputs from one tensor of logits), `token_kl` (five from two), the
latter followed by the gradient of logprob + kl + entropy, and a policy loss with its gradient, in
one visit of the logits and in two. Nothing is timed before it was found right in float64.

Cold is a call after reading several times what the last-level caches hold: as a model leaves its
logits, which are larger. Warm is the same call again right after it, so that logits that fit are in
the cache. Times on a shared machine drift, so every round times each contender once either way, and
ratios are what to read. Where others wait for the same cores, only `--threads 1 --clock thread` is
right: the time that the thread had a core.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.common.bootstrap import Array
from bench.common.formulas import (
    Call,
    check,
    eager,
    eager_stats,
    gradient_of,
    make_inputs,
    on_policy,
    one_visit,
    our_stats,
    ours,
    two_visits,
    with_gradient,
)
from bench.common.machine import (
    Clock,
    PeakMemory,
    last_level_cache_bytes,
    page_faults,
    read_bandwidth,
    read_write_bandwidth,
    record,
)
from bench.common.timing import cold_buffer, timed

CHECKED_ROWS = 4
# Tensors of logits that must pass through memory at the least, reads and writes.
PASSES = {"stats": 1, "forward": 2, "forward+backward": 5, "policy loss": 3}
WRITES = ("forward+backward", "policy loss")  # jobs that write one of them
CLOCKS = {"wall": time.perf_counter, "thread": time.thread_time}
OURS = "kl_kernels"
STATES = ("cold", "warm")  # in this order: the cold call warms up the other


@dataclass(frozen=True)
class Times:
    """A contender's calls in one state of the caches."""

    median_ms: float
    fastest_ms: float
    slowest_ms: float
    ratio: float  # to ours of the same round: the median, the lowest and the highest
    lowest_ratio: float
    highest_ratio: float

    @classmethod
    def of(cls, seconds: Array, ours: Array) -> Times:  # [rounds], [rounds]
        shown = (np.median, np.min, np.max)
        return cls(*(float(f(x)) for x in (1e3 * seconds, seconds / ours) for f in shown))

    def __str__(self) -> str:
        return f"{self.median_ms:9.2f}{self.fastest_ms:9.2f}{self.slowest_ms:9.2f}{self.ratio:7.2f}"


@dataclass(frozen=True)
class Measurement:
    job: str
    contender: str
    dtype: str
    rows: int
    vocab_size: int
    warm: Times
    cold: Times
    cold_gb_per_s: float  # rate of the bytes that must move at the least, at the median
    page_faults: float  # per call
    extra_mb: float  # peak resident memory on top of the inputs

    HEADER = (
        f"{'job':17}{'dtype':10}{'rows':>5} {'contender':14}"
        + "".join(f"{state:>9}{'fastest':>9}{'slowest':>9}{'ratio':>7}" for state in STATES)
        + f"{'GB/s':>7}{'faults':>8}{'extra MB':>9}"
    )

    def __str__(self) -> str:
        return (
            f"{self.job:17}{self.dtype:10}{self.rows:5} {self.contender:14}{self.cold}{self.warm}"
            f"{self.cold_gb_per_s:7.1f}{self.page_faults:8.0f}{self.extra_mb:9.0f}"
        )


def contenders(job: str) -> dict[str, Call]:
    if job == "policy loss":
        by_the_book = two_visits(eager)
        return {
            OURS: gradient_of(one_visit),
            "in two visits": gradient_of(two_visits(ours)),
            "torch.compile": gradient_of(torch.compile(by_the_book, dynamic=False)),
            "eager": gradient_of(by_the_book),
        }
    run = with_gradient if job == "forward+backward" else torch.no_grad()
    mine, by_the_book = (our_stats, on_policy(eager_stats)) if job == "stats" else (ours, eager)
    return {
        OURS: run(mine),
        "torch.compile": run(torch.compile(by_the_book, dynamic=False)),
        "eager": run(by_the_book),
    }


def measure(
    job: str,
    n_rows: int,
    vocab_size: int,
    dtype: torch.dtype,
    rounds: int,
    cold: torch.Tensor,
    clock: Clock,
) -> list[Measurement]:
    inputs = make_inputs(n_rows, vocab_size, dtype)
    calls = contenders(job)
    extra = {}
    for name, call in calls.items():
        call(*inputs)  # warms up, and lets torch.compile compile
        with PeakMemory() as peak:
            call(*inputs)
        extra[name] = peak.extra
    seconds, faults = interleaved(calls, inputs, rounds, cold, clock)
    return [
        Measurement(
            job=job,
            contender=name,
            dtype=str(dtype).removeprefix("torch."),
            rows=n_rows,
            vocab_size=vocab_size,
            **{state: Times.of(taken[state], seconds[OURS][state]) for state in STATES},
            cold_gb_per_s=PASSES[job] * inputs[0].nbytes / statistics.median(taken["cold"]) / 1e9,
            page_faults=faults[name],
            extra_mb=extra[name] / 1e6,
        )
        for name, taken in seconds.items()
    ]


def interleaved(
    calls: dict[str, Call],
    inputs: tuple[Any, ...],
    rounds: int,
    cold: torch.Tensor,
    clock: Clock,
) -> tuple[dict[str, dict[str, Array]], dict[str, float]]:
    """Return seconds [rounds] by contender and state, and page faults per call by contender."""
    seconds = {name: {state: np.empty(rounds) for state in STATES} for name in calls}
    faults = dict.fromkeys(calls, 0.0)
    for i in range(rounds):
        for name, call in calls.items():
            for state in STATES:
                before = page_faults()
                sweeper = cold if state == "cold" else None
                seconds[name][state][i] = timed(partial(_spread, call), inputs, sweeper, clock)
                faults[name] += (page_faults() - before) / (rounds * len(STATES))
    return seconds, faults


def _spread(call: Call, inputs: tuple[Any, ...]) -> None:
    call(*inputs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--vocab", type=int, default=131072)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32", "float16"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results/cpu.json")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    args = parser.parse_args()
    if args.clock == "thread" and args.threads > 1:
        parser.error("--clock thread sees one thread: it needs --threads 1")
    clock = CLOCKS[args.clock]
    torch.set_num_threads(args.threads)
    cache_bytes = last_level_cache_bytes()
    cold = cold_buffer(cache_bytes)
    results = record() | {
        "cache_bytes": cache_bytes,
        "swept_bytes": cold.nbytes,
        "rounds": args.rounds,
        "clock": args.clock,
        "read_gb_per_s": read_bandwidth(clock=clock) / 1e9,
        "read_write_gb_per_s": read_write_bandwidth(clock=clock) / 1e9,
    }
    print(f"{results['device']}, {args.threads} threads, reads {results['read_gb_per_s']:.1f} GB/s")
    print(Measurement.HEADER)
    start, measurements = time.monotonic(), []
    for dtype in (getattr(torch, name) for name in args.dtypes):
        check(CHECKED_ROWS, args.vocab, dtype)
        for n_rows in args.rows:
            for job in PASSES:
                found = measure(job, n_rows, args.vocab, dtype, args.rounds, cold, clock)
                print("\n".join(map(str, found)), flush=True)
                measurements += [asdict(m) for m in found]
                torch.compiler.reset()
    results |= {"load_average_at_end": round(os.getloadavg()[0], 2), "measurements": measurements}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written to {args.out} after {(time.monotonic() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
