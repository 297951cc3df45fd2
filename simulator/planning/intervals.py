"""How many chips a planned fleet takes if the calibrated parameters are not what they were fitted as.

Each draw of the parameters (:mod:`simulator.run.intervals`) recompiles the planned replica and searches its rate within the targets again,
over the same requests; the fleet then follows by the same arithmetic. The deployment stays as planned: the interval says how
far off its size may be, not what would be chosen instead.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from simulator.catalog.draws import Draws
from simulator.errors import InfeasibleError
from simulator.planning.rating import Bench, Load
from simulator.results.plan import Targets
from simulator.results.summary import ParameterInterval
from simulator.roofline.intervals import drawn_interval
from simulator.run.intervals import ParameterDraw, parameter_draws
from simulator.run.resolve import Resolved

#: Requests of a simulation in a draw, at most: an interval needs less resolution than a plan.
MOST_REQUESTS = 4_000


def drawn_rates(
    resolved: Resolved, load: Load, targets: Targets, draws: Draws, *, workers: int = 1
) -> tuple[float, list[float]]:
    """Rate of a replica within the targets: at its own parameters, and in every draw; 0 where no rate keeps them. [1/s]

    Raises
    ------
    InputError
        If the deployment has a feature whose uncertainty is not known, named in the message.
    """
    short = load.first(MOST_REQUESTS)

    def one(draw: ParameterDraw) -> float:
        try:
            rated = Bench(draw.apply(resolved), short, seen_by_users=draw.delay).rate(targets)
        except InfeasibleError:
            return 0.0
        return rated.rate_per_s if rated is not None else 0.0

    every = parameter_draws(resolved, draws)
    own = Bench(resolved, short).rate(targets)
    with ThreadPoolExecutor(workers) as pool:
        return (own.rate_per_s if own is not None else 0.0), list(pool.map(one, every))


def chips_interval(
    chips: int,
    own_per_s: float,
    rates_per_s: Sequence[float],
    level: float,
    chips_at: Callable[[float], int],
) -> ParameterInterval:
    """Interval of a fleet's chips over draws of its replica's rate.

    Parameters
    ----------
    chips
        of the fleet as planned and verified.
    own_per_s, rates_per_s
        rate of a replica at the fitted parameters, and in every draw; 0: no number of replicas keeps the targets. [1/s]
    level
        share of the draws inside, as a fraction.
    chips_at
        chips of the fleet for a replica's rate.

    The draws are set against the plan by their ratio to the fleet at ``own_per_s``, so that what the verifying run added stays.
    """
    base = chips_at(own_per_s)
    drawn = [chips * chips_at(rate) / base if rate > 0 else float("inf") for rate in rates_per_s]
    found = drawn_interval(float(chips), drawn, level)
    lost = sum(rate == 0 for rate in rates_per_s)
    reason = f"in {lost} of {len(drawn)} draws no number of replicas keeps the targets" if lost else ""
    return found.model_copy(update={"reason": reason})
