"""The KL controllers: formula, unit, bounds, resuming, and what they refuse."""

import json
import math

import numpy as np
import pytest
import torch

from kl_kernels import (
    AdaptiveKLController,
    FixedKLController,
    PIKLController,
    ThresholdKLController,
)

KL = torch.tensor([[1.0, 2.0, torch.nan], [4.0, torch.nan, torch.nan], [torch.nan] * 3])
MASK = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]])


def controller(**options):
    arguments = {"init_kl_coef": 0.2, "target": 6.0, "horizon": 10000, "unit": "sequence_sum"}
    return AdaptiveKLController(**arguments | options)


def threshold(**options):
    return ThresholdKLController(
        **{"init_kl_coef": 0.2, "target": 6.0, "unit": "token_mean"} | options
    )


def pi(**options):
    return PIKLController(**{"init_kl_coef": 0.2, "target": 6.0, "unit": "token_mean"} | options)


STEERED = pytest.mark.parametrize("steered", [controller, threshold, pi])


@pytest.mark.parametrize(
    ("kl", "error"),
    [(6.0, 0.0), (6.6, 0.1), (5.4, -0.1), (7.2, 0.2), (600.0, 0.2), (0.0, -0.2), (-3.0, -0.2)],
)
def test_the_formula_of_ziegler_et_al(kl, error):
    control = controller()
    update = control.update(kl, 256)
    assert update.error == pytest.approx(error, abs=1e-15)
    assert update.value == pytest.approx(0.2 * (1 + error * 256 / 10000), rel=1e-15)
    assert update.value == control.value
    assert update.kl == kl
    assert update.applied


def test_the_classic_horizon_is_as_slow_as_documented():
    for n_steps, updates in ((512, 68), (64, 542)):
        control = controller()
        n = 0
        while control.value < 0.4:
            control.update(1e9, n_steps)
            n += 1
        assert abs(n - updates) <= 1
    assert controller().update(1e9, 512).value / 0.2 == pytest.approx(1.01024)


@pytest.mark.parametrize(
    ("unit", "expected"), [("sequence_sum", (3 + 4) / 2), ("token_mean", (1 + 2 + 4) / 3)]
)
def test_the_controller_applies_its_unit(unit, expected):
    for control in (controller(unit=unit), FixedKLController(0.1, unit=unit)):
        assert control.update(KL, 1, mask=MASK).kl == pytest.approx(expected, rel=1e-6)
        assert control.update(KL, 1, mask=MASK.bool()).kl == pytest.approx(expected, rel=1e-6)
        assert control.update(expected, 1).kl == expected
        assert control.update(torch.tensor(2.5), 1).kl == 2.5


def test_longer_answers_raise_the_sum_and_not_the_mean():
    kl = torch.full((2, 40), 0.5)
    mask = torch.ones(2, 40)
    assert controller(unit="sequence_sum").update(kl, 64, mask=mask).error == 0.2  # 20 nats
    assert controller(unit="token_mean").update(kl, 64, mask=mask).error == -0.2  # 0.5 nats


@pytest.mark.parametrize("unit", ["sequence_sum", "token_mean"])
def test_the_kl_of_a_single_token_is_its_own(unit):
    assert controller(unit=unit).update(torch.tensor([[3.0]]), 1, mask=torch.ones(1, 1)).kl == 3


def test_an_empty_batch_has_no_kl():
    update = controller().update(KL, 1, mask=torch.zeros(3, 3))
    assert math.isnan(update.kl)
    assert not update.applied


@STEERED
@pytest.mark.parametrize("kl", [math.nan, math.inf, -math.inf])
def test_kl_that_is_not_finite_is_ignored_and_reported(steered, kl):
    control = steered()
    control.update(7.0, 256)
    before = control.value
    for update in (
        control.update(kl, 256),
        control.update(torch.full((1, 2), kl), 256, mask=torch.ones(1, 2)),
    ):
        assert not update.applied
        assert update.value == control.value == before
        assert not math.isfinite(update.kl)
    assert not FixedKLController(0.1).update(kl, 256).applied


@STEERED
def test_bounds_hold_and_can_be_left_again(steered):
    control = steered(
        min_coef=0.1, max_coef=0.5, **{"horizon": 100} if steered is controller else {}
    )
    values = [control.update(1e9, 256).value for _ in range(20)]
    assert values[-1] == max(values) == 0.5
    values = [control.update(0.0, 256).value for _ in range(20)]
    assert values[0] < 0.5
    assert values[-1] == min(values) == 0.1
    assert control.update(1e9, 256).value > 0.1


def test_error_clip_is_used():
    assert controller(error_clip=0.5).update(1e9, 256).error == 0.5


@STEERED
def test_resuming_goes_on_identically(steered):
    kls = [3.0, 9.0, 6.5, 0.1, 20.0, 6.0]
    straight = steered()
    values = [straight.update(kl, 256).value for kl in kls]
    for interrupted_after in range(len(kls) + 1):
        first, second = steered(), steered(init_kl_coef=0.9)
        resumed = [first.update(kl, 256).value for kl in kls[:interrupted_after]]
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        resumed += [second.update(kl, 256).value for kl in kls[interrupted_after:]]
        assert resumed == values


@pytest.mark.parametrize("number", [np.float64, np.float32, torch.tensor, lambda x: np.array(x)])
@pytest.mark.parametrize("make", [controller, threshold, pi, lambda: FixedKLController(0.2)])
def test_updates_in_numbers_of_any_kind_leave_pythons_own(make, number):
    """A coefficient of numpy's would end the next step of a trainer, and is no JSON."""
    ours, plain = make(), make()
    for kl in (3.0, 9.0, 6.5, 0.125, 20.0):
        found, expected = ours.update(number(kl), number(256)), plain.update(kl, 256)
        assert found == expected
        assert [type(x) for x in found] == [float, float, float, bool]
    state = ours.state_dict()
    assert json.loads(json.dumps(state, allow_nan=False)) == state == plain.state_dict()
    assert type(state["value"]) is type(ours.value) is float


@pytest.mark.parametrize("number", [np.float64, np.float32, torch.tensor, lambda x: np.array(x)])
def test_settings_in_numbers_of_any_kind_are_kept_as_pythons_own(number):
    bounds = {"min_coef": number(0.125), "max_coef": number(0.5)}
    start = number(0.25), number(6.0)
    made = [
        AdaptiveKLController(
            *start, number(512.0), unit="token_mean", error_clip=number(0.25), **bounds
        ),
        ThresholdKLController(
            *start,
            unit="token_mean",
            tolerance=number(2.0),
            raise_by=number(1.5),
            lower_by=number(0.5),
            **bounds,
        ),
        PIKLController(
            *start,
            unit="token_mean",
            gain=number(0.25),
            lag=number(4.0),
            error_clip=number(0.5),
            **bounds,
        ),
        FixedKLController(number(0.25)),
    ]
    for control in made:
        control.update(9.0, 64)
        numbers = [v for v in vars(control).values() if not isinstance(v, str)]
        assert {type(n) for n in numbers} == {float}


ALL = {
    "AdaptiveKLController": controller,
    "ThresholdKLController": threshold,
    "PIKLController": pi,
    "FixedKLController": lambda: FixedKLController(0.2),
}


@pytest.mark.parametrize("owner", ALL)
@pytest.mark.parametrize("other", ALL)
def test_the_state_of_another_controller_is_refused_by_name(owner, other):
    control = ALL[owner]()
    state = ALL[other]().state_dict()
    if owner == other:
        control.load_state_dict(state)
    else:
        with pytest.raises(ValueError, match=f"state is of {other}; .* of a {owner} returned"):
            control.load_state_dict(state)


@pytest.mark.parametrize("make", ALL.values())
@pytest.mark.parametrize("state", [{}, {"value": 0.3}, None, 0.3, [0.3]])
def test_a_state_of_nobody_is_refused(make, state):
    control = make()
    with pytest.raises(ValueError, match="state is of "):
        control.load_state_dict(state)
    assert control.value == 0.2


@pytest.mark.parametrize("make", ALL.values())
def test_a_state_without_a_part_is_refused(make):
    control = make()
    for part in control.state_dict():
        state = control.state_dict()
        del state[part]
        with pytest.raises(ValueError, match="state"):
            control.load_state_dict(state)


def test_a_refused_state_changes_nothing():
    control = pi()
    control.update(9.0, 64)
    before = control.state_dict()
    with pytest.raises(TypeError, match="previous_error is 'none'"):
        control.load_state_dict(before | {"value": 0.4, "previous_error": "none"})
    assert control.state_dict() == before


def test_the_mask_comes_third_by_position_or_by_name():
    for make in ALL.values():
        assert make().update(KL, 64, MASK) == make().update(KL, 64, mask=MASK)
        with pytest.raises(TypeError, match=r"n_steps is of shape \(3, 3\)"):
            make().update(KL, MASK)


@STEERED
def test_a_loaded_coefficient_keeps_to_the_bounds(steered):
    control = steered(max_coef=0.3)
    saved = control.state_dict()
    control.load_state_dict(saved | {"value": 0.7})
    assert control.value == 0.3
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="value is"):
            control.load_state_dict(saved | {"value": bad})
    with pytest.raises(TypeError, match="value is 'high'"):
        control.load_state_dict(saved | {"value": "high"})
    assert control.value == 0.3


def test_a_fixed_coefficient_stays():
    control = FixedKLController(0.05)
    update = control.update(KL, 256, mask=MASK)
    assert update.value == control.value == 0.05
    assert update.error == 0
    assert update.applied
    control.load_state_dict(FixedKLController(0.3).state_dict())
    assert control.value == 0.05
    assert FixedKLController(0.0).value == 0


@STEERED
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_kl_coef": 0.0}, "init_kl_coef is 0"),
        ({"init_kl_coef": -0.1}, "init_kl_coef is -0.1"),
        ({"target": 0.0}, "target is 0"),
        ({"target": -6.0}, "target is -6"),
        ({"target": math.nan}, "target is nan"),
        ({"unit": "nats"}, "unit is 'nats'"),
        ({"min_coef": 0.0}, "min_coef is 0"),
        ({"min_coef": 0.1, "max_coef": 0.05}, "max_coef is 0.05"),
        ({"max_coef": 0.1}, "init_kl_coef is 0.2"),
        ({"min_coef": 0.3}, "init_kl_coef is 0.2"),
    ],
)
def test_settings_that_cannot_work_are_refused(steered, options, message):
    with pytest.raises(ValueError, match=message):
        steered(**options)


@pytest.mark.parametrize(
    ("steered", "options", "message"),
    [
        (controller, {"horizon": 0}, "horizon is 0"),
        (controller, {"horizon": -1}, "horizon is -1"),
        (controller, {"error_clip": 0.0}, "error_clip is 0"),
        (threshold, {"tolerance": 1.0}, "tolerance is 1"),
        (threshold, {"tolerance": math.nan}, "tolerance is nan"),
        (threshold, {"raise_by": 0.5}, "raise_by is 0.5"),
        (threshold, {"raise_by": math.inf}, "raise_by is inf"),
        (threshold, {"lower_by": 0.0}, "lower_by is 0"),
        (threshold, {"lower_by": 1.0}, "lower_by is 1"),
        (pi, {"gain": 0.0}, "gain is 0"),
        (pi, {"lag": -1.0}, "lag is -1"),
        (pi, {"error_clip": math.nan}, "error_clip is nan"),
    ],
)
def test_settings_of_one_controller_that_cannot_work_are_refused(steered, options, message):
    with pytest.raises(ValueError, match=message):
        steered(**options)


@pytest.mark.parametrize(
    ("kl", "ppo", "rllib"),
    [
        (1.49, 1.0, 1.0),
        (1.51, 2.0, 1.0),
        (1.99, 2.0, 1.0),
        (2.01, 2.0, 1.5),
        (0.68, 1.0, 1.0),
        (0.66, 0.5, 1.0),
        (0.51, 0.5, 1.0),
        (0.49, 0.5, 0.5),
        (-1.0, 0.5, 0.5),
    ],
)
def test_the_threshold_rules_of_ppo_and_rllib(kl, ppo, rllib):
    control = threshold(target=1.0)
    assert control.update(kl, 64).value == 0.2 * ppo
    control = threshold(target=1.0, tolerance=2.0, raise_by=1.5, lower_by=0.5)
    assert control.update(kl, 64).value == pytest.approx(0.2 * rllib, rel=1e-15)


def test_the_pi_controller_is_a_sum_over_all_errors_so_far():
    """The position form: log value = log start + gain (sum of errors) + gain lag (last - first)."""
    kls = [6.0, 9.0, 15.0, 100.0, 3.0, 0.1, 0.0, -2.0, 6.5]
    errors = [min(max(math.log(kl / 6) if kl > 0 else -math.inf, -1), 1) for kl in kls]
    control = pi(gain=0.15, lag=4.0, error_clip=1.0)
    for n, kl in enumerate(kls, 1):
        update = control.update(kl, 64)
        exponent = 0.15 * (sum(errors[:n]) + 4.0 * (errors[n - 1] - errors[0]))
        assert update.error == errors[n - 1]
        assert update.value == pytest.approx(0.2 * math.exp(exponent), rel=1e-12)


def test_the_pi_controller_has_the_documented_defaults():
    settings = {"init_kl_coef": 0.2, "target": 6.0, "unit": "sequence_sum"}
    one, other = PIKLController(**settings), PIKLController(**settings, gain=0.2, lag=8.0)
    for kl in (7.0, 20.0, 6.1):
        assert one.update(kl, 64) == other.update(kl, 64)


def test_at_a_bound_the_pi_controller_does_not_wind_up():
    control = pi(max_coef=0.3)
    for _ in range(100):
        control.update(60.0, 64)
    assert control.value == 0.3
    assert control.update(6.0, 64).value < 0.3, "the very next update must act"


def test_the_unit_has_to_be_stated():
    for make in (
        lambda: AdaptiveKLController(0.2, 6.0, 10000),
        lambda: ThresholdKLController(0.2, 6.0),
        lambda: PIKLController(0.2, 6.0),
    ):
        with pytest.raises(TypeError, match="unit"):
            make()


@pytest.mark.parametrize("kl_coef", [-0.1, math.nan, math.inf])
def test_a_fixed_coefficient_has_to_be_a_number_from_0(kl_coef):
    with pytest.raises(ValueError, match="kl_coef is"):
        FixedKLController(kl_coef)


def test_updates_that_cannot_work_are_refused():
    control = controller(horizon=50)
    with pytest.raises(ValueError, match="horizon 50"):
        control.update(1.0, 256)  # 1 - 0.2 * 256 / 50 is negative
    for n_steps in (0, -1):
        with pytest.raises(ValueError, match="n_steps is"):
            control.update(1.0, n_steps)
    with pytest.raises(ValueError, match="needs a mask"):
        control.update(KL, 1)
    with pytest.raises(ValueError, match="single number"):
        control.update(3.0, 1, mask=MASK)
    with pytest.raises(ValueError, match="mask has shape"):
        control.update(KL, 1, mask=MASK[:2])
    with pytest.raises(ValueError, match="kl has shape"):
        control.update(KL[0], 1, mask=MASK[0])
    assert control.value == 0.2


def test_a_kl_that_is_too_small_to_be_divided_by_the_target_counts_as_none():
    tiny, none = (PIKLController(0.1, 6.0, unit="sequence_sum") for _ in range(2))
    assert tiny.update(5e-324, 1) == none.update(0.0, 1)._replace(kl=5e-324)


def test_updates_report_what_they_saw():
    threshold = ThresholdKLController(0.1, 6.0, unit="sequence_sum")
    assert threshold.update(9.0, 64) == (9.0, 0.1, 0.5, True)  # at the band's end: still inside
    assert threshold.update(4.0, 64) == (4.0, 0.1, 4.0 / 6.0 - 1, True)
    assert threshold.update(float("nan"), 64)[1:] == (0.1, 0.0, False)
    assert FixedKLController(0.3).state_dict() == {"class": "FixedKLController", "value": 0.3}


def test_bounds_may_be_equal_and_the_start_at_them():
    assert PIKLController(0.1, 6.0, unit="sequence_sum", min_coef=0.1, max_coef=0.1)
    with pytest.raises(ValueError, match="horizon"):
        AdaptiveKLController(0.1, 6.0, 100.0, unit="token_mean").update(1.0, 500)
