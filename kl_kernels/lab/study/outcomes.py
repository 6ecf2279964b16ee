"""The outcome of a run in a few numbers, and the outcome of a beta: their means over seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from kl_kernels.lab.ppo.report import Record
from kl_kernels.lab.study.statistics import mean_interval

# A batch's mean gold is off by about 0.15 points; that of five batches, by less than half of it.
WINDOW = 5
REPORTED = ("proxy", "gold", "kl", "kl_coef", "entropy", "length")
COLUMNS = ("proxy", "gold", "gold_peak", "gold_drop", "kl", "entropy", "length")


@dataclass(frozen=True)
class Outcome:
    """A run. Its end is the mean of the last updates; its peak the highest mean of as many."""

    start: dict[str, float]  # the first update: nothing was learned yet
    end: dict[str, float]
    gold_peak: float
    peak_update: float
    peak_kl: float
    last_third_kl: float
    last_third_kl_range: tuple[float, float]  # lowest and highest single update
    largest_kl: float

    @property
    def gold_drop(self) -> float:
        return self.gold_peak - self.end["gold"]

    def column(self, name: str) -> float:
        value: float = getattr(self, name) if name.startswith("gold_") else self.end[name]
        return value


def outcome(records: Sequence[Record]) -> Outcome:
    width = min(WINDOW, len(records))
    windows = [records[i : i + width] for i in range(len(records) - width + 1)]
    peak = max(windows, key=lambda window: _mean(window, "gold"))
    last_third = [r["kl"] for r in records[-max(1, len(records) // 3) :]]
    return Outcome(
        start={name: records[0][name] for name in REPORTED},
        end={name: _mean(windows[-1], name) for name in REPORTED},
        gold_peak=_mean(peak, "gold"),
        peak_update=_mean(peak, "update"),
        peak_kl=_mean(peak, "kl"),
        last_third_kl=fmean(last_third),
        last_third_kl_range=(min(last_third), max(last_third)),
        largest_kl=max(r["kl"] for r in records),
    )


def _mean(records: Sequence[Record], name: str) -> float:
    return fmean(record[name] for record in records)


def table(outcomes: Mapping[str, Sequence[Outcome]]) -> dict[str, dict[str, Any]]:
    """Return each column's interval over seeds, by beta."""
    return {
        beta: {
            name: dataclasses.asdict(mean_interval([run.column(name) for run in runs]))
            for name in COLUMNS
        }
        for beta, runs in outcomes.items()
    }


def curves(runs: Sequence[Sequence[Record]]) -> dict[str, dict[str, list[Any]]]:
    """Return each reported number's mean over seeds and interval at every update."""
    return {
        name: _columns([[record[name] for record in records] for records in runs])
        for name in REPORTED
    }


def _columns(values: list[list[float]]) -> dict[str, list[Any]]:  # [seed][update]
    intervals = [mean_interval(at_update) for at_update in np.array(values).T]
    return {
        "mean": [i.mean for i in intervals],
        "low": [i.low for i in intervals],
        "high": [i.high for i in intervals],
        "seeds": np.array(values).T.tolist(),  # [update][seed]
    }


def best_beta(outcomes: Mapping[str, Sequence[Outcome]]) -> str | None:
    """The penalty whose runs end with the highest gold; None if there is no penalty."""
    penalised = [beta for beta in outcomes if beta != "0"]
    return max(penalised, key=lambda b: fmean(o.end["gold"] for o in outcomes[b]), default=None)
