"""Robust least squares of positive models: a few positive parameters, errors measured as log ratios.

Iteratively reweighted Levenberg–Marquardt steps on the logarithms of the parameters, with Huber's loss on
``log(model) − log(measured)`` [1]_: a row that is off by more than ``delta`` pulls in proportion to its error, not its square.
Limits are kept by projection. Deterministic: no random starts.

.. [1] P. J. Huber, "Robust Estimation of a Location Parameter", Ann. Math. Statist. 35(1), 1964, doi:10.1214/aoms/1177703732.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simulator.errors import InputError

Array = NDArray[np.float64]

#: Log ratio beyond which a row counts linearly: about the spread of good kernel models.
HUBER_DELTA = 0.1
_NUDGE = 1e-4
_LONGEST_STEP = 1.0
_NEAR_LIMIT = 1e-3


@dataclass(frozen=True)
class Parameter:
    """A positive parameter with a first guess and the range that physics allows."""

    name: str
    start: float
    least: float
    most: float

    def __post_init__(self) -> None:
        """Check the range."""
        if not 0 < self.least <= self.start <= self.most < float("inf"):
            raise InputError(
                f"parameter {self.name}: need 0 < least ≤ start ≤ most, got {self.least}, {self.start}, {self.most}"
            )


@dataclass(frozen=True)
class Fit:
    """Result of :func:`fit_log_ratios`.

    Attributes
    ----------
    values
        fitted parameters, in order.
    relative_errors
        standard errors of their logarithms; 0 for those held at a limit.
    at_limit
        whether each ended at an edge of its range.
    correlation
        of the logarithms of the free parameters, in order; an empty array for fewer than two.
    log_ratios
        log(model / measured) of each row.
    steps
        accepted steps.
    """

    values: Array
    relative_errors: Array
    at_limit: NDArray[np.bool_]
    correlation: Array
    log_ratios: Array
    steps: int


def fit_log_ratios(
    model: Callable[[Array], Array],
    measured: Array,
    parameters: Sequence[Parameter],
    *,
    start: Array | None = None,
    delta: float = HUBER_DELTA,
    max_steps: int = 60,
) -> Fit:
    """Fit ``model(values)`` to ``measured`` by Huber's loss on the log ratio.

    Parameters
    ----------
    model
        positive predictions of every row for given parameter values.
    measured
        positive measurements.
    start
        values to start from, in place of the parameters' own.

    Raises
    ------
    InputError
        If there are fewer rows than parameters, or a measurement is not positive.

    >>> x = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    >>> found = fit_log_ratios(lambda p: p[0] + p[1] * x, 3 + 2 * x, [Parameter("a", 1, 0.1, 10), Parameter("b", 1, 0.1, 10)])
    >>> [round(float(v), 4) for v in found.values]
    [3.0, 2.0]
    """
    if len(measured) < len(parameters):
        raise InputError(f"{len(measured)} rows cannot fix {len(parameters)} parameters")
    if not (np.isfinite(measured).all() and (measured > 0).all()):
        raise InputError("measured times must be finite and positive")
    least, most = (np.log([getattr(p, side) for p in parameters]) for side in ("least", "most"))
    first = np.array([p.start for p in parameters]) if start is None else start
    theta = np.clip(np.log(first), least, most)
    logs = np.log(measured)

    def ratios(at: Array) -> Array:
        return np.asarray(np.log(model(np.exp(at))) - logs, dtype=np.float64)

    now = ratios(theta)
    loss, damping, steps = _huber(now, delta), 1e-2, 0
    for _ in range(max_steps):
        slopes = _jacobian(ratios, theta, now, most)
        weighted = slopes * _weights(now, delta)[:, None]
        normal, gradient = weighted.T @ slopes, weighted.T @ now
        moved = False
        for _ in range(10):
            ridge = np.diag(normal).copy()
            step = -np.linalg.solve(normal + np.diag(damping * ridge + 1e-9 * ridge.sum() + 1e-300), gradient)
            trial = np.clip(theta + np.clip(step, -_LONGEST_STEP, _LONGEST_STEP), least, most)
            then = ratios(trial)
            new_loss = _huber(then, delta)
            if new_loss < loss:
                moved = True
                break
            damping *= 4
        if not moved:
            break
        gain = (loss - new_loss) / loss
        theta, now, loss, damping, steps = trial, then, new_loss, max(damping / 3, 1e-9), steps + 1
        if gain < 1e-6:
            break
    at_limit = (theta - least < _NEAR_LIMIT) | (most - theta < _NEAR_LIMIT)
    errors, correlation = _uncertainty(_jacobian(ratios, theta, now, most), now, delta, ~at_limit)
    return Fit(np.exp(theta), errors, at_limit, correlation, now, steps)


def _huber(ratios: Array, delta: float) -> float:
    size = np.abs(ratios)
    return float(np.where(size < delta, 0.5 * size**2, delta * (size - 0.5 * delta)).sum())


def _weights(ratios: Array, delta: float) -> Array:
    return np.asarray(delta / np.maximum(np.abs(ratios), delta))


def _jacobian(ratios: Callable[[Array], Array], theta: Array, now: Array, most: Array) -> Array:
    slopes = np.empty((len(now), len(theta)))
    for i in range(len(theta)):
        nudge = _NUDGE if theta[i] + _NUDGE <= most[i] else -_NUDGE
        there = theta.copy()
        there[i] += nudge
        slopes[:, i] = (ratios(there) - now) / nudge
    return slopes


def _uncertainty(slopes: Array, ratios: Array, delta: float, free: NDArray[np.bool_]) -> tuple[Array, Array]:
    """Standard errors and correlation of the free parameters: Huber's sandwich, with rows taken as independent."""
    errors = np.zeros(slopes.shape[1])
    if not free.any():
        return errors, np.empty((0, 0))
    active = slopes[:, free]
    inside = np.abs(ratios) < delta
    bread = np.linalg.pinv(active.T @ (active * inside[:, None]))
    score = active * np.clip(ratios, -delta, delta)[:, None]
    covariance = bread @ (score.T @ score) @ bread
    sigma = np.sqrt(np.maximum(np.diag(covariance), 0.0))
    errors[free] = sigma
    if free.sum() < 2:
        return errors, np.empty((0, 0))
    scale = np.where(sigma > 0, sigma, 1.0)
    return errors, np.asarray(covariance / np.outer(scale, scale))


def quantiles(log_ratios: Array) -> tuple[float, float, float]:
    """Median and 90th percentile of the absolute relative error, and the median of the signed one."""
    error = np.expm1(log_ratios)
    size = np.abs(error)
    return float(np.median(size)), float(np.quantile(size, 0.9)), float(np.median(error))
