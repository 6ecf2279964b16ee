"""The report's tables in Markdown, from its summary: its own, and those of docs/numerics.md."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from kl_kernels.lab.validate.report.measure import DTYPE_EAGER, EAGER
from kl_kernels.lab.validate.report.summary import contenders

Results = dict[str, Any]


def markdown(report: Results, dtypes: Sequence[str], quantities: Sequence[str]) -> str:
    """Errors by dtype and quantity, and those of small KLs."""
    return "\n\n".join([worst(report, dtypes, quantities), small_kls(report)])


def worst(report: Results, dtypes: Sequence[str], quantities: Sequence[str]) -> str:
    """A row per dtype and quantity: each contender's mean and largest error over all cells."""
    found, names = report["summary"]["worst"], contenders(report)
    lines = header(report, "error, mean and largest [ulp]", names)
    for dtype in dtypes:
        for quantity in quantities:
            cells = (said(found[dtype][quantity][name]) for name in names)
            lines.append(f"| {written(quantity)}, {dtype} | {' | '.join(cells)} |")
    return "\n".join(lines)


def small_kls(report: Results) -> str:
    """A row per KL: each contender's median and largest relative error, of float32 logits."""
    names = [name for name in contenders(report) if name != DTYPE_EAGER]
    lines = header(report, "KL [nats]: its relative error, median and largest", names)
    for kl, by_name in report["summary"]["small_kls"].items():
        cells = (
            f"{percent(f['median'])}, {percent(f['max'])}" if (f := by_name[name]) else ""
            for name in names
        )
        lines.append(f"| {kl} | {' | '.join(cells)} |")
    return "\n".join(lines)


def header(report: Results, what: str, names: Sequence[str]) -> list[str]:
    called = []
    for name in names:
        label = report["labels"].get(name, name)
        called.append(label if name in (EAGER, DTYPE_EAGER) else re.sub(r"^\w+", r"`\g<0>`", label))
    return [f"| {what} | {' | '.join(called)} |", "|---|" + "---|" * len(names)]


def said(found: Results | None) -> str:
    if found is None:
        return ""
    if "max" not in found:
        return "NaN"
    text = f"{short(found['mean'])}, {short(found['max'])}"
    return f"{text}; NaN in {found['nan']}" if found["nan"] else text


def short(x: float) -> str:
    """Two digits; one of a very small number."""
    if x == 0:
        return "0"
    if not 0.01 <= x < 1e5:
        return re.sub(r"e([+-])0?", lambda m: "e" + m[1].strip("+"), f"{x:.0e}")
    return f"{x:,.{max(0, 1 - math.floor(math.log10(x)))}f}"


def percent(x: float) -> str:
    return f"{short(100 * x)} %"


def written(quantity: str) -> str:
    """`d kl` is a gradient, `stats ...` is from `token_stats`."""
    if quantity.startswith("stats "):
        return f"{quantity.removeprefix('stats ')} of `token_stats`"
    if quantity == "d stats":
        return "gradient of `token_stats`"
    if quantity.startswith("d "):
        return f"gradient of {quantity.removeprefix('d ')}"
    return quantity
