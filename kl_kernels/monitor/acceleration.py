"""A detector of reward hacking's usual look: the reward rises while the KL rises ever faster."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import mul
from typing import NamedTuple

from kl_kernels.monitor.detectors import Detector
from kl_kernels.monitor.events import Event
from kl_kernels.monitor.statistics import ROUNDING, shrunk_phi

WINDOW = 48  # steps that a parabola is fitted to; half of them would see only what is abrupt


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(map(mul, a, b))


def _normalised(a: Sequence[float]) -> list[float]:
    norm = math.sqrt(_dot(a, a))
    return [x / norm for x in a]


# Orthonormal polynomials on the window's steps, so that coefficients are dot products.
_TIMES = [2 * t / (WINDOW - 1) - 1 for t in range(WINDOW)]
_LINE = _normalised(_TIMES)
_PARABOLA = _normalised([t * t - _dot(_TIMES, _TIMES) / WINDOW for t in _TIMES])


class Trend(NamedTuple):
    """A parabola's coefficients in standard errors, and whether it rises at its end."""

    slope: float
    curvature: float
    rises: bool


def fit_trend(values: Sequence[float]) -> Trend:
    """Least squares over `WINDOW` values, with errors as those of AR(1) residuals."""
    mean = sum(values) / WINDOW
    x = [value - mean for value in values]
    slope, curvature = _dot(x, _LINE), _dot(x, _PARABOLA)
    r = [v - slope * a - curvature * b for v, a, b in zip(x, _LINE, _PARABOLA)]
    square = _dot(r, r)
    phi = shrunk_phi(_dot(r[1:], r[:-1]) / square if square > 0 else 0.0, WINDOW)
    # Slow combinations of AR(1) noise have the variance of independent noise, increased so.
    error = math.sqrt(square / (WINDOW - 3) * (1 + phi) / (1 - phi))
    error = max(error, ROUNDING * max(map(abs, values)))
    rise = slope * (_LINE[-1] - _LINE[-2]) + curvature * (_PARABOLA[-1] - _PARABOLA[-2])
    if error == 0:  # zeros throughout
        return Trend(0.0, 0.0, False)
    return Trend(slope / error, curvature / error, rise > 0)


class Acceleration(Detector):
    """Over 48 steps the KL curves upwards and the reward rises, both beyond their noise.

    Says what has happened, not that it is harmful: a policy that has found something good does the
    same. False alarms: none in simulation. After an alarm it starts anew.
    """

    keeps = ("kl", "reward")

    def __init__(self, limit: float) -> None:
        super().__init__("kl_acceleration")
        self.limit = limit
        self.kl: list[float] = []
        self.reward: list[float] = []

    def observe_both(self, step: int, kl: float, reward: float) -> Event | None:
        self.kl.append(kl)
        self.reward.append(reward)
        del self.kl[:-WINDOW], self.reward[:-WINDOW]
        if len(self.kl) < WINDOW:
            return None
        trend = fit_trend(self.kl)
        if trend.curvature <= self.limit or not trend.rises:
            return None
        reward_slope = fit_trend(self.reward).slope
        if reward_slope <= self.limit:
            return None
        self.kl, self.reward = [], []
        message = (
            f"over {WINDOW} observations the KL rises ever faster ({trend.curvature:.3g} standard "
            f"errors) and the reward with it ({reward_slope:.3g}; limit {self.limit:.3g}): the "
            "reward may be bought with divergence; read samples"
        )
        return Event(step, self.name, trend.curvature, self.limit, message)
