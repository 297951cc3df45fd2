"""Demand over a model's life, and choices under a wrong forecast of it.

With exogenous demand the expected cost is linear in D_inf, so a risk-neutral choice needs only the mean; the spread matters for
regret, the cost of a choice over that of a clairvoyant one.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simulator.errors import InputError
from simulator.lifetime.optimum import LifetimeOptimum, TokenDemand, sardana_optimum, serve
from simulator.scaling.laws import LossLaw


@dataclass(frozen=True)
class RegretTable:
    """Choices against scenarios.

    Attributes
    ----------
    parameters
        [c] sizes compared.
    demands
        [s] demands that may come true.
    costs
        [c, s] cost of each choice in each scenario.
    optimal_costs
        [s] cost of the best size for that scenario.
    """

    parameters: NDArray[np.float64]
    demands: NDArray[np.float64]
    costs: NDArray[np.float64]
    optimal_costs: NDArray[np.float64]

    @property
    def ratios(self) -> NDArray[np.float64]:
        """[c, s] cost over the clairvoyant optimum; at least 1."""
        return np.asarray(self.costs / self.optimal_costs)

    @property
    def minimax(self) -> int:
        """Index of the choice whose worst ratio is smallest."""
        return int(np.argmin(self.ratios.max(axis=1)))

    def expected(self, weights: Sequence[float]) -> NDArray[np.float64]:
        """[c] expected cost under probabilities of the scenarios.

        Raises
        ------
        InputError
            If they do not fit, or do not sum to 1.
        """
        chances = np.asarray(weights, dtype=np.float64)
        if len(chances) != len(self.demands) or (chances < 0).any() or abs(chances.sum() - 1) > 1e-9:
            raise InputError(f"weights {list(weights)}: one for each of {len(self.demands)} demands, summing to 1")
        return np.asarray(self.costs @ chances)


def regret_table(
    law: LossLaw,
    loss: float,
    choices: Sequence[float],
    demands: Sequence[float],
    *,
    demand_of: Callable[[float], TokenDemand] = TokenDemand,
    train_cost_per_flop: float = 1.0,
) -> RegretTable:
    """Cost of the model sized for each of ``choices`` tokens of demand when each of ``demands`` comes true.

    ``demand_of`` turns a number of tokens into a priced demand. Laws are extrapolated: a regret table asks what if.
    """

    def best(tokens: float) -> LifetimeOptimum:
        return sardana_optimum(law, loss, demand_of(tokens), train_cost_per_flop=train_cost_per_flop, extrapolate=True)

    sizes = [best(tokens).point.parameters for tokens in choices]

    def cost(parameters: float, tokens: float) -> float:
        per_parameter = demand_of(tokens).cost_per_parameter
        return serve(
            law,
            loss,
            parameters,
            lambda n: n * per_parameter,
            train_cost_per_flop=train_cost_per_flop,
            extrapolate=True,
        ).total

    return RegretTable(
        np.array(sizes),
        np.array(demands, dtype=np.float64),
        np.array([[cost(size, tokens) for tokens in demands] for size in sizes]),
        np.array([best(tokens).total for tokens in demands]),
    )


def lifetime_tokens(
    first_year_tokens: float, years: float, *, growth: float = 0.0, price_decline: float = 0.0, elasticity: float = 0.0
) -> float:
    """Tokens over a life when demand grows and falling prices add to it: D0·(e^(xT) − 1)/x, x = g + eps·d. [tokens]

    ``growth`` g and ``price_decline`` d are continuous rates per year.

    >>> lifetime_tokens(1e12, 3.0)
    3000000000000.0
    """
    rate = growth + elasticity * price_decline
    return first_year_tokens * years * _mean_growth(rate * years)


def present_value(
    first_year_spend: float,
    years: float,
    *,
    discount: float = 0.0,
    growth: float = 0.0,
    price_decline: float = 0.0,
    elasticity: float = 0.0,
) -> float:
    """Present value of serving: S0·(1 − e^(−kT))/k, k = r − g − (eps − 1)·d. [unit of the spend]

    Spending rises as prices fall only if the elasticity is above 1.

    >>> present_value(100.0, 3.0)
    300.0
    """
    rate = discount - growth - (elasticity - 1) * price_decline
    return first_year_spend * years * _mean_growth(-rate * years)


def _mean_growth(x: float) -> float:
    """Mean of e^(xt) over t in [0, 1]: (e^x − 1)/x; 1 + x/2 where that would divide by next to nothing."""
    return math.expm1(x) / x if abs(x) > 1e-9 else 1 + x / 2


def bass_adoption(years: float, innovation: float, imitation: float) -> float:
    """Share of final demand reached by a time, F(t) of the Bass model with coefficients p and q. [1]"""
    both = innovation + imitation
    decay = math.exp(-both * years)
    return (1 - decay) / (1 + imitation / innovation * decay)


def elastic_optimum(
    law: LossLaw,
    loss: float,
    base_tokens: float,
    base_parameters: float,
    elasticity: float,
    *,
    demand_of: Callable[[float], TokenDemand] = TokenDemand,
    train_cost_per_flop: float = 1.0,
    extrapolate: bool = False,
) -> tuple[LifetimeOptimum, float]:
    """Fixed point of size and demand when price follows serving cost, which is proportional to N.

    D_inf(N) = D0·(N/N0)^(−eps); the optimum for D_inf(N) must be N. Returns it and its demand. Cost at given quality ignores the
    value of added demand: compare profits, not costs, across elasticities.

    Raises
    ------
    InputError
        If the elasticity is negative.
    """
    if not elasticity >= 0:
        raise InputError(f"elasticity = {elasticity}: must not be negative")
    from scipy.optimize import brentq

    def best(log_parameters: float) -> LifetimeOptimum:
        tokens = base_tokens * math.exp(-elasticity * (log_parameters - math.log(base_parameters)))
        return sardana_optimum(law, loss, demand_of(tokens), train_cost_per_flop=train_cost_per_flop, extrapolate=True)

    # A larger N means less demand, hence a larger optimum: the excess of N over it may still only rise through zero once.
    low = math.log(law.smallest_parameters(loss) * (1 + 1e-9))
    high = math.log(law.cheapest(loss, extrapolate=True).parameters * (1 + 1e-9))
    root = float(brentq(lambda x: x - math.log(best(x).point.parameters), low, high, xtol=1e-13))
    found = best(root)
    law.point(found.point.parameters, found.point.tokens, extrapolate=extrapolate)
    return found, base_tokens * (math.exp(root) / base_parameters) ** -elasticity
