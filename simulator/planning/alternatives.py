"""What else would do: fleets for tighter and looser targets, and if nothing keeps the targets, what comes nearest."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from simulator.catalog.chips import chip_names, load_chip
from simulator.planning.by_chip import BestFleets, OnChip, search_chips, split_on, subsets
from simulator.planning.choices import Choice, in_threads
from simulator.planning.fleet import price_of
from simulator.planning.question import Question
from simulator.results.plan import Alternative, FrontPoint, PlannedFleet, Targets
from simulator.roofline.sweep import pareto_front

#: How far beyond the least possible relaxation alternatives are sought: at the least one, replicas would stand idle.
RELAXATIONS = (1.1, 1.5, 2.0)

#: Fleets of other chips that are named.
ELSEWHERE = 3


def find_front(question: Question, on_chip: Sequence[OnChip], workers: int) -> list[FrontPoint]:
    """The cheapest fleet at each scale of the limits, on the chips that are cheapest at 1."""
    if not question.targets.limits or not question.options.front:
        return []
    scales = sorted({*question.options.front, 1.0})
    cheapest = [one for one in on_chip if one.best is not None and not question.order(question.fleet(one.best))[1]]
    cheapest.sort(key=lambda one: question.order(None if one.best is None else question.fleet(one.best)))

    def of_chip(one: OnChip) -> dict[float, PlannedFleet]:
        searcher = one.searcher or question.searcher(one.chip)
        found: dict[float, PlannedFleet] = {}
        for scale in scales:
            targets = question.targets.scaled(scale)
            choices: list[Choice] = []
            if "unified" in question.options.kinds:
                choices += searcher.search(targets).found[:1]
            if "disaggregated" in question.options.kinds:
                choices += [split for split in split_on(question, one.chip, targets)[:1] if split is not None]
            if choices:
                found[scale] = question.fleet(min(choices, key=lambda choice: choice.rank))
        return found

    by_chip = in_threads(of_chip, cheapest[: question.options.front_chips], workers)
    points = [
        (scale, min((found[scale] for found in by_chip if scale in found), key=question.order, default=None))
        for scale in scales
    ]
    costs = [math.inf if f is None else float(f.usd_per_hour or f.chips) for _, f in points]
    if question.options.rank_by == "chips":
        costs = [math.inf if f is None else float(f.chips) for _, f in points]
    front = pareto_front([scale for scale, _ in points], [-c for c in costs])
    return [
        FrontPoint(scale=s, targets=question.targets.scaled(s), fleet=f, on_front=bool(kept) and f is not None)
        for (s, f), kept in zip(points, front, strict=True)
    ]


def find_nearest(
    question: Question, on_chip: Sequence[OnChip], workers: int
) -> tuple[dict[str, float], list[Alternative]]:
    """What no deployment undercuts, limits that would do, and chips that keep them as they are."""
    idle: dict[str, float] = {}
    for one in on_chip:
        idle |= {name: min(value, idle.get(name, math.inf)) for name, value in one.idle_s.items()}
    found: list[Alternative] = []
    searchers = [one.searcher for one in on_chip if one.searcher is not None]
    for metrics in subsets([t.metric for t in question.targets.limits]) if question.options.relax else ():
        scale = min((one.scales.get(metrics, math.inf) for one in on_chip), default=math.inf)
        if not math.isfinite(scale):
            continue
        for beyond in (*RELAXATIONS, math.inf):
            relaxed = _relaxed(question.targets, max(scale, 1.0) * beyond, metrics)
            ranked = question.ranked(f for searcher in searchers for f in searcher.search(relaxed).found[:1])
            if ranked:
                what = _change(relaxed, metrics)
                found.append(Alternative(what=what, targets=relaxed, fleet=question.fleet(ranked[0])))
        break
    if question.options.look_elsewhere and not question.options.slices:
        found += _elsewhere(question, workers)
    return idle, found


def _elsewhere(question: Question, workers: int) -> list[Alternative]:
    """Fleets of other chips of the catalogue that keep the targets; if there are none, of the one that comes nearest."""
    others = sorted((name for name in chip_names() if name not in question.chips), key=partial(_promise, question))
    options = question.options.model_copy(update={"front": ()})
    plain = replace(question, options=options, chips=tuple(others), explain=False)
    best = BestFleets(plain, ELSEWHERE)
    on_chip = search_chips(plain, others, workers, _quiet, best)
    if best.fleets:
        return [
            Alternative(what=f"on {fleet.pools[0].chip}, as asked", targets=question.targets, fleet=fleet)
            for fleet in best.fleets
        ]
    for metrics in subsets([t.metric for t in question.targets.limits]):
        bounds = sorted((one.scales.get(metrics, math.inf), one.chip) for one in on_chip)
        nearest, scale = None, math.inf
        for bound, chip in bounds:
            if bound >= scale:
                break
            searcher = question.searcher(chip)
            exact = searcher.least_scale(question.targets, metrics)
            if exact < scale:
                nearest, scale = searcher, exact
        if nearest is None:
            continue
        relaxed = _relaxed(question.targets, max(scale, 1.0) * RELAXATIONS[0], metrics)
        what = f"on {nearest.chip}, {_change(relaxed, metrics)}"
        return [
            Alternative(what=what, targets=relaxed, fleet=question.fleet(f)) for f in nearest.search(relaxed).found[:1]
        ]
    return []


def _promise(question: Question, chip: str) -> tuple[bool, float, str]:
    """Sorts chips by what a byte per second of HBM costs: the sooner good fleets are known, the less is searched. No result depends on it."""
    spec = load_chip(chip)
    speed = spec.memory.hbm_bandwidth.si(f"{chip}: memory.hbm_bandwidth", "bytes/s")
    if question.options.rank_by == "chips":
        return False, 1 / speed, chip
    price = price_of(spec, chip, question.template, question.options)
    return price is None, (price.usd_per_chip_hour if price else 1.0) / speed, chip


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
