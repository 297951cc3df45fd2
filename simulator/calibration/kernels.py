"""``calibrate kernels``: tables of measured kernel times → the curves of a chip, with errors on shapes left out."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simulator.calibration.kernels_models import problems
from simulator.calibration.kernels_problems import Problem, problem_at
from simulator.calibration.kernels_tables import read_tables
from simulator.calibration.regression import HUBER_DELTA, Fit, fit_log_ratios, quantiles
from simulator.catalog.chips import load_chip
from simulator.catalog.kernel_curves import CalibrationFile, KernelFit, Residuals
from simulator.errors import InputError

Array = NDArray[np.float64]

FOLDS = 5
"""Parts that shapes are dealt into for cross-validation."""
MOST_ROWS = 4000
"""Rows of one fit; larger tables are thinned evenly. Errors are always of every row."""
MOST_STEPS, REFIT_STEPS = 40, 8
GOALS = {"gemm": 0.08, "gemv": 0.08, "attention_decode": 0.08, "mha_decode": 0.08, "attention_prefill": 0.10, "moe": 0.15, "mla_decode": 0.08, "mla_prefill": 0.10,
         "all_reduce": 0.12, "all_gather": 0.12, "reduce_scatter": 0.12, "alltoall": 0.12}  # fmt: skip
"""Median absolute error on shapes left out that a fit should reach."""


@dataclass(frozen=True)
class ChipCalibration:
    """The curves of one chip."""

    file: CalibrationFile

    def median_by_op(self) -> dict[str, float]:
        """Median error on left-out shapes, by op: over rows of all its fits, weighted by them; decodes of unshared heads with the others."""
        found: dict[str, list[tuple[float, int]]] = {}
        for fit in self.file.fits:
            op = "attention_decode" if fit.op == "mha_decode" else fit.op
            found.setdefault(op, []).append((fit.residuals[0].median_abs, fit.residuals[0].rows))
        return {op: sum(m * n for m, n in rows) / sum(n for _, n in rows) for op, rows in found.items()}


def calibrate_chip(
    chip: str, folder: Path, *, command: str, source: Sequence[str], progress: Callable[[str], None] | None = None
) -> ChipCalibration:
    """Fit every curve that a folder of tables can fix.

    Parameters
    ----------
    chip
        name in the catalogue, or the path of a chip file; gives the datasheet that fractions are of.
    folder
        tables as :func:`~simulator.calibration.kernels_tables.read_tables` wants them.
    command, source
        what is written down as the file's provenance.
    progress
        told the name of each fit before it starts.

    Raises
    ------
    InputError
        If the tables are malformed, or hold nothing this chip can be fitted to.
    """
    spec = load_chip(chip)
    tables = read_tables(folder)
    fits = []
    for problem in problems(spec, tables):
        if progress is not None:
            progress(f"{spec.name}: {problem.op} {problem.dtype} {problem.framework}".strip())
        fits.append(fit_problem(problem))
    if not fits:
        raise InputError(f"{folder}: no row is in a format that {spec.name} computes in")
    return ChipCalibration(
        CalibrationFile(
            schema_version=1,
            chip=spec.name,
            command=command,
            source=tuple(source),
            tables={f"{t.kind}_{t.framework}".rstrip("_"): t.digest for t in tables},
            fits=tuple(sorted(fits, key=lambda f: (f.op, f.dtype, f.kv_dtype, f.framework, f.chips, f.head_dim))),
        )
    )


def fit_problem(problem: Problem) -> KernelFit:
    """Fit one curve and measure it on shapes left out.

    Shapes are dealt into :data:`FOLDS` parts; each part is predicted by parameters fitted to the others.
    """
    if len(problem.measured) < len(problem.free) + 1:
        raise InputError(
            f"{problem.op} {problem.dtype}: {len(problem.measured)} rows cannot fix {len(problem.free)} parameters"
        )
    if len(np.unique(problem.shape)) == 1:
        rows = np.arange(len(problem.measured), dtype=np.int64)
        problem = replace(problem, shape=rows, held_out_by="rows, as there is one shape")
    every = np.arange(len(problem.measured))
    best = _best(problem, every)
    others = [way for way in problem.others if len(every) >= way.rows_per_parameter * len(way.free)]
    if others:
        other = min((_best(replace(way, shape=problem.shape), every) for way in others), key=lambda f: f.loss)
        best = other if other.loss < problem.worth * best.loss else best
    outside = np.empty(len(every))
    fold = _folds(problem.shape)
    for part in range(fold.max() + 1):
        inside = every[fold != part]
        found = _fit(best.problem, inside, start=best.fit.values, max_steps=REFIT_STEPS)
        outside[fold == part] = _ratios(found.problem, found.values, every[fold == part])
    return _record(best, outside)


@dataclass(frozen=True)
class _Fitted:
    problem: Problem
    fit: Fit
    values: dict[str, float]
    ratios: Array
    loss: float


def _best(problem: Problem, rows: NDArray[np.int64]) -> _Fitted:
    """The fit of the choice that describes the rows best."""
    return min((_fit(problem_at(problem, choice), rows) for choice in _choices(problem)), key=lambda f: f.loss)


def _choices(problem: Problem) -> tuple[float | None, ...]:
    return problem.choices[1] or (None,)


def _fit(
    problem: Problem, rows: NDArray[np.int64], *, start: Array | None = None, max_steps: int = MOST_STEPS
) -> _Fitted:
    thinned = rows[:: max(1, math.ceil(len(rows) / MOST_ROWS))]
    names = [p.name for p in problem.free]

    def model(values: Array) -> Array:
        return problem.model({**problem.held, **dict(zip(names, values, strict=True))}, thinned)

    fit = fit_log_ratios(model, problem.measured[thinned], problem.free, start=start, max_steps=max_steps)
    values = {**problem.held, **{name: float(v) for name, v in zip(names, fit.values, strict=True)}}
    ratios = _ratios(problem, values, rows)
    size = np.abs(ratios)
    loss = float(np.where(size < HUBER_DELTA, size**2 / 2, HUBER_DELTA * (size - HUBER_DELTA / 2)).sum())
    return _Fitted(problem, fit, values, ratios, loss)


def _ratios(problem: Problem, values: dict[str, float], rows: NDArray[np.int64]) -> Array:
    return np.asarray(np.log(problem.model(values, rows) / problem.measured[rows]))


def _folds(shape: NDArray[np.int64]) -> NDArray[np.int64]:
    """The fold of each row: shapes dealt in an order that has nothing to do with their size."""
    _, shape = np.unique(shape, return_inverse=True)  # shapes that were left out leave gaps
    shapes = int(shape.max()) + 1
    order = np.argsort(
        (np.arange(shapes, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(11), kind="stable"
    )
    fold = np.empty(shapes, dtype=np.int64)
    fold[order] = np.arange(shapes) % min(FOLDS, shapes)
    return np.asarray(fold[shape])


def _record(best: _Fitted, outside: Array) -> KernelFit:
    problem = best.problem
    names = [p.name for p in problem.free]
    errors = dict.fromkeys(best.values, 0.0) | dict(zip(names, map(float, best.fit.relative_errors), strict=True))
    regimes = [("all", np.ones(len(outside), dtype=bool)), *problem.regimes]
    residuals = []
    for name, keep in regimes:
        median, p90, bias = quantiles(outside[keep])
        residuals.append(
            Residuals(
                regime=name,
                rows=int(keep.sum()),
                median_abs=_rounded(median),
                p90_abs=_rounded(p90),
                bias=_rounded(bias),
            )
        )
    return KernelFit(
        op=problem.op,
        dtype=problem.dtype,
        kv_dtype=problem.kv_dtype,
        framework=problem.framework,
        chips=problem.chips,
        head_dim=problem.head_dim,
        rows=len(problem.measured),
        left_out=problem.left_out,
        left_out_why=problem.why,
        held_out_by=problem.held_out_by,
        schedule=problem.schedule,
        parameters={name: _significant(value) for name, value in sorted(best.values.items())},
        standard_errors={name: _significant(value, 2) for name, value in sorted(errors.items())},
        at_limit=tuple(name for name, at in zip(names, best.fit.at_limit, strict=True) if at),
        correlation=tuple(tuple(_rounded(float(c), 2) for c in row) for row in best.fit.correlation),
        in_sample_median_abs=_rounded(quantiles(best.ratios)[0]),
        residuals=tuple(residuals),
    )


def _significant(value: float, digits: int = 4) -> float:
    """Round to significant digits: far inside the standard error, and the same on every machine."""
    return float(f"{value:.{digits}g}")


def _rounded(value: float, digits: int = 4) -> float:
    return round(value, digits) + 0.0


def toml_lines(file: CalibrationFile) -> Iterator[str]:
    """A calibration as lines of TOML, the same for the same fits."""
    yield f"# Written by: {file.command}"
    yield "# Not for editing by hand; docs/calibration.md says what the parameters mean."
    yield f"schema_version = {file.schema_version}"
    yield f"chip = {_text(file.chip)}"
    yield f"command = {_text(file.command)}"
    yield f"source = [{', '.join(map(_text, file.source))}]"
    yield ""
    yield "[tables]"
    yield from (f"{name} = {_text(digest)}" for name, digest in sorted(file.tables.items()))
    for fit in file.fits:
        yield ""
        yield "[[fits]]"
        yield f"op = {_text(fit.op)}"
        for name in ("dtype", "kv_dtype", "framework"):
            if getattr(fit, name):
                yield f"{name} = {_text(getattr(fit, name))}"
        if fit.chips > 1:
            yield f"chips = {fit.chips}"
        if fit.head_dim:
            yield f"head_dim = {fit.head_dim}"
        yield f"rows = {fit.rows}"
        if fit.left_out:
            yield f"left_out = {fit.left_out}"
            yield f"left_out_why = {_text(fit.left_out_why)}"
        yield f"held_out_by = {_text(fit.held_out_by)}"
        if fit.schedule:
            yield f"schedule = {_text(fit.schedule)}"
        yield f"parameters = {_table(fit.parameters)}"
        yield f"standard_errors = {_table(fit.standard_errors)}"
        if fit.at_limit:
            yield f"at_limit = [{', '.join(map(_text, fit.at_limit))}]"
        if fit.correlation:
            rows = ", ".join("[" + ", ".join(f"{c!r}" for c in row) + "]" for row in fit.correlation)
            yield f"correlation = [{rows}]"
        yield f"in_sample_median_abs = {fit.in_sample_median_abs!r}"
        yield "residuals = ["
        for r in fit.residuals:
            yield (
                f"  {{ regime = {_text(r.regime)}, rows = {r.rows}, median_abs = {r.median_abs!r}, "
                f"p90_abs = {r.p90_abs!r}, bias = {r.bias!r} }},"
            )
        yield "]"


def _text(value: str) -> str:
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _table(values: dict[str, float]) -> str:
    return "{ " + ", ".join(f"{name} = {_float(value)}" for name, value in values.items()) + " }"


def _float(value: float) -> str:
    """A TOML float: Python's shortest spelling, with a point before an exponent."""
    text = repr(float(value))
    return text if "." in text or "inf" in text or "nan" in text else text.replace("e", ".0e")
