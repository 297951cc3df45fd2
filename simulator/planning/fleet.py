"""From deployments that keep the targets to a fleet: replicas, prices, and the waterfall between the roofline and the bill."""

from collections.abc import Sequence

from simulator.catalog.chips import ChipSpec
from simulator.economics import ChipPrice, chip_price, price_by_hand
from simulator.errors import UnpriceableError
from simulator.planning.options import PlanOptions
from simulator.planning.search import Found
from simulator.results.plan import PlannedFleet, Pool, Provisioning, Role, WaterfallStep
from simulator.run.resolve import site_of
from simulator.run.scenario import Scenario

SECONDS_PER_HOUR = 3600.0


def price_of(chip: ChipSpec, name: str, template: Scenario, options: PlanOptions) -> ChipPrice | None:
    """Price of a chip for an hour; None without one. [USD]

    A price stated for the plan goes first, then that of the template's ``[prices]``: by hand for its own chip, or under its term,
    provider and price file for any.

    Raises
    ------
    InputError
        If the template's term or provider is unknown.
    """
    for key in (name, chip.name):
        if key in options.usd_per_chip_hour:
            return price_by_hand(chip.name, options.usd_per_chip_hour[key])
    prices = template.prices
    own = template.slice.rpartition(":")[0] in {name, chip.name}
    if own and prices.usd_per_chip_hour is not None:
        return price_by_hand(chip.name, prices.usd_per_chip_hour)
    site = site_of(template)
    try:
        return chip_price(chip, prices.term, provider=prices.provider, book=prices.book, site=site)
    except UnpriceableError:
        return None


def pool(
    found: Found,
    role: Role = "unified",
    *,
    needed: int | None = None,
    replicas: int | None = None,
    share: float = 1.0,
) -> Pool:
    """A deployment as a pool of a planned fleet; ``share`` of the queries come there."""
    settings, rated, place = found.resolved.settings, found.rated, found.place
    return Pool(
        role=role,
        chip=found.resolved.slice.chip.name,
        slice=place.slice,
        chips_per_replica=found.resolved.cost.chips,
        sharding=str(place.sharding),
        layout=place.layout,
        precision=place.precision,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        num_kv_blocks=settings.num_kv_blocks,
        saturated_per_s=rated.saturated_per_s / share,
        rate_per_s=rated.rate_per_s / share,
        load=rated.rate_per_s / rated.saturated_per_s,
        binding=list(rated.binding),
        needed_replicas=found.needed if needed is None else needed,
        replicas=found.replicas if replicas is None else replicas,
        latency=found.latency,
    )


def planned_fleet(
    pools: Sequence[Pool], provisioning: Provisioning, prices: Sequence[ChipPrice | None]
) -> PlannedFleet:
    """Pools with their prices, one each; without one of them there is no price of the whole."""
    chips = sum(p.chips for p in pools)
    known = [price for price in prices if price is not None]
    priced = len(known) == len(pools)

    def per_hour(usd: Sequence[float]) -> float | None:
        return sum(p.chips * x for p, x in zip(pools, usd, strict=True)) if priced else None

    usd_per_hour = per_hour([price.usd_per_chip_hour for price in known])
    return PlannedFleet(
        kind="unified" if len(pools) == 1 else "disaggregated",
        pools=list(pools),
        chips=chips,
        replicas=sum(p.replicas for p in pools),
        chip_seconds_per_query=chips / provisioning.qps,
        usd_per_chip_hour=known[0].usd_per_chip_hour if priced else None,
        usd_per_hour=usd_per_hour,
        low_usd_per_hour=per_hour([price.low or price.usd_per_chip_hour for price in known]),
        high_usd_per_hour=per_hour([price.high or price.usd_per_chip_hour for price in known]),
        usd_per_query=None if usd_per_hour is None else usd_per_hour / (provisioning.qps * SECONDS_PER_HOUR),
        price_source="; ".join(dict.fromkeys(price.text for price in known)),
    )


def waterfall(pools: Sequence[Pool], provisioning: Provisioning, ideal_chip_s: float) -> list[WaterfallStep]:
    """Factors from the ideal roofline to the fleet; their product times the ideal is the fleet's chips ÷ mean rate."""
    saturated = sum(p.chips_per_replica / p.saturated_per_s for p in pools)
    rated = sum(p.chips_per_replica / p.rate_per_s for p in pools)
    needed = sum(p.chips_per_replica * p.needed_replicas for p in pools)
    margin = 1 / (1 - provisioning.headroom_fraction)
    factors = [
        (
            "efficiency",
            saturated / ideal_chip_s,
            "kernels, links and overheads at full load, against every efficiency at 1",
        ),
        ("queueing headroom", rated / saturated, "running below saturation, so that latencies keep the targets"),
        ("safety margin", margin, "part of that rate left free even at the peak"),
        ("daily peak", provisioning.peak_to_mean, "built for the busiest hour, paid for all day"),
        ("whole replicas", needed / (provisioning.peak_qps * rated * margin), "no fractions of a slice"),
        ("redundancy", sum(p.chips for p in pools) / needed, "spares, and slices that are down"),
    ]
    at = ideal_chip_s
    steps = [
        WaterfallStep(
            name="ideal roofline",
            factor=1.0,
            chip_s_per_query=at,
            meaning="a query alone at efficiency 1, its decode steps shared as in a saturated replica",
        )
    ]
    for name, factor, meaning in factors:
        at *= factor
        steps.append(WaterfallStep(name=name, factor=factor, chip_s_per_query=at, meaning=meaning))
    return steps
