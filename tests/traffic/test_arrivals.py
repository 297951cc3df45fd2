"""Arrival processes against their own theory; seeds are fixed, so the bounds hold or fail for good."""

import math

import numpy as np
import pytest

from simulator.traffic.arrivals import Closed, Constant, Gamma, Offline, Poisson, times_within_s

N = 100_000
KS_BOUND = 1.95 / math.sqrt(N)
"""Kolmogorov's critical distance at the 0.1 % level."""


def gaps_of(process, seed=3):
    return np.diff(process.times_s(seed, N), prepend=0.0)


def ks_distance(values, cdf):
    values = np.sort(values)
    steps = np.arange(len(values) + 1) / len(values)
    expected = np.array([cdf(v) for v in values])
    return max(np.max(steps[1:] - expected), np.max(expected - steps[:-1]))


@pytest.mark.parametrize(
    ("process", "cdf"),
    [
        (Poisson(rate_per_s=4), lambda x: 1 - math.exp(-4 * x)),
        # Gamma with shape k and mean 1/4 has scale 1/(4k); the incomplete gamma function is elementary for these k.
        (Gamma(rate_per_s=4, burstiness=1), lambda x: 1 - math.exp(-4 * x)),
        (Gamma(rate_per_s=4, burstiness=0.5), lambda x: math.erf(math.sqrt(max(2 * x, 0)))),
        (Gamma(rate_per_s=4, burstiness=2), lambda x: 1 - math.exp(-8 * x) * (1 + 8 * x)),
    ],
)
def test_gaps_follow_their_law(process, cdf):
    assert ks_distance(gaps_of(process), cdf) < KS_BOUND


def test_the_bound_can_fail():
    assert ks_distance(gaps_of(Poisson(rate_per_s=4.1)), lambda x: 1 - math.exp(-4 * x)) > KS_BOUND


@pytest.mark.parametrize("burstiness", [0.05, 0.25, 1.0, 4.0])
def test_burstiness_is_the_gamma_shape_as_in_vllm(burstiness):
    gaps = gaps_of(Gamma(rate_per_s=10, burstiness=burstiness))
    cv = 1 / math.sqrt(burstiness)
    # Standard error of the mean is cv/√n; that of the sample cv of a gamma law is about cv²·√(2 + 2/cv²)/(2√n).
    assert gaps.mean() == pytest.approx(0.1, rel=4 * cv / math.sqrt(N))
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=4 * (1 + cv) / math.sqrt(N))
    # cv⁻² is burstiness up to rounding, so cv names the same law.
    assert Gamma(rate_per_s=10, cv=cv).shape == pytest.approx(burstiness, rel=1e-12)


def test_poisson_counts_have_variance_equal_to_mean_and_gaps_no_memory():
    times = Poisson(rate_per_s=4).times_s(5, N)
    counts = np.bincount(times.astype(int))[:-1]
    assert counts.var() / counts.mean() == pytest.approx(1, abs=4 * math.sqrt(2 / len(counts)))
    gaps = np.diff(times)
    assert abs(np.corrcoef(gaps[1:], gaps[:-1])[0, 1]) < 4 / math.sqrt(N)


def test_constant_is_constant_and_offline_is_at_once():
    assert Constant(rate_per_s=4).times_s(0, 3).tolist() == [0, 0.25, 0.5]
    assert Offline().times_s(0, 3).tolist() == [0, 0, 0]


def test_the_closed_loop_starts_at_once_and_thinks_as_told():
    think = Closed(concurrency=8, think_s=2, think_cv=1).times_s(1, N)
    assert not think[:8].any()
    assert (think[8:] > 0).all()
    assert ks_distance(think[8:], lambda x: 1 - math.exp(-x / 2)) < KS_BOUND
    assert set(Closed(concurrency=8, think_s=2).times_s(1, 100)[8:]) == {2.0}
    assert not Closed(concurrency=8).times_s(1, 100).any()
    narrow = Closed(concurrency=8, think_s=2, think_cv=0.5).times_s(1, N)[8:]
    assert narrow.mean() == pytest.approx(2, rel=0.01)
    assert narrow.std() / narrow.mean() == pytest.approx(0.5, rel=0.01)


@pytest.mark.parametrize(
    "process", [Poisson(rate_per_s=7), Gamma(rate_per_s=7, burstiness=0.01), Constant(rate_per_s=7)]
)
def test_a_duration_gives_all_arrivals_before_it_and_no_other(process):
    within = times_within_s(process, 2, 1000.0)
    more = process.times_s(2, len(within) + 1)
    assert np.array_equal(more[:-1], within)
    assert within[-1] < 1000 <= more[-1]


def test_the_number_of_poisson_arrivals_in_a_duration_is_poisson():
    counts = np.array([len(times_within_s(Poisson(rate_per_s=5), seed, 20.0)) for seed in range(400)])
    assert counts.mean() == pytest.approx(100, abs=4 * 10 / math.sqrt(400))
    assert counts.var(ddof=1) == pytest.approx(100, rel=4 * math.sqrt(2 / 400))
