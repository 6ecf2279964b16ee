"""`make counters`: what kernels execute and ask of memory, counted while the machine runs them."""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.common.machine import record
from kl_kernels.files import write_text

from .blocks import Block, Kernel
from .counters import SECTOR, Counters, Traffic
from .cuda_launches import CudaLaunches, nvcc_version
from .executed_jobs import Job, jobs, quick
from .launches import Launches, summary
from .threads import WARP
from .triton_launches import TritonLaunches

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench/results/executed.json"
FILES = {"fold.py": "kl_kernels/backends/triton/fold.py", "fold.cuh": "csrc/cuda/fold.cuh"}
FOLDS = {"fold_anchored": "fast", "fold_running_max": "careful"}
MOST = 0.9
# Counts are exact: the same compiler makes the same of them. Its next release may move an
# instruction of a loop's fifty.
SLACK = 0.02
BETTER = [  # figures that must not become worse, and whether higher is
    (("instructions",), True),
    (("global load", "bytes"), False),
    (("global load", "sector_bytes_per_unit"), True),
    (("global store", "bytes"), False),
    (("global store", "sector_bytes_per_unit"), True),
    (("shared load", "conflicts"), True),
    (("shared store", "conflicts"), True),
]
BACKENDS = {"triton": TritonLaunches, "cuda": CudaLaunches}
KINDS = [(space, access) for space in ("global", "shared") for access in ("load", "store")]
KEY = ("job", "backend", "arch", "dtype", "vocab_size", "kernel")


def count(wanted: Iterable[Job]) -> list[dict[str, Any]]:
    """Figures of each kernel of each job."""
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
    arguments = job.arguments()
    getattr(operators, job.operator)(arguments)
    if faults := launches.take_faults():
        raise RuntimeError(f"{job.label}: {summary(faults)}")
    counters = launches.counters.pop()
    found = [figures(job, arguments, kernel, counters) for kernel in counters.kernels.values()]
    print(f"{job.label}: {time.perf_counter() - started:.1f} s", flush=True)
    return found


def figures(job: Job, arguments: Any, kernel: Kernel, counters: Counters) -> dict[str, Any]:
    name = kernel.function.name
    unit, units, n_bytes = unit_of(arguments)
    if counters.total(name, "load", "global").n_bytes < n_bytes / 2:  # it does not read logits
        unit = ""
    if not unit:
        unit, units = "thread", counters.blocks[name, 0]
    parts = loops(kernel)
    in_loops = [block for first, last, _ in parts for block in kernel.blocks[first : last + 1]]
    traffic = {
        f"{space} {access}": shown_traffic(name, space, access, counters, units)
        for space, access in KINDS
    }
    return {
        "job": job.name,
        "backend": job.backend,
        "arch": job.arch,
        "dtype": str(job.dtype).removeprefix("torch."),
        "vocab_size": job.vocab_size,
        "kernel": plain(name),
        "unit": unit,
        "instructions": round(WARP * counters.warp_instructions[name] / units, 3),
        "in_loops": round(
            sum(counters.blocks[name, b.index] * len(instructions(b)) for b in in_loops) / units, 3
        ),
        "read_in": shares(kernel, parts, counters, n_bytes) if unit != "thread" else {},
        **traffic,
    }


def unit_of(arguments: Any) -> tuple[str, int, int]:
    """A logit or a pair of them, how many there are, and their bytes."""
    known = arguments._asdict()
    logits, ref_logits = known.get("logits", known.get("gradient")), known.get("ref_logits")
    if logits is None:
        return "", 0, 0
    if ref_logits is None:
        return "logit", logits.numel(), logits.nbytes
    return "pair", logits.numel(), 2 * logits.nbytes


def shown_traffic(
    kernel: str, space: str, access: str, counters: Counters, units: int
) -> dict[str, float]:
    """A kernel's traffic of one kind. Bytes and sectors of a request are those of the instructions
    that make up MOST of the sectors: what is asked for once per row would blur them.
    """
    whole, main = counters.total(kernel, access, space), Traffic()
    lines = [found for key, found in counters.traffic.items() if key[:3] == (kernel, access, space)]
    for found in sorted(lines, key=lambda found: -found.units):
        if main.units < MOST * whole.units:
            main.add(found)
    result = {"requests_per_unit": round(whole.requests / units, 5)}
    if space == "global":
        result["sector_bytes_per_unit"] = round(SECTOR * whole.units / units, 3)
        result["bytes"] = round(main.n_bytes / max(main.requests, 1), 2)
        result["sectors"] = round(main.units / max(main.requests, 1), 2)
    else:
        result["conflicts"] = round(whole.conflicts / max(whole.requests, 1), 3)
    return result


def shares(
    kernel: Kernel, parts: list[tuple[int, int, str]], counters: Counters, n_bytes: int
) -> dict[str, float]:
    """Shares of the logits that are read in each kind of loop."""
    found = dict.fromkeys([kind for _, _, kind in parts], 0.0)
    for first, last, kind in parts:
        lines = {i.line for b in kernel.blocks[first : last + 1] for i in instructions(b)}
        for (name, access, _, line), traffic in counters.traffic.items():
            if name == kernel.function.name and access == "load" and line in lines:
                found[kind] += traffic.n_bytes / n_bytes
    return {kind: round(share, 4) for kind, share in found.items()}


def loops(kernel: Kernel) -> list[tuple[int, int, str]]:
    """First and last blocks of the loops that read memory and have no loop inside, and their kind:
    that of a function in FOLDS that they come of, or "other".
    """
    found: list[tuple[int, int, str]] = []
    start_of_last = -1
    for block in kernel.blocks:
        if block.end is None or block.end.family != "bra":
            continue
        first = kernel.target(block.end)
        if start_of_last < first <= block.index:
            start_of_last = first
            body = [i for b in kernel.blocks[first : block.index + 1] for i in instructions(b)]
            if any(i.family in ("ld", "ldmatrix", "cp") for i in body):
                functions = {function_at(where) for where in {i.where for i in body}}
                kind = next((kind for name, kind in FOLDS.items() if name in functions), "other")
                found.append((first, block.index, kind))
    return found


@functools.cache
def function_at(where: str) -> str:
    """The function that a line such as "fold.py:75" is in; "": not one of the folds' files."""
    file, _, line = where.partition(":")
    path = FILES.get(file)
    if path is None:
        return ""
    before = "\n".join((ROOT / path).read_text().splitlines()[: int(line)])
    names = re.findall(r"^(?:def|__device__) .*?(\w+)\(", before, re.MULTILINE)
    return names[-1] if names else ""


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


def worse(committed: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[str]:
    """Figures of `now` that are worse than the committed ones, in words."""
    known = {tuple(row[name] for name in KEY): row for row in committed}
    found = []
    for row in now:
        key = tuple(row[name] for name in KEY)
        if key not in known:
            found.append(f"{key}: not in the committed results")
            continue
        for path, higher_is_worse in BETTER:
            before, after = (functools.reduce(dict.__getitem__, path, r) for r in (known[key], row))
            limit = before * (1 + SLACK if higher_is_worse else 1 - SLACK)
            if after > limit if higher_is_worse else after < limit:
                found.append(f"{key}: {' '.join(path)} {before} -> {after}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="words of jobs' names; results are only shown")
    parser.add_argument("--check", action="store_true", help="compare a few with the committed")
    args = parser.parse_args()
    if args.check:
        found = worse(json.loads(RESULTS.read_text())["kernels"], count(quick()))
        print("\n".join(found))
        return 1 if found else 0
    wanted = [job for job in jobs() if all(word in job.label for word in args.only.split())]
    results = record() | {"triton": version("triton"), "nvcc": nvcc_version()}
    results["kernels"] = count(wanted)
    text = json.dumps(results, indent=1) + "\n"
    if args.only:
        print(text)
    else:
        write_text(RESULTS, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
