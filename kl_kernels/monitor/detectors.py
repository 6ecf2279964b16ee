"""Detectors: each watches one series for one thing, and says so once until it is over.

`observe(step, value)` takes finite values; the monitor keeps others from it. False-alarm rates are
per run of 600 steps of AR(1) noise, simulated by bench/quality/monitor_rates.py; all of them are in
docs/monitoring.md.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from typing import Any

from kl_kernels.monitor.events import Event
from kl_kernels.monitor.statistics import deviations, fit_ar1, robust_location

WINDOW = 64  # values that the present one is compared with: a run's recent past
BURN_IN = 16  # values without which nothing is said about noise


class Detector:
    """A name and a state: every attribute in `keeps`, of plain values that JSON can hold."""

    keeps: tuple[str, ...] = ()

    def __init__(self, name: str) -> None:
        self.name = name

    def state_dict(self) -> dict[str, Any]:
        return {name: copy.copy(getattr(self, name)) for name in self.keeps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            ValueError: the state is another detector's.
        """
        if set(state) != set(self.keeps):
            raise ValueError(
                f"state of {self.name} has {sorted(state)}; it must have {sorted(self.keeps)}"
            )
        for name in self.keeps:
            setattr(self, name, copy.copy(state[name]))


def widened(limit: float, n: int) -> float:
    """A limit in robust standard deviations for a median and MAD from only `n` values.

    Fits the simulated quantiles of AR(1) noise with phi up to 0.8: a MAD of 16 dependent values
    may well be half of what it estimates.
    """
    return limit * (1 + 14 / n)


class SeriesDetector(Detector, ABC):
    """A detector that watches the values of a single series."""

    @abstractmethod
    def observe(self, step: int, value: float) -> Event | None:
        """Return the event that the next value raises, or None."""


class Jump(SeriesDetector):
    """A value far from the median of the values before it, in terms of their MAD.

    False alarms: below 0.01 per run. Speaks from the 17th value on. After an alarm it starts anew
    behind the value that raised it, so a jump is told once whether the series stays or comes back.
    """

    keeps = ("values",)

    def __init__(
        self, name: str, what: str, limit: float, meaning: str, *, upwards_only: bool = False
    ) -> None:
        super().__init__(name)
        self.what, self.limit, self.meaning = what, limit, meaning
        self.upwards_only = upwards_only
        self.values: list[float] = []

    def reset(self) -> None:
        self.values = []

    def observe(self, step: int, value: float) -> Event | None:
        event = self._compare(step, value) if len(self.values) >= BURN_IN else None
        if event is not None:
            self.reset()
            return event
        self.values.append(value)
        del self.values[:-WINDOW]
        return None

    def _compare(self, step: int, value: float) -> Event | None:
        middle, scale = robust_location(self.values)
        limit = widened(self.limit, len(self.values))
        distance = deviations(value, middle, scale)
        if (distance if self.upwards_only else abs(distance)) <= limit:
            return None
        message = (
            f"{self.what} jumped from {middle:.4g} to {value:.4g}, {abs(distance):.3g} robust "
            f"standard deviations (limit {limit:.3g}): {self.meaning}"
        )
        return Event(step, self.name, abs(distance), limit, message)


class Ceiling(SeriesDetector):
    """A value above a fixed limit. Told again only after it has been a tenth below the limit."""

    keeps = ("above",)
    rearm_at = 0.9  # times the limit: noise on a level at the limit would cross it again and again

    def __init__(self, name: str, what: str, limit: float, meaning: str) -> None:
        super().__init__(name)
        self.what, self.limit, self.meaning = what, limit, meaning
        self.above = False

    def observe(self, step: int, value: float) -> Event | None:
        if value <= self.rearm_at * self.limit:
            self.above = False
        if self.above or value <= self.limit:
            return None
        self.above = True
        message = f"{self.what} is {value:.4g}, above the limit of {self.limit:.4g}: {self.meaning}"
        return Event(step, self.name, value, self.limit, message)


class StartKL(SeriesDetector):
    """KL at step 0, where the policy still is the reference. No state: only step 0 counts."""

    def __init__(self, limit: float, unit: str) -> None:
        super().__init__("start_kl")
        self.limit, self.unit = limit, unit

    def observe(self, step: int, value: float) -> Event | None:
        if step != 0 or abs(value) <= self.limit:
            return None
        message = (
            f"KL ({self.unit}) is {value:.4g} nats before the first update (limit "
            f"{self.limit:.4g}): policy and reference are not the same model, or see different "
            "positions, padding, temperature or dropout"
        )
        return Event(step, self.name, value, self.limit, message)


class NegativeKL(SeriesDetector):
    """KL below 0 by more than the noise of sampling: the reward pays the policy to diverge.

    A KL is never negative; sampled estimates are, around a KL of 0. So an alarm takes one of
      - a value below -limit and outside noise around 0 (of the first 16 values, whose noise is not
        known yet: below four limits and three times the spread of those before),
      - a mean of up to 64 values below a tenth of that, and 4.5 standard errors (more, of fewer
        values) of an AR(1) series below 0.
    False alarms: below 0.01 per run around a KL of 0 whose standard deviation is at most the limit,
    for phi up to 0.6. Told again only after 16 values with a mean of 0 or above.
    """

    keeps = ("values", "told")
    mean_errors = 4.5  # simulated: at phi = 0.8 a run in a hundred reaches it

    def __init__(self, limit: float, unit: str, jump_limit: float) -> None:
        super().__init__("negative_kl")
        self.limit, self.unit, self.jump_limit = limit, unit, jump_limit
        self.values: list[float] = []
        self.told = False

    def observe(self, step: int, value: float) -> Event | None:
        limit = self._limit_of_one()
        self.values.append(value)
        del self.values[:-WINDOW]
        if self.told:
            latest = self.values[-BURN_IN:]
            self.told = len(latest) < BURN_IN or sum(latest) < 0
            return None
        if value >= 0:
            return None
        event = None
        if value < -limit:
            event = self._event(step, value, -limit, f"is {value:.4g} nats")
        elif len(self.values) > BURN_IN:
            event = self._compare_mean(step)
        if event is not None:
            self.told, self.values = True, []
        return event

    def _limit_of_one(self) -> float:
        n = len(self.values)
        if n < BURN_IN:
            spread = max(self.values) - min(self.values) if self.values else 0.0
            return max(4 * self.limit, 3 * spread)
        _, scale = robust_location(self.values)
        return max(self.limit, widened(self.jump_limit, n) * scale)

    def _compare_mean(self, step: int) -> Event | None:
        n = len(self.values)
        mean = sum(self.values) / n
        if mean > -0.1 * self.limit:
            return None
        noise = fit_ar1(self.values)
        error = noise.sd / (1 - noise.phi) / math.sqrt(n)
        limit = max(0.1 * self.limit, widened(self.mean_errors, n) * error)
        if mean >= -limit:
            return None
        return self._event(step, mean, -limit, f"has a mean of {mean:.4g} nats over {n} values")

    def _event(self, step: int, value: float, limit: float, seen: str) -> Event:
        message = (
            f"KL ({self.unit}) {seen} (limit {limit:.4g}): sampled and recomputed log-probs "
            "disagree (warped sampling, padding), and the reward pays the policy to diverge"
        )
        return Event(step, self.name, value, limit, message)


class EntropyCollapse(SeriesDetector):
    """Entropy below a part of the level it had at first, the median of the first 16 values.

    It must also be outside the noise of those. False alarms: below 0.001 per run. Told again only
    after half of the entropy lost at the limit has come back.
    """

    keeps = ("values", "collapsed")

    def __init__(self, part_left: float, jump_limit: float) -> None:
        super().__init__("entropy_collapse")
        self.part_left, self.jump_limit = part_left, jump_limit
        self.values: list[float] = []
        self.collapsed = False

    def observe(self, step: int, value: float) -> Event | None:
        if len(self.values) < BURN_IN:
            self.values.append(value)
            return None
        first, scale = robust_location(self.values)
        limit = min(self.part_left * first, first - self.jump_limit * scale)
        if value > (1 + self.part_left) / 2 * first:
            self.collapsed = False
        if first <= 0 or self.collapsed or value >= limit:
            return None
        self.collapsed = True
        message = (
            f"entropy is {value:.4g} nats per token, of {first:.4g} at first (limit {limit:.4g}): "
            "the policy repeats itself and no longer explores"
        )
        return Event(step, self.name, value, limit, message)
