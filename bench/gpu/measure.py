"""The GPU backends beside torch.compile and eager, and beside what the memory can do.

python -m bench.gpu.measure            # a GPU: every case, to bench/results/gpu_<chip>.json
python -m bench.gpu.measure --dry-run  # none: tiny cases of the CPU backends by wall clock

Cases come in order of importance and are left out, by name, once the time is up. Nothing is timed
before it was found right in float64. Results are written after every case.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench.common.machine import chip_name, gpu_record, record
from bench.common.timing import (
    from_python,
    interleaved,
    n_buffer_sets,
    n_rounds_of_sets,
    peak_bytes,
    replay,
)
from bench.gpu.ceilings import ceilings
from bench.gpu.jobs import JOBS, Buffers, Launch, make_buffers
from bench.gpu.table import PEERS, table

RESULTS = Path(__file__).parents[1] / "results"
VOCABULARIES = (128256, 32000, 50257, 151936, 262144)
ROWS = (1, 64, 8, 512, 1024, 65536)
FEW_ROWS = (1, 8)  # launches take longer than memory: torch.compile is the measure
PYTHON_ROWS = (1, 64)  # where the host's time of a call is shown beside
MAIN_ROWS, MAIN_VOCABULARY = 8192, VOCABULARIES[0]
TURNS = 11
# Jobs beside torch.compile alone: eager would compute them one operator at a time.
POINTWISE = ("KL gradient", "logprob gradient", "stats gradient")
# Above this share of the free memory a case is left out: results and peers need room too.
MEMORY_SHARE = 0.6


@dataclass(frozen=True)
class Case:
    job: str
    rows: int
    vocab_size: int
    peers: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.job} {self.rows} x {self.vocab_size}"

    @property
    def bytes_moved(self) -> int:
        """At the least, per launch."""
        job = JOBS[self.job]
        return (job.reads + job.writes) * self.rows * self.vocab_size * 2

    @property
    def ceiling(self) -> str:
        job = JOBS[self.job]
        return "read" if not job.writes else ("copy" if job.reads == 1 else "add")


def cases() -> list[Case]:
    """Most important first. A peer takes seconds to compile, so not every case has it."""
    main = [
        Case(job, MAIN_ROWS, MAIN_VOCABULARY, PEERS[:1] if job in POINTWISE else PEERS)
        for job in JOBS
    ]
    vocabularies, rows = VOCABULARIES[1:], ROWS
    others = [job for job in JOBS if job != "token_kl" and "+" not in job]
    return [
        *main,
        *(Case("token_kl", MAIN_ROWS, v, PEERS[:1]) for v in vocabularies),
        *(Case("token_kl", n, MAIN_VOCABULARY, PEERS[:1]) for n in rows),
        *(Case(job, 64, MAIN_VOCABULARY, PEERS[:1]) for job in others),
        *(Case(job, MAIN_ROWS, v) for job in others for v in vocabularies),
        *(
            Case(
                job, n, MAIN_VOCABULARY, PEERS[:1] if job == "token_stats" and n in FEW_ROWS else ()
            )
            for job in others
            for n in rows
            if n != 64
        ),
    ]


def dry_cases(peers: tuple[str, ...]) -> list[Case]:
    return [Case(job, rows, 1000, peers) for job in JOBS for rows in (1, 5)]


@dataclass(frozen=True)
class Measurement:
    job: str
    rows: int
    vocab_size: int
    contender: str
    median_us: float
    fastest_us: float
    slowest_us: float
    gb_per_s: float  # rate of the bytes that must move at the least, at the median
    share: float  # gb_per_s over the ceiling
    ceiling: str
    launches: int  # per timed unit
    peak_mb: float  # allocated by a call, results included
    call_us: float | None  # a call from Python, whose launch a replay hides; None at many rows

    def __str__(self) -> str:
        return (
            f"{self.job:20}{self.rows:6} x {self.vocab_size:<7}{self.contender:14}"
            f"{self.median_us:11.1f} us ({self.fastest_us:.1f} to {self.slowest_us:.1f})"
            f"{self.gb_per_s:9.0f} GB/s{self.share:6.0%} of {self.ceiling:5}{self.peak_mb:10.1f} MB"
        )


@dataclass(frozen=True)
class Bench:
    device: str
    backends: tuple[str, ...]
    l2_bytes: int
    ceilings: dict[str, float]  # bytes per second
    turns: int

    def run(self, case: Case) -> tuple[list[Measurement], dict[str, str], dict[str, str]]:
        """The measurements; by contender, the reasons for leaving it out, and its failures."""
        # Buffers are counted as read: outputs are a set's own as well.
        n_sets = n_buffer_sets(case.bytes_moved, self.l2_bytes)
        if self.device == "cuda":
            free, _ = torch.cuda.mem_get_info()
            # Two tensors of logits and a gradient in each.
            needed = 6 * case.rows * case.vocab_size * n_sets
            if needed > MEMORY_SHARE * free:
                why = f"needs {needed / 1e9:.0f} GB of {free / 1e9:.0f} GB"
                return [], {"all": why}, {}
        sets = [
            make_buffers(case.rows, case.vocab_size, self.backends, self.device, seed)
            for seed in range(n_sets)
        ]
        rounds = n_rounds_of_sets(n_sets, case.bytes_moved) if self.device == "cuda" else 1
        ready, peaks = {}, {}
        calls: dict[str, float] = {}
        left_out: dict[str, str] = {}
        failed: dict[str, str] = {}
        for name in (*self.backends, *case.peers):
            try:
                launch = self.contender(case, name, sets[0])
                peaks[name] = peak_bytes(launch, sets[0], self.device)
                if case.rows in PYTHON_ROWS:
                    calls[name] = 1e6 * from_python(launch, sets[0], self.device)
                ready[name] = replay(launch, sets, rounds, self.device)
            except torch.OutOfMemoryError:
                left_out[name] = "out of memory"
            except Exception as error:  # the other contenders are still measured
                failed[name] = f"{type(error).__name__}: {str(error)[:300]}"
        times = interleaved(ready, self.turns)
        return (
            [
                self.measurement(
                    case,
                    name,
                    times[name],
                    ready[name].n_launches,
                    peaks[name],
                    calls.get(name),
                )
                for name in ready
            ],
            left_out,
            failed,
        )

    def contender(self, case: Case, name: str, buffers: Buffers) -> Launch:
        """Warm, and right where it is ours."""
        job = JOBS[case.job]
        if name == "eager":
            return job.plain(job.formula)
        if name == "torch.compile":
            launch = job.plain(torch.compile(job.formula, dynamic=False))
            launch(buffers)
            return launch
        launch = job.ours(name)
        job.check(launch, buffers)
        return launch

    def measurement(
        self,
        case: Case,
        name: str,
        times: list[float],
        launches: int,
        peak: int,
        call_us: float | None,
    ) -> Measurement:
        median = statistics.median(times)
        return Measurement(
            job=case.job,
            rows=case.rows,
            vocab_size=case.vocab_size,
            contender=name,
            median_us=1e6 * median,
            fastest_us=1e6 * min(times),
            slowest_us=1e6 * max(times),
            gb_per_s=case.bytes_moved / median / 1e9,
            share=case.bytes_moved / median / self.ceilings[case.ceiling],
            ceiling=case.ceiling,
            launches=launches,
            peak_mb=peak / 1e6,
            call_us=call_us,
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory")
    parser.add_argument("--seconds", type=float, default=220, help="no case starts later")
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--commit", help="where the files are not in a git repository")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--dry-peers", nargs="*", default=["eager"], choices=PEERS)
    args = parser.parse_args()
    start = time.monotonic()
    torch.manual_seed(0)
    device = "cpu" if args.dry_run else "cuda"
    if args.dry_run:
        facts, backends, todo = record(), ("reference", "cpu"), dry_cases(tuple(args.dry_peers))
        size, l2_bytes = 1 << 20, 1 << 12
    else:
        facts, backends, todo = gpu_record(), ("triton", "cuda"), cases()
        size, l2_bytes = 2 << 30, torch.cuda.get_device_properties(0).L2_cache_size
    limits = ceilings(device, size)
    best = {name: max(kernels.values()) for name, kernels in limits.items()}
    # Two reads per write need no faster memory than one: whichever kernel shows more.
    best["add"] = max(best["add"], best["copy"])
    results: dict[str, Any] = facts | {
        "commit": args.commit or facts["commit"],
        "backends": backends,
        "ceilings_gb_per_s": {name: rate / 1e9 for name, rate in best.items()},
        "ceilings_by_kernel": {
            name: {kernel: rate / 1e9 for kernel, rate in kernels.items()}
            for name, kernels in limits.items()
        },
        "measurements": [],
        "left_out": {},
        "failed": {},
    }
    chip = "dry_run" if args.dry_run else chip_name(str(facts["device"]))
    args.results.mkdir(parents=True, exist_ok=True)
    path = args.results / f"gpu_{chip}.json"
    bench = Bench(device, backends, l2_bytes, best, args.turns)
    for case in todo:
        if time.monotonic() - start > args.seconds:
            results["left_out"][case.name] = "the time is up"
            continue
        try:
            found, left_out, failed = bench.run(case)
        except Exception as error:  # the other cases are still measured
            found, left_out = [], {}
            failed = {"all": f"{type(error).__name__}: {str(error)[:300]}"}
        print("\n".join(map(str, found)), flush=True)
        results["measurements"] += [asdict(m) for m in found]
        for group, reasons in (("left_out", left_out), ("failed", failed)):
            results[group] |= {f"{case.name}, {who}": why for who, why in reasons.items()}
        path.write_text(json.dumps(results, indent=1) + "\n")
        gc.collect()
        torch.compiler.reset()
        if device == "cuda":
            torch.cuda.empty_cache()
    results["seconds"] = round(time.monotonic() - start, 1)
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\nwritten to {path}\n{table(results)}")
    return int(bool(results["failed"]))


if __name__ == "__main__":
    raise SystemExit(main())
