"""Is a revision slower than another? `make bench-compare BASE=<git rev>`.

The base is checked out and built in a temporary worktree. A process for each revision stays alive
and is asked in turns for one call of an op, so that both see the same machine; a new pair of
processes from time to time, because where a process happens to lie in memory makes it faster or
slower as a whole. Exit code 1: an op is slower than the threshold allows.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.common.bootstrap import Array, interval

ROOT = Path(__file__).parents[2]
BASE, NEW = "base", "new"
Ask = Callable[[str], float]  # an op's name -> seconds of one call of it
SLOWER, FASTER, SAME = "slower", "faster", "no difference seen"


@dataclass(frozen=True)
class Comparison:
    op: str
    base_ms: float  # medians
    new_ms: float
    ratio: float  # new over base
    low: float  # 95 % interval of it
    high: float
    verdict: str

    def __str__(self) -> str:
        return (
            f"{self.op:50}{self.base_ms:9.3f} ms{self.new_ms:9.3f} ms{self.ratio:8.3f} "
            f"[{self.low:.3f}, {self.high:.3f}]  {self.verdict}"
        )


def compared(op: str, seconds: Array, threshold: float) -> Comparison:
    """Compare one op's seconds [rounds, 2]: the base's, and the new one's.

    The ratio is the median over rounds, of calls that followed one another. It counts as a
    difference where its whole interval is farther from 1 than the threshold, a fraction.
    """
    low, high = interval(seconds, median_ratio)
    verdict = SAME
    if low > 1 + threshold:
        verdict = SLOWER
    elif high < 1 / (1 + threshold):
        verdict = FASTER
    base, new = 1e3 * np.median(seconds, 0)
    return Comparison(op, base, new, median_ratio(seconds), low, high, verdict)


def median_ratio(seconds: Array) -> float:
    return float(np.median(seconds[:, 1] / seconds[:, 0]))


def rounds_of(contenders: Mapping[str, Ask], ops: list[str], rounds: int) -> dict[str, Array]:
    """Seconds [rounds, 2] of each op; who is first changes from round to round."""
    seconds = {op: np.empty((rounds, 2)) for op in ops}
    order = [(0, contenders[BASE]), (1, contenders[NEW])]
    for op in ops:
        for _, ask in order:
            ask(op)  # warms up
    for i in range(rounds):
        for op in ops:
            for column, ask in order if i % 2 else reversed(order):
                seconds[op][i, column] = ask(op)
    return seconds


# A revision's process.


class Worker:
    """A process that imports the package from `root` and runs its ops, one call for each line."""

    def __init__(self, root: Path, threads: int) -> None:
        # The package of `root` comes before this checkout's, of which the worker is.
        env = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(ROOT)])}
        command = [sys.executable, __file__, "--serve", str(root), "--threads", str(threads)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=env, cwd=root, **pipes)
        self.ops: list[str] = self.answer()

    def answer(self) -> Any:
        line = self.process.stdout.readline() if self.process.stdout else ""
        if not line:
            raise RuntimeError("a revision's process has ended; what it said is above")
        return json.loads(line)

    def __call__(self, op: str) -> float:
        assert self.process.stdin
        self.process.stdin.write(op + "\n")
        self.process.stdin.flush()
        return float(self.answer())

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


def serve(root: str) -> None:
    import kl_kernels

    if Path(root) not in Path(kl_kernels.__file__).parents:
        raise RuntimeError(f"kl_kernels comes from {kl_kernels.__file__}, not from {root}")
    ready = runnable(ops())
    print(json.dumps(list(ready)), flush=True)
    for line in sys.stdin:
        call = ready[line.strip()]
        start = time.perf_counter()
        call()
        print(time.perf_counter() - start, flush=True)


def runnable(calls: dict[str, Callable[[], object]]) -> dict[str, Callable[[], object]]:
    """Return the calls that this revision can run."""
    found = {}
    for name, call in calls.items():
        try:
            call()
        except (AttributeError, TypeError) as error:
            print(f"left out: {name}: {error}", file=sys.stderr)
        else:
            found[name] = call
    return found


def ops() -> dict[str, Callable[[], object]]:
    """Calls of some milliseconds; of less with few rows, where the cost of a call itself shows."""
    import torch

    import kl_kernels
    from bench.common.formulas import make_inputs

    per_token = torch.ones(64, 1024)
    found: dict[str, Callable[[], object]] = {
        "compute_gae, 64 x 1024": partial(kl_kernels.compute_gae, *3 * [per_token])
    }
    for shape, dtypes in (((1, 1024), ["bfloat16"]), ((64, 32768), ["bfloat16", "float32"])):
        for dtype in dtypes:
            named = logits_ops(*make_inputs(*shape, getattr(torch, dtype)))
            found |= {f"{op}, {shape[0]} x {shape[1]} {dtype}": call for op, call in named.items()}
    return found


def logits_ops(logits: Any, ref_logits: Any, token_ids: Any) -> dict[str, Callable[[], object]]:
    import torch

    import kl_kernels
    from bench.common.formulas import gradient_of, one_visit, ours, with_gradient

    inputs = logits, ref_logits, token_ids
    return {
        "selective_log_softmax": partial(
            kl_kernels.selective_log_softmax, logits.detach(), token_ids
        ),
        "token_kl": partial(torch.no_grad()(ours), *inputs),
        "token_kl + gradient": partial(with_gradient(ours), *inputs),
        "fused_policy_loss + gradient": partial(gradient_of(one_visit), *inputs),
    }


# The base.


@contextlib.contextmanager
def checked_out(revision: str) -> Iterator[Path]:
    """A worktree of `revision` with its own build, gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder).resolve() / "base"
        git("worktree", "add", "--detach", str(tree), revision)
        try:
            build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
            env = os.environ | {"KL_KERNELS_CUDA": "0"}
            done = subprocess.run(build, cwd=tree, env=env, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{revision} does not build:\n{done.stdout}{done.stderr}")
            yield tree
        finally:
            git("worktree", "remove", "--force", str(tree))


def git(*args: str) -> str:
    done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"git {' '.join(args)}: {done.stderr.strip()}")
    return done.stdout.strip()


def compare_trees(base: Path, new: Path, args: argparse.Namespace) -> list[Comparison]:
    seconds: dict[str, list[Array]] = {}
    for _ in range(args.processes):
        with Worker(base, args.threads) as old, Worker(new, args.threads) as current:
            names = [op for op in current.ops if op in old.ops]
            found = rounds_of({BASE: old, NEW: current}, names, args.rounds)
            for op in names:
                seconds.setdefault(op, []).append(found[op])
    return [compared(op, np.concatenate(parts), args.threshold) for op, parts in seconds.items()]


def report(comparisons: list[Comparison]) -> int:
    print(f"{'op':50}{'base':>12}{'new':>12}{'ratio':>8}  95 % interval")
    for comparison in comparisons:
        print(comparison)
    return int(any(c.verdict == SLOWER for c in comparisons))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", metavar="REV", help="any git revision")
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.03,
        help="a smaller difference is none (default: %(default)s)",
    )
    parser.add_argument("--rounds", type=int, default=30, help="per pair of processes")
    parser.add_argument("--processes", type=int, default=3, help="pairs of them, in turn")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--serve", metavar="ROOT", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.serve:
        import torch

        torch.set_num_threads(args.threads)
        serve(args.serve)
        return 0
    if not args.base:
        parser.error("--base is missing: a git revision to compare with")
    try:
        revision = git("rev-parse", "--verify", "--short", f"{args.base}^{{commit}}")
        with checked_out(revision) as tree:
            print(f"base {revision}, new {git('describe', '--always', '--dirty')}")
            return report(compare_trees(tree, ROOT, args))
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
