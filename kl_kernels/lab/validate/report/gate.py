"""The rule of the report: no worse than torch eager, in any cell, beyond a few roundings.

The floor: a value is a difference of two logarithms, each of the value's size, as long as a row's
anchor is its maximum: log p = ln2 tx - ln sx, and KL and entropy alike. On the way to each are four
float32 roundings of half an ulp or less: scale (its fma and its constant), weights, sum, logarithm
or quotient. Eight halves are 4 ulps; that many are not held against a kernel where eager has fewer.
Their signs differ from row to row, so the mean may have half of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kl_kernels.lab.validate.report.grid import SMALL_KL
from kl_kernels.lab.validate.report.measure import DIVERGENCES, EAGERS

FLOOR = {"max": 4.0, "mean": 2.0}  # ulps
# Where eager has no number: the budgets of `errors.py`, 2e-6 and 1e-5, in ulps.
BUDGET = {"values": 16.0, "gradients": 80.0}
# |error| <= KL_BUDGET + 2e-6 KL, of logits within +-50; at a KL of 1e-5 that is 3 %.
KL_BUDGET, KL_RANGE = 3e-7, 50.0
SMALL_KL_ERROR = {"reference": 0.001, "cpu": 0.001}
# Kernels that round the sums of both models' weights apart, of logits within +-25: a weight near 1
# has an error of 1e-7, and where rows are peaked there are few to average over.
OTHERS_SMALL_KL_ERROR, OTHERS_SMALL_KL_RANGE = 0.03, 25.0

Results = dict[str, Any]


@dataclass(frozen=True)
class Breach:
    backend: str
    cell: str
    quantity: str
    says: str

    def __str__(self) -> str:
        return f"{self.backend}: {self.quantity} of {self.cell}: {self.says}"


def breaches(results: Results) -> list[Breach]:
    """List the failures of every backend in every cell of a report's results."""
    return [
        Breach(name, measured["name"], quantity, says)
        for measured in results["cells"]
        for name, errors in measured["errors"].items()
        if name not in EAGERS
        for quantity, found in errors.items()
        for says in _complaints(name, quantity, found, measured)
    ]


def _complaints(backend: str, quantity: str, found: Results, measured: Results) -> Iterator[str]:
    cell = measured["cell"]
    if found["not_finite"]:
        yield f"{found['not_finite']} numbers are not finite, and all should be"
        return
    if found["negative"]:
        yield f"{found['negative']} rows are negative"
    yield from _worse_than_eager(quantity, found, measured)
    if quantity not in DIVERGENCES:
        return
    if cell["kl"] == 0 and found["largest"] != 0:
        yield f"up to {found['largest']:.3g} for equal rows, where it is exactly 0"
    if quantity == "jsd":
        return
    if measured["largest_logit"] <= KL_RANGE and found["beyond"] > KL_BUDGET:
        yield f"off by {found['beyond']:.3g} beyond 2e-6 of it, over {KL_BUDGET:.0e}"
    if quantity == "kl" and cell["dtype"] == "float32" and cell["kl"] == SMALL_KL:
        within = measured["largest_logit"] <= OTHERS_SMALL_KL_RANGE
        accepted = SMALL_KL_ERROR.get(backend, OTHERS_SMALL_KL_ERROR if within else math.inf)
        if found["relative"]["max"] > accepted:
            yield f"off by {found['relative']['max']:.2%} of {SMALL_KL:g}, over {accepted:.1%}"


def _worse_than_eager(quantity: str, found: Results, measured: Results) -> Iterator[str]:
    budget = BUDGET["gradients" if quantity.startswith("d ") else "values"]
    for figure, floor in FLOOR.items():
        eager = [
            errors[quantity][figure]
            for name, errors in measured["errors"].items()
            if name in EAGERS and errors[quantity][figure] is not None
        ]
        accepted = max(floor, min(eager, default=budget))
        if found[figure] > accepted:
            theirs = f"eager {min(eager):.3g}" if eager else f"no number from eager, {budget:g}"
            yield f"{figure} {found[figure]:.3g} ulp ({theirs}, floor {floor:g})"
