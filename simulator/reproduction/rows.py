"""A reproduced number, and the one runner that pairs a published table with our calls.

The published side is a CSV file in ``data/``: one row a number, with the value as the source prints it, the value its own
formula gives at full precision, how ours is judged, and a note. Our side is a function per row id. The runner refuses ids
without a partner, so neither side can lose a row unnoticed. The kinds are explained in ``docs/reproductions.md``.
"""

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from statistics import median
from typing import Literal, cast, get_args

from simulator.errors import InputError, UnpriceableError, nearest

RowKind = Literal["exact", "tolerance", "bound", "reported"]
Verdict = Literal["held", "missed", "reported", "not priced"]
Published = Mapping[str, str]
"""One row of a published table, column by column; some tables have columns of their own."""
Ours = Mapping[str, Callable[[], float]]


@dataclass(frozen=True)
class Row:
    """One published number and ours.

    Attributes
    ----------
    id, section, quantity, unit
        what it is; ``section`` groups rows in the printed table.
    kind
        ``exact``: ours is the expected value to the last digit given. ``tolerance``: within a relative tolerance.
        ``bound``: ours is a bound the published measurement may not pass, so not below it. ``reported``: the error
        is shown and judged by the reader.
    printed
        as the source prints it; empty if it does not.
    expected
        the value at the digits the reference gives.
    ours
        what this package computes, in ``unit``; None if it refuses to.
    tolerance
        allowed distance, in ``unit``: for ``exact`` rows one in the last digit of ``expected``, because sources truncate
        as often as they round; infinite where nothing is judged.
    note, source
        what a reader must know; where it was published.
    unpriced
        why there is no value of ours; empty if there is one.
    """

    id: str
    section: str
    quantity: str
    unit: str
    kind: RowKind
    printed: str
    expected: float
    ours: float | None
    tolerance: float
    note: str
    source: str
    unpriced: str = ""

    @property
    def holds(self) -> bool:
        """Whether ours is where the kind of row wants it; never for a row without a value."""
        if self.ours is None:
            return False
        if self.kind == "bound":
            return self.ours >= self.expected
        return abs(self.ours - self.expected) <= self.tolerance

    @property
    def verdict(self) -> Verdict:
        """What is said of the row."""
        if self.ours is None:
            return "not priced"
        if self.kind == "reported":
            return "reported"
        return "held" if self.holds else "missed"

    @property
    def difference(self) -> float:
        """Relative difference of ours from the expected value; NaN without ours."""
        if self.ours is None:
            return float("nan")
        return self.ours / self.expected - 1 if self.expected else self.ours


@dataclass(frozen=True)
class Tally:
    """A table in one line."""

    rows: int
    held: int
    missed: int
    reported: int
    unpriced: int
    median_error: float | None
    """Median of |difference| over the reported rows; None without any."""


def tally(rows: Sequence[Row]) -> Tally:
    """Count the verdicts of a table."""
    verdicts = [row.verdict for row in rows]
    errors = [abs(row.difference) for row in rows if row.verdict == "reported"]
    return Tally(
        rows=len(rows),
        held=verdicts.count("held"),
        missed=verdicts.count("missed"),
        reported=len(errors),
        unpriced=verdicts.count("not priced"),
        median_error=median(errors) if errors else None,
    )


def last_digit(text: str) -> float:
    """Size of one unit in the last written digit.

    >>> last_digit("6.89"), last_digit("1.121e15"), last_digit("88622")
    (0.01, 1000000000000.0, 1.0)
    """
    mantissa, _, exponent = text.lower().partition("e")
    decimals = len(mantissa.partition(".")[2])
    return float(10.0 ** (int(exponent or 0) - decimals))


def read_published(table: str) -> list[dict[str, str]]:
    """Read ``data/<table>.csv``: one mapping a row; a row of several kinds becomes as many, ids ending in the kind.

    Raises
    ------
    InputError
        If a kind is unknown, a relative tolerance is missing, or an id appears twice.
    """
    with (files("simulator.reproduction") / "data" / f"{table}.csv").open(encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    rows: list[dict[str, str]] = []
    for item in found:
        kinds = item["kind"].split()
        for kind in kinds:
            if kind not in get_args(RowKind):
                raise InputError(f"reproduction table {table}: {item['id']}: kind {kind!r}{nearest(kind, _kinds())}")
            if kind == "tolerance" and not item["tolerance"]:
                raise InputError(f"reproduction table {table}: {item['id']}: a tolerance row states its tolerance")
            several = {
                "id": f"{item['id']}.{kind}",
                "quantity": item["quantity"] + (", bound" if kind == "bound" else ""),
            }
            rows.append(item | {"kind": kind} | (several if len(kinds) > 1 else {}))
    twice = sorted({row["id"] for row in rows if sum(row["id"] == other["id"] for other in rows) > 1})
    if twice:
        raise InputError(f"reproduction table {table}: two rows each: {', '.join(twice)}")
    return rows


def reproduce_rows(table: str, ours: Ours) -> list[Row]:
    """Pair ``data/<table>.csv`` with the functions that compute our side.

    Raises
    ------
    InputError
        If an id stands on one side only.
    """
    published = read_published(table)
    odd = sorted({item["id"] for item in published} ^ set(ours))
    if odd:
        raise InputError(f"reproduction table {table}: rows without a partner: {', '.join(odd)}")
    return [_pair(item, ours[item["id"]]) for item in published]


def _pair(item: Published, ours: Callable[[], float]) -> Row:
    kind = cast("RowKind", item["kind"])
    expected = float(item["expected"])
    tolerance = {
        "exact": lambda: last_digit(item["expected"]),
        "tolerance": lambda: float(item["tolerance"]) * abs(expected),
    }.get(kind, lambda: float("inf"))()
    value, unpriced = None, ""
    try:
        value = float(ours())
    except UnpriceableError as refused:
        unpriced = str(refused)
    return Row(
        id=item["id"],
        section=item["section"],
        quantity=item["quantity"],
        unit=item["unit"],
        kind=kind,
        printed=item["printed"],
        expected=expected,
        ours=value,
        tolerance=tolerance,
        note=item["note"],
        source=item["source"],
        unpriced=unpriced,
    )


def _kinds() -> tuple[str, ...]:
    return get_args(RowKind)
