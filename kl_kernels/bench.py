"""`python -m kl_kernels bench`: the repository's comparison with peers, in one command."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--full", action="store_true", help="all sizes: hours on a CPU")
    parser.add_argument(
        "--save", action="store_true", help="write bench/results/peers.json, or peers_<chip>.json"
    )
    parser.add_argument("--results", type=Path, help="another directory for it")
    parser.add_argument("--commit", help="where the checkout is no git repository")
    parser.add_argument("--seconds", type=float, help="start nothing after that many")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU (default: 2)")
    parser.add_argument(
        "--only", metavar="WORDS", help="cases that fit this expression (pytest -k)"
    )


def run(args: argparse.Namespace) -> int:
    if not (ROOT / "bench" / "test_bench_ops.py").is_file():
        raise ValueError("the benchmarks are no part of the package: this needs a checkout of it")
    options = [f"--threads={args.threads}", *(["-k", args.only] if args.only else [])]
    options += [f"--{name}" for name in ("full", "save") if getattr(args, name)]
    options += [f"--results={args.results.resolve()}"] if args.results else []
    given = {name: getattr(args, name) for name in ("seconds", "commit")}
    options += [f"--{name}={value}" for name, value in given.items() if value is not None]
    command = [sys.executable, "-m", "pytest", "bench", "--benchmark-only", *options]
    columns = ["--benchmark-columns=median,iqr,min,max,rounds", "--benchmark-warmup=off", "-q"]
    return subprocess.run([*command, *columns], cwd=ROOT, check=False).returncode
