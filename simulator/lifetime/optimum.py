"""Which model reaches a loss at the least cost of training *and* serving it.

The cost of a model with N parameters trained on D tokens is

    K(N, D) = 6·N·D·k_tr + S(N),      subject to L(N, D) = l,

k_tr being the cost of a training FLOP and S what serving takes over the model's life. With S(N) = 2·N·M this is eq. 6 of Sardana et
al. [1]_ (M: serving tokens, each weighted by the cost of a FLOP at its utilisation), and with M = D_inf·k_tr eq. 3. At every
optimum, with eps_N = alpha·A·N^−alpha, eps_D = beta·B·D^−beta and K_tr = 6·N·D·k_tr,

    eps_N/eps_D = 1 + (d ln S/d ln N)·S/K_tr.

.. [1] N. Sardana et al., "Beyond Chinchilla-optimal: accounting for inference in language model scaling laws", 2024,
   arXiv:2401.00448.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from simulator.errors import InfeasibleError, InputError
from simulator.scaling.laws import LossLaw, TrainingPoint


@dataclass(frozen=True)
class LifetimeOptimum:
    """The cheapest model over its life.

    Attributes
    ----------
    point
        N, D and the loss.
    training, serving
        parts of the cost, in the unit of the prices (FLOP, chip-seconds or USD).
    """

    point: TrainingPoint
    training: float
    serving: float

    @property
    def total(self) -> float:
        """Training and serving."""
        return self.training + self.serving


@dataclass(frozen=True)
class TokenDemand:
    """Tokens a model serves over its life, and what a FLOP of each costs.

    Attributes
    ----------
    input_tokens, output_tokens
        over the whole life.
    input_cost_per_flop, output_cost_per_flop
        price of a serving FLOP: (price of a chip-second) ÷ (peak FLOP/s × MFU). 1 counts FLOPs.
    """

    input_tokens: float
    output_tokens: float = 0.0
    input_cost_per_flop: float = 1.0
    output_cost_per_flop: float = 1.0

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("input_tokens", "output_tokens"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"demand.{name} = {getattr(self, name)}: must be finite and not negative")
        for name in ("input_cost_per_flop", "output_cost_per_flop"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"demand.{name} = {getattr(self, name)}: must be positive and finite")

    @property
    def cost_per_parameter(self) -> float:
        """2·M: what each parameter costs over the life, at two FLOPs a token."""
        return 2 * (self.input_tokens * self.input_cost_per_flop + self.output_tokens * self.output_cost_per_flop)


def flop_price(usd_per_chip_hour: float, peak_flops_per_s: float, mfu: float) -> float:
    """Price of one model FLOP. [USD per FLOP]

    >>> f"{flop_price(1.40, 312e12, 0.5):.4g}"
    '2.493e-18'
    """
    return usd_per_chip_hour / 3600 / (peak_flops_per_s * mfu)


def sardana_optimum(
    law: LossLaw, loss: float, demand: TokenDemand, *, train_cost_per_flop: float = 1.0, extrapolate: bool = False
) -> LifetimeOptimum:
    """Optimum of eq. 6, whose root in D the paper gives; solved in ln D between safe brackets.

    >>> from simulator.scaling.laws import law
    >>> best = sardana_optimum(law("sardana"), 1.947, TokenDemand(2e12), extrapolate=True)
    >>> f"{best.point.parameters:.5e} {best.point.tokens:.5e}"
    '2.41836e+10 2.65705e+12'

    Raises
    ------
    InfeasibleError
        If no model reaches the loss.
    InputError
        Outside the law's range, unless ``extrapolate``; or if the price is not positive.
    """
    if not 0 < train_cost_per_flop < math.inf:
        raise InputError(f"train_cost_per_flop = {train_cost_per_flop}: must be positive and finite")
    from scipy.optimize import brentq

    chinchilla = law.cheapest(loss, extrapolate=True)
    ratio = demand.cost_per_parameter / (6 * train_cost_per_flop)
    rest = loss - law.E

    def excess(log_tokens: float) -> float:
        """Derivative of the cost along the curve of equal loss, up to a positive factor; falls through 0 at the optimum."""
        tokens = math.exp(log_tokens)
        lost = law.B * tokens**-law.beta
        return float((law.beta / law.alpha + 1) * lost + law.beta / law.alpha * lost * ratio / tokens - rest)

    low = math.log(chinchilla.tokens)
    high = low + 1
    while excess(high) > 0:
        high += 1
    tokens = chinchilla.tokens if ratio == 0 else math.exp(float(brentq(excess, low, high, xtol=1e-14, rtol=1e-14)))
    point = law.point(law.parameters_for(tokens, loss), tokens, extrapolate=extrapolate)
    return LifetimeOptimum(point, point.flops * train_cost_per_flop, point.parameters * demand.cost_per_parameter)


def serve(
    law: LossLaw,
    loss: float,
    parameters: float,
    serving_cost: Callable[[float], float],
    *,
    train_cost_per_flop: float = 1.0,
    extrapolate: bool = False,
) -> LifetimeOptimum:
    """Cost of one size, trained until it reaches the loss; no optimisation.

    Raises
    ------
    InfeasibleError
        If this size never reaches the loss.
    """
    point = law.point(parameters, law.tokens_for(parameters, loss), extrapolate=extrapolate)
    return LifetimeOptimum(point, point.flops * train_cost_per_flop, serving_cost(parameters))


def optimum(
    law: LossLaw,
    loss: float,
    serving_cost: Callable[[float], float],
    *,
    train_cost_per_flop: float = 1.0,
    breaks: Sequence[float] = (),
    extrapolate: bool = False,
) -> LifetimeOptimum:
    """Optimum for any cost of serving N parameters; it may jump, at ``breaks``, where sharding or fleets change.

    Every smooth piece between two breaks is searched by itself, the sizes at the breaks included, so a jump is never
    averaged over. Within a piece the cost should have one minimum.

    Parameters
    ----------
    serving_cost
        N → cost over the life; infinite where no deployment serves the model.
    breaks
        sizes from which on the cost follows another formula.

    Raises
    ------
    InfeasibleError
        If no size reaches the loss and can be served.
    """
    from scipy.optimize import minimize_scalar

    smallest = law.smallest_parameters(loss)
    largest = law.cheapest(loss, extrapolate=True).parameters * 4
    edges = [smallest * (1 + 1e-9), *sorted(b for b in breaks if smallest < b < largest), largest]

    def cost(log_parameters: float) -> float:
        parameters = math.exp(log_parameters)
        point = 6 * parameters * law.tokens_for(parameters, loss) * train_cost_per_flop
        return point + serving_cost(parameters)

    candidates: list[tuple[float, float]] = []
    for left, right in pairwise(edges):
        inside = (math.log(left), math.log(math.nextafter(right, 0.0)))
        found = minimize_scalar(cost, bounds=inside, method="bounded", options={"xatol": 1e-12})
        candidates += [(cost(x), math.exp(x)) for x in (*inside, float(found.x))]
    total, parameters = min(candidates)
    if not math.isfinite(total):
        raise InfeasibleError(f"no size between {smallest:.4g} and {largest:.4g} parameters can be served")
    return serve(law, loss, parameters, serving_cost, train_cost_per_flop=train_cost_per_flop, extrapolate=extrapolate)


def identity_error(law: LossLaw, best: LifetimeOptimum, elasticity: float = 1.0) -> float:
    """Relative error of the optimality identity at a point; 0 at an interior optimum. [1]

    ``elasticity`` is d ln S/d ln N there: 1 for eq. 6.
    """
    n, d = best.point.parameters, best.point.tokens
    ratio = law.alpha * law.A * n**-law.alpha / (law.beta * law.B * d**-law.beta)
    return float(ratio / (1 + elasticity * best.serving / best.training) - 1)
