"""The controller of the KL coefficient beta, in units of the score per nat of a whole answer."""

from __future__ import annotations

from dataclasses import dataclass

from kl_kernels import (
    AdaptiveKLController,
    FixedKLController,
    PIKLController,
    ThresholdKLController,
)
from kl_kernels.rl.controllers import KLController
from kl_kernels.rl.measure import Unit


@dataclass(frozen=True)
class ControllerConstants:
    """Constants of `make_controller`, as `PPOConfig` has them."""

    controller: str
    kl_coef: float
    kl_target: float
    kl_horizon: int
    kl_gain: float
    kl_lag: float


def make_controller(constants: ControllerConstants) -> KLController:
    start, target = constants.kl_coef, constants.kl_target
    unit: Unit = "sequence_sum"
    if constants.controller == "adaptive":
        return AdaptiveKLController(start, target, constants.kl_horizon, unit=unit)
    if constants.controller == "threshold":
        return ThresholdKLController(start, target, unit=unit)
    if constants.controller == "pi":
        gain, lag = constants.kl_gain, constants.kl_lag
        return PIKLController(start, target, unit=unit, gain=gain, lag=lag)
    return FixedKLController(start, unit=unit)
