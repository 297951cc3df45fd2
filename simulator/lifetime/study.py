"""A lifetime scenario → one record: the size that costs least to train and to serve, and how sure that choice is."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from simulator.catalog.chips import ChipSpec, load_chip
from simulator.catalog.models import load_model
from simulator.catalog.parameters import count
from simulator.catalog.slices import resolve_slice
from simulator.economics import ChipPrice, chip_price, price_by_hand
from simulator.errors import InfeasibleError
from simulator.lifetime.demand import elastic_optimum, lifetime_tokens, present_value
from simulator.lifetime.optimum import sardana_optimum
from simulator.lifetime.scenario import (
    DemandOptions,
    FormulaServing,
    LifetimeScenario,
    PlanServing,
    QualityOptions,
    TrainingOptions,
)
from simulator.lifetime.serving import FormulaServer, PlannedServer, Served, Server, formula_server, planned_server
from simulator.lifetime.shapes import distinct_shapes, shape_rule
from simulator.lifetime.training_bill import training_bill
from simulator.results.lifetime import Choice, ForecastRow, Lifetime, Optimum, Refusal, Size
from simulator.results.summary import Assumption
from simulator.scaling.laws import LossLaw, TrainingPoint, law
from simulator.training.cost import TrainingSetup

Progress = Callable[[str], None]

_SECONDS_PER_YEAR = 365.25 * 86400
#: Sizes that take more than this many times the least training compute are not tried.
MOST_TRAINING = 30.0
#: Sizes drawn for a formula, which is smooth.
_FORMULA_SIZES = 161
#: What a forecast may be wrong by, where the scenario names none.
_WHAT_IF = (("a tenth", 0.1), ("a third", 1 / 3), ("as forecast", 1.0), ("three times", 3.0), ("ten times", 10.0))
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Demand:
    """Queries of a life.

    Attributes
    ----------
    queries
        undiscounted.
    valued
        each weighted by its present price over today's.
    queries_per_s
        at the start.
    mean_times
        expected demand ÷ the stated one.
    """

    queries: float
    valued: float
    queries_per_s: float
    mean_times: float
    forecasts: tuple[tuple[str, float, float | None], ...]


def resolve_demand(options: DemandOptions) -> Demand:
    """Totals over the life, growth, price decline and discount summed; see §14 of the project's scaling notes.

    A query at time t costs e^(−d·t) of today's price, is worth e^(−r·t) of today's money, and there are e^((g + ε·d)·t) times as many.
    """
    o = options
    per_rate = lifetime_tokens(
        _SECONDS_PER_YEAR, o.years, growth=o.growth, price_decline=o.price_decline, elasticity=o.elasticity
    )
    rate = o.queries / per_rate if o.queries is not None else o.queries_per_s or math.nan  # one of the two is stated
    worth = present_value(
        _SECONDS_PER_YEAR,
        o.years,
        discount=o.discount,
        growth=o.growth,
        price_decline=o.price_decline,
        elasticity=o.elasticity,
    )
    forecasts: tuple[tuple[str, float, float | None], ...]
    if o.spread is not None:
        shape = NormalDist(0.0, o.spread)
        forecasts = tuple((f"{q:.0%} quantile", math.exp(shape.inv_cdf(q)), None) for q in _QUANTILES)
        mean = math.exp(o.spread**2 / 2)
    elif o.forecasts:
        forecasts = tuple((f.name, f.times, f.probability) for f in o.forecasts)
        chances = [f.probability for f in o.forecasts if f.probability is not None]
        mean = sum(f.times * p for f, p in zip(o.forecasts, chances, strict=True)) if chances else 1.0
    else:
        forecasts = tuple((name, times, None) for name, times in _WHAT_IF)
        mean = 1.0
    return Demand(rate * per_rate, rate * worth, rate, mean, forecasts)


@dataclass(frozen=True)
class _Problem:
    """What every size is measured by."""

    law: LossLaw
    loss: float
    usd_per_flop: float
    demand: Demand
    extrapolate: bool

    def point(self, parameters: float) -> TrainingPoint:
        return self.law.point(parameters, self.law.tokens_for(parameters, self.loss), extrapolate=self.extrapolate)

    def size(self, served: Served) -> Size:
        point = self.point(served.parameters)
        training = point.flops * self.usd_per_flop
        serving = served.usd_per_query * self.demand.valued * self.demand.mean_times
        return Size(
            parameters=served.parameters,
            tokens=point.tokens,
            training_flops=point.flops,
            training_usd=training,
            serving_usd=serving,
            total_usd=training + serving,
            usd_per_query=served.usd_per_query,
            chip_s_per_query=served.chip_s_per_query,
            chips=served.chips,
            deployment=served.deployment,
            extrapolated=list(point.extrapolated),
        )

    def cheapest(self, sizes: Sequence[Size], times: float) -> Size:
        return min(sizes, key=lambda size: self.total(size, times))

    def total(self, size: Size, times: float) -> float:
        return size.training_usd + size.usd_per_query * self.demand.valued * times


def study(scenario: LifetimeScenario, *, workers: int = 1, progress: Progress | None = None) -> Lifetime:
    """Solve a lifetime scenario.

    Raises
    ------
    InputError
        If something in it does not exist or lies outside a law's runs without ``extrapolate``.
    UnpriceableError
        If a chip has no price or no rate for a format.
    InfeasibleError
        If no model reaches the loss, or none that does can be served.
    """
    the_law = law(scenario.quality.law)
    quality = _quality(scenario.quality, the_law)
    training = scenario.training
    a_slice = resolve_slice(training.slice)
    setup = TrainingSetup(a_slice, mfu=training.mfu, dtype=training.dtype, overhead=training.overhead)
    train_price = _price(a_slice.chip, training)
    demand = resolve_demand(scenario.demand)
    least = the_law.cheapest(quality.loss, extrapolate=True)
    usd_per_flop = training_bill(least.parameters, least.tokens, setup, train_price).usd_per_flop
    problem = _Problem(the_law, quality.loss, usd_per_flop, demand, scenario.quality.extrapolate)
    problem.point(least.parameters)  # refuse early what lies outside
    serving = scenario.serving
    assumptions = [
        *_priced("training", train_price),
        Assumption(what="training.mfu", value=f"{training.mfu:g}", kind="assumed", source="scenario"),
        Assumption(what="training.overhead", value=f"{training.overhead:g}", kind="assumed", source="scenario"),
    ]
    optima = []
    if isinstance(serving, FormulaServing):
        price = _price(load_chip(serving.chip), serving)
        assumptions += _priced("serving", price)
        server = formula_server(serving, price.usd_per_chip_hour)
        optima.append(_by_formula(problem, server, quality, scenario.demand.elasticity))
        words = (
            f"2N FLOPs a token on {serving.chip}, {serving.dtype}: {serving.input_tokens:g} tokens in at MFU "
            f"{serving.mfu_input:g}, {serving.output_tokens:g} out at {serving.mfu_output:g}, ${price.usd_per_chip_hour:g} per chip-hour"
        )
    else:
        for limit in serving.slo_limits_s or (None,):
            planned = planned_server(
                serving, demand.queries_per_s * demand.mean_times, limit_s=limit, workers=workers, progress=progress
            )
            optima.append(_by_plan(problem, planned, serving, quality, scenario.demand.elasticity, limit))
            assumptions += [a for a in planned.assumptions if a not in assumptions]
            words = (
                f"cheapest fleet of {', '.join(serving.chips)} in {', '.join(serving.precisions)} for the traffic of "
                f"{serving.scenario}, simulated size by size (shapes: {serving.shape})"
            )
    if all(optimum.best is None for optimum in optima):
        reasons = sorted({refusal.reason for optimum in optima for refusal in optimum.refused})
        raise InfeasibleError(f"{scenario.name}: no size that reaches the loss can be served: {reasons[0]}")
    return Lifetime(
        scenario=scenario.name,
        description=scenario.description,
        law=the_law.name,
        law_source=the_law.source,
        law_caution=the_law.caution,
        loss=quality.loss,
        quality=quality.words,
        queries=demand.queries,
        valued_queries=demand.valued,
        queries_per_s=demand.queries_per_s,
        years=scenario.demand.years,
        training=f"{training.slice} in {training.dtype} at MFU {training.mfu:g}, ${train_price.usd_per_chip_hour:g} per chip-hour",
        training_usd_per_flop=usd_per_flop,
        serving=words,
        optima=optima,
        warnings=_warnings(optima, the_law),
        assumptions=assumptions,
        sources=[the_law.source, "Sardana et al. 2024, arXiv:2401.00448, eq. 6"],
        resolved=scenario.as_toml(),
    )


@dataclass(frozen=True)
class _Quality:
    loss: float
    words: str
    like: TrainingPoint | None
    model: str | None


def _quality(options: QualityOptions, the_law: LossLaw) -> _Quality:
    like = options.like
    if like is None:  # then the loss is stated
        loss = options.loss or math.nan
        return _Quality(loss, f"a loss of {loss:g}", None, None)
    parameters = like.parameters or float(count(load_model(like.model or "")).total)
    if like.tokens is None:
        point = the_law.optimum_for_parameters(parameters, extrapolate=options.extrapolate)
        words = f"as good as {parameters / 1e9:.3g}B parameters trained compute-optimally ({point.tokens / 1e12:.4g}T tokens)"
    else:
        point = the_law.point(parameters, like.tokens, extrapolate=options.extrapolate)
        words = f"as good as {like.model or f'{parameters / 1e9:.3g}B parameters'} on {like.tokens / 1e12:.4g}T tokens"
    return _Quality(point.loss, words, point, like.model)


def _price(chip: ChipSpec, options: TrainingOptions | FormulaServing) -> ChipPrice:
    if options.usd_per_chip_hour is not None:
        return price_by_hand(chip.name, options.usd_per_chip_hour)
    return chip_price(chip, term=options.term)


def _priced(what: str, price: ChipPrice) -> list[Assumption]:
    return [a.model_copy(update={"what": f"{what}.{a.what}"}) for a in price.inputs]


def size_range(the_law: LossLaw, loss: float) -> tuple[float, float]:
    """Sizes worth trying: from one that takes 30 times the least training compute, to twice the compute-optimal one."""
    from scipy.optimize import brentq

    best = the_law.cheapest(loss, extrapolate=True)
    smallest = the_law.smallest_parameters(loss)

    def over(log_parameters: float) -> float:
        parameters = math.exp(log_parameters)
        return math.log(6 * parameters * the_law.tokens_for(parameters, loss) / best.flops / MOST_TRAINING)

    low = math.log(smallest) + 1e-9
    found = float(brentq(over, low, math.log(best.parameters))) if over(low) > 0 else low
    return math.exp(found), 2 * best.parameters


def _by_formula(problem: _Problem, server: FormulaServer, quality: _Quality, elasticity: float) -> Optimum:
    low, high = size_range(problem.law, problem.loss)
    demand = problem.demand

    def exact(times: float) -> float:
        tokens = server.demand(demand.valued * times)
        best = sardana_optimum(
            problem.law, problem.loss, tokens, train_cost_per_flop=problem.usd_per_flop, extrapolate=True
        )
        return best.point.parameters

    exacts = [exact(times) for _, times, _ in demand.forecasts]
    grid = sorted({*np.geomspace(low, high, _FORMULA_SIZES).tolist(), *exacts, exact(demand.mean_times)})
    compute_optimal = problem.law.cheapest(problem.loss, extrapolate=True).parameters
    sizes = [problem.size(server.at(n)) for n in grid]
    elastic = None
    if elasticity > 0:
        base = exact(demand.mean_times)
        found, times = elastic_optimum(
            problem.law,
            problem.loss,
            demand.mean_times,
            base,
            elasticity,
            demand_of=lambda t: server.demand(demand.valued * t),
            train_cost_per_flop=problem.usd_per_flop,
            extrapolate=problem.extrapolate,
        )
        elastic = (problem.size(server.at(found.point.parameters)), times)
    chinchilla = problem.size(server.at(compute_optimal))
    return _optimum(problem, sizes, [], chinchilla, quality, server, elastic=elastic, slope=1.0, limit=None)


def _by_plan(
    problem: _Problem,
    server: PlannedServer,
    options: PlanServing,
    quality: _Quality,
    elasticity: float,
    limit: float | None,
) -> Optimum:
    """Sizes on a grid, then between the neighbours of the best; every size is an architecture that was planned for."""
    low, high = size_range(problem.law, problem.loss)
    low, high = options.smallest or low, options.largest or high
    rule = shape_rule(options.shape)
    sizes: dict[float, Size] = {}
    refused: dict[float, str] = {}

    def try_sizes(wanted: Sequence[float]) -> None:
        new = {}
        for parameters, shape in distinct_shapes(rule, wanted):
            if parameters in sizes or parameters in refused:
                continue
            try:
                problem.law.tokens_for(parameters, problem.loss)
                new[parameters] = shape
            except InfeasibleError as error:
                refused[parameters] = str(error)
        server.plan_for(list(new.values()))
        for parameters, shape in new.items():
            try:
                sizes[parameters] = problem.size(server.of(shape))
            except InfeasibleError as error:
                refused[parameters] = str(error)

    try_sizes(np.geomspace(low, high, options.sizes).tolist())
    for _ in range(3):
        if not sizes:
            break
        known = sorted({*sizes, *refused})
        wanted = []
        for times in {problem.demand.mean_times, *(t for _, t, _ in problem.demand.forecasts)}:
            best = problem.cheapest(list(sizes.values()), times).parameters
            i = known.index(best)
            wanted += [math.sqrt(best * known[j]) for j in (i - 1, i + 1) if 0 <= j < len(known)]
        try_sizes(wanted)
    try:
        chinchilla = problem.size(server.at(problem.law.cheapest(problem.loss, extrapolate=True).parameters))
        sizes[chinchilla.parameters] = chinchilla
    except InfeasibleError:
        chinchilla = None
    ordered = [sizes[n] for n in sorted(sizes)]
    refusals = [Refusal(parameters=n, reason=refused[n]) for n in sorted(refused)]
    if not ordered:
        return _nothing(limit, refusals)
    base = min(ordered, key=lambda s: s.total_usd)
    elastic = _elastic_on_grid(problem, ordered, base, elasticity) if elasticity > 0 else None
    slope = serving_slope(ordered, base.parameters)
    return _optimum(problem, ordered, refusals, chinchilla, quality, server, elastic=elastic, slope=slope, limit=limit)


def serving_slope(sizes: Sequence[Size], at: float) -> float | None:
    """Elasticity of the cost of a query in N, d ln c/d ln N, by least squares over sizes within a factor of two; None with fewer than three."""
    near = [s for s in sizes if 0.5 <= s.parameters / at <= 2]
    if len(near) < 3:
        return None
    x = np.log([s.parameters for s in near])
    y = np.log([s.usd_per_query for s in near])
    return float(np.polyfit(x - x.mean(), y, 1)[0])


def _elastic_on_grid(problem: _Problem, sizes: Sequence[Size], base: Size, elasticity: float) -> tuple[Size, float]:
    """The size that is the best for the demand that its own price brings, or comes nearest to that."""

    def times(size: Size) -> float:
        return float(problem.demand.mean_times * (size.usd_per_query / base.usd_per_query) ** -elasticity)

    def gap(size: Size) -> float:
        best = problem.cheapest(sizes, times(size))
        return abs(math.log(best.parameters / size.parameters))

    found = min(sizes, key=gap)
    return found, times(found)


def _nothing(limit: float | None, refused: list[Refusal]) -> Optimum:
    return Optimum(
        slo_limit_s=limit,
        best=None,
        chinchilla=None,
        saving=None,
        identity=None,
        elasticity_of_serving=None,
        sizes=[],
        refused=refused,
        forecasts=[],
        choices=[],
        elastic=None,
        elastic_demand=None,
        justified_demand=None,
    )


def _optimum(
    problem: _Problem,
    sizes: list[Size],
    refused: list[Refusal],
    chinchilla: Size | None,
    quality: _Quality,
    server: Server,
    *,
    elastic: tuple[Size, float] | None,
    slope: float | None,
    limit: float | None,
) -> Optimum:
    demand = problem.demand
    best = min(sizes, key=lambda s: s.total_usd)
    bests = [problem.cheapest(sizes, times) for _, times, _ in demand.forecasts]
    costs = [problem.total(s, times) for s, (_, times, _) in zip(bests, demand.forecasts, strict=True)]
    rows = [
        ForecastRow(name=name, times=times, probability=p, parameters=s.parameters, tokens=s.tokens, total_usd=cost)
        for (name, times, p), s, cost in zip(demand.forecasts, bests, costs, strict=True)
    ]

    def regrets(size: Size) -> list[float]:
        return [problem.total(size, t) / cost for (_, t, _), cost in zip(demand.forecasts, costs, strict=True)]

    weighed = demand.mean_times != 1.0 or any(p is not None for _, _, p in demand.forecasts)

    def choice(reason: str, size: Size) -> Choice:
        found = regrets(size)
        return Choice(
            reason=reason,
            parameters=size.parameters,
            tokens=size.tokens,
            expected_usd=problem.total(size, demand.mean_times) if weighed else None,
            regret=found,
            worst_regret=max(found),
        )

    choices = [choice(f"best for: {row.name}", s) for row, s in zip(rows, bests, strict=True)]
    if weighed:
        choices.append(choice("least expected cost", best))
    choices.append(choice("least worst regret", min(sizes, key=lambda s: max(regrets(s)))))
    if chinchilla is not None:
        choices.append(choice("compute-optimal", chinchilla))
    return Optimum(
        slo_limit_s=limit,
        best=best,
        chinchilla=chinchilla,
        saving=None if chinchilla is None else 1 - best.total_usd / chinchilla.total_usd,
        identity=None if slope is None else _identity(problem.law, best, slope),
        elasticity_of_serving=slope,
        sizes=sizes,
        refused=refused,
        forecasts=rows,
        choices=choices,
        elastic=None if elastic is None else elastic[0],
        elastic_demand=None if elastic is None else elastic[1] / demand.mean_times,
        justified_demand=_justified(problem, quality, server, sizes, slope),
    )


def marginal_ratio(the_law: LossLaw, parameters: float, tokens: float) -> float:
    """eps_N/eps_D: by how much more the loss falls with the logarithm of N than with that of D; 1 at the compute optimum."""
    by_parameters = the_law.alpha * the_law.A * parameters**-the_law.alpha
    return float(by_parameters / (the_law.beta * the_law.B * tokens**-the_law.beta))


def _identity(the_law: LossLaw, best: Size, slope: float) -> float:
    return marginal_ratio(the_law, best.parameters, best.tokens) / (1 + slope * best.serving_usd / best.training_usd)


def _justified(
    problem: _Problem, quality: _Quality, server: Server, sizes: Sequence[Size], slope: float | None
) -> float | None:
    """Demand at which the model that set the quality is the optimum: where the identity holds for it."""
    like = quality.like
    if like is None or slope is None or slope <= 0:
        return None
    ratio = marginal_ratio(problem.law, like.parameters, like.tokens)
    if ratio <= 1:
        return None
    try:
        served = server.at(like.parameters) if quality.model is None else server.of(load_model(quality.model))
    except InfeasibleError:
        return None
    local = slope if isinstance(server, FormulaServer) else serving_slope(sizes, like.parameters)
    if local is None or local <= 0:
        return None
    training = like.flops * problem.usd_per_flop
    return training * (ratio - 1) / local / (served.usd_per_query * problem.demand.valued)


def _warnings(optima: Sequence[Optimum], the_law: LossLaw) -> list[str]:
    found = []
    outside = sorted({text for o in optima if o.best is not None for text in o.best.extrapolated})
    if outside:
        found.append(f"outside the runs behind {the_law.name}: {'; '.join(outside)}")
    if the_law.caution:
        found.append(f"{the_law.name}: {the_law.caution}")
    for o in optima:
        if (
            o.best is not None
            and len(o.sizes) > 1
            and o.best.parameters in {o.sizes[0].parameters, o.sizes[-1].parameters}
        ):
            which = "smallest" if o.best.parameters == o.sizes[0].parameters else "largest"
            found.append(
                f"the optimum is the {which} size tried, {o.best.parameters:.4g} parameters: the true one may lie beyond"
            )
    return found
