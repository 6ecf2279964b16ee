"""The KL coefficient of the reward (beta), fixed or steered towards a target KL."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from torch import Tensor

from kl_kernels.checks import (
    check_choice,
    check_non_negative,
    check_number,
    check_positive,
    check_state,
)
from kl_kernels.rl.measure import UNITS, Unit, measure_kl

if TYPE_CHECKING:  # not in every build of torch
    from torch.distributed import ProcessGroup


class KLUpdate(NamedTuple):
    """The KL an update measured, and the coefficient it led to."""

    kl: float  # measured, in the controller's unit (nats); NaN of a batch without tokens
    value: float  # the coefficient from now on
    error: float  # the clipped error that moved it; 0 for a fixed coefficient
    applied: bool  # False: there was no finite KL, and the coefficient stayed as it was


class KLController(Protocol):
    """Anything that holds the KL coefficient and is told the KL after each rollout."""

    @property
    def value(self) -> float: ...

    def update(
        self,
        kl: Tensor | float,  # [B, T]
        n_steps: int,
        mask: Tensor | None = None,  # [B, T]
        *,
        group: ProcessGroup | None = None,
    ) -> KLUpdate: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class FixedKLController:
    """A constant KL coefficient with the interface of `AdaptiveKLController`.

    Args:
        kl_coef: beta; finite, 0 or above.
        unit: the unit in which updates report the KL they were shown: "sequence_sum" (KL of a
            response, mean over responses) or "token_mean" (KL of a token, mean over tokens).

    Raises:
        TypeError, ValueError: an argument has the wrong type or is outside its range.

    Examples:
        >>> import kl_kernels
        >>> controller = kl_kernels.FixedKLController(0.05)
        >>> controller.update(7.5, n_steps=64).kl
        7.5
        >>> controller.value
        0.05
    """

    def __init__(self, kl_coef: float, *, unit: Unit = "sequence_sum") -> None:
        check_choice("unit", unit, UNITS)
        self._value = check_non_negative("kl_coef", kl_coef)
        self.unit = unit

    def __repr__(self) -> str:
        return f"FixedKLController({self._value}, unit={self.unit!r})"

    @property
    def value(self) -> float:
        """The coefficient, a Python float."""
        return self._value

    def update(
        self,
        kl: Tensor | float,  # [B, T]
        n_steps: int,
        mask: Tensor | None = None,  # [B, T]
        *,
        group: ProcessGroup | None = None,
        cu_seqlens: Tensor | None = None,  # [S + 1]
    ) -> KLUpdate:
        """Report the KL of a rollout; the coefficient stays.

        Args:
            kl: [B, T] per-token KL in nats, which is reduced to the unit under `mask`, or a number
                that is in the unit already.
            n_steps: sequences in the rollout, above 0; not used.
            mask: [B, T] bool, or numbers that are 0 or 1, with per-token KL only.
            group: data-parallel ranks that each pass their own sequences.
            cu_seqlens: [S + 1] int32 or int64 of packed sequences, ascending from 0 to N; kl and
                mask are then [N] or [1, N]. None: each row is a sequence.

        Returns:
            KLUpdate(kl, value, error=0, applied); applied is False where the KL is not finite, and
            where no token is left, whose kl is NaN.

        Raises:
            TypeError, ValueError: shapes disagree, or n_steps is not accepted.
        """
        check_positive("n_steps", n_steps)
        current = _measured(kl, mask, self.unit, group, cu_seqlens)
        return KLUpdate(current, self._value, 0.0, applied=math.isfinite(current))

    def state_dict(self) -> dict[str, Any]:
        """The class and the coefficient; JSON can hold it."""
        return {"class": type(self).__name__, "value": self._value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep the constructor's coefficient: there is nothing that updates change.

        Raises:
            ValueError: the state is another controller's.
        """
        check_state(state, type(self).__name__, ("value",))


class SteeredKLController(ABC):
    """A coefficient within bounds that each update multiplies by a factor."""

    def __init__(
        self,
        init_kl_coef: float,
        target: float,
        *,
        unit: Unit,
        min_coef: float,
        max_coef: float | None,
    ) -> None:
        init_kl_coef = check_positive("init_kl_coef", init_kl_coef)
        self.target = check_positive("target", target)
        check_choice("unit", unit, UNITS)
        self.unit = unit
        self.min_coef = check_positive("min_coef", min_coef)
        self.max_coef = math.inf if max_coef is None else check_number("max_coef", max_coef)
        if not self.max_coef >= self.min_coef:
            raise ValueError(f"max_coef is {max_coef}, below min_coef {min_coef}")
        if not self.min_coef <= init_kl_coef <= self.max_coef:
            raise ValueError(
                f"init_kl_coef is {init_kl_coef}; min_coef and max_coef accept "
                f"{self.min_coef} to {self.max_coef}"
            )
        self._value = init_kl_coef

    def __repr__(self) -> str:
        facts = {"value": self._value, **vars(self)}  # arguments by their names, the value first
        shown = (f"{k}={v!r}" for k, v in facts.items() if not k.startswith("_"))
        return f"{type(self).__name__}({', '.join(shown)})"

    @property
    def value(self) -> float:
        """The current coefficient, a Python float."""
        return self._value

    def update(
        self,
        kl: Tensor | float,  # [B, T]
        n_steps: int,
        mask: Tensor | None = None,  # [B, T]
        *,
        group: ProcessGroup | None = None,
        cu_seqlens: Tensor | None = None,  # [S + 1]
    ) -> KLUpdate:
        """Move the coefficient, once per rollout.

        In data parallel every rank must see the same global figures, or coefficients drift
        apart: pass each rank's own [B, T] KL with `group`, or the reduced KL as a number.

        Args:
            kl: [B, T] per-token KL in nats, which the controller reduces to its unit under `mask`,
                or a number that is in the unit already. Sampled KL may be negative; it counts as
                such.
            n_steps: sequences in the rollout, over all ranks; above 0. Only
                `AdaptiveKLController` counts in sequences, the others in updates.
            mask: [B, T] bool, or numbers that are 0 or 1, with per-token KL only; NaN where it is 0
                changes nothing.
            group: data-parallel ranks that each pass their own sequences; they must call this
                together, and all get the same update. A rank may have no token.
            cu_seqlens: [S + 1] int32 or int64 of packed sequences, ascending from 0 to N (looked at
                on a CPU alone); kl and mask are then [N] or [1, N]. None: each row is a sequence.

        Returns:
            KLUpdate(kl, value, error, applied). A KL that is not finite is not applied, nor is a
            batch without tokens (on all ranks together), whose kl is NaN.

        Raises:
            TypeError, ValueError: shapes disagree, or n_steps is not accepted.
        """
        steps = self._checked_steps(n_steps)
        current = _measured(kl, mask, self.unit, group, cu_seqlens)
        if not math.isfinite(current):
            return KLUpdate(current, self._value, 0.0, applied=False)
        error, factor = self._steer(current, steps)
        self._value = min(max(self._value * factor, self.min_coef), self.max_coef)
        return KLUpdate(current, self._value, error, applied=True)

    def state_dict(self) -> dict[str, Any]:
        """The class, and what updates change (the rest comes from the constructor); JSON holds it.

        A controller of the same class and arguments that loads it goes on as this one would have.
        """
        return {"class": type(self).__name__, "value": self._value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved coefficient, within this controller's bounds.

        Raises:
            TypeError, ValueError: the state is another controller's, or its coefficient is no
                number above 0; the controller is as it was then.
        """
        check_state(state, type(self).__name__, ("value",))
        value = check_positive("value", state["value"])
        self._value = min(max(value, self.min_coef), self.max_coef)

    def _checked_steps(self, n_steps: float) -> float:
        """The sequences of an update; ValueError where it cannot be of this many."""
        return check_positive("n_steps", n_steps)

    @abstractmethod
    def _steer(self, kl: float, n_steps: float) -> tuple[float, float]:
        """The error, and the factor it moves the coefficient by."""


def _measured(
    kl: Tensor | float,
    mask: Tensor | None,
    unit: Unit,
    group: ProcessGroup | None,
    cu_seqlens: Tensor | None,
) -> float:
    current = measure_kl(kl, mask, unit, group, cu_seqlens)
    return math.nan if current is None else current
