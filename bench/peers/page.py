"""The page of peers.json."""

from __future__ import annotations

from typing import Any

from bench.peers.operations import OPERATIONS
from bench.peers.pictures import WHOLE, main_case, pictures, stem
from kl_kernels.lab.documents import Block, Bullets, Heading, Picture, Table, Text

__all__ = ["blocks", "pictures", "short_table"]
OURS = "kl_kernels"
SHORT = (  # shown in the README
    "logprob + entropy + gradient",
    "exact KL + gradient",
    "policy loss",
)
MEMORY = {
    "cpu": "resident memory that a call needs at its worst, measured in a process of its own",
    "cuda": "what a call allocates at its worst, results included",
}
Results = dict[str, Any]


def blocks(results: Results) -> list[Block]:
    found: list[Block] = [
        Heading(f"Beside what one would use instead, on {results['device']}"),
        Text(
            "Everybody gets the same tensors in the same run, and must be right in float64 "
            "before it is timed. Each round times ours and one other, one after the other; "
            "**x ours** is the median over rounds of what the other took over what ours took."
        ),
    ]
    if WHOLE in main_case(results):
        found.append(Picture(f"{stem(results)}_step", f"Time of a {WHOLE}. " + made(results)))
    found.append(
        Picture(f"{stem(results)}_times", "Time of each operation, ours in blue. " + made(results))
    )
    if any(points(results).values()):
        found.append(
            Picture(f"{stem(results)}_sizes", "The exact KL at more sizes. " + made(results))
        )
    found += [
        Picture(
            f"{stem(results)}_memory",
            "Peak memory of a call on top of its inputs, results included. " + made(results),
        ),
        Text(
            f"**GB/s** counts the bytes that must pass through memory at the least, at the "
            f"median; **of read** is that over what the machine's plain reductions read, "
            f"{results['read_gb_per_s']:.0f} GB/s (above 100 %: tensors that fit its caches). "
            f"**Extra memory**: {MEMORY[results['kind']]}. **Error**: of results, relative to 1 + "
            "the true value; of gradients, of the norm, with the rounding to the dtype they are "
            "stored in."
        ),
    ]
    for name, operation in OPERATIONS.items():
        rows = [m for m in results["measurements"] if m["operation"] == name]
        if rows:
            found += [Heading(name), Text(f"{operation.does[0].upper()}{operation.does[1:]}.")]
            found.append(table(rows, results["kind"]))
    found += [Heading("Not measured"), Bullets(reasons(results)), Text(made(results))]
    return found


def table(rows: list[Results], kind: str) -> Table:
    faults = ("page faults",) if kind == "cpu" else ()
    header = (
        "size, dtype",
        "",
        "median ms (fastest to slowest)",
        "x ours",
        "GB/s",
        "of read",
        "extra MB",
        *faults,
        "error",
        "error of gradient",
    )
    lines = []
    for m in rows:
        counted = m["gb_per_s"] > 0
        lines.append(
            (
                f"{m['size']}, {m['dtype']}",
                f"**{OURS}**" if m["contender"] == OURS else labelled(m),
                f"{number(m['median_ms'])} ({number(m['fastest_ms'])} to "
                f"{number(m['slowest_ms'])})",
                "" if m["contender"] == OURS else f"**{m['ratio']:.2f}**",
                f"{m['gb_per_s']:.1f}" if counted else "",
                f"{m['share']:.0%}" if counted else "",
                f"{m['extra_mb']:.0f}",
                *(f"{m['page_faults']:.0f}" for _ in faults),
                f"{m['value_error']:.0e}",
                f"{m['gradient_error']:.0e}" if "gradient_error" in m else "",
            )
        )
    return Table(header, lines)


def labelled(m: Results) -> str:
    return f"{m['contender']} ({m['note']})" if m["note"] else m["contender"]


def number(x: float) -> str:
    """Three digits, without exponents."""
    return f"{x:.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}"


def points(results: Results) -> dict[str, int]:
    """Sizes beyond the first, by operation, in the dtype that most are in."""
    return {
        name: len({m["size"] for m in results["measurements"] if m["operation"] == name}) - 1
        for name in ("exact KL", "exact KL + gradient")
    }


def reasons(results: Results) -> list[str]:
    """Reason by reason: who could not do what."""
    by_reason: dict[str, dict[str, list[str]]] = {}
    for entry in results["not_measured"]:
        who = by_reason.setdefault(entry["reason"], {})
        who.setdefault(entry["contender"], []).append(entry["operation"])
    return [
        f"{reason}: "
        + "; ".join(f"{name} ({', '.join(operations)})" for name, operations in who.items())
        for reason, who in by_reason.items()
    ]


def made(results: Results) -> str:
    """Device, versions, commit, command."""
    packages = {"torch": results["facts"]["torch"]} | results["peers"]
    versions = ", ".join(f"{name} {v}" for name, v in packages.items() if v[0].isdigit())
    threads = f" with {results['threads']} threads" if results["kind"] == "cpu" else ""
    return (
        f"{results['device']}{threads}; {versions}; commit {results['commit']}; "
        f"`{results['command']}`."
    )


def short_table(results: Results) -> str:
    """For the README: a picture, and three operations beside what a user would take instead."""
    cases = main_case(results)
    lines = [
        f"![Time of a {WHOLE}, ours and others'](docs/benchmarks/{stem(results)}_step.svg)",
        "",
        "| | kl_kernels | torch.compile | torch eager | fastest other package |",
        "|---|---|---|---|---|",
    ]
    for operation in SHORT:
        if case := cases.get(operation):
            by = {m["contender"]: m for m in case}
            cells = [times(by.get(name)) for name in ("torch.compile", "torch eager")]
            others = [m for m in case if m["family"] not in ("ours", "plain")]
            best = min(others, key=lambda m: m["ratio"], default=None)
            cells.append(f"{times(best)} {without_way(best)}" if best else "none")
            ours = f"{number(by[OURS]['median_ms'])} ms"
            lines.append(f"| {operation} | {ours} | {' | '.join(cells)} |")
    first = next(iter(cases.values()))[0]
    lines.append(
        f"\nMedian times for {first['size']} logits in {first['dtype']}; others in multiples of "
        "ours, the median over rounds: below 1x is faster than ours. "
        f"{made(results)} From `bench/results/peers.json`."
    )
    return "\n".join(lines)


def without_way(m: Results) -> str:
    """Whose it is, and what is left out of it."""
    name = m["contender"].partition(" (")[0]
    return f"{name} ({m['note']})" if m["note"] else name


def times(m: Results | None) -> str:
    """Ratio to our time, with a second digit where it is below 1."""
    return "" if m is None else f"{m['ratio']:.{1 if m['ratio'] >= 1 else 2}f}x"
