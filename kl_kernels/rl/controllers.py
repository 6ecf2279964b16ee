"""The KL coefficient of the reward (beta), fixed or steered towards a target KL."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from torch import Tensor

from kl_kernels.checks import check_choice, check_finite, check_non_negative, check_positive
from kl_kernels.rl.measure import UNITS, measure_kl

if TYPE_CHECKING:  # not in every build of torch
    from torch.distributed import ProcessGroup


class KLUpdate(NamedTuple):
    """What an update saw and did."""

    kl: float  # measured, in the controller's unit (nats)
    value: float  # the coefficient from now on
    error: float  # the clipped error that moved it; 0 for a fixed coefficient
    applied: bool  # False: the KL was not finite, and the coefficient stayed as it was


class KLController(Protocol):
    """Anything that holds the KL coefficient and is told the KL after each rollout."""

    @property
    def value(self) -> float: ...

    def update(
        self,
        kl: Tensor | float,
        n_steps: int,
        *,
        mask: Tensor | None = None,
        group: ProcessGroup | None = None,
    ) -> KLUpdate: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class FixedKLController:
    """A constant KL coefficient with the interface of `AdaptiveKLController`.

    Args:
        kl_coef: beta; finite, 0 or above.
        unit: the unit in which updates report the KL they were shown.

    Raises:
        ValueError: an argument is outside its range.
    """

    def __init__(self, kl_coef: float, *, unit: str = "sequence_sum") -> None:
        check_non_negative("kl_coef", kl_coef)
        check_choice("unit", unit, UNITS)
        self._value = float(kl_coef)
        self.unit = unit

    def __repr__(self) -> str:
        return f"FixedKLController({self._value}, unit={self.unit!r})"

    @property
    def value(self) -> float:
        return self._value

    def update(
        self,
        kl: Tensor | float,
        n_steps: int,
        *,
        mask: Tensor | None = None,
        group: ProcessGroup | None = None,
    ) -> KLUpdate:
        """Report the KL; the coefficient stays. See `AdaptiveKLController.update`."""
        current = measure_kl(kl, mask, self.unit, group)
        return KLUpdate(current, self._value, 0.0, applied=math.isfinite(current))

    def state_dict(self) -> dict[str, Any]:
        return {"value": self._value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore: the constructor's coefficient is what was asked for."""


class _SteeredKLController(ABC):
    """A coefficient within bounds that each update multiplies by a factor."""

    def __init__(
        self,
        init_kl_coef: float,
        target: float,
        *,
        unit: str,
        min_coef: float,
        max_coef: float | None,
    ) -> None:
        check_positive("init_kl_coef", init_kl_coef)
        check_positive("target", target)
        check_positive("min_coef", min_coef)
        check_choice("unit", unit, UNITS)
        if max_coef is not None and not max_coef >= min_coef:
            raise ValueError(f"max_coef is {max_coef}, below min_coef {min_coef}")
        self.target = target
        self.unit = unit
        self.min_coef = min_coef
        self.max_coef = math.inf if max_coef is None else max_coef
        if not self.min_coef <= init_kl_coef <= self.max_coef:
            raise ValueError(
                f"init_kl_coef is {init_kl_coef}; min_coef and max_coef accept "
                f"{self.min_coef} to {self.max_coef}"
            )
        self._value = float(init_kl_coef)

    def __repr__(self) -> str:
        facts = {"value": self._value, **vars(self)}  # arguments by their names, the value first
        shown = (f"{k}={v!r}" for k, v in facts.items() if not k.startswith("_"))
        return f"{type(self).__name__}({', '.join(shown)})"

    @property
    def value(self) -> float:
        """The current coefficient."""
        return self._value

    def update(
        self,
        kl: Tensor | float,
        n_steps: int,
        *,
        mask: Tensor | None = None,
        group: ProcessGroup | None = None,
    ) -> KLUpdate:
        """Move the coefficient, once per rollout.

        In data parallel every rank has to see the same global figures, or coefficients drift
        apart: pass each rank's own [B, T] KL with `group`, or the reduced KL as a number.

        Args:
            kl: [B, T] per-token KL, which the controller reduces to its unit under `mask`, or a
                number that is in the unit already. Sampled KL may be negative; it counts as such.
            n_steps: sequences in the rollout, over all ranks; above 0. Only
                `AdaptiveKLController` counts in sequences, the others in updates.
            mask: [B, T] bool or numeric, with per-token KL only; NaN where it is 0 changes nothing.
            group: data-parallel ranks that each pass their own sequences; they have to call this
                together, and all get the same update. A rank may have no token.

        Returns:
            KLUpdate(kl, value, error, applied). A KL that is not finite is not applied.

        Raises:
            TypeError, ValueError: shapes disagree, or n_steps is not accepted.
        """
        self._check_steps(n_steps)
        current = measure_kl(kl, mask, self.unit, group)
        if not math.isfinite(current):
            return KLUpdate(current, self._value, 0.0, applied=False)
        error, factor = self._steer(current, n_steps)
        self._value = min(max(self._value * factor, self.min_coef), self.max_coef)
        return KLUpdate(current, self._value, error, applied=True)

    def state_dict(self) -> dict[str, Any]:
        """What updates change; everything else comes from the constructor."""
        return {"value": self._value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved coefficient, within this controller's bounds."""
        check_positive("value", state["value"])
        self._value = min(max(float(state["value"]), self.min_coef), self.max_coef)

    def _check_steps(self, n_steps: int) -> None:
        """ValueError where an update cannot be of this many sequences."""
        check_positive("n_steps", n_steps)

    @abstractmethod
    def _steer(self, kl: float, n_steps: int) -> tuple[float, float]:
        """The error, and the factor it moves the coefficient by."""


class AdaptiveKLController(_SteeredKLController):
    """A KL coefficient that a proportional controller steers towards a target KL.

        error = clip(kl / target - 1, -error_clip, error_clip)
        value = value (1 + error n_steps / horizon)

    (Ziegler et al. 2019, arXiv 1909.08593, section 2.2.) The target's unit belongs to the
    controller, because the same number means opposite things in the two in use: 6 nats are a
    common budget for a whole response and an absurd one for each token.

    The horizon sets the speed, and the classic 10000 is slow: 512 sequences per update move the
    coefficient by at most 1.02 %, so doubling it takes 68 updates; 64 sequences need 542. For short
    runs choose a horizon of a few times n_steps, or `PIKLController`, which compares their speeds.

    Args:
        init_kl_coef: the coefficient to start from, above 0 (0 could never grow).
        target: the KL to reach, in nats of `unit`, above 0.
        horizon: the number of steps over which a full error of 1 would double the coefficient.
        unit: "sequence_sum" (KL of a response, mean over responses: OpenAI, TRL) or "token_mean"
            (KL of a token, mean over tokens: verl, OpenRLHF).
        error_clip: bound of the relative error, above 0.
        min_coef: lower bound of the coefficient, above 0.
        max_coef: upper bound of the coefficient; None: none.

    Raises:
        ValueError: an argument is outside its range; at an update, n_steps error_clip >= horizon,
            where one update could turn the coefficient to 0 or below.
    """

    def __init__(
        self,
        init_kl_coef: float,
        target: float,
        horizon: float,
        *,
        unit: str,
        error_clip: float = 0.2,
        min_coef: float = 1e-6,
        max_coef: float | None = None,
    ) -> None:
        super().__init__(init_kl_coef, target, unit=unit, min_coef=min_coef, max_coef=max_coef)
        check_positive("horizon", horizon)
        check_positive("error_clip", error_clip)
        self.horizon = horizon
        self.error_clip = error_clip

    def _check_steps(self, n_steps: int) -> None:
        super()._check_steps(n_steps)
        if n_steps * self.error_clip >= self.horizon:
            raise ValueError(
                f"n_steps is {n_steps} and horizon {self.horizon}: one update could turn the "
                f"coefficient negative; the horizon has to exceed {n_steps * self.error_clip}"
            )

    def _steer(self, kl: float, n_steps: int) -> tuple[float, float]:
        error = min(max(kl / self.target - 1, -self.error_clip), self.error_clip)
        return error, 1 + error * n_steps / self.horizon


class ThresholdKLController(_SteeredKLController):
    """A KL coefficient that is multiplied when the KL leaves a band around the target.

        kl > target tolerance:   value = value raise_by
        kl < target / tolerance: value = value lower_by

    With the defaults the rule of PPO's KL-penalty variant (Schulman et al. 2017, arXiv 1707.06347,
    section 4); RLlib's is tolerance=2, raise_by=1.5, lower_by=0.5. It is coarse: anywhere in the
    band is good enough, and a KL that follows the coefficient late is first driven past it.

    Args:
        init_kl_coef: the coefficient to start from, above 0 (0 could never grow).
        target: the KL to stay near, in nats of `unit`, above 0.
        unit: "sequence_sum" or "token_mean", see `AdaptiveKLController`.
        tolerance: half-width of the band, as a factor above 1.
        raise_by: factor above 1.
        lower_by: factor between 0 and 1.
        min_coef: lower bound of the coefficient, above 0.
        max_coef: upper bound of the coefficient; None: none.

    Raises:
        ValueError: an argument is outside its range.
    """

    def __init__(
        self,
        init_kl_coef: float,
        target: float,
        *,
        unit: str,
        tolerance: float = 1.5,
        raise_by: float = 2.0,
        lower_by: float = 0.5,
        min_coef: float = 1e-6,
        max_coef: float | None = None,
    ) -> None:
        super().__init__(init_kl_coef, target, unit=unit, min_coef=min_coef, max_coef=max_coef)
        for name, factor in (("tolerance", tolerance), ("raise_by", raise_by)):
            check_finite(name, factor)
            if factor <= 1:
                raise ValueError(f"{name} is {factor}; it has to be above 1")
        if not 0 < lower_by < 1:
            raise ValueError(f"lower_by is {lower_by}; it has to be between 0 and 1")
        self.tolerance = tolerance
        self.raise_by = raise_by
        self.lower_by = lower_by

    def _steer(self, kl: float, n_steps: int) -> tuple[float, float]:
        error = kl / self.target - 1
        if kl > self.target * self.tolerance:
            return error, self.raise_by
        return error, self.lower_by if kl < self.target / self.tolerance else 1.0


class PIKLController(_SteeredKLController):
    """A KL coefficient whose logarithm a proportional-integral controller steers.

        error = clip(log(kl / target), -error_clip, error_clip)
        log value += gain (error + lag (error - previous error))

    In logarithms, half the target is as far off as twice the target, and the coefficient never
    reaches 0. The first term is what `AdaptiveKLController` does with horizon = n_steps / gain. The
    second (the proportional one, in the incremental form whose integral cannot wind up at a bound)
    acts on a KL that is moving before it arrives, which is what allows the larger gain.

    Updates until the KL stays within 20 % of its target (for good, under 5 % noise), where the KL
    approaches c / coefficient within `tau` updates exponentially, from a coefficient that is

        tau                                10x too small   right   10x too large
        AdaptiveKLController, 10000, n=512
        3                                            212       3             204
        10                                           221      12             210
        20                                           234      22             219
        AdaptiveKLController, 192, n=64
        3                                             37       2              31
        10                                            64      22              36
        20                                            95      37              61
        PIKLController
        3                                             12       6              29
        10                                            16       7              24
        20                                            24       9              26

    Args:
        init_kl_coef: the coefficient to start from, above 0 (0 could never grow).
        target: the KL to reach, in nats of `unit`, above 0.
        unit: "sequence_sum" or "token_mean", see `AdaptiveKLController`.
        gain: by how much a full error of 1 moves the logarithm in one update, above 0.
        lag: updates by which the KL follows the coefficient, 0 or above; 0: no proportional term.
        error_clip: bound of the error, above 0; log 2: all beyond twice or half is alike.
        min_coef: lower bound of the coefficient, above 0.
        max_coef: upper bound of the coefficient; None: none.

    Raises:
        ValueError: an argument is outside its range.
    """

    def __init__(
        self,
        init_kl_coef: float,
        target: float,
        *,
        unit: str,
        gain: float = 0.2,
        lag: float = 8.0,
        error_clip: float = math.log(2),
        min_coef: float = 1e-6,
        max_coef: float | None = None,
    ) -> None:
        super().__init__(init_kl_coef, target, unit=unit, min_coef=min_coef, max_coef=max_coef)
        check_positive("gain", gain)
        check_non_negative("lag", lag)
        check_positive("error_clip", error_clip)
        self.gain = gain
        self.lag = lag
        self.error_clip = error_clip
        self._previous: float | None = None

    def _steer(self, kl: float, n_steps: int) -> tuple[float, float]:
        # A KL of 0 or, sampled, below has no logarithm; it is as far under the target as can be.
        ratio = kl / self.target  # 0 also of a KL too small to be divided
        error = math.log(ratio) if ratio > 0 else -math.inf
        error = min(max(error, -self.error_clip), self.error_clip)
        moved = 0.0 if self._previous is None else error - self._previous
        self._previous = error
        return error, math.exp(self.gain * (error + self.lag * moved))

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "previous_error": self._previous}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._previous = state["previous_error"]
