"""Pictures of instructions per logit and of least times: bars, a panel for each job."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import groupby
from typing import Any

from matplotlib.figure import Figure

from bench.common.drawing import WIDTH, svg
from bench.offline.jobs import JOBS, OURS

Row = Mapping[str, Any]

# Okabe and Ito's: told apart by all eyes.
BLUE, OTHERS, GREY = "#0072B2", "#BBBBBB", "#555555"
RESOURCES = {"memory": "#56B4E9", "issue": "#E69F00", "mufu": "#D55E00"}
SAYS = {"memory": "memory", "issue": "instructions", "mufu": "special functions"}
ROW_INCHES = 0.42  # height of a kernel: a line of words and under it the bar
BAR = {"height": 0.42, "align": "edge"}
PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}  # under words, over lines
ROOM = 1.35  # width of a panel, in longest bars: the rest is for figures


def instructions(results: Mapping[str, Any]) -> bytes:
    """A bar for each kernel; where instructions take longer than reading the logits is marked."""

    def draw(axes: Any, i: int, row: Row) -> None:
        value = row["instructions"] / logits(row)
        axes.barh(i, value, color=BLUE if is_ours(row) else OTHERS, **BAR)
        spilled = " (registers spill)" if row["stack"] else ""
        say(axes, i, value, f"{value:.1f}", f"{row['computes']}{spilled}", row)

    figure, panels = bars(
        results,
        draw,
        "Instructions that a GPU thread executes for each logit\n(fewer is better)",
        "instructions per logit",
    )
    slots = results["slots_per_logit"]
    low, high = panels[0].get_ylim()
    panels[0].set_ylim(low + 0.7, high)
    for axes in panels[:2]:
        axes.axvline(slots, color=GREY, linestyle="--", linewidth=1, zorder=0)
    panels[0].annotate(
        f"beyond {slots:.1f}, an H200 reads bfloat16 logits faster than it computes",
        (slots, 0),
        (4, 1),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        color=GREY,
        fontsize=9,
        va="bottom",
    )
    return svg(figure)


def least_times(results: Mapping[str, Any]) -> bytes:
    """A bar as long as the slowest resource needs, coloured by which one that is."""

    def draw(axes: Any, i: int, row: Row) -> None:
        bound, time = row["bound_by"], row["least_ms"]
        axes.barh(i, time, color=RESOURCES[bound], **BAR)
        say(axes, i, time, f"{time:.2f} ms, {SAYS[bound]}", row["computes"], row)

    shape = f"{results['rows']} x {results['vocab_size']}"
    figure, _ = bars(
        results,
        draw,
        f"The least time on an H200 for logits of {shape},\nand what it is spent waiting for",
        "milliseconds (fewer is better)",
    )
    return svg(figure)


def bars(
    results: Mapping[str, Any], draw: Callable[[Any, int, Row], None], title: str, unit: str
) -> tuple[Figure, list[Any]]:
    jobs = [(job, list(rows)) for job, rows in groupby(results["kernels"], lambda row: row["job"])]
    heights = [len(rows) + 1.2 for _, rows in jobs]
    figure = Figure(figsize=(WIDTH, ROW_INCHES * sum(heights) + 1.1), layout="constrained")
    panels = figure.subplots(len(jobs), 1, sharex=True, height_ratios=heights, squeeze=False)
    for axes, (job, rows) in zip(panels.flat, jobs):
        for i, row in enumerate(rows):
            draw(axes, i, row)
        axes.set_yticks([])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_title(JOBS[job], loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set_xlim(0, ROOM * panels[0, 0].get_xlim()[1])
    panels[-1, 0].set_xlabel(unit)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure, list(panels.flat)


def say(axes: Any, i: int, end: float, figure: str, about: str, row: Row) -> None:
    """Over a bar the kernel's name, and in grey what it computes; at the bar's end its figure."""
    style = {"va": "center", "fontsize": 9, "bbox": PAPER}
    offset = {"textcoords": "offset points", **style}
    about = about.removesuffix(", and its gradient")  # the panel's title says so
    name = axes.text(0, i - 0.24, label(row), fontweight=weight(row), **style)
    words = [
        name,
        axes.annotate(about, (1, 0.5), (4, 0), xycoords=name, color=GREY, **offset),
        axes.annotate(figure, (end, i + 0.21), (4, 0), fontweight=weight(row), **offset),
    ]
    for text in words:
        text.set_in_layout(False)  # axes would shrink to make room beside themselves


def weight(row: Row) -> str:
    return "bold" if is_ours(row) else "normal"


def label(row: Row) -> str:
    if is_ours(row):
        return f"kl_kernels, {row['name']}"
    name: str = row["name"]
    return name


def is_ours(row: Row) -> bool:
    return row["library"] == OURS


def logits(row: Row) -> int:
    """In one unit."""
    return 2 if row["unit"] == "pair" else 1
