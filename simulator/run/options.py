"""Tables of a scenario that say how a run is judged, priced and measured."""

from typing import Annotated

from pydantic import Field, field_validator, model_validator

from simulator.catalog.price_book import NO_PRICES, PriceFile
from simulator.catalog.records import Record
from simulator.economics import OWNED, TERMS
from simulator.errors import nearest

Limit = Annotated[float, Field(gt=0)]


class SloOptions(Record):
    """``[slo]``: limits every request should meet, and the share of requests that must."""

    ttft_s: Limit | None = None
    """Time to first token at most. [s]"""
    tpot_s: Limit | None = None
    """Time per output token at most; a one-token output meets any. [s]"""
    e2e_s: Limit | None = None
    """End-to-end latency at most. [s]"""
    percentile: Annotated[float, Field(gt=0, le=100)] = 99.0
    """Percent of requests that must meet all limits."""

    @property
    def limits(self) -> dict[str, float]:
        """The limits that are set, by the latency they bound."""
        named = {"ttft_s": self.ttft_s, "tpot_s": self.tpot_s, "e2e_s": self.e2e_s}
        return {name: limit for name, limit in named.items() if limit is not None}


class PriceOptions(Record):
    """``[prices]``: which prices apply, and what overrides the catalogue's.

    A file may also write ``file = "prices.toml"``; its contents take the place of the name when the scenario is read.
    """

    usd_per_chip_hour: Limit | None = None
    """Price of a chip by hand. None: the first quote of the price file or the chip's file."""
    term: str | None = None
    """How chips are paid for: on-demand, reserved-1y, reserved-3y, spot, capacity-block, market or owned."""
    provider: str | None = None
    """Part of a provider's name; None: any."""
    region: str | None = None
    """Whose electricity and grid; None: the world's grid, and no electricity bill (rented chips include it)."""
    operator: str | None = None
    """Who runs the building, for its PUE; None: one that is not named."""
    usd_per_kwh: Annotated[float, Field(ge=0)] | None = None
    """Electricity by hand."""
    gco2_per_kwh: Annotated[float, Field(ge=0)] | None = None
    """Carbon intensity by hand. [g CO2e/kWh]"""
    pue: Annotated[float, Field(ge=1)] | None = None
    """Facility energy ÷ IT energy by hand."""
    idle_power_fraction: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of TDP drawn between steps. None: the catalogue's. A chip file's own idle power goes before it."""
    host_power_fraction: Annotated[float, Field(ge=0, le=10)] | None = None
    """Power of the server around a chip ÷ TDP. None: the catalogue's."""
    book: PriceFile = NO_PRICES
    """The user's price file."""

    @field_validator("term")
    @classmethod
    def _known(cls, term: str | None) -> str | None:
        if term is not None and term not in TERMS:
            raise ValueError(f"unknown term{nearest(term, TERMS)}")
        return term

    @model_validator(mode="after")
    def _one_price(self) -> "PriceOptions":
        if self.usd_per_chip_hour is not None and (self.term or self.provider):
            raise ValueError("usd_per_chip_hour and a term or provider say two things; leave one of them out")
        return self

    @property
    def wants_electricity(self) -> bool:
        """Whether the scenario says whose electricity is paid."""
        return self.region is not None or self.usd_per_kwh is not None or self.term == OWNED


class RunOptions(Record):
    """``[run]``: the seed and the cuts of the measured window."""

    seed: Annotated[int, Field(ge=0)] = 1
    seeds: Annotated[int, Field(ge=1)] = 1
    """Replications, with seeds ``seed``, ``seed`` + 1, …, for between-seed intervals."""
    interval: Annotated[float, Field(gt=0, lt=100)] | None = None
    """Percent of draws of the calibrated parameters that an interval of each headline figure holds, e.g. 80; None: no intervals."""
    interval_draws: Annotated[int, Field(ge=16, le=4096)] | None = None
    """Draws of an interval; None: 64."""
    summary_only: bool = False
    """Keep no row per request: memory does not grow with their number, percentiles are within 0.4 %."""
    warm_up_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the arrival span at its start that is left out of the statistics."""
    drain_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the arrival span at its end that is left out."""

    @model_validator(mode="after")
    def _leave_something(self) -> "RunOptions":
        if self.interval_draws is not None and self.interval is None:
            raise ValueError(f"interval_draws = {self.interval_draws}: only with an interval")
        if self.warm_up_fraction + self.drain_fraction >= 1:
            raise ValueError("warm_up_fraction and drain_fraction leave nothing to measure")
        return self
