"""Pictures of growth: a panel for each job, against the vocabulary and against the rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter, NullLocator

from bench.common.drawing import WIDTH, svg
from kl_kernels.lab.study.figures import PLAIN, label_ends

# Okabe and Ito's: told apart by all eyes.
COLOURS = {"kl_kernels": "#0072B2", "eager": "#D55E00", "torch.compile": "#009E73"}
GREY = "#555555"
TITLES = {
    "forward": "Log-probabilities, both KLs and entropy (token_kl)",
    "forward+backward": "The same, and the gradient of the logits",
    "policy loss": "Policy loss and its gradient (fused_policy_loss)",
}
X_LABELS = {"vocab_size": "size of the vocabulary (32 rows)", "rows": "rows (vocabulary 16384)"}
LEAST_MB = 0.1  # pages and the interpreter's own allocations are not told apart from it

Draw = Callable[[Any, str, str], list[tuple[list[float], str, Any]]]


def time_picture(results: Mapping[str, Any]) -> bytes:
    def draw(axes: Any, job: str, axis: str) -> list[tuple[list[float], str, Any]]:
        ends = []
        for curve in results["time"]:
            if (curve["job"], curve["axis"]) == (job, axis):
                colour = COLOURS[curve["contender"]]
                spread = curve["fastest_ms"], curve["slowest_ms"]
                axes.fill_between(curve["sizes"], *spread, color=colour, alpha=0.15, linewidth=0)
                axes.plot(curve["sizes"], curve["median_ms"], "o-", color=colour, markersize=3.5)
                text = f"{curve['contender']}\nslope {curve['slope']:.2f}"
                ends.append((curve["median_ms"], text, colour))
        return ends

    return panels(draw, "Time of a call; slope 1: twice the logits, twice the time", "milliseconds")


def memory_picture(results: Mapping[str, Any]) -> bytes:
    def draw(axes: Any, job: str, axis: str) -> list[tuple[list[float], str, Any]]:
        ends = []
        for m in results["memory"]:
            if m["job"] == job:
                found, colour = m[axis], COLOURS[m["contender"]]
                mb = np.maximum(np.array(found["peak_bytes"]) / 1e6, LEAST_MB).tolist()
                axes.plot(found["sizes"], mb, "o-", color=colour, markersize=3.5)
                ends.append((mb, m["contender"], colour))
                result = (np.array(found["result_bytes"]) / 1e6).tolist()
        if result[-1] >= LEAST_MB:
            axes.plot(found["sizes"], np.maximum(result, LEAST_MB), "--", color=GREY, zorder=5)
            axes.annotate(
                "the results alone",
                (found["sizes"][-3], result[-3]),
                (6, -12),
                textcoords="offset points",
                color=GREY,
                fontsize=9,
            )
        return ends

    title = f"Memory of a call on top of its inputs (at {LEAST_MB}: that or less)"
    return panels(draw, title, "MB")


def panels(draw: Draw, title: str, unit: str) -> bytes:
    shown = [(job, axis) for axis in X_LABELS for job in TITLES]
    figure = Figure(figsize=(WIDTH, 2.4 * len(shown)), layout="constrained")
    grid = figure.subplots(len(shown), 1, sharey=True)
    ends = []
    for axes, (job, axis) in zip(grid, shown):
        ends.append((axes, draw(axes, job, axis)))
        logarithmic(axes)
        axes.set(ylabel=unit, xlabel=X_LABELS[axis])
        axes.set_title(TITLES[job], loc="left", fontsize=9.5)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    for axes, found in ends:
        label_ends(axes, found)
    return svg(figure)


def logarithmic(axes: Any) -> None:
    """Plain numbers: sizes at their points, tens upwards."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    points = sorted({x for line in axes.get_lines() for x in line.get_xdata()})
    axes.xaxis.set_major_locator(FixedLocator(points[::-2]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PLAIN)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
