"""How fast one replica can be fed before its users notice: the largest rate within the targets.

The same requests arrive at every rate, their gaps scaled (common random numbers), so two rates or two deployments differ by what
they are and not by luck. Rates are tried on a fixed grid, 2**(i/GRID) of the saturated throughput: coarse steps from saturation down
until one keeps the targets, then bisection between it and the one above. Runs are samples, so a rate may keep targets that a lower one misses; but
what is tried depends only on what has held, so looser targets never give a smaller rate: up to where the two searches part, both look at the same rates, and
there the looser one goes on above a rate at which the tighter one goes on below. Rates near idle, where a run has the most steps, are looked at only by deployments that need them.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulator.engine.records import FINISHED, Requests
from simulator.errors import InputError
from simulator.results.plan import Percentiles, Target, Targets
from simulator.results.tables import Table
from simulator.run.outcome import Outcome, requests_table
from simulator.run.resolve import Resolved
from simulator.run.serving import queued_at_once, simulate_fleet
from simulator.run.statistics import quantile
from simulator.run.window import cut_window

Array = NDArray[np.float64]

#: Steps of the grid per factor of two: 0.5 % apart.
GRID = 128
#: Lowest rate tried, in octaves below saturation: there a request is nearly always alone.
OCTAVES = 8
LOWEST = -OCTAVES * GRID
#: Steps that are tried from saturation down until one holds: each twice as far below it as the one before.
COARSE = (0, *(LOWEST >> i for i in range(4, -1, -1)))
#: Full batches in a run, so that neither its filling nor its emptying weighs on it.
FULL_BATCHES = 10

LATENCIES = ("ttft_s", "tpot_s", "e2e_s")


@dataclass(frozen=True, eq=False)
class Sample:
    """Latencies of the requests measured at one rate; NaN for a TPOT that is none, infinite for requests not served."""

    latency: Mapping[str, Array]

    @classmethod
    def of(cls, table: Table, rows: NDArray[np.int64]) -> "Sample":
        """Of some rows of a requests table."""
        served = np.asarray(table["status"][rows] == FINISHED)
        return cls({name: np.where(served, table[name][rows], np.inf) for name in LATENCIES})

    @property
    def n(self) -> int:
        """Requests measured."""
        return len(self.latency["e2e_s"])

    def keeps(self, target: Target) -> NDArray[np.bool_]:
        """[n] whether each request keeps a limit."""
        return ~(self.latency[target.metric] > target.limit_s)

    def kept_fraction(self, targets: Targets) -> float:
        """Share of the requests that keep all limits together."""
        kept = np.isfinite(self.latency["e2e_s"])
        for target in targets.limits:
            kept = kept & self.keeps(target)
        return float(kept.mean()) if self.n else 0.0

    def missed(self, targets: Targets) -> list[str]:
        """What does not hold, in words; empty if all targets do."""
        found = [
            f"{t.metric} p{t.percentile:g}"
            for t in targets.limits
            if t.percentile is not None
            and not enough(float(self.keeps(t).mean()) if self.n else 0.0, t.percentile / 100)
        ]
        share = targets.joint_fraction
        if share is not None and not enough(self.kept_fraction(targets), share):
            worst = min(targets.limits, key=lambda t: float(self.keeps(t).mean()) if self.n else 0.0)
            found.append(f"{worst.metric} within the joint share")
        if not targets.limits and not np.isfinite(self.latency["e2e_s"]).all():
            found.append("requests are rejected")
        return found

    def holds(self, targets: Targets) -> bool:
        """Whether all targets hold."""
        return not self.missed(targets)

    def least_scale(self, targets: Targets, metrics: Collection[str]) -> float:
        """Smallest factor on the limits of ``metrics`` with which all targets hold; infinite if none does."""
        scale = 0.0
        for t in targets.limits:
            if t.percentile is None:
                continue
            if t.metric in metrics:
                values = np.sort(np.nan_to_num(self.latency[t.metric], nan=0.0, posinf=np.inf))
                scale = max(scale, quantile(values, t.percentile / 100) / t.limit_s)
            elif not enough(float(self.keeps(t).mean()), t.percentile / 100):
                return np.inf
        if targets.joint_fraction is not None:
            ratio = np.zeros(self.n)
            for t in targets.limits:
                values = np.nan_to_num(self.latency[t.metric], nan=0.0, posinf=np.inf)
                ratio = np.maximum(
                    ratio, values / t.limit_s if t.metric in metrics else np.where(self.keeps(t), 0, np.inf)
                )
            scale = max(scale, quantile(np.sort(ratio), targets.joint_fraction))
        return float(scale)

    def percentiles(self) -> dict[str, Percentiles]:
        """Percentiles of each latency over the requests that have it; null where they reach into those not served."""
        found = {}
        for name, values in self.latency.items():
            ordered = np.sort(values[~np.isnan(values)])
            points = [quantile(ordered, p) if len(ordered) else np.inf for p in (0.5, 0.95, 0.99)]
            found[name] = Percentiles(**dict(zip(("p50", "p95", "p99"), map(_finite, points), strict=True)))
        return found


def enough(share: float, wanted: float) -> bool:
    """Whether a share is at least what is wanted, rounding aside."""
    return share >= wanted * (1 - 1e-12)


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


@dataclass(frozen=True)
class Load:
    """A stream of requests whose rate can be chosen.

    Attributes
    ----------
    requests
        as they arrive at ``rate_per_s``, which is the process's own mean rate. [1/s]
    warm_up_fraction, drain_fraction
        shares of the arrival span that are left out of the statistics.
    before_s, transfer_s
        [n] time between a query's arrival and its request's here, and the part of it after its first token; None: none. [s]
    """

    requests: Requests
    rate_per_s: float
    warm_up_fraction: float = 0.1
    drain_fraction: float = 0.05
    before_s: Array | None = None
    transfer_s: Array | None = None

    @cached_property
    def measured(self) -> NDArray[np.int64]:
        """Rows that count in the statistics: the same at every rate."""
        arrival = self.requests.arrival_s
        window, offline = cut_window(
            float(arrival[0]),
            float(arrival[-1]),
            np.nan,
            warm_up_fraction=self.warm_up_fraction,
            drain_fraction=self.drain_fraction,
        )
        if offline:
            raise InputError("plan: every request arrives at once, so there is no rate to plan for")
        return np.flatnonzero((arrival >= window.start_s) & (arrival <= window.stop_s))

    def at(self, rate_per_s: float) -> Requests:
        """The same requests at another rate. [1/s]"""
        return replace(self.requests, arrival_s=self.requests.arrival_s * (self.rate_per_s / rate_per_s))

    def first(self, n: int) -> "Load":
        """The first ``n`` requests."""
        if n >= len(self.requests):
            return self
        parts: dict[str, Any] = {
            name: None if (x := getattr(self, name)) is None else x[:n] for name in ("before_s", "transfer_s")
        }
        return replace(self, requests=self.requests.take(slice(0, n)), **parts)

    def seen(self, sample: Sample) -> Sample:
        """Latencies of the measured requests as users see them, of what this replica's clock says."""
        if self.before_s is None or self.transfer_s is None:
            return sample
        rows = self.measured
        e2e_s = sample.latency["e2e_s"]
        tpot_s = (e2e_s + self.transfer_s[rows]) / self.requests.output_tokens[rows]
        return Sample(dict(sample.latency) | {"tpot_s": tpot_s, "e2e_s": e2e_s + self.before_s[rows]})


@dataclass(frozen=True)
class Rated:
    """One replica's rate within targets.

    Attributes
    ----------
    saturated_per_s, rate_per_s
        throughput with everything queued at once; largest rate of the grid that keeps the targets, 0: none does. [1/s]
    binding
        what gives way one step of the grid above, or at the lowest rate.
    sample
        latencies at ``rate_per_s``, or at the lowest rate.
    """

    saturated_per_s: float
    rate_per_s: float
    binding: tuple[str, ...]
    sample: Sample


@dataclass
class Bench:
    """One replica of a deployment under one load; runs are made once, whatever is asked of them."""

    resolved: Resolved
    load: Load
    simulations: int = 0
    seen_by_users: Callable[[Outcome], Outcome] | None = None
    """Makes of a replica's outcome what its users see; None: the same."""
    _samples: dict[int, Sample] = field(default_factory=dict)

    @cached_property
    def saturated_per_s(self) -> float:
        """Throughput with everything queued at t = 0; 0 if every request is rejected. [1/s]"""
        self.simulations += 1
        outcome = simulate_fleet(self.resolved, queued_at_once(self.load.requests))
        finished = int((outcome.column("status") == FINISHED).sum())
        return finished / outcome.end_s if finished else 0.0

    def rate_per_s(self, step: int) -> float:
        """Rate at a step of the grid; step 0 is saturation. [1/s]"""
        return float(self.saturated_per_s * 2.0 ** (step / GRID))

    def sample(self, step: int) -> Sample:
        """Latencies at a step of the grid."""
        if step not in self._samples:
            self.simulations += 1
            outcome = simulate_fleet(self.resolved, self.load.at(self.rate_per_s(step)))
            if self.seen_by_users is not None:
                outcome = self.seen_by_users(outcome)
            self._samples[step] = self.load.seen(Sample.of(requests_table(outcome), self.load.measured))
        return self._samples[step]

    def rate(self, targets: Targets, *, at_least_per_s: float = 0.0) -> Rated | None:
        """Largest rate within the targets, of those that are tried; None as soon as it is known to lie below ``at_least_per_s``."""
        saturated = self.saturated_per_s
        if not saturated:
            nobody = Sample(dict.fromkeys(LATENCIES, np.zeros(0)))
            return None if at_least_per_s > 0 else Rated(0.0, 0.0, ("memory",), nobody)
        if saturated < at_least_per_s:
            return None
        # The targets do not hold at ``high``, which stands for every rate above saturation until one is tried.
        low, high = None, 1
        for step in COARSE:
            if self.rate_per_s(high - 1) < at_least_per_s:
                return None
            if self.sample(step).holds(targets):
                low = step
                break
            high = step
        if low is None:
            lowest = self.sample(LOWEST)
            return None if at_least_per_s > 0 else Rated(saturated, 0.0, tuple(lowest.missed(targets)), lowest)
        while high - low > 1:
            middle = (low + high) // 2
            if self.sample(middle).holds(targets):
                low = middle
            else:
                high = middle
            if self.rate_per_s(high - 1) < at_least_per_s:
                return None
        binding = ("capacity",) if high > 0 else tuple(self.sample(high).missed(targets))
        return Rated(saturated, self.rate_per_s(low), binding, self.sample(low))


def rate_within_targets(resolved: Resolved, load: Load, targets: Targets) -> Rated:
    """Largest rate of one replica within the targets, to 0.5 %.

    ``resolved`` may have parameters drawn from their distribution: the load, and with it the randomness, stays.
    """
    found = Bench(resolved, load).rate(targets)
    if found is None:  # cannot be: nothing was demanded
        raise AssertionError("a rating without a demand has an answer")
    return found


def requests_needed(resolved: Resolved, shortest_tokens: int, at_least: int) -> int:
    """Requests of a run that fills every batch :data:`FULL_BATCHES` times.

    ``shortest_tokens``: what the shortest request keeps in the KV cache, which bounds the batch as ``max_num_seqs`` does.
    """
    settings = resolved.settings
    blocks = max(1, -(-shortest_tokens // settings.block_size))
    batch = min(settings.max_num_seqs, max(1, settings.num_kv_blocks // blocks))
    return max(at_least, FULL_BATCHES * batch * resolved.cost.ranks)
