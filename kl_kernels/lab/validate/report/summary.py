"""The summary of a report's cells that its tables show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from kl_kernels.lab.validate.report.measure import DTYPE_EAGER, EAGER, GRADIENTS, VALUES

Results = dict[str, Any]


def summarise(results: Results) -> Results:
    """Errors by dtype, quantity and contender; those of small float32 KLs by KL and contender."""
    grid = results["grid"]
    return {
        "n_cells": len(results["cells"]),
        "worst": {
            dtype: {
                quantity: {
                    name: of_all_cells(results, dtype, quantity, name)
                    for name in contenders(results)
                }
                for quantity in (*VALUES, *GRADIENTS)
            }
            for dtype in grid["dtypes"]
        },
        "small_kls": {
            f"{kl:g}": {name: of_kl(results, kl, name) for name in contenders(results)}
            for kl in grid["kls"]
            if kl > 0
        },
    }


def contenders(results: Results) -> list[str]:
    """Backends, then eager."""
    return [*results["backends"], EAGER, DTYPE_EAGER]


def measured(results: Results, dtype: str) -> Iterator[tuple[Results, Results]]:
    """Each cell of a dtype, and its errors by contender and quantity."""
    for m in results["cells"]:
        if m["cell"]["dtype"] == dtype:
            yield m["cell"], m["errors"]


def of_all_cells(results: Results, dtype: str, quantity: str, name: str) -> Results | None:
    """Mean and largest over the cells with a number, and the count of NaN; None: not run."""
    found = [e[name][quantity] for _, e in measured(results, dtype) if name in e]
    numbers = [f for f in found if f["max"] is not None]
    if not numbers:
        return {"nan": len(found)} if found else None
    mean = sum(f["mean"] for f in numbers) / len(numbers)
    return {
        "mean": float(f"{mean:.3g}"),
        "max": max(f["max"] for f in numbers),
        "nan": len(found) - len(numbers),
    }


def of_kl(results: Results, kl: float, name: str) -> Results | None:
    found = [
        e[name]["kl"]["relative"]
        for cell, e in measured(results, "float32")
        if cell["axis"] == "kl" and cell["kl"] == kl and name in e
    ]
    if not found:
        return None
    return {"median": middle([f["q50"] for f in found]), "max": max(f["max"] for f in found)}


def middle(numbers: Sequence[float]) -> float:
    return sorted(numbers)[len(numbers) // 2]
