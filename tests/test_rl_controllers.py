"""The KL controllers: formula, unit, bounds, resuming, and what they refuse."""

import math

import pytest
import torch

from kl_kernels import AdaptiveKLController, FixedKLController

KL = torch.tensor([[1.0, 2.0, torch.nan], [4.0, torch.nan, torch.nan], [torch.nan] * 3])
MASK = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]])


def controller(**options):
    arguments = {"init_kl_coef": 0.2, "target": 6.0, "horizon": 10000, "unit": "sequence_sum"}
    return AdaptiveKLController(**arguments | options)


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


def test_an_empty_batch_has_no_kl():
    update = controller().update(KL, 1, mask=torch.zeros(3, 3))
    assert update.kl == 0


@pytest.mark.parametrize("kl", [math.nan, math.inf, -math.inf])
def test_kl_that_is_not_finite_is_ignored_and_reported(kl):
    control = controller()
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


def test_bounds_hold_and_can_be_left_again():
    control = controller(horizon=100, min_coef=0.1, max_coef=0.5)
    values = [control.update(1e9, 256).value for _ in range(20)]
    assert values[-1] == max(values) == 0.5
    values = [control.update(0.0, 256).value for _ in range(20)]
    assert values[0] < 0.5
    assert values[-1] == min(values) == 0.1
    assert control.update(1e9, 256).value > 0.1


def test_error_clip_is_used():
    assert controller(error_clip=0.5).update(1e9, 256).error == 0.5


def test_resuming_goes_on_identically():
    kls = [3.0, 9.0, 6.5, 0.1, 20.0, 6.0]
    straight = controller()
    values = [straight.update(kl, 256).value for kl in kls]
    first, second = controller(), controller(init_kl_coef=0.9)
    resumed = [first.update(kl, 256).value for kl in kls[:3]]
    second.load_state_dict(first.state_dict())
    resumed += [second.update(kl, 256).value for kl in kls[3:]]
    assert resumed == values


def test_a_loaded_coefficient_keeps_to_the_bounds():
    control = controller(max_coef=0.3)
    control.load_state_dict({"value": 0.7})
    assert control.value == 0.3
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="value is"):
            control.load_state_dict({"value": bad})
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_kl_coef": 0.0}, "init_kl_coef is 0"),
        ({"init_kl_coef": -0.1}, "init_kl_coef is -0.1"),
        ({"target": 0.0}, "target is 0"),
        ({"target": -6.0}, "target is -6"),
        ({"target": math.nan}, "target is nan"),
        ({"horizon": 0}, "horizon is 0"),
        ({"horizon": -1}, "horizon is -1"),
        ({"unit": "nats"}, "unit is 'nats'"),
        ({"error_clip": 0.0}, "error_clip is 0"),
        ({"min_coef": 0.0}, "min_coef is 0"),
        ({"min_coef": 0.1, "max_coef": 0.05}, "max_coef is 0.05"),
        ({"max_coef": 0.1}, "init_kl_coef is 0.2"),
        ({"min_coef": 0.3}, "init_kl_coef is 0.2"),
    ],
)
def test_settings_that_cannot_work_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        controller(**options)


def test_the_unit_has_to_be_stated():
    with pytest.raises(TypeError, match="unit"):
        AdaptiveKLController(0.2, 6.0, 10000)


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
