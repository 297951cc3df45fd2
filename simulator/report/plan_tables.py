"""A plan as cells of tables and as sentences."""

import math

from simulator.planning.search import with_spares
from simulator.report.forms import number, seconds, usd
from simulator.results.plan import Plan, PlannedFleet, Pool, Provisioning, Target, Targets

#: Rates for which a planned fleet is scaled.
RATES_PER_S = (1, 10, 100, 1_000, 10_000, 100_000)

METRICS = ("ttft_s", "tpot_s", "e2e_s")

FLEET_COLUMNS = (
    "slice",
    "sharding",
    "precision",
    "max seqs / tokens",
    "binding",
    "replicas",
    "chips",
    "chip-s/query",
    "per hour",
    "per query",
)
#: Of these, the first so many are text.
FLEET_TEXTS = 5


def fleet_cells(fleet: PlannedFleet | None) -> tuple[str, ...]:
    """A fleet under ``FLEET_COLUMNS``; pools joined by a plus."""
    if fleet is None:
        return ("–",) * len(FLEET_COLUMNS)
    pools = fleet.pools
    return (
        " + ".join(p.slice for p in pools),
        " + ".join(sharding_text(p) for p in pools),
        " + ".join(dict.fromkeys(p.precision for p in pools)),
        " + ".join(limits_text(p) for p in pools),
        binding_text(fleet),
        " + ".join(f"{p.replicas:,}" for p in pools),
        f"{fleet.chips:,}",
        number(fleet.chip_seconds_per_query),
        usd(fleet.usd_per_hour),
        usd(fleet.usd_per_query),
    )


def front_table(plan: Plan) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...], int]:
    """Columns and rows of the cheapest fleets under other limits, and how many columns are text; columns that say nothing are left out."""
    columns = ("limits", "", *FLEET_COLUMNS)
    rows = [
        (f"{p.scale:g}×", "" if p.on_front else "no fleet" if p.fleet is None else "no cheaper", *fleet_cells(p.fleet))
        for p in plan.front
    ]
    left_out = {"chip-s/query"}
    if all(p.on_front for p in plan.front):
        left_out.add("")
    if len({pool.precision for p in plan.front if p.fleet for pool in p.fleet.pools}) == 1:
        left_out.add("precision")
    keep = [i for i, column in enumerate(columns) if column not in left_out]
    return (
        tuple(columns[i] for i in keep),
        tuple(tuple(row[i] for i in keep) for row in rows),
        sum(i < FLEET_TEXTS + 2 for i in keep),
    )


def sharding_text(pool: Pool) -> str:
    """Sharding, with its layout where it is not the usual one."""
    return pool.sharding if pool.layout == "1d" else f"{pool.sharding} {pool.layout}"


def limits_text(pool: Pool) -> str:
    """Sequences and tokens of a step, at most."""
    return f"{pool.max_num_seqs:,} / {pool.max_num_batched_tokens:,}"


def binding_text(fleet: PlannedFleet) -> str:
    """What gives way above the planned rate, of each pool where there are several.

    >>> from types import SimpleNamespace as Of
    >>> binding_text(Of(pools=[Of(role="unified", binding=["tpot_s p95", "capacity"])]))
    'TPOT p95; capacity'
    """
    alone = len(fleet.pools) == 1
    return "; ".join(("" if alone else f"{p.role}: ") + "; ".join(map(words, p.binding)) for p in fleet.pools)


def words(text: str) -> str:
    """A remark of the search with latencies named as people do.

    >>> words("relax to e2e_s <= 2.5 s")
    'relax to E2E ≤ 2.5 s'
    >>> words("ttft_s within the joint share")
    'TTFT (joint share)'
    """
    for name in METRICS:
        text = text.replace(name, metric_text(name))
    return text.replace("<=", "≤").replace(" within the joint share", " (joint share)")


def metric_text(name: str) -> str:
    """A latency's name for people."""
    return name.removesuffix("_s").upper()


def target_text(target: Target) -> str:
    """A limit for people.

    >>> target_text(Target(metric="ttft_s", limit_s=0.5, percentile=95))
    'TTFT ≤ 500 ms for 95 %'
    """
    share = "" if target.percentile is None else f" for {target.percentile:g} %"
    return f"{metric_text(target.metric)} ≤ {seconds(target.limit_s)}{share}"


def targets_text(targets: Targets) -> str:
    """All targets for people."""
    if not targets.limits:
        return "no latency limits"
    limits = ", ".join(target_text(t) for t in targets.limits)
    joint = "" if targets.joint_fraction is None else f"; {100 * targets.joint_fraction:g} % of requests keep all"
    return limits + joint


def rate_text(qps: float) -> str:
    """A rate with all its digits.

    >>> rate_text(1_234_567.0), rate_text(0.25)
    ('1,234,567', '0.25')
    """
    return f"{qps:,.10g}"


def provisioning_text(p: Provisioning) -> str:
    """What a fleet is built for beyond the mean rate."""
    peak = (
        "The rate is that of the busiest hour"
        if p.peak_to_mean == 1
        else f"The busiest hour has {p.peak_to_mean:g} times the mean rate"
    )
    parts = [peak, f"{100 * p.headroom_fraction:g} % of each replica's rate is left free"]
    if p.spare_replicas:
        parts.append(f"{p.spare_replicas} spare replica{'s' * (p.spare_replicas > 1)} of each pool")
    if p.failed_fraction:
        parts.append(f"{100 * p.failed_fraction:g} % of the slices may be down")
    return "; ".join(parts) + "."


def fleet_sentence(fleet: PlannedFleet) -> str:
    """A fleet in one sentence."""
    pools = " and ".join(
        f"{p.replicas:,} {'' if p.role == 'unified' else p.role + ' '}replica{'s' * (p.replicas != 1)} on {p.slice}, {p.precision}, "
        f"{sharding_text(p)}, at most {p.max_num_seqs:,} sequences and {p.max_num_batched_tokens:,} tokens a step"
        for p in fleet.pools
    )
    return f"{fleet.chips:,} chips: {pools}."


def scaled_rows(plan: Plan, fleet: PlannedFleet) -> list[tuple[str, ...]]:
    """Rate, replicas, chips and dollars an hour of the planned fleet grown or shrunk to other rates, its own among them.

    Replicas get the rate that each was planned for, spares by the same rule; another fleet may be cheaper there.
    """
    p = plan.provisioning
    rows: list[tuple[str, ...]] = []
    for qps in sorted({*map(float, RATES_PER_S), p.qps}):
        counts = [with_spares(p, math.ceil(pool.needed_replicas * qps / p.qps * (1 - 1e-12))) for pool in fleet.pools]
        chips = sum(n * pool.chips_per_replica for n, pool in zip(counts, fleet.pools, strict=True))
        alike = len({pool.chip for pool in fleet.pools}) == 1
        hourly = fleet.usd_per_hour * chips / fleet.chips if alike and fleet.usd_per_hour is not None else None
        rows.append(
            (
                rate_text(qps),
                " + ".join(f"{n:,}" for n in counts),
                f"{chips:,}",
                usd(hourly),
            )
        )
    return rows
