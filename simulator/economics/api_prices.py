"""When serving a model oneself costs what an API asks.

A fleet costs the same per hour whatever it serves; an API charges by the token. So they cost the same at one rate of queries,

    qps = (chips · USD per chip-hour ÷ 3600) ÷ (API price of a query),

whatever the fleet's efficiency, if it can serve that rate at all; above it the fleet is cheaper. Seen from the chip: at the share of time in
use at which the price of a query with idle time (allocation) equals the API's, u = (price of its use alone) ÷ (API price).
"""

from dataclasses import dataclass

from simulator.economics.prices import Usage, chip_seconds_usd, usage_of
from simulator.errors import InputError, UnpriceableError
from simulator.results.summary import Summary


@dataclass(frozen=True)
class ApiPrices:
    """What an API asks per million tokens. [USD]

    Attributes
    ----------
    input_usd, output_usd
        of prompt tokens that were not cached, and of output tokens.
    cached_usd
        of cached prompt tokens; None: as other input.
    """

    input_usd: float
    output_usd: float
    cached_usd: float | None = None

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("input_usd", "output_usd", "cached_usd"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise InputError(
                    f"API price {name} = {value}: must be finite and not negative [USD per million tokens]"
                )

    def bill_usd(self, *, input_tokens: float, cached_tokens: float, output_tokens: float) -> float:
        """Bill for these tokens. [USD]

        >>> ApiPrices(0.5, 1.5, 0.05).bill_usd(input_tokens=8192, cached_tokens=122_880, output_tokens=128)
        0.010432
        """
        cached = self.input_usd if self.cached_usd is None else self.cached_usd
        micro = input_tokens * self.input_usd + cached_tokens * cached + output_tokens * self.output_usd
        return micro / 1e6


@dataclass(frozen=True)
class BreakEven:
    """Where own serving and an API cost the same.

    Attributes
    ----------
    api_usd_per_query
        of these queries, on average.
    usage_usd_per_query
        own price of the chip time they used, idle time left out.
    allocation_usd_per_query
        own price with the run's idle time.
    queries_per_s
        rate from which on the fleet is cheaper.
    load
        that rate ÷ the fleet's capacity; None where the capacity is not known. Above 1 the fleet cannot serve it.
    busy_fraction
        share of chip time in use at break-even, if a query used the same chip time then. (It uses more when batches are
        smaller, so ``load`` is the firmer figure.)
    usd_per_chip_hour
        price of a chip at which the run as it was costs what the API asks.
    """

    api_usd_per_query: float
    usage_usd_per_query: float
    allocation_usd_per_query: float
    queries_per_s: float
    load: float | None
    busy_fraction: float
    usd_per_chip_hour: float

    @property
    def own_is_cheaper(self) -> bool:
        """Whether the run, as it was, costs less than the API."""
        return self.allocation_usd_per_query < self.api_usd_per_query

    @property
    def reachable(self) -> bool:
        """Whether the fleet can serve the rate at which it breaks even."""
        return self.busy_fraction <= 1 if self.load is None else self.load <= 1


def break_even(
    usage: Usage,
    api: ApiPrices,
    usd_per_chip_hour: float,
    *,
    chips: int,
    provisioned_chip_s: float,
    capacity_per_s: float | None = None,
) -> BreakEven:
    """Compare a run with an API.

    Parameters
    ----------
    usage
        chip time and tokens of the run's queries.
    chips, provisioned_chip_s
        of the fleet; chips × time of the run. [chip-s]
    capacity_per_s
        queries the fleet can serve per second.

    Eight chips at 3.60 an hour, 0.5 busy chip-seconds a query, an API at 0.001 a query: the fleet costs 0.008 a second, so 8 queries
    a second pay for it, and half of its time is then in use.

    >>> used = Usage(queries=1000, prefill_chip_s=200.0, cached_chip_s=0.0, decode_chip_s=300.0,
    ...              input_tokens=1_000_000, cached_tokens=0, output_tokens=500_000)
    >>> found = break_even(used, ApiPrices(0.5, 1.0), 3.6, chips=8, provisioned_chip_s=2000.0, capacity_per_s=12.8)
    >>> round(found.api_usd_per_query, 9), round(found.queries_per_s, 9), round(found.busy_fraction, 9), round(found.load, 9)
    (0.001, 8.0, 0.5, 0.625)

    Raises
    ------
    InputError
        If the API asks nothing for these queries.
    """
    api_usd = (
        api.bill_usd(
            input_tokens=usage.input_tokens, cached_tokens=usage.cached_tokens, output_tokens=usage.output_tokens
        )
        / usage.queries
    )
    if not api_usd > 0:
        raise InputError("the API asks nothing for these queries: there is no rate at which a fleet costs the same")
    rate = chip_seconds_usd(chips, usd_per_chip_hour) / api_usd
    busy, provisioned = usage.busy_chip_s / usage.queries, provisioned_chip_s / usage.queries
    return BreakEven(
        api_usd_per_query=api_usd,
        usage_usd_per_query=chip_seconds_usd(busy, usd_per_chip_hour),
        allocation_usd_per_query=chip_seconds_usd(provisioned, usd_per_chip_hour),
        queries_per_s=rate,
        load=None if capacity_per_s is None else rate / capacity_per_s,
        busy_fraction=chip_seconds_usd(busy, usd_per_chip_hour) / api_usd,
        usd_per_chip_hour=api_usd / provisioned * 3600,
    )


def break_even_of(summary: Summary, api: ApiPrices) -> BreakEven:
    """Compare a run, as its summary has it, with an API.

    Raises
    ------
    UnpriceableError
        If the run has no price.
    """
    if summary.prices is None:
        raise UnpriceableError(f"{summary.scenario}: the run has no price to compare with")
    return break_even(
        usage_of(summary),
        api,
        summary.prices.usd_per_chip_hour,
        chips=summary.ledger.chips,
        provisioned_chip_s=summary.ledger.chip_s,
        capacity_per_s=summary.load.capacity_per_s,
    )
