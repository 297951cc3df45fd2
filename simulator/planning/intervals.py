"""How many chips a planned fleet takes if the calibrated parameters are not what they were fitted as.

Each draw of the parameters (:mod:`simulator.run.intervals`) recompiles the planned replicas and searches their rates within the targets again,
over the same requests; the fleet then follows by the same arithmetic. The deployments stay as planned: the interval says how
far off its size may be, not what would be chosen instead.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from simulator.catalog.draws import Draws
from simulator.errors import InfeasibleError
from simulator.planning.rating import Bench, Load, Rated
from simulator.results.plan import Role, Targets
from simulator.results.summary import ParameterInterval
from simulator.roofline.intervals import drawn_interval
from simulator.run.intervals import ParameterDraw, parameter_draws
from simulator.run.resolve import Resolved

#: Requests of a simulation in a draw, at most: an interval needs less resolution than a plan.
MOST_REQUESTS = 4_000


@dataclass(frozen=True)
class DrawnPool:
    """A planned pool: one of its replicas, its load, and the targets it has a part in."""

    role: Role
    resolved: Resolved
    load: Load
    targets: Targets


def drawn_rates(pools: Sequence[DrawnPool], draws: Draws, *, workers: int = 1) -> list[tuple[float, ...]]:
    """Rates of a replica of each pool within the targets: at their own parameters, then in every draw; 0 where no rate keeps them. [1/s]

    The draws of two pools share what their deployments have in common. What a decode pool's requests have behind them is the
    median first token of the prefill pool in the same draw.

    Raises
    ------
    InputError
        If a deployment has a feature whose uncertainty is not known, named in the message.
    """
    pools = [replace(pool, load=pool.load.first(MOST_REQUESTS)) for pool in pools]
    own = _rates(pools, None)
    first_s = own[0][1]

    def one(drawn: tuple[ParameterDraw, ...]) -> tuple[float, ...]:
        return tuple(rate for rate, _ in _rates(pools, drawn, was_s=first_s))

    every = list(zip(*(parameter_draws(pool.resolved, draws) for pool in pools), strict=True))
    with ThreadPoolExecutor(workers) as threads:
        return [tuple(rate for rate, _ in own), *threads.map(one, every)]


def _rates(
    pools: Sequence[DrawnPool], drawn: Sequence[ParameterDraw] | None, *, was_s: float = 0.0
) -> list[tuple[float, float]]:
    """Rate, and median time to first token at it, of a replica of each pool; ``was_s``: the first pool's as planned."""
    found: list[tuple[float, float]] = []
    for i, pool in enumerate(pools):
        load = pool.load
        if load.before_s is not None and drawn is not None and found:
            load = replace(load, before_s=load.before_s + (found[0][1] - was_s))
        found.append(_rated(pool, load, None if drawn is None else drawn[i]))
    return found


def _rated(pool: DrawnPool, load: Load, draw: ParameterDraw | None) -> tuple[float, float]:
    try:
        resolved = pool.resolved if draw is None else draw.apply(pool.resolved)
        # Where a prefill replica gives it, how far off a first token is has nothing to do with decoding.
        seen = None if draw is None or pool.role == "decode" else draw.delay
        rated: Rated | None = Bench(resolved, load, seen_by_users=seen).rate(pool.targets)
    except InfeasibleError:
        rated = None
    if rated is None or rated.rate_per_s == 0:
        return 0.0, np.inf
    return rated.rate_per_s, float(np.median(rated.sample.latency["ttft_s"]))


def chips_interval(
    chips: int,
    own_per_s: Sequence[float],
    rates_per_s: Sequence[Sequence[float]],
    level: float,
    chips_at: Callable[[Sequence[float]], int],
) -> ParameterInterval:
    """Interval of a fleet's chips over draws of its replicas' rates.

    Parameters
    ----------
    chips
        of the fleet as planned and verified.
    own_per_s, rates_per_s
        rate of a replica of each pool at the fitted parameters, and in every draw; 0: no number of replicas keeps the targets. [1/s]
    level
        share of the draws inside, as a fraction.
    chips_at
        chips of the fleet for its replicas' rates.

    The draws are set against the plan by their ratio to the fleet at ``own_per_s``, so that what the verifying run added stays.
    """
    base = chips_at(own_per_s)
    drawn = [chips * chips_at(rates) / base if min(rates) > 0 else float("inf") for rates in rates_per_s]
    found = drawn_interval(float(chips), drawn, level)
    lost = sum(min(rates) == 0 for rates in rates_per_s)
    reason = f"in {lost} of {len(drawn)} draws no number of replicas keeps the targets" if lost else ""
    return found.model_copy(update={"reason": reason})
