"""`python -m kl_kernels bench`: the repository's comparison with peers, in one command."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from kl_kernels import extras

USAGE_ERROR = 4  # pytest's exit code for arguments that it refuses


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--list", action="store_true", help="print the benchmarks' names instead of running them"
    )
    parser.add_argument(
        "--only",
        metavar="TEXT",
        help='run the benchmarks whose name contains this, such as "exact KL" or "GAE, 65536"',
    )
    parser.add_argument("--full", action="store_true", help="all sizes, which takes hours on a CPU")
    parser.add_argument(
        "--save", action="store_true", help="write bench/results/peers.json, or peers_<chip>.json"
    )
    parser.add_argument(
        "--results", type=Path, metavar="DIR", help="the folder that --save writes to"
    )
    parser.add_argument(
        "--commit", metavar="HASH", help="the commit to record, where git cannot tell it"
    )
    parser.add_argument(
        "--seconds", type=float, metavar="S", help="start no benchmark later than this"
    )
    parser.add_argument(
        "--threads", type=int, default=2, metavar="N", help="threads on the CPU (default: 2)"
    )


def run(args: argparse.Namespace) -> int:
    if args.results and not args.save:
        raise ValueError(
            f"results is {str(args.results)!r}, but only save writes there; add --save"
        )
    root = _checkout()
    chosen = [f"--only={args.only}"] if args.only else []
    chosen += ["--full"] if args.full else []
    if args.list:
        return _python(root, "-m", "bench.peers.names", *chosen)
    extras.need("bench", *extras.of_extra("bench"))
    options = [f"--threads={args.threads}", *(["--save"] if args.save else [])]
    options += [f"--results={args.results.resolve()}"] if args.results else []
    given = {name: getattr(args, name) for name in ("seconds", "commit")}
    options += [f"--{name}={value}" for name, value in given.items() if value is not None]
    columns = ["--benchmark-columns=median,iqr,min,max,rounds", "--benchmark-warmup=off", "-q"]
    code = _python(
        root, "-m", "pytest", "bench/peers", "--benchmark-only", *chosen, *options, *columns
    )
    return 2 if code == USAGE_ERROR else code


def _checkout() -> Path:
    """The repository that this package is in, or that the current folder is in.

    Raises:
        ValueError: there is none.
    """
    here = Path.cwd()
    for folder in (extras.ROOT, here, *here.parents):
        if (folder / "bench" / "peers" / "test_bench_ops.py").is_file():
            return folder
    raise ValueError(
        "bench is no part of the installed package; run it in a checkout of the repository"
    )


def _python(root: Path, *arguments: str) -> int:
    """Run Python in the checkout, on the package that runs here."""
    paths = [str(extras.ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=root, env=environment, check=False).returncode
