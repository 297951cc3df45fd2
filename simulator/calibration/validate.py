"""Every measurement of a table through the simulator, and how far off the predictions are.

An error is prediction ÷ measurement − 1. Tables of errors have, by metric and by whatever the rows are grouped by, the number of rows,
median, mean and 90th percentile of its size, and its median with the sign: a bias.
"""

import multiprocessing
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np

from simulator.calibration.harness import Prediction, predict
from simulator.calibration.measurements import Measurement
from simulator.calibration.tables import Data, Unsupported
from simulator.catalog.engines import EngineProfile
from simulator.errors import ChipsecondsError

#: Engine name -> profile to use instead of the catalogue's.
Profiles = Mapping[str, EngineProfile]


@dataclass(frozen=True)
class Validated:
    """One measurement beside its prediction."""

    measurement: Measurement
    predicted: Prediction

    @property
    def errors(self) -> dict[str, float]:
        """Metric -> prediction ÷ measurement − 1, of the metrics that both have."""
        return {k: self.predicted[k] / v - 1 for k, v in self.measurement.measured.items() if k in self.predicted}


@dataclass(frozen=True)
class Validation:
    """All rows of some tables: those that were simulated, and those that were not, with the reason."""

    rows: tuple[Validated, ...]
    unsupported: tuple[Unsupported, ...]

    @property
    def coverage(self) -> float:
        """Rows simulated ÷ rows."""
        total = len(self.rows) + len(self.unsupported)
        return len(self.rows) / total if total else float("nan")


@dataclass(frozen=True)
class ErrorSummary:
    """Errors of one metric over some rows."""

    metric: str
    rows: int
    median: float
    mean: float
    p90: float
    bias: float


def validate(
    data: Data,
    *,
    profiles: Profiles | None = None,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Validation:
    """Simulate every measurement.

    Parameters
    ----------
    profiles
        engine name -> profile; engines that are not named use the catalogue's.
    workers
        processes. The result does not depend on it.
    progress
        called with rows done and rows in all.
    """
    from simulator.engine import compiled, jit  # noqa: PLC0415  # numba takes a while to import

    if jit.is_compiled_mode() and not jit.is_warm():
        compiled.warm_up()
    used = dict(profiles or {})
    # Rows of one deployment stay together: its kernels are priced once per process.
    order = sorted(range(len(data.measurements)), key=lambda i: _deployment_key(data.measurements[i]))
    parts = _parts([data.measurements[i] for i in order], CHUNK)
    found: list[Prediction | str] = []
    if workers <= 1:
        for part in parts:
            found += _predict_all(part, used)
            if progress:
                progress(len(found), len(order))
    else:
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            for results in pool.map(_predict_all, parts, [used] * len(parts)):
                found += results
                if progress:
                    progress(len(found), len(order))
    by_row = dict(zip(order, found, strict=True))
    rows, refused = [], list(data.unsupported)
    for i, measurement in enumerate(data.measurements):
        match by_row[i]:
            case str(reason):
                refused.append(Unsupported(measurement.id, measurement.table, reason))
            case prediction:
                rows.append(Validated(measurement, prediction))
    return Validation(tuple(rows), tuple(refused))


CHUNK = 64
"""Rows handed to a process at a time."""


def _deployment_key(m: Measurement) -> tuple[str, ...]:
    return m.chip, m.model, m.precision, *map(str, m.pools)


def _parts(rows: Sequence[Measurement], size: int) -> list[list[Measurement]]:
    return [list(rows[i : i + size]) for i in range(0, len(rows), size)]


def _predict_all(rows: Sequence[Measurement], profiles: Profiles) -> list[Prediction | str]:
    found: list[Prediction | str] = []
    for m in rows:
        try:
            found.append(dict(predict(m, profiles.get(m.engine))))
        except ChipsecondsError as error:
            found.append(str(error))
    return found


def _everything(m: Measurement) -> str:
    del m
    return "all"


def summarise_errors(
    rows: Iterable[Validated], key: Callable[[Measurement], Hashable] = _everything
) -> dict[Hashable, list[ErrorSummary]]:
    """Errors by group and metric, groups in the order of their names."""
    collected: dict[Hashable, dict[str, list[float]]] = {}
    for row in rows:
        metrics = collected.setdefault(key(row.measurement), {})
        for metric, error in row.errors.items():
            metrics.setdefault(metric, []).append(error)
    return {
        group: [error_summary(metric, errors) for metric, errors in sorted(metrics.items())]
        for group, metrics in sorted(collected.items(), key=lambda item: str(item[0]))
    }


def error_summary(metric: str, errors: Sequence[float]) -> ErrorSummary:
    """Summary of signed relative errors.

    >>> error_summary("tpot_s", [-0.1, 0.0, 0.3]).median
    0.1
    """
    signed = np.asarray(errors, dtype=np.float64)
    size = np.abs(signed)
    return ErrorSummary(
        metric=metric,
        rows=len(signed),
        median=float(np.median(size)),
        mean=float(size.mean()),
        p90=float(np.quantile(size, 0.9)),
        bias=float(np.median(signed)),
    )
