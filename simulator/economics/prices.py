"""Chip-seconds to dollars.

Two bases, never mixed. *Usage*: a query pays for the chip time it used (its busy chip-seconds). *Allocation*: idle
time is paid too, divided in proportion to use, so that the queries together pay for the whole fleet.
"""

from dataclasses import dataclass

from simulator.results.summary import Summary

_SECONDS_PER_HOUR = 3600.0


def chip_seconds_usd(chip_s: float, usd_per_chip_hour: float) -> float:
    """Price of chip time. [USD]

    >>> round(chip_seconds_usd(23.092719, 1.20), 5)  # an agent step on TPU v5e
    0.0077
    """
    return chip_s * usd_per_chip_hour / _SECONDS_PER_HOUR


@dataclass(frozen=True)
class Usage:
    """Chip time and tokens of a set of queries.

    Attributes
    ----------
    queries
        number of queries.
    prefill_chip_s, cached_chip_s, decode_chip_s
        chip time of prefill (recomputation after preemption included), within it of reading cached tokens, and of
        decoding; prefill + decode is all busy time. [chip-s]
    input_tokens, cached_tokens, output_tokens
        prompt tokens that were computed, prompt tokens that were cached, output tokens.
    """

    queries: int
    prefill_chip_s: float
    cached_chip_s: float
    decode_chip_s: float
    input_tokens: int
    cached_tokens: int
    output_tokens: int

    @property
    def busy_chip_s(self) -> float:
        """All busy time. [chip-s]"""
        return self.prefill_chip_s + self.decode_chip_s


def usage_of(summary: Summary) -> Usage:
    """Chip time and tokens of a run's finished queries."""
    counts, per_query = summary.requests, summary.chip_seconds_per_query
    queries = counts.finished
    return Usage(
        queries=queries,
        prefill_chip_s=per_query.prefill * queries,
        cached_chip_s=per_query.cached * queries,
        decode_chip_s=per_query.decode * queries,
        input_tokens=counts.prompt_tokens - counts.cached_tokens,
        cached_tokens=counts.cached_tokens,
        output_tokens=counts.output_tokens,
    )


@dataclass(frozen=True)
class UnitPrices:
    """Prices per query and per million tokens; None where there were no such tokens. [USD]"""

    per_query_usd: float
    per_million_input_tokens_usd: float | None
    per_million_cached_tokens_usd: float | None
    per_million_output_tokens_usd: float | None
    per_million_tokens_usd: float | None


def unit_prices(usage: Usage, usd_per_chip_hour: float, *, provisioned_chip_s: float | None = None) -> UnitPrices:
    """Prices on the usage basis, or on the allocation basis when ``provisioned_chip_s`` is given. [USD]

    Computed input tokens pay for prefill less the reading of cached KV, cached tokens for that reading, output tokens
    for decoding (the first output token, which prefill gives, rides free). On the allocation basis every price is
    scaled by provisioned ÷ busy time.

    >>> used = Usage(queries=10, prefill_chip_s=6.0, cached_chip_s=1.0, decode_chip_s=4.0,
    ...              input_tokens=1000, cached_tokens=500, output_tokens=100)
    >>> usage = unit_prices(used, 3.6)
    >>> [round(p, 12) for p in (usage.per_query_usd, usage.per_million_input_tokens_usd)]
    [0.001, 5.0]
    >>> [round(p, 12) for p in (usage.per_million_cached_tokens_usd, usage.per_million_output_tokens_usd)]
    [2.0, 40.0]
    >>> round(unit_prices(used, 3.6, provisioned_chip_s=20.0).per_query_usd, 12)
    0.002
    """
    busy = usage.busy_chip_s
    scale = 1.0 if provisioned_chip_s is None else provisioned_chip_s / busy

    def per_million(chip_s: float, tokens: int) -> float | None:
        return chip_seconds_usd(chip_s * scale, usd_per_chip_hour) / tokens * 1e6 if tokens else None

    return UnitPrices(
        per_query_usd=chip_seconds_usd(busy * scale, usd_per_chip_hour) / usage.queries,
        per_million_input_tokens_usd=per_million(usage.prefill_chip_s - usage.cached_chip_s, usage.input_tokens),
        per_million_cached_tokens_usd=per_million(usage.cached_chip_s, usage.cached_tokens),
        per_million_output_tokens_usd=per_million(usage.decode_chip_s, usage.output_tokens),
        per_million_tokens_usd=per_million(busy, usage.input_tokens + usage.cached_tokens + usage.output_tokens),
    )
