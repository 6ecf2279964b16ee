"""Updates that a constraint accepts or refuses."""

import math

import pytest

from kl_kernels.monitor.constraint import ACTIONS, UpdateConstraint


@pytest.mark.parametrize(
    ("kl", "ratio", "kind"),
    [
        (0.0, 1.0, None),
        (0.1, 20.0, None),
        (0.1001, 1.0, "update_kl"),
        (0.0, 20.1, "update_ratio"),
        (1.0, 100.0, "update_kl"),
        (math.nan, 1.0, "update_kl"),
        (math.inf, 1.0, "update_kl"),
        (0.0, math.nan, "update_ratio"),
        (0.0, math.inf, "update_ratio"),
    ],
)
def test_beyond_a_limit_is_an_event(kl, ratio, kind):
    event = UpdateConstraint(max_kl=0.1, max_ratio=20.0).check(7, kl=kl, ratio=ratio)
    assert (event and event.kind) == kind
    if event:
        assert event.step == 7
        value, limit = (kl, 0.1) if kind == "update_kl" else (ratio, 20.0)
        assert (event.value, event.limit) == (pytest.approx(value, nan_ok=True), limit)


def test_only_the_given_limit_counts():
    assert UpdateConstraint(max_kl=0.1).check(1, kl=0.0, ratio=1e9) is None
    assert UpdateConstraint(max_ratio=2.0).check(1, kl=1e9, ratio=1.5) is None


def test_the_message_says_what_happens():
    for action in ACTIONS:
        event = UpdateConstraint(max_kl=0.1, action=action).check(1, kl=0.25)
        assert "0.25 nats per token, beyond 0.1" in event.message
        assert event.message.endswith(action)


def test_undoing_needs_a_copy_where_nothing_else_brings_the_policy_back():
    undone = {action for action in ACTIONS if UpdateConstraint(max_kl=1.0, action=action).undoes}
    assert undone == {"skip", "stop", "raise"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "max_kl and max_ratio are None"),
        ({"max_kl": 0.0}, "max_kl is 0"),
        ({"max_kl": math.nan}, "max_kl is nan"),
        ({"max_ratio": 1.0}, "max_ratio is 1.0; it must be above 1"),
        ({"max_ratio": math.inf}, "max_ratio is inf"),
        ({"max_kl": 1.0, "action": "warn"}, "action is 'warn'; accepted: 'log', 'skip', 'stop'"),
    ],
)
def test_limits_that_cannot_hold_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        UpdateConstraint(**options)
