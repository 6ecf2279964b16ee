"""Targets of the GPU kernels, compared with the results of bench/gpu/measure.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

Measured = dict[str, Any]  # one measurement
Results = dict[str, Any]
COMPILED = "torch.compile"
MANY_ROWS, FEW_ROWS, MOST_FEW_ROWS = 8192, 64, 512


@dataclass(frozen=True)
class Target:
    says: str
    unit: str  # format of a figure
    least: float | None  # lower bound of the figures
    most: float | None  # upper bound of the figures
    figures: Callable[[Results, str], Iterable[float]]  # a backend's figures

    def worst(self, results: Results, backend: str) -> float | None:
        """Return the figure farthest from the target; None: nothing was measured."""
        found = list(self.figures(results, backend))
        if not found:
            return None
        return min(found) if self.least is not None else max(found)

    def is_met_by(self, figure: float) -> bool:
        return figure >= self.least if self.least is not None else figure <= self.most


def verdict(target: Target, results: Results, backend: str) -> str:
    figure = target.worst(results, backend)
    if figure is None:
        return "not measured"
    met = "met" if target.is_met_by(figure) else "**missed**"
    return f"{met}: {format(figure, target.unit)}"


def of(results: Results, contender: str, *jobs: str) -> list[Measured]:
    return [m for m in results["measurements"] if m["contender"] == contender and m["job"] in jobs]


def shares(*jobs: str, rows: Callable[[int], bool] = lambda n: n == MANY_ROWS) -> Any:
    """Collect the shares of the ceiling for these jobs' bytes."""
    return lambda results, backend: [
        m["share"] for m in of(results, backend, *jobs) if rows(m["rows"])
    ]


def lead(rows: Callable[[int], bool], *jobs: str) -> Any:
    """Collect the times of torch.compile, as multiples of the backend's."""

    def figures(results: Results, backend: str) -> Iterable[float]:
        compiled = {place(m): m["median_us"] for m in of(results, COMPILED, *jobs)}
        for m in of(results, backend, *jobs):
            if rows(m["rows"]) and place(m) in compiled:
                yield compiled[place(m)] / m["median_us"]

    return figures


def place(m: Measured) -> tuple[str, int, int]:
    return m["job"], m["rows"], m["vocab_size"]


def evenness(job: str, fewest: int) -> Any:
    """Collect, by vocabulary, the lowest of its rates over the highest."""

    def figures(results: Results, backend: str) -> Iterable[float]:
        rates: dict[int, list[float]] = {}
        for m in of(results, backend, job):
            if m["rows"] >= fewest:
                rates.setdefault(m["vocab_size"], []).append(m["gb_per_s"])
        return [min(r) / max(r) for r in rates.values() if len(r) > 1]

    return figures


def memory(*jobs: str) -> Any:
    """Collect the calls' allocations, in bfloat16 tensors of logits."""
    return lambda results, backend: [
        m["peak_mb"] * 1e6 / (2 * m["rows"] * m["vocab_size"])
        for m in of(results, backend, *jobs)
        if m["rows"] == MANY_ROWS
    ]


def of_heads(what: str, job: str, *others: str) -> Any:
    """Collect a figure of linear heads of many rows.

    `what` is "share": of ours, or "ratio": of others, by the beginning of their names.
    """

    def figures(results: Results, contender: str) -> Iterable[float]:
        return [
            m[what]
            for m in results["measurements"]
            if m["rows"] == MANY_ROWS
            and m["job"].startswith(job)
            and m["contender"].startswith(others or contender)
        ]

    return figures


OTHER_HEADS = ("Liger", "verl", "cut-cross-entropy", "torch eager")
HEAD_TARGETS = (
    Target("every linear head, 8192 rows: 85 % of its matrix products alone",
           ".1%", 0.85, None, of_heads("share", "")),
    Target("the same: ahead of Liger, verl, Cut Cross-Entropy and eager",
           ".2f", 1.0, None, of_heads("ratio", "", *OTHER_HEADS)),
    Target("`linear_token_stats`: within 5 % of TRL's head",
           ".2f", 0.95, None, of_heads("ratio", "statistics", "TRL")),
    Target("`linear_policy_loss`: ahead of TRL's head and loss",
           ".2f", 1.0, None, of_heads("ratio", "policy loss", "TRL")),
)  # fmt: skip
TARGETS = (
    Target("`token_kl`, 8192 rows, every vocabulary: 92 % of the read ceiling",
           ".1%", 0.92, None, shares("token_kl")),
    Target("`token_stats`, likewise: 92 %", ".1%", 0.92, None, shares("token_stats")),
    Target("gradient of a KL, likewise: 90 % of the ceiling for two reads and a write",
           ".1%", 0.90, None, shares("KL gradient")),
    Target("gradients without a KL, likewise: 90 % of the copy ceiling",
           ".1%", 0.90, None, shares("logprob gradient", "stats gradient")),
    Target("`fused_policy_loss` and its gradient, likewise: 1.25 times the time of two reads and a "
           "write, 80 %", ".1%", 0.80, None, shares("policy loss")),
    Target("`token_kl` and `token_stats`, 64 to 512 rows: 70 % of the read ceiling",
           ".1%", 0.70, None,
           shares("token_kl", "token_stats", rows=lambda n: FEW_ROWS <= n <= MOST_FEW_ROWS)),
    Target("the same, fewer rows: never slower than torch.compile",
           ".2f", 1.0, None, lead(lambda n: n < FEW_ROWS, "token_kl", "token_stats")),
    Target("whatever torch.compile was measured on: ahead of it",
           ".2f", 1.0, None, lead(lambda n: n >= FEW_ROWS, "token_kl", "token_stats", "token_jsd",
                                  "KL gradient", "logprob gradient", "stats gradient",
                                  "policy loss", "token_kl + gradient")),
    Target("`token_kl`, 1024 to 65536 rows: rates within 5 %",
           ".1%", 0.95, None, evenness("token_kl", 1024)),
    Target("memory of `token_kl` and `token_stats`: outputs alone, 1 % of a tensor of logits",
           ".2%", None, 0.01, memory("token_kl", "token_stats")),
    Target("memory of a gradient: itself alone, 101 %",
           ".1%", None, 1.01, memory("KL gradient", "logprob gradient", "stats gradient")),
)  # fmt: skip
