"""Tables of a scenario that say how a run is judged, priced and measured."""

from typing import Annotated

from pydantic import Field, model_validator

from simulator.catalog.records import Record
from simulator.economics.energy import IDLE_FRACTION

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
    """``[prices]``: what overrides the chip's own quote."""

    usd_per_chip_hour: Limit | None = None
    """None: the first quote of the chip's file."""
    usd_per_kwh: Annotated[float, Field(ge=0)] | None = None
    """Electricity; None leaves it out (rented chips include it)."""
    pue: Annotated[float, Field(ge=1)] = 1.0
    """Facility energy ÷ chip energy."""
    idle_power_fraction: Annotated[float, Field(ge=0, le=1)] = IDLE_FRACTION
    """Share of TDP drawn between steps; assumed. A chip file's own idle power goes before it."""


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
