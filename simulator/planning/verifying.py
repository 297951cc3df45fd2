"""The chosen fleet, simulated: with another seed at the peak, at the day's mean load, and with drawn parameters."""

import math
from collections.abc import Sequence

import numpy as np

from simulator.catalog.draws import Draws
from simulator.engine.records import FINISHED, Requests
from simulator.planning.choices import Choice, parts_of
from simulator.planning.fleet import price_of
from simulator.planning.intervals import DrawnPool, chips_interval, drawn_rates
from simulator.planning.loads import at_rate
from simulator.planning.pools import Split, fleet_scenario, of_role, of_share, small_fleet
from simulator.planning.question import Question
from simulator.planning.rating import Sample
from simulator.planning.search import needed_replicas, with_spares
from simulator.results.plan import Consumption, PlannedFleet, Verification
from simulator.results.summary import ParameterInterval
from simulator.run.consumption import ideal_chip_seconds
from simulator.run.options import SloOptions
from simulator.run.resolve import Resolved, resolve
from simulator.run.scenario import Scenario
from simulator.run.serving import queued_at_once, simulate_fleet
from simulator.run.simulate import Run, run_scenario

#: Requests of the run that verifies the plan, at least.
VERIFYING_REQUESTS = 10_000
#: Times that a fleet grows by 2 %, if the verifying run misses the targets.
GROWTHS = 10


def verify(question: Question, choice: Choice) -> tuple[PlannedFleet, Verification, Run]:
    """The plan with another seed, and more replicas until it keeps the targets there too."""
    first = [found.needed for _, found, _ in parts_of(choice)]
    needed = list(first)
    for growth in range(GROWTHS + 1):
        replicas = _simulated(choice, needed)
        rate = question.provisioning.peak_qps * max(k / n for k, n in zip(replicas, needed, strict=True))
        run, sample = _simulate(question, choice, replicas, rate)
        missed = sample.missed(question.targets)
        kept = not missed and run.summary.latency is not None
        if kept or growth == GROWTHS:
            break
        # What is missed tells which of two pools is short; a backlog, or anything else, both.
        short = {0 if name.startswith("ttft") else len(needed) - 1 for name in missed} or set(range(len(needed)))
        needed = [max(n + 1, math.ceil(n * 1.02)) if i in short else n for i, n in enumerate(needed)]
    verification = Verification(
        replicas=list(replicas),
        rate_per_s=rate,
        requests=len(run.result.requests["arrival_s"]),
        seed=run.result.seed,
        kept=kept,
        kept_fraction=sample.kept_fraction(question.targets),
        added_replicas=sum(needed) - sum(first),
        latency=run.summary.latency,
    )
    return question.fleet(choice, needed=needed), verification, run


def consume(question: Question, choice: Choice, fleet: PlannedFleet, run: Run, verified: Verification) -> Consumption:
    """The fleet at the mean load of the day, and the ideal at a saturated replica's batch."""
    counts = [p.replicas for p in fleet.pools]
    replicas = _simulated(choice, counts)
    rate = question.provisioning.qps * max(k / n for k, n in zip(replicas, counts, strict=True))
    if rate != verified.rate_per_s or list(replicas) != verified.replicas:
        run, _ = _simulate(question, choice, replicas, rate)
    energy = run.summary.energy
    provisioned = fleet.chips / question.provisioning.qps
    # The run's own rate is its sample's, and its last requests are served by a fleet that empties.
    scale = provisioned / run.summary.chip_seconds_per_query.provisioned
    return Consumption(
        rate_per_s=rate,
        ideal_chip_s=sum(
            share * ideal_chip_s(found.resolved, found.load.requests) for _, found, share in parts_of(choice)
        ),
        busy_chip_s=provisioned * run.summary.utilisation.busy_fraction,
        provisioned_chip_s=provisioned,
        joules_per_query=None if energy is None else scale * energy.joules_per_query,
        facility_joules_per_query=None if energy is None else scale * energy.facility_joules_per_query,
        energy=energy,
    )


def interval_of(question: Question, choice: Choice, fleet: PlannedFleet, workers: int) -> ParameterInterval | None:
    """Interval of the fleet's chips over draws of the calibrated parameters; None: none was asked for."""
    level = question.options.interval
    if level is None:
        return None
    parts = parts_of(choice)
    pools = [
        DrawnPool(
            role=role,
            # The search shares tables between batch limits; a draw prices the limits of this one.
            resolved=resolve(found.resolved.scenario, architecture=question.architecture),
            load=found.load,
            targets=question.targets if role == "unified" else of_role(question.targets, role),
        )
        for role, found, _ in parts
    ]
    own, *rates = drawn_rates(pools, Draws(question.options.interval_draws, question.options.seed), workers=workers)

    def chips_at(rates_per_s: Sequence[float]) -> int:
        chips = 0
        for (_, found, share), rate_per_s in zip(parts, rates_per_s, strict=True):
            needed = needed_replicas(of_share(question.provisioning, share), rate_per_s)
            chips += with_spares(question.provisioning, needed) * found.resolved.cost.chips
        return chips

    return chips_interval(fleet.chips, own, rates, level / 100, chips_at)


def _at(question: Question, choice: Choice, replicas: Sequence[int], rate_per_s: float, n_requests: int) -> Scenario:
    """A choice as a scenario at a rate, judged by the targets as far as ``[slo]`` can say them."""
    load = question.loads.first(n_requests)
    traffic = at_rate(question.loads.spec, load, rate_per_s, n_requests)
    limits: dict[str, float] = {t.metric: t.limit_s for t in question.targets.limits}
    share = question.targets.joint_fraction
    if share is None:
        share = min((t.percentile / 100 for t in question.targets.limits if t.percentile), default=0.99)
    slo = SloOptions(**limits, percentile=100 * share)
    found = parts_of(choice)[-1][1]
    chip = found.resolved.slice.chip
    price = price_of(chip, found.place.slice.rpartition(":")[0], question.template, question.options)
    by_hand = price is not None and price.term == "by hand"
    prices = found.resolved.scenario.prices if price is None else question.template.prices
    prices = prices.model_copy(update={"usd_per_chip_hour": price.usd_per_chip_hour if price and by_hand else None})
    run = question.template.run.model_copy(
        update={"seed": question.options.seed + 1, "seeds": 1, "summary_only": False}
    )
    changes = {"traffic": traffic, "slo": slo, "prices": prices, "run": run}
    if isinstance(choice, Split):
        prefill, decode = replicas
        return fleet_scenario(question.template, choice, (prefill, decode)).model_copy(update=changes)
    return choice.resolved.scenario.model_copy(update=changes)


def _simulate(question: Question, choice: Choice, replicas: Sequence[int], rate_per_s: float) -> tuple[Run, Sample]:
    longest = max(len(found.load.requests) for _, found, _ in parts_of(choice))
    n = max(VERIFYING_REQUESTS, longest * sum(replicas) if isinstance(choice, Split) else longest)
    run = run_scenario(_at(question, choice, replicas, rate_per_s, n), architecture=question.architecture)
    window, table = run.summary.window, run.result.requests
    arrival = np.asarray(table["arrival_s"], dtype=np.float64)
    return run, Sample.of(table, np.flatnonzero((arrival >= window.start_s) & (arrival <= window.stop_s)))


def _simulated(choice: Choice, counts: Sequence[int]) -> tuple[int, ...]:
    """Replicas to simulate in place of so many: one of equal independent ones, or a small fleet of two pools."""
    return small_fleet((counts[0], counts[1])) if isinstance(choice, Split) else (1,)


def ideal_chip_s(resolved: Resolved, requests: Requests) -> float:
    """Mean ideal chip-seconds of a query, its decode steps shared as in a saturated replica. [chip-s]"""
    outcome = simulate_fleet(resolved, queued_at_once(requests))
    done = outcome.column("status") == FINISHED
    each = ideal_chip_seconds(
        requests.prompt_tokens[done],
        outcome.column("reused_tokens")[done],
        requests.output_tokens[done],
        cost=resolved.ideal_cost,
        settings=resolved.settings,
        mean_batch=outcome.total("decode_tokens") / outcome.total("steps"),
    )
    return float(np.mean(each))
