"""The pictures of peers.json: bars of time and memory for each operation, time by size."""

from __future__ import annotations

from collections.abc import Callable
from textwrap import wrap
from typing import Any

from bench.common.drawing import WIDTH, svg
from bench.common.machine import chip_name
from bench.peers.operations import OPERATIONS

OURS = "kl_kernels"
WHOLE = "PPO step"  # the operation with a picture of its own
BLUE, ORANGE, GREY, INK = "#0072B2", "#D55E00", "#B5B5B5", "#333333"
COLOURS = {
    OURS: BLUE,
    "torch.compile": ORANGE,
    "torch eager": "#666666",
    f"{OURS} in two visits": "#56B4E9",
}
Results = dict[str, Any]


def pictures(results: Results) -> dict[str, bytes]:
    """SVGs by name."""
    name, main = stem(results), main_case(results)
    found = {
        f"{name}_times": bars(main, "median_ms", milliseconds, times_slower, "Time"),
        f"{name}_memory": bars(main, "extra_mb", megabytes, times_more, "Peak extra memory"),
    }
    if WHOLE in main:
        found[f"{name}_step"] = bars(
            {WHOLE: main[WHOLE]}, "median_ms", milliseconds, times_slower, "Time"
        )
    if lines := by_size(results):
        found[f"{name}_sizes"] = sizes(lines)
    return found


def stem(results: Results) -> str:
    """Return the stem of the results file's name, with which its pictures' names begin."""
    return "peers" if results["kind"] == "cpu" else f"peers_{chip_name(results['device'])}"


def main_case(results: Results) -> dict[str, list[Results]]:
    """Collect, by operation, all contenders' measurements in its first size and dtype."""
    cases: dict[str, list[Results]] = {}
    for m in results["measurements"]:
        case = cases.setdefault(m["operation"], [])
        if not case or all(m[key] == case[0][key] for key in ("size", "dtype")):
            case.append(m)
    return cases


def said(m: Results) -> str:
    """A size and dtype in words."""
    parts = [tokens(m)]
    if m["vocab_size"]:
        parts.append(f"vocabulary {m['vocab_size']:,}")
    if m["width"]:
        parts.append(f"width {m['width']:,}")
    return ", ".join([*parts, m["dtype"]])


def tokens(m: Results) -> str:
    return f"{m['rows']:,} token{'s' if m['rows'] > 1 else ''}"


def milliseconds(x: float) -> str:
    if x < 0.1:
        return f"{1e3 * x:.0f} µs"
    return f"{x:.0f} ms" if x >= 100 else f"{x:.1f} ms" if x >= 10 else f"{x:.2f} ms"


def megabytes(x: float) -> str:
    return f"{x:.0f} MB" if x >= 0.5 else "0 MB"


def times_slower(m: Results, ours: Results) -> str:
    ratio = m["ratio"]
    digits = 0 if ratio >= 10 else 1
    if ratio < 1:
        return f"{1 / ratio:.1f}x faster than ours"
    return f"ours is {ratio:.{digits}f}x faster"


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

    usual = said(next(iter(cases.values()))[0])
    heights = [0.32 * len(case) + 0.75 for case in cases.values()]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.5), layout="constrained")
    grid = figure.subplots(len(cases), 1, squeeze=False, height_ratios=heights)
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
            axes.text(
                m[column] + 0.015 * largest,
                i,
                says,
                va="center",
                fontsize=9,
                color=BLUE if name == OURS else INK,
                weight="bold" if name == OURS else "normal",
            )
        names = [m["contender"].replace(" (", "\n(") for m in case]
        axes.set_yticks(range(len(case)), names, fontsize=9, linespacing=0.85)
        axes.get_yticklabels()[0].set(color=BLUE, weight="bold")
        axes.set_ylim(len(case) - 0.4, -0.6)
        axes.set_xlim(0, 2.1 * largest)
        axes.set_xticks([])
        axes.tick_params(length=0)
        for side in ("top", "right", "bottom"):
            axes.spines[side].set_visible(False)
        axes.spines["left"].set_bounds(-0.5, len(case) - 0.5)
        does = OPERATIONS[operation].does if said(ours) == usual else f"of {said(ours)}"
        under = "\n".join(wrap(does, 70))
        pad = 16 + 11 * under.count("\n")
        axes.set_title(operation, loc="left", fontsize=11, weight="bold", pad=pad)
        axes.annotate(
            under,
            (0, 1),
            (0, 4),
            fontsize=9,
            color="#666666",
            xycoords="axes fraction",
            textcoords="offset points",
        ).set_in_layout(False)
    figure.suptitle(f"{what} of {usual}:\nshorter is better", x=0.01, ha="left", fontsize=12)
    return svg(figure)


Lines = dict[str, list[dict[str, Any]]]  # by contender, its measurements


def by_size(results: Results) -> dict[str, tuple[list[str], Lines]]:
    """Collect all contenders' figures for the exact KL in bfloat16, by number of logits."""
    found = {}
    for operation in ("exact KL", "exact KL + gradient"):
        mine = [
            m
            for m in results["measurements"]
            if m["operation"] == operation and m["dtype"] == "bfloat16"
        ]
        mine.sort(key=lambda m: m["rows"] * m["vocab_size"])
        sizes = list(dict.fromkeys(f"{tokens(m)}\nx {m['vocab_size']:,}" for m in mine))
        lines: Lines = {}
        for m in mine:
            lines.setdefault(m["contender"], []).append(m)
        whole = {name: line for name, line in lines.items() if len(line) == len(sizes)}
        if len(sizes) > 1:
            found[operation] = (sizes, whole)
    return found


def sizes(panels: dict[str, tuple[list[str], Lines]]) -> bytes:
    """Time from size to size, on a logarithmic axis in plain numbers."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    from kl_kernels.lab.study.figures import label_ends

    figure = Figure(figsize=(WIDTH, 4.2 * len(panels)), layout="constrained")
    grid = figure.subplots(len(panels), 1, squeeze=False)
    for axes, (operation, (names, lines)) in zip(grid.flat, panels.items()):
        axes.set_yscale("log")
        ends = []
        for name, measured in lines.items():
            line = [m["median_ms"] for m in measured]
            colour = COLOURS.get(name, "#888888")
            axes.plot(
                range(len(line)), line, "o-", color=colour, linewidth=3 if name == OURS else 1.6
            )
            last, ours = measured[-1], lines[OURS][-1]
            slower = "" if name == OURS else f"\n{times_slower(last, ours)}"
            ends.append((line, f"{name} {milliseconds(line[-1])}{slower}", colour))
        axes.set_xticks(range(len(names)), names, fontsize=9)
        axes.margins(x=0.06, y=0.1)
        low, high = axes.get_ylim()
        ticks = [m * 10.0**e for e in range(-3, 6) for m in (1, 2, 5)]
        axes.yaxis.set_major_locator(FixedLocator([t for t in ticks if low <= t <= high]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda t, _: f"{t:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_ylabel("milliseconds (a logarithmic axis)")
        axes.set_xlabel("tokens x vocabulary")
        axes.set_title(f"{operation}: {OPERATIONS[operation].does}", loc="left", fontsize=9.5)
        axes.grid(alpha=0.25)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        label_ends(axes, ends)
    return svg(figure)
