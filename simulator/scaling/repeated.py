"""Training on repeated data: the data-constrained law of Muennighoff et al. [1]_.

Of D tokens seen, U = min(U_D, D) are unique; R_D = D/U − 1 counts repeats, R_N = N/U_N − 1 the excess of parameters over those that are optimal for
U. Repeats and excess parameters lose their value exponentially:

    L = E + A/[U_N·(1 + r_N·(1 − e^(−R_N/r_N)))]^alpha + B/[U·(1 + r_D·(1 − e^(−R_D/r_D)))]^beta.

Above the optimal size excess parameters are discounted even when nothing repeats, so there the law is not its own base law.

.. [1] N. Muennighoff et al., "Scaling data-constrained language models", 2023, arXiv:2305.16264, eqs. 5 to 7.
"""

import math
from dataclasses import dataclass, field

from simulator.errors import InputError
from simulator.scaling.fitted import FittedRange
from simulator.scaling.laws import LossLaw, law


@dataclass(frozen=True)
class RepeatedDataLaw:
    """A base law with the constants of decay.

    Attributes
    ----------
    base
        law of unrepeated data.
    repeats
        r_D: the most that repeats can add, in multiples of the unique data.
    excess
        r_N, for parameters.
    fitted
        range of the runs.
    """

    base: LossLaw = field(default_factory=lambda: law("muennighoff_c4"))
    repeats: float = 15.387756
    excess: float = 5.309743
    fitted: FittedRange = field(default_factory=lambda: FittedRange((7.0e6, 8.7e9), (1e8, 9e11)))
    caution: str = (
        "15.39 and 5.31 are a local minimum: 100 and 1.68 fit as well, and the 80 % interval of the first is 6.9 to "
        "unbounded. Carry an interval past eight epochs"
    )

    def effective_tokens(self, tokens: float, unique: float) -> float:
        """Tokens of fresh data worth as much as D tokens of which ``unique`` are different.

        >>> [round(RepeatedDataLaw().effective_tokens(epochs, 1.0), 4) for epochs in (2, 4, 40)]
        [1.9682, 3.7257, 15.1675]
        """
        different = min(unique, tokens)
        return different * (1 + self.repeats * -math.expm1(-(tokens / different - 1) / self.repeats))

    def marginal_value(self, epochs: float) -> float:
        """Value of one more token after so many epochs, relative to a fresh one.

        >>> round(RepeatedDataLaw().marginal_value(4), 4)
        0.8229
        """
        return math.exp(-(epochs - 1) / self.repeats)

    def effective_parameters(self, parameters: float, unique: float) -> float:
        """Parameters after the excess over the optimum of the unique data has been discounted."""
        a, b = self.base.exponents
        optimal = self.base.G * (self.base.G * unique) ** (a / b)
        useful = min(parameters, optimal)
        return float(useful * (1 + self.excess * -math.expm1(-(parameters / useful - 1) / self.excess)))

    def loss(self, parameters: float, tokens: float, unique: float, *, extrapolate: bool = False) -> float:
        """L(N, D, U). [nats per token]

        >>> RepeatedDataLaw().loss(6.34e9, 242e9, 25e9)
        2.2256440889984477
        """
        self.fitted.require(
            f"{self.base.name} on repeated data",
            {"parameters": parameters, "tokens": tokens},
            extrapolate=extrapolate,
        )
        if not 0 < unique < math.inf:
            raise InputError(f"unique tokens = {unique}: must be positive and finite")
        different = min(unique, tokens)
        size = self.effective_parameters(parameters, different)
        data = self.effective_tokens(tokens, different)
        return float(self.base.E + self.base.A * size**-self.base.alpha + self.base.B * data**-self.base.beta)

    def optimum(self, flops: float, unique: float, *, extrapolate: bool = False) -> tuple[float, float, float]:
        """Return N, D and the loss of the best model for 6ND = ``flops`` when only ``unique`` tokens are different."""
        from scipy.optimize import minimize_scalar

        def at(log_tokens: float) -> float:
            tokens = math.exp(log_tokens)
            return self.loss(flops / 6 / tokens, tokens, unique, extrapolate=True)

        centre = math.log(math.sqrt(flops / 6))
        found = minimize_scalar(at, bounds=(centre - 12, centre + 12), method="bounded", options={"xatol": 1e-12})
        tokens = math.exp(float(found.x))
        parameters = flops / 6 / tokens
        return parameters, tokens, self.loss(parameters, tokens, unique, extrapolate=extrapolate)
