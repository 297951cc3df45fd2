"""When requests arrive: what a scenario may say, and the times it means.

An open-loop process turns gaps into times by a running sum, so the first n times are the same however many are
asked for, and in however many blocks: ``block_s`` hands the sum from one to the next. Gaps come from the cause ``arrival``, think times from ``think``; see :mod:`simulator.randomness`.
"""

import math
from abc import ABC, abstractmethod
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from simulator import randomness
from simulator.catalog.records import Record
from simulator.traffic.tagged import tagged

Rate = Annotated[float, Field(gt=0)]

#: Beyond these a gamma law is a constant, or a few huge values, for every purpose here.
Burstiness = Annotated[float, Field(ge=1e-4, le=1e4)]
Cv = Annotated[float, Field(ge=0.01, le=100)]


class _Process(Record, ABC):
    """What every process can do."""

    @abstractmethod
    def block_s(self, seed: int, start: int, stop: int, carry: float) -> tuple[NDArray[np.float64], float]:
        """Times of requests ``start`` … ``stop`` − 1, and what the next block has to know: its ``carry``. [s]

        ``carry`` is 0 for the first block and otherwise what the block before gave.
        """

    def times_s(self, seed: int, n: int) -> NDArray[np.float64]:
        """Times of the first ``n`` requests: arrivals, or in a closed loop think times. [s]"""
        return self.block_s(seed, 0, n, 0.0)[0]


def _running_sum(gaps: NDArray[np.float64], carry: float) -> tuple[NDArray[np.float64], float]:
    """Sums of all gaps so far, in the order of one long sum, so that they are equal to the last bit."""
    if len(gaps) == 0:
        return gaps, carry
    gaps[0] += carry
    sums = np.cumsum(gaps)
    return sums, float(sums[-1])


class Poisson(_Process):
    """Independent exponential gaps of mean 1/``rate_per_s``, the first one before the first request."""

    process: Literal["poisson"] = "poisson"
    rate_per_s: Rate

    def block_s(self, seed: int, start: int, stop: int, carry: float) -> tuple[NDArray[np.float64], float]:
        """Arrival times; the carry is the sum of the gaps in units of their mean."""
        gaps = randomness.draw(seed, "arrival", start, stop, lambda rng, size: rng.standard_exponential(size))
        sums, carry = _running_sum(gaps, carry)
        return sums / self.rate_per_s, carry


class Gamma(_Process):
    """Independent gamma gaps of mean 1/``rate_per_s``: vLLM's ``--burstiness``.

    ``burstiness`` is the *shape* of the gamma law: 1 is Poisson, below 1 is burstier, above 1 is more even. It gives gaps
    a coefficient of variation ``cv`` = 1/√burstiness; state one of the two. vLLM's benchmark also stretches the
    times so that the last one falls on n/rate; here they are left as drawn.
    """

    process: Literal["gamma"] = "gamma"
    rate_per_s: Rate
    burstiness: Burstiness | None = None
    cv: Cv | None = None

    @model_validator(mode="after")
    def _one_width(self) -> "Gamma":
        if (self.burstiness is None) == (self.cv is None):
            raise ValueError("state exactly one of burstiness (the gamma shape, 1 = Poisson) and cv (= 1/√burstiness)")
        return self

    @property
    def shape(self) -> float:
        """Shape of the gamma law of the gaps.

        >>> Gamma(rate_per_s=4, cv=2).shape
        0.25
        """
        return self.burstiness if self.burstiness is not None else (self.cv or 1.0) ** -2

    def block_s(self, seed: int, start: int, stop: int, carry: float) -> tuple[NDArray[np.float64], float]:
        """Arrival times; the carry is the sum of the gaps in units of mean/shape."""
        shape = self.shape
        gaps = randomness.draw(seed, "arrival", start, stop, lambda rng, size: rng.standard_gamma(shape, size))
        sums, carry = _running_sum(gaps, carry)
        return sums / (shape * self.rate_per_s), carry


class Constant(_Process):
    """Request i at i/``rate_per_s``; the first at 0."""

    process: Literal["constant"] = "constant"
    rate_per_s: Rate

    def block_s(self, seed: int, start: int, stop: int, carry: float) -> tuple[NDArray[np.float64], float]:
        """Arrival times; nothing is carried."""
        del seed
        return np.arange(start, stop) / self.rate_per_s, carry


class Offline(_Process):
    """Everything is there at time 0."""

    process: Literal["offline"] = "offline"

    def block_s(self, seed: int, start: int, stop: int, carry: float) -> tuple[NDArray[np.float64], float]:
        """Arrival times; nothing is carried."""
        del seed
        return np.zeros(stop - start), carry


class Closed(_Process):
    """``concurrency`` clients, each with one request in flight; all start at time 0.

    A client sends its next request ``think_s`` after its last one finished. Think times are gamma distributed with
    coefficient of variation ``think_cv``: 0 is constant, 1 exponential.
    """

    process: Literal["closed"] = "closed"
    concurrency: Annotated[int, Field(ge=1)]
    think_s: Annotated[float, Field(ge=0)] = 0.0
    think_cv: Annotated[float, Field(ge=0, le=100)] = 0.0

    @model_validator(mode="after")
    def _think_law_exists(self) -> "Closed":
        if 0 < self.think_cv < 0.01:
            raise ValueError(f"think_cv = {self.think_cv:g}: must be 0 (constant) or 0.01 … 100")
        return self

    def block_s(self, seed: int, start: int, stop: int, carry: float) -> tuple[NDArray[np.float64], float]:
        """Think times before each request; 0 for the first ``concurrency``. Nothing is carried."""
        if self.think_s == 0 or self.think_cv == 0:
            think = np.full(stop - start, self.think_s)
        else:
            shape = self.think_cv**-2
            think = randomness.draw(seed, "think", start, stop, lambda rng, size: rng.standard_gamma(shape, size))
            think *= self.think_s / shape
        think[: max(self.concurrency - start, 0)] = 0
        return think, carry


class TraceTimes(Record):
    """The times of the trace, ``rate_scale`` times as fast (2: twice the rate, half the duration)."""

    process: Literal["trace"] = "trace"
    rate_scale: Annotated[float, Field(gt=0)] = 1.0


Arrival = Annotated[
    Poisson | Gamma | Constant | Offline | Closed | TraceTimes,
    tagged(
        "process",
        {
            "poisson": Poisson,
            "gamma": Gamma,
            "constant": Constant,
            "offline": Offline,
            "closed": Closed,
            "trace": TraceTimes,
        },
    ),
]


def times_within_s(process: Poisson | Gamma | Constant, seed: int, duration_s: float) -> NDArray[np.float64]:
    """All arrival times in [0, ``duration_s``). [s]

    >>> times_within_s(Constant(rate_per_s=2), 0, 1.5).tolist()
    [0.0, 0.5, 1.0]
    """
    expected = process.rate_per_s * duration_s
    n = math.ceil(expected + 6 * math.sqrt(expected)) + 1
    while True:
        times = process.times_s(seed, n)
        if times[-1] >= duration_s:
            return times[: np.searchsorted(times, duration_s, side="left")]
        n *= 2
