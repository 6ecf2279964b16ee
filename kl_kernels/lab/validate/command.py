"""`python -m kl_kernels validate`: a table of errors beside torch eager's own.

With `--report DIR`, their distributions over a declared grid instead, as a folder of files.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path

import torch
from tqdm import tqdm

from kl_kernels.backends.dispatch import BACKENDS, refusal
from kl_kernels.checks import check_choice
from kl_kernels.lab.validate.cases import grid
from kl_kernels.lab.validate.errors import Error, errors
from kl_kernels.lab.validate.report import write
from kl_kernels.lab.validate.report.grid import DEFAULT, QUICK

SIZES = (1, 2, 1023, 1025, 50257, 131072, 151936)
QUICK_SIZES = (1, 1025)
FAILURES_NAMED = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend", nargs="+", metavar="NAME", help="backends to check (default: all available)"
    )
    parser.add_argument(
        "--vocab-size",
        nargs="+",
        type=int,
        metavar="V",
        help=f"vocabulary sizes (default: {' '.join(map(str, SIZES))})",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"take seconds: only sizes {' and '.join(map(str, QUICK_SIZES))}, or for --report a "
        "small grid",
    )
    parser.add_argument(
        "--report",
        type=Path,
        metavar="DIR",
        help="measure distributions of errors over a fixed grid, and write them to this folder",
    )
    parser.add_argument(
        "--commit", metavar="HASH", help="for --report: the commit, where git cannot tell it"
    )


def run(args: argparse.Namespace) -> int:
    """Exit code 1: a check failed."""
    _check(args)
    missing = {name: backend.unavailable_reason() for name, backend in BACKENDS.items()}
    wanted = args.backend or [name for name, reason in missing.items() if reason is None]
    for name in wanted:
        check_choice("backend", name, tuple(BACKENDS))
        if missing[name]:
            raise ValueError(f"backend {name!r} is not available: {missing[name]}")
    for name, reason in missing.items():
        if reason:
            print(f"{name}: not available: {reason}")
    if args.report:
        return _report(wanted, args)
    sizes = args.vocab_size or (QUICK_SIZES if args.quick else SIZES)
    found = {name: _validate(name, tuple(sizes)) for name in wanted}
    failed = [(name, e) for name, all_of in found.items() for e in all_of if not e.accepted]
    print("\n" + _verdict(wanted, sum(map(len, found.values())), failed))
    return 1 if failed else 0


def _check(args: argparse.Namespace) -> None:
    """Refuse options that would have no effect."""
    for vocab_size in args.vocab_size or ():
        if vocab_size < 1:
            raise ValueError(f"vocab-size is {vocab_size}; it must be at least 1")
    if args.vocab_size and (args.quick or args.report):
        other = "report" if args.report else "quick"
        raise ValueError(f"vocab-size is given, but {other} has sizes of its own; leave one out")
    if args.commit and not args.report:
        raise ValueError(f"commit is {args.commit!r}, but only a report records it; add --report")


def _verdict(backends: list[str], n: int, failed: list[tuple[str, Error]]) -> str:
    if not failed:
        return f"all {n} checks passed on {', '.join(backends)}"
    names = [f"{error.case.name} {error.quantity} on {name}" for name, error in failed]
    if len(names) > FAILURES_NAMED:
        names[FAILURES_NAMED:] = [f"and {len(names) - FAILURES_NAMED} more"]
    return f"{len(failed)} of {n} checks failed: {'; '.join(names)}"


def _report(wanted: list[str], args: argparse.Namespace) -> int:
    """List the backends that take tensors of the device: the GPU's, where there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    refusals = {name: refusal(name, device, float64=False) for name in wanted}
    for name, reason in refusals.items():
        if reason:
            print(f"{name}: left out: {reason}")
    backends = [name for name, reason in refusals.items() if reason is None]
    if not backends:
        raise ValueError(f"backend is {wanted}; none of these runs on {device} tensors")
    holds = write.run(backends, QUICK if args.quick else DEFAULT, args.report, args.commit)
    return 0 if holds else 1


def _validate(backend: str, vocab_sizes: tuple[int, ...]) -> list[Error]:
    """Print each failure as soon as it is found, then a row per difficulty and dtype."""
    rows: dict[tuple[str, str], list[Error]] = defaultdict(list)
    cases = grid(vocab_sizes)
    on_gpu = torch.cuda.is_available() and "cuda" in BACKENDS[backend].device_types
    for case in tqdm(cases, desc=backend, leave=False, disable=not sys.stderr.isatty()):
        dtype = case.name.rsplit("-", 1)[1]
        found = errors(case, backend, "cuda" if on_gpu else "cpu")
        rows[case.difficulty, dtype] += found
        for error in found:
            if not error.accepted:
                tqdm.write(f"WORSE THAN EAGER {error}")
                sys.stdout.flush()
    print(
        f"\n{backend}: worst error over V = {', '.join(map(str, vocab_sizes))} (eager's beside it)"
    )
    print(f"{'':24}{'values':>22}{'gradients':>22}")
    for (difficulty, dtype), found in rows.items():
        print(f"{difficulty:15}{dtype:9}{_worst(found, False):>22}{_worst(found, True):>22}")
    return [error for found in rows.values() for error in found]


def _worst(found: list[Error], gradients: bool) -> str:
    chosen = [e for e in found if e.quantity.startswith("d ") == gradients]
    return f"{max(e.ours for e in chosen):.1e} ({max(e.eager for e in chosen):.1e})"
