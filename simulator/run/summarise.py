"""From what the replicas did to the summary: every reported figure is computed here, by numpy, in request order."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simulator import economics
from simulator.engine.records import FINISHED, EngineSettings, itl_quantiles_s
from simulator.results.summary import (
    Assumption,
    Breakdown,
    ChipSeconds,
    Deployment,
    Distribution,
    Energy,
    Estimate,
    Latency,
    Ledger,
    Load,
    Occupancy,
    PrefixCache,
    Prices,
    Slo,
    Status,
    Summary,
    Throughput,
    TokenPrices,
)
from simulator.results.summary import Requests as RequestCounts
from simulator.results.tables import Table
from simulator.roofline.step_cost import StepCost
from simulator.run.consumption import Work, ideal_chip_seconds, saved_chip_seconds, total_work, utilisation
from simulator.run.options import PriceOptions, RunOptions, SloOptions
from simulator.run.outcome import (
    Outcome,
    check_conservation,
    fleet_mean,
    requests_table,
    state_counts,
    step_time_s,
    timeline_table,
)
from simulator.run.statistics import BATCHES, LAG_LIMIT, TREND_LEVEL, distribution, estimate_mean, lag_one
from simulator.run.window import Measured, measure_load, measured_window

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Facts:
    """What a summary needs to know beyond what the replicas did.

    Attributes
    ----------
    cost, ideal_cost
        tables of the deployment, and of the same at efficiency 1 without overheads.
    usd_per_chip_hour, price_source
        price of a chip, None if it has none.
    peak_power_w, idle_power_w, power_source
        of one chip; None if not published.
    """

    scenario: str
    seed: int
    deployment: Deployment
    cost: StepCost
    ideal_cost: StepCost
    settings: EngineSettings
    slo: SloOptions
    prices: PriceOptions
    options: RunOptions
    usd_per_chip_hour: float | None = None
    price_source: str = ""
    peak_power_w: float | None = None
    idle_power_w: float | None = None
    power_source: str = ""
    assumptions: tuple[Assumption, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def kv_blocks(self) -> int:
        """KV blocks of a replica, all its ranks together."""
        return self.settings.num_kv_blocks * self.cost.ranks


def summarise(outcome: Outcome, at_once: Outcome, facts: Facts) -> tuple[Summary, Table, Table]:
    """Summary, requests table and timeline table of a run.

    ``at_once`` is a run of the same requests all queued at t = 0, whose throughput is the capacity.

    Raises
    ------
    ConservationError
        If requests or chip time do not add up: a fault of the program.
    """
    cost = facts.cost
    check_conservation(outcome, cost)
    table = requests_table(outcome)
    measured = measured_window(
        outcome,
        warm_up_fraction=facts.options.warm_up_fraction,
        drain_fraction=facts.options.drain_fraction,
    )
    load = measure_load(outcome, measured, at_once)
    finished = np.asarray(table["status"] == FINISHED)
    work = total_work(outcome, cost)
    used = utilisation(outcome, cost, work)
    chip_seconds = _chip_seconds(outcome, table, finished, facts)
    energy, busy_power_w = _energy(outcome, work, finished, facts)
    latency = None if load.overloaded else _latency(outcome, table, measured, finished)
    slo = None if load.overloaded else _slo(table, measured, finished, facts.slo)
    counts = _counts(outcome, table, measured, finished)
    status: Status = "ok"
    if load.overloaded:
        status = "overloaded"
    elif counts.finished < counts.total:
        status = "partial"
    elif slo is not None and not slo.met:
        status = "slo_missed"
    summary = Summary(
        scenario=facts.scenario,
        seed=facts.seed,
        status=status,
        deployment=facts.deployment,
        requests=counts,
        window=measured.window,
        load=load,
        latency=latency,
        slo=slo,
        throughput=_throughput(outcome, table, measured, finished),
        occupancy=_occupancy(outcome, measured, facts),
        utilisation=used,
        prefix_cache=_prefix_cache(outcome, facts),
        chip_seconds_per_query=chip_seconds,
        prices=_prices(outcome, table, finished, facts),
        energy=energy,
        breakdown=_breakdown(outcome, cost),
        ledger=_ledger(outcome, table),
        warnings=_warnings(outcome, table, measured, load, counts, facts),
        assumptions=list(facts.assumptions),
    )
    timeline = timeline_table(
        outcome,
        num_kv_blocks=facts.kv_blocks,
        idle_power_w=facts.idle_power_w,
        busy_power_w=busy_power_w,
    )
    return summary, table, timeline


def _counts(outcome: Outcome, table: Table, measured: Measured, finished: NDArray[np.bool_]) -> RequestCounts:
    states = state_counts(outcome)
    preemptions = table["preemptions"]
    return RequestCounts(
        total=len(outcome.requests),
        arrived=len(outcome.requests) - states["not_arrived"],
        finished=states["finished"],
        running=states["running"],
        waiting=states["waiting"],
        rejected=states["rejected"],
        not_arrived=states["not_arrived"],
        measured=int(finished[measured.rows].sum()),
        preemptions=int(preemptions.sum()),
        preempted=int((preemptions > 0).sum()),
        prompt_tokens=int(table["prompt_tokens"][finished].sum()),
        cached_tokens=int(table["cached_tokens"][finished].sum()),
        output_tokens=int(table["output_tokens"][finished].sum()),
        recomputed_tokens=int(outcome.total("recomputed_tokens")),
    )


def _latency(outcome: Outcome, table: Table, measured: Measured, finished: NDArray[np.bool_]) -> Latency:
    rows = measured.rows[finished[measured.rows]]

    def column(name: str) -> Distribution:
        found = distribution(np.asarray(table[name][rows], dtype=np.float64))
        return _without_intervals(found, "everything arrived at once") if measured.offline else found

    return Latency(
        ttft_s=column("ttft_s"),
        tpot_s=column("tpot_s"),
        itl_s=_itl(outcome, table, finished),
        e2e_s=column("e2e_s"),
        queue_s=column("queue_s"),
        one_token_outputs=int((table["output_tokens"][rows] == 1).sum()),
    )


def _without_intervals(found: Distribution, reason: str) -> Distribution:
    update = {
        name: Estimate(value=getattr(found, name).value, reason=reason) for name in ("mean", "p50", "p90", "p95", "p99")
    }
    return found.model_copy(update=update)


def _itl(outcome: Outcome, table: Table, finished: NDArray[np.bool_]) -> Distribution:
    """Percentiles from the histogram; the exact mean: time from first to last token over the gaps between."""
    counts = outcome.itl_counts
    n = int(counts.sum())
    why = "counted in a histogram over the whole run; replications (--seeds) give intervals"
    decoding_s = float((table["finish_s"][finished] - table["first_token_s"][finished]).sum())
    gaps = int((table["output_tokens"][finished] - 1).sum())
    p50, p90, p95, p99 = (
        Estimate(value=float(v) if n else None, reason=why if n else "no values")
        for v in itl_quantiles_s(counts, np.array([0.50, 0.90, 0.95, 0.99]))
    )
    mean = Estimate(value=decoding_s / gaps if gaps else None, reason=why if gaps else "no values")
    return Distribution(n=n, mean=mean, p50=p50, p90=p90, p95=p95, p99=p99)


def _slo(table: Table, measured: Measured, finished: NDArray[np.bool_], options: SloOptions) -> Slo | None:
    limits = options.limits
    if not limits or not len(measured.rows):
        return None
    good = finished.copy()
    for name, limit in limits.items():
        # A one-token output has no TPOT (NaN) and cannot miss its limit.
        good &= ~(table[name] > limit)
    met = good[measured.rows].astype(np.float64)
    share = estimate_mean(met)
    if share.low is not None and share.high is not None:
        share = share.model_copy(update={"low": max(share.low, 0.0), "high": min(share.high, 1.0)})
    if measured.offline:
        share = Estimate(value=share.value, reason="everything arrived at once")
    target = options.percentile / 100
    return Slo(
        ttft_s=options.ttft_s,
        tpot_s=options.tpot_s,
        e2e_s=options.e2e_s,
        target_fraction=target,
        met_fraction=share,
        met=share.value is not None and share.value >= target,
        goodput_per_s=float(met.sum()) / measured.length_s,
    )


def _throughput(outcome: Outcome, table: Table, measured: Measured, finished: NDArray[np.bool_]) -> Throughput:
    """Rates of the requests that finished inside the window."""
    start, stop = measured.window.start_s, measured.window.stop_s
    finish = np.asarray(table["finish_s"], dtype=np.float64)
    inside = finished & (finish >= start) & (finish <= stop)
    length, chips = measured.length_s, outcome.chips
    queries = float(inside.sum()) / length
    output = float(table["output_tokens"][inside].sum()) / length
    total = output + float(table["prompt_tokens"][inside].sum()) / length
    tpot = np.asarray(table["tpot_s"][measured.rows], dtype=np.float64)
    tpot = tpot[~np.isnan(tpot)]
    return Throughput(
        requests_per_s=queries,
        output_tokens_per_s=output,
        total_tokens_per_s=total,
        requests_per_s_per_chip=queries / chips,
        output_tokens_per_s_per_chip=output / chips,
        total_tokens_per_s_per_chip=total / chips,
        output_tokens_per_s_per_user=1 / float(np.median(tpot)) if len(tpot) else None,
    )


def _occupancy(outcome: Outcome, measured: Measured, facts: Facts) -> Occupancy:
    edges = np.array([measured.window.start_s, measured.window.stop_s])

    def mean(name: str) -> float:
        return float(fleet_mean(outcome.replicas, name, edges)[0]) / outcome.n_replicas

    steps = outcome.total("steps")
    return Occupancy(
        mean_running=mean("running"),
        mean_waiting=mean("waiting"),
        mean_decode_batch=outcome.total("decode_tokens") / steps,
        mean_step_tokens=outcome.total("dense_tokens") / steps,
        mean_kv_fraction=mean("kv_blocks") / facts.kv_blocks,
        peak_kv_fraction=outcome.peak("max_kv_blocks") / facts.kv_blocks,
        peak_running=int(outcome.peak("max_running")),
        peak_waiting=int(outcome.peak("max_waiting")),
        kv_capacity_tokens=facts.kv_blocks * facts.settings.block_size,
        steps=int(steps),
        mean_step_s=outcome.busy_s * facts.cost.parts / steps,
    )


def _prefix_cache(outcome: Outcome, facts: Facts) -> PrefixCache | None:
    if facts.settings.prefix_cache == "off":
        return None
    queried, hit = int(outcome.total("cache_queried_tokens")), int(outcome.total("cache_hit_tokens"))
    saved = saved_chip_seconds(outcome, facts.cost, facts.settings.max_num_batched_tokens)
    busy = outcome.busy_s * outcome.chips_per_replica
    return PrefixCache(
        kind=facts.settings.prefix_cache,
        queried_tokens=queried,
        hit_tokens=hit,
        hit_fraction=hit / queried,
        evicted_blocks=int(outcome.total("evicted_blocks")),
        saved_chip_s=saved,
        saved_busy_fraction=saved / busy,
    )


def _chip_seconds(outcome: Outcome, table: Table, finished: NDArray[np.bool_], facts: Facts) -> ChipSeconds:
    queries = int(finished.sum())
    requests = outcome.requests
    ideal = ideal_chip_seconds(
        requests.prompt_tokens[finished],
        table["cached_tokens"][finished],
        requests.output_tokens[finished],
        cost=facts.ideal_cost,
        settings=facts.settings,
        mean_batch=outcome.total("decode_tokens") / outcome.total("steps"),
    )
    provisioned = outcome.chips * outcome.end_s / queries
    busy, prefill, cached, again = (
        float(table[name].sum()) / queries
        for name in ("chip_s_busy", "chip_s_prefill", "chip_s_cached", "chip_s_recompute")
    )
    return ChipSeconds(
        ideal=float(ideal.mean()),
        busy=busy,
        provisioned=provisioned,
        ideal_share_of_provisioned=float(ideal.mean()) / provisioned,
        prefill=prefill,
        cached=cached,
        recompute=again,
        decode=busy - prefill,
    )


def _prices(outcome: Outcome, table: Table, finished: NDArray[np.bool_], facts: Facts) -> Prices | None:
    if facts.usd_per_chip_hour is None:
        return None
    prefill = float(table["chip_s_prefill"].sum())
    cached_tokens = int(table["cached_tokens"][finished].sum())
    usage = economics.Usage(
        queries=int(finished.sum()),
        prefill_chip_s=prefill,
        cached_chip_s=float(table["chip_s_cached"].sum()),
        decode_chip_s=float(table["chip_s_busy"].sum()) - prefill,
        input_tokens=int(table["prompt_tokens"][finished].sum()) - cached_tokens,
        cached_tokens=cached_tokens,
        output_tokens=int(table["output_tokens"][finished].sum()),
    )
    price = facts.usd_per_chip_hour

    def basis(provisioned_chip_s: float | None) -> TokenPrices:
        found = economics.unit_prices(usage, price, provisioned_chip_s=provisioned_chip_s)
        return TokenPrices.model_validate(vars(found))

    return Prices(
        usd_per_chip_hour=price,
        source=facts.price_source,
        usage=basis(None),
        allocation=basis(outcome.chips * outcome.end_s),
    )


def _energy(
    outcome: Outcome, work: Work, finished: NDArray[np.bool_], facts: Facts
) -> tuple[Energy | None, float | None]:
    """Energy of the run, and a chip's mean power while busy."""
    if facts.peak_power_w is None or facts.idle_power_w is None:
        return None, None
    cost = facts.cost
    busiest = max(
        work.flops / (cost.peak_flops_per_s * outcome.busy_s),
        work.hbm_bytes / (cost.hbm_bandwidth_bytes_per_s * outcome.busy_s),
    )
    level = min(busiest, 1.0)
    busy_power_w = economics.power_w(level, idle_power_w=facts.idle_power_w, peak_power_w=facts.peak_power_w)
    chips = outcome.chips_per_replica

    def joules(idle_s: float) -> float:
        return economics.energy_joules(
            idle_chip_s=idle_s * chips,
            busy_chip_s=outcome.busy_s * chips,
            busy_utilisation=level,
            idle_power_w=facts.idle_power_w or 0.0,
            peak_power_w=facts.peak_power_w or 0.0,
        )

    total = joules(outcome.idle_s)
    queries = int(finished.sum())
    output = int(outcome.requests.output_tokens[finished].sum())
    price = facts.prices.usd_per_kwh
    return Energy(
        mean_power_w_per_chip=total / (outcome.chips * outcome.end_s),
        joules_per_query=total / queries,
        joules_per_query_busy=joules(0.0) / queries,
        joules_per_output_token=total / output,
        pue=facts.prices.pue,
        usd_per_query=(
            None if price is None else economics.electricity_usd(total / queries, price, pue=facts.prices.pue)
        ),
        idle_power_w=facts.idle_power_w,
        peak_power_w=facts.peak_power_w,
        source=facts.power_source,
    ), busy_power_w


def _breakdown(outcome: Outcome, cost: StepCost) -> Breakdown:
    whole = outcome.n_replicas * outcome.end_s
    parts = step_time_s(outcome, cost) | {"idle": outcome.idle_s}
    return Breakdown(fractions={name: time / whole for name, time in parts.items()})


def _ledger(outcome: Outcome, table: Table) -> Ledger:
    chip_s = outcome.chips * outcome.end_s
    busy = float(table["chip_s_busy"].sum())
    idle = outcome.idle_s * outcome.chips_per_replica
    return Ledger(
        chips=outcome.chips,
        replicas=outcome.n_replicas,
        time_s=outcome.end_s,
        chip_s=chip_s,
        busy_chip_s=busy,
        idle_chip_s=idle,
        relative_error=(busy + idle) / chip_s - 1,
    )


def _warnings(
    outcome: Outcome, table: Table, measured: Measured, load: Load, counts: RequestCounts, facts: Facts
) -> list[str]:
    """What a reader must know before using the figures."""
    found = list(facts.notes)
    window = measured.window
    if counts.rejected:
        found.append(
            f"{counts.rejected} of {counts.total} requests were rejected: longer than max_model_len or the KV cache; "
            "the figures describe the others"
        )
    if load.overloaded and load.load is not None and load.load < 1:
        found.append(
            f"the backlog grows (Mann–Kendall p = {load.backlog_trend_p:.1g} < {TREND_LEVEL:g}) although load is below 1: "
            "the arrivals are not steady, or the run is too short for its capacity to show"
        )
    if load.capacity_understated and load.load is not None:
        found.append(
            f"{counts.finished:,} requests are fewer than ten full batches: capacity is understated and load overstated; "
            "simulate more requests"
        )
    if not len(measured.rows):
        found.append("no request arrived inside the measured window: simulate more requests")
    if measured.offline:
        found.append("every request arrived at once: latencies describe this batch, not a steady state")
    elif not load.overloaded:
        rows = measured.rows
        correlation = lag_one(np.asarray(table["e2e_s"][rows], dtype=np.float64))
        if correlation is not None and correlation > LAG_LIMIT:
            found.append(
                f"neighbouring batches of requests are correlated ({correlation:.2f} > {LAG_LIMIT:.2f} over {BATCHES} "
                "batches): intervals are too narrow; simulate more requests"
            )
        e2e = np.asarray(table["e2e_s"][rows], dtype=np.float64)
        slowest = float(np.nanquantile(e2e, 0.99)) if np.isfinite(e2e).any() else 0.0
        shortest = min(window.start_s, window.last_arrival_s - window.stop_s)
        if slowest > shortest and facts.options.warm_up_fraction > 0 and facts.options.drain_fraction > 0:
            found.append(
                f"the p99 E2E latency ({slowest:.3g} s) exceeds the warm-up or drain cut ({shortest:.3g} s): "
                "start and end of the run weigh on the percentiles; simulate more requests"
            )
    tail = outcome.end_s - window.last_arrival_s
    if not measured.offline and tail > 0.05 * outcome.end_s:
        found.append(
            f"the last {tail / outcome.end_s:.0%} of the run served no new arrivals: "
            "provisioned chip-seconds include this emptying; simulate more requests"
        )
    return found
