"""Means over seeds with confidence intervals, and what resampling says about ratios."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate and the ends of its 95 % interval, None where one value allows none."""

    mean: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return _rounded(self.mean)
        return f"{_rounded(self.mean)} ± {_rounded((self.high - self.low) / 2)}"


def _rounded(x: float) -> str:
    return f"{x:.2f}" if abs(x) < 9.995 else f"{x:.1f}" if abs(x) < 99.95 else f"{x:.0f}"


def interval_of(stored: dict[str, Any]) -> Interval:
    """Read an interval back from JSON."""
    return Interval(**stored)


def mean_interval(values: Sequence[float] | Array) -> Interval:
    """Mean and Student's t-interval of independent values (seeds)."""
    from scipy import stats

    n = len(values)
    mean = float(np.mean(values))
    if n < 2:
        return Interval(mean, None, None)
    standard_error = float(np.std(values, ddof=1)) / math.sqrt(n)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * standard_error
    return Interval(mean, mean - half, mean + half)


def variance_ratio(
    x: Array,  # [N]
    y: Array,  # [N], measured on the same N
    *,
    n_resamples: int = 2000,
) -> Interval:
    """var(x) / var(y) and its bootstrap percentile interval; pairs are resampled together."""
    n = len(x)
    if not np.var(y) > 0:
        return Interval(math.nan, None, None)
    counts = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), n_resamples)
    ratios = _variances(counts, x) / _variances(counts, y)
    low, high = np.quantile(ratios, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(np.var(x) / np.var(y)), float(low), float(high))


def _variances(counts: NDArray[np.int64], x: Array) -> Array:  # [R, N], [N] -> [R]
    x = x - x.mean()  # or the difference of squares would cancel
    n = len(x)
    moments: Array = counts @ (x * x) / n - (counts @ x / n) ** 2
    return moments
