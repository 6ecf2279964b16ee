"""The pictures of a report. Colours are Okabe and Ito's and viridis, told apart by all eyes.

Lines are labelled where they end, not in a legend; every axis has its unit. Panels stand below each
other, narrow and in large type, so that a picture 400 pixels wide can still be read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure  # without pyplot: no global state, no display
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from kl_kernels.lab.study.estimators import SAMPLED
from kl_kernels.lab.study.fit import GaoFit
from kl_kernels.lab.study.plan import ADAPTIVE, described

Data = Mapping[str, Any]

GOLD, PROXY, OTHER, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
ESTIMATOR_COLOURS = {"k1": "#E69F00", "k2": "#CC79A7", "k3": "#56B4E9", "exact": "black"}
MARKERS = {"k1": "o", "k2": "s", "k3": "^"}
WIDTH = 6.0  # inches: letters of 10 points are then 9 pixels high in 400
SMALL = 9.0  # points, the smallest letters
DPI = 200
PLAIN = FuncFormatter(lambda x, _: f"{x:g}")  # 0.1, 1, 10 instead of powers


def pictures(data: Data) -> dict[str, Figure]:
    """Every picture that the study has the runs for, by name."""
    makers: dict[str, tuple[bool, Callable[[Data], Figure]]] = {
        "overoptimisation": (data["overoptimisation"] is not None, overoptimisation),
        "learning_curves": (True, learning_curves),
        "control": (True, control),
        "estimators": (bool(data["estimators"]), estimators),
    }
    return {name: make(data) for name, (there, make) in makers.items() if there}


def overoptimisation(data: Data) -> Figure:
    """Proxy and gold on the way without a penalty, and where the penalties end."""
    points = data["overoptimisation"]
    figure = Figure(figsize=(WIDTH, 8.0), layout="constrained")
    way, ends = figure.subplots(2, 1, height_ratios=(1.35, 1))
    d = np.sqrt(points["kl"])
    for name, colour in (("proxy", PROXY), ("gold", GOLD)):
        way.scatter(d, points[name], s=9, color=colour, alpha=0.55, linewidths=0)
    order = np.argsort(d)
    last = order[-max(1, len(order) // 10) :]
    for name, colour, says in (
        ("proxy", PROXY, "proxy reward\n(trained on)"),
        ("gold", GOLD, "gold score\n(never trained on)"),
    ):
        here = (float(d[last].max()), float(np.mean(np.array(points[name])[last])))
        _say(way, says, here, colour, (8, 0), va="center")
    _draw_fit(way, data)
    way.set_xlim(0, d.max() * 1.38)
    way.set_title("beta = 0: no KL penalty", loc="left")
    _draw_ends(ends, data)
    for axes in (way, ends):
        axes.set_ylabel("score per answer")
        axes.set_xlabel("distance from the reference, √KL  [√nat per answer]")
        axes.grid(alpha=0.25)
        _nats_on_top(axes)
    return figure


def _draw_fit(axes: Any, data: Data) -> None:
    points, fits = data["overoptimisation"], data["fits"]
    peak_d, peak = math.sqrt(points["observed_peak_kl"]), points["observed_peak_gold"]
    axes.plot(peak_d, peak, "*", markersize=16, color=GOLD, markeredgecolor="white", zorder=4)
    _say(axes, f"observed peak\n{peak_d**2:.0f} nats", (peak_d, peak), GOLD, (-40, 14))
    if not fits:
        return
    fit = GaoFit(*(fits["gold"][name] for name in ("alpha", "beta", "r_squared")))
    d = np.linspace(0, math.sqrt(max(points["kl"])), 200)
    start = points["gold_start"]
    axes.plot(d, start + fit(d), color=GOLD, linewidth=2)
    if fit.peak is not None and fit.peak <= d[-1]:
        top = start + float(fit(np.array(fit.peak)))
        axes.plot(fit.peak, top, "D", markersize=8, color="white", markeredgecolor=GOLD, zorder=4)
        _say(axes, f"fitted peak\n{fit.peak**2:.0f} nats", (fit.peak, top), GOLD, (-4, -30))
    axes.text(
        0.03,
        0.97,
        f"fit to gold: {start:.2f} + d ({fit.alpha:.2f} - {fit.beta:.2f} log d)\n"
        f"R² = {fit.r_squared:.2f},  d = √KL  (Gao et al. 2023)",
        transform=axes.transAxes,
        va="top",
        color=GOLD,
        fontsize=SMALL,
    )


def _draw_ends(axes: Any, data: Data) -> None:
    seen = [score for curve in data["curves"].values() for score in curve["gold"]["mean"]]
    margin = 0.25 * (max(seen) - min(seen))
    axes.set_ylim(min(seen) - margin, max(seen) + margin)  # wide intervals may leave the picture
    for beta, row in data["table"].items():
        gold, x = row["gold"]["mean"], math.sqrt(max(row["kl"]["mean"], 0.0))
        colour = {"0": GREY, ADAPTIVE: OTHER}.get(beta, GOLD)
        curve = data["curves"][beta]
        way = np.sqrt(np.maximum(curve["kl"]["mean"], 0.0))
        axes.plot(way, curve["gold"]["mean"], color=colour, linewidth=1, alpha=0.35)
        half = 0.0 if row["gold"]["low"] is None else gold - row["gold"]["low"]
        axes.errorbar(
            x,
            gold,
            yerr=half,
            color=colour,
            capsize=3 if half else 0,
            fmt="D" if beta == ADAPTIVE else "o",
        )
        if beta == "0":
            _say(axes, "beta = 0", (x, gold), colour, (8, 0), va="center")
        elif beta == ADAPTIVE:
            _say(axes, "adaptive", (x, gold - half), colour, (0, -8), va="top", ha="center")
        else:
            _say(axes, beta, (x, gold + half), colour, (0, 5), ha="center")
    start = data["start"]["gold"]["mean"]
    axes.plot(0, start, "s", color="black")
    _say(axes, "start", (0, start), "black", (0, -8), va="top", ha="center")
    low, high = axes.get_xlim()
    axes.set_xlim(low - 0.03 * (high - low), high + 0.2 * (high - low))
    axes.set_title("where each beta ends: gold score", loc="left")


def learning_curves(data: Data) -> Figure:
    """Proxy and gold over the updates, a panel for each beta."""
    betas = list(data["curves"])
    n_columns = min(2, len(betas))
    n_rows = math.ceil(len(betas) / n_columns)
    figure = Figure(figsize=(WIDTH, 2.1 * n_rows), layout="constrained")
    grid = figure.subplots(n_rows, n_columns, sharex=True, sharey=True, squeeze=False)
    for axes, beta in zip(grid.flat, betas):
        for name, colour in (("proxy", PROXY), ("gold", GOLD)):
            _band(axes, data["curves"][beta][name], colour)
        axes.axhline(data["start"]["gold"]["mean"], color=GREY, linewidth=0.8, linestyle=":")
        axes.set_title(described(beta), loc="left")
        axes.grid(alpha=0.25)
    means = [c[name]["mean"] for c in data["curves"].values() for name in ("proxy", "gold")]
    low, high = min(map(min, means)), max(map(max, means))
    grid[0, 0].set_ylim(low - 0.08 * (high - low), high + 0.08 * (high - low))
    for height, text, colour in ((0.95, "proxy (trained on)", PROXY), (0.85, "gold", GOLD)):
        grid[0, 0].text(
            0.04, height, text, transform=grid[0, 0].transAxes, color=colour, va="top", fontsize=9.5
        )
    for axes in list(grid.flat)[len(betas) :]:
        axes.set_visible(False)
    for column in range(n_columns):
        lowest = max(r for r in range(n_rows) if r * n_columns + column < len(betas))
        grid[lowest, column].set_xlabel("PPO update")
        grid[lowest, column].tick_params(labelbottom=True)
    for row in range(n_rows):
        grid[row, 0].set_ylabel("score per answer")
    return figure


def control(data: Data) -> Figure:
    """KL and beta over the updates, all betas together, on logarithmic axes."""
    figure = Figure(figsize=(WIDTH, 7.6), layout="constrained")
    kls, betas = figure.subplots(2, 1)
    kl_ends, beta_ends = [], []
    for beta, curve in data["curves"].items():
        colour = colour_of(beta, list(data["curves"]))
        style = "--" if beta == ADAPTIVE else "-"
        # The first update's KL is 0, which a logarithm has no place for.
        _seeds(kls, {k: v[1:] for k, v in curve["kl"].items()}, colour, first=2, style=style)
        kl_ends.append((curve["kl"]["mean"], described(beta), colour))
        if beta != "0":
            _seeds(betas, curve["kl_coef"], colour, style=style)
            beta_ends.append((curve["kl_coef"]["mean"], described(beta), colour))
    kls.axhline(data["kl_target"], color=GREY, linewidth=1, linestyle=":")
    kls.text(
        1,
        data["kl_target"] * 1.08,
        f"target {data['kl_target']:g} nats",
        color=GREY,
        fontsize=SMALL,
    )
    for axes, ends, title, unit in (
        (kls, kl_ends, "KL to the reference, by beta", "exact KL  [nats per answer]"),
        (betas, beta_ends, "the penalty itself (beta = 0 has none)", "beta  [score per nat]"),
    ):
        _logarithmic(axes.set_yscale, axes.yaxis)
        axes.set_title(title, loc="left")
        axes.set_ylabel(unit)
        axes.set_xlabel("PPO update")
        axes.grid(alpha=0.25)
        label_ends(axes, ends)
    return figure


def estimators(data: Data) -> Figure:
    """Variance and bias of the sampled estimators by KL level."""
    levels = sorted(data["estimators"].values(), key=lambda level: level["kl"]["mean"])
    kl = [level["kl"]["mean"] for level in levels]
    figure = Figure(figsize=(WIDTH, 7.6), layout="constrained")
    variance, bias = figure.subplots(2, 1)
    ends: dict[Any, list[tuple[list[float], str, str]]] = {variance: [], bias: []}
    for i, name in enumerate(SAMPLED):
        colour = ESTIMATOR_COLOURS[name]
        found = [level["estimators"][name] for level in levels]
        x = np.array(kl) * 1.04 ** (i - 1)  # side by side
        ratios = [e["variance_ratio"] for e in found]
        biases = [
            {key: 100 * e["bias"][key] / k for key in ("mean", "low", "high")}
            for e, k in zip(found, kl)
        ]
        for axes, values in ((variance, ratios), (bias, biases)):
            means = [value["mean"] for value in values]
            errors = [
                [value["mean"] - value["low"] for value in values],
                [value["high"] - value["mean"] for value in values],
            ]
            axes.errorbar(
                x,
                means,
                yerr=np.abs(errors),
                color=colour,
                capsize=3,
                marker=MARKERS[name],
                markersize=5,
            )
            ends[axes].append((means, name, colour))
    for axes in (variance, bias):
        level_line = 1.0 if axes is variance else 0.0
        axes.axhline(level_line, color="black", linewidth=1.6)
        _logarithmic(axes.set_xscale, axes.xaxis)
        axes.set_xlabel("KL of the policy  [nats per answer]")
        axes.grid(alpha=0.25)
    ends[variance].append(([1.0], "exact", "black"))
    _logarithmic(variance.set_yscale, variance.yaxis)
    variance.set_ylabel("variance over that of exact KL")
    variance.set_title("noise of one answer's KL estimate", loc="left")
    bias.set_yscale("symlog", linthresh=10)
    bias.margins(y=0.1)
    bias.yaxis.set_major_formatter(PLAIN)
    bias.set_ylabel("bias  [% of the KL]")
    bias.set_title("bias: mean difference from exact, 95 % interval", loc="left")
    for axes in (variance, bias):
        label_ends(axes, ends[axes])
    return figure


def colour_of(beta: str, betas: list[str]) -> Any:
    if beta == ADAPTIVE:
        return "black"
    numbers = [b for b in betas if b != ADAPTIVE]
    return colormaps["viridis"](0.92 * numbers.index(beta) / max(1, len(numbers) - 1))


def _band(axes: Any, curve: Data, colour: Any, *, first: int = 1, style: str = "-") -> None:
    """A mean over seeds, and its confidence interval where there are seeds."""
    updates = range(first, first + len(curve["mean"]))
    axes.plot(updates, curve["mean"], style, color=colour, linewidth=1.7)
    if curve["low"] and curve["low"][0] is not None:
        axes.fill_between(
            updates, curve["low"], curve["high"], color=colour, alpha=0.17, linewidth=0
        )


def _seeds(axes: Any, curve: Data, colour: Any, *, first: int = 1, style: str = "-") -> None:
    """A mean over seeds, and each seed: an interval may reach below 0, which has no logarithm."""
    updates = range(first, first + len(curve["mean"]))
    for seed in zip(*curve["seeds"]):
        axes.plot(updates, seed, style, color=colour, linewidth=0.7, alpha=0.45)
    axes.plot(updates, curve["mean"], style, color=colour, linewidth=1.9)


def label_ends(axes: Any, ends: list[tuple[list[float], str, Any]]) -> None:
    """A label right of the axes for each line, at its last value, moved apart where crowded."""
    to_axes = axes.transData + axes.transAxes.inverted()
    x = axes.get_xlim()[1]
    heights = [to_axes.transform((x, means[-1]))[1] for means, *_ in ends]
    n_lines = max(text.count("\n") + 1 for _, text, _ in ends)
    gap = (0.14 * n_lines + 0.06) / max(1.5, axes.get_window_extent().height / axes.figure.dpi)
    lowest = -math.inf
    for i in np.argsort(heights, kind="stable"):
        means, text, colour = ends[i]
        lowest = max(heights[i], lowest + gap)
        axes.annotate(
            text,
            (1.0, heights[i]),
            (1.02, lowest),
            xycoords="axes fraction",
            textcoords="axes fraction",
            color=colour,
            va="center",
            fontsize=9.5,
            annotation_clip=False,
        )


def _logarithmic(set_scale: Callable[[str], None], axis: Any) -> None:
    """Ticks at 1, 2, 5, 10, ... with plain numbers."""
    set_scale("log")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(PLAIN)
    axis.set_minor_formatter(NullFormatter())


def _say(
    axes: Any,
    text: str,
    place: tuple[float, float],
    colour: str,
    offset: tuple[float, float],
    va: str = "bottom",
    ha: str = "left",
) -> None:
    box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1.0}
    axes.annotate(
        text,
        place,
        offset,
        textcoords="offset points",
        color=colour,
        fontsize=9.5,
        va=va,
        ha=ha,
        bbox=box,
        zorder=5,
    )


def _nats_on_top(axes: Any) -> None:
    top = axes.secondary_xaxis("top", functions=(lambda d: d, lambda d: d))
    limit = axes.get_xlim()[1]
    nats = [n for n in (1, 5, 20, 50, 100, 200, 400, 800) if math.sqrt(n) < limit]
    top.set_xticks([math.sqrt(n) for n in nats], [str(n) for n in nats], fontsize=SMALL, color=GREY)
    top.set_xlabel("KL [nats per answer]", fontsize=SMALL, color=GREY)
