"""Fit engine profiles to measured serving runs, through the simulator.

The residual of a row and metric is log(predicted / measured) over the metric's spread (:data:`SPREADS`). Its robust sum of squares
(Huber [1]_: linear beyond :data:`HUBER` spreads) plus a weak prior on every parameter is minimised by damped Gauss–Newton
with a Jacobian from finite differences; parameters stay inside physical bounds. Rows are weighted by the inverse root of the
size of their group, so that a model measured a hundred times does not drown one measured ten times.

Parameters are few and physical: how much slower kernels are in a server than alone, by kind, the fixed time of a kernel in a
captured graph, and how unevenly tokens choose experts, for all engines; and per engine the host's times per step, sequence and
request, and its memory. There is none for a row, a model or a chip.

.. [1] P. Huber, "Robust estimation of a location parameter", Ann. Math. Statist. 35, 1964 (recalled).
"""

import multiprocessing
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Self

import numpy as np
from numpy.typing import NDArray

from simulator.calibration.harness import Prediction, predict
from simulator.calibration.measurements import Measurement
from simulator.catalog.engines import EngineProfile, engine_profile
from simulator.errors import ChipsecondsError, InputError

Array = NDArray[np.float64]

SPREADS = {"tpot_s": 0.05, "ttft_s": 0.20, "e2e_s": 0.05, "output_tokens_per_s": 0.08}
"""Spread of log(predicted / measured) that a metric is worth: what repeats and versions leave unexplained."""
HUBER = 1.5
"""Residuals beyond this many spreads count linearly."""
MAX_ITERATIONS = 10
LINEAR_STEPS = 12
"""Reweighted least-squares steps on the linearised simulator between two simulations."""
IDENTIFIED = 0.5
"""A parameter is identified when the data shrink the prior's spread below this part of it."""
ALIKE = 0.95
"""Parameters of a larger correlation cannot be told apart."""


@dataclass(frozen=True)
class Parameter:
    """One number that the fit may move.

    Attributes
    ----------
    field
        of :class:`~simulator.catalog.engines.EngineProfile`.
    engine
        profile it belongs to; None: all of them share it.
    low, high
        physical bounds.
    prior, spread
        what is believed before any serving run is seen, and how firmly.
    """

    field: str
    engine: str | None
    low: float
    high: float
    prior: float
    spread: float

    @property
    def name(self) -> str:
        """Field, and its engine."""
        return f"{self.engine or 'every engine'}: {self.field}"


#: Factors on kernels that every engine shares: upper bound, prior, spread. Kernels run as measured alone, within some 15 %, but
#: graphs and fused kernels hide part of the launches and of what goes on between products.
SLOWDOWNS = {
    "weights_slowdown": (3.0, 1.0, 0.15),
    "experts_slowdown": (3.0, 1.0, 0.15),
    "elementwise_slowdown": (3.0, 0.8, 0.3),
    "collective_slowdown": (3.0, 1.0, 0.25),
    "decode_attention_slowdown": (3.0, 1.0, 0.15),
    "prefill_attention_slowdown": (3.0, 1.0, 0.15),
}
#: Fixed time of a kernel [s], and skew of the choice of experts: upper bound, prior, spread.
SHARED = {"kernel_s": (20e-6, 3e-6, 3e-6), "routing_skew": (1.5, 0.5, 0.3)}
#: Times of one engine's host [s] and its memory [bytes], as above.
HOSTS = {
    "step_s": (10e-3, 0.8e-3, 1e-3),
    "sequence_s": (100e-6, 10e-6, 15e-6),
    "eager_s": (50e-6, 3e-6, 5e-6),
    "request_s": (0.5, 15e-3, 20e-3),
    "request_token_s": (100e-6, 3e-6, 5e-6),
    "workspace_bytes": (12e9, 2e9, 3e9),
}


def parameters_for(engines: Iterable[str]) -> tuple[Parameter, ...]:
    """Parameters of a fit over rows of these engines."""
    found = [Parameter(name, None, 0.5, *values) for name, values in SLOWDOWNS.items()]
    found += [Parameter(name, None, 0.0, *values) for name, values in SHARED.items()]
    for engine in sorted(set(engines)):
        found += [Parameter(name, engine, 0.0, *values) for name, values in HOSTS.items()]
    return tuple(found)


def profiles_at(
    parameters: Sequence[Parameter], values: Array, base: Mapping[str, EngineProfile]
) -> dict[str, EngineProfile]:
    """The engines' profiles with the parameters in place."""
    found = {}
    for engine, profile in base.items():
        own = {p.field: float(v) for p, v in zip(parameters, values, strict=True) if p.engine in {None, engine}}
        found[engine] = profile.with_values(**own)
    return found


def log_ratios(rows: Sequence[Measurement], profiles: Mapping[str, EngineProfile]) -> Array:
    """[rows, metrics] log(predicted / measured), metrics as in :data:`SPREADS`.

    NaN where there is none, it cannot run, or ``profiles`` lack the row's engine.
    """
    found = np.full((len(rows), len(SPREADS)), np.nan)
    known: dict[Measurement, Prediction] = {}
    for i, m in enumerate(rows):
        if m.engine not in profiles:
            continue
        setup = replace(m, id="", table="", engine_version="", measured={})  # repeats are simulated once
        try:
            predicted = known[setup] if setup in known else predict(m, profiles[m.engine])
        except ChipsecondsError:
            continue
        if m.replay is None:
            known[setup] = predicted
        for j, metric in enumerate(SPREADS):
            if metric in fitted_metrics(m) and metric in predicted:
                found[i, j] = np.log(predicted[metric] / m.measured[metric])
    return found


def fitted_metrics(m: Measurement) -> tuple[str, ...]:
    """Metrics of a row that are independent of each other: a closed loop's rate follows from its latencies."""
    return tuple(
        metric
        for metric in m.measured
        if metric in SPREADS and not (metric == "output_tokens_per_s" and {"ttft_s", "tpot_s"} <= set(m.measured))
    )


def with_rates(rows: Sequence[Measurement], ratios: Array) -> Array:
    """``ratios`` with the output rate of closed loops filled in, which follows from both latencies."""
    ttft, tpot, rate = (list(SPREADS).index(name) for name in ("ttft_s", "tpot_s", "output_tokens_per_s"))
    found = ratios.copy()
    for i, m in enumerate(rows):
        if m.load == "closed" and np.isfinite(ratios[i, [ttft, tpot]]).all():
            real = np.array([m.measured["ttft_s"], (m.output_tokens - 1) * m.measured["tpot_s"]])
            found[i, rate] = np.log(real.sum() / (real * np.exp(ratios[i, [ttft, tpot]])).sum())
    return found


class Simulators:
    """Processes that each hold a part of the rows and evaluate it again and again."""

    def __init__(self, rows: Sequence[Measurement], workers: int) -> None:
        self._rows = list(rows)
        order = sorted(
            range(len(rows)), key=lambda i: (rows[i].chip, rows[i].model, rows[i].precision, str(rows[i].pools))
        )
        bounds = np.linspace(0, len(rows), max(1, workers) + 1).astype(int)
        self._parts = [np.array(order[a:b], dtype=int) for a, b in pairwise(bounds)]
        self._pools: list[ProcessPoolExecutor] = []
        if workers > 1:
            context = multiprocessing.get_context("spawn")
            for part in self._parts:
                own = [self._rows[i] for i in part]
                self._pools.append(ProcessPoolExecutor(1, mp_context=context, initializer=_hold, initargs=(own,)))

    def __enter__(self) -> Self:
        """The processes start with the first evaluation."""
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the processes."""
        for pool in self._pools:
            pool.shutdown()

    def evaluate(self, many: Sequence[Mapping[str, EngineProfile]]) -> list[Array]:
        """:func:`log_ratios` of all rows under each of several sets of profiles."""
        if not self._pools:
            return [log_ratios(self._rows, profiles) for profiles in many]
        found = [np.full((len(self._rows), len(SPREADS)), np.nan) for _ in many]
        futures = [[pool.submit(_evaluate, dict(profiles)) for profiles in many] for pool in self._pools]
        for part, column in zip(self._parts, futures, strict=True):
            for k, future in enumerate(column):
                found[k][part] = future.result()
        return found


_held: list[Measurement] = []


def _hold(rows: list[Measurement]) -> None:
    _held[:] = rows


def _evaluate(profiles: Mapping[str, EngineProfile]) -> Array:
    return log_ratios(_held, profiles)


@dataclass(frozen=True)
class Fit:
    """A fitted set of parameters.

    Attributes
    ----------
    parameters, values, errors
        what was fitted, to what, with which standard error: prior and data together, residuals' own spread.
    covariance
        [p, p] of the values.
    before, after
        [rows, metrics] log(predicted / measured) at the start and at the fit.
    slopes
        [rows, metrics, p] of the predictions' logarithms at the last but one values.
    iterations
        of Gauss–Newton.
    base
        profiles the parameters were put into.
    """

    parameters: tuple[Parameter, ...]
    values: Array
    errors: Array
    covariance: Array
    before: Array
    after: Array
    slopes: Array
    iterations: int
    base: Mapping[str, EngineProfile]

    @property
    def profiles(self) -> dict[str, EngineProfile]:
        """The engines' fitted profiles."""
        return profiles_at(self.parameters, self.values, self.base)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Parameters at a bound, not identified, or not to be told apart."""
        found = []
        for p, value, error in zip(self.parameters, self.values, self.errors, strict=True):
            width = p.high - p.low
            if value - p.low < 1e-6 * width or p.high - value < 1e-6 * width:
                found.append(f"{p.name} = {value:.4g} is at its bound ({p.low:g} … {p.high:g})")
            elif error > IDENTIFIED * p.spread:
                found.append(
                    f"{p.name} is hardly identified: standard error {error:.2g}, before the data {p.spread:.2g}"
                )
        scale = np.sqrt(np.diag(self.covariance))
        correlation = self.covariance / np.outer(scale, scale).clip(1e-300)
        for i, j in zip(*np.triu_indices(len(self.values), 1), strict=True):
            if abs(correlation[i, j]) > ALIKE:
                found.append(
                    f"{self.parameters[i].name} and {self.parameters[j].name} cannot be told apart "
                    f"(correlation {correlation[i, j]:+.2f})"
                )
        return tuple(found)


def group_weights(rows: Sequence[Measurement]) -> Array:
    """[rows] inverse root of the size of each row's group, 1 in the mean."""
    counts: dict[tuple[str, ...], int] = {}
    for m in rows:
        counts[m.group] = counts.get(m.group, 0) + 1
    weights = np.array([counts[m.group] ** -0.5 for m in rows])
    return np.asarray(weights / weights.mean())


def fit_serving(
    rows: Sequence[Measurement],
    *,
    simulators: Simulators,
    parameters: Sequence[Parameter] | None = None,
    base: Mapping[str, EngineProfile] | None = None,
    start: Array | None = None,
    keep: NDArray[np.bool_] | None = None,
    jacobian: Array | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Fit:
    """Fit parameters to measured runs.

    Parameters
    ----------
    rows, simulators
        all rows, and what evaluates them.
    parameters
        None: :func:`parameters_for` the engines of the rows.
    base
        engine name -> profile for everything that is not fitted; None: the catalogue's.
    start
        None: the priors.
    keep
        [rows] rows to fit; the others are only evaluated. None: all.
    jacobian
        [rows, metrics, p] to use in place of new finite differences; with a start nearby it is accurate enough.
    say
        told of every iteration.

    Raises
    ------
    InputError
        If no kept row can be simulated.
    """
    engines = {m.engine for m in rows}
    chosen = tuple(parameters_for(engines) if parameters is None else parameters)
    fixed = {name: engine_profile(name) for name in engines} if base is None else dict(base)
    low, high = (np.array([getattr(p, name) for p in chosen]) for name in ("low", "high"))
    prior, spread = (np.array([getattr(p, name) for p in chosen]) for name in ("prior", "spread"))
    kept = np.ones(len(rows), dtype=bool) if keep is None else keep
    weight = group_weights([m for m, k in zip(rows, kept, strict=True) if k])
    row_weight = np.zeros(len(rows))
    row_weight[kept] = weight
    sigma = np.array(list(SPREADS.values()))

    def at(values: Array) -> Array:
        return simulators.evaluate([profiles_at(chosen, values, fixed)])[0]

    def loss(ratios: Array, values: Array) -> float:
        scaled = ratios / sigma
        size = np.abs(scaled)
        cost = np.where(size <= HUBER, scaled**2 / 2, HUBER * (size - HUBER / 2))
        return float(np.nansum(cost * row_weight[:, None]) + ((values - prior) ** 2 / spread**2).sum() / 2)

    def _linear_optimum(ratios: Array, slopes: Array, values: Array, damping: float) -> Array:
        """Where the robust loss of the linearised simulator is least, not too far from ``values``."""
        moved = np.zeros_like(values)
        for _ in range(LINEAR_STEPS):
            hessian, gradient = _normal_equations(ratios + slopes @ moved, slopes, sigma, row_weight)
            hessian += np.diag(1 / spread**2)
            gradient += (values + moved - prior) / spread**2
            held = damping * np.diag(hessian)
            step = _bounded_step(hessian + np.diag(held), gradient + held * moved, values + moved, low, high)
            moved = moved + step
            if (np.abs(step) < 1e-3 * spread).all():
                break
        return np.asarray(values + moved)

    values = np.clip(prior if start is None else start, low, high)
    before = simulators.evaluate([fixed])[0]
    ratios = at(values)
    if not np.isfinite(ratios[kept]).any():
        raise InputError("no row of the data can be simulated, so there is nothing to fit")
    present = loss(ratios, values)
    say(f"start: loss {present:.1f}")
    damping, slopes, iterations = 1e-2, jacobian, 0
    for iterations in range(1, MAX_ITERATIONS + 1):  # reported
        if jacobian is None or slopes is None:
            slopes = finite_differences(simulators, chosen, values, fixed, ratios)
        gain = 0.0
        for _ in range(6):
            trial = _linear_optimum(ratios, slopes, values, damping)
            trial_ratios = at(trial)
            gain = present - loss(trial_ratios, trial)
            if gain > 0:
                break
            damping *= 10
        if gain <= 0:
            break
        values, ratios, present = trial, trial_ratios, present - gain
        damping = max(damping / 5, 1e-3)
        say(f"iteration {iterations}: loss {present:.1f}")
        if gain < (2e-3 if jacobian is None else 1e-2) * present:
            break
    if slopes is None:
        raise AssertionError
    hessian = _normal_equations(ratios, slopes, sigma, row_weight)[0] + np.diag(1 / spread**2)
    covariance = np.linalg.inv(hessian) * _residual_scale(ratios[kept], sigma)
    return Fit(
        parameters=chosen,
        values=values,
        errors=np.sqrt(np.diag(covariance)),
        covariance=np.asarray(covariance, dtype=np.float64),
        before=before,
        after=ratios,
        slopes=slopes,
        iterations=iterations,
        base=fixed,
    )


def finite_differences(
    simulators: Simulators,
    parameters: Sequence[Parameter],
    values: Array,
    base: Mapping[str, EngineProfile],
    ratios: Array,
) -> Array:
    """[rows, metrics, p] slopes of log(predicted) by one-sided differences of a tenth of a parameter's spread."""
    steps = np.array(
        [
            0.1 * p.spread if v + 0.1 * p.spread <= p.high else -0.1 * p.spread
            for p, v in zip(parameters, values, strict=True)
        ]
    )
    moved = []
    for k, p in enumerate(parameters):
        profiles = profiles_at(parameters, values + np.eye(len(values))[k] * steps[k], base)
        moved.append(profiles if p.engine is None else {p.engine: profiles[p.engine]})
    found = simulators.evaluate(moved)
    slopes = [(f - ratios) / step for f, step in zip(found, steps, strict=True)]
    return np.asarray(np.nan_to_num(np.stack(slopes, axis=-1)))  # rows of other engines do not move


def _normal_equations(ratios: Array, slopes: Array, sigma: Array, row_weight: Array) -> tuple[Array, Array]:
    scaled = ratios / sigma
    size = np.abs(scaled)
    robust = np.where(size <= HUBER, 1.0, HUBER / np.maximum(size, HUBER))
    weights = np.where(np.isfinite(scaled), robust * row_weight[:, None], 0.0) / sigma**2
    residual = np.nan_to_num(ratios)
    derivative = np.nan_to_num(slopes)
    hessian = np.einsum("rmp,rmq,rm->pq", derivative, derivative, weights)
    gradient = np.einsum("rmp,rm,rm->p", derivative, residual, weights)
    return hessian, gradient


def _bounded_step(hessian: Array, gradient: Array, values: Array, low: Array, high: Array) -> Array:
    """Newton step inside the bounds: parameters that run into one stop there, and the others are solved again."""
    step = np.zeros_like(values)
    free = np.ones(len(values), dtype=bool)
    for _ in range(len(values)):
        held = hessian[np.ix_(free, ~free)] @ step[~free]
        step[free] = np.linalg.solve(hessian[np.ix_(free, free)], -gradient[free] - held)
        outside = free & ((values + step < low) | (values + step > high))
        if not outside.any():
            break
        step[outside] = np.clip(values + step, low, high)[outside] - values[outside]
        free &= ~outside
        if not free.any():
            break
    return step


def _residual_scale(ratios: Array, sigma: Array) -> float:
    """Square of the residuals' spread in units of sigma, by their median; at least 1."""
    scaled = np.abs(ratios / sigma)
    return max(1.0, float(np.nanmedian(scaled) / 0.6745) ** 2)
