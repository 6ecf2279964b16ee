"""Location, scale and autocorrelation of short noisy series, in plain Python floats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

# Relative size below which a difference is rounding, not noise: a constant series has no scale.
ROUNDING = 1e-9

# Prior for the phi of a KL per update: the policy moves a little at a time, so values stay close to
# those before. Worth 30 steps, as phi from a short series is much too uncertain.
PRIOR_PHI, PRIOR_STEPS = 0.7, 30

# A random walk has no level that could move; short of it, levels are left to be found.
LARGEST_PHI = 0.95


def robust_location(values: Sequence[float]) -> tuple[float, float]:
    """Median and 1.4826 MAD, which for normal noise estimates the standard deviation."""
    middle = median(values)
    return middle, 1.4826 * median([abs(x - middle) for x in values])


def deviations(value: float, middle: float, scale: float) -> float:
    """Signed distance from `middle` in units of `scale`, which rounding does not make enormous."""
    floor = ROUNDING * max(abs(value), abs(middle))
    if value == middle:
        return 0.0
    return (value - middle) / max(scale, floor)


def shrunk_phi(phi: float, n: int) -> float:
    """The autocorrelation to test with, of one estimated from `n` values.

    Too small a phi takes slow noise for a change of level. So the downward bias of the estimate is
    removed (Kendall 1954: (1 + 3 phi) / n), the rest is drawn to the prior, and half a standard
    error is added.
    """
    phi += (1 + 3 * phi) / n
    phi = (n * phi + PRIOR_STEPS * PRIOR_PHI) / (n + PRIOR_STEPS)
    phi += 0.5 * math.sqrt(max(1 - phi * phi, 0.02) / (n + PRIOR_STEPS))
    return min(max(phi, 0.0), LARGEST_PHI)


@dataclass(frozen=True)
class AR1:
    """x_t - mean = phi (x_{t-1} - mean) + noise of standard deviation sd."""

    mean: float
    phi: float
    sd: float


class AR1Sums:
    """Sums of differences from an anchor, from which an AR(1) model is fitted to a growing series.

    The anchor is the first value. Sums of the values themselves would lose a small noise on a high
    level to cancellation.
    """

    def __init__(self) -> None:
        self.n = 0
        self.anchor = self.last = self.x = self.xx = self.xy = 0.0

    def add(self, value: float) -> None:
        if self.n == 0:
            self.anchor = value
        x = value - self.anchor
        self.n += 1
        self.x += x
        self.xx += x * x
        self.xy += x * self.last
        self.last = x

    def fit(self) -> AR1:
        """Fit 4 values or more. The variance is that of the residuals with the shrunk phi."""
        n, mean = self.n, self.x / self.n
        square = max(self.xx - n * mean * mean, 0.0)
        product = self.xy - mean * (2 * self.x - self.last) + (n - 1) * mean * mean
        phi = shrunk_phi(product / square if square > 0 else 0.0, n)
        deviation = self.last - mean  # multiplied: ** raises where a product is infinite
        later, earlier = square - mean * mean, square - deviation * deviation
        residuals = later - 2 * phi * product + phi * phi * earlier
        return AR1(self.anchor + mean, phi, math.sqrt(max(residuals, 0.0) / (n - 3)))

    def state_dict(self) -> dict[str, float]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, float]) -> None:
        for name in vars(self):
            setattr(self, name, state[name])


def fit_ar1(values: Sequence[float]) -> AR1:
    """Fit an AR(1) model to 4 values or more."""
    sums = AR1Sums()
    for value in values:
        sums.add(value)
    return sums.fit()
