"""Intervals must cover the truth as often as they say, and refuse where they cannot."""

import numpy as np
import pytest

from simulator.run import statistics
from simulator.run.statistics import (
    BATCHES,
    between_seeds,
    distribution,
    estimate_mean,
    estimate_quantile,
    lag_one,
    mann_kendall_p,
    student_t_95,
)


def autoregressive(rng, n, phi):
    """An AR(1) series with standard normal marginals."""
    noise = rng.standard_normal(n) * np.sqrt(1 - phi**2)
    x = np.empty(n)
    x[0] = rng.standard_normal()
    for i in range(1, n):
        x[i] = phi * x[i - 1] + noise[i]
    return x


@pytest.mark.parametrize("phi", [0.0, 0.9])
def test_intervals_cover_the_truth_about_95_percent_of_the_time(phi):
    rng = np.random.default_rng(1)
    truth = {"mean": 0.0, "p50": 0.0, "p90": 1.2815515655, "p99": 2.3263478740}
    hits = dict.fromkeys(truth, 0)
    trials = 200
    for _ in range(trials):
        found = distribution(autoregressive(rng, 4000, phi))
        for name, value in truth.items():
            estimate = getattr(found, name)
            hits[name] += (
                (estimate.low if estimate.low is not None else -np.inf)
                <= value
                <= (estimate.high if estimate.high is not None else np.inf)
            )
    # 95 % of 200 is 190 ± 3.1; batch quantiles of correlated data lose a few percent, never more than ten.
    for name, count in hits.items():
        assert count >= 0.87 * trials, (name, count)
    assert min(hits.values()) < trials  # an interval that always covers is too wide


def test_naive_intervals_would_fail_where_batch_means_do_not():
    rng = np.random.default_rng(2)
    series = autoregressive(rng, 4000, 0.9)
    naive = 1.96 * series.std(ddof=1) / np.sqrt(len(series))
    found = estimate_mean(series)
    assert found.high - found.low > 4 * naive


@pytest.mark.parametrize(
    ("n", "p", "given"), [(1999, 0.99, False), (2000, 0.99, True), (400, 0.95, True), (199, 0.9, False)]
)
def test_an_interval_needs_twenty_values_beyond_the_percentile(n, p, given):
    values = np.random.default_rng(3).standard_normal(n)
    found = estimate_quantile(values, np.sort(values), p)
    assert found.value is not None
    assert (found.low is not None) == given
    assert bool(found.reason) != given


def test_quantiles_are_inverses_of_the_empirical_distribution():
    values = np.arange(1.0, 101.0)
    found = distribution(values)
    assert (found.p50.value, found.p90.value, found.p95.value, found.p99.value) == (50, 90, 95, 99)
    assert distribution(np.array([])).p50.value is None
    assert distribution(np.array([np.nan, 2.0])).n == 1


def test_batches_that_are_too_short_are_noticed():
    rng = np.random.default_rng(4)
    assert abs(lag_one(rng.standard_normal(2000))) < statistics.LAG_LIMIT
    walks = [lag_one(np.cumsum(rng.standard_normal(2000))) for _ in range(50)]
    assert sum(value > statistics.LAG_LIMIT for value in walks) > 35
    assert lag_one(np.zeros(2000)) is None


def test_backlog_test_has_its_stated_level_and_finds_a_slow_trend():
    rng = np.random.default_rng(5)
    steady = [mann_kendall_p(rng.poisson(3.0, BATCHES).astype(float)) for _ in range(4000)]
    assert sum(p < 0.05 for p in steady) / 4000 == pytest.approx(0.05, abs=0.012)
    assert sum(p < statistics.TREND_LEVEL for p in steady) / 4000 < 0.01
    growing = [mann_kendall_p(rng.poisson(3.0 + np.arange(BATCHES) * 1.0).astype(float)) for _ in range(100)]
    assert sum(p < statistics.TREND_LEVEL for p in growing) > 90
    assert mann_kendall_p(-np.arange(20.0)) > 0.999
    assert mann_kendall_p(np.arange(7.0)) is None


@pytest.mark.parametrize(
    ("df", "published"), [(1, 12.706), (10, 2.228), (30, 2.042), (40, 2.021), (60, 2.000), (120, 1.980)]
)
def test_student_t_against_the_usual_table(df, published):
    assert student_t_95(df) == pytest.approx(published, abs=6e-3 if df > 30 else 1e-9)


def test_one_seed_has_no_interval_between_seeds():
    assert between_seeds([4.0]) == (4.0, None, None)
