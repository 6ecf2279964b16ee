"""Linear heads beside each other: jobs, and contenders that take turns in one process.

The first call of each contender is checked in float64, and compiles what is to be compiled; whoever
is wrong is not timed. Then contenders take turns, each until it has had its seconds, so that
whoever is slow is called less often. The ratio of a contender is the median, over the turns it took
part in, of its time over ours.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from bench.common.timing import timed
from bench.peers.compare import DEVICE, Case, Wrong, check, extra_bytes_of_warm
from bench.peers.contenders import OURS, Contender, Unavailable, contenders
from bench.peers.definitions import Size
from bench.peers.heads import HeadInputs
from bench.peers.operations import OPERATIONS

# A contender's time in a case, and its turns: a call of three times that time has one.
SECONDS, FEWEST, MOST = 1.0, 3, 15
STATISTICS, KL, JSD, LOSS = (
    "linear logprob + entropy", "linear exact KL", "linear JSD", "linear policy loss",
)  # fmt: skip
BOTH, HIDDEN = ("hidden", "weight"), ("hidden",)
FROZEN = "gradient, frozen head"


@dataclass(frozen=True)
class Job:
    """An operation, and the factors that are differentiated."""

    operation: str
    gradients: tuple[str, ...]


JOBS = {
    f"{name} + {more}" if more else name: Job(operation, gradients)
    for name, operation in (
        ("statistics", STATISTICS),
        ("exact KL", KL),
        ("JSD", JSD),
        ("policy loss", LOSS),
    )
    for more, gradients in (("", ()), ("gradients", BOTH), (FROZEN, HIDDEN))
}


@dataclass
class LinearCase(Case):
    job: str = "statistics"

    @classmethod
    def of(cls, job: str, size: Size, dtype: torch.dtype) -> LinearCase:
        return cls(OPERATIONS[JOBS[job].operation], size, dtype, job=job)

    def __str__(self) -> str:
        return f"{self.job}, {self.size}, {str(self.dtype).removeprefix('torch.')}"

    @cached_property
    def inputs(self) -> HeadInputs:
        return self.operation.make(self.size, self.dtype, DEVICE).wanting(JOBS[self.job].gradients)


class Timed:
    """A contender that was right, and what it took in each turn."""

    def __init__(self, contender: Contender, case: LinearCase, cold: torch.Tensor | None):
        """Raise why it cannot run here, or `Wrong`."""
        self.contender, self.x, self.cold = contender, case.inputs, cold
        self.call = contender.ready()
        self.errors = check(case, contender, self.call)
        self.took: list[float] = []
        if self.x.head() is not self.x:  # torch.compile compiles for these sizes
            self.call(self.x)
        self.extra_bytes = extra_bytes_of_warm(self.take_turn, None)

    def waits(self, seconds: float) -> bool:
        few = len(self.took) < FEWEST and self.took[0] < FEWEST * seconds
        return few or (len(self.took) < MOST and sum(self.took) < seconds)

    def take_turn(self, _: object = None) -> None:
        self.took.append(timed(self.call, self.x, self.cold))


def measure(
    case: LinearCase,
    more: Callable[[Timed], dict[str, Any]] = lambda _: {},
    seconds: float = SECONDS,
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Time all contenders; return their measurements, and who was not measured and why.

    `more` adds fields to a measurement; `seconds` are each contender's.
    """
    ready: list[Timed] = []
    left_out = []
    cold = torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE) if DEVICE == "cuda" else None
    for contender in contenders(case.operation.name):
        try:
            ready.append(Timed(contender, case, cold))
        except Exception as error:
            if contender.name == OURS:
                raise
            expected = isinstance(error, (ImportError, Unavailable, Wrong))
            told = str(error).strip().partition("\n")[0] or "no message"
            reason = told if expected else f"{type(error).__name__}: {told}"
            left_out.append({"operation": case.job, "contender": contender.name, "reason": reason})
    ours = ready[0]
    while waiting := [one for one in ready if one.waits(seconds)]:
        for one in dict.fromkeys((ours, *waiting)):  # ours in every turn
            one.take_turn()
    return [_measurement(case, one, ours) | more(one) for one in ready], left_out


def _measurement(case: LinearCase, one: Timed, ours: Timed) -> dict[str, Any]:
    row: dict[str, Any] = {
        "job": case.job,
        "contender": one.contender.name,
        "family": one.contender.family,
        "size": str(case.size),
        **vars(case.size),
        "dtype": str(case.dtype).removeprefix("torch."),
        "median_ms": 1e3 * statistics.median(one.took),
        "fastest_ms": 1e3 * min(one.took),
        "slowest_ms": 1e3 * max(one.took),
        "rounds": len(one.took),
        "ratio": statistics.median(t / o for t, o in zip(one.took, ours.took)),
        "extra_mb": one.extra_bytes / 1e6,
        **one.errors,
        "note": one.contender.note,
    }
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}


def shown(m: dict[str, Any]) -> str:
    """A measurement as a line."""
    return (
        f"  {m['contender']:34}{m['median_ms']:9.1f} ms ({m['fastest_ms']:.1f} to "
        f"{m['slowest_ms']:.1f}, {m['rounds']}){m['ratio']:7.2f}x{m['extra_mb']:7.0f} MB"
    )
