"""The page of a plan: the fleet and its cost, what lies between it and the roofline, and what else was found."""

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from simulator.report.forms import number, percent, seconds, usd
from simulator.report.html.inline import inline_svg
from simulator.report.html.inputs import input_blocks
from simulator.report.html.page import Bar, Bars, Block, Card, Grid, Page, Picture, Prose, Section, waterfall
from simulator.report.intervals import interval_text
from simulator.report.plan_plot import draw_front
from simulator.report.plan_tables import (
    FLEET_COLUMNS,
    FLEET_TEXTS,
    METRICS,
    binding_text,
    fleet_cells,
    fleet_sentence,
    front_table,
    limits_text,
    metric_text,
    provisioning_text,
    rate_text,
    scaled_rows,
    sharding_text,
    targets_text,
    words,
)
from simulator.report.tables import latency_rows
from simulator.results.plan import Alternative, Plan, PlannedFleet, Pool, Verification

if TYPE_CHECKING:
    from collections.abc import Callable


def plan_page(plan: Plan) -> Page:
    """Page of a plan, feasible or not."""
    best = plan.best
    p = plan.provisioning
    rate = f"{rate_text(p.qps)} queries per second"
    lead = (
        f"{plan.model} at {rate}: {targets_text(plan.targets)}.",
        f"Requests of the scenario ({plan.traffic}), at the rate asked.",
        provisioning_text(p),
    )
    if best is None:
        answer, cards, sections = _no_answer(plan)
        status, tone = "infeasible", "bad"
    else:
        answer, cards, sections = (fleet_sentence(best),), _cards(plan, best), _answer_sections(plan, best)
        kept = plan.verification is None or plan.verification.kept
        status, tone = ("feasible", "good") if kept else ("targets missed when verified", "bad")
    return Page(
        title=f"{plan.name}: {rate}",
        status=status,
        tone=tone,
        lead=(*answer, *lead),
        cards=cards,
        sections=(
            *sections,
            Section("others", "Other fleets, chip by chip" if plan.runners_up else "Chip by chip", _other_blocks(plan)),
            Section("inputs", "What this rests on", (*_searched(plan), *input_blocks(plan.warnings, plan.assumptions))),
        ),
        footer=(
            f"Seed {plan.seed}; {plan.requests:,} requests in a simulation, at least. Equal questions give equal plans.",
            "Latencies and rates are simulated; the roofline only rules deployments out.",
            "The planned replica is in the plan's file as a scenario; simulating it gives the verifying run again.",
        ),
    )


def _cards(plan: Plan, best: PlannedFleet) -> tuple[Card, ...]:
    replicas = " + ".join(f"{p.replicas:,} × {p.slice}" for p in best.pools)
    spread: tuple[str, ...] = ()
    if plan.chips_interval is not None:
        drawn = interval_text(plan.chips_interval, number)
        spread = (f"{drawn} in {plan.interval_percent:g} % of draws of the parameters",)
    cards = [Card("chips", f"{best.chips:,}", (f"{replicas} replicas", *spread))]
    if best.usd_per_hour is not None:
        price = f"at {usd(best.usd_per_chip_hour)} per chip-hour"
        low, high = best.low_usd_per_hour, best.high_usd_per_hour
        span = () if low == high else (f"{usd(low)} to {usd(high)} over the range of the price",)
        cards.append(Card("cost per hour", usd(best.usd_per_hour), (price, *span)))
    if best.usd_per_query is not None:
        million = f"{usd(1e6 * best.usd_per_query)} per million queries"
        cards.append(Card("cost per query", usd(best.usd_per_query), (million,)))
    c = plan.consumption
    parts = () if c is None else (f"busy {number(c.busy_chip_s)} · ideal {number(c.ideal_chip_s)}",)
    factor = (f"{number(plan.total_factor)} times the ideal roofline",) if plan.waterfall else ()
    cards.append(Card("chip-seconds per query", number(best.chip_seconds_per_query), (*parts, *factor)))
    if c is not None and c.joules_per_query is not None:
        notes = [f"chips, idle included; grade {c.energy.grade}"] if c.energy is not None else []
        if c.facility_joules_per_query is not None:
            notes.append(f"with servers and building {number(c.facility_joules_per_query)} J")
        cards.append(Card("energy per query", f"{number(c.joules_per_query)} J", tuple(notes)))
    what, _, how = binding_text(best).partition(" (")
    above = f"gives way above {' + '.join(number(p.rate_per_s) for p in best.pools)} requests/s of a replica"
    cards.append(Card("what binds", what, (f"the {how[:-1]}: {above}" if how else above,)))
    return tuple(cards)


def _answer_sections(plan: Plan, best: PlannedFleet) -> tuple[Section, ...]:
    found = []
    if plan.waterfall:
        found.append(Section("waterfall", "From the roofline to the bill", _waterfall_blocks(plan)))
    if plan.front:
        found.append(Section("front", "Cost against latency", _front_blocks(plan)))
    if plan.verification is not None:
        found.append(Section("verified", "Does it hold?", _verified_blocks(plan, plan.verification)))
    found.append(Section("fleet", "The fleet", _fleet_blocks(plan, best)))
    return tuple(found)


def _waterfall_blocks(plan: Plan) -> tuple[Block, ...]:
    steps = [
        (s.name, s.chip_s_per_query, number(s.chip_s_per_query) if s.factor == 1 and not i else f"× {s.factor:.3g}")
        for i, s in enumerate(plan.waterfall)
    ]
    last = plan.waterfall[-1].chip_s_per_query
    qps = plan.provisioning.qps
    rows = tuple(
        (
            s.name,
            s.meaning,
            f"{s.factor:.3f}" if i else "–",
            number(s.chip_s_per_query),
            number(s.chip_s_per_query * qps),
        )
        for i, s in enumerate(plan.waterfall)
    )
    return (
        Bars(waterfall([*steps, ("the fleet", last, number(last))]), "chip-seconds per query, factor by factor"),
        Grid(("step", "what it is", "factor", "chip-s/query", "chips"), rows, left=2),
    )


def _front_blocks(plan: Plan) -> tuple[Block, ...]:
    svg = inline_svg(
        partial(draw_front, plan),
        label="cost of the cheapest fleet against the limits",
        key="front",
        least_width_px=680,
    )
    caption = (
        "cheapest fleet when every limit is so many times as long; orange: as asked, hollow: no cheaper than with tighter "
        "limits, cross: no fleet"
    )
    columns, rows, texts = front_table(plan)
    table = Grid(
        columns,
        rows,
        left=texts,
        marked=frozenset(i for i, p in enumerate(plan.front) if p.scale == 1),
    )
    return (Picture(svg, caption, wide=True), table)


def _verified_blocks(plan: Plan, found: Verification) -> tuple[Block, ...]:
    grown = f" {found.added_replicas:,} replicas were added until they did." if found.added_replicas else ""
    pools = plan.best.pools if plan.best is not None else []
    simulated = " and ".join(
        f"{n:,} {'' if pool.role == 'unified' else pool.role + ' '}replica{'s' * (n != 1)}"
        for n, pool in zip(found.replicas, pools, strict=True)
    )
    sentence = (
        f"Simulated again: {simulated}, with another seed ({found.seed}) and {found.requests:,} requests at {number(found.rate_per_s)} "
        f"requests/s, that many replicas' share of the peak: the targets {'held' if found.kept else 'were MISSED'}.{grown} "
        f"{percent(found.kept_fraction)} of the requests kept every limit."
    )
    blocks: list[Block] = [Prose((sentence,))]
    bars = []
    for target in plan.targets.limits:
        values = getattr(found.latency, target.metric)
        asked = target.percentile or 100 * (plan.targets.joint_fraction or 0.0)
        for q in ("p50", "p90", "p95", "p99"):
            value = getattr(values, q).value
            if value is not None:
                label = f"{metric_text(target.metric)} {q}"
                bars.append(_against_limit(label, value, target.limit_s, asked=float(q[1:]) <= asked))
    if bars:
        caption = "latency as a share of its limit; grey: beyond the share of requests that must keep it"
        blocks.append(_limited(bars, caption))
    rows, note = latency_rows(found.latency)
    blocks.append(Grid(tuple(rows[0]), tuple(map(tuple, rows[1:])), caption=note))
    return tuple(blocks)


def _against_limit(label: str, value_s: float, limit_s: float, *, asked: bool = True) -> Bar:
    """A bar as long as the value is, in limits; orange where it must be within and is not."""
    share = value_s / limit_s
    colour = "grey" if not asked else "orange" if share > 1 else "blue"
    return Bar(label, f"{seconds(value_s)} of {seconds(limit_s)}", 0.0, share, colour)


def _limited(bars: list[Bar], caption: str) -> Bars:
    """Bars in units of their limit, with a line at the limit."""
    widest = max(1.0, *(bar.stop for bar in bars))
    return Bars(tuple(replace(bar, stop=bar.stop / widest) for bar in bars), caption, limit=1 / widest)


def _p95(metric: str, pool: Pool) -> str:
    return seconds(pool.latency[metric].p95)


def _fleet_blocks(plan: Plan, best: PlannedFleet) -> tuple[Block, ...]:
    pools = best.pools
    kinds: tuple[tuple[str, Callable[[Pool], str]], ...] = (
        ("slice", lambda p: p.slice),
        ("sharding", sharding_text),
        ("precision", lambda p: p.precision),
        ("sequences / tokens of a step, at most", limits_text),
        ("KV blocks", lambda p: f"{p.num_kv_blocks:,}"),
        ("requests/s when saturated", lambda p: number(p.saturated_per_s)),
        ("requests/s within the targets, and load", lambda p: f"{number(p.rate_per_s)}, {percent(p.load)}"),
        *((f"{metric_text(m)} p95 at that rate", partial(_p95, m)) for m in METRICS if m in pools[0].latency),
        ("replicas at the peak", lambda p: f"{p.needed_replicas:,}"),
        ("replicas with spares", lambda p: f"{p.replicas:,}"),
        ("chips", lambda p: f"{p.chips:,}"),
    )
    rows = tuple((what, *(cell(p) for p in pools)) for what, cell in kinds)
    scaled = scaled_rows(plan, best)
    own = frozenset(i for i, row in enumerate(scaled) if row[0] == rate_text(plan.provisioning.qps))
    blocks: list[Block] = [
        Grid(("of a replica" if len(pools) == 1 else "of a replica of each pool", *(p.role for p in pools)), rows),
        Grid(
            ("queries per second", "replicas", "chips", "per hour"),
            tuple(scaled),
            caption="the same fleet for other rates, peak and spares included; another fleet may be cheaper there",
            marked=own,
        ),
    ]
    if best.price_source:
        blocks.append(Prose((f"Price: {best.price_source}.",)))
    return tuple(blocks)


def _other_blocks(plan: Plan) -> tuple[Block, ...]:
    fleets = [outcome for outcome in plan.by_chip if outcome.fleet is not None]
    others = [outcome for outcome in plan.by_chip if outcome.reason]
    blocks: list[Block] = []
    if plan.best is not None and plan.runners_up:
        runners = (fleet_cells(plan.best), *map(fleet_cells, plan.runners_up))
        caption = "the plan, and the best others among those simulated"
        blocks.append(Grid(FLEET_COLUMNS, runners, caption=caption, left=FLEET_TEXTS, marked=frozenset({0})))
    if fleets:
        rows = tuple((outcome.chip, *fleet_cells(outcome.fleet)) for outcome in fleets)
        caption = "the best fleet of each chip" + (", the cheapest first" if plan.rank_by == "cost" else "")
        blocks.append(Grid(("chip", *FLEET_COLUMNS), rows, caption=caption, left=FLEET_TEXTS + 1))
    if others:
        rows = tuple((outcome.chip, outcome.status.replace("_", " "), words(outcome.reason)) for outcome in others)
        blocks.append(Grid(("chip", "outcome", "why"), rows, left=3))
    return tuple(blocks)


def _searched(plan: Plan) -> tuple[Block, ...]:
    s = plan.searched
    sentence = (
        f"{s.considered:,} deployments considered: {s.illegal:,} the model or the engine does not have, {s.unfit:,} do not fit, "
        f"{s.pruned_by_latency:,} ruled out by a bound on latency, {s.pruned_by_cost:,} by one on chips, {s.simulated:,} simulated in "
        f"{s.simulations:,} runs."
    )
    return (Prose((sentence,)),)


def _no_answer(plan: Plan) -> tuple[tuple[str, ...], tuple[Card, ...], tuple[Section, ...]]:
    """Sentences, cards and sections of a plan without a fleet."""
    chips = ", ".join(outcome.chip for outcome in plan.by_chip)
    answer = (f"No fleet of the chips asked ({chips}) keeps the targets.",)
    blocks: list[Block] = []
    idle = plan.idle_latency_s
    bars = [
        _against_limit(metric_text(target.metric), idle[target.metric], target.limit_s)
        for target in plan.targets.limits
        if target.metric in idle
    ]
    if bars:
        caption = "the least that any deployment reaches with one request at a time, as a share of its limit"
        blocks.append(_limited(bars, caption))
    if plan.nearest:
        rows = tuple((words(near.what), *fleet_cells(near.fleet)) for near in plan.nearest)
        blocks.append(Grid(("change", *FLEET_COLUMNS), rows, caption="what would be feasible", left=FLEET_TEXTS + 1))
    else:
        blocks.append(Prose(("Nothing near the question is feasible either.",)))
    return (
        answer,
        tuple(map(_nearest_card, plan.nearest)),
        (Section("nearest", "The nearest that is feasible", tuple(blocks)),),
    )


def _nearest_card(near: Alternative) -> Card:
    fleet = near.fleet
    cost = (
        ()
        if fleet.usd_per_hour is None
        else (f"{usd(fleet.usd_per_hour)} an hour, {usd(fleet.usd_per_query)} a query",)
    )
    return Card(words(near.what), f"{fleet.chips:,} chips", (fleet_cells(fleet)[0], *cost))
