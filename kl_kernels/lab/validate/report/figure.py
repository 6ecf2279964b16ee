"""The report's picture. Colours are Okabe and Ito's, told apart by all eyes; markers differ too."""

from __future__ import annotations

import io
from typing import Any

import matplotlib
from matplotlib.figure import Figure  # without pyplot: no global state, no display
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

from kl_kernels.lab.validate.report.gate import FLOOR
from kl_kernels.lab.validate.report.measure import DTYPE_EAGER, EAGER
from kl_kernels.lab.validate.report.summary import contenders, measured, middle

DPI = 200
STYLE = {  # colour, marker
    "reference": ("#666666", "s"),
    "cpu": ("#0072B2", "o"),
    "triton": ("#009E73", "^"),
    "cuda": ("#CC79A7", "v"),
    EAGER: ("#D55E00", "X"),
    DTYPE_EAGER: ("#E69F00", "P"),
}
OTHER = ("black", "d")
SMALLEST = {"relative": 1e-9, "ulp": 1e-3}  # an error of 0 is drawn here
Results = dict[str, Any]
Point = tuple[float, float, float, float]  # x, median, 10 % and 90 % quantile


def png(results: Results) -> bytes:
    buffer = io.BytesIO()
    with matplotlib.rc_context({"font.size": 10, "axes.titlesize": 11.5}):
        draw(results).savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def draw(results: Results) -> Figure:
    # Narrow, in large type: 400 pixels wide it can still be read.
    figure = Figure(figsize=(6.0, 14.0), layout="constrained", facecolor="white")
    names = contenders(results)
    small, narrow, sizes, offsets = figure.subplots(4, 1)
    narrow_dtype = next((d for d in results["grid"]["dtypes"] if d != "float32"), "float32")
    for axes, dtype in ((small, "float32"), (narrow, narrow_dtype)):
        curves(axes, {name: relative_kl(results, name, dtype) for name in names})
        axes.set(
            title=f"KL of {dtype} logits",
            xlabel="KL  [nats]",
            ylabel="relative error of the KL  [1]",
        )
        axes.set_xscale("log")
        axes.axhline(0.01, color="black", linewidth=0.8, linestyle=(0, (4, 3)))
        axes.annotate(
            "1 %",
            (1, 0.01),
            (-3, 2),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            fontsize=9.5,
        )
    curves(sizes, {name: in_ulps(results, name, "entropy", "vocab_size") for name in names})
    sizes.set(
        title="Entropy of float32 logits",
        xlabel="vocabulary  [tokens]",
        ylabel="error of the entropy  [ulp of max(1, value)]",
    )
    sizes.set_xscale("log")
    curves(offsets, {name: in_ulps(results, name, "kl", "offset") for name in names})
    offsets.set(
        title="KL of float32 logits with offsets",
        ylabel="error of the KL  [ulp of max(1, value)]",
        xlabel="added to the policy's logits, taken from the reference's  [1]",
    )
    offsets.set_xscale("symlog", linthresh=10)
    offsets.xaxis.set_minor_formatter(NullFormatter())
    for axes in (sizes, offsets):
        axes.axhline(FLOOR["max"], color="black", linewidth=0.8, linestyle=(0, (4, 3)))
        axes.annotate(
            "floor of the gate",
            (0, FLOOR["max"]),
            (4, 3),
            ha="left",
            fontsize=9.5,
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
        )
    for axes in (small, narrow, sizes, offsets):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=12))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.25)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    lines = {line.get_label(): line for axes in (small, narrow) for line in axes.get_lines()}
    drawn = [name for name in names if name in lines]
    labels = [results["labels"].get(name, name) for name in drawn]
    figure.legend(
        [lines[name] for name in drawn], labels, loc="outside upper center", ncols=2, frameon=False
    )
    return figure


def curves(axes: Any, points_by_name: dict[str, list[Point]]) -> None:
    """Draw each contender's median of the rows, and a band from the 10 % to the 90 % quantile."""
    for name, points in points_by_name.items():
        if not points:
            continue
        x, median, low, high = zip(*sorted(points))
        colour, marker = STYLE.get(name, OTHER)
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
        axes.plot(x, median, color=colour, marker=marker, markersize=5, linewidth=1.8, label=name)


def relative_kl(results: Results, name: str, dtype: str) -> list[Point]:
    """Pool all vocabularies, at the KL that the rows have, which may be above the one asked for."""
    by_kl: dict[float, list[Results]] = {}
    for m in results["cells"]:
        cell = m["cell"]
        if cell["axis"] == "kl" and cell["dtype"] == dtype and cell["kl"] and name in m["errors"]:
            found = m["errors"][name]["kl"]["relative"] | {"x": m["true_kl"]["q50"]}
            if found["q90"] is not None:
                by_kl.setdefault(cell["kl"], []).append(found)
    least = SMALLEST["relative"]
    return [
        (
            middle([f["x"] for f in found]),
            max(least, middle([f["q50"] for f in found])),
            max(least, min(f["q10"] for f in found)),
            max(least, max(f["q90"] for f in found)),
        )
        for found in by_kl.values()
    ]


def in_ulps(results: Results, name: str, quantity: str, axis: str) -> list[Point]:
    """Collect errors on float32 logits, along an axis through the grid's base."""
    grid = results["grid"]
    least = SMALLEST["ulp"]
    points: dict[float, Point] = {}
    for cell, errors in measured(results, "float32"):
        at_base = cell["axis"] == "kl" and cell["kl"] == grid["base_kl"]
        here = (
            at_base
            if axis == "vocab_size"
            else (at_base and cell["vocab_size"] == grid["base_vocab_size"])
        )
        if (cell["axis"] == axis or here) and name in errors:
            found = errors[name][quantity]
            if found["q90"] is not None:
                low, median, high = (max(least, found[q]) for q in ("q10", "q50", "q90"))
                # The interpreter's cells come last, and are not the grid's.
                points.setdefault(cell[axis], (float(cell[axis]), median, low, high))
    return list(points.values())
