"""What the catalogue's TOML files may say: frozen, validated records.

A number in a file carries its provenance (:class:`Quantity`); everything else in the package reads the SI values
through the properties below. Field errors are re-raised by the loader with file and field.
"""

from collections.abc import Iterator
from datetime import date
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator

from simulator.errors import UnpriceableError
from simulator.units import to_si


class Record(BaseModel):
    """Base of every catalogue record: frozen, no unknown fields, no NaN. Files are read strictly (``files.parse``)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Kind = Literal["datasheet", "measured", "derived", "assumed", "recalled", "not_published"]


class Quantity(Record):
    """One number with its unit and where it comes from.

    ``source`` is a key of ``hardware_specs/sources.toml``. ``recalled`` numbers are ±5 % until checked;
    ``not_published`` numbers have no value, and asking for one is an error that names it.
    """

    value: float | None = None
    unit: str
    source: str
    locator: str = ""
    kind: Kind
    retrieved: date
    low: float | None = None
    high: float | None = None
    note: str = ""

    @model_validator(mode="after")
    def _value_matches_kind(self) -> "Quantity":
        if (self.value is None) != (self.kind == "not_published"):
            raise ValueError("a value is required unless kind = 'not_published', and then it must be absent")
        return self

    def si(self, what: str, dimension: str) -> float:
        """Return the value in the SI base unit of ``dimension``; ``what`` names it in errors."""
        if self.value is None:
            raise UnpriceableError(f"{what} is not published ({self.source}); it cannot be used in a cost")
        return to_si(self.value, self.unit, dimension=dimension)


def quantities_in(path: str, item: Any) -> Iterator[tuple[str, Quantity]]:
    """Every sourced number inside records and tables, by its dotted path."""
    if isinstance(item, Quantity):
        yield path, item
    elif isinstance(item, Record):
        yield from quantities_in(path, {k: getattr(item, k) for k in type(item).model_fields})
    elif isinstance(item, dict):
        for key, value in item.items():
            yield from quantities_in(f"{path}.{key}" if path else str(key), value)
