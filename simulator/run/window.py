"""Which requests count in the statistics, and whether the run has a steady state to describe at all."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simulator.engine.records import FINISHED
from simulator.results.summary import Load, Window
from simulator.run.outcome import Outcome, accepted, fleet_mean
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


def measured_window(outcome: Outcome, *, warm_up_fraction: float, drain_fraction: float) -> Measured:
    """Cut the warm-up and the drain from the span of arrivals."""
    arrival = np.asarray(outcome.column("arrival_s"), dtype=np.float64)
    known = arrival[~np.isnan(arrival)]
    first, last = float(known.min()), float(known.max())
    order = np.argsort(arrival, kind="stable")[: len(known)]
    if last <= first:
        return Measured(
            Window(
                start_s=first,
                stop_s=outcome.end_s,
                last_arrival_s=last,
                end_s=outcome.end_s,
                rule="every request arrived at once: all are measured, until the last one finished",
            ),
            order,
            offline=True,
        )
    start = first + warm_up_fraction * (last - first)
    stop = last - drain_fraction * (last - first)
    inside = (arrival[order] >= start) & (arrival[order] <= stop)
    return Measured(
        Window(
            start_s=start,
            stop_s=stop,
            last_arrival_s=last,
            end_s=outcome.end_s,
            rule=(
                f"requests that arrived in the first {warm_up_fraction:.0%} (warm-up) or the last "
                f"{drain_fraction:.0%} (drain) of the arrival span are left out of percentiles, goodput and rates; "
                "chip-seconds, prices and energy cover the whole run"
            ),
        ),
        order[inside],
        offline=False,
    )


#: Full batches that a capacity run needs for its last, emptying one not to matter much.
FULL_BATCHES = 10


def measure_load(outcome: Outcome, measured: Measured, at_once: Outcome) -> Load:
    """Load against capacity, and the trend of the backlog.

    Capacity is the throughput of ``at_once``, the same requests all queued at t = 0. A handful of requests never fills a
    batch there, so its throughput says little; a load ≥ 1 then counts only if requests are left waiting as well.

    The backlog's batch means run from the warm-up cut to the last arrival: after it, every backlog shrinks.
    """
    window = measured.window
    finished = int((at_once.column("status") == FINISHED).sum())
    capacity_per_s = finished / at_once.end_s
    understated = finished < FULL_BATCHES * at_once.n_replicas * at_once.peak("max_running")
    arrival = np.asarray(outcome.column("arrival_s"), dtype=np.float64)[accepted(outcome)]
    open_loop = outcome.requests.concurrency == 0 and not measured.offline and len(arrival) > 1
    rate = (len(arrival) - 1) / float(arrival.max() - arrival.min()) if open_loop else None
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
