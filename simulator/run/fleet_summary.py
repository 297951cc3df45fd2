"""From what a fleet's pools did to one result: the requests' whole paths, and sums over pools."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from simulator.economics import ChipPrice
from simulator.engine import many
from simulator.engine.records import FINISHED, ITL_BINS, ITL_BINS_PER_OCTAVE, ITL_MIN_EXPONENT
from simulator.fleet.records import Agents, Link, Served
from simulator.results.summary import Agents as AgentSummary
from simulator.results.summary import (
    Assumption,
    Breakdown,
    Deployment,
    Energy,
    Ledger,
    LinkUse,
    Occupancy,
    Summary,
    Utilisation,
)
from simulator.results.summary import Pool as PoolSummary
from simulator.results.tables import Table
from simulator.run.consumption import (
    Work,
    computed_in_vain,
    ideal_decode_chip_seconds,
    ideal_prefill_chip_seconds,
    total_work,
    useful_pairs,
    utilisation,
)
from simulator.run.outcome import (
    ConservationError,
    Outcome,
    check_conservation,
    check_order,
    demand_equal,
    timeline_table,
)
from simulator.run.statistics import distribution
from simulator.run.summarise import (
    Facts,
    breakdown,
    chip_seconds,
    energy,
    kv_memory_of,
    latency_of,
    occupancy,
    prefix_cache_of,
    prices_of,
    slo_of,
    speculation_of,
    status_of,
    throughput,
    warnings_of,
)
from simulator.run.tally import Tally, tally
from simulator.run.window import Arrivals, Capacity, measure_load, measured_window

Array = NDArray[np.float64]
T = TypeVar("T")


@dataclass(frozen=True)
class Path(Outcome):
    """A fleet as its users see it: requests from arrival to last token, over all pools.

    ``replicas`` are those of all pools, in their order.
    """

    columns: Table = field(default_factory=dict)
    pool_chips: tuple[int, ...] = ()
    """Chips of a replica, of each."""

    @property
    def chips(self) -> int:
        """Chips of the fleet."""
        return sum(self.pool_chips)

    def column(self, name: str) -> NDArray[Any]:
        """One per-request array of the whole path."""
        return self.columns[name]


def path_of(served: Served, pools: Sequence[Outcome], *, window_s: tuple[float, float] | None) -> Path:
    """The whole path of every request.

    ``window_s`` is the measured stretch of time, if inter-token latencies were counted in it: those between a first token and the
    second, which a prefill and a decode replica give, are added here.
    """
    counts = served.itl_counts
    replicas = [replica for pool in pools for replica in pool.replicas]
    if served.bridge_s is not None:
        bridged = ~np.isnan(served.bridge_s)
        if counts is not None and window_s is not None:
            second_s = served.first_token_s + np.nan_to_num(served.bridge_s)
            inside = bridged & (second_s >= window_s[0]) & (second_s <= window_s[1])
            counts = counts + itl_counts(served.bridge_s[inside])
        first = replicas[0]
        replicas[0] = replace(first, itl_counts=first.itl_counts + itl_counts(served.bridge_s[bridged]))

    def total(name: str) -> NDArray[Any]:
        return np.asarray(sum(pool.column(name) for pool in pools))

    entry = [p for p, pool in zip(pools, served.pools, strict=True) if pool.pool.role != "decode"]
    reused = np.asarray(sum(pool.column("reused_tokens") for pool in entry))
    return Path(
        requests=served.requests,
        replicas=tuple(replicas),
        chips_per_replica=0,
        itl_counts_measured=counts,
        columns={
            "status": served.status,
            "arrival_s": served.arrival_s,
            "scheduled_s": served.scheduled_s,
            "first_token_s": served.first_token_s,
            "finish_s": served.finish_s,
            "preemptions": total("preemptions").astype(np.int32),
            "reused_tokens": reused,
        },
        pool_chips=tuple(pool.chips_per_replica for pool in pools for _ in pool.replicas),
    )


def itl_counts(values_s: Array) -> NDArray[np.int64]:
    """Histogram of inter-token latencies, by the bins of :func:`simulator.engine.records.itl_bin`."""
    mantissa, exponent = np.frexp(values_s)
    part = ((2 * mantissa - 1) * ITL_BINS_PER_OCTAVE).astype(np.int64)
    place = (exponent - 1 - ITL_MIN_EXPONENT) * ITL_BINS_PER_OCTAVE + part
    return np.bincount(np.clip(place, 0, ITL_BINS - 1), minlength=ITL_BINS)


def path_table(served: Served, path: Path, pools: Sequence[Outcome]) -> Table:
    """Rows of ``requests.parquet``: latencies of the whole path, chip-seconds of all pools."""
    requests, n = served.requests, len(served.requests)
    ttft, e2e = served.first_token_s - served.arrival_s, served.finish_s - served.arrival_s
    gaps = requests.output_tokens - 1
    tpot = np.full(n, np.nan)
    np.divide(e2e - ttft, gaps, out=tpot, where=gaps > 0)
    entry = [p for p, pool in zip(pools, served.pools, strict=True) if pool.pool.role != "decode"]
    decoders = [p for p, pool in zip(pools, served.pools, strict=True) if pool.pool.role == "decode"]
    firsts = np.cumsum([0] + [len(pool.replicas) for pool in served.pools])
    pool_of = np.searchsorted(firsts, served.replica, side="right") - 1

    def sums(name: str, of: Sequence[Outcome]) -> NDArray[Any]:
        return np.asarray(sum((p.column(name) for p in of), np.zeros(n, dtype=np.int64)))

    def chip_s(name: str, of: Sequence[Outcome]) -> Array:
        return np.asarray(sum((p.column(name) * p.chips_per_replica for p in of), np.zeros(n)))

    # What a decode replica computes of a prompt that was computed before is no prefill: it is the first of its tokens. But
    # what it computes again after a preemption is.
    again = chip_s("recompute_s", decoders)
    return {
        "request": np.arange(n),
        "replica": served.replica.astype(np.int32),
        "pool": pool_of.astype(np.int32),
        "prefill_replica": served.prefill_replica.astype(np.int32),
        "status": served.status,
        "arrival_s": served.arrival_s,
        "scheduled_s": served.scheduled_s,
        "first_token_s": served.first_token_s,
        "finish_s": served.finish_s,
        "queue_s": served.scheduled_s - served.arrival_s,
        "load_s": sums("load_s", entry) + served.store_s,
        "transfer_s": served.transfer_s,
        "ttft_s": ttft,
        "tpot_s": tpot,
        "e2e_s": e2e,
        "prompt_tokens": requests.prompt_tokens,
        "cached_tokens": path.column("reused_tokens"),
        "output_tokens": requests.output_tokens,
        "priority": np.zeros(n, dtype=np.int64) if requests.priority is None else requests.priority,
        "tenant": np.zeros(n, dtype=np.int64) if requests.tenant is None else requests.tenant,
        "attempts": sums("attempts", entry),
        "preemptions": path.column("preemptions"),
        "chip_s_busy": chip_s("busy_s", pools),
        "chip_s_prefill": chip_s("busy_prefill_s", entry) + again,
        "chip_s_cached": chip_s("busy_cached_s", entry),
        "chip_s_recompute": chip_s("recompute_s", entry) + again,
        "chip_s_swap": chip_s("swap_s", pools),
        "chip_s_wasted": chip_s("wasted_s", pools),
    }


def check_fleet(served: Served, table: Table, pools: Sequence[Outcome], facts: Sequence[Facts]) -> None:
    """Check a run against what its pools, links and paths must obey.

    Raises
    ------
    ConservationError
        If requests, chip time or bytes are lost or invented, or times are out of order.
    """
    for pool, fact in zip(pools, facts, strict=True):
        check_conservation(pool, fact.cost)
    end_s = served.end_s
    chip_s = sum(p.chips * end_s for p in pools)
    idle = sum(p.idle_s * p.chips_per_replica for p in pools)
    demand_equal("fleet: busy + idle", float(table["chip_s_busy"].sum()) + idle, "its chip time", chip_s)
    done = served.finished
    check_order(*(table[name][done] for name in ("arrival_s", "scheduled_s", "first_token_s", "finish_s")))
    if not (served.transfer_s >= 0).all() or not (served.store_s >= 0).all():
        raise ConservationError("a KV cache was there before it was sent")
    for name, moved in served.moved_bytes.items():
        demand_equal(f"{name}: bytes", float(served.links[name][:, many.BYTES].sum()), "KV caches sent", moved)


def summarise_fleet(
    served: Served,
    at_once: Served,
    facts: Sequence[Facts],
    *,
    window_s: tuple[float, float] | None,
    agents: Agents | None,
    tasks: bool,
    checked: bool = False,
) -> tuple[Summary, Table, Table, Path]:
    """Summary, requests table and timeline table of a fleet's run, and its path.

    ``facts`` are of each pool; ``at_once`` is a run of the same requests all queued at t = 0, whose throughput is the capacity.
    ``agents`` are those who sent the requests, if anybody waited; ``tasks`` says whether what they got done is of interest.
    ``checked``: it is known to add up, or users see first tokens at other times than their replicas.

    Raises
    ------
    ConservationError
        If requests, chip time or bytes do not add up: a fault of the program.
    """
    pools = pools_of(served)
    path = path_of(served, pools, window_s=window_s)
    table = path_table(served, path, pools)
    if not checked:
        check_fleet(served, table, pools, facts)
    whole = _facts(served, facts)
    cuts = {"warm_up_fraction": whole.options.warm_up_fraction, "drain_fraction": whole.options.drain_fraction}
    measured = measured_window(path, **cuts)
    if agents is not None:  # arrivals depend on answers: no rate, no capacity to exceed
        path = replace(path, requests=replace(path.requests, concurrency=agents.count))
    sums = tally(
        path, table, measured, slo=whole.slo, cost=whole.cost, ideal_cost=whole.ideal_cost, settings=whole.settings
    )
    sums = replace(sums, ideal_chip_s=_ideal_chip_s(served, pools, facts))
    arrivals = Arrivals(sums.accepted, sums.first_accepted_s, sums.last_accepted_s)
    capacity = Capacity.of(path_of(at_once, pools_of(at_once), window_s=None))
    load = measure_load(path, measured, arrivals, capacity)
    works = [_work(p, f) for p, f in zip(pools, facts, strict=True)]
    latency = None if load.overloaded else latency_of(path, sums, measured)
    slo = None if load.overloaded else slo_of(sums, measured, whole.slo)
    energies = [energy(p, w, sums, f) for p, w, f in zip(pools, works, facts, strict=True)]
    occupancies = [occupancy(p, measured, f) for p, f in zip(pools, facts, strict=True)]
    used = [utilisation(p, f.cost, w) for p, f, w in zip(pools, facts, works, strict=True)]
    several = len(pools) > 1
    summary = Summary(
        scenario=whole.scenario,
        seed=whole.seed,
        status=status_of(load, sums, slo),
        deployment=whole.deployment,
        requests=sums.counts,
        window=measured.window,
        load=load,
        latency=latency,
        slo=slo,
        throughput=throughput(path, sums, measured),
        occupancy=_all_occupancies(pools, occupancies) if several else occupancies[0],
        utilisation=_all_utilisations(pools, facts, works) if several else used[0],
        prefix_cache=_only([prefix_cache_of(p, f) for p, f in zip(pools, facts, strict=True)]),
        speculation=_only([speculation_of(p, sums, f) for p, f in zip(pools, facts, strict=True)]),
        kv_memory=_only([kv_memory_of(p, f) for p, f in zip(pools, facts, strict=True)]),
        pools=_pools(served, pools, facts, occupancies, used) if several else [],
        links=_links(served),
        agents=_agents(served, agents) if agents is not None and tasks else None,
        chip_seconds_per_query=chip_seconds(path, sums),
        prices=prices_of(path, _at_one_price(sums, pools, facts, whole), whole),
        energy=_all_energies(pools, [e for e, _ in energies]),
        breakdown=_all_breakdowns(pools, facts),
        ledger=_ledger(pools, path, sums),
        warnings=warnings_of(path, sums, measured, load, whole),
        assumptions=list(whole.assumptions),
    )
    timelines = [
        timeline_table(
            p, num_kv_blocks=f.kv_blocks, idle_power_w=f.power.idle_w if f.power else None, busy_power_w=power
        )
        for p, f, (_, power) in zip(pools, facts, energies, strict=True)
    ]
    first = 0
    for p, timeline in zip(pools, timelines, strict=True):
        timeline["replica"] = (timeline["replica"] + first).astype(np.int32)
        first += p.n_replicas
    joined = {name: np.concatenate([timeline[name] for timeline in timelines]) for name in timelines[0]}
    return summary, table, joined, path


def _work(pool: Outcome, facts: Facts) -> Work:
    plan = facts.settings.speculation
    useful = useful_pairs(pool, facts.cost) if computed_in_vain(pool) else None
    return total_work(pool, facts.cost, useful, plan.cost if plan else None)


def _only(found: Sequence[T | None]) -> T | None:
    """The one there is; None if there is none, or several: the pools' sections say which is which."""
    known = [one for one in found if one is not None]
    return known[0] if len(known) == 1 else None


def pools_of(served: Served) -> list[Outcome]:
    """What each pool did, until the whole fleet was done."""
    return [
        Outcome(pool.requests, pool.replicas, pool.pool.chips, rows=pool.rows, until_s=served.end_s)
        for pool in served.pools
    ]


def _facts(served: Served, facts: Sequence[Facts]) -> Facts:
    """Facts of the whole fleet: those of its last pool, where its answers come from, but for what all pools have a share in."""
    last = facts[-1]
    assumptions: dict[Assumption, None] = {}
    for fact in facts:
        assumptions |= dict.fromkeys(fact.assumptions)
    labels = [fact.deployment for fact in facts]
    return replace(
        last,
        deployment=_deployment(served, labels),
        price=_mean_price(served, [fact.price for fact in facts]),
        assumptions=tuple(assumptions),
        notes=tuple(dict.fromkeys(note for fact in facts for note in fact.notes)),
    )


def _deployment(served: Served, labels: Sequence[Deployment]) -> Deployment:
    """One label for several pools."""
    router = served.fleet.router.policy
    if served.fleet.disaggregated:
        router += f", decode {served.fleet.decode_router.policy}"
    if len(labels) == 1:
        return labels[0].model_copy(update={"router": router})

    def same(name: str) -> Any:
        values = {getattr(label, name) for label in labels}
        return values.pop() if len(values) == 1 else None

    def listed(name: str) -> str:
        return " + ".join(dict.fromkeys(getattr(label, name) for label in labels))

    parts = [
        f"{len(pool.replicas)} x {label.slice} {pool.pool.role}"
        for pool, label in zip(served.pools, labels, strict=True)
    ]
    numbers = ("chips_per_replica", "num_kv_blocks", "block_size", "max_num_seqs", "max_num_batched_tokens")
    return labels[-1].model_copy(
        update={
            "slice": " + ".join(parts),
            "replicas": sum(len(pool.replicas) for pool in served.pools),
            "router": router,
            **{name: listed(name) for name in ("chip", "precision", "sharding")},
            **{name: same(name) for name in numbers},
        }
    )


def _ideal_chip_s(served: Served, pools: Sequence[Outcome], facts: Sequence[Facts]) -> float:
    """Σ over finished requests: their prefill where prompts are computed, their tokens where they are decoded. [chip-s]"""
    total = 0.0
    done = served.finished
    for pool, outcome, fact in zip(served.pools, pools, facts, strict=True):
        role = pool.pool.role
        mine = np.zeros(len(done), dtype=bool)
        for rows in pool.rows:
            mine[rows] = True
        mine &= done
        prompt, output = served.requests.prompt_tokens[mine], served.requests.output_tokens[mine]
        if role != "decode":
            cached = pool.column("reused_tokens")[mine]
            total += float(
                ideal_prefill_chip_seconds(prompt, cached, cost=fact.ideal_cost, settings=fact.settings).sum()
            )
        if role != "prefill":
            batch = outcome.total("decode_tokens") / max(outcome.total("steps"), 1)
            total += float(ideal_decode_chip_seconds(prompt, output, cost=fact.ideal_cost, mean_batch=batch).sum())
    return total


def _mean_price(served: Served, prices: Sequence[ChipPrice | None]) -> ChipPrice | None:
    """What the fleet's mean chip costs; None if some chip has no price."""
    known = [price for price in prices if price is not None]
    if len(known) < len(prices):
        return None
    if len(set(known)) == 1:
        return known[0]
    chips = np.array([len(pool.replicas) * pool.pool.chips for pool in served.pools], dtype=np.float64)

    def mean(name: str) -> float | None:
        values = [getattr(price, name) for price in known]
        return None if None in values else float(np.array(values) @ chips / chips.sum())

    def listed(name: str) -> str:
        return " + ".join(dict.fromkeys(getattr(price, name) for price in known))

    texts = "; ".join(dict.fromkeys(price.text for price in known))
    return ChipPrice(
        chip=listed("chip"),
        usd_per_chip_hour=mean("usd_per_chip_hour") or 0.0,
        low=mean("low"),
        high=mean("high"),
        term=listed("term"),
        provider="",
        region="",
        date="",
        kind=listed("kind"),
        source=f"mean over chips of: {texts}",
    )


def _at_one_price(sums: Tally, pools: Sequence[Outcome], facts: Sequence[Facts], whole: Facts) -> Tally:
    """Chip-seconds as if all chips cost what the mean chip does: what they cost stays what it is."""
    prices = [fact.price.usd_per_chip_hour if fact.price else None for fact in facts]
    if whole.price is None or len(set(prices)) == 1:
        return sums
    mean_usd = whole.price.usd_per_chip_hour
    busy = {
        name: sum(
            float(p.column(f"{name}_s").sum()) * p.chips_per_replica * (price or 0.0)
            for p, price in zip(pools, prices, strict=True)
        )
        / mean_usd
        for name in ("busy", "recompute")
    }
    entry = [(p, price) for p, price, f in zip(pools, prices, facts, strict=True) if f.role != "decode"]
    decoders = [(p, price) for p, price, f in zip(pools, prices, facts, strict=True) if f.role == "decode"]

    def cost(name: str, of: Sequence[tuple[Outcome, float | None]]) -> float:
        found = sum(float(p.column(name).sum()) * p.chips_per_replica * (price or 0.0) for p, price in of)
        return found / mean_usd

    return replace(
        sums,
        chip_s_busy=busy["busy"],
        chip_s_prefill=cost("busy_prefill_s", entry) + cost("recompute_s", decoders),
        chip_s_cached=cost("busy_cached_s", entry),
        chip_s_recompute=busy["recompute"],
    )


def _all_occupancies(pools: Sequence[Outcome], each: Sequence[Occupancy]) -> Occupancy:
    """Means over all replicas, and over all steps; peaks of any."""
    replicas = np.array([p.n_replicas for p in pools], dtype=np.float64)
    steps = np.array([o.steps for o in each], dtype=np.float64)

    def mean(name: str, weights: Array) -> float:
        return float(np.array([getattr(o, name) for o in each]) @ weights / weights.sum())

    return Occupancy(
        **{name: mean(name, replicas) for name in ("mean_running", "mean_waiting", "mean_kv_fraction")},
        **{name: mean(name, steps) for name in ("mean_decode_batch", "mean_step_tokens", "mean_step_s")},
        peak_kv_fraction=max(o.peak_kv_fraction for o in each),
        peak_running=max(o.peak_running for o in each),
        peak_waiting=max(o.peak_waiting for o in each),
        kv_capacity_tokens=min(o.kv_capacity_tokens for o in each),
        steps=sum(o.steps for o in each),
    )


def _all_utilisations(pools: Sequence[Outcome], facts: Sequence[Facts], works: Sequence[Work]) -> Utilisation:
    """All pools' work against the peaks of all their chips."""
    flops = sum(w.flops - w.recomputed_flops - w.speculative_flops for w in works)
    hbm_bytes = sum(w.hbm_bytes for w in works)

    def peak(name: str, times: Sequence[float]) -> float:
        return float(sum(getattr(f.cost, name) * time for f, time in zip(facts, times, strict=True)))

    whole = [p.n_replicas * p.end_s for p in pools]
    busy = [p.busy_s for p in pools]
    chips = [p.chips_per_replica for p in pools]
    return Utilisation(
        mfu=flops / peak("peak_flops_per_s", whole),
        mbu=hbm_bytes / peak("hbm_bandwidth_bytes_per_s", whole),
        mfu_busy=flops / peak("peak_flops_per_s", busy),
        mbu_busy=hbm_bytes / peak("hbm_bandwidth_bytes_per_s", busy),
        busy_fraction=float(np.dot(chips, busy) / np.dot(chips, whole)),
        model_flops=flops,
        recomputed_flops=sum(w.recomputed_flops for w in works),
        speculative_flops=sum(w.speculative_flops for w in works),
        hbm_bytes=hbm_bytes,
    )


def _all_energies(pools: Sequence[Outcome], each: Sequence[Energy | None]) -> Energy | None:
    known = [e for e in each if e is not None]
    if len(known) < len(each):
        return None
    if len(known) == 1:
        return known[0]
    chips = np.array([p.chips for p in pools], dtype=np.float64)

    def mean(name: str) -> float:
        return float(np.array([getattr(e, name) for e in known]) @ chips / chips.sum())

    def total(name: str) -> float | None:
        values = [getattr(e, name) for e in known]
        return None if any(v is None for v in values) else sum(values)

    sources = dict.fromkeys(e.source for e in known)
    watts = ("mean_power_w_per_chip", "idle_power_w", "peak_power_w", "host_power_w")
    amounts = [
        name for name in Energy.model_fields if name.endswith(("_per_query", "_per_query_busy", "_per_output_token"))
    ]
    update = {name: mean(name) for name in watts} | {name: total(name) for name in amounts}
    # The building and the grid are one for all pools.
    return known[0].model_copy(update=update | {"grade": max(e.grade for e in known), "source": "; ".join(sources)})


def _all_breakdowns(pools: Sequence[Outcome], facts: Sequence[Facts]) -> Breakdown:
    """Shares of all chips' time."""
    chips = sum(p.chips for p in pools)
    found: dict[str, float] = {}
    for p, f in zip(pools, facts, strict=True):
        for name, share in breakdown(p, f.cost).fractions.items():
            found[name] = found.get(name, 0.0) + share * p.chips / chips
    idle = found.pop("idle")
    return Breakdown(fractions=found | {"idle": idle})


def _ledger(pools: Sequence[Outcome], path: Path, sums: Tally) -> Ledger:
    chip_s = path.chips * path.end_s
    idle = sum(p.idle_s * p.chips_per_replica for p in pools)
    return Ledger(
        chips=path.chips,
        replicas=path.n_replicas,
        time_s=path.end_s,
        chip_s=chip_s,
        busy_chip_s=sums.chip_s_busy,
        idle_chip_s=idle,
        relative_error=(sums.chip_s_busy + idle) / chip_s - 1,
    )


def _pools(
    served: Served,
    pools: Sequence[Outcome],
    facts: Sequence[Facts],
    occupancies: Sequence[Occupancy],
    used: Sequence[Utilisation],
) -> list[PoolSummary]:
    found, first = [], 0
    for pool, p, f, o, u in zip(served.pools, pools, facts, occupancies, used, strict=True):
        found.append(
            PoolSummary(
                name=pool.pool.name,
                role=pool.pool.role,
                first_replica=first,
                requests=int((p.column("status") == FINISHED).sum()),
                deployment=f.deployment,
                occupancy=o,
                utilisation=u,
                prefix_cache=prefix_cache_of(p, f),
                busy_chip_s=p.busy_s * p.chips_per_replica,
                idle_chip_s=p.idle_s * p.chips_per_replica,
            )
        )
        first += p.n_replicas
    return found


def _links(served: Served) -> list[LinkUse]:
    found = []
    stated: dict[str, Link | None] = {"store": served.fleet.store, "link": served.fleet.link}
    times = {"store": served.store_s, "link": served.transfer_s}
    for name, sums in served.links.items():
        link, moved = stated[name], served.moved[name]
        if link is None:
            continue
        n = int(moved.sum())
        found.append(
            LinkUse(
                name=name,
                links=len(sums),
                bandwidth_bytes_per_s=link.bandwidth_bytes_per_s,
                latency_s=link.latency_s,
                transfers=n,
                moved_bytes=served.moved_bytes[name] / (2 if link.per == "both" else 1),
                busy_fraction=float(sums[:, many.BUSY].sum()) / (len(sums) * served.end_s),
                mean_wait_s=float(served.waited_s[name][moved].mean()) if n else 0.0,
                mean_transfer_s=float(times[name][moved].mean()) if n else 0.0,
            )
        )
    return found


def _agents(served: Served, agents: Agents) -> AgentSummary:
    first = np.concatenate([[0], np.cumsum(agents.turns)])
    begun = served.arrival_s[first[:-1]]
    started = ~np.isnan(begun)
    answered = np.minimum.reduceat(served.finished.astype(np.int64), first[:-1]) == 1
    took = served.finish_s[first[1:] - 1] - begun
    completed = answered & (np.nan_to_num(took, nan=np.inf) <= agents.deadline_s)
    sent = served.arrived
    left = started & (np.minimum.reduceat(sent.astype(np.int64), first[:-1]) == 0)
    return AgentSummary(
        agents=agents.count,
        tasks=int(started.sum()),
        completed=int(completed.sum()),
        left=int(left.sum()),
        tasks_per_s=float(completed.sum()) / served.end_s,
        task_s=_bare(took[completed]),
    )


def _bare(values: Array) -> Any:
    found = distribution(values)
    update = {
        name: getattr(found, name).model_copy(
            update={"low": None, "high": None, "reason": "tasks overlap: no interval"}
        )
        for name in ("mean", "p50", "p90", "p95", "p99")
    }
    return found.model_copy(update=update)
