"""Each detector on series made for it: the changes it must report, and those it must not."""

import math

import numpy as np
import pytest
from series import alarms, ar1

from kl_kernels import KLMonitor
from kl_kernels.monitor import Limits
from kl_kernels.monitor.acceleration import WINDOW, Acceleration, fit_trend
from kl_kernels.monitor.detectors import Ceiling, EntropyCollapse, Jump, NegativeKL
from kl_kernels.monitor.level_shift import LevelShift
from kl_kernels.monitor.statistics import AR1Sums, fit_ar1, robust_location, shrunk_phi


def steps(detector, series):
    events = [detector.observe(t, float(x)) for t, x in enumerate(series)]
    return [event.step for event in events if event is not None]


def noise(n, level=5.0, sd=0.1, seed=0):
    return np.random.default_rng(seed).normal(level, sd, n)


def test_robust_location_ignores_outliers():
    middle, scale = robust_location([*noise(1001), 1e6, -1e6])
    assert middle == pytest.approx(5, abs=0.01)
    assert scale == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize("level", [0.0, 1e4])
def test_the_ar1_fit_is_that_of_deviations_from_the_mean(level):
    series = ar1(np.random.default_rng(0), 300, level=level)
    fit = fit_ar1(series.tolist())
    x = series - series.mean()
    phi = shrunk_phi(float(x[1:] @ x[:-1] / (x @ x)), 300)
    residuals = x[1:] - phi * x[:-1]
    assert fit.mean == pytest.approx(series.mean(), abs=1e-9)
    assert fit.phi == pytest.approx(phi, abs=1e-6)
    assert fit.sd == pytest.approx(math.sqrt(residuals @ residuals / 297), rel=1e-6)


def test_sums_in_pieces_are_sums_of_all():
    values = ar1(np.random.default_rng(1), 100).tolist()
    sums = AR1Sums()
    for value in values[:40]:
        sums.add(value)
    again = AR1Sums()
    again.load_state_dict(sums.state_dict())
    for value in values[40:]:
        again.add(value)
    assert again.fit() == fit_ar1(values)


def test_phi_errs_upwards_and_less_with_more_values():
    """Too small a phi takes slow noise for a shift."""
    for phi in (0.0, 0.3, 0.6):
        errors = [shrunk_phi(phi, n) - phi for n in (20, 100, 1000, 10**6)]
        assert errors == sorted(errors, reverse=True)
        assert 0 < errors[-1] < 1e-3
    assert shrunk_phi(2.0, 100) < 1
    assert shrunk_phi(-1.0, 1000) == 0


def jump(**options):
    return Jump("kl_jump", "KL", 6.0, "meaning", **options)


def test_a_jump_is_told_in_both_directions_unless_only_upwards_counts():
    for change in (2, -2):
        series = [*noise(64), 5 + change, *noise(20, 5 + change)]
        assert steps(jump(), series) == [64]
        assert steps(jump(upwards_only=True), series) == ([64] if change > 0 else [])


def test_without_enough_values_nothing_is_a_jump():
    assert steps(jump(), [*noise(15), 50]) == []
    assert steps(jump(), [*noise(16), 50]) == [16]


def test_a_change_of_a_constant_is_a_jump_and_its_rounding_is_not():
    assert steps(jump(), [0.0] * 20 + [1e-6]) == [20]
    assert steps(jump(), [1 / 3] * 20 + [1 / 3 + 1e-15] * 20) == []
    assert steps(jump(), [0.0] * 100) == []


def shift():
    return LevelShift("kl_drift", "KL", 7.9, 11.0, 6.0)


def test_a_small_lasting_shift_is_told_in_both_directions():
    for change in (0.3, -0.3):
        series = noise(150)
        series[100:] += change
        first = steps(shift(), series)[0]
        assert 100 <= first < 115


def test_one_outlier_is_no_shift():
    series = noise(150)
    series[100] += 100
    assert steps(shift(), series) == []


def test_an_outlier_while_calibrating_does_not_hide_a_shift():
    series = noise(150)
    series[3] += 100
    series[100:] += 0.5
    assert 100 <= steps(shift(), series)[0] < 110


def test_a_constant_has_no_shift_until_it_changes():
    assert steps(shift(), [1 / 3] * 100) == []
    assert steps(shift(), [0.0] * 100) == []
    assert steps(shift(), [2.0] * 50 + [2.1] * 10) == [52]  # one value might be an outlier


def test_the_statistic_is_the_log_likelihood_ratio_of_a_step():
    """Generalised least squares in float64 of a step in AR(1) noise around an estimated mean."""
    series = ar1(np.random.default_rng(3), 60)
    series[52:] += 0.2
    detector = shift()
    for t, value in enumerate(series):
        detector.observe(t, float(value))
    fit, n = detector.sums.fit(), detector.sums.n
    recent = np.array(detector.recent)
    assert n + len(recent) == 60
    whole = np.concatenate([series[n - 1 : n], recent]) - fit.mean
    residuals = np.clip((whole[1:] - fit.phi * whole[:-1]) / fit.sd, -3.5, 3.5)
    best = -math.inf
    for k in range(len(recent)):
        signature = np.full(len(recent) - k, 1 - fit.phi)  # a unit step, in the residuals
        signature[0] = 1
        s = signature @ residuals[k:]
        # The mean's error enters each of these residuals times -(1 - phi), and has variance
        # 1 / ((1 - phi)^2 n).
        variance = signature @ signature + signature.sum() ** 2 / n
        expected = 3 * signature @ signature
        ratio = (s**2 - (s - expected) ** 2) / (2 * variance)
        best = max(best, ratio)
    assert detector._log_likelihood_ratios()[0] == pytest.approx(best, rel=1e-12)


def test_a_ceiling_is_told_when_crossed_and_again_only_after_it_was_left():
    ceiling = Ceiling("kl_budget", "KL", 30.0, "meaning")
    assert steps(ceiling, [29, 30, 31, 40, 29.9, 31, 27, 29, 30.5, 31]) == [2, 8]


def negative():
    return NegativeKL(1.0, "sequence_sum", 6.0)


@pytest.mark.parametrize("sd", [0.01, 0.1, 0.3])
def test_sampling_noise_around_0_is_not_negative(sd):
    rng = np.random.default_rng(8)
    assert sum(len(steps(negative(), ar1(rng, 600, sd=sd, level=0.0))) for _ in range(20)) == 0


def test_a_negative_kl_is_told_at_once_where_noise_is_known_or_no_excuse():
    assert steps(negative(), [-5.0, -5.0, -5.0]) == [0]
    assert steps(negative(), [*noise(30, 2), -2.0]) == [30]
    assert steps(negative(), [*noise(30, 0), -0.9]) == []


@pytest.mark.parametrize(("mean", "sd", "before"), [(-2, 0.1, 20), (-0.5, 0.1, 30), (-1.5, 1, 70)])
def test_a_lastingly_negative_kl_is_told_once(mean, sd, before):
    found = steps(negative(), noise(200, mean, sd))
    assert len(found) == 1
    assert found[0] <= before


def test_a_kl_that_was_positive_again_can_be_told_again():
    found = steps(negative(), [*noise(40, -2), *noise(40, 2), *noise(40, -2)])
    assert len(found) == 2
    assert found[1] == 80


def test_arithmetic_below_0_is_not_told():
    """A KL of -0.01 nats per sequence is significant, and is rounding."""
    assert steps(negative(), noise(200, -0.01, 0.001)) == []


def collapse():
    return EntropyCollapse(0.5, 6.0)


def test_entropy_collapse_is_told_once_whether_fast_or_slow():
    assert steps(collapse(), [*noise(30, 2), *noise(30, 0.5)]) == [30]
    slow = steps(collapse(), noise(300, 2) * np.linspace(1, 0, 300))
    assert len(slow) == 1
    assert 120 < slow[0] < 180


def test_a_policy_that_sharpens_a_little_has_not_collapsed():
    assert steps(collapse(), noise(300, 2) * np.linspace(1, 0.6, 300)) == []


@pytest.mark.parametrize("level", [0.0, -1.0, 0.2])
def test_noise_is_no_collapse_at_any_level(level):
    assert steps(collapse(), noise(600, level)) == []


def hacking(detector, kl, reward):
    events = [detector.observe_both(t, *both) for t, both in enumerate(zip(kl, reward))]
    return [event.step for event in events if event is not None]


def test_a_trend_is_the_parabola_of_least_squares():
    values = ar1(np.random.default_rng(9), WINDOW) + np.linspace(0, 1, WINDOW) ** 2
    t = np.linspace(-1, 1, WINDOW)
    design = np.stack([np.ones(WINDOW), t, t * t], 1)
    r = values - design @ np.linalg.lstsq(design, values, rcond=None)[0]
    phi = shrunk_phi(float(r[1:] @ r[:-1] / (r @ r)), WINDOW)
    covariance = np.linalg.inv(design.T @ design) * (r @ r) / (WINDOW - 3) * (1 + phi) / (1 - phi)
    coefficients = np.linalg.lstsq(design, values, rcond=None)[0]
    trend = fit_trend(values.tolist())
    assert trend.slope == pytest.approx(coefficients[1] / math.sqrt(covariance[1, 1]))
    assert trend.curvature == pytest.approx(coefficients[2] / math.sqrt(covariance[2, 2]))
    assert trend.rises


def test_acceleration_needs_a_kl_that_curves_upwards_and_a_reward_that_rises():
    t = np.arange(150)
    late = np.maximum(t - 70, 0)
    kl, reward = noise(150) + 0.005 * late**2, noise(150, seed=1) + 0.05 * late
    assert hacking(Acceleration(4.0), kl, reward)[0] in range(80, 110)
    assert hacking(Acceleration(4.0), kl, noise(150, seed=1)) == []
    assert hacking(Acceleration(4.0), kl, -reward) == []
    assert hacking(Acceleration(4.0), noise(150) + 0.05 * t, reward) == []  # rises, at one speed
    assert hacking(Acceleration(4.0), 100 - kl, reward) == []
    falls_ever_slower = noise(150) + 0.005 * (170 - t) ** 2
    assert hacking(Acceleration(4.0), falls_ever_slower, reward) == []
    assert hacking(Acceleration(4.0), [0.0] * 150, [0.0] * 150) == []


def test_start_kl_counts_at_step_0_alone():
    kinds = [event.kind for event in KLMonitor().observe(0, kl=0.7)]
    assert kinds == ["start_kl"]
    assert KLMonitor().observe(0, kl=0.3) == []
    assert KLMonitor().observe(1, kl=0.7) == []
    assert [e.limit for e in KLMonitor(unit="token_mean").observe(0, kl=0.3)] == [0.01]
    assert KLMonitor(limits=Limits(start_kl=1.0)).observe(0, kl=0.7) == []


def test_ratio_and_gradient_norm_are_watched():
    monitor = KLMonitor()
    for t, norm in enumerate(noise(30, 1.0)):
        assert monitor.observe(t + 1, kl=5.0, ratio=1.2, grad_norm=float(norm)) == []
    events = monitor.observe(40, kl=5.0, ratio=11.0, grad_norm=30.0)
    assert {event.kind for event in events} == {"ratio_explosion", "grad_norm_jump"}
    assert monitor.observe(41, kl=5.0, ratio=0.1, grad_norm=0.0) == []


def test_the_budget_is_optional():
    assert [event.kind for event in KLMonitor(30.0).observe(1, kl=31.0)] == ["kl_budget"]
    assert KLMonitor().observe(1, kl=31.0) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [("jump", 0.0), ("drift", math.nan), ("entropy_left", 1.5), ("start_kl", -1.0), ("ratio", -2)],
)
def test_limits_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} is"):
        Limits(**{name: value})


def test_messages_say_what_was_seen():
    series = [*noise(64), 7.0]
    monitor = KLMonitor()
    event = next(e for t, x in enumerate(series) for e in monitor.observe(t + 1, kl=float(x)))
    assert (event.step, event.kind) == (65, "kl_jump")
    assert event.value > event.limit
    assert "from 5.0" in event.message
    assert "to 7" in event.message
    assert alarms(series) == [(64, "kl_jump")]
