"""The search of each chip: the best of its deployments, or how far they are from the targets."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from threading import Lock

from simulator.catalog.chips import load_chip
from simulator.errors import UnpriceableError
from simulator.planning.choices import Choice, in_threads
from simulator.planning.fleet import price_of
from simulator.planning.pools import Handover, RoleLoads, Split, of_role, of_share
from simulator.planning.question import Question
from simulator.planning.search import Answer, ChipSearch
from simulator.results.plan import ChipOutcome, PlannedFleet, Searched, Targets
from simulator.roofline.precision import parse_precision
from simulator.run.simulate import prepare_engine


@dataclass(frozen=True)
class OnChip:
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


class BestFleets:
    """The best few fleets found so far on any chip: what others would have to undercut."""

    def __init__(self, question: Question, size: int) -> None:
        self._question = question
        self._size = size
        self._lock = Lock()
        self._kept: list[PlannedFleet] = []

    @property
    def fleets(self) -> tuple[PlannedFleet, ...]:
        """The best first; of equals, in the order of their slices' names."""
        return tuple(self._kept)

    def add(self, fleet: PlannedFleet) -> None:
        """Keep a fleet if it is among the best."""
        with self._lock:
            self._kept = sorted([*self._kept, fleet], key=self._rank)[: self._size]

    def _rank(self, fleet: PlannedFleet) -> tuple[object, ...]:
        return (*self._question.order(fleet), [p.slice for p in fleet.pools])

    def at_most_chips(self, chip: str) -> int | None:
        """Chips of this kind of which a fleet is no worse than the worst that is kept; None: any number."""
        with self._lock:
            worst = self._kept[-1] if len(self._kept) == self._size else None
        if worst is None:
            return None
        if self._question.options.rank_by == "chips":
            return worst.chips
        if worst.usd_per_hour is None:
            return None
        price = price_of(load_chip(chip), chip, self._question.template, self._question.options)
        return 0 if price is None else int(worst.usd_per_hour / price.usd_per_chip_hour * (1 + 1e-9))


def search_chips(
    question: Question,
    chips: Sequence[str],
    workers: int,
    say: Callable[[int, str], None],
    best: BestFleets | None = None,
) -> list[OnChip]:
    """Search some chips, several at a time; with ``best``, only for fleets that belong there."""

    def one(numbered: tuple[int, str]) -> OnChip:
        index, chip = numbered
        say(index, f"searching {chip}")
        found = _search_chip(question, chip, partial(say, index), best.at_most_chips(chip) if best else None)
        if best and found.best is not None:
            best.add(question.fleet(found.best))
        return found

    return in_threads(one, list(enumerate(chips)), workers)


def _search_chip(question: Question, chip: str, say: Callable[[str], None], at_most_chips: int | None = None) -> OnChip:
    searcher = question.searcher(chip)
    for site in searcher.sites[:1]:
        if site.base.cost.parts == 1 and not site.base.settings.expert_skew.on:
            prepare_engine(say, site.base)
    answer = Answer((), 0, 0)
    if "unified" in question.options.kinds:
        answer = searcher.search(question.targets, at_most_chips)
    counts = _counts(searcher, answer) if "unified" in question.options.kinds else Counter()
    split = None
    if "disaggregated" in question.options.kinds:
        split, more = split_on(question, chip, question.targets)
        counts += more
    scales: dict[tuple[str, ...], float] = {}
    idle_s: dict[str, float] = {}
    if not answer.found and not split and searcher.sites:
        how = searcher.least_scale if question.explain else searcher.floor_scale
        for metrics in subsets([t.metric for t in question.targets.limits]):
            if all(math.isinf(scale) for known, scale in scales.items() if len(known) < len(metrics)):
                scales[metrics] = how(question.targets, metrics)
    if scales and question.explain:
        share = question.targets.joint_fraction
        for t in question.targets.limits:
            percentile = t.percentile or 100 * (share or 1)
            alone = Targets(limits=(t.model_copy(update={"percentile": percentile}),))
            idle_s[t.metric] = t.limit_s * searcher.least_scale(alone, (t.metric,))
    kept = bool(scales and question.explain) or len(question.chips) <= question.options.front_chips
    return OnChip(
        chip=chip,
        answer=answer,
        counts=counts,
        why_not=searcher.why_not(),
        unpriceable=bool(searcher.unpriceable) and not searcher.sites,
        any_fits=bool(searcher.sites),
        scales=scales,
        idle_s={name: value for name, value in idle_s.items() if math.isfinite(value)},
        split=split,
        searcher=searcher if kept else None,
    )


def split_on(question: Question, chip: str, targets: Targets) -> tuple[Split | None, Counter[str]]:
    """The fewest chips of a prefill and of a decode pool, and how the search went.

    None if either keeps no part of the targets, or nothing joins them.
    """
    options = question.options.model_copy(
        update={"shardings": tuple(s for s in question.options.shardings if s != "pp")}
    )
    loads = RoleLoads(question.template, options.seed, options.requests, "prefill")
    searcher = ChipSearch(question.architecture, chip, question.template, options, loads, question.provisioning)
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
    later = RoleLoads(question.template, options.seed, options.requests, "decode", handover)
    searcher = ChipSearch(
        question.architecture,
        chip,
        question.template,
        options.model_copy(update={"precisions": same}),
        later,
        of_share(question.provisioning, later.share),
    )
    answer = searcher.search(of_role(targets, "decode"))
    counts += _counts(searcher, answer)
    return (Split(prefill, answer.found[0], later.share) if answer.found else None), counts


def outcome_of(question: Question, one: OnChip) -> ChipOutcome:
    """What a plan says of a chip."""
    if one.best is not None:
        fleet = question.fleet(one.best)
        reason = "" if fleet.usd_per_hour is not None else "no price is published in the chip's file"
        return ChipOutcome(chip=one.chip, status="planned", reason=reason, fleet=fleet)
    if one.unpriceable:
        return ChipOutcome(chip=one.chip, status="unpriceable", reason=one.why_not)
    if not one.any_fits:
        return ChipOutcome(chip=one.chip, status="does_not_fit", reason=one.why_not)
    return ChipOutcome(chip=one.chip, status="infeasible", reason=_shortfall(question.targets, one))


def _shortfall(targets: Targets, one: OnChip) -> str:
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


def subsets(metrics: Sequence[str]) -> list[tuple[str, ...]]:
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


def searched_in(on_chip: Sequence[OnChip]) -> Searched:
    """How the searches went, in all."""
    names = list(Searched.model_fields)
    return Searched(**{name: sum(one.counts[name] for one in on_chip) for name in names})
