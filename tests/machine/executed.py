"""`make counters`: what kernels execute and ask of memory, counted while the machine runs them."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.common.machine import record
from kl_kernels.files import write_text

from .blocks import Block, Kernel
from .counters import Counters, Traffic
from .cuda_launches import CudaLaunches, nvcc_version
from .executed_jobs import Job, jobs
from .launches import Launches, summary
from .threads import WARP
from .triton_launches import TritonLaunches

RESULTS = Path(__file__).parents[2] / "bench/results/executed.json"
BACKENDS = {"triton": TritonLaunches, "cuda": CudaLaunches}
ACCESSES = [(space, access) for space in ("global", "shared") for access in ("load", "store")]
READS_LOGITS = 0.5  # of their bytes: kernels that read less work on tokens


def count(wanted: Iterable[Job]) -> list[dict[str, Any]]:
    """Rows of figures, one for each kernel of each job."""
    rows = []
    by_target: dict[tuple[str, str], list[Job]] = {}
    for job in wanted:
        by_target.setdefault((job.backend, job.arch), []).append(job)
    for (backend, arch), members in by_target.items():
        with BACKENDS[backend](arch, counting=True) as launches:
            operators = launches.operators(launches.kernels())
            for job in members:
                rows += run(job, launches, operators)
    return rows


def run(job: Job, launches: Launches, operators: Any) -> list[dict[str, Any]]:
    started = time.perf_counter()
    getattr(operators, job.operator)(job.arguments())
    faults = launches.take_faults()
    if faults:
        raise RuntimeError(f"{job.label}: {summary(faults)}")
    counters = launches.counters.pop()
    found = [figures(job, kernel, counters) for kernel in counters.kernels.values()]
    print(f"{job.label}: {time.perf_counter() - started:.1f} s", flush=True)
    return found


def figures(job: Job, kernel: Kernel, counters: Counters) -> dict[str, Any]:
    name = kernel.function.name
    logits = job.rows * job.vocab_size * job.dtype.itemsize * (1 + job.has_ref)
    read = counters.total(name, "load", "global").n_bytes
    over_logits = read >= READS_LOGITS * logits
    units = job.rows * (job.vocab_size if over_logits else 1)
    unit = ("pair" if job.has_ref else "logit") if over_logits else "token"
    row = {
        "job": job.name,
        "backend": job.backend,
        "arch": job.arch,
        "dtype": str(job.dtype).removeprefix("torch."),
        "vocab_size": job.vocab_size,
        "rows": job.rows,
        "kernel": plain(name),
        "unit": unit,
        "instructions": WARP * counters.warp_instructions[name] / units,
    }
    for space, access in ACCESSES:
        row[f"{space} {access}"] = per_request(counters.total(name, access, space), units)
    row["loops"] = loops(kernel, counters, logits) if over_logits else []
    return row


def per_request(traffic: Traffic, units: int) -> dict[str, float]:
    requests = max(traffic.requests, 1)
    return {
        "requests": traffic.requests,
        "bytes per unit": traffic.n_bytes / units,
        "bytes": traffic.n_bytes / requests,
        "sectors": traffic.units / requests,
        "conflicts": traffic.conflicts,
    }


def loops(kernel: Kernel, counters: Counters, logits: int) -> list[dict[str, Any]]:
    """The innermost loops that read memory, and what share of the logits each of them read."""
    found = []
    for first, last in innermost(kernel):
        blocks = kernel.blocks[first : last + 1]
        lines = {i.line: i for block in blocks for i in instructions(block)}
        read = {
            space: sum(
                traffic.n_bytes
                for (name, access, where, line), traffic in counters.traffic.items()
                if (name, access, where) == (kernel.function.name, "load", space) and line in lines
            )
            for space in ("global", "shared")
        }
        reads = any(i.family in ("ld", "ldmatrix") for i in lines.values())
        if reads:
            end = blocks[-1].end
            shares = {f"{space} share": n_bytes / logits for space, n_bytes in read.items()}
            found.append({"line": end.line, "source": end.where, **shares})
    return found


def innermost(kernel: Kernel) -> list[tuple[int, int]]:
    """First and last blocks of loops without a loop inside."""
    found = []
    for block in kernel.blocks:
        if block.end is not None and block.end.family == "bra":
            first = kernel.target(block.end)
            if first <= block.index and not any(first <= start for start, _ in found):
                found.append((first, block.index))
    return found


def instructions(block: Block) -> list[Any]:
    return [*block.instructions, *([block.end] if block.end else [])]


def plain(name: str) -> str:
    """The innermost name of a mangled one: "_ZN10kl_kernels4foldI..." is "fold"."""
    if not (rest := re.match(r"_ZN?", name)):
        return name
    at, found = rest.end(), name
    while length := re.match(r"\d+", name[at:]):
        at += length.end()
        found, at = name[at : at + int(length[0])], at + int(length[0])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="words of jobs' names; the results are shown")
    args = parser.parse_args()
    import triton

    wanted = [job for job in jobs() if all(word in job.label for word in args.only.split())]
    results = record() | {"triton": triton.__version__, "nvcc": nvcc_version()}
    results["kernels"] = count(wanted)
    text = json.dumps(results, indent=1) + "\n"
    if args.only:
        print(text)
    else:
        write_text(RESULTS, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
