"""`make machine`: the GPU backends' tests on the machine, with every Triton and architecture.

Exit code 1: a test failed, or a kernel had a fault. Logs are in build/machine/logs.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
LOGS = ROOT / "build/machine/logs"
ARCHS = ("sm_80", "sm_90")
APPROXIMATIONS = ("exact", "up", "down", "hash")
EVERYTHING = {
    "triton": ["tests/gpu", "tests/backends/test_triton_vectors.py"],
    "cuda": ["tests/gpu"],
}
# Numbers alone: with other results of ex2, the bits are not those of another test.
NUMBERS = [
    "tests/gpu/test_gpu_small_cases.py",
    "tests/gpu/test_gpu_numbers.py::test_outputs_and_gradients_are_true",
]
# Clusters of up to 16 blocks, with parts so small that a few thousand logits fill them.
CLUSTERS = [
    "tests/backends/test_cuda_on_host.py",
    "tests/backends/test_cuda_parts_on_host.py",
    "tests/backends/test_cuda_policy_loss_on_host.py",
]
# Left out: tests of the host's own build of the kernels.
ONLY_ON_HOST = "not sanitizers and not where_rows_are_kept and not finds_no_room"


class Job(NamedTuple):
    name: str
    options: list[str]
    triton: Path | None = None  # a folder with another Triton than the installed one

    def run(self) -> tuple[bool, float, str]:
        """Whether it passed, its seconds, and what it said last."""
        started = time.perf_counter()
        env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        paths = [str(self.triton)] if self.triton else []
        env["PYTHONPATH"] = os.pathsep.join([*paths, str(ROOT), env.get("PYTHONPATH", "")])
        env["OMP_NUM_THREADS"] = "1"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
        log = LOGS / f"{self.name.replace(', ', '-').replace(' ', '-')}.log"
        with log.open("w") as file:
            result = subprocess.run(
                [*command, *self.options], cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT
            )
        lines = log.read_text().splitlines()
        said = lines[-1] if lines else ""
        return result.returncode == 0, time.perf_counter() - started, f"{said} ({log})"


def jobs(tritons: list[Path]) -> Iterator[Job]:
    """All jobs, first those that compile what others find compiled."""
    for mode, triton, arch in itertools.product(APPROXIMATIONS, [None, *tritons], ARCHS):
        names = {"triton": f"triton {version('triton') if triton is None else version_in(triton)}"}
        if triton is None:
            names["cuda"] = "cuda"
        for backend, name in names.items():
            tests = EVERYTHING[backend] if mode == "exact" else NUMBERS
            how = ["--machine", arch, "--backend", backend, "--approximation", mode]
            yield Job(f"{name}, {arch}, {mode}", [*tests, *how], triton)
    for arch in ARCHS[1:]:  # earlier ones have no clusters
        how = ["--machine", arch, "--backend", "cuda", "--launches", "small", "-k", ONLY_ON_HOST]
        yield Job(f"cuda, {arch}, small launches", [*CLUSTERS, *how])


def version_in(folder: Path) -> str:
    """The version of the Triton that was unpacked into a folder."""
    found = [re.fullmatch(r"triton-(.+)\.dist-info", path.name) for path in folder.iterdir()]
    versions = [match[1] for match in found if match]
    if len(versions) != 1:
        raise ValueError(f"{folder} holds {versions or 'no'} Triton; unpack one with make machine")
    return versions[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tritons", nargs="*", type=Path, default=[], metavar="DIR")
    parser.add_argument("--only", default="", metavar="WORDS", help="jobs whose names have these")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="at once")
    parser.add_argument("--list", action="store_true", help="name the jobs and run none")
    args = parser.parse_args()
    wanted = [job for job in jobs(args.tritons) if all(w in job.name for w in args.only.split())]
    if args.list:
        print(*(job.name for job in wanted), sep="\n")
        return 0
    LOGS.mkdir(parents=True, exist_ok=True)
    started, failed = time.perf_counter(), []
    print(f"{len(wanted)} jobs, {args.jobs} at once", flush=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        running = {pool.submit(job.run): job for job in wanted}
        for n, done in enumerate(as_completed(running), 1):
            name, (passed, seconds, said) = running[done].name, done.result()
            verdict = "passed" if passed else "FAILED"
            print(f"[{n}/{len(wanted)}] {name}: {verdict}, {seconds:.0f} s: {said}", flush=True)
            failed += [] if passed else [name]
    minutes = (time.perf_counter() - started) / 60
    print(f"{len(wanted) - len(failed)} of {len(wanted)} jobs passed in {minutes:.1f} minutes")
    if failed:
        print("failed:", *failed, sep="\n  ")
    return 1 if failed or not wanted else 0


if __name__ == "__main__":
    sys.exit(main())
