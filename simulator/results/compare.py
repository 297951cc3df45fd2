"""What differs between two results, and by how much."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from simulator.results.store import Result
from simulator.results.summary import ParameterInterval
from simulator.results.tables import REQUEST_COLUMNS


@dataclass(frozen=True)
class Difference:
    """One entry that differs; ``absolute`` = b − a and ``relative`` = b/a − 1 where both are numbers."""

    path: str
    a: Any
    b: Any
    absolute: float | None = None
    relative: float | None = None


@dataclass(frozen=True)
class ColumnDifference:
    """One column of the requests table, joined by request index."""

    column: str
    rows: int
    """Rows in which it differs."""
    max_absolute: float
    max_relative: float
    """Largest |b − a|/|a| over rows with a ≠ 0."""
    first_row: int


@dataclass(frozen=True)
class Comparison:
    """Everything that differs; equal results have empty lists."""

    scenario: list[Difference]
    summary: list[Difference]
    requests: list[ColumnDifference]
    rows_a: int
    rows_b: int
    versions: list[Difference]
    intervals: list[tuple[str, ParameterInterval, ParameterInterval]]
    """Summary path, interval of the parameters in a and in b; empty unless both have them."""

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return self.rows_a == self.rows_b and not (self.scenario or self.summary or self.requests or self.versions)


def compare_results(a: Result, b: Result) -> Comparison:
    """Compare two results figure by figure, and request by request where both have the row."""
    rows_a, rows_b = len(a.requests["request"]), len(b.requests["request"])
    common = min(rows_a, rows_b)
    columns = []
    for column in REQUEST_COLUMNS:
        left, right = a.requests[column.name][:common], b.requests[column.name][:common]
        differs = left != right
        if column.nullable:
            differs &= ~(np.isnan(left) & np.isnan(right))
        if not differs.any():
            continue
        x, y = left[differs].astype(np.float64), right[differs].astype(np.float64)
        both = ~(np.isnan(x) | np.isnan(y))
        gap = np.abs(y - x)[both]
        scale = np.abs(x)[both]
        columns.append(
            ColumnDifference(
                column=column.name,
                rows=int(differs.sum()),
                max_absolute=float(gap.max(initial=0.0)),
                max_relative=float((gap[scale > 0] / scale[scale > 0]).max(initial=0.0)),
                first_row=int(np.argmax(differs)),
            )
        )
    return Comparison(
        scenario=list(differences(a.scenario, b.scenario)),
        summary=list(differences(a.summary.model_dump(mode="json"), b.summary.model_dump(mode="json"))),
        requests=columns,
        rows_a=rows_a,
        rows_b=rows_b,
        versions=list(differences(dict(a.versions), dict(b.versions))),
        intervals=_intervals(a, b),
    )


def _intervals(a: Result, b: Result) -> list[tuple[str, ParameterInterval, ParameterInterval]]:
    first, second = a.summary.intervals, b.summary.intervals
    if first is None or second is None:
        return []
    return [(path, x, second.figures[path]) for path, x in first.figures.items() if path in second.figures]


def differences(a: Any, b: Any, path: str = "") -> Iterator[Difference]:
    """Leaves that differ between two trees of mappings and lists.

    >>> [(d.path, d.relative) for d in differences({"x": {"y": 2.0}}, {"x": {"y": 3.0}})]
    [('x.y', 0.5)]
    """
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in list(a) + [k for k in b if k not in a]:
            yield from differences(a.get(key), b.get(key), f"{path}.{key}" if path else str(key))
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from differences(x, y, f"{path}[{i}]")
    elif a != b:
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in (a, b))
        yield Difference(
            path,
            a,
            b,
            absolute=b - a if numbers else None,
            relative=b / a - 1 if numbers and a else None,
        )
