"""One calibration to serving runs, start to end: read, fit, leave out, and lay out what a person or a file needs of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from simulator.calibration.coverage import Coverage, coverage_document, fit_errors, measure_coverage
from simulator.calibration.measurements import Measurement
from simulator.calibration.profiles import fitted_quantities, profile_text
from simulator.calibration.serving import SPREADS, Array, Fit, Simulators, fit_serving, with_rates
from simulator.calibration.splits import SPLITS, Split, leave_out, noise_floor, ranking
from simulator.calibration.tables import Data, Unsupported, read_measurements
from simulator.calibration.validate import (
    ErrorSummary,
    Validated,
    Validation,
    error_summary,
    summarise_errors,
    validate,
)
from simulator.catalog.engines import EngineProfile, engine_profile, load_engine
from simulator.errors import InputError, nearest

Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]
"""Title, columns and rows of text."""

NAMES = {"tpot_s": "TPOT", "ttft_s": "TTFT", "e2e_s": "E2E", "output_tokens_per_s": "output tokens/s"}


@dataclass(frozen=True)
class ServingCalibration:
    """A fit to serving runs and what was measured of it.

    Attributes
    ----------
    data
        everything that was read.
    rows
        those of the fit's tables that one pool of engines served; it has used the ones whose settings are clear.
    splits
        errors on rows left out, of those splits that were asked for.
    after
        errors of every row that can be simulated, the ones not fitted included, under the fitted profiles.
    command
        that makes it again.
    """

    data: Data
    rows: tuple[Measurement, ...]
    fit: Fit
    splits: tuple[Split, ...]
    after: Validation
    command: str
    source: str
    day: date
    coverage: Coverage | None = None
    """How often intervals contain left-out rows; None unless groups were left out."""

    @cached_property
    def profile_files(self) -> dict[str, str]:
        """Engine -> text of its profile file."""
        return {
            engine: profile_text(
                load_engine(engine),
                fitted_quantities(self.fit, engine, source=self.source, locator=self.command, day=self.day),
                command=self.command,
                errors=fit_errors(
                    self.fit,
                    engine,
                    load_engine(engine).errors,
                    chips={m.chip for m in self.rows},
                    coverage=self.coverage,
                ),
            )
            for engine in sorted({m.engine for m in self.rows})
        }

    @cached_property
    def document(self) -> dict[str, Any]:
        """Figures for a file or a JSON answer: no rows, so nothing of the measurements themselves."""
        floor = noise_floor(self.data.measurements)
        return {
            "command": self.command,
            "rows": self.data.n_rows,
            "rows_simulated": len(self.after.rows),
            "coverage": self.after.coverage,
            "rows_fitted": sum(not m.unclear for m in self.rows),
            "parameters": [
                {
                    "name": p.field,
                    "engine": p.engine,
                    "value": v,
                    "standard_error": e,
                    "prior": p.prior,
                    "spread": p.spread,
                }
                for p, v, e in zip(self.fit.parameters, self.fit.values, self.fit.errors, strict=True)
            ],
            "warnings": list(self.fit.warnings),
            "noise_floor": {metric: asdict(e) for metric, e in floor.items()},
            "before": _summaries(with_rates(self.rows, self.fit.before)),
            "in_sample": _summaries(with_rates(self.rows, self.fit.after)),
            "splits": {
                split.name: {
                    "ranking": None if (r := ranking(self.rows, split.left_out)) is None else asdict(r),
                    "all": {m: asdict(e) for m in SPREADS if (e := split.errors(m))},
                    "parts": {
                        part: {m: asdict(e) for m in SPREADS if (e := split.errors(m, part))}
                        for part in dict.fromkeys(split.parts)
                    },
                }
                for split in self.splits
            },
            **({} if self.coverage is None else {"intervals": coverage_document(self.coverage)}),
            "tables": _by(self.after.rows, lambda m: m.table),
            "groups": _by(self.after.rows, lambda m: " · ".join(m.group)),
            "loads": _by(self.after.rows, lambda m: m.load_class),
            "unsupported": [
                {"table": table, "reason": reason, "rows": n}
                for (table, reason), n in _reasons(self.after.unsupported).items()
            ],
        }

    @property
    def tables(self) -> list[Table]:
        """What a person wants to see: errors before and after, left out, and what moved."""
        errors = [
            (stage, *_cells(summary))
            for stage, ratios in (("before", self.fit.before), ("after, in sample", self.fit.after))
            for summary in _summaries(with_rates(self.rows, ratios)).values()
        ]
        for split in self.splits:
            errors += [(f"{split.name} left out", *_cells(asdict(e))) for m in SPREADS if (e := split.errors(m))]
        moved: list[tuple[str, ...]] = [
            (p.name, f"{p.prior:.4g}", f"{value:.4g}", f"{error:.2g}")
            for p, value, error in zip(self.fit.parameters, self.fit.values, self.fit.errors, strict=True)
        ]
        return [
            (
                f"{len(self.rows)} rows, {len(self.fit.parameters)} parameters",
                ("", "metric", "rows", "median", "mean", "p90", "bias"),
                errors,
            ),
            ("What moved", ("parameter", "before any row", "fitted", "standard error"), moved),
        ]


def calibrate_serving(
    data: Path,
    *,
    base: Mapping[str, EngineProfile] | None = None,
    splits: Sequence[str] = (),
    select: str | None = None,
    workers: int = 1,
    command: str = "chipseconds calibrate serving",
    source: str = "serving-measurements",
    day: date | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> ServingCalibration:
    """Fit engine profiles to a file or folder of measured runs.

    Parameters
    ----------
    base
        engine -> profile to start from instead of the catalogue's.
    splits
        of :data:`~simulator.calibration.splits.SPLITS`.
    select
        fit only tables whose name contains this; the others are predicted with the fitted profiles.
    source, day
        what the profile files cite, and when they say it was retrieved; None: today.

    Raises
    ------
    InputError
        If there is nothing to fit, or a split is unknown.
    """
    for name in splits:
        if name not in SPLITS:
            raise InputError(f"split {name!r}{nearest(name, SPLITS)}")
    found = read_measurements(data)
    rows = tuple(m for m in found.measurements if len(m.pools) == 1 and (select or "") in m.table)
    if not rows:
        where = f" in tables named {select!r}" if select else ""
        raise InputError(f"{data}: no row that one pool of engines served{where}, so nothing to fit")
    from simulator.engine import compiled, jit  # noqa: PLC0415  # numba takes a while to import

    if jit.is_compiled_mode() and not jit.is_warm():
        compiled.warm_up()
    start = {engine: engine_profile(engine) for engine in {m.engine for m in rows}} | dict(base or {})
    with Simulators(rows, workers) as simulators:
        clear = np.array([not m.unclear for m in rows])
        fit = fit_serving(rows, simulators=simulators, base=start, keep=clear, say=say)
        left_out = tuple(leave_out(name, rows, fit, simulators=simulators, say=say) for name in splits)
        coverage = None
        if "group" in splits and len({m.group for m in rows}) > 1:
            others = [m for m in found.measurements if m not in set(rows)]
            coverage = measure_coverage(rows, fit, simulators=simulators, others=others, workers=workers, say=say)
    return ServingCalibration(
        data=found,
        rows=rows,
        fit=fit,
        splits=left_out,
        after=validate(found, profiles=fit.profiles, workers=workers),
        command=command,
        source=source,
        day=day or date.today(),  # noqa: DTZ011  # the reader's own day is meant
        coverage=coverage,
    )


def _summaries(ratios: Array) -> dict[str, dict[str, Any]]:
    found = {}
    for j, metric in enumerate(SPREADS):
        column = ratios[:, j]
        if np.isfinite(column).any():
            found[metric] = asdict(error_summary(metric, list(np.expm1(column[np.isfinite(column)]))))
    return found


def _cells(summary: Mapping[str, Any]) -> tuple[str, ...]:
    shares = (f"{summary[name]:.1%}" for name in ("median", "mean", "p90"))
    return (NAMES[summary["metric"]], str(summary["rows"]), *shares, f"{summary['bias']:+.1%}")


def _by(rows: Sequence[Validated], key: Callable[[Measurement], str]) -> dict[str, dict[str, dict[str, Any]]]:
    def plain(errors: Sequence[ErrorSummary]) -> dict[str, dict[str, Any]]:
        return {e.metric: asdict(e) for e in errors if e.metric in NAMES or e.metric.startswith("e2e_s_p")}

    return {str(group): plain(errors) for group, errors in summarise_errors(rows, key).items()}


def _reasons(unsupported: Sequence[Unsupported]) -> dict[tuple[str, str], int]:
    found: dict[tuple[str, str], int] = {}
    for u in unsupported:
        found[u.table, u.reason] = found.get((u.table, u.reason), 0) + 1
    return found
