"""A reproduced number, and the one runner that pairs the published table with our calls.

The published side is a CSV file in ``data/``: one row a number, with the value as the source prints it, the value its own
formula gives at full precision, and a note. Our side is a function per row id. The runner refuses ids without a partner, so
neither side can lose a row unnoticed.
"""

import csv
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files

from simulator.errors import InputError


@dataclass(frozen=True)
class Row:
    """One published number and ours.

    Attributes
    ----------
    id, section, quantity, unit
        what it is; ``section`` groups rows in the printed table.
    printed
        as the source prints it; empty if it does not.
    expected
        the value at the digits the reference gives.
    ours
        what this package computes, in ``unit``.
    tolerance
        one unit in the last digit of ``expected``, because sources truncate as often as they round.
    note, source
        what a reader must know; where it was published.
    """

    id: str
    section: str
    quantity: str
    unit: str
    printed: str
    expected: float
    ours: float
    tolerance: float
    note: str
    source: str

    @property
    def holds(self) -> bool:
        """Whether ours equals the expected value to the last digit given."""
        return abs(self.ours - self.expected) <= self.tolerance

    @property
    def difference(self) -> float:
        """Relative difference of ours from the expected value."""
        return self.ours / self.expected - 1 if self.expected else self.ours


def last_digit(text: str) -> float:
    """Size of one unit in the last written digit.

    >>> last_digit("6.89"), last_digit("1.121e15"), last_digit("88622")
    (0.01, 1000000000000.0, 1.0)
    """
    mantissa, _, exponent = text.lower().partition("e")
    decimals = len(mantissa.partition(".")[2])
    return float(10.0 ** (int(exponent or 0) - decimals))


def reproduce_rows(table: str, ours: Mapping[str, Callable[[], float]]) -> list[Row]:
    """Pair ``data/<table>.csv`` with the functions that compute our side.

    Raises
    ------
    InputError
        If an id stands on one side only.
    """
    with (files("simulator.reproduction") / "data" / f"{table}.csv").open(encoding="utf-8") as file:
        published = list(csv.DictReader(file))
    ids = [item["id"] for item in published]
    if sorted(ids) != sorted(ours):
        odd = sorted(set(ids) ^ set(ours)) or sorted({i for i in ids if ids.count(i) > 1})
        raise InputError(f"reproduction table {table}: rows without a partner: {', '.join(odd)}")
    return [
        Row(
            id=item["id"],
            section=item["section"],
            quantity=item["quantity"],
            unit=item["unit"],
            printed=item["printed"],
            expected=float(item["expected"]),
            ours=float(ours[item["id"]]()),
            tolerance=last_digit(item["expected"]),
            note=item["note"],
            source=item["source"],
        )
        for item in published
    ]
