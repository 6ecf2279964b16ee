"""Intervals, fits and outcomes, by hand."""

import numpy as np
import pytest
from synthetic import run

from kl_kernels.lab.study.fit import GaoFit, fit_gao
from kl_kernels.lab.study.outcomes import curves, outcome, table
from kl_kernels.lab.study.statistics import Interval, _variances, mean_interval, variance_ratio


def test_a_t_interval_by_hand():
    """Mean 2, standard deviation 1, two degrees of freedom: 2 +- 4.3027 / sqrt(3)."""
    interval = mean_interval([1.0, 2.0, 3.0])
    assert interval.mean == 2.0
    assert interval.high - 2 == pytest.approx(2.48414, abs=1e-5)
    assert 2 - interval.low == pytest.approx(2.48414, abs=1e-5)


def test_two_seeds_have_a_wide_interval_and_one_has_none():
    assert mean_interval([0.0, 2.0]).high == pytest.approx(1 + 12.7062, abs=1e-4)
    assert mean_interval([7.0]) == Interval(7.0, None, None)
    assert str(Interval(7.0, None, None)) == "7.00"
    assert str(Interval(20.0, 15.0, 25.0)) == "20.0 ± 5.00"


def test_resampled_variances_are_those_of_the_resampled_values():
    generator = np.random.default_rng(1)
    x = 1e4 + generator.normal(size=6)
    counts = generator.multinomial(6, np.full(6, 1 / 6), 20)
    expected = [np.var(np.repeat(x, count)) for count in counts]
    np.testing.assert_allclose(_variances(counts, x), expected, rtol=1e-9)


def test_a_variance_ratio_and_its_interval():
    x = np.random.default_rng(0).normal(size=500)
    exactly = variance_ratio(2 * x + 5, x)
    assert (exactly.mean, exactly.low, exactly.high) == pytest.approx((4, 4, 4))
    other = variance_ratio(np.random.default_rng(1).normal(size=500), x)
    # The log ratio of independent normals' variances has the variance 4 / n: about +- 18 %.
    assert other.low < other.mean < other.high
    assert np.log(other.high / other.low) == pytest.approx(2 * 1.96 * (4 / 500) ** 0.5, rel=0.2)


def test_without_spread_there_is_no_ratio():
    assert np.isnan(variance_ratio(np.arange(3.0), np.zeros(3)).mean)


@pytest.mark.parametrize(("alpha", "beta"), [(1.6, 0.7), (0.3, -0.2), (-0.5, 0.1)])
def test_a_fit_finds_the_constants(alpha, beta):
    kl = np.linspace(0, 200, 50)
    d = np.sqrt(kl)
    reward = alpha * d - beta * np.where(d > 0, d * np.log(np.maximum(d, 1e-300)), 0)
    fit = fit_gao(kl, reward)
    assert (fit.alpha, fit.beta, fit.r_squared) == pytest.approx((alpha, beta, 1))
    np.testing.assert_allclose(fit(d), reward, atol=1e-12)


def test_the_peak_is_where_the_form_is_highest():
    fit = GaoFit(1.6, 0.7, 1.0)
    d = np.linspace(0.01, 20, 100_001)
    assert fit.peak == pytest.approx(d[fit(d).argmax()], abs=2e-4)
    assert GaoFit(1.0, 0.0, 1.0).peak is None, "a straight line"
    assert GaoFit(1.0, -0.1, 1.0).peak is None
    assert GaoFit(100.0, 0.1, 1.0).peak is None, "beyond everything"


def test_r_squared_is_what_is_left_over_the_mean():
    kl, reward = np.array([0.0, 1.0, 4.0, 9.0]), np.array([0.0, 2.0, 1.0, 5.0])
    fit = fit_gao(kl, reward)
    residual = reward - fit(np.sqrt(kl))
    assert fit.r_squared == pytest.approx(1 - (residual**2).sum() / 14)  # mean 2: 4 + 0 + 1 + 9


def test_two_points_are_no_fit():
    with pytest.raises(ValueError, match="2 different values"):
        fit_gao(np.array([1.0, 1.0, 2.0]), np.zeros(3))


def test_an_outcome_by_hand():
    golds = [2, 3, 5, 4, 6, 5, 5, 0, 0, 1, 2, 2]
    records = [
        {
            "update": i + 1,
            "gold": gold,
            "kl": float(i),
            "proxy": 0.0,
            "kl_coef": 0.0,
            "entropy": 0.0,
            "length": 1.0,
        }
        for i, gold in enumerate(golds)
    ]
    found = outcome(records)
    assert found.gold_peak == 5.0  # the mean of updates 3 to 7
    assert (found.peak_update, found.peak_kl) == (5.0, 4.0)
    assert found.end["gold"] == 1.0
    assert found.gold_drop == 4.0
    assert found.start["gold"] == 2
    assert found.last_third_kl == 9.5
    assert found.last_third_kl_range == (8.0, 11.0)
    assert found.largest_kl == 11.0
    assert outcome(records[:2]).end["gold"] == 2.5, "a run shorter than the window"


def test_a_table_has_the_interval_of_each_column():
    outcomes = [outcome(run(gold_end=gold)) for gold in (3.0, 4.0, 5.0)]
    row = table({"0.1": outcomes})["0.1"]
    assert row["gold"]["mean"] == pytest.approx(4.0)
    assert row["gold"]["high"] == pytest.approx(4 + 2.48414, abs=1e-5)
    assert row["kl"]["mean"] == pytest.approx(20.0)


def test_curves_are_means_over_seeds_at_each_update():
    found = curves([run(gold_end=3.0), run(gold_end=5.0)])["gold"]
    assert found["mean"][0] == 2.0
    assert found["mean"][-1] == pytest.approx(4.0)
    assert found["seeds"][-1] == pytest.approx([3.0, 5.0])
    assert found["low"][-1] == pytest.approx(4 - 12.7062, abs=1e-4)
