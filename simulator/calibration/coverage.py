"""Do intervals contain what was measured? Draws of every uncertain input, replayed over measured rows by fits that had not seen them.

For each group (model, chip, engine, formats) the parameters, their covariance and the spread of the residual come from the other
groups alone: the residual of group h that group g's interval rests on is that of a fit that has seen neither. Kernel curves are fitted
to kernel measurements and know no serving row.

What is left beyond the drawn parameters, *residual* (:class:`~simulator.catalog.engines.LeftOut`), is a factor of Student's t in its logarithm, on the
time of every step and then on the first token. Scale and tail are those with which the intervals of the left-out rows
contain what they promise at :data:`LEVELS`, rows weighted by the inverse root of their group's size.
"""

import multiprocessing
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulator.calibration.harness import KernelDraw, predict
from simulator.calibration.measurements import Measurement
from simulator.calibration.profiles import place
from simulator.calibration.serving import SPREADS, Fit, Simulators, fit_serving, profiles_at, with_rates
from simulator.catalog.architecture import MoEFFN
from simulator.catalog.draws import (
    Draws,
    ResidualFactors,
    interval_of,
    normal_scores,
    residual_factors,
    root_of,
    student_quantile,
)
from simulator.catalog.engines import EngineProfile, FitErrors, LeftOut, ModelKind, Tail
from simulator.catalog.models import load_model
from simulator.errors import ChipsecondsError

Array = NDArray[np.float64]

DRAWS = 64
LEVELS = (0.5, 0.8, 0.95)
METRICS = tuple(SPREADS)
_TPOT, _TTFT = (METRICS.index(name) for name in ("tpot_s", "ttft_s"))

_SCALES = np.concatenate([[0.0], np.geomspace(0.005, 1.5, 80)])
_TAILS: tuple[Tail, ...] = (0, 4, 2)


def kind_of(model: str) -> ModelKind:
    """Whether a model has routed experts: their products are predicted worst by far."""
    return "experts" if any(isinstance(group.ffn, MoEFFN) for group in load_model(model).layers) else "dense"


# Draws of measured rows -----------------------------------------------------------------------------------------------


def drawn_log_ratios(
    rows: Sequence[Measurement],
    profiles: Mapping[str, Sequence[EngineProfile]],
    names: Sequence[str],
    draws: Draws,
    *,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Array:
    """[rows, metrics, n] log(predicted / measured) under each draw of kernels and profile; NaN where there is none.

    Parameters
    ----------
    profiles, names
        name -> ``n`` drawn profiles, and [rows] which name a row is simulated under.
    """
    order = sorted(range(len(rows)), key=lambda i: _deployment(rows[i]))
    parts = [list(part) for _, part in groupby(order, key=lambda i: _deployment(rows[i]))]
    tasks = [([rows[i] for i in part], [list(profiles[names[i]]) for i in part], draws) for part in parts]
    found = np.full((len(rows), len(METRICS), draws.n), np.nan)
    if workers <= 1:
        results: Iterable[Array] = map(_draw_deployment, tasks)
        _collect(found, parts, results, progress)
    else:
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            _collect(found, parts, pool.map(_draw_deployment, tasks), progress)
    return found


def _collect(
    found: Array, parts: list[list[int]], results: Iterable[Array], progress: Callable[[int, int], None] | None
) -> None:
    done = 0
    for part, result in zip(parts, results, strict=True):
        found[part] = result
        done += len(part)
        if progress:
            progress(done, len(found))


def _deployment(m: Measurement) -> tuple[str, ...]:
    return m.chip, m.model, m.precision, *map(str, m.pools)


def _draw_deployment(task: tuple[list[Measurement], list[list[EngineProfile]], Draws]) -> Array:
    rows, profiles, draws = task
    found = np.full((len(rows), len(METRICS), draws.n), np.nan)
    for k in range(draws.n):
        draw = KernelDraw(draws, k)
        for i, (m, own) in enumerate(zip(rows, profiles, strict=True)):
            try:
                predicted = predict(m, own[k], draw)
            except ChipsecondsError:
                continue
            for j, metric in enumerate(METRICS):
                if metric in predicted and metric in m.measured:
                    found[i, j, k] = np.log(predicted[metric] / m.measured[metric])
    return found


def free_covariance(fit: Fit) -> Array:
    """[p, p] covariance of the parameters inside their bounds, given those that are at one; 0 for the latter.

    A draw that was cut off at a bound would pull the others' compensation with it, and every prediction to one side.
    """
    low, high = (np.array([getattr(p, side) for p in fit.parameters]) for side in ("low", "high"))
    free = np.flatnonzero(np.minimum(fit.values - low, high - fit.values) > 1e-6 * (high - low))
    precision = np.linalg.inv(fit.covariance)
    found = np.zeros_like(fit.covariance)
    found[np.ix_(free, free)] = np.linalg.inv(precision[np.ix_(free, free)])
    return found


def fitted_profiles(fit: Fit, draws: Draws) -> dict[str, list[EngineProfile]]:
    """Engine -> ``n`` profiles drawn from a fit's covariance, inside the parameters' bounds."""
    covariance = free_covariance(fit)
    sigma = np.sqrt(np.diag(covariance))
    scale = np.where(sigma > 0, sigma, 1.0)
    independent = np.stack([draws.normal(f"fit/{p.name}") for p in fit.parameters])
    low, high = (np.array([getattr(p, side) for p in fit.parameters]) for side in ("low", "high"))
    moves = sigma[:, None] * (root_of(covariance / np.outer(scale, scale)) @ independent)
    found: dict[str, list[EngineProfile]] = {engine: [] for engine in fit.base}
    for row in np.clip(fit.values + moves.T, low, high):
        for engine, profile in profiles_at(fit.parameters, row, fit.base).items():
            found[engine].append(profile)
    return found


# The residual ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Residual:
    """What the residual of some rows is estimated from.

    Attributes
    ----------
    groups
        [rows] names.
    left_out
        [rows, metrics] log(predicted / measured) by a fit that had not seen the row's group.
    moves
        [rows, metrics, n] log of drawn ÷ undrawn prediction.
    """

    groups: NDArray[np.str_]
    left_out: Array
    moves: Array

    def of(self, chosen: NDArray[np.bool_]) -> "Residual":
        """Some of the rows."""
        return Residual(self.groups[chosen], self.left_out[chosen], self.moves[chosen])


def estimate_left_out(rows: Residual, draws: Draws) -> LeftOut:
    """Scales and tails of the residual with which the rows' intervals contain what they promise.

    The first token's is estimated on top of the step's; without a row that has one it is 0.
    """
    weights = _group_weights(rows.groups)
    truth, moves = -rows.left_out, rows.moves
    step, step_tail, placed = _fit_scale(truth[:, _TPOT], moves[:, _TPOT], weights)
    slower = step * student_quantile(draws.uniform("coverage/step"), step_tail)
    first, first_tail, _ = _fit_scale(truth[:, _TTFT], moves[:, _TTFT] + slower, weights)
    return LeftOut(
        groups=len(set(rows.groups)),
        rows=len(rows.groups),
        step_scale=float(f"{step:.3g}"),
        step_tail=step_tail,
        first_token_scale=float(f"{first:.3g}"),
        first_token_tail=first_tail,
        within_group=round(_shared(placed, rows.groups), 2),
    )


def _fit_scale(truth: Array, moves: Array, weights: Array) -> tuple[float, Tail, Array]:
    """Scale and tail with the best coverage at :data:`LEVELS`, and [rows] where each truth lies in its interval, 0 … 1."""
    known = np.isfinite(truth) & np.isfinite(moves).all(axis=-1)
    placed = np.full(len(truth), np.nan)
    if not known.any():
        return 0.0, 4, placed
    gaps, share = truth[known, None] - moves[known], weights[known] / weights[known].sum()
    best, found = np.inf, (0.0, _TAILS[0], np.zeros(len(share)))
    for tail in _TAILS:
        for scale in _SCALES:
            u = _student_cdf(gaps, scale, tail).mean(axis=-1)
            off = sum((float(share @ (np.abs(u - 0.5) <= level / 2)) - level) ** 2 for level in LEVELS)
            if off < best - 1e-9:
                best, found = off, (float(scale), tail, u)
    placed[known] = found[2]
    return found[0], found[1], placed


def _student_cdf(gaps: Array, scale: float, tail: int) -> Array:
    """Probability that a residual of this scale and tail is below ``gaps``."""
    if scale == 0:
        return np.asarray(0.5 * (1 + np.sign(gaps)))
    t = gaps / scale
    if tail == 2:
        return np.asarray(0.5 + t / (2 * np.sqrt(2 + t * t)))
    if tail == 4:
        x = t * t / (4 + t * t)
        return np.asarray(0.5 + np.sign(t) * np.sqrt(x) * (3 - x) / 4)
    from scipy.special import ndtr  # noqa: PLC0415  # takes a while to import

    return np.asarray(ndtr(t))


def _group_weights(groups: NDArray[np.str_]) -> Array:
    """[rows] inverse root of the size of each row's group."""
    _, inverse, counts = np.unique(groups, return_inverse=True, return_counts=True)
    return np.asarray(counts[inverse] ** -0.5)


def _shared(placed: Array, groups: NDArray[np.str_]) -> float:
    """Share of the variance of normal scores that rows of a group have in common: analysis of variance, one way."""
    known = np.isfinite(placed)
    score = normal_scores(np.clip(placed[known], 0.002, 0.998))
    names, inverse, counts = np.unique(groups[known], return_inverse=True, return_counts=True)
    if len(names) < 2 or len(score) <= len(names):
        return 0.0
    means = np.bincount(inverse, score) / counts
    within = float(((score - means[inverse]) ** 2).sum()) / (len(score) - len(names))
    between = float((means**2 - within / counts).mean())  # the promised mean is 0
    return float(np.clip(between / (between + within), 0.0, 1.0)) if within > 0 else 1.0


# Coverage -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Covered:
    """How often intervals of one metric contain the measurement.

    Attributes
    ----------
    shares
        by level.
    half_width
        of the 80 % interval, as a factor less 1: the mean of √(high ÷ low) − 1 over rows.
    """

    metric: str
    rows: int
    shares: dict[float, float]
    half_width: float


@dataclass(frozen=True)
class Coverage:
    """Intervals of measured rows by what had not seen them.

    Attributes
    ----------
    draws
        draws per row.
    groups
        name -> coverage by metric; ``""`` is all rows together.
    parameters_only
        the same of all rows without the residual.
    left_out
        residual by kind of model, from all groups: what profile files carry.
    other_chips
        residual of chips outside the fit, from rows that were not fitted; None without any.
    tables
        table -> coverage of rows that were not fitted, under the fit and the residual of all fitted groups (``other_chips`` where
        the chip is one).
    """

    draws: int
    groups: dict[str, list[Covered]]
    parameters_only: list[Covered]
    left_out: dict[ModelKind, LeftOut]
    other_chips: LeftOut | None
    tables: dict[str, list[Covered]]


def measure_coverage(
    rows: Sequence[Measurement],
    full: Fit,
    *,
    simulators: Simulators,
    others: Sequence[Measurement] = (),
    draws: Draws | None = None,
    workers: int = 1,
    say: Callable[[str], None] = lambda _: None,
) -> Coverage:
    """Leave every group out, draw its rows, and count.

    Parameters
    ----------
    rows, full, simulators
        fitted rows, the fit to all of them, and what evaluates them.
    others
        rows that were not fitted.
    draws
        None: :data:`DRAWS` of seed 0.
    """
    some = draws or Draws(DRAWS)
    groups = np.array([" · ".join(m.group) for m in rows])
    names = list(dict.fromkeys(groups.tolist()))
    kinds = {str(name): kind_of(m.model) for name, m in zip(groups, rows, strict=True)}
    alone = {name: _without(rows, full, simulators, groups, {name}) for name in names}
    say(f"intervals: {len(names)} groups left out one by one")
    profiles = {f"{name}|{e}": ps for name, fit in alone.items() for e, ps in fitted_profiles(fit, some).items()}
    labels = [f"{name}|{m.engine}" for name, m in zip(groups, rows, strict=True)]
    drawn = drawn_log_ratios(rows, profiles, labels, some, workers=workers)
    say(f"intervals: {len(rows)} rows drawn {some.n} times")
    point = np.full((len(rows), len(METRICS)), np.nan)
    for name, fit in alone.items():
        point[groups == name] = fit.after[groups == name]
    every = Residual(groups, point, drawn - point[..., None])
    factors = np.full((len(rows), 2, some.n), np.nan)
    for i, name in enumerate(names):
        mates = [other for other in names if kinds[other] == kinds[name] and other != name]
        seen = every.left_out.copy()
        for other in mates:  # by a fit that has seen neither
            inside = groups == other
            seen[inside] = _without(rows, alone[name], simulators, groups, {name, other}).after[inside]
        chosen = np.isin(groups, mates)
        if not chosen.any():
            continue
        left_out = estimate_left_out(Residual(groups, seen, every.moves).of(chosen), some)
        for r in np.flatnonzero(groups == name).tolist():
            factors[r] = _log_factors(left_out, some, rows[r])
        say(f"intervals: residual for {name} ({i + 1} of {len(names)})")
    final = {
        kind: estimate_left_out(every.of(np.array([kinds[g] == kind for g in groups])), some)
        for kind in sorted(set(kinds.values()))
    }
    with_residual = _with_rates(rows, _add(drawn, factors))
    found = {"": _covered(with_residual)} | {n: _covered(with_residual[groups == n]) for n in names}
    fewer = Draws(max(16, some.n // 2), some.seed)
    other_chips, tables = _unfitted(others, full, {m.chip for m in rows}, final, fewer, workers)
    say(f"intervals: {len(others)} rows that were not fitted drawn {fewer.n} times")
    return Coverage(some.n, found, _covered(_with_rates(rows, drawn)), final, other_chips, tables)


def _without(
    rows: Sequence[Measurement], near: Fit, simulators: Simulators, groups: NDArray[np.str_], names: set[str]
) -> Fit:
    """The fit to all but some groups, with the slopes of a fit nearby."""
    keep = ~np.isin(groups, list(names))
    return fit_serving(
        rows,
        simulators=simulators,
        parameters=near.parameters,
        base=near.base,
        start=near.values,
        keep=keep,
        jacobian=near.slopes,
    )


def _log_factors(left_out: LeftOut | None, draws: Draws, m: Measurement) -> Array:
    """[2, n] logarithms of the factors on steps, and on the first token besides."""
    found: ResidualFactors = residual_factors(left_out, draws, group=" · ".join(m.group), run=f"{m.table}/{m.id}")
    return np.log(np.stack([found.step, found.first_token]))


def _add(drawn: Array, factors: Array) -> Array:
    """Drawn log ratios with the residual: times of tokens are slower by the step's factor, the first by both, rates lower."""
    found = drawn.copy()
    for j, metric in enumerate(METRICS):
        step, first = factors[:, 0], factors[:, 1]
        found[:, j] += {"ttft_s": step + first, "output_tokens_per_s": -step}.get(metric, step)
    return found


def _with_rates(rows: Sequence[Measurement], drawn: Array) -> Array:
    """The output rate of closed loops filled in, draw by draw."""
    return np.stack([with_rates(rows, drawn[..., k]) for k in range(drawn.shape[-1])], axis=-1)


def _covered(drawn: Array) -> list[Covered]:
    """Coverage by metric of [rows, metrics, n] log(predicted / measured)."""
    found = []
    for j, metric in enumerate(METRICS):
        known = drawn[np.isfinite(drawn[:, j]).all(axis=-1), j]
        if not len(known):
            continue
        ends = {level: interval_of(known, level) for level in LEVELS}
        shares = {level: float(((low <= 0) & (high >= 0)).mean()) for level, (low, high) in ends.items()}
        low, high = ends[0.8]
        found.append(Covered(metric, len(known), shares, float(np.expm1((high - low) / 2).mean())))
    return found


def _unfitted(
    rows: Sequence[Measurement],
    full: Fit,
    chips: set[str],
    left_out: Mapping[ModelKind, LeftOut],
    draws: Draws,
    workers: int,
) -> tuple[LeftOut | None, dict[str, list[Covered]]]:
    """Residual of chips outside the fit, and coverage of tables that were not fitted."""
    profiles = fitted_profiles(full, draws)
    known = [m for m in rows if m.engine in profiles]
    if not known:
        return None, {}
    names = [m.engine for m in known]
    drawn = drawn_log_ratios(known, profiles, names, draws, workers=workers)
    undrawn = {engine: [profile] for engine, profile in full.profiles.items()}
    point = drawn_log_ratios(known, undrawn, names, Draws(1, draws.seed, frozenset()), workers=workers)[..., 0]
    moves, steps = drawn - point[..., None], point.copy()
    # A queue's rate is its steps' time upside down.
    rate = METRICS.index("output_tokens_per_s")
    queued = ~np.isfinite(point[:, _TPOT])
    steps[queued, _TPOT], moves[queued, _TPOT] = -point[queued, rate], -moves[queued, rate]
    groups = np.array([" · ".join(m.group) for m in known])
    every = Residual(groups, steps, moves)
    elsewhere = np.array([m.chip not in chips for m in known])
    factors = np.full((len(known), 2, draws.n), np.nan)
    for name in np.unique(groups):
        inside, mates = groups == name, elsewhere & (groups != name)
        own = [known[i] for i in np.flatnonzero(inside).tolist()]
        one = left_out.get(kind_of(own[0].model))
        if own[0].chip not in chips:  # from the other groups: rows are not to vouch for themselves
            one = estimate_left_out(every.of(mates), draws) if mates.any() else None
        factors[inside] = np.stack([_log_factors(one, draws, m) for m in own])
    whole = _with_rates(known, _add(drawn, factors))
    tables = np.array([m.table + ("" if m.chip in chips else ", other chips") for m in known])
    found = {str(name): _covered(whole[tables == name]) for name in np.unique(tables)}
    return estimate_left_out(every.of(elsewhere), draws) if elsewhere.any() else None, found


# Files ----------------------------------------------------------------------------------------------------------------


def fit_errors(
    fit: Fit, engine: str, base: FitErrors | None, *, chips: set[str], coverage: Coverage | None
) -> FitErrors:
    """``[errors]`` of one engine's profile: its parameters inside their bounds, and the residual.

    Parameters
    ----------
    base
        of the profile the fit started from, whose residual stands where none was measured.
    chips
        of the fitted rows.
    """
    covariance = free_covariance(fit)
    own = [i for i, p in enumerate(fit.parameters) if p.engine in {None, engine} and covariance[i, i] > 0]
    sigma = np.sqrt(np.diag(covariance))[own]
    correlation = covariance[np.ix_(own, own)] / np.outer(sigma, sigma)
    residual = {} if base is None else {"left_out": base.left_out, "other_chips": base.other_chips}
    if coverage is not None:
        residual = {"left_out": coverage.left_out, "other_chips": coverage.other_chips}
    return FitErrors(
        parameters=tuple(".".join(place(fit.parameters[i].field)) for i in own),
        standard_errors=tuple(float(f"{s:.3g}") for s in sigma),
        correlation=tuple(tuple(round(float(c), 2) + 0.0 for c in row[: i + 1]) for i, row in enumerate(correlation)),
        chips=tuple(sorted(chips)),
        **residual,
    )


def coverage_document(found: Coverage) -> dict[str, Any]:
    """Figures for ``accuracy.json``: nothing of the measurements themselves."""

    def plain(rows: Sequence[Covered]) -> dict[str, Any]:
        return {
            c.metric: {
                "rows": c.rows,
                "covered": {f"{100 * level:g}": share for level, share in c.shares.items()},
                "half_width": c.half_width,
            }
            for c in rows
        }

    return {
        "draws": found.draws,
        "all": plain(found.groups[""]),
        "parameters_only": plain(found.parameters_only),
        "groups": {name: plain(rows) for name, rows in found.groups.items() if name},
        "tables": {name: plain(rows) for name, rows in found.tables.items()},
        "left_out": {kind: one.model_dump(mode="json") for kind, one in found.left_out.items()},
        "other_chips": None if found.other_chips is None else found.other_chips.model_dump(mode="json"),
    }
