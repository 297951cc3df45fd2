"""From what the replicas did to the summary: every reported figure is computed here, by numpy, in request order."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simulator import economics
from simulator.economics import ChipPrice, PowerModel, Site
from simulator.engine.records import EngineSettings, itl_mean_s, itl_quantiles_s
from simulator.results.summary import (
    Assumption,
    Breakdown,
    CacheTier,
    ChipSeconds,
    Deployment,
    Distribution,
    Energy,
    Estimate,
    KvMemory,
    Latency,
    Ledger,
    Load,
    Occupancy,
    PrefixCache,
    Prices,
    Slo,
    Speculation,
    Status,
    Summary,
    Throughput,
    TokenPrices,
)
from simulator.results.tables import Table
from simulator.roofline.step_cost import StepCost
from simulator.run.consumption import Work, saved_chip_seconds, total_work, utilisation
from simulator.run.options import RunOptions, SloOptions
from simulator.run.outcome import (
    Outcome,
    check_conservation,
    fleet_mean,
    requests_table,
    step_time_s,
    timeline_table,
)
from simulator.run.statistics import BATCHES, LAG_LIMIT, TREND_LEVEL
from simulator.run.tally import Tally, tally
from simulator.run.window import Arrivals, Capacity, Measured, measure_load, measured_window

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Facts:
    """What a summary needs to know beyond what the replicas did.

    Attributes
    ----------
    cost, ideal_cost
        tables of the deployment, and of the same at efficiency 1 without overheads.
    role
        of the pool.
    price
        of a chip; None if it has none.
    power
        of a chip; None if it is not published.
    site, pays_electricity
        where the chips stand, and whether electricity is paid apart.
    kv_block_bytes
        bytes of a KV block on all chips of a replica. [bytes]
    """

    scenario: str
    seed: int
    deployment: Deployment
    cost: StepCost
    ideal_cost: StepCost
    settings: EngineSettings
    slo: SloOptions
    options: RunOptions
    role: str = "unified"
    price: ChipPrice | None = None
    power: PowerModel | None = None
    site: Site | None = None
    pays_electricity: bool = False
    speculation_method: str = ""
    kv_block_bytes: float = 0.0
    assumptions: tuple[Assumption, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def kv_blocks(self) -> int:
        """KV blocks of a replica, all its ranks together."""
        return self.settings.num_kv_blocks * self.cost.ranks


def summarise(
    outcome: Outcome, at_once: Outcome, facts: Facts, *, checked: bool = False
) -> tuple[Summary, Table, Table]:
    """Summary, requests table and timeline table of a run.

    ``at_once`` is a run of the same requests all queued at t = 0, whose throughput is the capacity. ``checked`` says that the
    outcome was checked for conservation before its first tokens were moved.

    Raises
    ------
    ConservationError
        If requests or chip time do not add up: a fault of the program.
    """
    if not checked:
        check_conservation(outcome, facts.cost)
    table = requests_table(outcome)
    measured = measured_window(
        outcome,
        warm_up_fraction=facts.options.warm_up_fraction,
        drain_fraction=facts.options.drain_fraction,
    )
    sums = tally(
        outcome,
        table,
        measured,
        slo=facts.slo,
        cost=facts.cost,
        ideal_cost=facts.ideal_cost,
        settings=facts.settings,
    )
    summary, timeline = compose(outcome, measured, sums, Capacity.of(at_once), facts)
    return summary, table, timeline


def compose(
    outcome: Outcome, measured: Measured, sums: Tally, capacity: Capacity, facts: Facts
) -> tuple[Summary, Table]:
    """Summary and timeline table of a run, from what the replicas counted and the sums over its requests."""
    cost = facts.cost
    arrivals = Arrivals(sums.accepted, sums.first_accepted_s, sums.last_accepted_s)
    load = measure_load(outcome, measured, arrivals, capacity)
    plan = facts.settings.speculation
    work = total_work(outcome, cost, sums.useful_pairs, plan.cost if plan else None)
    used, busy_power_w = energy(outcome, work, sums, facts)
    latency = None if load.overloaded else latency_of(outcome, sums, measured)
    slo = None if load.overloaded else slo_of(sums, measured, facts.slo)
    summary = Summary(
        scenario=facts.scenario,
        seed=facts.seed,
        status=status_of(load, sums, slo),
        deployment=facts.deployment,
        requests=sums.counts,
        window=measured.window,
        load=load,
        latency=latency,
        slo=slo,
        throughput=throughput(outcome, sums, measured),
        occupancy=occupancy(outcome, measured, facts),
        utilisation=utilisation(outcome, cost, work),
        prefix_cache=prefix_cache_of(outcome, facts),
        speculation=speculation_of(outcome, sums, facts),
        kv_memory=kv_memory_of(outcome, facts),
        chip_seconds_per_query=chip_seconds(outcome, sums),
        prices=prices_of(outcome, sums, facts),
        energy=used,
        breakdown=breakdown(outcome, cost),
        ledger=_ledger(outcome, sums),
        warnings=warnings_of(outcome, sums, measured, load, facts),
        assumptions=list(facts.assumptions),
    )
    timeline = timeline_table(
        outcome,
        num_kv_blocks=facts.kv_blocks,
        idle_power_w=facts.power.idle_w if facts.power else None,
        busy_power_w=busy_power_w,
    )
    return summary, timeline


def status_of(load: Load, sums: Tally, slo: Slo | None) -> Status:
    """The run in a word."""
    if load.overloaded:
        return "overloaded"
    if sums.counts.finished < sums.counts.total:
        return "partial"
    return "slo_missed" if slo is not None and not slo.met else "ok"


def latency_of(outcome: Outcome, sums: Tally, measured: Measured) -> Latency:
    """What users see."""

    def column(name: str) -> Distribution:
        found = sums.latency[name]
        return _without_intervals(found, "everything arrived at once") if measured.offline else found

    return Latency(
        ttft_s=column("ttft_s"),
        tpot_s=column("tpot_s"),
        itl_s=_itl(outcome, sums),
        itl_pass_s=_itl(outcome, sums, per_pass=True) if outcome.speculates else None,
        e2e_s=column("e2e_s"),
        queue_s=column("queue_s"),
        one_token_outputs=sums.one_token_outputs,
    )


def _without_intervals(found: Distribution, reason: str) -> Distribution:
    update = {
        name: Estimate(value=getattr(found, name).value, reason=reason) for name in ("mean", "p50", "p90", "p95", "p99")
    }
    return found.model_copy(update=update)


def _itl(outcome: Outcome, sums: Tally, *, per_pass: bool = False) -> Distribution:
    """Percentiles from the histogram of the measured window, or else of the whole run.

    The whole run's mean is exact: time from first to last token over the gaps between; the window's is of the histogram.
    Tokens of one pass of speculative decoding come together: 0 s apart (bin 0), or one value, ``per_pass``.
    """
    counts = outcome.itl_counts if outcome.itl_counts_measured is None else outcome.itl_counts_measured
    together = int(counts[0]) if per_pass else 0
    if per_pass:
        counts = np.where(np.arange(len(counts)) > 0, counts, 0)
    n = int(counts.sum())
    where = "whole run" if outcome.itl_counts_measured is None else "measured window"
    why = f"counted in a histogram over the {where}; replications (--seeds) give intervals"
    p50, p90, p95, p99 = (
        Estimate(value=float(v) if n else None, reason=why if n else "no values")
        for v in itl_quantiles_s(counts, np.array([0.50, 0.90, 0.95, 0.99]))
    )
    gaps = sums.gaps - together
    mean_s = sums.decoding_s / gaps if gaps else 0.0
    if outcome.itl_counts_measured is not None and n:
        mean_s = itl_mean_s(counts)
    mean = Estimate(value=mean_s if n else None, reason=why if n else "no values")
    return Distribution(n=n, mean=mean, p50=p50, p90=p90, p95=p95, p99=p99)


def slo_of(sums: Tally, measured: Measured, options: SloOptions) -> Slo | None:
    """How far the limits were met; None without limits, or without requests to measure."""
    if not options.limits or not sums.inside:
        return None
    share = sums.met_share
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
        goodput_per_s=sums.met / measured.length_s,
    )


def throughput(outcome: Outcome, sums: Tally, measured: Measured) -> Throughput:
    """Rates of the requests that finished inside the window."""
    length, chips = measured.length_s, outcome.chips
    queries = sums.window_requests / length
    output = sums.window_output_tokens / length
    total = output + sums.window_prompt_tokens / length
    tpot_s = sums.latency["tpot_s"].p50.value
    return Throughput(
        requests_per_s=queries,
        output_tokens_per_s=output,
        total_tokens_per_s=total,
        requests_per_s_per_chip=queries / chips,
        output_tokens_per_s_per_chip=output / chips,
        total_tokens_per_s_per_chip=total / chips,
        output_tokens_per_s_per_user=1 / tpot_s if tpot_s else None,
    )


def occupancy(outcome: Outcome, measured: Measured, facts: Facts) -> Occupancy:
    """How full the replicas were."""
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
        kv_capacity_tokens=facts.kv_blocks // facts.settings.kv_groups.count * facts.settings.block_size,
        steps=int(steps),
        mean_step_s=outcome.busy_s * facts.cost.parts / steps,
    )


def prefix_cache_of(outcome: Outcome, facts: Facts) -> PrefixCache | None:
    """What the prefix cache found; None without one."""
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


def speculation_of(outcome: Outcome, sums: Tally, facts: Facts) -> Speculation | None:
    """What speculative decoding did; None without it."""
    found, plan = outcome.speculation, facts.settings.speculation
    if found is None or plan is None:
        return None
    passes = max(int(found.sequence_passes.sum()), 1)
    return Speculation(
        method=facts.speculation_method,
        draft_tokens=plan.survival.shape[2],
        tokens_per_pass=1 + found.extra_tokens / passes,
        drafts_per_pass=found.drafted_tokens / passes,
        accepted_fraction=found.extra_tokens / found.drafted_tokens if found.drafted_tokens else None,
        passes_without_drafts_fraction=float(found.sequence_passes[0]) / passes,
        drafted_tokens=found.drafted_tokens,
        rejected_tokens=found.rejected_tokens,
        draft_share_of_busy=found.draft_s / outcome.busy_s,
        wasted_chip_s_per_query=float(found.wasted_s.sum()) * outcome.chips_per_replica / sums.finished,
        wasted_share_of_busy=float(found.wasted_s.sum()) / outcome.busy_s,
    )


def kv_memory_of(outcome: Outcome, facts: Facts) -> KvMemory | None:
    """What happened to KV blocks outside of HBM; None where they stay there."""
    settings, bytes_ = facts.settings, facts.kv_block_bytes
    if settings.swap is None and not settings.tiers:
        return None

    def total(name: str) -> float:
        return sum(replica.totals.get(name, 0) for replica in outcome.replicas)

    loads = int(total("loads"))
    loading_s = float(sum(replica.load_s.sum() for replica in outcome.replicas))
    return KvMemory(
        swap_out_bytes=total("swap_out_blocks") * bytes_,
        swap_in_bytes=total("swap_in_blocks") * bytes_,
        swap_fallbacks=int(total("swap_fallbacks")),
        swap_time_fraction=total("swap_s") / outcome.busy_s,
        tiers=[
            CacheTier(
                name=tier.name,
                hit_tokens=int(total(f"tier{i}_loaded_blocks")) * settings.block_size,
                stored_bytes=total(f"tier{i}_stored_blocks") * bytes_,
                loaded_bytes=total(f"tier{i}_loaded_blocks") * bytes_,
            )
            for i, tier in enumerate(settings.tiers)
        ],
        loads=loads,
        loads_declined=int(total("loads_declined")),
        mean_load_s=loading_s / loads if loads else None,
    )


def chip_seconds(outcome: Outcome, sums: Tally) -> ChipSeconds:
    """Chip-seconds per finished query."""
    queries = sums.finished
    ideal = sums.ideal_chip_s / queries
    provisioned = outcome.chips * outcome.end_s / queries
    busy, prefill = sums.chip_s_busy / queries, sums.chip_s_prefill / queries
    return ChipSeconds(
        ideal=ideal,
        busy=busy,
        provisioned=provisioned,
        ideal_share_of_provisioned=ideal / provisioned,
        prefill=prefill,
        cached=sums.chip_s_cached / queries,
        recompute=sums.chip_s_recompute / queries,
        wasted=sums.chip_s_wasted / queries,
        decode=busy - prefill,
        busy_of_measured=sums.busy,
    )


def prices_of(outcome: Outcome, sums: Tally, facts: Facts) -> Prices | None:
    """What a query costs; None without a price."""
    price = facts.price
    if price is None:
        return None
    counts = sums.counts
    usage = economics.Usage(
        queries=counts.finished,
        prefill_chip_s=sums.chip_s_prefill,
        cached_chip_s=sums.chip_s_cached,
        decode_chip_s=sums.chip_s_busy - sums.chip_s_prefill,
        input_tokens=counts.prompt_tokens - counts.cached_tokens,
        cached_tokens=counts.cached_tokens,
        output_tokens=counts.output_tokens,
    )

    def basis(provisioned_chip_s: float | None) -> TokenPrices:
        found = economics.unit_prices(usage, price.usd_per_chip_hour, provisioned_chip_s=provisioned_chip_s)
        return TokenPrices.model_validate(vars(found))

    return Prices(
        usd_per_chip_hour=price.usd_per_chip_hour,
        low_usd_per_chip_hour=price.low,
        high_usd_per_chip_hour=price.high,
        term=price.term,
        source=price.text,
        owned=vars(price.owned) if price.owned else {},
        usage=basis(None),
        allocation=basis(outcome.chips * outcome.end_s),
    )


def energy(outcome: Outcome, work: Work, sums: Tally, facts: Facts) -> tuple[Energy | None, float | None]:
    """Energy of the run, and a chip's mean power while busy."""
    power, site = facts.power, facts.site
    if power is None or site is None:
        return None, None
    cost = facts.cost
    busiest = max(
        work.flops / (cost.peak_flops_per_s * outcome.busy_s),
        work.hbm_bytes / (cost.hbm_bandwidth_bytes_per_s * outcome.busy_s),
    )
    level = min(busiest, 1.0)
    busy_power_w = economics.power_w(level, idle_power_w=power.idle_w, peak_power_w=power.peak_w)
    chips = outcome.chips_per_replica
    busy_chip_s, chip_s = outcome.busy_s * chips, outcome.chips * outcome.end_s
    total = power.chip_joules(idle_chip_s=outcome.idle_s * chips, busy_chip_s=busy_chip_s, utilisation=level)
    low, high = power.chip_joules_range(idle_chip_s=outcome.idle_s * chips, busy_chip_s=busy_chip_s, utilisation=level)
    it_joules = power.it_joules(total, chip_s)
    queries, output = sums.finished, sums.counts.output_tokens
    usd = None
    if facts.pays_electricity and site.usd_per_kwh is not None:
        usd = economics.electricity_usd(it_joules, site.usd_per_kwh, pue=site.pue) / queries
    return Energy(
        mean_power_w_per_chip=total / chip_s,
        joules_per_query=total / queries,
        low_joules_per_query=low / queries,
        high_joules_per_query=high / queries,
        joules_per_query_busy=power.chip_joules(idle_chip_s=0.0, busy_chip_s=busy_chip_s, utilisation=level) / queries,
        joules_per_output_token=total / output,
        facility_joules_per_query=it_joules * site.pue / queries,
        gco2_per_query=economics.carbon_g(it_joules, site.gco2_per_kwh, pue=site.pue) / queries,
        usd_per_query=usd,
        grade=power.grade,
        pue=site.pue,
        gco2_per_kwh=site.gco2_per_kwh,
        region=site.region,
        operator=site.operator,
        idle_power_w=power.idle_w,
        peak_power_w=power.peak_w,
        host_power_w=power.host_w,
        source=power.source,
    ), busy_power_w


def breakdown(outcome: Outcome, cost: StepCost) -> Breakdown:
    """Where the chip time went."""
    whole = outcome.n_replicas * outcome.end_s
    parts = step_time_s(outcome, cost) | {"idle": outcome.idle_s}
    return Breakdown(fractions={name: time / whole for name, time in parts.items()})


def _ledger(outcome: Outcome, sums: Tally) -> Ledger:
    chip_s = outcome.chips * outcome.end_s
    busy = sums.chip_s_busy
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


def warnings_of(outcome: Outcome, sums: Tally, measured: Measured, load: Load, facts: Facts) -> list[str]:
    """What a reader must know before using the figures."""
    found = list(facts.notes)
    window, counts = measured.window, sums.counts
    gone = counts.timed_out + counts.cancelled
    if gone:
        found.append(
            f"{gone} of {counts.total} requests timed out or were cancelled: latencies are of those that finished, and "
            f"chip-seconds per finished query include {100 * sums.chip_s_wasted / sums.chip_s_busy:.3g} % "
            "spent on attempts that were left"
        )
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
    if not sums.inside:
        found.append("no request arrived inside the measured window: simulate more requests")
    if measured.offline:
        found.append("every request arrived at once: latencies describe this batch, not a steady state")
    elif not load.overloaded:
        correlation = sums.e2e_lag
        if correlation is not None and correlation > LAG_LIMIT:
            found.append(
                f"neighbouring batches of requests are correlated ({correlation:.2f} > {LAG_LIMIT:.2f} over {BATCHES} "
                "batches): intervals are too narrow; simulate more requests"
            )
        slowest = sums.e2e_p99_s or 0.0
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
