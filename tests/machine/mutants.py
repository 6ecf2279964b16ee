"""`make ptx-mutants`: whether the machine and the small cases notice PTX that is wrong.

make ptx-mutants                                   # into bench/results/ptx_mutants.json
make ptx-mutants ARGS='--only "cuda sm_90" --each 3'

Mutants are drawn by chance, some of every kind for every kernel, from the instructions that small
cases execute. Each runs in the calls that reach it, the smallest first, until one is found wrong:
by a fault, or by the tolerance of tests/gpu/small_cases.py. Exit code 1: without a change, a case
was wrong.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import re
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import small_cases
import torch

from bench.common.machine import record

from .cuda_launches import CudaLaunches
from .launches import Launches
from .mutations import Mutation, applied, mutations
from .replay import SAME_BITS, SURVIVED, Mutant, Replay
from .triton_launches import TritonLaunches

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench/results/ptx_mutants.json"
TARGETS = ["triton sm_90", "cuda sm_90", "triton sm_80", "cuda sm_80"]


class Site(NamedTuple):
    key: str  # the kernel's, among all that were launched
    mutation: Mutation


class Target:
    """The kernels of one backend for one architecture.

    Args:
        name: one of TARGETS.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.backend, arch = name.split()
        self.launches: Launches = (
            TritonLaunches(arch) if self.backend == "triton" else CudaLaunches(arch)
        )

    def text_of(self, key: str) -> list[str]:
        """Lines of a kernel's PTX."""
        ptx = self.launches.ptx[key] if isinstance(self.launches, CudaLaunches) else key
        return ptx.splitlines()

    def run(self, each: int, seed: int) -> dict[str, Any]:
        """Counts by kernel and kind, and the mutants that survived."""
        with self.launches:
            replay = Replay(self.backend, self.launches)
            replay.record(small_cases.CASES)
            counts: dict[str, dict[str, Any]] = {}
            survivors = []
            for (kernel, kind), (places, reached) in sorted(self.sites(replay).items()):
                draw = random.Random(f"{seed}, {self.name}, {kernel}, {kind}")
                how: Counter[str] = Counter()
                for site in draw.sample(reached, min(each, len(reached))):
                    verdict = self.verdict(replay, site)
                    if verdict in (SURVIVED, SAME_BITS):
                        survivors.append(self.described(kernel, site, verdict))
                        verdict = SURVIVED
                    how[verdict] += 1
                print(f"{self.name}, {kernel}, {kind}: {dict(how)}", file=sys.stderr, flush=True)
                counts.setdefault(kernel, {})[kind] = {
                    "places": places,
                    "reached": len(reached),
                    "mutants": dict(sorted(how.items())),
                }
        return {"kernels": counts, "survivors": survivors}

    def sites(self, replay: Replay) -> dict[tuple[str, str], tuple[int, list[Site]]]:
        """Numbers of places and those that calls execute, by kernel and kind of change."""
        executed: dict[str, set[int]] = defaultdict(set)
        for call in replay.calls:
            for key, places in call.executed.items():
                executed[key] |= places
        found: dict[tuple[str, str], tuple[int, list[Site]]] = {}
        for key, reached in executed.items():
            function = self.launches.lowered[key].function
            for mutation in mutations(function):
                group = kernel_name(function.name), mutation.kind
                n, sites = found.get(group, (0, []))
                if mutation.index in reached:
                    sites.append(Site(key, mutation))
                found[group] = n + 1, sites
        return found

    def verdict(self, replay: Replay, site: Site) -> str:
        original = self.launches.lowered[site.key]
        mutant = Mutant(applied(original.function, site.mutation), original)
        index = site.mutation.index
        calls = [call for call in replay.calls if index in call.executed.get(site.key, ())]
        return replay.verdict(site.key, mutant, calls)

    def described(self, kernel: str, site: Site, verdict: str) -> dict[str, Any]:
        instruction = self.launches.lowered[site.key].function.body[site.mutation.index]
        assert not isinstance(instruction, str)
        return {
            "target": self.name,
            "kernel": kernel,
            "kind": site.mutation.kind,
            "source": instruction.where,
            "line": instruction.line,
            "ptx": self.text_of(site.key)[instruction.line - 1].strip(),
            "same_bits": verdict == SAME_BITS,
        }


def kernel_name(symbol: str) -> str:
    """A kernel's name without its namespace and template arguments.

    >>> kernel_name("_ZN10kl_kernels11fold_kernelINS_12LaunchPolicyEfLb1EEEvNS_4RowsE")
    'fold_kernel'
    """
    mangled = re.search(r"\d([a-z_]+_kernel)(?=[IE])", symbol)
    return mangled[1] if mangled else symbol


def run_target(task: tuple[str, int, int]) -> tuple[str, dict[str, Any], float]:
    name, each, seed = task
    torch.set_num_threads(1)
    started = time.perf_counter()
    return name, Target(name).run(each, seed), time.perf_counter() - started


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=TARGETS, help="one target, and nothing is written")
    parser.add_argument("--each", type=int, default=1, help="mutants of a kind of a kernel")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="at once")
    args = parser.parse_args()
    results = record() | {"each": args.each, "seed": args.seed, "targets": {}}
    tasks = [(name, args.each, args.seed) for name in TARGETS if args.only in (None, name)]
    # A process for each, as a context of launches is entered once per process.
    with multiprocessing.get_context("spawn").Pool(args.jobs, maxtasksperchild=1) as pool:
        for name, found, seconds in pool.imap(run_target, tasks):
            results["targets"][name] = found
            report(name, found, seconds)
    if args.only is None:
        part = RESULTS.with_suffix(".part")
        part.write_text(json.dumps(results, indent=1) + "\n")
        os.replace(part, RESULTS)
    return 0


def report(name: str, found: dict[str, Any], seconds: float) -> None:
    how: Counter[str] = Counter()
    for kinds in found["kernels"].values():
        for counts in kinds.values():
            how.update(counts["mutants"])
    counted = ", ".join(f"{verdict} {n}" for verdict, n in how.most_common())
    print(f"{name}: {sum(how.values())} mutants in {seconds:.0f} s: {counted}", flush=True)
    for survivor in found["survivors"]:
        print(" ", *survivor.values(), sep=" | ", flush=True)


if __name__ == "__main__":
    sys.exit(main())
