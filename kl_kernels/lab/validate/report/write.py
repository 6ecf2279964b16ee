"""Runs the report and writes it: report.json, report.md and numerics.png in a folder."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from kl_kernels import extras
from kl_kernels.files import write_bytes, write_text
from kl_kernels.info import device_name, facts
from kl_kernels.lab.validate.report.gate import breaches
from kl_kernels.lab.validate.report.grid import INTERPRETED, NumericsGrid
from kl_kernels.lab.validate.report.interpreter import summed_as_on_a_gpu
from kl_kernels.lab.validate.report.measure import GRADIENTS, VALUES, contenders, measure
from kl_kernels.lab.validate.report.summary import summarise
from kl_kernels.lab.validate.report.table import markdown
from kl_kernels.versions import commit

Results = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """Backends that are measured on the same cells."""

    backends: tuple[str, ...]
    grid: NumericsGrid


def parts_of(backends: Sequence[str], grid: NumericsGrid) -> list[Part]:
    """Triton's interpreter has a grid of its own, on which the others are measured as well."""
    interpreted = "triton" in backends and not torch.cuda.is_available()
    compiled = tuple(name for name in backends if not (interpreted and name == "triton"))
    parts = [Part(compiled, grid)] if compiled else []
    return [*parts, Part(tuple(backends), INTERPRETED)] if interpreted else parts


def run(backends: Sequence[str], grid: NumericsGrid, folder: Path, ran: str | None = None) -> bool:
    """Write the report; return whether the gate holds. `ran` is the commit if git cannot tell."""
    folder.mkdir(parents=True, exist_ok=True)
    ran = ran or commit()
    results = measure_all(parts_of(backends, grid)) | {"commit": ran}
    results["summary"] = summarise(results)
    found = breaches(results)
    results["breaches"] = [str(breach) for breach in found]
    text = json.dumps(results, indent=1, allow_nan=False)
    write_text(folder / "report.json", text + "\n")
    pictured = extras.is_installed("matplotlib")
    write_text(folder / "report.md", page(results, pictured))
    if pictured:
        from kl_kernels.lab.validate.report.figure import png

        write_bytes(folder / "numerics.png", png(results))
    else:
        print(f"no picture: {extras.sentence('it', 'matplotlib')}")
    for breach in found:
        print(f"GATE BROKEN {breach}")
    n = len(results["cells"])
    passed = f"all {n} cells passed on {', '.join(backends)}"
    verdict = f"{len(found)} checks of {n} cells failed" if found else passed
    print(f"{verdict}: {folder / 'report.md'}")
    return not found


def measure_all(parts: list[Part]) -> Results:
    """The results without their verdict."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backends = tuple(dict.fromkeys(name for part in parts for name in part.backends))
    cells = [(part, cell) for part in parts for cell in part.grid.cells()]
    interpreted = any(part.grid is INTERPRETED for part in parts)
    bar = tqdm(cells, desc="numerics", unit="cell", disable=not sys.stderr.isatty())
    with summed_as_on_a_gpu() if interpreted else nullcontext():
        found = [measure(cell, contenders(part.backends), device) for part, cell in bar]
    return {
        "device": device_name(),
        "facts": facts(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "backends": backends,
        "labels": {"triton": "triton (interpreted)"} if interpreted else {},
        "grid": asdict(parts[0].grid),
        "interpreted_grid": asdict(INTERPRETED) if interpreted else None,
        "cells": found,
    }


def page(results: Results, pictured: bool) -> str:
    verdict = "\n".join(f"- {says}" for says in results["breaches"]) or "The gate holds."
    return (
        f"# Errors against float64\n\n{results['device']}, torch {results['facts']['torch']}, "
        f"commit {results['commit']}, {results['time']}.\n\n{verdict}\n\n"
        + "![errors](numerics.png)\n\n" * pictured
        + markdown(results, results["grid"]["dtypes"], (*VALUES, *GRADIENTS))
        + "\n"
    )
