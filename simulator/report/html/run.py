"""The page of one run: what users see, what a query consumes and costs, where the chip time went, and what it rests on."""

import math
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from simulator.report.forms import number, percent, seconds, usd
from simulator.report.html.inline import inline_svg
from simulator.report.html.inputs import input_blocks
from simulator.report.html.page import Bar, Bars, Card, Grid, Page, Picture, Prose, Section, waterfall
from simulator.report.html.uncertainty import parameter_notes, uncertainty_sections
from simulator.report.roofline_plot import draw_roofline
from simulator.report.run_plot import draw_cdfs, draw_load, measured_values, metric_label
from simulator.report.tables import (
    POOL_COLUMNS,
    conservation_lines,
    latency_rows,
    overload_sentence,
    pool_rows,
    price_text,
    range_text,
    slo_sentence,
)
from simulator.results import Result
from simulator.results.summary import Distribution, Energy, Summary, TokenPrices
from simulator.units import format_si

if TYPE_CHECKING:
    from simulator.roofline.analysis import StepReport

#: Colours of chip-time shares, largest first.
SHARE_COLOURS = ("blue", "sky", "green", "yellow", "orange", "pink", "muted", "grey")
QPS = (1, 10, 100, 1_000, 10_000, 100_000)
_TONES = {"ok": "good", "overloaded": "bad", "slo_missed": "bad", "partial": "bad"}


def run_page(result: Result, *, step: "StepReport | None" = None) -> Page:
    """Page of a result; ``step`` is the decode step at the run's mean batch and context, drawn as a roofline."""
    s = result.summary
    d = s.deployment
    chips = s.ledger.chips
    # The slices of several pools come with their numbers.
    replicas = "" if d.replicas == 1 or s.pools else f" × {d.replicas} replicas"
    return Page(
        title=s.scenario,
        status=s.status.replace("slo_missed", "SLO missed"),
        tone=_TONES[s.status],
        lead=(
            f"{d.model}, {d.precision}, {d.sharding} on {d.slice}{replicas}: {chips} chip{'s' * (chips > 1)}.",
            f"Traffic: {d.traffic}.",
            *_verdict(s),
        ),
        cards=_cards(s),
        sections=(
            Section("users", "What users see", _latency_blocks(result)),
            Section("load", "Load", _load_blocks(result)),
            Section("cost", "What a query consumes", _cost_blocks(s)),
            Section("time", "Where the chip time went", _time_blocks(s, step)),
            *_feature_sections(s),
            *uncertainty_sections(s),
            Section(
                "inputs",
                "What this rests on",
                (*input_blocks(s.warnings, s.assumptions), Prose(tuple(conservation_lines(s)))),
            ),
        ),
        footer=_footer(result),
    )


def _verdict(s: Summary) -> tuple[str, ...]:
    lines = []
    if s.load.overloaded:
        lines.append(overload_sentence(s.load))
    if s.slo:
        lines.append(slo_sentence(s.slo))
    return tuple(lines)


def _cards(s: Summary) -> tuple[Card, ...]:
    c = s.chip_seconds_per_query
    cards = [
        Card(
            "chip-seconds per query, provisioned",
            number(c.provisioned),
            (
                f"busy {number(c.busy)} · ideal {number(c.ideal)}",
                *parameter_notes(s, "chip_seconds_per_query.provisioned"),
            ),
        )
    ]
    if s.prices:
        p = s.prices
        inputs, outputs = p.allocation.per_million_input_tokens_usd, p.allocation.per_million_output_tokens_usd
        millions = f"input {usd(inputs)}, output {usd(outputs)}"
        cards.append(
            Card(
                "cost per query, idle included",
                usd(p.allocation.per_query_usd),
                (
                    f"for its use alone {usd(p.usage.per_query_usd)}",
                    f"per million tokens: {millions}",
                    f"{p.term}, {usd(p.usd_per_chip_hour)} per chip-hour",
                    *parameter_notes(s, "prices.allocation.per_query_usd"),
                ),
            )
        )
    if s.latency:
        limits = s.slo
        for name, found, limit in (
            ("TTFT", s.latency.ttft_s, limits.ttft_s if limits else None),
            ("TPOT", s.latency.tpot_s, limits.tpot_s if limits else None),
            ("E2E", s.latency.e2e_s, limits.e2e_s if limits else None),
        ):
            if found.p50.value is not None:  # one-token outputs have no TPOT
                drawn = parameter_notes(s, f"latency.{name.lower()}_s.p50")
                cards.append(_latency_card(name, found, limit, drawn))
    if s.slo:
        tone = "good" if s.slo.met else "bad"
        cards.append(
            Card(
                "requests within the SLO",
                percent(s.slo.met_fraction.value),
                (f"target {percent(s.slo.target_fraction)}", f"goodput {number(s.slo.goodput_per_s)} requests/s"),
                tone,
            )
        )
    if s.load.load is not None:
        cards.append(
            Card(
                "load",
                number(s.load.load),
                (
                    f"{number(s.load.arrival_per_s)} of {number(s.load.capacity_per_s)} requests/s",
                    *parameter_notes(s, "load.load"),
                ),
                "bad" if s.load.overloaded else "plain",
            )
        )
    if s.energy:
        cards.append(
            Card(
                "energy per query",
                f"{number(s.energy.joules_per_query)} J",
                (
                    f"chips, {number(s.energy.low_joules_per_query)} to {number(s.energy.high_joules_per_query)}, grade {s.energy.grade}",
                    f"with servers and building {number(s.energy.facility_joules_per_query)} J",
                    f"{number(s.energy.gco2_per_query)} g CO2e",
                ),
            )
        )
    return tuple(cards)


def _latency_card(name: str, found: Distribution, limit_s: float | None, drawn: tuple[str, ...]) -> Card:
    notes = [f"p99 {seconds(found.p99.value)}"]
    if found.p50.low is not None:
        notes.append(f"sampling, 95 %: {range_text(found.p50)}")
    notes += drawn
    if limit_s is not None:
        notes.append(f"limit {seconds(limit_s)}")
    return Card(f"{name}, median", seconds(found.p50.value), tuple(notes))


def _latency_blocks(result: Result) -> tuple[Prose | Grid | Picture, ...]:
    s = result.summary
    if s.latency is None:
        load = s.load
        figures = (
            ("arrival rate", f"{number(load.arrival_per_s)} requests/s"),
            ("capacity", f"{number(load.capacity_per_s)} requests/s"),
            ("waiting at the warm-up cut", number(load.backlog_start)),
            ("waiting at the last arrival", number(load.backlog_end)),
        )
        words = "There is no steady state: latencies grow for as long as the run lasts, so no percentiles are given."
        return (Prose((words,)), Grid(("load", ""), figures))
    rows, note = latency_rows(s.latency)
    if s.latency.one_token_outputs:
        note += f"; {s.latency.one_token_outputs:,} measured requests had one output token, and so no TPOT"
    table = Grid(tuple(rows[0]), tuple(tuple(row) for row in rows[1:]), caption=note)
    pictures = []
    for name in ("ttft_s", "tpot_s", "e2e_s", "queue_s"):
        if not np.isfinite(measured_values(result, name)).any():  # a summary-only run keeps no requests
            continue
        label = metric_label(name)
        pictures.append(
            Picture(
                inline_svg(
                    partial(draw_cdfs, [(s.scenario, result)], name),
                    label=f"distribution of {label}",
                    key=name[:4],
                ),
                f"{label}: share of the measured requests at or below each value",
            )
        )
    return (*pictures, table)


def _load_blocks(result: Result) -> tuple[Prose | Grid | Picture, ...]:
    s = result.summary
    t, o, r, w = s.throughput, s.occupancy, s.requests, s.window
    picture = Picture(
        inline_svg(lambda: draw_load(result), label="requests and KV cache over time", key="load", least_width_px=620),
        "running and waiting requests, and KV cache in use, over simulated time",
        wide=True,
    )
    rows = (
        ("requests/s", number(t.requests_per_s), number(t.requests_per_s_per_chip)),
        ("output tokens/s", number(t.output_tokens_per_s), number(t.output_tokens_per_s_per_chip)),
        ("all tokens/s", number(t.total_tokens_per_s), number(t.total_tokens_per_s_per_chip)),
    )
    full = (
        ("decoding sequences per step", number(o.mean_decode_batch)),
        ("tokens per step", number(o.mean_step_tokens)),
        ("running requests per replica", f"{number(o.mean_running)}, at most {o.peak_running:,}"),
        ("waiting requests per replica", f"{number(o.mean_waiting)}, at most {o.peak_waiting:,}"),
        ("KV cache in use", f"{percent(o.mean_kv_fraction)}, at most {percent(o.peak_kv_fraction)}"),
        ("preemptions", f"{r.preemptions:,} of {r.preempted:,} requests"),
    )
    words = (
        f"{r.total:,} requests in {seconds(w.end_s)} of simulated time; {r.measured:,} measured, that arrived from "
        f"{seconds(w.start_s)} to {seconds(w.stop_s)} ({w.rule})."
    )
    return (
        *((picture,) if len(result.timeline["start_s"]) else ()),
        Grid(("throughput", "fleet", "per chip"), rows),
        Grid(("how full the replicas were", "mean"), full),
        Prose((words,)),
    )


def _cost_blocks(s: Summary) -> tuple[Prose | Grid | Bars, ...]:
    c = s.chip_seconds_per_query
    served = c.busy - c.recompute - c.wasted
    steps = [
        ("alone, at full efficiency", c.ideal, number(c.ideal)),
        ("as served: efficiency, batching, overheads", served, f"{number(served - c.ideal)} more"),
    ]
    if c.recompute > 0:
        steps.append(("computed again after preemptions", served + c.recompute, f"{number(c.recompute)} more"))
    if c.wasted > 0:
        steps.append(("attempts that were given up", c.busy, f"{number(c.wasted)} more"))
    steps += [
        ("idle time", c.provisioned, f"{number(c.provisioned - c.busy)} more"),
        ("provisioned", c.provisioned, number(c.provisioned)),
    ]
    parts = (
        ("prefill", number(c.prefill - c.cached - c.recompute)),
        ("reading cached tokens", number(c.cached)),
        ("recomputation after preemptions", number(c.recompute)),
        ("decode", number(c.decode)),
        ("busy, all together", number(c.busy)),
    )
    blocks: list[Prose | Grid | Bars] = [
        Bars(waterfall(steps), "chip-seconds per query, from the ideal to what the fleet provides"),
        Grid(("busy chip-seconds per query", ""), parts, marked=frozenset({len(parts) - 1})),
        _fleet_sizes(s),
    ]
    if s.prices:
        p = s.prices

        def row(name: str, basis: TokenPrices) -> tuple[str, ...]:
            millions = (
                basis.per_million_input_tokens_usd,
                basis.per_million_cached_tokens_usd,
                basis.per_million_output_tokens_usd,
                basis.per_million_tokens_usd,
            )
            return (name, usd(basis.per_query_usd), *(usd(million) for million in millions))

        columns = ("price", "query", "M input", "M cached", "M output", "M tokens")
        rows = (row("usage: busy time", p.usage), row("allocation: idle included", p.allocation))
        blocks.append(Grid(columns, rows, caption=price_text(p)))
        if p.owned:
            owned = [(name.removesuffix("_usd"), usd(value)) for name, value in p.owned.items()]
            hour = ("an hour of a chip", usd(p.usd_per_chip_hour))
            blocks.append(Grid(("owning a chip", "per hour"), (*owned, hour), marked=frozenset({len(owned)})))
    else:
        blocks.append(Prose(("No price of this chip is known; set prices.usd_per_chip_hour.",)))
    if s.energy:
        blocks.append(_energy_grid(s.energy))
    return tuple(blocks)


def _energy_grid(e: Energy) -> Grid:
    span = f"{number(e.low_joules_per_query)} to {number(e.high_joules_per_query)} J"
    rows = [
        ("chips, idle included", f"{number(e.joules_per_query)} J ({span})"),
        ("chips, while busy", f"{number(e.joules_per_query_busy)} J"),
        (f"with servers and the building (PUE {e.pue:g})", f"{number(e.facility_joules_per_query)} J"),
        (f"carbon, grid of {e.region}: {e.gco2_per_kwh:g} g/kWh", f"{number(e.gco2_per_query)} g CO2e"),
        ("electricity", usd(e.usd_per_query)),
        ("mean power of a chip", f"{number(e.mean_power_w_per_chip)} W"),
        ("idle … peak power of a chip", f"{number(e.idle_power_w)} … {number(e.peak_power_w)} W"),
    ]
    rows = [row for row in rows if row[1] != usd(None)]
    return Grid(
        ("energy of a query", ""), tuple(rows), caption=f"grade {e.grade} (A: both powers measured … D): {e.source}"
    )


def _fleet_sizes(s: Summary) -> Grid:
    """Chips for other rates: replicas of this run's size, or fleets of its pools, each at this run's load."""
    unit = s.ledger.chips if s.pools else s.ledger.chips // s.ledger.replicas
    rows = []
    for qps in QPS:
        replicas = math.ceil(qps * s.chip_seconds_per_query.provisioned / unit)
        chips = replicas * unit
        hourly = usd(chips * s.prices.usd_per_chip_hour) if s.prices else usd(None)
        rows.append((f"{qps:,}", f"{replicas:,}", f"{chips:,}", hourly))
    caption = "fleets at this run's load per replica; no redundancy, no daily peak: plan adds them"
    unit_name = "fleets of these pools" if s.pools else "replicas"
    return Grid(("queries per second", unit_name, "chips", "per hour"), tuple(rows), caption=caption)


def _time_blocks(s: Summary, step: "StepReport | None") -> tuple[Prose | Grid | Bars | Picture, ...]:
    fractions = s.breakdown.fractions
    parts = sorted((item for item in fractions.items() if item[0] != "idle"), key=lambda item: -item[1])
    shares = [*((name, share) for name, share in parts if share > 0), ("idle", fractions.get("idle", 0.0))]
    widest = max(share for _, share in shares)
    bars = tuple(
        Bar(
            name.replace("_", " "),
            percent(share),
            0.0,
            share / widest,
            "grey" if name == "idle" else SHARE_COLOURS[min(i, len(SHARE_COLOURS) - 1)],
        )
        for i, (name, share) in enumerate(shares)
    )
    u = s.utilisation
    words = (
        f"MFU {percent(u.mfu)} and MBU {percent(u.mbu)} of all chip time; {percent(u.mfu_busy)} and {percent(u.mbu_busy)} of "
        f"busy time. Busy {percent(u.busy_fraction)} of chips × time."
    )
    blocks: list[Prose | Grid | Bars | Picture] = [Prose((words,)), Bars(bars, "shares of chips × time")]
    if step is not None:
        roofline = inline_svg(lambda: draw_roofline(step), label="roofline", key="roof", least_width_px=680)
        caption = (
            f"roofline of a decode step at the run's mean: {step.step.B:,} sequences, "
            f"{seconds(step.time_s)} a step, bound by {step.bound}"
        )
        blocks.append(Picture(roofline, caption, wide=True))
    return tuple(blocks)


def _fleet_blocks(s: Summary) -> tuple[Grid, ...]:
    blocks = []
    rows: tuple[tuple[str, ...], ...]
    if s.pools:
        rows = tuple(
            (name, pool.role, pool.deployment.slice, pool.deployment.sharding, *cells)
            for pool, (name, *cells) in zip(s.pools, pool_rows(s), strict=True)
        )
        columns = ("pool", "role", "slice", "sharding", *POOL_COLUMNS)
        blocks.append(Grid(columns, rows, caption="requests and KV use are means of a replica", left=4))
    if s.links:
        rows = tuple(
            (
                link.name,
                f"{link.links} × {format_si(link.bandwidth_bytes_per_s, 'B/s')}",
                f"{link.transfers:,}",
                format_si(link.moved_bytes / max(link.transfers, 1), "B"),
                percent(link.busy_fraction),
                seconds(link.mean_transfer_s),
                seconds(link.mean_wait_s),
            )
            for link in s.links
        )
        names = ("links", "rate", "transfers", "moved by one", "busy", "one takes", "of it waiting")
        blocks.append(Grid(names, rows, left=2))
    if s.agents:
        a = s.agents
        rows = (
            ("agents at work", f"{a.agents:,}"),
            ("tasks begun", f"{a.tasks:,}"),
            ("completed in time", f"{a.completed:,} ({number(a.tasks_per_s)}/s)"),
            ("left at the deadline", f"{a.left:,}"),
            ("time of a task, p50 / p99", f"{seconds(a.task_s.p50.value)} / {seconds(a.task_s.p99.value)}"),
        )
        blocks.append(Grid(("agents", ""), rows))
    return tuple(blocks)


def _feature_sections(s: Summary) -> tuple[Section, ...]:
    found = []
    if s.pools or s.links or s.agents:
        found.append(Section("pools", "Pools, links and agents", _fleet_blocks(s)))
    if s.prefix_cache:
        p = s.prefix_cache
        rows = (
            ("tokens found in the cache", f"{p.hit_tokens:,} of {p.queried_tokens:,} ({percent(p.hit_fraction)})"),
            ("evicted blocks", f"{p.evicted_blocks:,}"),
            ("chip-seconds saved", f"{number(p.saved_chip_s)} ({percent(p.saved_busy_fraction)} of busy time)"),
        )
        found.append(Section("cache", "Prefix cache", (Grid((f"prefix cache: {p.kind}", ""), rows),)))
    if s.speculation:
        v = s.speculation
        drafting = (
            ("tokens per pass", number(v.tokens_per_pass)),
            ("drafts accepted", percent(v.accepted_fraction)),
            ("drafting, share of busy time", percent(v.draft_share_of_busy)),
            ("wasted, share of busy time", percent(v.wasted_share_of_busy)),
        )
        found.append(Section("speculation", "Speculative decoding", (Grid((v.method, ""), drafting),)))
    if s.kv_memory:
        k = s.kv_memory
        tiers = tuple(
            (t.name, f"{t.hit_tokens:,}", f"{t.loaded_bytes / 1e9:,.3g} GB", f"{t.stored_bytes / 1e9:,.3g} GB")
            for t in k.tiers
        )
        table = Grid(("tier", "tokens loaded", "bytes loaded", "bytes stored"), tiers)
        words = f"Swapped out {k.swap_out_bytes / 1e9:,.3g} GB, in {k.swap_in_bytes / 1e9:,.3g} GB; {k.loads:,} loads."
        found.append(Section("kv", "KV memory below HBM", (Prose((words,)), *((table,) if tiers else ()))))
    return tuple(found)


def _footer(result: Result) -> tuple[str, ...]:
    versions = ", ".join(f"{name} {value}" for name, value in sorted(result.versions.items()))
    same = f"Seed {result.seed}. Same scenario, seed and versions give the same bytes ({versions})."
    again = "Run it again with: chipseconds simulate FOLDER, where FOLDER is the result this page was made of."
    sampling = (
        "Intervals marked sampling are 95 % batch-means intervals; they say nothing of how right the cost model is."
    )
    return (f"{same} {again}", sampling)
