"""The KL coefficient of the reward (beta), fixed or steered towards a target KL."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from torch import Tensor

from kl_kernels.checks import check_choice, check_non_negative, check_positive
from kl_kernels.rl.measure import UNITS, measure_kl

if TYPE_CHECKING:  # not in every build of torch
    from torch.distributed import ProcessGroup


class KLUpdate(NamedTuple):
    """What an update saw and did."""

    kl: float  # measured, in the controller's unit (nats)
    value: float  # the coefficient from now on
    error: float  # the clipped relative error that moved it; 0 for a fixed coefficient
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


class AdaptiveKLController:
    """A KL coefficient that a proportional controller steers towards a target KL.

        error = clip(kl / target - 1, -error_clip, error_clip)
        value = value (1 + error n_steps / horizon)

    (Ziegler et al. 2019, arXiv 1909.08593, section 2.2.) The target's unit belongs to the
    controller, because the same number means opposite things in the two in use: 6 nats are a
    common budget for a whole response and an absurd one for each token.

    The horizon sets the speed, and the classic 10000 is slow: 512 sequences per update move the
    coefficient by at most 1.02 %, so doubling it takes 68 updates; 64 sequences need 542. For short
    runs choose a horizon of a few times n_steps.

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
        ValueError: an argument is outside its range.
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
        for name, value in (
            ("init_kl_coef", init_kl_coef),
            ("target", target),
            ("horizon", horizon),
            ("error_clip", error_clip),
            ("min_coef", min_coef),
        ):
            check_positive(name, value)
        check_choice("unit", unit, UNITS)
        if max_coef is not None and not max_coef >= min_coef:
            raise ValueError(f"max_coef is {max_coef}, below min_coef {min_coef}")
        self.target = target
        self.horizon = horizon
        self.unit = unit
        self.error_clip = error_clip
        self.min_coef = min_coef
        self.max_coef = math.inf if max_coef is None else max_coef
        if not self.min_coef <= init_kl_coef <= self.max_coef:
            raise ValueError(
                f"init_kl_coef is {init_kl_coef}; min_coef and max_coef accept "
                f"{self.min_coef} to {self.max_coef}"
            )
        self._value = float(init_kl_coef)

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
            n_steps: sequences in the rollout, over all ranks; above 0.
            mask: [B, T] bool or numeric, with per-token KL only; NaN where it is 0 changes nothing.
            group: data-parallel ranks that each pass their own sequences; they have to call this
                together, and all get the same update. A rank may have no token.

        Returns:
            KLUpdate(kl, value, error, applied). A KL that is not finite is not applied.

        Raises:
            TypeError, ValueError: shapes disagree, or n_steps error_clip >= horizon, where one
                update could turn the coefficient to 0 or below.
        """
        check_positive("n_steps", n_steps)
        if n_steps * self.error_clip >= self.horizon:
            raise ValueError(
                f"n_steps is {n_steps} and horizon {self.horizon}: one update could turn the "
                f"coefficient negative; the horizon has to exceed {n_steps * self.error_clip}"
            )
        current = measure_kl(kl, mask, self.unit, group)
        if not math.isfinite(current):
            return KLUpdate(current, self._value, 0.0, applied=False)
        error = min(max(current / self.target - 1, -self.error_clip), self.error_clip)
        moved = self._value * (1 + error * n_steps / self.horizon)
        self._value = min(max(moved, self.min_coef), self.max_coef)
        return KLUpdate(current, self._value, error, applied=True)

    def state_dict(self) -> dict[str, Any]:
        """The coefficient; everything else comes from the constructor."""
        return {"value": self._value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved coefficient, within this controller's bounds."""
        check_positive("value", state["value"])
        self._value = min(max(float(state["value"]), self.min_coef), self.max_coef)
