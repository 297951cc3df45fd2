"""Results as text for people, at most 100 columns wide. Renders figures; computes none."""

from collections.abc import Callable, Sequence

from simulator.report.forms import DASH, HEADLINES, WIDTH, aligned, number, percent, seconds, usd, wrapped
from simulator.report.intervals import interval_lines
from simulator.results.summary import (
    Assumption,
    Distribution,
    Energy,
    Estimate,
    Latency,
    Load,
    Prices,
    Slo,
    Summary,
    TokenPrices,
)
from simulator.units import format_si


def summary_text(summary: Summary, *, sources: bool = True) -> str:
    """The summary of a run, grouped for reading; ``sources`` adds the list of inputs with their grades."""
    lines = [
        *_heading(summary),
        "",
        *_answer(summary),
        "",
        *(_latency(summary.latency) if summary.latency else _overload(summary)),
        "",
        *_throughput(summary),
        "",
        *_fleet(summary),
        *_cost(summary),
        "",
        "Conservation",
        *(line for equation in conservation_lines(summary) for line in wrapped(equation)),
    ]
    if summary.replications:
        lines += ["", *_replications(summary)]
    if summary.intervals:
        lines += ["", *interval_lines(summary.intervals)]
    if summary.warnings:
        lines += ["", "Warnings"]
        for warning in summary.warnings:
            lines += wrapped(warning, first="  ! ")
    if sources and summary.assumptions:
        lines += ["", *_assumptions(summary)]
    return "\n".join(lines) + "\n"


def _heading(s: Summary) -> list[str]:
    d, r, w = s.deployment, s.requests, s.window
    chips = s.ledger.chips
    # The slices of several pools come with their numbers.
    replicas = f" × {d.replicas} replicas, {d.router}" if d.replicas > 1 and not s.pools else ""
    replicas += f", {d.router}" if s.pools else ""
    return [
        f"{s.scenario} · seed {s.seed} · status: {s.status}",
        *wrapped(
            f"{d.model}, {d.precision}, {d.sharding} on {d.slice}{replicas} = {chips} chip{'s' * (chips > 1)}; "
            f"KV cache of {s.occupancy.kv_capacity_tokens:,} tokens per replica"
        ),
        *wrapped(f"traffic: {d.traffic}"),
        *wrapped(
            f"{r.total:,} requests in {seconds(w.end_s)} of simulated time; {r.measured:,} measured, "
            f"that arrived from {seconds(w.start_s)} to {seconds(w.stop_s)}"
        ),
    ]


def _answer(s: Summary) -> list[str]:
    c, load = s.chip_seconds_per_query, s.load
    at_most, at_least = ("at most ", "at least ") if load.capacity_understated else ("", "")
    chips = s.ledger.chips
    lines = ["Answer"]
    lines += wrapped(
        f"A query takes {number(c.busy)} chip-seconds busy, {number(c.provisioned)} provisioned (idle included) on "
        f"{chips} chip{'s' * (chips > 1)}; alone at full efficiency it would take {number(c.ideal)}."
    )
    if load.load is None:
        lines += wrapped(f"Capacity: {number(load.capacity_per_s)} requests/s (same requests, all queued at once).")
    elif load.capacity_understated and load.load >= 1 and not load.overloaded:
        lines += wrapped(
            f"Load not known: {s.requests.finished:,} requests are too few to measure capacity (it is at least "
            f"{number(load.capacity_per_s)} requests/s; they arrive at {number(load.arrival_per_s)}/s)."
        )
    elif load.overloaded:
        lines += wrapped(overload_sentence(load))
    else:
        lines += wrapped(
            f"Load {at_most}{number(load.load)}: {number(load.arrival_per_s)} of {number(load.capacity_per_s)} requests/s; "
            f"headroom {at_least}{percent(load.headroom_fraction)}."
        )
    if s.slo:
        lines += wrapped(slo_sentence(s.slo))
    if s.prices:
        lines += wrapped(
            f"A query costs {usd(s.prices.allocation.per_query_usd)} with idle time, "
            f"{usd(s.prices.usage.per_query_usd)} for its use alone."
        )
    return lines


def overload_sentence(load: Load) -> str:
    """Why a run counts as overloaded."""
    why = (
        f"requests arrive at {number(load.arrival_per_s)}/s, capacity is {number(load.capacity_per_s)}/s"
        if load.load is not None and load.load >= 1
        else f"load is {number(load.load)}, yet the backlog grows"
    )
    need = (
        f"; it takes {number(load.load)} times the capacity to keep up, more to have headroom"
        if load.load is not None and load.load >= 1
        else ""
    )
    return (
        f"OVERLOADED: {why} (load {number(load.load)}, headroom {percent(load.headroom_fraction)}); "
        f"waiting requests grew from {number(load.backlog_start)} to {number(load.backlog_end)}{need}."
    )


def slo_sentence(slo: Slo) -> str:
    """How far the limits were met."""
    limits = ", ".join(
        f"{name} ≤ {seconds(limit)}"
        for name, limit in (("TTFT", slo.ttft_s), ("TPOT", slo.tpot_s), ("E2E", slo.e2e_s))
        if limit is not None
    )
    verdict = "met" if slo.met else "MISSED"
    return (
        f"SLO {verdict}: {percent(slo.met_fraction.value)}{_interval(slo.met_fraction, scale=100, unit=' %')} of requests had "
        f"{limits} (target {percent(slo.target_fraction)}); goodput {number(slo.goodput_per_s)} requests/s."
    )


def _interval(estimate: Estimate, *, scale: float, unit: str) -> str:
    if estimate.low is None or estimate.high is None:
        return ""
    return f" [{number(scale * estimate.low)} … {number(scale * estimate.high)}{unit}]"


def _overload(s: Summary) -> list[str]:
    load = s.load
    return [
        "Load (no steady state: latencies grow for as long as the run lasts, so no percentiles are given)",
        *aligned(
            [
                ["arrival rate", f"{number(load.arrival_per_s)} requests/s"],
                ["capacity", f"{number(load.capacity_per_s)} requests/s"],
                ["load", number(load.load)],
                ["headroom", percent(load.headroom_fraction)],
                ["waiting at the warm-up cut", number(load.backlog_start)],
                ["waiting at the last arrival", number(load.backlog_end)],
                ["trend test p-value", number(load.backlog_trend_p)],
            ]
        ),
    ]


def latency_rows(latency: Latency) -> tuple[list[list[str]], str]:
    """Table of latencies, header first, intervals beneath their figures; and what the brackets mean."""
    named: list[tuple[str, Distribution]] = [
        ("TTFT", latency.ttft_s),
        ("TPOT", latency.tpot_s),
        ("ITL", latency.itl_s),
        ("E2E", latency.e2e_s),
        ("queue", latency.queue_s),
    ]
    rows = [["Latency", "mean", "p50", "p90", "p95", "p99"]]
    reasons = []
    for name, found in named:
        estimates = [found.mean, found.p50, found.p90, found.p95, found.p99]
        rows.append([name, *(seconds(e.value) for e in estimates)])
        if any(e.low is not None or e.high is not None for e in estimates):
            rows.append(["", *(range_text(e) for e in estimates)])
        missing = [(q, e.reason) for q, e in zip(rows[0][1:], estimates, strict=True) if e.reason]
        if missing:
            labels = ", ".join(q for q, _ in missing) if len(missing) < len(estimates) else "all"
            reasons.append((missing[-1][1], f"{name} {labels}"))
    return rows, "[a … b]: 95 % batch-means interval" + _reasons(reasons)


def _latency(latency: Latency) -> list[str]:
    (header, *body), note = latency_rows(latency)
    lines = aligned([header, *([f"  {name}" if name else "", *cells] for name, *cells in body)], indent=0)
    lines += wrapped(note, first="  ")
    if latency.one_token_outputs:
        lines += wrapped(f"{latency.one_token_outputs:,} measured requests had one output token, and so no TPOT")
    return lines


def _reasons(found: list[tuple[str, str]]) -> str:
    grouped: dict[str, list[str]] = {}
    for reason, what in found:
        grouped.setdefault(reason, []).append(what)
    return "".join(f"; none for {', '.join(what)}: {reason}" for reason, what in grouped.items())


def range_text(estimate: Estimate, form: Callable[[float | None], str] = seconds) -> str:
    """The interval of an estimate in brackets, its unit once."""
    if estimate.low is None and estimate.high is None:
        return DASH
    low, high = form(estimate.low), form(estimate.high)
    value_low, _, unit_low = low.rpartition(" ")
    unit_high = high.rpartition(" ")[2]
    return f"[{value_low if unit_low == unit_high else low} … {high}]"


def _prefix_cache(s: Summary) -> list[str]:
    c = s.prefix_cache
    if c is None:
        return []
    return wrapped(
        f"prefix cache: {percent(c.hit_fraction)} of {c.queried_tokens:,} prompt tokens found, worth "
        f"{number(c.saved_chip_s)} chip-seconds ({percent(c.saved_busy_fraction)} of those spent); {c.evicted_blocks:,} blocks evicted"
    )


def _speculation(s: Summary) -> list[str]:
    c = s.speculation
    if c is None:
        return []
    accepted = (
        "none drafted" if c.accepted_fraction is None else f"{percent(c.accepted_fraction)} of the drafts accepted"
    )
    return wrapped(
        f"speculation ({c.method}): {number(c.tokens_per_pass)} tokens per pass, {number(c.drafts_per_pass)} drafts, {accepted}; "
        f"drafting takes {percent(c.draft_share_of_busy)} of busy time, rejected drafts waste {percent(c.wasted_share_of_busy)}"
    )


def _kv_memory(s: Summary) -> list[str]:
    m = s.kv_memory
    if m is None:
        return []
    lines = []
    if m.swap_out_bytes or m.swap_fallbacks:
        lines += wrapped(
            f"swapped {number(m.swap_out_bytes / 1e9)} GB out and {number(m.swap_in_bytes / 1e9)} GB in, "
            f"{percent(m.swap_time_fraction)} of busy time; {m.swap_fallbacks:,} times host memory was full"
        )
    if m.tiers:
        parts = (f"{t.name} {t.hit_tokens:,} tokens, {number(t.loaded_bytes / 1e9)} GB" for t in m.tiers)
        took = "" if m.mean_load_s is None else f", {seconds(m.mean_load_s)} each"
        lines += wrapped(
            f"loaded below HBM: {' · '.join(parts)}; {m.loads:,} requests loaded{took}, {m.loads_declined:,} computed again instead"
        )
    return lines


def _throughput(s: Summary) -> list[str]:
    t, o, u = s.throughput, s.occupancy, s.utilisation
    rows = [
        ["Throughput", "total", "per chip"],
        ["  requests/s", number(t.requests_per_s), number(t.requests_per_s_per_chip)],
        ["  output tokens/s", number(t.output_tokens_per_s), number(t.output_tokens_per_s_per_chip)],
        ["  all tokens/s", number(t.total_tokens_per_s), number(t.total_tokens_per_s_per_chip)],
    ]
    shares = sorted(s.breakdown.fractions.items(), key=lambda item: -item[1])
    per_user = number(t.output_tokens_per_s_per_user)
    return [
        *aligned(rows, indent=0),
        *wrapped(f"a user reads {per_user} tokens/s (1 ÷ median TPOT)"),
        "",
        "Engine",
        *wrapped(
            f"running {number(o.mean_running)} requests per replica on average (peak {o.peak_running}), waiting "
            f"{number(o.mean_waiting)} (peak {o.peak_waiting}); {number(o.mean_decode_batch)} sequences decode per step of "
            f"{seconds(o.mean_step_s)}"
        ),
        *wrapped(
            f"KV cache {percent(o.mean_kv_fraction)} full on average, {percent(o.peak_kv_fraction)} at its peak; "
            f"{s.requests.preemptions:,} preemptions of {s.requests.preempted:,} requests, "
            f"{s.requests.recomputed_tokens:,} tokens recomputed"
        ),
        *_prefix_cache(s),
        *_speculation(s),
        *_kv_memory(s),
        *wrapped(
            f"MFU {percent(u.mfu)}, MBU {percent(u.mbu)} of all chip time; {percent(u.mfu_busy)} and {percent(u.mbu_busy)} "
            "of busy time"
        ),
        *wrapped("chip time: " + " · ".join(f"{name.replace('_', ' ')} {percent(f)}" for name, f in shares if f > 0)),
    ]


POOL_COLUMNS = ("replicas", "chips", "busy", "running", "waiting", "KV", "chip-s/query")


def pool_rows(s: Summary) -> list[tuple[str, ...]]:
    """Each pool's name and :data:`POOL_COLUMNS`: requests and KV use are means of a replica."""
    return [
        (
            pool.name,
            f"{pool.deployment.replicas}",
            f"{(pool.deployment.chips_per_replica or 0) * pool.deployment.replicas}",
            percent(pool.utilisation.busy_fraction),
            number(pool.occupancy.mean_running),
            number(pool.occupancy.mean_waiting),
            percent(pool.occupancy.mean_kv_fraction),
            number(pool.busy_chip_s / s.requests.finished),
        )
        for pool in s.pools
    ]


def fleet_sentences(s: Summary) -> list[str]:
    """What links carried, and what agents got done."""
    found = [
        f"{link.name}: {link.transfers:,} transfers of {format_si(link.moved_bytes / max(link.transfers, 1), 'B')} over "
        f"{link.links} x {format_si(link.bandwidth_bytes_per_s, 'B/s')}, {percent(link.busy_fraction)} busy; one takes "
        f"{seconds(link.mean_transfer_s)}, {seconds(link.mean_wait_s)} of it waiting for the link"
        for link in s.links
    ]
    if s.agents is not None:
        a = s.agents
        found.append(
            f"agents: {a.agents} at work, {a.tasks:,} tasks begun, {a.completed:,} completed in time, {a.left:,} left; "
            f"{number(a.tasks_per_s)} tasks/s, half within {seconds(a.task_s.p50.value)}, 99 % within {seconds(a.task_s.p99.value)}"
        )
    return found


def _fleet(s: Summary) -> list[str]:
    """Pools, links and agents, where there are any."""
    lines = ["Pools and links"] if s.pools or s.links or s.agents else []
    if s.pools:
        lines += aligned([("", *POOL_COLUMNS), *pool_rows(s)])
    for sentence in fleet_sentences(s):
        lines += wrapped(sentence)
    return [*lines, ""] if lines else []


def _cost(s: Summary) -> list[str]:
    c = s.chip_seconds_per_query
    lines = [
        "Chip-seconds per query",
        *wrapped(
            f"busy {number(c.busy)} = prefill {number(c.prefill)} (cached tokens {number(c.cached)}, recomputation "
            f"{number(c.recompute)}) + decode {number(c.decode)}"
        ),
        *wrapped(
            f"provisioned {number(c.provisioned)}; ideal {number(c.ideal)}, {percent(c.ideal_share_of_provisioned)} of it"
        ),
        *wrapped(
            f"busy of the measured queries: half use at most {number(c.busy_of_measured.p50.value)}, "
            f"99 % at most {number(c.busy_of_measured.p99.value)}"
        ),
        "",
    ]
    lines += _prices(s.prices) if s.prices else ["Price: none known; set prices.usd_per_chip_hour"]
    return lines + (_energy(s.energy) if s.energy else [])


def _energy(e: Energy) -> list[str]:
    chips = (
        f"Energy: {number(e.joules_per_query)} J per query at the chips ({number(e.low_joules_per_query)} to "
        f"{number(e.high_joules_per_query)}), {number(e.joules_per_output_token)} J per output token, "
        f"{number(e.mean_power_w_per_chip)} W per chip; grade {e.grade}: {e.source}"
    )
    return [*wrapped(chips, first="", rest="  "), *wrapped(facility_text(e))]


def facility_text(e: Energy) -> str:
    """Energy with servers and building, the electricity bill, and carbon."""
    bill = f"; {usd(e.usd_per_query)} of electricity" if e.usd_per_query is not None else ""
    return (
        f"with servers ({number(e.host_power_w)} W per chip) and the building (PUE {e.pue:g}, {e.operator}): "
        f"{number(e.facility_joules_per_query)} J per query{bill}; {number(e.gco2_per_query)} g CO2e per query at "
        f"{e.gco2_per_kwh:g} g/kWh ({e.region})"
    )


def _prices(p: Prices) -> list[str]:
    def row(name: str, basis: TokenPrices) -> list[str]:
        return [
            name,
            usd(basis.per_query_usd),
            usd(basis.per_million_input_tokens_usd),
            usd(basis.per_million_cached_tokens_usd),
            usd(basis.per_million_output_tokens_usd),
            usd(basis.per_million_tokens_usd),
        ]

    header = ["Price", "query", "M input", "M cached", "M output", "M tokens"]
    rows = [header, row("  usage (busy time)", p.usage), row("  allocation (idle included)", p.allocation)]
    return [*aligned(rows, indent=0), *wrapped(price_text(p))]


def price_text(p: Prices) -> str:
    """Price of a chip-hour with its range, an owned chip's parts, and its source."""
    spread = parts = ""
    if p.low_usd_per_chip_hour is not None and p.high_usd_per_chip_hour is not None:
        spread = f" ({usd(p.low_usd_per_chip_hour)} to {usd(p.high_usd_per_chip_hour)})"
    if p.owned:
        parts = " = " + " + ".join(f"{usd(v)} {name.removesuffix('_usd')}" for name, v in p.owned.items())
    return f"at {usd(p.usd_per_chip_hour)} per chip-hour{spread}{parts}: {p.source}"


def conservation_lines(s: Summary) -> list[str]:
    """The two ledgers of a run, as equations: chip time, and requests."""
    ledger, r = s.ledger, s.requests
    parts = [f"{r.finished:,} finished", f"{r.running:,} running", f"{r.waiting:,} waiting", f"{r.rejected:,} rejected"]
    left = {"timed out": r.timed_out, "cancelled": r.cancelled, "attempts tried again": r.retries}
    parts += [f"{count:,} {what}" for what, count in left.items() if count]
    chip_time = (
        f"{number(ledger.busy_chip_s, 7)} busy + {number(ledger.idle_chip_s, 7)} idle = "
        f"{number(ledger.chip_s, 7)} chip-seconds = {ledger.chips} × {number(ledger.time_s, 7)} s "
        f"(off by {ledger.relative_error:.0e})"
    )
    return [chip_time, f"{r.arrived:,} arrived = {' + '.join(parts)}"]


def _replications(s: Summary) -> list[str]:
    found = s.replications
    if found is None:
        return []
    statuses = ", ".join(f"{count} {status}" for status, count in sorted(found.statuses.items()))
    rows = [[f"Between {len(found.seeds)} seeds", "mean", "95 % interval"]]
    for label, path, form in HEADLINES:
        figure = found.figures.get(path)
        if figure is not None:
            span = DASH if figure.low is None else f"[{form(figure.low)} … {form(figure.high)}]"
            rows.append([f"  {label}", form(figure.mean), span])
    return [*aligned(rows, indent=0), *wrapped(f"status: {statuses}")]


def by_grade(assumptions: Sequence[Assumption]) -> list[Assumption]:
    """Inputs, weakest grade first."""
    order = {"assumed": 0, "recalled": 1, "derived": 2, "measured": 3, "datasheet": 4}
    return sorted(assumptions, key=lambda a: order.get(a.kind, 5))


def _assumptions(s: Summary) -> list[str]:
    ranked = [[a.what, a.kind, a.value, a.source.partition(",")[0]] for a in by_grade(s.assumptions)]
    body = aligned(ranked, left=4)
    return [
        "Inputs behind these figures, weakest first",
        *(line if len(line) <= WIDTH else line[: WIDTH - 1] + "…" for line in body),
    ]
