"""A lasting change of level, too small to stand out in a single value, in autocorrelated noise."""

from __future__ import annotations

import math
from typing import Any

from kl_kernels.monitor.detectors import SeriesDetector, widened
from kl_kernels.monitor.events import Event
from kl_kernels.monitor.statistics import ROUNDING, AR1Sums, robust_location

WINDOW = 16  # steps back at which a change may have come; longer windows find little more
CALIBRATE_AT = 24  # values: 16 to fit the noise to, 8 in which a change may have come
SHIFT = 3.0  # the change looked for, in standard deviations of the noise
CLIP = 3.5  # bound of residuals: less than a single one would need for an alarm
FEW_VALUES = 84  # n that cost a unit of the limit; less and phi = 0.8 raises too many alarms early


class LevelShift(SeriesDetector):
    """CUSUM of log-likelihood ratios over AR(1) residuals, with limits for estimated noise.

    Noise is an AR(1) series, x_t - mean = phi (x_{t-1} - mean) + sd e_t. If its level moves by
    d sd at step k, residual k carries d, and those that follow (1 - phi) d: most of the evidence of
    a change comes with its first value, and a test that adds up residuals alone (textbook CUSUM or
    EWMA) starts (1 - phi) d too late. For every k of the last 16 steps, the residuals up to now are
    weighted by what they carry,

        S = e_k + (1 - phi) (e_{k+1} + ... + e_t),   m = t - k + 1 values,
        E[S | shift of d] = d A,                      A = 1 + (m - 1) (1 - phi)^2,
        Var[S] = A + B^2 / n,                         B = 1 + (m - 1) (1 - phi),

    where B^2 / n is the error of a mean estimated from n values. The statistic is the largest
    log-likelihood ratio over k, d A S / V - (d A)^2 / (2 V) with V = Var[S] (Page 1954, with the
    signature of a step in an AR(1) series). What remains of estimating sd and phi is in the limit,
    which gains (84 / n)^1.5, and in a phi that errs upwards (`shrunk_phi`). Residuals are clipped,
    so that one outlier is no shift; `Jump` reports outliers.

    Mean, phi and sd come from all values since the last alarm but the latest 16 (a third of them,
    where there are fewer than 48), which may be those after the change. After an alarm everything
    starts anew, and 24 steps are blind.

    False alarms: 0.04 per run for phi = 0.6, 0.07 for phi = 0.8, 0.02 for phi = 0.
    """

    keeps = ("recent", "calibrated", "sums")

    def __init__(
        self, name: str, what: str, limit: float, limit_down: float, jump_limit: float
    ) -> None:
        super().__init__(name)
        self.what, self.limit, self.limit_down = what, limit, limit_down
        self.jump_limit = jump_limit
        self.reset()

    def reset(self) -> None:
        self.sums = AR1Sums()
        self.recent: list[float] = []  # values not in the sums yet
        self.calibrated = False

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"sums": self.sums.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.sums = AR1Sums()
        self.sums.load_state_dict(state["sums"])

    def observe(self, step: int, value: float) -> Event | None:
        self.recent.append(value)
        if not self.calibrated and not self._calibrate():
            return None
        n = self.sums.n + len(self.recent)
        while len(self.recent) > min(WINDOW, n // 3):
            self.sums.add(self.recent.pop(0))
        up, down, since_up, since_down = self._log_likelihood_ratios()
        gain = (FEW_VALUES / self.sums.n) ** 1.5
        if up > self.limit + gain:
            return self._alarm(step, value, up, self.limit + gain, since_up, "up")
        if down > self.limit_down + gain:
            return self._alarm(step, value, down, self.limit_down + gain, since_down, "down")
        return None

    def _calibrate(self) -> bool:
        """Whether there are enough values without an outlier, which would hide a shift."""
        if len(self.recent) < CALIBRATE_AT:
            return False
        middle, scale = robust_location(self.recent)
        limit = widened(self.jump_limit, CALIBRATE_AT) * scale
        outliers = [i for i, x in enumerate(self.recent) if abs(x - middle) > limit > 0]
        if outliers:
            self.recent = self.recent[outliers[-1] + 1 :]
            return False
        self.calibrated = True
        return True

    def _log_likelihood_ratios(self) -> tuple[float, float, int, int]:
        """Return the largest ratios of a shift up and down, and how many values ago each began."""
        noise, n = self.sums.fit(), self.sums.n
        left = 1 - noise.phi  # part of a shift in the residuals after its first
        sd = max(noise.sd, ROUNDING * abs(self.recent[-1]), ROUNDING * abs(noise.mean))
        before = [self.sums.anchor + self.sums.last, *self.recent]
        up = down = -math.inf
        since_up = since_down = later = 0.0
        for m in range(1, len(self.recent) + 1):
            x, x_before = before[-m] - noise.mean, before[-m - 1] - noise.mean
            residual = (x - noise.phi * x_before) / sd if sd > 0 else 0.0
            residual = min(max(residual, -CLIP), CLIP)
            s = residual + left * later
            later += residual
            a, b = 1 + (m - 1) * left * left, 1 + (m - 1) * left
            variance = a + b * b / n
            slope, offset = SHIFT * a / variance, (SHIFT * a) ** 2 / (2 * variance)
            if slope * s - offset > up:
                up, since_up = slope * s - offset, m
            if -slope * s - offset > down:
                down, since_down = -slope * s - offset, m
        return up, down, int(since_up), int(since_down)

    def _alarm(
        self, step: int, value: float, ratio: float, limit: float, since: int, direction: str
    ) -> Event:
        level = sum(self.recent[-since:]) / since
        message = (
            f"{self.what} has drifted {direction} from {self.sums.fit().mean:.4g} to about "
            f"{level:.4g} within {since} observations (log-likelihood ratio {ratio:.3g}, limit "
            f"{limit:.3g}): a lasting change, which the noise of this series does not explain"
        )
        self.reset()
        return Event(step, self.name, ratio, limit, message)
