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

from kl_kernels.checks import check_choice
from kl_kernels.dispatch import BACKENDS, refusal
from kl_kernels.validate.cases import grid
from kl_kernels.validate.errors import Error, errors
from kl_kernels.validate.report import write
from kl_kernels.validate.report.grid import DEFAULT, QUICK

SIZES = (1, 2, 1023, 1025, 50257, 131072, 151936)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend", nargs="+", metavar="NAME", help="backends to check (default: all there are)"
    )
    parser.add_argument(
        "--vocab-size", nargs="+", type=int, default=SIZES, metavar="V", help="default: %(default)s"
    )
    parser.add_argument(
        "--report", type=Path, metavar="DIR", help="write distributions of errors over a fixed grid"
    )
    parser.add_argument("--quick", action="store_true", help="a small grid for --report")
    parser.add_argument("--commit", help="for --report, where the files are not in a repository")


def run(args: argparse.Namespace) -> int:
    for vocab_size in args.vocab_size:
        if vocab_size < 1:
            raise ValueError(f"vocab-size is {vocab_size}; it has to be at least 1")
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
    accepted = [_validate(name, tuple(args.vocab_size)) for name in wanted]
    return 0 if all(accepted) else 1


def _report(wanted: list[str], args: argparse.Namespace) -> int:
    """Of the backends that take tensors of the device: the GPU's, where there is one."""
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


def _validate(backend: str, vocab_sizes: tuple[int, ...]) -> bool:
    """Print what is not accepted as soon as it is found, then a row per difficulty and dtype."""
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
    return all(e.accepted for found in rows.values() for e in found)


def _worst(found: list[Error], gradients: bool) -> str:
    chosen = [e for e in found if e.quantity.startswith("d ") == gradients]
    return f"{max(e.ours for e in chosen):.1e} ({max(e.eager for e in chosen):.1e})"
