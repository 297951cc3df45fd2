"""Over-training and downstream error: the laws of Gadre et al. [1]_, and two published frontiers.

With M = D/N tokens per parameter, C = 6ND and eta = alpha/2 (alpha = beta imposed)

    L = E + (a·M^eta + b·M^(−eta))·C^(−eta),      error = epsilon − k·exp(−gamma·L).

.. [1] S. Y. Gadre et al., "Language models scale reliably with over-training and on downstream tasks", 2024, arXiv:2403.08540,
   eqs. 4 and 5.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simulator.errors import InputError, nearest
from simulator.scaling.fitted import FittedRange

Array = NDArray[np.float64]


@dataclass(frozen=True)
class OvertrainingLaw:
    """One training set. ``k``, ``gamma`` and ``epsilon`` give the mean error of 17 downstream tasks from the C4 loss."""

    name: str
    E: float
    a: float
    b: float
    eta: float
    k: float
    gamma: float
    epsilon: float
    fitted: FittedRange
    source: str = "refit of the five points of Gadre et al. 2024, arXiv:2403.08540 (loss on C4 validation)"

    def loss(self, tokens_per_parameter: float, flops: float, *, extrapolate: bool = False) -> float:
        """Loss on C4 at M = D/N and C = 6ND. [nats per token]"""
        self.fitted.require(
            self.name, {"tokens_per_parameter": tokens_per_parameter, "flops": flops}, extrapolate=extrapolate
        )
        grown = tokens_per_parameter**self.eta
        return float(self.E + (self.a * grown + self.b / grown) * flops**-self.eta)

    def downstream_error(self, loss: float) -> float:
        """Mean top-1 error of the 17 tasks at a C4 loss. [1]"""
        return self.epsilon - self.k * math.exp(-self.gamma * loss)


_FIVE_POINTS = FittedRange(tokens_per_parameter=(20, 640), flops=(2e16, 3e22))

OVERTRAINING = {
    law.name: law
    for law in (
        OvertrainingLaw("gadre_c4", 1.50826, 141.277, 189.516, 0.121236, 2.0789, 0.7561, 0.8497, _FIVE_POINTS),
        OvertrainingLaw("gadre_redpajama", 1.83665, 212.236, 366.687, 0.136425, 2.2065, 0.7146, 0.8570, _FIVE_POINTS),
        OvertrainingLaw("gadre_refinedweb", 1.73446, 157.116, 246.207, 0.127197, 2.2148, 0.7070, 0.8653, _FIVE_POINTS),
    )
}


def overtraining_law(name: str) -> OvertrainingLaw:
    """Return a law by name.

    Raises
    ------
    InputError
        If there is none of that name.
    """
    if name not in OVERTRAINING:
        raise InputError(f"unknown over-training law {name!r}{nearest(name, OVERTRAINING)}")
    return OVERTRAINING[name]


def llama3_tokens(flops: float) -> float:
    """Compute-optimal tokens by the frontier of Llama 3: 0.299·C^0.537 (Llama team 2024, arXiv:2407.21783).

    >>> f"{llama3_tokens(3.8e25):.3g}"
    '1.63e+13'
    """
    return 0.299 * float(flops**0.537)


def deepseek_frontier(flops: float) -> tuple[float, float]:
    """FLOPs per token and tokens of DeepSeek LLM's frontier (2024, arXiv:2401.02954): their product is the budget.

    >>> m, d = deepseek_frontier(1e24)
    >>> abs(m * d / 1e24 - 1) < 2e-3
    True
    """
    return 0.1715 * float(flops**0.5243), 5.8316 * float(flops**0.4757)


def fit_overtraining(tokens_per_parameter: Array, flops: Array, loss: Array) -> tuple[float, float, float, float]:
    """Least squares of the loss in E, a, b and eta; at least five runs. [n] each.

    Raises
    ------
    InputError
        If there are fewer than five runs.
    """
    if len(loss) < 5:
        raise InputError(f"{len(loss)} training runs: four coefficients need at least five")
    from scipy.optimize import least_squares

    def excess(theta: Array) -> Array:
        offset, a, b, eta = theta
        grown = tokens_per_parameter**eta
        return np.asarray(offset + (np.exp(a) * grown + np.exp(b) / grown) * flops**-eta - loss)

    found = least_squares(
        excess, (1.5, 5.0, 5.0, 0.12), x_scale="jac", xtol=1e-15, ftol=1e-15, gtol=1e-15, max_nfev=5000
    )
    offset, a, b, eta = (float(x) for x in found.x)
    return offset, math.exp(a), math.exp(b), eta
