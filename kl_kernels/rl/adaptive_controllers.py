"""KL coefficients that follow the KL: three rules that steer them towards a target."""

from __future__ import annotations

import math
from typing import Any

from kl_kernels.checks import check_finite, check_non_negative, check_positive, check_state
from kl_kernels.rl.controllers import SteeredKLController
from kl_kernels.rl.measure import Unit


class AdaptiveKLController(SteeredKLController):
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
        TypeError, ValueError: an argument has the wrong type or is outside its range; at an update,
            n_steps error_clip >= horizon, where one update could turn the coefficient to 0 or
            below.

    Examples:
        >>> import kl_kernels
        >>> controller = kl_kernels.AdaptiveKLController(
        ...     0.1, target=6.0, horizon=640, unit="sequence_sum"
        ... )
        >>> update = controller.update(12.0, n_steps=64)  # twice the target: beta rises
        >>> round(update.error, 6), round(controller.value, 6)
        (0.2, 0.102)
    """

    def __init__(
        self,
        init_kl_coef: float,
        target: float,
        horizon: float,
        *,
        unit: Unit,
        error_clip: float = 0.2,
        min_coef: float = 1e-6,
        max_coef: float | None = None,
    ) -> None:
        super().__init__(init_kl_coef, target, unit=unit, min_coef=min_coef, max_coef=max_coef)
        self.horizon = check_positive("horizon", horizon)
        self.error_clip = check_positive("error_clip", error_clip)

    def _checked_steps(self, n_steps: float) -> float:
        steps = super()._checked_steps(n_steps)
        if steps * self.error_clip >= self.horizon:
            raise ValueError(
                f"n_steps is {n_steps} and horizon {self.horizon:g}: one update could turn the "
                f"coefficient negative; the horizon must exceed {steps * self.error_clip}"
            )
        return steps

    def _steer(self, kl: float, n_steps: float) -> tuple[float, float]:
        error = min(max(kl / self.target - 1, -self.error_clip), self.error_clip)
        return error, 1 + error * n_steps / self.horizon


class ThresholdKLController(SteeredKLController):
    """A KL coefficient that is multiplied when the KL leaves a band around the target.

        kl > target tolerance:   value = value raise_by
        kl < target / tolerance: value = value lower_by

    With the defaults the rule of PPO's KL-penalty variant (Schulman et al. 2017, arXiv 1707.06347,
    section 4); RLlib's is tolerance=2, raise_by=1.5, lower_by=0.5. It is coarse: anywhere in the
    band is good enough, and a KL that follows the coefficient late is first driven past it.

    Args:
        init_kl_coef: the coefficient to start from, above 0 (0 could never grow).
        target: the KL to stay near, in nats of `unit`, above 0.
        unit: "sequence_sum" or "token_mean": KL of a response, mean over responses; or KL of a
            token, mean over tokens.
        tolerance: half-width of the band, as a factor above 1.
        raise_by: factor above 1.
        lower_by: factor between 0 and 1.
        min_coef: lower bound of the coefficient, above 0.
        max_coef: upper bound of the coefficient; None: none.

    Raises:
        TypeError, ValueError: an argument has the wrong type or is outside its range.

    Examples:
        >>> import kl_kernels
        >>> controller = kl_kernels.ThresholdKLController(0.1, target=6.0, unit="sequence_sum")
        >>> [controller.update(kl, n_steps=64).value for kl in (12.0, 6.0, 1.0)]
        [0.2, 0.2, 0.1]
    """

    def __init__(
        self,
        init_kl_coef: float,
        target: float,
        *,
        unit: Unit,
        tolerance: float = 1.5,
        raise_by: float = 2.0,
        lower_by: float = 0.5,
        min_coef: float = 1e-6,
        max_coef: float | None = None,
    ) -> None:
        super().__init__(init_kl_coef, target, unit=unit, min_coef=min_coef, max_coef=max_coef)
        self.tolerance = check_finite("tolerance", tolerance)
        self.raise_by = check_finite("raise_by", raise_by)
        self.lower_by = check_finite("lower_by", lower_by)
        for name, factor in (("tolerance", self.tolerance), ("raise_by", self.raise_by)):
            if factor <= 1:
                raise ValueError(f"{name} is {factor}; it must be above 1")
        if not 0 < self.lower_by < 1:
            raise ValueError(f"lower_by is {lower_by}; it must be between 0 and 1")

    def _steer(self, kl: float, n_steps: float) -> tuple[float, float]:
        error = kl / self.target - 1
        if kl > self.target * self.tolerance:
            return error, self.raise_by
        return error, self.lower_by if kl < self.target / self.tolerance else 1.0


class PIKLController(SteeredKLController):
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
        unit: "sequence_sum" or "token_mean": KL of a response, mean over responses; or KL of a
            token, mean over tokens.
        gain: by how much a full error of 1 moves the logarithm in one update, above 0.
        lag: updates by which the KL follows the coefficient, 0 or above; 0: no proportional term.
        error_clip: bound of the error, above 0; log 2: all beyond twice or half is alike.
        min_coef: lower bound of the coefficient, above 0.
        max_coef: upper bound of the coefficient; None: none.

    Raises:
        TypeError, ValueError: an argument has the wrong type or is outside its range.

    Examples:
        >>> import kl_kernels
        >>> controller = kl_kernels.PIKLController(0.1, target=6.0, unit="sequence_sum")
        >>> [round(controller.update(kl, n_steps=64).value, 3) for kl in (9.0, 9.0, 6.0)]
        [0.108, 0.118, 0.061]
    """

    def __init__(
        self,
        init_kl_coef: float,
        target: float,
        *,
        unit: Unit,
        gain: float = 0.2,
        lag: float = 8.0,
        error_clip: float = math.log(2),
        min_coef: float = 1e-6,
        max_coef: float | None = None,
    ) -> None:
        super().__init__(init_kl_coef, target, unit=unit, min_coef=min_coef, max_coef=max_coef)
        self.gain = check_positive("gain", gain)
        self.lag = check_non_negative("lag", lag)
        self.error_clip = check_positive("error_clip", error_clip)
        self._previous: float | None = None

    def _steer(self, kl: float, n_steps: float) -> tuple[float, float]:
        # A KL of 0 or, sampled, below has no logarithm; it is as far under the target as can be.
        ratio = kl / self.target  # 0 also of a KL too small to be divided
        error = math.log(ratio) if ratio > 0 else -math.inf
        error = min(max(error, -self.error_clip), self.error_clip)
        moved = 0.0 if self._previous is None else error - self._previous
        self._previous = error
        return error, math.exp(self.gain * (error + self.lag * moved))

    def state_dict(self) -> dict[str, Any]:
        """The class, the coefficient and the error of the last update; JSON can hold it."""
        return {**super().state_dict(), "previous_error": self._previous}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved coefficient and error, within this controller's bounds.

        Raises:
            TypeError, ValueError: the state is another controller's, or holds no such numbers; the
                controller is as it was then.
        """
        check_state(state, type(self).__name__, ("value", "previous_error"))
        previous = state["previous_error"]
        if previous is not None:
            previous = check_finite("previous_error", previous)
        super().load_state_dict(state)
        self._previous = previous
