"""What a summary says about requests, summed over them: from the table of all requests, or counted as they pass.

:func:`tally` sums a table; :mod:`simulator.run.streaming` makes the same record without one.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simulator.engine.records import FINISHED, EngineSettings
from simulator.results.summary import Distribution, Estimate
from simulator.results.summary import Requests as RequestCounts
from simulator.results.tables import Table
from simulator.roofline.step_cost import StepCost
from simulator.run.consumption import computed_in_vain, ideal_chip_seconds, useful_pairs
from simulator.run.options import SloOptions
from simulator.run.outcome import Outcome, accepted, state_counts
from simulator.run.statistics import distribution, estimate_mean, lag_one
from simulator.run.window import Measured

LATENCIES = ("ttft_s", "tpot_s", "e2e_s", "queue_s")


@dataclass(frozen=True)
class Tally:
    """Sums over requests. *Measured* requests are those that finished and arrived inside the window.

    Attributes
    ----------
    counts
        as in the summary.
    accepted, first_accepted_s, last_accepted_s
        requests that arrived and were not rejected, and when the first and last of them arrived.
    inside
        requests that arrived inside the window, whatever became of them.
    window_requests, window_prompt_tokens, window_output_tokens
        requests that *finished* inside the window, and their tokens.
    chip_s_busy, chip_s_prefill, chip_s_cached, chip_s_recompute, chip_s_wasted
        Σ over all requests. [chip-s]
    ideal_chip_s
        Σ over finished requests. [chip-s]
    decoding_s, gaps
        Σ over finished requests of the time from first to last token [s], and of the gaps between their tokens.
    latency
        by :data:`LATENCIES`, over the measured requests. [s]
    busy
        chip-seconds of the measured requests. [chip-s]
    one_token_outputs
        measured requests without a TPOT.
    met, met_share
        requests inside the window that met every limit; as a share of those inside.
    e2e_p99_s, e2e_lag
        of the measured requests: 99th percentile [s], correlation between neighbouring batch means. None: no sample.
    useful_pairs
        as :func:`simulator.run.consumption.useful_pairs`; None if nothing was recomputed.
    """

    counts: RequestCounts
    accepted: int
    first_accepted_s: float
    last_accepted_s: float
    inside: int
    window_requests: int
    window_prompt_tokens: int
    window_output_tokens: int
    chip_s_busy: float
    chip_s_prefill: float
    chip_s_cached: float
    chip_s_recompute: float
    ideal_chip_s: float
    decoding_s: float
    gaps: int
    latency: dict[str, Distribution]
    busy: Distribution
    one_token_outputs: int
    met: int
    met_share: Estimate
    e2e_p99_s: float | None
    e2e_lag: float | None
    useful_pairs: tuple[int, int] | None
    chip_s_wasted: float = 0.0

    @property
    def finished(self) -> int:
        """Finished requests."""
        return self.counts.finished


def met_limits(table: Table, finished: NDArray[np.bool_], options: SloOptions) -> NDArray[np.bool_]:
    """Which requests finished and met every limit."""
    good = finished.copy()
    for name, limit in options.limits.items():
        # A one-token output has no TPOT (NaN) and cannot miss its limit.
        good &= ~(table[name] > limit)
    return good


def tally(
    outcome: Outcome,
    table: Table,
    measured: Measured,
    *,
    slo: SloOptions,
    cost: StepCost,
    ideal_cost: StepCost,
    settings: EngineSettings,
) -> Tally:
    """Sum the requests table of a run."""
    finished = np.asarray(table["status"] == FINISHED)
    inside = measured.rows
    rows = inside[finished[inside]]
    window = measured.window
    finish = np.asarray(table["finish_s"], dtype=np.float64)
    in_window = finished & (finish >= window.start_s) & (finish <= window.stop_s)
    arrival = np.asarray(table["arrival_s"], dtype=np.float64)[accepted(outcome)]
    met = met_limits(table, finished, slo)[inside].astype(np.float64)
    e2e = np.asarray(table["e2e_s"][inside], dtype=np.float64)
    requests = outcome.requests
    ideal = ideal_chip_seconds(
        requests.prompt_tokens[finished],
        table["cached_tokens"][finished],
        requests.output_tokens[finished],
        cost=ideal_cost,
        settings=settings,
        mean_batch=outcome.total("decode_tokens") / outcome.total("steps"),
    )

    def column(name: str) -> NDArray[np.float64]:
        return np.asarray(table[name][rows], dtype=np.float64)

    return Tally(
        counts=_counts(outcome, table, finished, measured=len(rows)),
        accepted=len(arrival),
        first_accepted_s=float(arrival.min(initial=np.inf)),
        last_accepted_s=float(arrival.max(initial=-np.inf)),
        inside=len(inside),
        window_requests=int(in_window.sum()),
        window_prompt_tokens=int(table["prompt_tokens"][in_window].sum()),
        window_output_tokens=int(table["output_tokens"][in_window].sum()),
        chip_s_busy=float(table["chip_s_busy"].sum()),
        chip_s_prefill=float(table["chip_s_prefill"].sum()),
        chip_s_cached=float(table["chip_s_cached"].sum()),
        chip_s_recompute=float(table["chip_s_recompute"].sum()),
        ideal_chip_s=float(ideal.sum()),
        decoding_s=float((table["finish_s"][finished] - table["first_token_s"][finished]).sum()),
        gaps=int((table["output_tokens"][finished] - 1).sum()),
        latency={name: distribution(column(name)) for name in LATENCIES},
        busy=distribution(column("chip_s_busy")),
        one_token_outputs=int((table["output_tokens"][rows] == 1).sum()),
        met=int(met.sum()),
        met_share=estimate_mean(met),
        e2e_p99_s=float(np.nanquantile(e2e, 0.99)) if np.isfinite(e2e).any() else None,
        e2e_lag=lag_one(e2e),
        useful_pairs=useful_pairs(outcome, cost) if computed_in_vain(outcome) else None,
        chip_s_wasted=float(table["chip_s_wasted"].sum()),
    )


def _counts(outcome: Outcome, table: Table, finished: NDArray[np.bool_], *, measured: int) -> RequestCounts:
    states = state_counts(outcome)
    preemptions = table["preemptions"]
    return RequestCounts(
        total=len(outcome.requests),
        arrived=len(outcome.requests) - states["not_arrived"],
        finished=states["finished"],
        running=states["running"],
        waiting=states["waiting"],
        rejected=states["rejected"],
        timed_out=states["timed_out"],
        cancelled=states["cancelled"],
        retries=int(outcome.total("retries")),
        not_arrived=states["not_arrived"],
        measured=measured,
        preemptions=int(preemptions.sum()),
        preempted=int((preemptions > 0).sum()),
        prompt_tokens=int(table["prompt_tokens"][finished].sum()),
        cached_tokens=int(table["cached_tokens"][finished].sum()),
        output_tokens=int(table["output_tokens"][finished].sum()),
        recomputed_tokens=int(outcome.total("recomputed_tokens")),
    )
