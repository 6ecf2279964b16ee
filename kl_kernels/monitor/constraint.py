"""A limit on how far one update may move the policy, and what happens to an update beyond it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from kl_kernels.checks import (
    check_choice,
    check_finite,
    check_integer,
    check_measured,
    check_positive,
)
from kl_kernels.monitor.events import Event

Action = Literal["log", "skip", "stop", "rollback", "raise"]
ACTIONS = get_args(Action)


class ConstraintViolation(RuntimeError):
    """An update went beyond its `UpdateConstraint`, whose action is "raise"."""


@dataclass(frozen=True)
class UpdateConstraint:
    """Limits how far one update (all steps on one rollout) may move the policy.

    The constraint decides; the training loop measures, and acts. It measures the policy before
    every step and after the last one, against the policy that sampled the rollout: an update that
    is kept has been within the limits all the way.

    Args:
        max_kl: mean KL(old policy || policy) in nats per token, above 0 (`approx_kl` of the policy
            losses, k3). None: no limit.
        max_ratio: the largest policy / old policy of any token, above 1 (`ratio_max`). One token is
            enough, so it must be generous: 10 and more. None: no limit.
        action: what to do with an update that goes beyond.
            "log": keep it and say so.
            "skip": undo it; weights and optimizer are bitwise what they were before. Costs a copy
            of both in memory.
            "stop": undo it and end the training.
            "rollback": restore the last good checkpoint; training goes on from there, with other
            samples. Costs no memory, and the updates since that checkpoint.
            "raise": undo it and raise `ConstraintViolation`.

    Raises:
        TypeError, ValueError: a limit is no number or outside its range, or there is none.

    Examples:
        >>> import kl_kernels
        >>> constraint = kl_kernels.UpdateConstraint(max_kl=0.1, action="skip")
        >>> constraint.check(1, kl=0.02) is None
        True
        >>> print(constraint.check(2, kl=0.3))
        step 2: KL(old policy || policy) of this update is 0.3 nats per token, beyond 0.1: skip
    """

    max_kl: float | None = None
    max_ratio: float | None = None
    action: Action = "log"

    def __post_init__(self) -> None:
        if self.max_kl is None and self.max_ratio is None:
            raise ValueError("max_kl and max_ratio are None; a constraint needs one of them")
        for name, check in (("max_kl", check_positive), ("max_ratio", check_finite)):
            if (limit := getattr(self, name)) is not None:
                object.__setattr__(self, name, check(name, limit))
        if self.max_ratio is not None and self.max_ratio <= 1:
            raise ValueError(
                f"max_ratio is {self.max_ratio}; it must be above 1, the ratio of a policy "
                "that did not move"
            )
        check_choice("action", self.action, ACTIONS)

    @property
    def undoes(self) -> bool:
        """Tell whether the action needs a copy of weights and optimizer from before the update."""
        return self.action in ("skip", "stop", "raise")

    def check(self, step: int, *, kl: float = 0.0, ratio: float = 1.0) -> Event | None:
        """Compare the policy with the limits.

        Args:
            step: the update's number, for the event.
            kl: mean KL(old policy || policy), nats per token. NaN and infinity violate.
            ratio: the largest policy / old policy of any token. NaN and infinity violate.

        Returns:
            An event of kind "update_kl" or "update_ratio" for the first limit that the policy is
            beyond, or None.

        Raises:
            TypeError, ValueError: an argument is no number.
        """
        step = check_integer("step", step)
        kl, ratio = check_measured("kl", kl), check_measured("ratio", ratio)
        found = (
            ("update_kl", "KL(old policy || policy)", " nats per token", kl, self.max_kl),
            ("update_ratio", "the largest policy ratio", "", ratio, self.max_ratio),
        )
        for kind, what, unit, value, limit in found:
            if limit is not None and not value <= limit:
                size = f"{value:.3g}" if math.isfinite(value) else str(value)
                message = f"{what} of this update is {size}{unit}, beyond {limit:g}: {self.action}"
                return Event(step, kind, value, limit, message)
        return None
