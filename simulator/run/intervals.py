"""Intervals of a run's figures from draws of the calibrated parameters: recompile the costs, serve the same requests, sum up.

What is drawn, and from what, is in :mod:`simulator.catalog.draws`; what an interval means in ``docs/intervals.md``. Every
draw replays the same requests, so that sampling noise cancels in its difference to the run.
"""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from simulator.catalog.architecture import MoEFFN
from simulator.catalog.chips import Efficiency
from simulator.catalog.draws import (
    SOURCES,
    Draws,
    Source,
    drawn_efficiencies,
    drawn_profiles,
    residual_factors,
    residual_of,
    triangular,
)
from simulator.catalog.engines import EngineProfile, EngineSpec, LeftOut, load_engine
from simulator.economics import PowerModel
from simulator.engine.records import FINISHED, Requests
from simulator.errors import InfeasibleError, InputError
from simulator.fleet.records import Agents, Served
from simulator.results.summary import Estimate, Intervals, Summary
from simulator.roofline.intervals import (
    DRAWS,
    check_level,
    drawn_interval,
    draws_per_source,
    kernel_notes,
    variance_shares,
)
from simulator.roofline.residual import slowed_step
from simulator.roofline.step_cost import StepCost
from simulator.run.fleets import ResolvedFleet, serve_fleet
from simulator.run.outcome import Outcome, check_conservation
from simulator.run.resolve import Resolved, redraw
from simulator.run.scenario import Scenario
from simulator.run.serving import queued_at_once, served_at_once, simulate_fleet
from simulator.run.summarise import Facts, summarise

Array = NDArray[np.float64]

_LATENCIES = [
    f"latency.{name}.{q}"
    for name in ("ttft_s", "tpot_s", "itl_s", "e2e_s")
    for q in ("mean", "p50", "p90", "p95", "p99")
]
_SERVED = ["slo.met_fraction", "slo.goodput_per_s"]
HEADLINES = (
    *_LATENCIES,
    *_SERVED,
    *(f"throughput.{name}" for name in ("requests_per_s", "output_tokens_per_s", "total_tokens_per_s")),
    *(f"throughput.{name}_per_chip" for name in ("requests_per_s", "output_tokens_per_s", "total_tokens_per_s")),
    "throughput.output_tokens_per_s_per_user",
    "load.capacity_per_s",
    "load.load",
    *(f"chip_seconds_per_query.{kind}" for kind in ("ideal", "busy", "provisioned")),
    *(
        f"prices.{basis}.{name}_usd"
        for basis in ("usage", "allocation")
        for name in (
            "per_query",
            "per_million_input_tokens",
            "per_million_cached_tokens",
            "per_million_output_tokens",
            "per_million_tokens",
        )
    ),
    *(f"energy.{name}_per_query" for name in ("joules", "facility_joules", "gco2")),
    "energy.joules_per_query_busy",
    "energy.joules_per_output_token",
)
"""Figures of a summary that get an interval."""


@dataclass(frozen=True)
class ParameterDraw:
    """One draw of everything uncertain about a deployment.

    Attributes
    ----------
    efficiency, profile
        kernels and constants, and what the engine adds to them.
    step, first_token
        residual: factors on the time of every step, and on the time to the first token besides.
    power
        of a chip; None where it is not published.
    """

    efficiency: Efficiency
    profile: EngineProfile | None
    step: float = 1.0
    first_token: float = 1.0
    power: PowerModel | None = None

    def apply(self, resolved: Resolved) -> Resolved:
        """The deployment in this draw, compiled.

        Raises
        ------
        InfeasibleError
            If the model does not fit under the drawn profile.
        """
        changed = redraw(resolved, self.efficiency, self.profile)
        if self.step == 1:
            return changed
        if not isinstance(changed.engine_cost, StepCost):
            raise TypeError("profiles, and so residuals, are of replicas of one part")
        cost = slowed_step(changed.engine_cost, self.step, resolved.ideal_cost)
        return replace(changed, engine_cost=cost, cost=cost)

    def delay(self, outcome: Outcome) -> Outcome:
        """An outcome with first tokens later, or earlier, by the draw's factor, and all of a request's later tokens with it.

        Chips and other requests do not wait for it: it is the part of a first token's time that the residual of steps does not
        explain. A factor below 1 may move a first token before the request's first step, as it does in the measured means
        that it was estimated from; figures over many requests are what it is for.
        """
        if self.first_token == 1:
            return outcome
        replicas = []
        for one in outcome.replicas:
            later = (self.first_token - 1) * (one.first_token_s - one.arrival_s)
            replicas.append(replace(one, first_token_s=one.first_token_s + later, finish_s=one.finish_s + later))
        return replace(outcome, replicas=tuple(replicas))

    def delay_path(self, served: Served) -> Served:
        """The same for requests that crossed a fleet. Agents do not wait for it either."""
        later = (self.first_token - 1) * (served.first_token_s - served.arrival_s)
        return replace(served, first_token_s=served.first_token_s + later, finish_s=served.finish_s + later)


def parameter_draws(resolved: Resolved, draws: Draws) -> list[ParameterDraw]:
    """``n`` draws of everything uncertain about a resolved deployment, none of them compiled yet.

    The same draws belong to the same seed whatever the deployment, so that the intervals of two deployments share what they have in
    common: the chip's kernels, the engine, and within a group of model, chip, engine and formats part of the residual.

    Raises
    ------
    InputError
        If the deployment has a feature whose uncertainty is not known, named in the message.
    """
    check(resolved)
    scenario, chip = resolved.scenario, resolved.slice.chip
    spec = _spec(resolved)
    efficiencies = drawn_efficiencies(
        chip,
        resolved.deployment.eff,
        draws,
        held=tuple(scenario.efficiency.overrides),
        kernels=resolved.profile.kernels if resolved.profile else "",
    )
    profiles: list[EngineProfile | None] = [None] * draws.n
    if spec is not None and resolved.profile is not None:
        profiles = list(drawn_profiles(spec, resolved.profile, draws))
    d = resolved.deployment
    residual = residual_factors(
        _left_out(resolved),
        draws,
        group=" · ".join((d.architecture.name, chip.name, spec.name if spec else "", d.precision.name)),
        run=resolved.slice.spec,
    )
    powers = _drawn_powers(resolved.power, draws)
    return [
        ParameterDraw(efficiencies[k], profiles[k], float(residual.step[k]), float(residual.first_token[k]), powers[k])
        for k in range(draws.n)
    ]


def check(resolved: Resolved) -> None:
    """Refuse what cannot be drawn again.

    Raises
    ------
    InputError
        For summary-only runs, for speculation, and where nothing is uncertain.
    """
    scenario = resolved.scenario
    if scenario.run.summary_only:
        raise InputError(
            f"{scenario.name}: run.interval serves the same requests again for every draw, and run.summary_only keeps none; "
            "leave one of them out"
        )
    if scenario.engine.speculation is not None:
        raise InputError(
            f"{scenario.name}: run.interval with engine.speculation: how far acceptance rates are off is not stated anywhere, and "
            "an interval without it would be too narrow; leave one of them out"
        )
    if scenario.efficiency.base == "ideal" and resolved.profile is None:
        raise InputError(
            f'{scenario.name}: run.interval with efficiency = "ideal": the datasheet is taken as it stands, so there is nothing to '
            "draw; leave one of them out"
        )


def _spec(resolved: Resolved) -> EngineSpec | None:
    name = resolved.scenario.engine.profile
    return None if name is None else load_engine(name)


def _left_out(resolved: Resolved) -> LeftOut | None:
    spec = _spec(resolved)
    if spec is None:
        return None
    experts = any(isinstance(group.ffn, MoEFFN) for group in resolved.deployment.architecture.layers)
    return residual_of(spec, resolved.slice.chip.name, experts=experts)


def _drawn_powers(power: PowerModel | None, draws: Draws) -> list[PowerModel | None]:
    """Both ends of the line between idle and peak power, inside their ranges."""
    if power is None or "assumed" not in draws.sources:
        return [power] * draws.n
    ends = {
        end: triangular(
            draws.uniform(f"assumed/power/{end}"),
            *(getattr(power, f"{end}{part}_w") for part in ("_low", "", "_high")),
        )
        for end in ("idle", "peak")
    }
    return [replace(power, idle_w=float(i), peak_w=float(p)) for i, p in zip(ends["idle"], ends["peak"], strict=True)]


@dataclass(frozen=True)
class OnePool:
    """A run of equal replicas, to be made again in every draw: its requests, facts and measured window."""

    resolved: Resolved
    requests: Requests
    facts: Facts
    itl_window_s: tuple[float, float] | None

    @property
    def scenario(self) -> Scenario:
        """What was run."""
        return self.resolved.scenario

    @property
    def pools(self) -> tuple[Resolved, ...]:
        """The one."""
        return (self.resolved,)

    def figures(self, draws: Sequence[ParameterDraw]) -> dict[str, float] | None:
        """Headline figures in one draw, ``overloaded`` among them if it has no steady state; None if nothing could be served."""
        (draw,) = draws
        try:
            changed = draw.apply(self.resolved)
            outcome = simulate_fleet(changed, self.requests, itl_window_s=self.itl_window_s)
        except InfeasibleError:
            return None
        if not (outcome.column("status") == FINISHED).any():
            return None
        at_once = served_at_once(changed, outcome)
        about = replace(self.facts, cost=changed.cost, settings=changed.settings, power=draw.power)
        check_conservation(outcome, changed.cost)
        return _known(summarise(draw.delay(outcome), at_once, about, checked=True)[0])


@dataclass(frozen=True)
class Pools:
    """A run of several pools, or of agents: each pool has its own draws, which share what deployments have in common."""

    fleet: ResolvedFleet
    requests: Requests
    agents: Agents | None
    facts: tuple[Facts, ...]
    itl_window_s: tuple[float, float] | None
    seed: int

    @property
    def scenario(self) -> Scenario:
        """What was run."""
        return self.fleet.scenario

    @property
    def pools(self) -> tuple[Resolved, ...]:
        """Of each pool, one replica."""
        return self.fleet.pools

    def figures(self, draws: Sequence[ParameterDraw]) -> dict[str, float] | None:
        """As :meth:`OnePool.figures`."""
        from simulator.run.fleet_summary import check_fleet, path_of, path_table, pools_of, summarise_fleet  # noqa: PLC0415 - numba

        def serve(requests: Requests, agents: Agents | None, itl_window_s: tuple[float, float] | None) -> Served:
            return serve_fleet(fleet, requests, agents, seed=self.seed, workers=1, itl_window_s=itl_window_s)

        try:
            fleet = self.fleet.with_pools([d.apply(pool) for d, pool in zip(draws, self.pools, strict=True)])
            served = serve(self.requests, self.agents, self.itl_window_s)
        except InfeasibleError:
            return None
        if not served.finished.any():
            return None
        at_once = serve(queued_at_once(self.requests), None, None)
        about = [
            replace(facts, cost=pool.cost, settings=pool.settings, power=draw.power)
            for facts, pool, draw in zip(self.facts, fleet.pools, draws, strict=True)
        ]
        pools = pools_of(served)
        check_fleet(served, path_table(served, path_of(served, pools, window_s=self.itl_window_s), pools), pools, about)
        # Who gives the first token says how far off its time may be.
        first = draws[0 if fleet.fleet.first_token == "prefill" else -1]  # noqa: S105 - a token of text
        return _known(
            summarise_fleet(
                first.delay_path(served),
                at_once,
                about,
                window_s=self.itl_window_s,
                agents=self.agents,
                tasks=self.scenario.agents is not None,
                checked=True,
            )[0]
        )


def _known(summary: Summary) -> dict[str, float]:
    found = headline_figures(summary)
    return found | {"overloaded": 1.0} if summary.load.overloaded else found


def parameter_intervals(
    subject: OnePool | Pools,
    summary: Summary,
    *,
    level: float,
    n: int = DRAWS,
    seed: int = 0,
    workers: int = 1,
) -> Intervals:
    """Intervals of the headline figures of a run.

    Parameters
    ----------
    subject, summary
        the run, and what it gave.
    level
        percent of draws inside an interval.
    workers
        draws at a time. The result does not depend on it.

    Raises
    ------
    InputError
        See :func:`check`; or for a level outside (0, 100).
    """
    check_level(level)
    for pool in subject.pools:
        check(pool)
    every = Draws(n, seed)
    active = [s for s in SOURCES if any(s in _active_sources(pool, every) for pool in subject.pools)]
    fewer = draws_per_source(n)
    alone = [every.only(source, fewer) for source in active] if len(active) > 1 else []
    flat: list[tuple[ParameterDraw, ...]] = []
    for draws in (every, *alone):
        flat += zip(*(parameter_draws(pool, draws) for pool in subject.pools), strict=True)
    if workers == 1:
        results = [subject.figures(draw) for draw in flat]
    else:
        # The compiled engine and large numpy operations hold no lock; map keeps the order of draws.
        with ThreadPoolExecutor(max_workers=workers) as threads:
            results = list(threads.map(subject.figures, flat))
    main, rest = results[:n], results[n:]
    by_source = {source: rest[i * fewer : (i + 1) * fewer] for i, source in enumerate(active)} if alone else {}
    figures = {}
    for path, value in headline_figures(summary).items():
        found = drawn_interval(value, [_column(r, path) for r in main], level / 100)
        columns = {source: [_column(r, path) for r in draws] for source, draws in by_source.items()}
        one_source = {source: [_column(r, path) for r in main] for source in active if not by_source}
        figures[path] = found.model_copy(update={"shares": variance_shares(columns or one_source)})
    unsteady = [r is None or "overloaded" in r for r in main]
    return Intervals(
        level=level / 100,
        draws=n,
        draws_per_source=fewer if alone else n,
        sources=list(active),
        overloaded_fraction=float(np.mean(unsteady)),
        infeasible_fraction=float(np.mean([r is None for r in main])),
        figures=figures,
        notes=list(dict.fromkeys(note for pool in subject.pools for note in _notes(pool))),
    )


def headline_figures(summary: Summary) -> dict[str, float]:
    """The figures of a summary that are :data:`HEADLINES` and have a value."""
    found = {}
    for path in HEADLINES:
        item: object = summary
        for name in path.split("."):
            item = None if item is None else getattr(item, name)
        value = item.value if isinstance(item, Estimate) else item
        if isinstance(value, int | float):
            found[path] = float(value)
    return found


def _column(figures: dict[str, float] | None, path: str) -> float:
    """One figure of a draw: unbounded latencies and no goodput where there is no steady state, NaN where it is not defined."""
    if figures is not None and path in figures:
        return figures[path]
    unsteady = figures is None or "overloaded" in figures
    if unsteady and path in _LATENCIES:
        return math.inf
    return 0.0 if unsteady and path in _SERVED else math.nan


def _active_sources(resolved: Resolved, draws: Draws) -> list[Source]:
    """Sources that move anything, in their usual order."""
    nominal = parameter_draws(resolved, Draws(1, draws.seed, frozenset()))[0]
    few = min(draws.n, 4)
    return [s for s in SOURCES if any(draw != nominal for draw in parameter_draws(resolved, draws.only(s, few)))]


def _notes(resolved: Resolved) -> list[str]:
    """What a reader must know of what was and was not drawn."""
    chip, spec = resolved.slice.chip, _spec(resolved)
    found = kernel_notes(resolved.deployment)
    left_out = _left_out(resolved)
    if spec is None:
        found.append(
            "engine.profile is not set: what a serving engine adds to its kernels is drawn from the range of the chip's step and row "
            "overheads, and how far predictions are from servers is not in these intervals"
        )
    elif left_out is None:
        found.append(
            f"profile {spec.name} does not say how far it is off on rows it has not seen: no residual is drawn"
        )
    elif spec.errors is not None and chip.name not in spec.errors.chips:
        found.append(f"no serving run that {spec.name}'s profile was fitted to is on {chip.name}")
    found.append("traffic, prices, datasheet rates and settings are taken as they stand")
    return found
