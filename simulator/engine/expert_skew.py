"""How unevenly tokens fall on the experts of a step, as a seeded factor on the experts' time.

The chip whose experts draw most tokens sets the pace, and who that is, and by how much, changes from step to step. Here the
time of the routed experts of step j is f_j ≥ 1 times that of the cost table, with f_j from a cyclic table of
:data:`LENGTH` draws.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simulator.errors import InputError
from simulator.randomness import normal

LENGTH = 4096
"""Factors before they repeat."""

STEPS_PER_UNIT = 1024
"""Factors are multiples of 1/1024, so that no result hangs on the last digit of an exponential."""


@dataclass(frozen=True)
class ExpertSkew:
    """f = 1 + (mean − 1)·X with X log-normal of mean 1.

    Attributes
    ----------
    mean
        mean of the factor; 1: the table's time, always.
    sigma
        standard deviation of ln X; 0: the factor is the same in every step.
    seed
        of the table.

    The distribution is a choice, not a measurement: positive, skewed, with its mean and spread set apart.
    """

    mean: float = 1.0
    sigma: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        """Check ranges."""
        if not 1 <= self.mean < np.inf:
            raise InputError(f"engine.expert_skew.mean = {self.mean}: must be finite and at least 1")
        if not 0 <= self.sigma <= 4:
            raise InputError(f"engine.expert_skew.sigma = {self.sigma}: must be 0 … 4")
        if self.seed < 0:
            raise InputError(f"engine.expert_skew.seed = {self.seed}: must not be negative")

    @property
    def on(self) -> bool:
        """Whether it changes anything."""
        return self.mean > 1

    def excess(self) -> NDArray[np.float64]:
        """[LENGTH] f_j − 1; empty if it changes nothing.

        >>> skew = ExpertSkew(mean=1.25, sigma=0.5)
        >>> bool(abs(skew.excess().mean() - 0.25) < 0.01), bool(skew.excess().min() >= 0)
        (True, True)
        """
        if not self.on:
            return np.zeros(0)
        draws = normal(self.seed, "expert skew", 0, LENGTH)
        spread = np.exp(self.sigma * draws - 0.5 * self.sigma**2)
        return np.asarray(np.rint((self.mean - 1) * spread * STEPS_PER_UNIT) / STEPS_PER_UNIT)


EVEN = ExpertSkew()
"""Every step takes the table's time."""
