"""Pictures of gpu_<chip>.json: each job's share of the memory's ceiling, by vocabulary and rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.common.drawing import WIDTH, svg
from bench.common.machine import chip_name

# Okabe and Ito's: told apart by all eyes.
COLOURS = {"triton": "#0072B2", "cuda": "#009E73", "torch.compile": "#D55E00", "eager": "#888888"}
MARKS = {"triton": "o", "cuda": "s", "torch.compile": "^", "eager": "v"}
Results = Mapping[str, Any]
Axis = tuple[str, str, str]  # the field that differs, the field in common, the label
BY_VOCABULARY: Axis = ("vocab_size", "rows", "vocabulary")
BY_ROWS: Axis = ("rows", "vocab_size", "rows")


def stem(results: Results) -> str:
    """Return the chip's name in file names."""
    return chip_name(str(results["device"]))


def drawn(results: Results) -> dict[str, str]:
    """Return the pictures' names and captions; an axis with a single size has no picture."""
    main = results["measurements"][0] if results["measurements"] else {}
    says = {
        "vocabularies": (BY_VOCABULARY, "Share of the memory's ceiling by vocabulary, {rows} rows"),
        "rows": (BY_ROWS, "Share of the memory's ceiling by rows, V = {vocab_size}"),
    }
    return {
        f"gpu_{stem(results)}_{name}": text.format(**main)
        for name, (axis, text) in says.items()
        if any(len(sizes(lines)) > 1 for lines in panels(results, axis).values())
    }


def pictures(results: Results) -> dict[str, bytes]:
    """SVGs by name."""
    axes = {"vocabularies": BY_VOCABULARY, "rows": BY_ROWS}
    return {
        name: draw(results, axes[name.rpartition("_")[2]], title)
        for name, title in drawn(results).items()
    }


Lines = dict[str, dict[int, Mapping[str, Any]]]  # by contender, its measurements by size


def panels(results: Results, axis: Axis) -> dict[str, Lines]:
    """Collect lines by job; the field in common is the first measurement's."""
    differs, common, _ = axis
    found: dict[str, Lines] = {}
    for m in results["measurements"]:
        if m[common] == results["measurements"][0][common]:
            found.setdefault(m["job"], {}).setdefault(m["contender"], {})[m[differs]] = m
    return found


def sizes(lines: Lines) -> list[int]:
    return sorted({size for line in lines.values() for size in line})


def draw(results: Results, axis: Axis, title: str) -> bytes:
    from matplotlib.figure import Figure

    by_job = {job: lines for job, lines in panels(results, axis).items() if len(sizes(lines)) > 1}
    figure = Figure(figsize=(WIDTH, 2.6 * len(by_job) + 1.0), layout="constrained")
    grid = figure.subplots(len(by_job), 1, squeeze=False, sharey=True)
    for axes, (job, lines) in zip(grid.flat, by_job.items()):
        ticks = sizes(lines)
        for name, line in lines.items():
            places = [ticks.index(size) for size in sorted(line)]
            found = [line[size] for size in sorted(line)]
            shares = [100 * m["share"] for m in found]
            # A slower run is a lower share.
            error = [
                [100 * m["share"] * (1 - m["median_us"] / m["slowest_us"]) for m in found],
                [100 * m["share"] * (m["median_us"] / m["fastest_us"] - 1) for m in found],
            ]
            axes.errorbar(
                places,
                shares,
                error,
                color=COLOURS.get(name, "#888888"),
                label=name,
                marker=MARKS.get(name, "o"),
                markersize=5,
                linewidth=1.6,
                capsize=2,
            )
        axes.axhline(100, color="#555555", linestyle="--", linewidth=1)
        axes.set_xticks(range(len(ticks)), [f"{size:,}" for size in ticks], fontsize=9)
        axes.set_title(job, loc="left", fontsize=11, weight="bold")
        axes.set_xlabel(axis[2])
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("% of the ceiling")
    handles: dict[str, Any] = {}
    for axes in grid.flat:
        handles |= {label: h for h, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, loc="outside upper left", ncols=3, frameon=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    return svg(figure)
