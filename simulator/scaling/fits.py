"""Fitting L = E + A/N^alpha + B/D^beta to training runs, with what is known of its error.

Parameters are theta = (a, b, e, alpha, beta), a = ln A, b = ln B, e = ln E, and a run's residual is

    r = ln(exp(a − alpha·ln N) + exp(b − beta·ln D) + exp(e)) − ln L.

The choice of loss on r is the choice of a noise model; methods differ by a factor of ten in tokens per parameter on the same runs, so
the method is explicit and log-likelihoods are comparable across methods [1]_.

.. [1] T. Besiroglu et al., "Chinchilla scaling: a replication attempt", 2024, arXiv:2404.10102, eqs. 3 to 5.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from simulator.errors import InputError, nearest
from simulator.scaling.fitted import FittedRange
from simulator.scaling.laws import LossLaw

Array = NDArray[np.float64]
Method = Literal["huber", "huber_mle", "log_least_squares", "least_squares", "laplace", "student_t"]

HUBER_DELTA = 1e-3
_STARTS = [
    (a, b, e, alpha, beta)
    for a in (5.0, 15.0)
    for b in (5.0, 15.0)
    for e in (-1.0, 0.5)
    for alpha in (0.3, 0.8)
    for beta in (0.3, 0.8)
]


@dataclass(frozen=True)
class Runs:
    """Training runs: parameters, tokens and final loss, [n] each."""

    parameters: Array
    tokens: Array
    loss: Array

    def __post_init__(self) -> None:
        """Refuse what would give a silently wrong fit."""
        sizes = {len(self.parameters), len(self.tokens), len(self.loss)}
        if len(sizes) != 1 or sizes == {0}:
            raise InputError("training runs: parameters, tokens and loss need one length, and at least one row")
        for name in ("parameters", "tokens", "loss"):
            values = getattr(self, name)
            bad = ~(np.isfinite(values) & (values > 0))
            if bad.any():
                row = int(np.argmax(bad))
                raise InputError(f"training runs: {name}[{row}] = {values[row]}: must be positive and finite")

    def __len__(self) -> int:
        """Return the number of runs."""
        return len(self.loss)

    def take(self, chosen: NDArray[np.bool_] | NDArray[np.int64]) -> "Runs":
        """Return some of the runs."""
        return Runs(self.parameters[chosen], self.tokens[chosen], self.loss[chosen])

    @property
    def flops(self) -> Array:
        """6ND. [n, FLOP]"""
        return 6 * self.parameters * self.tokens

    def fitted_range(self) -> FittedRange:
        """Return the range that a law fitted to these runs may claim."""

        def limits(values: Array) -> tuple[float, float]:
            return float(values.min()), float(values.max())

        return FittedRange(
            limits(self.parameters), limits(self.tokens), limits(self.flops), limits(self.tokens / self.parameters)
        )


@dataclass(frozen=True)
class Fit:
    """A fitted law.

    Attributes
    ----------
    law
        with the range of its runs.
    method, n
        noise model, and number of runs.
    objective
        what was minimised: the Huber sum, the sum of squares, or minus the log-likelihood.
    log_likelihood
        of the runs' log losses under the method's noise model at its best scale; of a method without a density (huber,
        least_squares) None.
    scale, shape
        scale of the noise in ln L, and degrees of freedom of Student's t.
    """

    law: LossLaw
    method: Method
    n: int
    objective: float
    log_likelihood: float | None
    scale: float | None = None
    shape: float | None = None

    @property
    def aic(self) -> float | None:
        """Akaike's criterion, where there is a likelihood."""
        free = 5 + (self.scale is not None) + (self.shape is not None)
        return None if self.log_likelihood is None else 2 * free - 2 * self.log_likelihood


def huber(residuals: Array, delta: float) -> Array:
    """r²/2 up to delta, delta·(|r| − delta/2) beyond."""
    size = np.abs(residuals)
    return np.where(size <= delta, 0.5 * residuals**2, delta * (size - 0.5 * delta))


def residuals(theta: Array, runs: Runs) -> Array:
    """Log residuals of the runs at theta = (a, b, e, alpha, beta). [n]"""
    return _residuals(theta, np.log(runs.parameters), np.log(runs.tokens), np.log(runs.loss))[0]


def theta_of(law: LossLaw) -> Array:
    """Return theta of a law."""
    return np.array([math.log(law.A), math.log(law.B), math.log(law.E), law.alpha, law.beta])


def huber_objective(law: LossLaw, runs: Runs, *, delta: float = HUBER_DELTA) -> float:
    """Sum of Huber losses of a law's log residuals."""
    return float(huber(residuals(theta_of(law), runs), delta).sum())


def fit_loss_law(
    runs: Runs,
    method: Method = "huber",
    *,
    delta: float = HUBER_DELTA,
    start: Array | None = None,
    name: str = "fitted",
) -> Fit:
    """Fit the five coefficients.

    Parameters
    ----------
    method
        ``huber``: the sum of Huber losses at ``delta``; ``huber_mle``: its density exp(−Huber(r/s))/s, s fitted;
        ``log_least_squares``: Gaussian in ln L; ``least_squares``: Gaussian in L; ``laplace``; ``student_t``.
    start
        theta to start from; None: a grid of 32 starts, of which the best wins.

    Raises
    ------
    InputError
        If the method is unknown, or there are fewer than six runs.
    """
    if method not in get_args(Method):
        raise InputError(f"unknown fitting method {method!r}{nearest(method, get_args(Method))}")
    if len(runs) < 6:
        raise InputError(f"{len(runs)} training runs: five coefficients need at least six")
    from scipy.optimize import least_squares

    columns = np.log(runs.parameters), np.log(runs.tokens), np.log(runs.loss)

    def robust(begin: Array, width: float | None) -> Array:
        """Least squares in ln L, or its Huber form."""
        found = least_squares(
            lambda theta: _residuals(theta, *columns)[0],
            begin,
            jac=lambda theta: _residuals(theta, *columns)[1],
            loss="linear" if width is None else "huber",
            f_scale=1.0 if width is None else width,
            x_scale="jac",
            xtol=1e-15,
            ftol=1e-15,
            gtol=1e-15,
            max_nfev=400,
        )
        return np.asarray(found.x)

    begins = [start] if start is not None else [np.array(each) for each in _STARTS]
    smooth = [robust(begin, None) for begin in begins]
    squares = [float((_residuals(theta, *columns)[0] ** 2).sum()) for theta in smooth]
    base = smooth[int(np.argmin(squares))]
    if method == "log_least_squares":
        return _gaussian(base, runs, name)
    if method == "least_squares":
        found = least_squares(
            lambda theta: np.exp(_residuals(theta, *columns)[0] + columns[2]) - runs.loss,
            base,
            x_scale="jac",
            xtol=1e-15,
            ftol=1e-15,
            gtol=1e-15,
            max_nfev=2000,
        )
        theta = np.asarray(found.x)
        return Fit(_law(theta, runs, name, method), method, len(runs), 2 * float(found.cost), None)
    # Narrow losses have narrow valleys: the width shrinks step by step from that of the smooth fit.
    theta = base
    for width in (1e-2, 3e-3, HUBER_DELTA):
        theta = robust(theta, width)
    if method == "huber":
        value, theta = _polish(lambda t: huber(_residuals(t, *columns)[0], delta).sum(), robust(theta, delta))
        return Fit(_law(theta, runs, name, method), method, len(runs), value, None)
    return _likelihood_fit(theta, runs, columns, method, delta, name)


def bootstrap(runs: Runs, best: Fit, resamples: int = 1000, *, seed: int = 0) -> Array:
    """Refit on resampled runs, each from the best fit; non-parametric. [resamples, 5] theta of each.

    Raises
    ------
    InputError
        If fewer than two resamples are asked for.
    """
    from simulator.randomness import uniform

    if resamples < 2:
        raise InputError(f"resamples = {resamples}: must be at least 2")
    n = len(runs)
    start = theta_of(best.law)
    draws = np.empty((resamples, 5))
    for i in range(resamples):
        chosen = np.floor(uniform(seed, "bootstrap", i * n, (i + 1) * n) * n).astype(np.int64)
        draws[i] = theta_of(fit_loss_law(runs.take(chosen), best.method, start=start).law)
    return draws


def _residuals(theta: Array, log_n: Array, log_d: Array, log_loss: Array) -> tuple[Array, Array]:
    """Log residuals [n] and their derivatives by theta [n, 5]."""
    a, b, e, alpha, beta = theta
    terms = np.stack([a - alpha * log_n, b - beta * log_d, np.full_like(log_n, e)])
    top = terms.max(axis=0)
    weights = np.exp(terms - top)
    total = weights.sum(axis=0)
    w = weights / total
    jacobian = np.stack([w[0], w[1], w[2], -w[0] * log_n, -w[1] * log_d], axis=1)
    return np.log(total) + top - log_loss, jacobian


def _law(theta: Array, runs: Runs, name: str, method: str) -> LossLaw:
    a, b, e, alpha, beta = (float(x) for x in theta)
    source = f"fitted to {len(runs)} runs by {method}"
    return LossLaw(name, math.exp(e), math.exp(a), math.exp(b), alpha, beta, source, runs.fitted_range())


def _gaussian(theta: Array, runs: Runs, name: str) -> Fit:
    squares = float((residuals(theta, runs) ** 2).sum())
    n = len(runs)
    sigma = math.sqrt(squares / n)
    likelihood = -0.5 * n * (math.log(2 * math.pi * sigma**2) + 1)
    method: Method = "log_least_squares"
    return Fit(_law(theta, runs, name, method), method, n, squares, likelihood, sigma)


def _polish(objective: Callable[[Array], float], theta: Array) -> tuple[float, Array]:
    """Descend to the bottom of a flat, kinked valley: Nelder–Mead from ever smaller simplices."""
    from scipy.optimize import minimize

    best = float(objective(theta))
    while True:
        found = minimize(
            objective,
            theta,
            method="Nelder-Mead",
            options={"xatol": 1e-10, "fatol": 1e-15, "maxfev": 4000, "adaptive": True},
        )
        gain = best - float(found.fun)
        if gain > 0:
            best, theta = float(found.fun), np.asarray(found.x)
        if gain < 1e-10 * abs(best):
            return best, theta


def _likelihood_fit(
    theta: Array, runs: Runs, columns: tuple[Array, Array, Array], method: Method, delta: float, name: str
) -> Fit:
    n = len(runs)
    # ∫ exp(−Huber(x)) dx, so that the density integrates to one
    inside = math.sqrt(2 * math.pi) * math.erf(delta / math.sqrt(2))
    norm = inside + 2 * math.exp(-(delta**2) / 2) / delta

    def minus_log_likelihood(free: Array) -> float:
        r = _residuals(free[:5], *columns)[0]
        scale = math.exp(free[5])
        if method == "huber_mle":
            return float(huber(r / scale, delta).sum() + n * (free[5] + math.log(norm)))
        if method == "laplace":
            return float(np.abs(r).sum() / scale + n * math.log(2 * scale))
        nu = math.exp(free[6])
        constant = math.lgamma((nu + 1) / 2) - math.lgamma(nu / 2) - 0.5 * math.log(nu * math.pi) - free[5]
        return float(0.5 * (nu + 1) * np.log1p((r / scale) ** 2 / nu).sum() - n * constant)

    spread = float(np.abs(_residuals(theta, *columns)[0]).mean())
    extra = {
        "huber_mle": [math.log(spread * delta)],
        "laplace": [math.log(spread)],
        "student_t": [math.log(spread), math.log(3.0)],
    }[method]
    value, free = _polish(minus_log_likelihood, np.concatenate([theta, extra]))
    shape = math.exp(free[6]) if method == "student_t" else None
    return Fit(_law(free[:5], runs, name, method), method, n, value, -value, math.exp(free[5]), shape)
