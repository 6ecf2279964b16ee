"""`bench.cpu.growth` recovers slopes, and `bench.common.bootstrap` intervals, that are known."""

import importlib

import numpy as np
import pytest


@pytest.fixture
def growth(monkeypatch, request):
    monkeypatch.syspath_prepend(request.config.rootpath)
    return importlib.import_module("bench.cpu.growth")


@pytest.fixture
def interval(monkeypatch, request):
    monkeypatch.syspath_prepend(request.config.rootpath)
    return importlib.import_module("bench.common.bootstrap").interval


SIZES = [2**i for i in range(10)]


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_the_slope_is_the_exponent(growth, exponent):
    seconds = 3e-6 * np.array(SIZES, float) ** exponent
    assert growth.log_slope(SIZES, seconds) == pytest.approx(exponent, abs=1e-12)


def test_a_line_is_recovered(growth):
    seconds = 2e-5 + 3e-6 * np.array(SIZES, float)
    assert growth.line(SIZES, seconds) == pytest.approx((2e-5, 3e-6))


def test_sizes_at_which_the_fixed_cost_matters_are_not_fitted(growth):
    # The fixed cost is 9 units': a tenth of the time at 81 units, less from 128 on.
    seconds = 1e-6 * (9 + np.array(SIZES, float))
    assert SIZES[growth.first_of_growth(SIZES, seconds)] == 128
    found = growth.growth(SIZES, np.stack([seconds, 1.01 * seconds, seconds]))
    assert found["fitted_from"] == 128
    assert found["fixed_ms"] == pytest.approx(9e-3)
    assert 0.95 < found["slope"] < 1
    assert found["slope_low"] <= found["slope"] <= found["slope_high"]
    # A fit from the first size on would be dominated by the fixed cost.
    assert growth.log_slope(SIZES, seconds) < 0.75


def test_a_fit_keeps_its_fewest_sizes(growth):
    # Constant times: the fixed cost alone.
    assert growth.first_of_growth(SIZES, np.full(len(SIZES), 1e-3)) == len(SIZES) - growth.FEWEST


def test_intervals_cover_a_known_median(interval):
    generator = np.random.default_rng(1)
    samples = generator.normal(5.0, 1.0, size=(200, 41))
    found = [interval(rounds, lambda r: float(np.median(r))) for rounds in samples]
    covered = np.mean([low <= 5.0 <= high for low, high in found])
    assert 0.90 <= covered <= 0.99  # 95 % +- 3 standard errors, a percentile's small bias included


def test_an_interval_draws_rounds_whole(interval):
    """Noise that both columns share does not widen the interval of their ratio."""
    shared = np.random.default_rng(2).lognormal(size=30)
    low, high = interval(np.stack([shared, 2 * shared], 1), lambda r: float((r[:, 1] / r[:, 0])[0]))
    assert (low, high) == pytest.approx((2, 2))


def test_one_round_has_no_interval(interval):
    with pytest.raises(ValueError, match="rounds has 1; a bootstrap needs at least 2"):
        interval(np.ones((1, 2)), np.mean)
