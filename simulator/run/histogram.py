"""Samples too large to keep: exact sums and log-binned histograms that give the same whatever the order or the split.

A value's bin is read off its float: 256 bins of equal width per factor of two, so all values of a bin are within 0.4 % of each
other. A quantile is interpolated inside its bin as if the values there were spread evenly. Counts are integers and sums are
kept in fixed point, so adding parts in any order, or merging what several replicas counted, gives the same bits.
"""

import math

import numpy as np
from numpy.typing import NDArray

from simulator.results.summary import Distribution, Estimate
from simulator.run.statistics import (
    BATCHES,
    PERCENTILES,
    half_width_of_means,
    mean_estimate,
    quantile_estimate,
)

BINS_PER_OCTAVE = 256
MIN_EXPONENT, MAX_EXPONENT = -27, 20
"""Smaller values count as 0, larger ones (12 days) as the largest."""
BINS = (MAX_EXPONENT - MIN_EXPONENT) * BINS_PER_OCTAVE

_FRACTION_BITS = 40
_MANTISSA_SHIFT = 52 - 8
_ORIGIN = (1023 + MIN_EXPONENT) * BINS_PER_OCTAVE


def fixed_sum(values: NDArray[np.float64]) -> int:
    """Sum of finite values, each rounded to 2**-40 (1e-12): an integer in that unit, the same in every order.

    >>> fixed_sum(np.array([0.5, 1e6, -0.25])) == 1_000_000 * 2**40 + 2**38
    True
    """
    whole = np.floor(values)
    rest = np.rint((values - whole) * 2.0**_FRACTION_BITS)
    return (int(whole.astype(np.int64).sum()) << _FRACTION_BITS) + int(rest.astype(np.int64).sum())


def as_float(total: int) -> float:
    """A :func:`fixed_sum` in the unit of its values."""
    return float(total / 2**_FRACTION_BITS)


def bins_of(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Bin of each value: those below 2**-27 (zero among them) in the first, those above 2**20 in the last."""
    raw = np.ascontiguousarray(values, dtype=np.float64).view(np.int64) >> _MANTISSA_SHIFT
    return np.asarray(np.clip(raw - _ORIGIN, 0, BINS - 1))


def value_in_bin(index: int, share: float) -> float:
    """Value a ``share`` of the way through a bin; the first one stands for 0."""
    if index == 0:
        return 0.0
    octave, part = divmod(index, BINS_PER_OCTAVE)
    return math.ldexp(1 + (part + share) / BINS_PER_OCTAVE, octave + MIN_EXPONENT)


class LogHistogram:
    """A sample in :data:`BATCHES` batches, as counts per bin and exact sums.

    Negative values count as 0; a NaN is a fault of the caller.
    """

    def __init__(self) -> None:
        self.counts = np.zeros((BATCHES, BINS), dtype=np.int64)
        self.sums = [0] * BATCHES

    def add(self, values: NDArray[np.float64], batch: NDArray[np.int64]) -> None:
        """Count ``values`` [n], value i in batch ``batch[i]``."""
        if len(values) == 0:
            return
        values = np.maximum(values, 0.0)
        low, high = int(batch.min()), int(batch.max()) + 1
        index = (batch - low) * BINS + bins_of(values)
        self.counts[low:high] += np.bincount(index, minlength=(high - low) * BINS).reshape(-1, BINS)
        for b in range(low, high):
            self.sums[b] += fixed_sum(values[batch == b] if high - low > 1 else values)

    def merge(self, other: "LogHistogram") -> None:
        """Add another sample of the same batches."""
        self.counts += other.counts
        self.sums = [a + b for a, b in zip(self.sums, other.sums, strict=True)]

    @property
    def n(self) -> int:
        """Values counted."""
        return int(self.counts.sum())

    @property
    def total(self) -> float:
        """Sum of all values."""
        return as_float(sum(self.sums))

    def batch_means(self) -> NDArray[np.float64] | None:
        """Mean of each batch; None if one is empty."""
        sizes = self.counts.sum(axis=1)
        if not sizes.all():
            return None
        return np.asarray(np.array([as_float(total) for total in self.sums]) / sizes)

    def quantile(self, p: float) -> float:
        """Smallest value with at least a share ``p`` at or below it, within 0.4 %."""
        index, share = self._place(p)
        return value_in_bin(index, share)

    def _place(self, p: float) -> tuple[int, float]:
        """Bin of a quantile, and how far into its values."""
        n = self.n
        rank = min(max(math.ceil(p * n * (1 - 1e-15)), 1), n)
        upto = np.cumsum(self.counts.sum(axis=0))
        index = int(np.searchsorted(upto, rank))
        before = int(upto[index - 1]) if index else 0
        return index, (rank - before - 0.5) / (int(upto[index]) - before)

    def distribution(self, scale: float = 1.0) -> Distribution:
        """Mean and percentiles with batch-means intervals, as :func:`simulator.run.statistics.distribution` gives them.

        All of them are multiplied by ``scale``.
        """
        n = self.n
        means = self.batch_means()
        if means is not None:
            means *= scale

        def at(p: float) -> Estimate:
            if n == 0:
                return Estimate(value=None, reason="no values")

            def half() -> float:
                index, share = self._place(p)
                below = self.counts[:, :index].sum(axis=1) + share * self.counts[:, index]
                return half_width_of_means(below / self.counts.sum(axis=1))

            def quantile(share: float) -> float:
                return scale * self.quantile(share)

            if means is None:
                return Estimate(value=quantile(p), reason="a batch is empty")
            return quantile_estimate(n, p, quantile, half)

        mean = mean_estimate(n, scale * self.total / n if n else None, means)
        return Distribution(n=n, mean=mean, **{name: at(p) for name, p in PERCENTILES.items()})
