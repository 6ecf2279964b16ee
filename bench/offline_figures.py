"""Pictures of instructions per logit and of least times: bars, a panel for each job."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import groupby
from typing import Any

from drawing import svg
from matplotlib.figure import Figure
from offline_jobs import JOBS, OURS

Row = Mapping[str, Any]

# Okabe and Ito's: told apart by all eyes.
BLUE, OTHERS, GREY = "#0072B2", "#BBBBBB", "#555555"
RESOURCES = {"memory": "#56B4E9", "issue": "#E69F00", "mufu": "#D55E00"}
SAYS = {"memory": "memory", "issue": "instructions", "mufu": "special functions"}
BAR_INCHES = 0.3
PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}  # under words, over lines
ROOM = 1.75  # of the longest bar, for words


def instructions(results: Mapping[str, Any]) -> bytes:
    """A bar for each kernel; where instructions take longer than reading the logits is marked."""

    def draw(axes: Any, i: int, row: Row) -> None:
        value = row["instructions"] / logits(row)
        axes.barh(i, value, color=BLUE if is_ours(row) else OTHERS)
        spilled = " (registers spill)" if row["stack"] else ""
        say(axes, i, value, f"{value:.1f}", f"{row['computes']}{spilled}", row)

    figure, panels = bars(
        results, draw,
        "Instructions that a GPU thread executes for each logit (fewer is better)",
        "instructions per logit",
    )  # fmt: skip
    slots = results["slots_per_logit"]
    low, high = panels[0].get_ylim()
    panels[0].set_ylim(low + 0.7, high)
    for axes in panels[:2]:
        axes.axvline(slots, color=GREY, linestyle="--", linewidth=1, zorder=0)
    panels[0].annotate(
        f"beyond {slots:.1f}, an H200 reads bfloat16 logits faster than it computes",
        (slots, 0), (4, 1), xycoords=("data", "axes fraction"), textcoords="offset points",
        color=GREY, fontsize=8.5, va="bottom",
    )  # fmt: skip
    return svg(figure)


def least_times(results: Mapping[str, Any]) -> bytes:
    """A bar as long as the slowest resource needs, coloured by which one that is."""

    def draw(axes: Any, i: int, row: Row) -> None:
        bound, time = row["bound_by"], row["least_ms"]
        axes.barh(i, time, color=RESOURCES[bound])
        say(axes, i, time, f"{time:.2f} ms, {SAYS[bound]}", row["computes"], row)

    shape = f"{results['rows']} x {results['vocab_size']}"
    figure, _ = bars(
        results, draw,
        f"The least time on an H200 for logits of {shape}, and what it is spent waiting for",
        "milliseconds (fewer is better)",
    )  # fmt: skip
    return svg(figure)


def bars(
    results: Mapping[str, Any], draw: Callable[[Any, int, Row], None], title: str, unit: str
) -> tuple[Figure, list[Any]]:
    jobs = [(job, list(rows)) for job, rows in groupby(results["kernels"], lambda row: row["job"])]
    heights = [len(rows) + 1.2 for _, rows in jobs]
    figure = Figure(figsize=(11.5, BAR_INCHES * sum(heights) + 1.1), layout="constrained")
    panels = figure.subplots(len(jobs), 1, sharex=True, height_ratios=heights, squeeze=False)
    for axes, (job, rows) in zip(panels.flat, jobs):
        for i, row in enumerate(rows):
            draw(axes, i, row)
        axes.set_yticks(range(len(rows)), [label(row) for row in rows], fontsize=9)
        for tick, row in zip(axes.get_yticklabels(), rows):
            tick.set_fontweight(weight(row))
        axes.invert_yaxis()
        axes.set_title(JOBS[job], loc="left", fontsize=10.5)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set_xlim(0, ROOM * panels[0, 0].get_xlim()[1])
    panels[-1, 0].set_xlabel(unit)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    return figure, list(panels.flat)


def say(axes: Any, i: int, end: float, figure: str, about: str, row: Row) -> None:
    """At the end of a bar: its figure, and in grey what the kernel computes."""
    number = axes.annotate(
        figure, (end, i), (4, 0), textcoords="offset points", va="center", fontsize=9,
        fontweight=weight(row), bbox=PAPER,
    )  # fmt: skip
    axes.annotate(
        about, (1, 0.5), (7, 0), xycoords=number, textcoords="offset points", va="center",
        fontsize=8.5, color=GREY, bbox=PAPER,
    )  # fmt: skip


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
