"""`make gpu`: what a machine with a GPU is asked, in calls of under nine minutes.

Build, then all checks side by side, then the benchmarks alone: parts "checks" and "speed", the
default. Others may take "sanitizers", "heads", linear heads beside their matrix products and
other packages, "counters", what Nsight Compute sees, "sweep", the Triton kernels with other sizes,
and "peers", beside other packages as far as they are there. Minutes on a
GPU are rare: a step that fails or takes too long costs no other, and the exit code says whether all
were well. The whole log and each part's JSON go to RESULTS; the table that matters ends the output.
Nothing is installed: the python that runs this is used throughout.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from bench.gpu.counters import find_tool
from bench.gpu.table import table

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
SECONDS = 525  # in all
# The checks spend their time on compiling Triton kernels.
BUILD_SECONDS, CHECK_SECONDS, SPEED_SECONDS = 150, 230, 240
SANITIZER_SECONDS, COUNTERS_SECONDS, SWEEP_SECONDS, PEERS_SECONDS = 150, 180, 240, 420
HEADS_SECONDS = 420
PARTS = ("checks", "sanitizers", "speed", "heads", "counters", "sweep", "peers")
DEFAULT_PARTS = ("checks", "speed")
SANITIZERS = ("memcheck", "racecheck", "initcheck")
SANITIZED = 9  # exit code of a sanitizer that found something
FEW_THREADS, INTERPRETED = {"OMP_NUM_THREADS": "2"}, {"TRITON_INTERPRET": "1"}
TAIL = 25  # lines shown of a step that failed


@dataclass(frozen=True)
class Step:
    name: str
    command: list[str]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    step: Step
    code: int | None  # None: it took too long
    seconds: float
    output: str

    @property
    def good(self) -> bool:
        return self.code == 0

    def __str__(self) -> str:
        verdict = "ok" if self.good else "TOO SLOW" if self.code is None else f"FAILED {self.code}"
        return f"{self.step.name:24}{verdict:>10}{self.seconds:7.0f} s"


def run(step: Step) -> Outcome:
    """Run a step and its child processes; its output is kept even if it must be stopped."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    environment.pop("TRITON_INTERPRET", None)  # kernels are to run, not to be interpreted
    environment |= step.environment
    start = time.monotonic()
    code: int | None = None
    # A file and no pipe: a process that survives the group keeps a pipe open, and reading waits.
    with tempfile.TemporaryFile("w+", errors="replace") as out:
        try:
            process = subprocess.Popen(
                step.command,
                cwd=ROOT,
                env=environment,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = process.wait(timeout=max(1.0, step.seconds))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        except OSError as error:
            code = 127
            out.write(str(error))
        out.seek(0)
        output = out.read()
    outcome = Outcome(step, code, time.monotonic() - start, output)
    print(outcome, flush=True)
    return outcome


class Log:
    """All output so far, on disk after every step: the call itself may be cut short."""

    def __init__(self, path: Path):
        self.path = path
        self.outcomes: list[Outcome] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")

    def run(self, *steps: Step) -> list[Outcome]:
        """Steps side by side."""
        with ThreadPoolExecutor(max(1, len(steps))) as pool:
            done = list(pool.map(self._run, steps))
        self.outcomes += done
        return done

    def _run(self, step: Step) -> Outcome:
        outcome = run(step)
        with self.path.open("a") as file:
            file.write(f"\n===== {outcome}\n{outcome.output}\n")
        return outcome


def build_steps() -> tuple[Step, Step]:
    """Return the step that builds in place with CUDA, and the one without, for when it fails."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}")
    with_cuda = {"KL_KERNELS_CUDA": "1", "TORCH_CUDA_ARCH_LIST": architectures}
    return (
        Step("build", command, BUILD_SECONDS, with_cuda),
        Step("build without cuda", command, 60, {"KL_KERNELS_CUDA": "0"}),
    )


def report_steps(args: argparse.Namespace) -> list[Step]:
    """Distributions of errors, a report for each: Triton's compilation may take too long."""
    steps = []
    for backend in ("cpu",) if args.dry_run else ("triton", "cuda"):
        command = [sys.executable, "-m", "kl_kernels", "validate", "--backend", backend]
        command += ["--report", str(args.results / f"numerics_{backend}")]
        command += ["--commit", args.commit] if args.commit else []
        command += ["--quick"] if args.dry_run else []
        steps.append(Step(f"numerics {backend}", command, CHECK_SECONDS, FEW_THREADS))
    return steps


def check_steps(dry_run: bool) -> list[Step]:
    """Independent of each other; the machine's cores are shared among them."""
    python = sys.executable
    backends: tuple[str, ...] = ("triton", "cuda")
    # Triton compiles for each kind of size, which is what takes its time: a process for each.
    sizes: dict[str, list[list[int]]] = {
        "triton": [[1], [1025]],
        "cuda": [[1, 2, 1025, 4096, 50257]],
        "cpu": [[1, 2, 1025, 50257]],
    }
    if dry_run:
        backends, sizes = ("cpu",), {"cpu": [[1, 300]]}
    steps = [Step("info", [python, "-m", "kl_kernels", "info"], 60)]
    for backend, groups in sizes.items():
        for group in groups:
            command = [python, "-m", "kl_kernels", "validate", "--backend", backend]
            command += ["--vocab-size", *map(str, group)]
            steps.append(
                Step(f"validate {backend} {group[-1]}", command, CHECK_SECONDS, FEW_THREADS)
            )
    workers = ["-n", "6"] if importlib.util.find_spec("xdist") and not dry_run else []
    for backend in backends:
        # Without the project's own options, which ask for plugins that may not be there.
        command = [python, "-m", "pytest", "tests/gpu", "--backend", backend, *workers]
        command += ["-o", "addopts=", "-p", "no:cacheprovider", "-v", "--durations=5", "--tb=short"]
        command += ["--show-capture=no"]
        steps.append(Step(f"tests {backend}", command, CHECK_SECONDS, FEW_THREADS))
    return [*steps, *small_cases_steps(backends)]


def small_cases_steps(backends: tuple[str, ...], watch: Sequence[str] = ()) -> list[Step]:
    command = [*watch, sys.executable, "tests/gpu/small_cases.py", "--backend"]
    return [Step(f"small cases {b}", [*command, b], CHECK_SECONDS, FEW_THREADS) for b in backends]


def sanitizer_steps() -> list[Step]:
    """The small cases, watched: findings in kernels that are torch's own are torch's."""
    sanitizer = find_tool("compute-sanitizer")
    if sanitizer is None:
        print("compute-sanitizer: not on this machine, not run")
        return []
    steps = []
    for tool in SANITIZERS:
        watch = [sanitizer, "--tool", tool, f"--error-exitcode={SANITIZED}", "--print-limit=20"]
        watch += ["--target-processes", "application-only"]  # not Triton's compilers
        # Calls of the driver that fail are torch's own business: it asks what there is.
        watch += ["--report-api-errors=no"] if tool == "memcheck" else []
        for step in small_cases_steps(("triton", "cuda"), watch):
            no_cache = step.environment | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            name = step.name.replace("small cases", tool)
            steps.append(replace(step, name=name, seconds=SANITIZER_SECONDS, environment=no_cache))
    return steps


def speed_step(args: argparse.Namespace, seconds: float) -> Step:
    command = [sys.executable, "-m", "bench.gpu.measure", *about(args)]
    command += ["--seconds", f"{seconds - 25:.0f}"]  # a case under way has time to end
    command += ["--dry-run", "--turns", "1"] if args.dry_run else []
    return Step("speed", command, seconds)


def heads_step(args: argparse.Namespace, seconds: float) -> Step:
    command = [sys.executable, "-m", "bench.gpu.heads", *about(args)]
    command += ["--seconds", f"{seconds - 40:.0f}"]
    command += ["--dry-run"] if args.dry_run else []
    return Step("heads", command, seconds)


def counters_step(args: argparse.Namespace, seconds: float) -> Step:
    return Step("counters", [sys.executable, "-m", "bench.gpu.counters", *about(args)], seconds)


def sweep_step(args: argparse.Namespace, seconds: float) -> Step:
    command = [sys.executable, "-m", "bench.gpu.sweep", *about(args)]
    command += ["--seconds", f"{seconds - 40:.0f}"]
    command += ["--dry-run", "--turns", "1"] if args.dry_run else []
    return Step("sweep", command, seconds, INTERPRETED if args.dry_run else {})


def peers_step(args: argparse.Namespace, seconds: float) -> Step:
    command = [sys.executable, "-m", "kl_kernels", "bench", "--save", *about(args)]
    command += ["--seconds", f"{seconds - 40:.0f}"]
    command += ["--only", "GAE, 65536, float32, Python loop"] if args.dry_run else []
    return Step("peers", command, seconds)


def about(args: argparse.Namespace) -> list[str]:
    return ["--results", str(args.results), *(["--commit", args.commit] if args.commit else [])]


MEASURED = {  # one after the other, alone
    "speed": (speed_step, SPEED_SECONDS),
    "heads": (heads_step, HEADS_SECONDS),
    "counters": (counters_step, COUNTERS_SECONDS),
    "sweep": (sweep_step, SWEEP_SECONDS),
    "peers": (peers_step, PEERS_SECONDS),
}


def results_table(results: Path, since: float) -> str:
    """Make the table from the results file, which exists even if the benchmarks were stopped."""
    files = [f for f in results.glob("gpu_*.json") if f.stat().st_mtime >= since]
    if not files:
        return "no benchmark results"
    return table(json.loads(max(files, key=lambda f: f.stat().st_mtime).read_text()))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="?", default=RESULTS, help="directory")
    parser.add_argument("--commit", help="where the files are not in a git repository")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=DEFAULT_PARTS)
    parser.add_argument(
        "--dry-run", action="store_true", help="without a GPU: the same steps on the CPU, tiny"
    )
    args = parser.parse_args()
    args.results = args.results.resolve()
    if not (args.dry_run or torch.cuda.is_available()):
        print("error: torch finds no GPU; --dry-run tries the steps without one", file=sys.stderr)
        return 2
    start, since = time.monotonic(), time.time()
    log = Log(args.results / "gpu.log")
    if not args.dry_run:
        build, without_cuda = build_steps()
        if not log.run(build)[0].good:
            log.run(without_cuda)
    if "checks" in args.parts:
        log.run(*check_steps(args.dry_run), *report_steps(args))
    if "sanitizers" in args.parts and not args.dry_run:
        if "checks" not in args.parts:  # so that the steps below find Triton's compiler ready
            log.run(*small_cases_steps(("triton",)))
        log.run(*sanitizer_steps())
    for part, (step, seconds) in MEASURED.items():
        if part in args.parts:
            left = SECONDS - (time.monotonic() - start)
            log.run(step(args, min(seconds, left)))
    failed = [outcome for outcome in log.outcomes if not outcome.good]
    for outcome in failed:
        print(f"\n----- {outcome}")
        print("\n".join(line[:160] for line in outcome.output.splitlines()[-TAIL:]))
    print(f"\n{len(log.outcomes)} steps in {time.monotonic() - start:.0f} s, {len(failed)} failed:")
    print("\n".join(str(outcome) for outcome in failed) or "none")
    print(f"the whole log is in {log.path}\n\n{results_table(args.results, since)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
