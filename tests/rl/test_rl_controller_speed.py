"""Updates that each controller needs to reach its target, on a model of a KL that follows beta."""

import math
import random

import pytest

from kl_kernels import AdaptiveKLController, PIKLController, ThresholdKLController

TARGET = 20.0
RIGHT = 0.1  # the coefficient at which the KL settles on the target


def kls(controller, tau, n_steps, updates=1000):
    """KL moves 1/tau of the way to TARGET RIGHT / coefficient; it is seen with 5 % noise."""
    noise = random.Random(0)
    kl, history = 0.0, []
    for _ in range(updates):
        controller.update(kl * math.exp(0.05 * noise.gauss(0, 1)), n_steps)
        kl += (TARGET * RIGHT / controller.value - kl) / tau
        history.append(kl)
    return history


def settled(history):
    """Updates until the KL stays within 20 % of the target."""
    off = [update for update, kl in enumerate(history, 1) if abs(kl / TARGET - 1) > 0.2]
    return off[-1] if off else 0


def adaptive(horizon):
    return lambda start: AdaptiveKLController(start, TARGET, horizon, unit="sequence_sum")


def pi(start):
    return PIKLController(start, TARGET, unit="sequence_sum")


CONTROLLERS = {
    "AdaptiveKLController, 10000, n=512": (adaptive(10000), 512),
    "AdaptiveKLController, 192, n=64": (adaptive(192), 64),
    "PIKLController": (pi, 64),
}
STARTS = (RIGHT / 10, RIGHT, RIGHT * 10)


def updates_to_settle(name, tau):
    make, n_steps = CONTROLLERS[name]
    return [settled(kls(make(start), tau, n_steps)) for start in STARTS]


@pytest.mark.parametrize("name", CONTROLLERS)
def test_the_documented_times_are_those_of_the_model(name):
    documented = PIKLController.__doc__.splitlines()
    at = next(i for i, line in enumerate(documented) if line.strip() == name)
    for line, tau in zip(documented[at + 1 :], (3, 10, 20)):
        assert [int(cell) for cell in line.split()] == [tau, *updates_to_settle(name, tau)]


@pytest.mark.parametrize("tau", [3, 10, 20])
def test_pi_is_the_fastest_from_a_coefficient_that_is_far_off(tau):
    classic, tuned, pi = (updates_to_settle(name, tau) for name in CONTROLLERS)
    for start in (0, 2):
        assert pi[start] < tuned[start] < classic[start]


@pytest.mark.parametrize("start", STARTS)
def test_the_threshold_rule_ends_in_its_band(start):
    history = kls(ThresholdKLController(start, TARGET, unit="sequence_sum"), 3, 64, updates=300)
    assert all(TARGET / 1.5 < kl < TARGET * 1.5 for kl in history[200:])
