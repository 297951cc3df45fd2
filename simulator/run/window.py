"""Which requests count in the statistics, and whether the run has a steady state to describe at all."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simulator.engine.records import FINISHED
from simulator.results.summary import Load, Window
from simulator.run.outcome import Outcome, fleet_mean
from simulator.run.statistics import BATCHES, TREND_LEVEL, mann_kendall_p


@dataclass(frozen=True)
class Measured:
    """The measured window and the requests in it.

    Attributes
    ----------
    window
        as it stands in the summary.
    rows
        requests that arrived inside, in order of arrival (row order at equal times).
    offline
        everything arrived at once: the window is the whole run, and there is no steady state.
    """

    window: Window
    rows: NDArray[np.int64]
    offline: bool

    @property
    def length_s(self) -> float:
        """Length of the window. [s]"""
        return self.window.stop_s - self.window.start_s


def cut_window(
    first_s: float, last_s: float, end_s: float, *, warm_up_fraction: float, drain_fraction: float
) -> tuple[Window, bool]:
    """Cut warm-up and drain from a span of arrivals; the flag says that everything arrived at once.

    Parameters
    ----------
    first_s, last_s
        the first and the last arrival. [s]
    end_s
        clock at the end of the run; NaN if it is still to come. [s]
    """
    if last_s <= first_s:
        rule = "every request arrived at once: all are measured, until the last one finished"
        return Window(start_s=first_s, stop_s=end_s, last_arrival_s=last_s, end_s=end_s, rule=rule), True
    span = last_s - first_s
    rule = (
        f"requests that arrived in the first {warm_up_fraction:.0%} (warm-up) or the last "
        f"{drain_fraction:.0%} (drain) of the arrival span are left out of percentiles, goodput and rates; "
        "chip-seconds, prices and energy cover the whole run"
    )
    start, stop = first_s + warm_up_fraction * span, last_s - drain_fraction * span
    return Window(start_s=start, stop_s=stop, last_arrival_s=last_s, end_s=end_s, rule=rule), False


def measured_window(outcome: Outcome, *, warm_up_fraction: float, drain_fraction: float) -> Measured:
    """Cut the warm-up and the drain from the span of arrivals."""
    arrival = np.asarray(outcome.column("arrival_s"), dtype=np.float64)
    known = arrival[~np.isnan(arrival)]
    window, offline = cut_window(
        float(known.min()),
        float(known.max()),
        outcome.end_s,
        warm_up_fraction=warm_up_fraction,
        drain_fraction=drain_fraction,
    )
    order = np.argsort(arrival, kind="stable")[: len(known)]
    inside = (arrival[order] >= window.start_s) & (arrival[order] <= window.stop_s)
    return Measured(window, order if offline else order[inside], offline)


#: Full batches that a capacity run needs for its last, emptying one not to matter much.
FULL_BATCHES = 10


@dataclass(frozen=True)
class Capacity:
    """The same requests all queued at t = 0: how many finished, when the last one did, the fullest batch of a replica."""

    finished: int
    end_s: float
    max_running: int

    @classmethod
    def of(cls, at_once: Outcome) -> "Capacity":
        """Capacity that a run of a whole stream shows."""
        finished = int((at_once.column("status") == FINISHED).sum())
        return cls(finished, at_once.end_s, int(at_once.peak("max_running")))


@dataclass(frozen=True)
class Arrivals:
    """Requests that were accepted: how many, and when the first and the last of them arrived. [s]"""

    n: int
    first_s: float
    last_s: float


def measure_load(outcome: Outcome, measured: Measured, arrivals: Arrivals, capacity: Capacity) -> Load:
    """Load against capacity, and the trend of the backlog.

    Capacity is the throughput of the same requests all queued at t = 0. A handful of requests never fills a
    batch there, so its throughput says little; a load ≥ 1 then counts only if requests are left waiting as well.

    The backlog's batch means run from the warm-up cut to the last arrival: after it, every backlog shrinks.
    """
    window = measured.window
    capacity_per_s = capacity.finished / capacity.end_s
    understated = capacity.finished < FULL_BATCHES * outcome.n_replicas * capacity.max_running
    open_loop = outcome.requests.concurrency == 0 and not measured.offline and arrivals.n > 1
    rate = (arrivals.n - 1) / (arrivals.last_s - arrivals.first_s) if open_loop else None
    load = None if rate is None else rate / capacity_per_s
    start = end = 0.0
    p: float | None = None
    growing = False
    if not measured.offline:
        edges = np.linspace(window.start_s, window.last_arrival_s, BATCHES + 1)
        backlog = fleet_mean(outcome.replicas, "waiting", edges)
        start, end = float(backlog[0]), float(backlog[-1])
        # A closed loop's backlog is bounded by its clients: it has no capacity to exceed.
        p = mann_kendall_p(backlog) if open_loop else None
        quarter = BATCHES // 4
        growth = float(backlog[-quarter:].mean() - backlog[:quarter].mean())
        growing = p is not None and p < TREND_LEVEL and growth > outcome.n_replicas
    return Load(
        arrival_per_s=rate,
        capacity_per_s=capacity_per_s,
        capacity_understated=understated,
        load=load,
        headroom_fraction=None if load is None else 1 - load,
        backlog_start=start,
        backlog_end=end,
        backlog_trend_p=p,
        backlog_growing=growing,
        overloaded=growing or (load is not None and load >= 1 and (not understated or end > outcome.n_replicas)),
    )
