"""QPS and targets → the cheapest fleet: the one function of this room that others call."""

from collections.abc import Callable, Sequence
from typing import Any

from simulator.catalog.architecture import Architecture
from simulator.errors import UnpriceableError
from simulator.planning.alternatives import find_front, find_nearest
from simulator.planning.by_chip import outcome_of, search_chips, searched_in
from simulator.planning.choices import unlike
from simulator.planning.fleet import waterfall
from simulator.planning.options import PlanOptions
from simulator.planning.question import Question
from simulator.planning.verifying import consume, interval_of, verify
from simulator.results.plan import Plan, Targets, Verification
from simulator.results.summary import Assumption
from simulator.run.scenario import Scenario
from simulator.traffic import TrafficSpec

#: Called with (steps done, steps in all, what is done now).
Progress = Callable[[int, int, str], None]


def plan(
    model: Architecture | str,
    traffic: TrafficSpec,
    targets: Targets,
    qps: float,
    chips: Sequence[str],
    *,
    options: PlanOptions | None = None,
    template: Scenario | None = None,
    workers: int = 1,
    progress: Progress | None = None,
) -> Plan:
    """The cheapest fleet that serves ``qps`` queries per second within ``targets``.

    Parameters
    ----------
    model
        an architecture, or the name or path of one.
    traffic
        lengths and an arrival process with a rate, which is scaled.
    targets
        limits on latencies at percentiles; none: the fleet need only keep up.
    qps
        mean over the day. [1/s]
    chips
        names in the catalogue or paths of chip files.
    options
        the space that is searched and what is provisioned.
    template
        everything about a replica that the search does not vary: engine settings, efficiencies, prices, measured window.
    workers
        chips searched at the same time. The plan does not depend on it.

    Returns
    -------
    Plan
        ``best`` is None if no fleet of these chips keeps the targets; ``nearest`` then says what would.

    Raises
    ------
    InputError
        If the question is malformed: an unknown name, a traffic without a rate, no chips.
    UnpriceableError
        If fleets are to be ranked by cost, and none that keeps the targets has a price.
    """
    question = Question.ask(model, traffic, targets, qps, chips, options=options, template=template)
    return _answer(question, workers, progress or _silent)


def _answer(question: Question, workers: int, say: Progress) -> Plan:
    """Search, rank, verify; or find what is nearest."""
    total = len(question.chips) + 2
    on_chip = search_chips(question, question.chips, workers, lambda i, what: say(i, total, what))
    ranked = question.ranked(choice for one in on_chip for choice in one.choices)
    by_chip = [outcome_of(question, one) for one in on_chip]
    by_chip.sort(key=lambda outcome: question.order(outcome.fleet))
    searched = searched_in(on_chip)
    common: dict[str, Any] = {
        "name": question.template.name,
        "model": question.architecture.name,
        "traffic": question.loads.source,
        "targets": question.targets,
        "provisioning": question.provisioning,
        "rank_by": question.options.rank_by,
        "seed": question.options.seed,
        "requests": question.options.requests,
        "by_chip": by_chip,
        "searched": searched,
    }
    if not ranked:
        if any(one.best for one in on_chip):
            names = ", ".join(one.chip for one in on_chip if one.best)
            raise UnpriceableError(
                f"plan: no price is published for {names}, which would do; state one, or rank fleets by their chips"
            )
        say(total - 2, total, "looking for what is feasible")
        idle, nearest = find_nearest(question, on_chip, workers)
        say(total, total, "done")
        return Plan(best=None, idle_latency_s=idle, nearest=nearest, **common)
    say(total - 2, total, "verifying the best fleet")
    fleet, verification, run = verify(question, ranked[0])
    say(total - 1, total, "a day's mean load")
    consumption = consume(question, ranked[0], fleet, run, verification)
    say(total, total, "done")
    summary = run.summary
    if question.options.interval is not None:
        say(total - 1, total, "drawing the calibrated parameters")
    return Plan(
        interval_percent=question.options.interval,
        chips_interval=interval_of(question, ranked[0], fleet, workers),
        best=fleet,
        waterfall=waterfall(fleet.pools, question.provisioning, consumption.ideal_chip_s),
        verification=verification,
        consumption=consumption,
        runners_up=[question.fleet(f) for f in unlike(ranked[1:], ranked[0])][: question.options.runners_up],
        front=find_front(question, on_chip, workers),
        assumptions=[*summary.assumptions, *_own_assumptions(question)],
        warnings=_warnings(summary.warnings, verification),
        scenario=run.result.scenario,
        **common,
    )


def _own_assumptions(question: Question) -> list[Assumption]:
    p = question.provisioning
    return [
        Assumption(
            what=what,
            value=value,
            kind="assumed",
            source=f"plan: {'asked' if name in question.options.model_fields_set else 'default'}",
        )
        for name, what, value in (
            ("peak_to_mean", "daily peak ÷ mean", f"{p.peak_to_mean:g}"),
            ("headroom", "safety margin below the rate within the targets", f"{p.headroom_fraction:g}"),
            ("spare_replicas", "spare replicas", f"{p.spare_replicas}"),
            ("failed_fraction", "share of slices down", f"{p.failed_fraction:g}"),
        )
    ]


def _warnings(from_run: Sequence[str], verification: Verification) -> list[str]:
    found = list(from_run)
    if not verification.kept:
        found.insert(0, "the verifying run misses the targets: the fleet is too small, or the run too short to tell")
    return found


def _silent(done: int, total: int, what: str) -> None:
    del done, total, what
