"""The tables of linear.json."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from bench.peers.page import OURS, labelled, made, number, reasons, times, without_way
from kl_kernels.lab.documents import Block, Bullets, Heading, Table, Text

Results = dict[str, Any]
Row = dict[str, Any]
SHORT = "policy loss + gradients"  # shown in the README
SOURCE = "From `bench/results/linear.json`, made by `make bench-linear`."


def pictures(results: Results) -> dict[str, bytes]:
    return {}


def blocks(results: Results) -> list[Block]:
    found: list[Block] = [
        Heading(f"Linear heads beside what one would use instead, on {results['device']}"),
        Text(
            "From hidden states and the weight of the output layer, rows x vocabulary x width: "
            "log-probability and entropy (**statistics**), their gradients, and GRPO's clipped "
            "loss with its gradients. A frozen head has no gradient of its own. Everybody gets the "
            "same tensors in the same run, must be right in float64 before it is timed, and takes "
            "turns with the others; **x ours** is the median over turns of its time over ours in "
            "the same turn. **Extra memory**: resident memory that a call needs at its worst. "
            f"{standing(results)}"
        ),
    ]
    for job, rows in by(results, "job"):
        found += [Text(f"**{job}**:"), table(rows)]
    if results["not_measured"]:
        found += [Text("Not measured:"), Bullets(reasons(results))]
    return [*found, Text(f"{about(results)} {SOURCE}")]


def table(rows: list[Row]) -> Table:
    header = (
        "rows x V x width, dtype", "", "median ms (fastest to slowest), calls", "x ours",
        "extra MB", "error", "error of gradient",
    )  # fmt: skip
    return Table(
        header,
        [
            (
                f"{m['size']}, {m['dtype']}",
                f"**{OURS}**" if m["contender"] == OURS else labelled(m),
                f"{number(m['median_ms'])} ({number(m['fastest_ms'])} to "
                f"{number(m['slowest_ms'])}), {m['rounds']}",
                "" if m["contender"] == OURS else f"**{m['ratio']:.2f}**",
                f"{m['extra_mb']:.0f}",
                f"{m['value_error']:.0e}",
                f"{m['gradient_error']:.0e}" if "gradient_error" in m else "",
            )
            for m in rows
        ],
    )


def short_table(results: Results) -> str:
    """For the README: a policy loss of the first size, beside what a user would take instead."""
    shown = [case for case in cases(results) if case[0]["job"] == SHORT]
    size = shown[0][0]["size"]
    lines = [
        f"| from hidden states, {size} | kl_kernels | torch.compile | torch eager | "
        "fastest other |",
        "|---|---|---|---|---|",
    ]
    for case in (case for case in shown if case[0]["size"] == size):
        named = {m["contender"]: m for m in case}
        best = min((m for m in case if is_other(m)), key=lambda m: m["ratio"], default=None)
        cells = [times(named.get(name)) for name in ("torch.compile", "torch eager")]
        cells.append(f"{times(best)} {without_way(best)}" if best else "none")
        what = f"policy loss, {case[0]['dtype']}"
        lines.append(f"| {what} | {number(named[OURS]['median_ms'])} ms | {' | '.join(cells)} |")
    sets = ", ".join(results["instruction_sets"])
    return "\n".join(lines) + (
        f"\n\n{standing(results)} {results['device']} ({sets}), {results['threads']} thread(s), "
        f"commit {results['commit']}, `{results['command']}`."
    )


def standing(results: Results) -> str:
    """Say where another is faster."""
    counts: dict[str, list[bool]] = {}
    for case in cases(results):
        lost = any(m["ratio"] < 1 for m in case if m["contender"] != OURS)
        counts.setdefault(case[0]["dtype"], []).append(lost)
    lost = ", ".join(f"{sum(v)} of {len(v)} cases in {dtype}" for dtype, v in counts.items())
    return f"Another is faster than kl_kernels in {lost}."


def about(results: Results) -> str:
    """Device, instructions that products can use, versions, load."""
    products = results["facts"]["linear heads"].partition(":")[0]
    return (
        f"{made(results)} The CPU has {', '.join(results['instruction_sets'])}; linear heads here "
        f"{products}. Load average {results['load_average_at_start']:.1f} before the run."
    )


def is_other(m: Row) -> bool:
    """Whether it is neither ours nor what PyTorch makes of the formula."""
    return m["contender"] not in (OURS, "torch.compile", "torch eager")


def cases(results: Results) -> Iterator[list[Row]]:
    for _, rows in by(results, "job", "size", "dtype"):
        yield rows


def by(results: Results, *keys: str) -> Iterator[tuple[str, list[Row]]]:
    """Measurements with the same values of some keys, the first of each in order."""
    order = list(dict.fromkeys(tuple(m[k] for k in keys) for m in results["measurements"]))

    def place(m: Row) -> int:
        return order.index(tuple(m[k] for k in keys))

    for i, rows in groupby(sorted(results["measurements"], key=place), place):
        yield ", ".join(order[i]), list(rows)
