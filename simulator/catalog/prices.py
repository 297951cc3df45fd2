"""What a chip's file says about money: quotes for renting one, and what buying one takes."""

from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveFloat, model_validator

from simulator.catalog.records import Kind, Quantity, Record
from simulator.errors import UnpriceableError

Term = Literal["on-demand", "reserved-1y", "reserved-3y", "spot", "capacity-block", "market"]
"""How a chip is rented. ``capacity-block``: a fixed window booked ahead; ``market``: an index over several providers."""
ProviderKind = Literal["hyperscaler", "specialist", "index", "own"]


def in_unit(unit: str, least: float, most: float) -> Callable[[Quantity], Quantity]:
    """Check that a quantity is stated in ``unit``, lies within bounds that only a slip would leave, and low ≤ value ≤ high."""

    def check(quantity: Quantity) -> Quantity:
        if quantity.unit != unit:
            raise ValueError(f"unit {quantity.unit!r}: write {unit!r}")
        if quantity.value is None:
            return quantity
        if not least <= quantity.value <= most:
            raise ValueError(f"{quantity.value:g} {unit} is not plausible: allowed {least:g} to {most:g}")
        _ordered(quantity.low, quantity.value, quantity.high)
        return quantity

    return check


def _ordered(low: float | None, value: float, high: float | None) -> None:
    if not (value if low is None else low) <= value <= (value if high is None else high):
        raise ValueError(f"value {value:g} lies outside low {low} … high {high}")


Usd = Annotated[Quantity, AfterValidator(in_unit("USD", 0, 1e6))]


class PriceQuote(Record):
    """What somebody asked for one chip for an hour, and when."""

    usd_per_hour: PositiveFloat | None = None
    """Absent where the kind is ``not_published``; using such a quote is refused by name."""
    currency: Literal["USD"] = "USD"
    provider: str
    provider_kind: ProviderKind
    region: str = ""
    term: Term
    date: str = Field(pattern=r"^\d{4}(-\d{2}(-\d{2})?)?$")
    """Year, month or day on which the price was seen."""
    source: str
    locator: str = ""
    kind: Kind
    low: PositiveFloat | None = None
    high: PositiveFloat | None = None
    note: str = ""

    @model_validator(mode="after")
    def _value_matches_kind(self) -> "PriceQuote":
        if (self.usd_per_hour is None) != (self.kind == "not_published"):
            raise ValueError("usd_per_hour is required unless kind = 'not_published', and then it must be absent")
        if self.usd_per_hour is not None:
            _ordered(self.low, self.usd_per_hour, self.high)
        return self

    @property
    def usd_per_chip_hour(self) -> float:
        """The price. [USD/h]

        Raises
        ------
        UnpriceableError
            If it is not published.
        """
        if self.usd_per_hour is None:
            raise UnpriceableError(f"the {self.term} price of {self.provider} is not published ({self.source})")
        return self.usd_per_hour


class OwnershipSpec(Record):
    """What buying one chip takes; a part that is absent follows from the shares that all owners have."""

    chip: Usd
    host: Usd | None = None
    """The chip's share of its server: CPUs, memory, chassis, adapters."""
    network: Usd | None = None
    """Its share of switches and cables beyond the server."""
