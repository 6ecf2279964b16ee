"""The page of gpu_<chip>.json, beside predictions and the GPU's counters."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.gpu.pictures import drawn, pictures, stem
from bench.gpu.table import PEERS
from bench.gpu.targets import TARGETS, verdict
from kl_kernels.lab.codegen.chips import CHIPS
from kl_kernels.lab.documents import Block, Bullets, Heading, Picture, Table, Text

__all__ = ["blocks", "pictures", "short_table"]
FOLDER = Path(__file__).parents[1] / "results"
# Kernels of offline.json, from whose machine code each job's time is predicted.
COUNTED = {
    "token_kl": "fold: policy and reference",
    "token_stats": "fold: policy",
    "KL gradient": "backward: KL",
    "logprob gradient": "backward: no KL",
    "stats gradient": "backward: no KL",
    "policy loss": "policy loss: policy and reference",
}
Results = dict[str, Any]
Row = dict[str, Any]


def blocks(results: Results) -> list[Block]:
    found: list[Block] = [
        Heading(f"On a GPU: {results['device']}"),
        Text(
            "Medians of graph replays over buffers that exceed the L2 four times, each contender "
            "once per turn; nothing is timed before it was right in float64. **From Python**: "
            "calls one after another at few rows, where the host takes the time. Ceilings are the "
            "best "
            f"of a few plain kernels, in the same run: {ceilings(results)}. **Share**: the bytes "
            "that must move at the least, over the time, of that ceiling."
        ),
        *(Picture(name, text) for name, text in drawn(results).items()),
        Text("**What they are to reach**, and the worst figure of those that were measured:"),
        Table(
            ("", *(f"`{backend}`" for backend in results["backends"])),
            [
                (target.says, *(verdict(target, results, b) for b in results["backends"]))
                for target in TARGETS
            ],
        ),
        Text("**Everything that was measured**:"),
        Table(
            (
                "job",
                "rows",
                "V",
                "",
                "median us (fastest to slowest)",
                "us from Python",
                "GB/s",
                "share",
                "times ours",
                "MB allocated",
            ),
            [full_line(results, m) for m in results["measurements"]],
        ),
    ]
    counters = read(f"counters_{stem(results)}")
    if expected := list(predictions(results, read("offline"), counters)):
        found += [Text("**Predicted and measured**:"), expected_table(expected)]
    if counters:
        found += [Text("**What the GPU's counters say**:"), counters_table(counters)]
        found += [Text(f"Commit {counters['commit']}; `{counters['command']}`.")]
    if reasons := [
        f"{name}: {why}" for g in ("left_out", "failed") for name, why in results[g].items()
    ]:
        found += [Text("Not measured:"), Bullets(reasons)]
    return [*found, Text(made(results))]


def short_table(results: Results) -> str:
    """The first size of each job."""
    backends = results["backends"]
    lines = [
        "| | rows x V | "
        + " | ".join(f"`{b}` (spread), share" for b in backends)
        + " | torch.compile | eager |",
        "|---|---|" + "---|" * (len(backends) + len(PEERS)),
    ]
    first: dict[str, Row] = {}
    for m in results["measurements"]:
        first.setdefault(m["job"], m)
    for job, main in first.items():
        by = at(results, main)
        cells = [f"{spread(by[b])}, {by[b]['share']:.0%}" if b in by else "" for b in backends]
        cells += [f"{times_ours(results, by[p]):.1f}x" if p in by else "" for p in PEERS]
        lines.append(f"| {job} | {main['rows']} x {main['vocab_size']} | {' | '.join(cells)} |")
    verdicts = [verdict(target, results, b) for target in TARGETS for b in backends]
    met = sum(v.startswith("met") for v in verdicts)
    lines.append(
        "\nMicroseconds, and the share of what plain kernels do in the same run: "
        f"{ceilings(results)}; the others as multiples of the best of ours. "
        f"{met} of {len(verdicts)} targets are met. {made(results)} "
        f"From `bench/results/gpu_{stem(results)}.json`, made by `make gpu`."
    )
    return "\n".join(lines)


def full_line(results: Results, m: Row) -> tuple[str, ...]:
    ours = m["contender"] in results["backends"]
    return (
        m["job"],
        str(m["rows"]),
        str(m["vocab_size"]),
        f"**{m['contender']}**" if ours else m["contender"],
        spread(m),
        "" if m["call_us"] is None else f"{m['call_us']:.1f}",
        f"{m['gb_per_s']:.0f}",
        f"{m['share']:.0%} of {m['ceiling']}",
        "" if ours else f"{times_ours(results, m):.2f}",
        f"{m['peak_mb']:.1f}",
    )


def at(results: Results, where: Row) -> dict[str, Row]:
    """By contender, what was measured of the same case."""
    same = ("job", "rows", "vocab_size")
    return {
        m["contender"]: m
        for m in results["measurements"]
        if all(m[key] == where[key] for key in same)
    }


def times_ours(results: Results, m: Row) -> float:
    by = at(results, m)
    ours = [by[b]["median_us"] for b in results["backends"] if b in by]
    return m["median_us"] / min(ours) if ours else float("nan")


def spread(m: Row) -> str:
    return f"{m['median_us']:.1f} ({m['fastest_us']:.1f} to {m['slowest_us']:.1f})"


def predictions(
    results: Results, offline: Results | None, counters: Results | None
) -> Iterator[Row]:
    """Return each resource's least time for the instructions and bytes of `triton`'s machine code.

    Memory at the measured ceiling instead of the data sheet's bandwidth.
    """
    if offline is None or offline["chip"] != stem(results):
        return
    by_name = {row["name"]: row for row in offline["kernels"] if row["library"] == "kl_kernels"}
    bandwidth = CHIPS[offline["chip"]].bandwidth
    for job, name in COUNTED.items():
        m = next((m for m in results["measurements"] if is_counted(m, job, offline)), None)
        if m is None:
            continue
        kernel = by_name[name]
        limits = dict(kernel["limits_ms"])
        limits["memory"] *= bandwidth / (1e9 * results["ceilings_gb_per_s"][m["ceiling"]])
        units = 2 if kernel["unit"] == "pair" else 1
        yield {
            "job": job,
            "limits": limits,
            "measured": m["median_us"] / 1e3,
            "counted": kernel["instructions"] / units,
            "executed": executed(counters, job),
        }


def is_counted(m: Row, job: str, offline: Results) -> bool:
    size = m["rows"], m["vocab_size"]
    return (m["job"], m["contender"], size) == (
        job,
        "triton",
        (offline["rows"], offline["vocab_size"]),
    )


def executed(counters: Results | None, job: str) -> float | None:
    """Instructions per logit, of all kernels of the job."""
    found = [
        row["instructions_per_logit"]
        for row in (counters["kernels"] if counters else [])
        if (row["backend"], row["job"]) == ("triton", job) and "instructions_per_logit" in row
    ]
    return sum(found) if found else None


def expected_table(rows: list[Row]) -> Table:
    header = (
        "`triton`",
        "memory ms",
        "instructions ms",
        "special functions ms",
        "measured ms",
        "measured over predicted",
        "instructions per logit counted",
        "executed",
    )
    lines = []
    for row in rows:
        limits = row["limits"]
        executed = "" if row["executed"] is None else f"{row['executed']:.1f}"
        lines.append(
            (
                row["job"],
                *(f"{limits[name]:.3f}" for name in ("memory", "issue", "mufu")),
                f"{row['measured']:.3f}",
                f"**{row['measured'] / max(limits.values()):.2f}**",
                f"{row['counted']:.1f}",
                executed,
            )
        )
    return Table(header, lines)


def counters_table(counters: Results) -> Table:
    columns = {
        "us": ("nanoseconds", lambda v: f"{v / 1e3:.0f}"),
        "DRAM": ("dram_percent", lambda v: f"{v:.0f}%"),
        "GB read": ("bytes_read", lambda v: f"{v / 1e9:.2f}"),
        "GB written": ("bytes_written", lambda v: f"{v / 1e9:.2f}"),
        "L2 hits": ("l2_hit_percent", lambda v: f"{v:.0f}%"),
        "issue slots": ("issue_per_clock", lambda v: f"{v:.0%}"),
        "special functions": ("mufu_percent", lambda v: f"{v:.0f}%"),
        "warps": ("warps_percent", lambda v: f"{v:.0f}%"),
        "registers": ("registers", lambda v: f"{v:.0f}"),
        "instructions per logit": ("instructions_per_logit", lambda v: f"{v:.1f}"),
    }
    rows = [
        (
            f"{row['backend']}: {row['job']}",
            f"`{row['kernel'].split('(')[0][:48]}`",
            *(show(row[name]) if name in row else "" for name, show in columns.values()),
            ", ".join(f"{reason} {cycles:.1f}" for reason, cycles in row["stalls"].items()),
        )
        for row in counters["kernels"]
    ]
    return Table(("", "kernel", *columns, "stalls: cycles per instruction"), rows)


def ceilings(results: Results) -> str:
    """Bytes are counted read plus written."""
    says = {"read": "one read", "copy": "a read and a write", "add": "two reads and a write"}
    return ", ".join(
        f"{says[name]} {rate:.0f} GB/s" for name, rate in results["ceilings_gb_per_s"].items()
    )


def made(results: Results) -> str:
    facts = results["facts"]
    return (
        f"{results['device']}, driver {results['driver']}, CUDA {results['cuda']}; torch "
        f"{facts['torch']}, Triton {facts['triton']}; commit {results['commit']}; "
        f"{results['time'][:10]}."
    )


def read(name: str) -> Results | None:
    path = FOLDER / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None
