"""Looking inside a run: any stretch of it step by step, and where one request's time went."""

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from simulator.engine.compiled import Engine, simulate
from simulator.engine.event_log import MAX_STEPS, EventLog, Phase, Step, record
from simulator.engine.records import FINISHED, REJECTED, EngineResult, EngineSettings, Requests
from simulator.errors import InfeasibleError, InputError
from simulator.run.fleets import demand_turns
from simulator.run.outcome import split
from simulator.run.resolve import Resolved, check_contradictions
from simulator.run.simulate import scenario_requests
from simulator.traffic import build_stream

MAX_EXPLAINED_STEPS = 1_000_000
MOST_AHEAD = 10
"""Requests ahead that are named; all are counted."""

UNDER_WAY = "queue: a step was under way"
LOADING = "queue: KV blocks were loaded"


@dataclass(frozen=True)
class Part:
    """A part of a request's end-to-end latency.

    Attributes
    ----------
    what
        the phase, and in a queue what stood in the way.
    time_s
        wall time. [s]
    steps
        steps that started in it.
    own_s
        the request's own share of those steps, by rules R11 and R12; the rest went to the requests beside it. None where it
        had no share. [s]
    with_chunks_s
        part of ``time_s`` in steps that carried prefill chunks. [s]
    """

    what: str
    time_s: float
    steps: int
    own_s: float | None = None
    with_chunks_s: float = 0.0


@dataclass(frozen=True)
class Ahead:
    """A request that was there first."""

    request: int
    state: str
    """``running``, or ``waiting``: in the queue before it."""
    prompt_tokens: int
    output_tokens: int
    left_s: float
    """Time from the explained request's arrival until this one finished. [s]"""


@dataclass(frozen=True)
class Explanation:
    """One request's life. Times from the start of the run. [s]

    ``cached_tokens`` are those it never computed itself, stated or found in a prefix cache. ``parts`` sum to ``e2e_s``: exactly, before each is rounded to a float.
    """

    request: int
    replica: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    preemptions: int
    arrival_s: float
    scheduled_s: float
    first_token_s: float
    finish_s: float
    e2e_s: float
    parts: tuple[Part, ...]
    running_ahead: int
    waiting_ahead: int
    overtaken_by: int
    """Requests that arrived later and were scheduled earlier."""
    ahead: tuple[Ahead, ...]
    """Those that stayed longest, at most :data:`MOST_AHEAD`."""


def record_fleet(
    resolved: Resolved, requests: Requests, start_s: float, end_s: float, *, max_steps: int = MAX_STEPS
) -> list[EventLog]:
    """Logs of a stretch of every replica's run, at most ``max_steps`` steps together."""
    resolved.demand_plain("a trace")
    demand_turns(resolved.scenario, "a trace")
    n = resolved.scenario.replicas
    return [
        record(Engine(resolved.cost, resolved.settings, part), start_s, end_s, max_steps=max(max_steps // n, 1))
        for part in split(requests, n)
    ]


def explain(resolved: Resolved, request: int, *, seed: int | None = None) -> Explanation:
    """Run a scenario and follow one request through it.

    Parameters
    ----------
    request
        index in the stream, as in the column ``request`` of a result.
    seed
        instead of the scenario's own.

    Raises
    ------
    InputError
        If there is no such request, or its life has too many steps to follow.
    InfeasibleError
        If the request was rejected: its time went nowhere.
    """
    resolved.demand_plain("explain")
    demand_turns(resolved.scenario, "explain")
    scenario = resolved.scenario
    used = scenario.run.seed if seed is None else seed
    stream = build_stream(scenario.traffic, used, base_folder=Path.cwd())
    if not 0 <= request < len(stream):
        raise InputError(f"request {request}: the stream of {scenario.name} has requests 0 … {len(stream) - 1}")
    check_contradictions(scenario, stream.concurrency)
    n = scenario.replicas
    requests = split(scenario_requests(scenario, stream, used), n)[request % n]
    row = request // n
    result = simulate(resolved.cost, resolved.settings, requests)
    if result.status[row] == REJECTED:
        raise InfeasibleError(_why_rejected(request, requests, row, resolved.settings))
    if result.status[row] != FINISHED:
        raise InfeasibleError(f"request {request} did not finish: the run ended before")
    log = record(
        Engine(resolved.cost, resolved.settings, requests),
        float(result.arrival_s[row]),
        float(result.finish_s[row]),
        max_steps=MAX_EXPLAINED_STEPS,
    )
    if not log.complete:
        raise InputError(f"request {request}: its life has more than {MAX_EXPLAINED_STEPS} steps")
    return follow(requests, resolved.settings, result, log, row, replica=request % n, replicas=n)


def follow(
    requests: Requests,
    settings: EngineSettings,
    result: EngineResult,
    log: EventLog,
    row: int,
    *,
    replica: int = 0,
    replicas: int = 1,
) -> Explanation:
    """Explain row ``row`` of one replica from its result and the log of the stretch from its arrival to its finish."""
    arrival_s, finish_s = float(result.arrival_s[row]), float(result.finish_s[row])
    spans = [span for span in log.spans if span.row == row]
    own = {
        Phase.PREFILL: 0.0,
        Phase.DECODE: float(result.busy_s[row] - result.busy_prefill_s[row]),
        Phase.RECOMPUTE: 0.0,
    }
    if result.swap_s[row] > 0:
        own[Phase.DECODE] -= float(result.swap_s[row])
        own[Phase.PREEMPTED] = float(result.swap_s[row])
    paid_s = 0.0
    for span in spans:
        if span.phase in {Phase.PREFILL, Phase.RECOMPUTE}:
            own[span.phase] += span.busy_prefill_s - paid_s
            paid_s = span.busy_prefill_s
    load_s = (float(result.load_start_s[row]), float(result.load_end_s[row]))
    parts = _queue_parts(log, arrival_s, spans[0].end_s, settings, load_s)
    for phase in (Phase.PREFILL, Phase.DECODE, Phase.PREEMPTED, Phase.RECOMPUTE):
        stays = [(span.start_s, span.end_s) for span in spans if span.phase is phase]
        if stays:
            steps = [step for step in log.steps if any(a <= step.start_s < b for a, b in stays)]
            mixed = [(step.start_s, step.end_s) for step in steps if step.chunks]
            parts.append(Part(phase.value, _sum_s(stays), len(steps), own.get(phase), _sum_s(mixed)))
    everyone = _ahead(requests, result, row, replica, replicas)
    others = np.arange(len(requests)) != row
    overtook = (result.arrival_s > arrival_s) & (result.scheduled_s < result.scheduled_s[row]) & others
    return Explanation(
        request=row * replicas + replica,
        replica=replica,
        prompt_tokens=int(requests.prompt_tokens[row]),
        cached_tokens=int(result.reused_tokens[row]),
        output_tokens=int(requests.output_tokens[row]),
        preemptions=int(result.preemptions[row]),
        arrival_s=arrival_s,
        scheduled_s=float(result.scheduled_s[row]),
        first_token_s=float(result.first_token_s[row]),
        finish_s=finish_s,
        e2e_s=finish_s - arrival_s,
        parts=tuple(parts),
        running_ahead=sum(one.state == "running" for one in everyone),
        waiting_ahead=sum(one.state == "waiting" for one in everyone),
        overtaken_by=int(overtook.sum()),
        ahead=tuple(sorted(everyone, key=lambda one: (-one.left_s, one.request))[:MOST_AHEAD]),
    )


def _sum_s(stretches: Iterable[tuple[float, float]]) -> float:
    """Length of stretches of time together, rounded once. [s]"""
    return float(sum((Fraction(stop) - Fraction(start) for start, stop in stretches), start=Fraction(0)))


def _queue_parts(
    log: EventLog, arrival_s: float, scheduled_s: float, settings: EngineSettings, load_s: tuple[float, float]
) -> list[Part]:
    """The queue, by what stood in the way in each of its steps; ``load_s`` is when it loaded KV blocks (NaN: never)."""
    found: dict[str, list[tuple[float, float]]] = {}
    under_way = min(max(log.start_s, arrival_s), scheduled_s)
    if under_way > arrival_s:
        found[UNDER_WAY] = [(arrival_s, under_way)]
    load_start_s, load_end_s = load_s
    if load_start_s <= load_end_s:
        found[LOADING] = [load_s]
    for step in log.steps:
        if step.start_s >= scheduled_s:
            break
        if load_start_s <= step.start_s < load_end_s:
            if step.end_s > load_end_s:
                found.setdefault(UNDER_WAY, []).append((load_end_s, min(step.end_s, scheduled_s)))
            continue
        found.setdefault(f"queue: {_obstacle(step, settings)}", []).append((step.start_s, step.end_s))
    chunks = {(step.start_s, step.end_s) for step in log.steps if step.chunks}
    return [
        Part(
            what,
            _sum_s(stretches),
            0 if what in {UNDER_WAY, LOADING} else len(stretches),
            with_chunks_s=_sum_s(stretch for stretch in stretches if stretch in chunks),
        )
        for what, stretches in found.items()
    ]


def _obstacle(step: Step, settings: EngineSettings) -> str:
    """Why a step admitted no more requests (R7)."""
    if step.preempted:
        return "KV cache full, a request was preempted"
    if step.running >= settings.max_num_seqs:
        return "max_num_seqs running"
    if step.tokens >= settings.max_num_batched_tokens:
        return "max_num_batched_tokens spent"
    return "the next in line did not fit into the KV cache"


def _ahead(requests: Requests, result: EngineResult, row: int, replica: int, replicas: int) -> list[Ahead]:
    """Requests that were in the system at its arrival and were scheduled before it."""
    arrival_s, mine = float(result.arrival_s[row]), float(result.scheduled_s[row])
    rows = np.arange(len(requests))
    there = (result.finish_s > arrival_s) & (rows != row)
    there &= (result.arrival_s < arrival_s) | ((result.arrival_s == arrival_s) & (rows < row))
    first = there & (result.scheduled_s <= mine)
    return [
        Ahead(
            request=j * replicas + replica,
            state="running" if result.scheduled_s[j] < arrival_s else "waiting",
            prompt_tokens=int(requests.prompt_tokens[j]),
            output_tokens=int(requests.output_tokens[j]),
            left_s=float(result.finish_s[j]) - arrival_s,
        )
        for j in np.flatnonzero(first).tolist()
    ]


def _why_rejected(request: int, requests: Requests, row: int, settings: EngineSettings) -> str:
    longest = int(requests.prompt_tokens[row] + requests.max_tokens[row])
    tokens = settings.longest_tokens
    limit = f", max_model_len = {settings.max_model_len}" if settings.max_model_len else ""
    return (
        f"request {request} was rejected on arrival: prompt + max_tokens = {longest}; "
        f"the KV cache of a replica holds {tokens:.0f} tokens{limit}"
    )
