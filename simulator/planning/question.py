"""QPS and targets → the cheapest fleet: the one function of this room that others call."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations
from typing import Any, TypeVar

import numpy as np

from simulator.catalog.architecture import Architecture
from simulator.catalog.chips import chip_names, load_chip
from simulator.catalog.draws import Draws
from simulator.catalog.models import load_model
from simulator.engine.records import FINISHED, Requests
from simulator.errors import InputError, UnpriceableError
from simulator.planning.fleet import planned_fleet, pool, price_of, waterfall
from simulator.planning.intervals import chips_interval, drawn_rates
from simulator.planning.loads import Loads, at_rate
from simulator.planning.options import PlanOptions
from simulator.planning.pools import Handover, RoleLoads, Split, fleet_scenario, of_role, of_share, small_fleet
from simulator.planning.rating import Sample
from simulator.planning.search import Answer, ChipSearch, Found, needed_replicas, with_spares
from simulator.planning.space import check_precisions
from simulator.results.plan import (
    Alternative,
    ChipOutcome,
    Consumption,
    FrontPoint,
    Plan,
    PlannedFleet,
    Provisioning,
    Role,
    Searched,
    Target,
    Targets,
    Verification,
)
from simulator.results.summary import Assumption, ParameterInterval
from simulator.roofline.precision import parse_precision
from simulator.roofline.sweep import pareto_front
from simulator.run.consumption import ideal_chip_seconds
from simulator.run.options import SloOptions
from simulator.run.resolve import Resolved, resolve
from simulator.run.scenario import Scenario
from simulator.run.serving import queued_at_once, simulate_fleet
from simulator.run.simulate import Run, prepare_engine, run_scenario
from simulator.traffic import TrafficSpec

A = TypeVar("A")
B = TypeVar("B")

Choice = Found | Split

#: Called with (steps done, steps in all, what is done now).
Progress = Callable[[int, int, str], None]

#: Requests of the run that verifies the plan, at least.
VERIFYING_REQUESTS = 10_000
#: How far beyond the least possible relaxation alternatives are sought: at the least one, replicas would stand idle.
RELAXATIONS = (1.1, 1.5, 2.0)
#: Times that a fleet grows by 2 %, if the verifying run misses the targets.
GROWTHS = 10


def targets_of(slo: SloOptions) -> Targets:
    """What a scenario's ``[slo]`` asks: ``percentile`` percent of the requests keep all its limits."""
    limits = tuple(Target(metric=name, limit_s=limit) for name, limit in slo.limits.items())
    return Targets(limits=limits, joint_fraction=slo.percentile / 100 if limits else None)


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
    question = _Question.ask(model, traffic, targets, qps, chips, options=options, template=template)
    return question.answer(workers, progress or _silent)


@dataclass(frozen=True)
class _OnChip:
    """What the search of one chip leaves behind."""

    chip: str
    answer: Answer
    counts: Counter[str]
    why_not: str
    unpriceable: bool
    any_fits: bool
    scales: dict[tuple[str, ...], float] = field(default_factory=dict)
    """If nothing was found: least factor on some limits that lets an idle deployment keep them, or a bound of it."""
    idle_s: dict[str, float] = field(default_factory=dict)
    """Then also the least of each latency."""
    split: Split | None = None
    """Prefill and decode pools, if they were asked for."""
    searcher: ChipSearch | None = None
    """The search itself, for other targets; None: it was let go, because its tables take memory."""

    @property
    def choices(self) -> tuple[Choice, ...]:
        """What keeps the targets as asked."""
        return (*self.answer.found, *([self.split] if self.split else []))

    @property
    def best(self) -> Choice | None:
        """The fewest chips for the targets as asked."""
        return min(self.choices, key=lambda choice: choice.rank, default=None)


@dataclass(frozen=True)
class _Question:
    """A validated question."""

    architecture: Architecture
    targets: Targets
    provisioning: Provisioning
    chips: tuple[str, ...]
    options: PlanOptions
    template: Scenario
    loads: Loads
    explain: bool = True
    """Whether to simulate how far a chip is from targets that it cannot keep, or only to bound it."""

    @classmethod
    def ask(
        cls,
        model: Architecture | str,
        traffic: TrafficSpec,
        targets: Targets,
        qps: float,
        chips: Sequence[str],
        *,
        options: PlanOptions | None,
        template: Scenario | None,
    ) -> "_Question":
        options = options or PlanOptions()
        if not 0 < qps < math.inf:
            raise InputError(f"qps = {qps}: must be positive and finite")
        if not chips:
            raise InputError("chips: name at least one")
        for chip in chips:
            load_chip(chip)
        check_precisions(options)
        for spec in options.slices:
            if spec.rpartition(":")[0] not in chips:
                raise InputError(f"slice {spec}: its chip is not among those asked for, {', '.join(chips)}")
        if options.interval is not None and "disaggregated" in options.kinds:
            raise InputError(
                f"plan: interval = {options.interval:g} with pools of two roles: what they do to each other is not drawn; ask for "
                "unified fleets"
            )
        architecture = load_model(model) if isinstance(model, str) else model
        name = model if isinstance(model, str) else architecture.name
        if template is None:
            template = Scenario(schema_version=1, name="plan", model=name, slice=f"{chips[0]}:1", traffic=traffic)
        template = template.model_copy(update={"model": name, "traffic": traffic, "replicas": 1})
        if template.clients.may_leave:
            raise InputError(
                f"{template.name}: a plan is made for clients who wait; leave the timeouts of [clients] out"
            )
        return cls(
            architecture=architecture,
            targets=targets,
            provisioning=Provisioning(
                qps=qps,
                peak_to_mean=options.peak_to_mean,
                headroom_fraction=options.headroom,
                spare_replicas=options.spare_replicas,
                failed_fraction=options.failed_fraction,
            ),
            chips=tuple(dict.fromkeys(chips)),
            options=options,
            template=template,
            loads=Loads(template, options.seed, options.requests),
        )

    def answer(self, workers: int, say: Progress) -> Plan:
        """Search, rank, verify; or find what is nearest."""
        total = len(self.chips) + 2
        on_chip = self.search(self.chips, workers, lambda i, what: say(i, total, what))
        ranked = self._ranked(on_chip)
        by_chip = [self._outcome(one) for one in on_chip]
        by_chip.sort(key=lambda outcome: self._order(outcome.fleet))
        searched = _searched(on_chip)
        common: dict[str, Any] = {
            "name": self.template.name,
            "model": self.architecture.name,
            "traffic": self.loads.source,
            "targets": self.targets,
            "provisioning": self.provisioning,
            "rank_by": self.options.rank_by,
            "seed": self.options.seed,
            "requests": self.options.requests,
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
            idle, nearest = self._nearest(on_chip, workers)
            say(total, total, "done")
            return Plan(best=None, idle_latency_s=idle, nearest=nearest, **common)
        say(total - 2, total, "verifying the best fleet")
        fleet, verification, run = self._verified(ranked[0])
        say(total - 1, total, "a day's mean load")
        consumption = self._consumption(ranked[0], fleet, run, verification)
        say(total, total, "done")
        summary = run.summary
        if self.options.interval is not None:
            say(total - 1, total, "drawing the calibrated parameters")
        return Plan(
            interval_percent=self.options.interval,
            chips_interval=self._chips_interval(ranked[0], fleet, workers),
            best=fleet,
            waterfall=waterfall(fleet.pools, self.provisioning, consumption.ideal_chip_s),
            verification=verification,
            consumption=consumption,
            runners_up=[self._fleet(f) for f in _unlike(ranked[1:], ranked[0])][: self.options.runners_up],
            front=self._front(on_chip, workers),
            assumptions=[*summary.assumptions, *self._own_assumptions()],
            warnings=_warnings(summary.warnings, verification),
            scenario=run.result.scenario,
            **common,
        )

    def search(self, chips: Sequence[str], workers: int, say: Callable[[int, str], None]) -> list[_OnChip]:
        """Search some chips, several at a time."""

        def one(numbered: tuple[int, str]) -> _OnChip:
            index, chip = numbered
            say(index, f"searching {chip}")
            return self._search_chip(chip, partial(say, index))

        return _in_threads(one, list(enumerate(chips)), workers)

    def _searcher(self, chip: str) -> ChipSearch:
        return ChipSearch(self.architecture, chip, self.template, self.options, self.loads, self.provisioning)

    def _search_chip(self, chip: str, say: Callable[[str], None]) -> _OnChip:
        searcher = self._searcher(chip)
        for site in searcher.sites[:1]:
            if site.base.cost.parts == 1 and not site.base.settings.expert_skew.on:
                prepare_engine(say, site.base)
        answer = searcher.search(self.targets) if "unified" in self.options.kinds else Answer((), 0, 0)
        counts = _counts(searcher, answer) if "unified" in self.options.kinds else Counter()
        split = None
        if "disaggregated" in self.options.kinds:
            split, more = self._split(chip, self.targets)
            counts += more
        scales: dict[tuple[str, ...], float] = {}
        idle_s: dict[str, float] = {}
        if not answer.found and not split and searcher.sites:
            how = searcher.least_scale if self.explain else searcher.floor_scale
            for metrics in _subsets([t.metric for t in self.targets.limits]):
                if all(math.isinf(scale) for known, scale in scales.items() if len(known) < len(metrics)):
                    scales[metrics] = how(self.targets, metrics)
        if scales and self.explain:
            share = self.targets.joint_fraction
            for t in self.targets.limits:
                percentile = t.percentile or 100 * (share or 1)
                alone = Targets(limits=(t.model_copy(update={"percentile": percentile}),))
                idle_s[t.metric] = t.limit_s * searcher.least_scale(alone, (t.metric,))
        return _OnChip(
            chip=chip,
            answer=answer,
            counts=counts,
            why_not=searcher.why_not(),
            unpriceable=bool(searcher.unpriceable) and not searcher.sites,
            any_fits=bool(searcher.sites),
            scales=scales,
            idle_s={name: value for name, value in idle_s.items() if math.isfinite(value)},
            split=split,
            searcher=searcher if (scales and self.explain) or len(self.chips) <= self.options.front_chips else None,
        )

    def _split(self, chip: str, targets: Targets) -> tuple[Split | None, Counter[str]]:
        """The fewest chips of a prefill and of a decode pool, and how the search went.

        None if either keeps no part of the targets, or nothing joins them.
        """
        options = self.options.model_copy(update={"shardings": tuple(s for s in self.options.shardings if s != "pp")})
        loads = RoleLoads(self.template, options.seed, options.requests, "prefill")
        searcher = ChipSearch(self.architecture, chip, self.template, options, loads, self.provisioning)
        answer = searcher.search(of_role(targets, "prefill"))
        counts = _counts(searcher, answer)
        if not answer.found:
            return None, counts
        prefill = answer.found[0]
        try:
            handover = Handover.of(prefill)
        except UnpriceableError:
            return None, counts
        kv = prefill.resolved.deployment.precision.kv
        same = tuple(text for text in options.precisions if parse_precision(text).kv == kv)
        later = RoleLoads(self.template, options.seed, options.requests, "decode", handover)
        searcher = ChipSearch(
            self.architecture,
            chip,
            self.template,
            options.model_copy(update={"precisions": same}),
            later,
            of_share(self.provisioning, later.share),
        )
        answer = searcher.search(of_role(targets, "decode"))
        counts += _counts(searcher, answer)
        return (Split(prefill, answer.found[0], later.share) if answer.found else None), counts

    def _fleet(self, choice: Choice, *, needed: Sequence[int] | None = None) -> PlannedFleet:
        """A choice as a fleet, with other numbers of needed replicas than it has itself if given."""
        parts = _parts(choice)
        counts = needed or [found.needed for _, found, _ in parts]
        pools = [
            pool(found, role, needed=n, replicas=with_spares(self.provisioning, n), share=share)
            for (role, found, share), n in zip(parts, counts, strict=True)
        ]
        prices = [
            price_of(f.resolved.slice.chip, f.place.slice.rpartition(":")[0], self.template, self.options)
            for _, f, _ in parts
        ]
        return planned_fleet(pools, self.provisioning, prices)

    def _order(self, fleet: PlannedFleet | None) -> tuple[bool, bool, float, int]:
        """Ranks fleets: those with a price first where cost decides, chips among the others."""
        if fleet is None:
            return True, True, 0.0, 0
        cost = fleet.usd_per_hour if self.options.rank_by == "cost" else None
        return False, cost is None and self.options.rank_by == "cost", cost or 0.0, fleet.chips

    def _ranked(self, on_chip: Iterable[_OnChip]) -> list[Choice]:
        """Fleets that may win, best first: by cost, only those with a price."""
        return self._ranked_of(choice for one in on_chip for choice in one.choices)

    def _ranked_of(self, fleets: Iterable[Choice]) -> list[Choice]:
        found = [(self._order(self._fleet(f)), f) for f in fleets]
        kept = [item for item in found if not item[0][1]]
        kept.sort(key=lambda item: (item[0], item[1].rank[1:]))
        return [f for _, f in kept]

    def _outcome(self, one: _OnChip) -> ChipOutcome:
        if one.best is not None:
            fleet = self._fleet(one.best)
            reason = "" if fleet.usd_per_hour is not None else "no price is published in the chip's file"
            return ChipOutcome(chip=one.chip, status="planned", reason=reason, fleet=fleet)
        if one.unpriceable:
            return ChipOutcome(chip=one.chip, status="unpriceable", reason=one.why_not)
        if not one.any_fits:
            return ChipOutcome(chip=one.chip, status="does_not_fit", reason=one.why_not)
        return ChipOutcome(chip=one.chip, status="infeasible", reason=_shortfall(self.targets, one))

    def _at(self, choice: Choice, replicas: Sequence[int], rate_per_s: float, n_requests: int) -> Scenario:
        """A choice as a scenario at a rate, judged by the targets as far as ``[slo]`` can say them."""
        load = self.loads.first(n_requests)
        traffic = at_rate(self.loads.spec, load, rate_per_s, n_requests)
        limits: dict[str, float] = {t.metric: t.limit_s for t in self.targets.limits}
        share = self.targets.joint_fraction
        if share is None:
            share = min((t.percentile / 100 for t in self.targets.limits if t.percentile), default=0.99)
        slo = SloOptions(**limits, percentile=100 * share)
        found = _parts(choice)[-1][1]
        chip = found.resolved.slice.chip
        price = price_of(chip, found.place.slice.rpartition(":")[0], self.template, self.options)
        by_hand = price is not None and price.term == "by hand"
        prices = found.resolved.scenario.prices if price is None else self.template.prices
        prices = prices.model_copy(update={"usd_per_chip_hour": price.usd_per_chip_hour if price and by_hand else None})
        run = self.template.run.model_copy(update={"seed": self.options.seed + 1, "seeds": 1, "summary_only": False})
        changes = {"traffic": traffic, "slo": slo, "prices": prices, "run": run}
        if isinstance(choice, Split):
            prefill, decode = replicas
            return fleet_scenario(self.template, choice, (prefill, decode)).model_copy(update=changes)
        return choice.resolved.scenario.model_copy(update=changes)

    def _simulate(self, choice: Choice, replicas: Sequence[int], rate_per_s: float) -> tuple[Run, Sample]:
        longest = max(len(found.load.requests) for _, found, _ in _parts(choice))
        n = max(VERIFYING_REQUESTS, longest * sum(replicas) if isinstance(choice, Split) else longest)
        run = run_scenario(self._at(choice, replicas, rate_per_s, n), architecture=self.architecture)
        window, table = run.summary.window, run.result.requests
        arrival = np.asarray(table["arrival_s"], dtype=np.float64)
        return run, Sample.of(table, np.flatnonzero((arrival >= window.start_s) & (arrival <= window.stop_s)))

    def _verified(self, choice: Choice) -> tuple[PlannedFleet, Verification, Run]:
        """The plan with another seed, and more replicas until it keeps the targets there too."""
        first = [found.needed for _, found, _ in _parts(choice)]
        needed = list(first)
        for growth in range(GROWTHS + 1):
            replicas = _simulated(choice, needed)
            rate = self.provisioning.peak_qps * max(k / n for k, n in zip(replicas, needed, strict=True))
            run, sample = self._simulate(choice, replicas, rate)
            missed = sample.missed(self.targets)
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
            kept_fraction=sample.kept_fraction(self.targets),
            added_replicas=sum(needed) - sum(first),
            latency=run.summary.latency,
        )
        return self._fleet(choice, needed=needed), verification, run

    def _consumption(self, choice: Choice, fleet: PlannedFleet, run: Run, verified: Verification) -> Consumption:
        """The fleet at the mean load of the day, and the ideal at a saturated replica's batch."""
        counts = [p.replicas for p in fleet.pools]
        replicas = _simulated(choice, counts)
        rate = self.provisioning.qps * max(k / n for k, n in zip(replicas, counts, strict=True))
        if rate != verified.rate_per_s or list(replicas) != verified.replicas:
            run, _ = self._simulate(choice, replicas, rate)
        energy = run.summary.energy
        provisioned = fleet.chips / self.provisioning.qps
        # The run's own rate is its sample's, and its last requests are served by a fleet that empties.
        scale = provisioned / run.summary.chip_seconds_per_query.provisioned
        return Consumption(
            rate_per_s=rate,
            ideal_chip_s=sum(
                share * ideal_chip_s(found.resolved, found.load.requests) for _, found, share in _parts(choice)
            ),
            busy_chip_s=provisioned * run.summary.utilisation.busy_fraction,
            provisioned_chip_s=provisioned,
            joules_per_query=None if energy is None else scale * energy.joules_per_query,
            facility_joules_per_query=None if energy is None else scale * energy.facility_joules_per_query,
            energy=energy,
        )

    def _chips_interval(self, choice: Choice, fleet: PlannedFleet, workers: int) -> ParameterInterval | None:
        """Interval of the fleet's chips over draws of the calibrated parameters; None: none was asked for."""
        level = self.options.interval
        if level is None or isinstance(choice, Split):
            return None
        draws = Draws(self.options.interval_draws, self.options.seed)
        # The search shares tables between batch limits; a draw prices the limits of this one.
        resolved = resolve(choice.resolved.scenario, architecture=self.architecture)
        own, rates = drawn_rates(resolved, choice.load, self.targets, draws, workers=workers)

        def chips_at(rate_per_s: float) -> int:
            needed = needed_replicas(self.provisioning, rate_per_s)
            return with_spares(self.provisioning, needed) * choice.resolved.cost.chips

        return chips_interval(fleet.chips, own, rates, level / 100, chips_at)

    def _front(self, on_chip: Sequence[_OnChip], workers: int) -> list[FrontPoint]:
        """The cheapest fleet at each scale of the limits, on the chips that are cheapest at 1."""
        if not self.targets.limits or not self.options.front:
            return []
        scales = sorted({*self.options.front, 1.0})
        cheapest = [one for one in on_chip if one.best is not None and not self._order(self._fleet(one.best))[1]]
        cheapest.sort(key=lambda one: self._order(None if one.best is None else self._fleet(one.best)))

        def of_chip(one: _OnChip) -> dict[float, PlannedFleet]:
            searcher = one.searcher or self._searcher(one.chip)
            found: dict[float, PlannedFleet] = {}
            for scale in scales:
                targets = self.targets.scaled(scale)
                choices: list[Choice] = []
                if "unified" in self.options.kinds:
                    choices += searcher.search(targets).found[:1]
                if "disaggregated" in self.options.kinds:
                    choices += [split for split in self._split(one.chip, targets)[:1] if split is not None]
                if choices:
                    found[scale] = self._fleet(min(choices, key=lambda choice: choice.rank))
            return found

        by_chip = _in_threads(of_chip, cheapest[: self.options.front_chips], workers)
        points = [
            (scale, min((found[scale] for found in by_chip if scale in found), key=self._order, default=None))
            for scale in scales
        ]
        costs = [math.inf if f is None else float(f.usd_per_hour or f.chips) for _, f in points]
        if self.options.rank_by == "chips":
            costs = [math.inf if f is None else float(f.chips) for _, f in points]
        front = pareto_front([scale for scale, _ in points], [-c for c in costs])
        return [
            FrontPoint(scale=s, targets=self.targets.scaled(s), fleet=f, on_front=bool(kept) and f is not None)
            for (s, f), kept in zip(points, front, strict=True)
        ]

    def _nearest(self, on_chip: Sequence[_OnChip], workers: int) -> tuple[dict[str, float], list[Alternative]]:
        """What no deployment undercuts, limits that would do, and chips that keep them as they are."""
        idle: dict[str, float] = {}
        for one in on_chip:
            idle |= {name: min(value, idle.get(name, math.inf)) for name, value in one.idle_s.items()}
        found: list[Alternative] = []
        searchers = [one.searcher for one in on_chip if one.searcher is not None]
        for metrics in _subsets([t.metric for t in self.targets.limits]):
            scale = min((one.scales.get(metrics, math.inf) for one in on_chip), default=math.inf)
            if not math.isfinite(scale):
                continue
            for beyond in (*RELAXATIONS, math.inf):
                relaxed = _relaxed(self.targets, max(scale, 1.0) * beyond, metrics)
                ranked = self._ranked_of(f for searcher in searchers for f in searcher.search(relaxed).found[:1])
                if ranked:
                    what = _change(relaxed, metrics)
                    found.append(Alternative(what=what, targets=relaxed, fleet=self._fleet(ranked[0])))
            break
        if self.options.look_elsewhere and not self.options.slices:
            found += self._elsewhere(workers)
        return idle, found

    def _elsewhere(self, workers: int) -> list[Alternative]:
        """Fleets of other chips of the catalogue that keep the targets; if there are none, of the one that comes nearest."""
        others = tuple(name for name in chip_names() if name not in self.chips)
        plain = replace(self, options=self.options.model_copy(update={"front": ()}), chips=others, explain=False)
        on_chip = plain.search(others, workers, _quiet)
        fleets = sorted((self._fleet(one.best) for one in on_chip if one.best is not None), key=self._order)
        if fleets:
            return [
                Alternative(what=f"on {fleet.pools[0].chip}, as asked", targets=self.targets, fleet=fleet)
                for fleet in fleets[:3]
            ]
        for metrics in _subsets([t.metric for t in self.targets.limits]):
            bounds = sorted((one.scales.get(metrics, math.inf), one.chip) for one in on_chip)
            nearest, scale = None, math.inf
            for bound, chip in bounds:
                if bound >= scale:
                    break
                searcher = self._searcher(chip)
                exact = searcher.least_scale(self.targets, metrics)
                if exact < scale:
                    nearest, scale = searcher, exact
            if nearest is None:
                continue
            relaxed = _relaxed(self.targets, max(scale, 1.0) * RELAXATIONS[0], metrics)
            what = f"on {nearest.chip}, {_change(relaxed, metrics)}"
            return [
                Alternative(what=what, targets=relaxed, fleet=self._fleet(f)) for f in nearest.search(relaxed).found[:1]
            ]
        return []

    def _own_assumptions(self) -> list[Assumption]:
        p = self.provisioning
        return [
            Assumption(
                what=what,
                value=value,
                kind="assumed",
                source=f"plan: {'asked' if name in self.options.model_fields_set else 'default'}",
            )
            for name, what, value in (
                ("peak_to_mean", "daily peak ÷ mean", f"{p.peak_to_mean:g}"),
                ("headroom", "safety margin below the rate within the targets", f"{p.headroom_fraction:g}"),
                ("spare_replicas", "spare replicas", f"{p.spare_replicas}"),
                ("failed_fraction", "share of slices down", f"{p.failed_fraction:g}"),
            )
        ]


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


def _in_threads(work: Callable[[A], B], items: Sequence[A], workers: int) -> list[B]:
    """Results in the order of the items, several made at a time."""
    if workers == 1 or len(items) < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(max_workers=min(workers, len(items))) as threads:
        return list(threads.map(work, items))


def _silent(done: int, total: int, what: str) -> None:
    del done, total, what


def _relaxed(targets: Targets, scale: float, metrics: Sequence[str]) -> Targets:
    """Some limits longer by a factor, rounded up; left out if it is infinite."""
    if math.isfinite(scale):
        return targets.scaled(_round_up(scale), tuple(metrics))
    limits = tuple(t for t in targets.limits if t.metric not in metrics)
    return Targets(limits=limits, joint_fraction=targets.joint_fraction if limits else None)


def _change(relaxed: Targets, metrics: Sequence[str]) -> str:
    """What was done to the limits, in words."""
    changed = [str(t) for t in relaxed.limits if t.metric in metrics]
    if changed:
        return f"relax to {', '.join(changed)}"
    return f"no limit on {' and '.join(m.removesuffix('_s').upper() for m in metrics)}"


def _round_up(scale: float) -> float:
    """To two digits, so that a limit reads well.

    >>> _round_up(3.38311)
    3.4
    """
    digits = 10.0 ** (math.floor(math.log10(scale)) - 1)
    return float(f"{math.ceil(scale / digits - 1e-9) * digits:.6g}")


def _quiet(index: int, what: str) -> None:
    del index, what


def _subsets(metrics: Sequence[str]) -> list[tuple[str, ...]]:
    """All non-empty subsets, the smallest first."""
    return [subset for size in range(1, len(metrics) + 1) for subset in combinations(metrics, size)]


def _counts(searcher: ChipSearch, answer: Answer) -> Counter[str]:
    """How a search went, by the names of :class:`~simulator.results.plan.Searched`."""
    benches = [entry.bench for entry in searcher.opened]
    return Counter(
        considered=searcher.considered,
        illegal=searcher.illegal,
        unfit=searcher.unfit,
        pruned_by_latency=answer.pruned_by_latency,
        pruned_by_cost=answer.pruned_by_cost,
        simulated=sum(bench.simulations > 0 for bench in benches),
        simulations=sum(bench.simulations for bench in benches),
    )


def _parts(choice: Choice) -> tuple[tuple[Role, Found, float], ...]:
    """Pools of a choice: role, deployment, and the share of the queries that come there."""
    return choice.parts if isinstance(choice, Split) else (("unified", choice, 1.0),)


def _simulated(choice: Choice, counts: Sequence[int]) -> tuple[int, ...]:
    """Replicas to simulate in place of so many: one of equal independent ones, or a small fleet of two pools."""
    return small_fleet((counts[0], counts[1])) if isinstance(choice, Split) else (1,)


def _unlike(found: Iterable[Choice], best: Choice) -> list[Choice]:
    """Of each slice, sharding, layout and precision only the first."""
    seen: set[object] = {best.place}
    kept: list[Choice] = []
    for one in found:
        if one.place not in seen:
            seen.add(one.place)
            kept.append(one)
    return kept


def _searched(on_chip: Sequence[_OnChip]) -> Searched:
    names = list(Searched.model_fields)
    return Searched(**{name: sum(one.counts[name] for one in on_chip) for name in names})


def _shortfall(targets: Targets, one: _OnChip) -> str:
    """How far a chip's best deployment, idle, is from the targets."""
    finite = {metrics: scale for metrics, scale in one.scales.items() if math.isfinite(scale)}
    if not finite:
        return "no deployment keeps the targets, whatever their limits: too few requests are served at all"
    metrics = min(finite, key=lambda m: (len(m), finite[m]))
    if finite[metrics] <= 1:
        return "kept only by a replica that is nearly always idle: no rate on the grid does"
    names = " and ".join(
        f"{t.limit_s * finite[metrics]:.3g} s of {t.metric}" for t in targets.limits if t.metric in metrics
    )
    return f"even idle, the best deployment takes {names}, {finite[metrics]:.2f} times the limit"


def _warnings(from_run: Sequence[str], verification: Verification) -> list[str]:
    found = list(from_run)
    if not verification.kept:
        found.insert(0, "the verifying run misses the targets: the fleet is too small, or the run too short to tell")
    return found
