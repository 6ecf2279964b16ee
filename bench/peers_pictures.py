"""The pictures of peers.json: bars of time and memory for each operation, time by size."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

OURS = "kl_kernels"
BLUE, ORANGE, GREY, INK = "#0072B2", "#D55E00", "#B5B5B5", "#333333"
COLOURS = {OURS: BLUE, "torch.compile": ORANGE, "torch eager": "#666666"}
COLUMNS = 3
Results = dict[str, Any]


def pictures(results: Results) -> dict[str, bytes]:
    """SVGs by name."""
    stem = "peers" if results["kind"] == "cpu" else "peers_gpu"
    main = main_case(results)
    found = {
        f"{stem}_times": bars(main, "median_ms", milliseconds, times_slower, "time"),
        f"{stem}_memory": bars(main, "extra_mb", megabytes, times_more, "peak extra memory"),
    }
    if lines := by_size(results):
        found[f"{stem}_sizes"] = sizes(lines)
    return found


def main_case(results: Results) -> dict[str, list[Results]]:
    """By operation, everybody's measurement in its first size and dtype."""
    cases: dict[str, list[Results]] = {}
    for m in results["measurements"]:
        case = cases.setdefault(m["operation"], [])
        if not case or all(m[key] == case[0][key] for key in ("size", "dtype")):
            case.append(m)
    return cases


def milliseconds(x: float) -> str:
    if x < 0.1:
        return f"{1e3 * x:.0f} µs"
    return f"{x:.0f} ms" if x >= 100 else f"{x:.1f} ms" if x >= 10 else f"{x:.2f} ms"


def megabytes(x: float) -> str:
    return f"{x:.0f} MB" if x >= 0.5 else "0 MB"


def times_slower(m: Results, ours: Results) -> str:
    ratio = m["ratio"]
    digits = 0 if ratio >= 10 else 1
    return f"ours is {ratio:.{digits}f}x faster" if ratio >= 1 else f"{1 / ratio:.1f}x faster"


def times_more(m: Results, ours: Results) -> str:
    ratio = m["extra_mb"] / max(ours["extra_mb"], 1e-9)
    return f"{ratio:.0f}x ours" if ours["extra_mb"] >= 0.5 and ratio >= 1.5 else ""


def bars(
    cases: dict[str, list[Results]],
    column: str,
    unit: Callable[[float], str],
    compared: Callable[[Results, Results], str],
    what: str,
) -> bytes:
    """A panel for each operation, a bar for each contender, from zero, with its number."""
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    n_rows = math.ceil(len(cases) / COLUMNS)
    most = [
        max(len(c) for c in list(cases.values())[r * COLUMNS : (r + 1) * COLUMNS])
        for r in range(n_rows)
    ]
    figure = Figure(figsize=(14, sum(0.36 * n + 0.85 for n in most)), layout="constrained")
    grid = figure.subplots(n_rows, COLUMNS, squeeze=False, height_ratios=[n + 1.4 for n in most])
    for axes, (operation, case) in zip(grid.flat, cases.items()):
        ours = next(m for m in case if m["contender"] == OURS)
        values = [m[column] for m in case]
        largest = max(*values, 1e-9) if len(values) > 1 else max(values[0], 1e-9)
        for i, m in enumerate(case):
            name = m["contender"]
            axes.barh(i, m[column], height=0.72, color=COLOURS.get(name, GREY))
            says = unit(m[column])
            if name != OURS and (more := compared(m, ours)):
                says += f",  {more}"
            axes.text(m[column] + 0.015 * largest, i, says, va="center", fontsize=9,
                      color=BLUE if name == OURS else INK,
                      weight="bold" if name == OURS else "normal")  # fmt: skip
        axes.set_yticks(range(len(case)), [m["contender"] for m in case], fontsize=9.5)
        axes.get_yticklabels()[0].set(color=BLUE, weight="bold")
        axes.set_ylim(most[list(cases).index(operation) // COLUMNS] - 0.4, -0.6)
        axes.set_xlim(0, 1.75 * largest)
        axes.set_xticks([])
        axes.tick_params(length=0)
        for side in ("top", "right", "bottom"):
            axes.spines[side].set_visible(False)
        axes.set_title(operation, loc="left", fontsize=12, weight="bold")
        axes.set_title(f"{ours['size']}, {ours['dtype']}", loc="right", fontsize=8.5, color="#666")
    for axes in list(grid.flat)[len(cases) :]:
        axes.set_visible(False)
    figure.suptitle(
        f"{what}: shorter bars are better  (sizes: rows x vocabulary x width)",
        x=0.01, ha="left", fontsize=13,
    )  # fmt: skip
    return as_svg(figure)


def by_size(results: Results) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """For the exact KL: logits and milliseconds by contender, in the dtype of most sizes."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for m in results["measurements"]:
        if m["operation"].startswith("exact KL") and m["dtype"] == "bfloat16":
            lines = found.setdefault(m["operation"], {})
            place = (m["rows"] * m["vocab_size"], m["median_ms"], m["size"])
            lines.setdefault(m["contender"], []).append(place)
    return {
        operation: {name: sorted(line) for name, line in lines.items()}
        for operation, lines in found.items()
        if len(lines[OURS]) > 1
    }


def sizes(panels: dict[str, Any]) -> bytes:
    """Time against the number of logits, both logarithmic, in plain numbers."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    figure = Figure(figsize=(14, 5), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False)
    for axes, (operation, lines) in zip(grid.flat, panels.items()):
        for name, line in lines.items():
            x, y, _ = zip(*line)
            colour = COLOURS.get(name, "#888888")
            axes.plot(x, y, "o-", color=colour, linewidth=2.4 if name == OURS else 1.6)
            axes.annotate(f" {name}\n {milliseconds(y[-1])}", (x[-1], y[-1]), color=colour,
                          va="center", xytext=(6, 0), textcoords="offset points",
                          weight="bold" if name == OURS else "normal")  # fmt: skip
        ours = lines[OURS]
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks([x for x, *_ in ours])
        axes.set_xticks(
            [x for x, *_ in ours],
            [f"{s}\n{x / 1e6:.1f} million" for x, _, s in ours], fontsize=8.5,
        )  # fmt: skip
        low, high = axes.get_ylim()
        ticks = [v for e in range(-3, 6) for v in (10.0**e, 2 * 10.0**e, 5 * 10.0**e)]
        axes.yaxis.set_major_locator(FixedLocator([v for v in ticks if low <= v <= high]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_locator(NullLocator())
        axes.set_xlim(ours[0][0] / 1.6, ours[-1][0] * 3.2)
        axes.set_ylabel("milliseconds")
        axes.set_xlabel("rows x vocabulary, and logits of each model")
        axes.set_title(f"{operation}, bfloat16", loc="left", weight="bold")
        axes.grid(alpha=0.25)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    return as_svg(figure)


def as_svg(figure: Any) -> bytes:
    """The same bytes for the same figure; letters are shapes, so no reader's fonts matter."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "kl_kernels", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
