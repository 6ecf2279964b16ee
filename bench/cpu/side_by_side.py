"""The cpu backend beside torch.compile and eager, in one run, taking turns.

Three jobs: `token_kl` (five outputs from two tensors of logits), the same followed by the gradient
of logprob + kl + entropy, and a policy loss with its gradient, in one visit of the logits and in
two. Nothing is timed before it was found right in float64. Times on a shared machine drift, so
every round times each contender once, and ratios are what to read.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench.common.formulas import (
    Call,
    check,
    eager,
    gradient_of,
    make_inputs,
    one_visit,
    ours,
    two_visits,
    with_gradient,
)
from bench.common.machine import PeakMemory, page_faults, read_bandwidth, record

CHECKED_ROWS = 4
# Tensors of logits that must pass through memory at the least, reads and writes.
PASSES = {"forward": 2, "forward+backward": 5, "policy loss": 3}


@dataclass(frozen=True)
class Measurement:
    job: str
    contender: str
    dtype: str
    rows: int
    vocab_size: int
    median_ms: float
    fastest_ms: float
    slowest_ms: float
    ratio: float  # median over ours
    gb_per_s: float  # rate of the bytes that must move at the least, at the median
    page_faults: float  # per call
    extra_mb: float  # peak resident memory on top of the inputs

    HEADER = (
        f"{'job':17}{'dtype':10}{'rows':>5} {'contender':14}{'median ms':>10}{'fastest':>9}"
        f"{'slowest':>9}{'ratio':>7}{'GB/s':>7}{'faults':>8}{'extra MB':>9}"
    )

    def __str__(self) -> str:
        return (
            f"{self.job:17}{self.dtype:10}{self.rows:5} {self.contender:14}{self.median_ms:10.2f}"
            f"{self.fastest_ms:9.2f}{self.slowest_ms:9.2f}{self.ratio:7.1f}{self.gb_per_s:7.1f}"
            f"{self.page_faults:8.0f}{self.extra_mb:9.0f}"
        )


def contenders(job: str) -> dict[str, Call]:
    if job == "policy loss":
        by_the_book = two_visits(eager)
        return {
            "kl_kernels": gradient_of(one_visit),
            "in two visits": gradient_of(two_visits(ours)),
            "torch.compile": gradient_of(torch.compile(by_the_book, dynamic=False)),
            "eager": gradient_of(by_the_book),
        }
    run = torch.no_grad() if job == "forward" else with_gradient
    return {
        "kl_kernels": run(ours),
        "torch.compile": run(torch.compile(eager, dynamic=False)),
        "eager": run(eager),
    }


def measure(
    job: str, n_rows: int, vocab_size: int, dtype: torch.dtype, rounds: int
) -> list[Measurement]:
    inputs = make_inputs(n_rows, vocab_size, dtype)
    calls = contenders(job)
    extra = {}
    for name, call in calls.items():
        call(*inputs)  # warms up, and lets torch.compile compile
        with PeakMemory() as peak:
            call(*inputs)
        extra[name] = peak.extra
    times: dict[str, list[float]] = {name: [] for name in calls}
    faults = dict.fromkeys(calls, 0)
    for _ in range(rounds):
        for name, call in calls.items():
            faults_before, start = page_faults(), time.perf_counter()
            call(*inputs)
            times[name].append(time.perf_counter() - start)
            faults[name] += page_faults() - faults_before
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    return [
        Measurement(
            job=job,
            contender=name,
            dtype=str(dtype).removeprefix("torch."),
            rows=n_rows,
            vocab_size=vocab_size,
            median_ms=1e3 * medians[name],
            fastest_ms=1e3 * min(taken),
            slowest_ms=1e3 * max(taken),
            ratio=medians[name] / medians["kl_kernels"],
            gb_per_s=PASSES[job] * inputs[0].nbytes / medians[name] / 1e9,
            page_faults=faults[name] / rounds,
            extra_mb=extra[name] / 1e6,
        )
        for name, taken in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[128, 64])
    parser.add_argument("--vocab", type=int, default=131072)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32", "float16"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results/cpu.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = record() | {"read_gb_per_s": read_bandwidth() / 1e9}
    print(f"{results['device']}, {args.threads} threads, reads {results['read_gb_per_s']:.1f} GB/s")
    print(Measurement.HEADER)
    measurements = []
    for dtype in (getattr(torch, name) for name in args.dtypes):
        check(CHECKED_ROWS, args.vocab, dtype)
        for n_rows in args.rows:
            for job in PASSES:
                found = measure(job, n_rows, args.vocab, dtype, args.rounds)
                print("\n".join(map(str, found)), flush=True)
                measurements += [asdict(m) for m in found]
                torch.compiler.reset()
    results |= {"load_average_at_end": round(os.getloadavg()[0], 2), "measurements": measurements}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
