"""`python -m kl_kernels codegen`: the Triton kernels' machine code, and its least times."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import re
from dataclasses import astuple
from pathlib import Path

from kl_kernels.checks import check_choice
from kl_kernels.lab.codegen.budgets import BUDGETS, REGISTERS, excesses
from kl_kernels.lab.codegen.chips import (
    CHIPS,
    Chip,
    limits,
    occupancy,
    second_look_hits,
    visit,
)
from kl_kernels.lab.codegen.sass import Kernel

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
CHIP_OF = {"sm_80": "a100", "sm_90": "h200", "sm_100": "b200"}  # the default chip

KERNEL_COLUMNS = ("kernel", "registers", "stack bytes", "shared bytes", "occupancy")
LOOP_COLUMNS = (
    "loop",
    "per",
    "instructions",
    "MUFU",
    "bytes",
    "load",
    "store",
    "barriers",
    "shuffles",
    "memory ms",
    "issue ms",
    "MUFU ms",
    "bound by",
)
VISIT_COLUMNS = ("both looks in one visit", "L2 hits", "memory ms", "ms if all hit", "ms if none")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    chips = ", ".join(f"{name} ({chip.arch})" for name, chip in CHIPS.items())
    defaults = ", ".join(f"{chip} for {arch}" for arch, chip in CHIP_OF.items())
    parser.add_argument(
        "--arch",
        metavar="ARCH",
        help=f"architecture to compile for: {', '.join(ARCHS)} (default: the chip's, or sm_90)",
    )
    parser.add_argument(
        "--chip",
        metavar="NAME",
        help=f"chip to predict times for: {chips} (default: {defaults})",
    )
    parser.add_argument(
        "--rows", type=int, default=8192, metavar="N", help="rows of logits (default: 8192)"
    )
    parser.add_argument(
        "--vocab-size",
        type=int,
        default=128256,
        metavar="V",
        help="logits per row (default: 128256)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="write each kernel's PTX, cubin and SASS to this folder",
    )


def run(args: argparse.Namespace) -> int:
    """Exit code 1: a kernel costs more than its budget."""
    arch, chip = _target(args.arch, args.chip)
    # With one logit, the compiler would remove the loops.
    for name, value, least in (("rows", args.rows, 1), ("vocab-size", args.vocab_size, 2)):
        if value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")
    if args.out:
        _make_writable(args.out)
    _check_triton()

    # Imported here: Triton may not be installed.
    from kl_kernels.lab.codegen.compile import compile_for, empty_cache
    from kl_kernels.lab.codegen.variants import Shape, variants

    shape = Shape(args.rows, args.vocab_size)
    budgeted = chip is not None and shape.aligned
    kernels: list[tuple[str, ...]] = [KERNEL_COLUMNS]
    loops: list[tuple[str, ...]] = [LOOP_COLUMNS]
    visits: list[tuple[str, ...]] = [VISIT_COLUMNS]
    over: list[str] = []
    with empty_cache():
        for variant in variants(shape):
            kernel, files = compile_for(arch, variant)
            for suffix, content in files.items() if args.out else ():
                (args.out / f"{_slug(kernel.name)}.{suffix}").write_bytes(content)
            kernels.append(_kernel_row(arch, kernel, chip, budgeted))
            if chip:
                units = args.rows * args.vocab_size
                loops += _loop_rows(kernel, variant.unit, units, chip, budgeted)
                if "gradient" in kernel.loops:
                    visits.append(_visit_row(kernel, args.vocab_size, units, chip))
            if budgeted:
                over += excesses(arch, kernel)

    compiler = f"Triton {importlib.metadata.version('triton')}"
    print(f"{compiler} for {arch}, bfloat16 logits{', a / budget' * budgeted}\n")
    _print(kernels)
    if chip:
        print(f"\nLoops over the vocabulary, and their least time for {args.rows} x", end=" ")
        print(f"{args.vocab_size} on {args.chip or CHIP_OF[arch]}\n")
        _print(loops)
        print("\nThe second look at a row, from its end, where the L2 still holds some of it\n")
        _print(visits)
    for sentence in over:
        print(f"OVER BUDGET {sentence}")
    return 1 if over else 0


def _target(arch: str | None, name: str | None) -> tuple[str, Chip | None]:
    """The architecture, and the chip; None: no chip of this architecture is known."""
    if arch is not None:
        check_choice("arch", arch, ARCHS)
    if name is None:
        arch = arch or "sm_90"
        known = CHIP_OF.get(arch)
        return arch, CHIPS[known] if known else None
    check_choice("chip", name, tuple(CHIPS))
    chip = CHIPS[name]
    if arch not in (None, chip.arch):
        raise ValueError(f"chip is {name!r}, an {chip.arch}; arch is {arch!r}")
    return chip.arch, chip


def _make_writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"out is {str(out)!r}; it cannot be made: {error.strerror}") from error
    if not os.access(out, os.W_OK):
        raise OSError(f"out is {str(out)!r}; it must be a directory that can be written")


def _check_triton() -> None:
    if importlib.util.find_spec("triton") is None:
        raise ValueError(
            "codegen compiles Triton kernels, and triton is not installed: pip install triton"
        )
    import triton

    if triton.knobs.runtime.interpret:
        raise ValueError("TRITON_INTERPRET is set: kernels are interpreted, not compiled; unset it")


def _slug(name: str) -> str:
    return re.sub(r"\W+", "-", name)


def _kernel_row(arch: str, kernel: Kernel, chip: Chip | None, budgeted: bool) -> tuple[str, ...]:
    limited = budgeted and kernel.loops
    resident = occupancy(kernel.registers, kernel.shared, kernel.num_warps, chip) if chip else None
    return (
        kernel.name,
        _beside(kernel.registers, REGISTERS[arch] if limited else None),
        _beside(kernel.stack, 0 if limited else None),
        str(kernel.shared),
        "-" if resident is None else f"{resident:.0%}",
    )


def _loop_rows(
    kernel: Kernel, unit: str, units: int, chip: Chip, budgeted: bool
) -> list[tuple[str, ...]]:
    rows = []
    for name, loop in kernel.loops.items():
        seconds = limits(loop, units, chip)
        figures = (loop.instructions, loop.mufu, loop.bytes)
        most = astuple(BUDGETS[kernel.name, name]) if budgeted else (None,) * len(figures)
        rows.append(
            (
                f"{kernel.name}, {name}",
                unit,
                *map(_beside, figures, most),
                f"{loop.load_width} B",
                f"{loop.store_width} B" if loop.store_width else "-",
                str(loop.barriers),
                str(loop.shuffles),
                *(f"{1e3 * s:.3g}" for s in seconds.values()),
                max(seconds, key=seconds.__getitem__),
            )
        )
    return rows


def _visit_row(kernel: Kernel, vocab_size: int, units: int, chip: Chip) -> tuple[str, ...]:
    first, second = kernel.loops["fast"], kernel.loops["gradient"]
    warps = chip.warps * occupancy(kernel.registers, kernel.shared, kernel.num_warps, chip)
    in_flight = chip.sms * round(warps / kernel.num_warps)
    predicted = second_look_hits(round(vocab_size * first.bytes), in_flight, chip)
    seconds = (visit(first, second, hits, units, chip) for hits in (predicted, 1.0, 0.0))
    return kernel.name, f"{predicted:.0%}", *(f"{1e3 * s:.3g}" for s in seconds)


def _beside(value: float, budget: float | None) -> str:
    shown = f"{value:.4g}"
    return shown if budget is None else f"{shown} / {budget:.4g}"


def _print(rows: list[tuple[str, ...]]) -> None:
    """The first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for first, *others in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(others, widths[1:])]
        print("  ".join([f"{first:{widths[0]}}", *cells]))
