"""Intervals for correlated samples, and the test for a growing backlog. Numpy only.

Latencies of neighbouring requests are correlated, so the spread of one request's latency says little about the error
of a mean. Batch means do: the sample is cut, in order of arrival, into :data:`BATCHES` batches long enough to be nearly
independent, and the spread between them gives the interval [1]_.

.. [1] The method of batch means; A. M. Law, "Simulation Modeling and Analysis", chapter on output analysis of a single
   system.
"""

import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from simulator.results.summary import Distribution, Estimate

Array = NDArray[np.float64]

BATCHES = 20
PERCENTILES = {"p50": 0.50, "p90": 0.90, "p95": 0.95, "p99": 0.99}
LEVEL = 0.95
#: A percentile needs this many observations beyond it for an interval to mean anything.
MIN_BEYOND = 20
#: One-sided level of the backlog test: one in two hundred steady runs with a backlog would be called growing.
TREND_LEVEL = 0.005

# Two-sided 95 % points of Student's t for 1 … 30 degrees of freedom (any statistics table).
_T_95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def student_t_95(degrees_of_freedom: int) -> float:
    """Two-sided 95 % point of Student's t: tabulated to 30 degrees, the first two terms of its expansion beyond.

    >>> student_t_95(19), round(student_t_95(60), 3)
    (2.093, 2.0)
    """
    if degrees_of_freedom <= len(_T_95):
        return _T_95[degrees_of_freedom - 1]
    z = NormalDist().inv_cdf(0.975)
    return z + (z**3 + z) / (4 * degrees_of_freedom)


def quantile(ordered: Array, p: float) -> float:
    """Inverse of the empirical distribution: the smallest value with at least a share ``p`` at or below it.

    >>> quantile(np.array([1.0, 2.0, 3.0, 4.0]), 0.5)
    2.0
    """
    rank = math.ceil(p * len(ordered) * (1 - 1e-15))
    return float(ordered[min(max(rank, 1), len(ordered)) - 1])


def batch_means(values: Array) -> Array:
    """Means of :data:`BATCHES` consecutive batches of (nearly) equal size."""
    edges = np.linspace(0, len(values), BATCHES + 1).astype(np.int64)
    return np.asarray(np.add.reduceat(values, edges[:-1]) / np.diff(edges))


def half_width_of_means(means: Array) -> float:
    """Half width of the 95 % interval of the mean of batch means."""
    return student_t_95(BATCHES - 1) * float(means.std(ddof=1)) / math.sqrt(BATCHES)


def mean_estimate(n: int, mean: float | None, means: Array | None) -> Estimate:
    """Mean of ``n`` values with the interval that the means of its batches give (None: a batch is empty).

    The interval is refused for fewer than five values per batch.
    """
    if mean is None:
        return Estimate(value=None, reason="no values")
    if n < 5 * BATCHES:
        return Estimate(value=mean, reason=f"{n} values; an interval needs {5 * BATCHES}")
    if means is None:
        return Estimate(value=mean, reason="a batch is empty")
    half = half_width_of_means(means)
    return Estimate(value=mean, low=mean - half, high=mean + half)


def estimate_mean(values: Array) -> Estimate:
    """Mean of a sample in order of arrival, with its batch-means interval, see :func:`mean_estimate`."""
    n = len(values)
    return mean_estimate(n, float(values.mean()) if n else None, batch_means(values) if n >= BATCHES else None)


def quantile_estimate(
    n: int, p: float, quantile_at: Callable[[float], float], half_width: Callable[[], float]
) -> Estimate:
    """Quantile of ``n`` values, with a batch-means interval.

    Batch means of the indicator "at or below the quantile" give the error of the *probability* p there, correlation
    included (``half_width``); the sample's own quantiles at p ± that error are the interval's ends. (Quantiles of small
    batches would be biased for high p.) Refused when fewer than :data:`MIN_BEYOND` values are expected beyond the quantile.
    """
    if n == 0:
        return Estimate(value=None, reason="no values")
    value = quantile_at(p)
    if n * (1 - p) < MIN_BEYOND * (1 - 1e-12):
        return Estimate(value=value, reason=f"{n} values; an interval needs {math.ceil(MIN_BEYOND / (1 - p) - 1e-6)}")
    if n * p < MIN_BEYOND:
        return Estimate(value=value, reason=f"{n} values; an interval needs {math.ceil(MIN_BEYOND / p)}")
    half = half_width()
    low, high = p - half, p + half
    if high >= 1 or low <= 0:
        return Estimate(
            value=value,
            low=quantile_at(low) if low > 0 else None,
            high=quantile_at(high) if high < 1 else None,
            reason="values are too correlated: one end of the interval lies beyond the sample",
        )
    return Estimate(value=value, low=quantile_at(low), high=quantile_at(high))


def estimate_quantile(values: Array, ordered: Array, p: float) -> Estimate:
    """Quantile of a sample in order of arrival (``ordered``: the same, sorted), see :func:`quantile_estimate`."""

    def half_width() -> float:
        return half_width_of_means(batch_means((values <= quantile(ordered, p)).astype(np.float64)))

    return quantile_estimate(len(values), p, lambda share: quantile(ordered, share), half_width)


def distribution(values: Array) -> Distribution:
    """Mean and percentiles of a sample in order of arrival; NaN (undefined for a request) are left out."""
    values = values[~np.isnan(values)]
    ordered = np.sort(values)
    percentiles = {name: estimate_quantile(values, ordered, p) for name, p in PERCENTILES.items()}
    return Distribution(n=len(values), mean=estimate_mean(values), **percentiles)


def lag_one(values: Array) -> float | None:
    """Correlation between neighbouring batch means; None for a sample too small or constant.

    Near zero when batches are long enough. Above :data:`LAG_LIMIT` the intervals are too narrow.
    """
    values = values[~np.isnan(values)]
    if len(values) < 5 * BATCHES:
        return None
    return lag_one_of_means(batch_means(values))


def lag_one_of_means(means: Array) -> float | None:
    """Correlation between neighbours among batch means; None if they are all equal."""
    deviation = means - means.mean()
    variance = float((deviation**2).sum())
    return float((deviation[1:] * deviation[:-1]).sum() / variance) if variance > 0 else None


#: Two standard errors of a lag-one correlation of :data:`BATCHES` independent values.
LAG_LIMIT = 2 / math.sqrt(BATCHES)


def mann_kendall_p(values: Array) -> float | None:
    """One-sided p-value of the Mann–Kendall test for an upward trend, ties counted, normal approximation.

    None for fewer than eight values. Constant values have no trend: 1.

    >>> mann_kendall_p(np.arange(10.0)) < 1e-4
    True
    >>> mann_kendall_p(np.zeros(10))
    1.0

    References: H. B. Mann, Econometrica 13 (1945), doi:10.2307/1907187; variance with ties after M. G. Kendall.
    """
    n = len(values)
    if n < 8:
        return None
    signs = np.sign(values[None, :] - values[:, None])
    score = float(np.triu(signs, 1).sum())
    _, ties = np.unique(values, return_counts=True)
    variance = (n * (n - 1) * (2 * n + 5) - float((ties * (ties - 1) * (2 * ties + 5)).sum())) / 18
    if variance <= 0:
        return 1.0
    # Continuity correction: the score moves in steps of two.
    z = (score - math.copysign(min(1.0, abs(score)), score)) / math.sqrt(variance)
    return 1 - NormalDist().cdf(z)


def between_seeds(values: list[float]) -> tuple[float, float | None, float | None]:
    """Mean over independent replications, and the ends of its 95 % Student interval (None for one replication).

    >>> mean, low, high = between_seeds([1.0, 2.0, 3.0])
    >>> mean, round(low, 3), round(high, 3)
    (2.0, -0.484, 4.484)
    """
    array = np.array(values)
    mean = float(array.mean())
    if len(array) < 2:
        return mean, None, None
    half = student_t_95(len(array) - 1) * float(array.std(ddof=1)) / math.sqrt(len(array))
    return mean, mean - half, mean + half
