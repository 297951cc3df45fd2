"""Where one request's time went, from its arrival to its last token or its departure."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise

import numpy as np

from simulator.engine.event_log import EventLog, Moment, Paid, Phase, Span, Step
from simulator.engine.records import (
    CANCELLED,
    FINISHED,
    NOT_ARRIVED,
    REJECTED,
    TIMED_OUT,
    EngineSettings,
)
from simulator.errors import InfeasibleError, InputError
from simulator.fleet.records import Served
from simulator.run.replay import ReplicaRun, carried, replicas_of, stops_of
from simulator.run.scenario import Scenario
from simulator.run.serving import serve_scenario

MAX_EXPLAINED_STEPS = 1_000_000
MOST_AHEAD = 10
"""Requests ahead that are named; all are counted."""

UNDER_WAY = "queue: a step was under way"
ALL_STAGES = "queue: every stage had its micro-batch"
LOADING = "queue: KV blocks were loaded"
FIRST_STEP = "first step, on the KV cache that came"
STATES = {FINISHED: "finished", TIMED_OUT: "timed out", CANCELLED: "cancelled"}

_LATER = {
    Phase.LOADING: LOADING,
    Phase.HOST: "host",
    Phase.LEAVING: "its client had left, the step went on",
    Phase.AWAY: "between attempts",
}
"""Parts that are called otherwise than their phase."""
_WORKED = (Phase.PREFILL, Phase.DECODE, Phase.RECOMPUTE, Phase.LEAVING)
_ORDER = (Phase.PREFILL, Phase.DECODE, Phase.PREEMPTED, Phase.RECOMPUTE, Phase.LEAVING)

Stretch = tuple[float, float]


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
        steps that started in it; in a pipeline, micro-batches that the request was part of.
    own_s
        the request's own share of those steps, by rules R11 and R12; the rest went to the requests beside it. None where it
        had no share. [s]
    with_chunks_s
        part of ``time_s`` in steps that carried prefill chunks. [s]
    stalled_s
        part of ``time_s`` in which nobody worked for it though it was running: its rank waited for the slowest one, or its micro-batch for a stage. [s]
    where
        the pool, if it came to several.
    """

    what: str
    time_s: float
    steps: int = 0
    own_s: float | None = None
    with_chunks_s: float = 0.0
    stalled_s: float = 0.0
    where: str = ""


@dataclass(frozen=True)
class Ahead:
    """A request that was there first."""

    request: int
    state: str
    """``running``, or ``waiting``: in the queue before it."""
    prompt_tokens: int
    output_tokens: int
    left_s: float
    """Time from the explained request's arrival until this one was done with the replica. [s]"""


@dataclass(frozen=True)
class Stop:
    """A replica that a request came to."""

    pool: str
    replica: int
    """Counted over all pools."""
    rank: int
    router: str
    """The policy that chose it."""
    arrival_s: float


@dataclass(frozen=True)
class Explanation:
    """One request's life. Times from the start of the run. [s]

    ``cached_tokens`` are those it never computed itself, stated or found in a prefix cache. ``parts`` sum to ``e2e_s``: exactly, before each is rounded to a float.
    ``finish_s`` is its last token, or of a request whose client left, when it was out of the replica; times of tokens are NaN where there were none.
    """

    request: int
    state: str
    """A value of :data:`STATES`."""
    replica: int
    """The first it came to."""
    stops: tuple[Stop, ...]
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    attempts: int
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


def explain(scenario: Scenario, request: int, *, seed: int | None = None, workers: int = 1) -> Explanation:
    """Run a scenario and follow one request through it.

    Parameters
    ----------
    request
        index in the stream, as in the column ``request`` of a result.
    seed
        instead of the scenario's own.
    workers
        replicas simulated at the same time.

    Raises
    ------
    InputError
        If there is no such request, or its life has too many steps to follow.
    InfeasibleError
        If the request was rejected, or never sent: its time went nowhere.
    """
    served = serve_scenario(scenario, seed=seed, workers=workers).served
    if not 0 <= request < len(served.requests):
        raise InputError(
            f"request {request}: the stream of {scenario.name} has requests 0 … {len(served.requests) - 1}"
        )
    return explain_served(served, request)


def explain_served(served: Served, request: int) -> Explanation:
    """Follow one request through the run of a fleet."""
    replicas = replicas_of(served)
    stops = stops_of(replicas, request)
    status = int(served.status[request])
    if status == REJECTED:
        raise InfeasibleError(_why_rejected(request, stops))
    if status == NOT_ARRIVED:
        raise InfeasibleError(f"request {request} was never sent: the run, or the deadline of its task, was over")
    if status not in STATES:
        raise InfeasibleError(f"request {request} did not finish: the run ended before")
    legs = [follow(run, row) for run, row in stops]
    found = legs[0]
    arrival_s, last = float(served.arrival_s[request]), legs[-1]
    parts = [*_carried(served, "store", request, arrival_s, found.arrival_s)]
    for k, leg in enumerate(legs):
        if k:
            parts += _carried(served, "link", request, legs[k - 1].finish_s, leg.arrival_s)
        where = stops[k][0].pool.name if len(legs) > 1 else ""
        renamed = {Phase.PREFILL.value: FIRST_STEP} if k else {}
        parts += [replace(part, where=where, what=renamed.get(part.what, part.what)) for part in leg.parts]
    policies = (served.fleet.router.policy, served.fleet.decode_router.policy)
    tokens = served.requests
    return replace(
        found,
        state=STATES[status],
        stops=tuple(replace(leg.stops[0], router=policy) for leg, policy in zip(legs, policies, strict=False)),
        prompt_tokens=int(tokens.prompt_tokens[request]),
        output_tokens=int(tokens.output_tokens[request]),
        preemptions=sum(leg.preemptions for leg in legs),
        arrival_s=arrival_s,
        first_token_s=last.first_token_s if served.fleet.first_token == "decode" else found.first_token_s,  # noqa: S105 - a token of text
        finish_s=last.finish_s,
        e2e_s=last.finish_s - arrival_s,
        parts=tuple(parts),
        ahead=tuple(
            replace(
                one,
                prompt_tokens=int(tokens.prompt_tokens[one.request]),
                output_tokens=int(tokens.output_tokens[one.request]),
            )
            for one in found.ahead
        ),
    )


def follow(run: ReplicaRun, row: int) -> Explanation:
    """Explain what a replica did with its row ``row``."""
    result, requests = run.result, run.requests
    arrival_s = float(requests.arrival_s[row]) if not requests.concurrency else float(result.arrival_s[row])
    log = run.log(arrival_s, max_steps=MAX_EXPLAINED_STEPS, watched=row)
    if not log.complete:
        raise InputError(f"request {int(run.rows[row])}: its life has more than {MAX_EXPLAINED_STEPS} steps")
    spans = [span for span in log.spans if span.row == row]
    first, last = spans[0].start_s, spans[-1].end_s
    everyone = _ahead(run, row)
    others = np.arange(len(requests)) != row
    overtook = (result.arrival_s > result.arrival_s[row]) & (result.scheduled_s < result.scheduled_s[row]) & others
    return Explanation(
        request=int(run.rows[row]),
        state=STATES[int(result.status[row])],
        replica=run.number,
        stops=(Stop(run.pool.name, run.number, spans[-1].rank, "", first),),
        prompt_tokens=int(requests.prompt_tokens[row]),
        cached_tokens=int(result.reused_tokens[row]),
        output_tokens=int(requests.output_tokens[row]),
        attempts=int(result.attempts[row]),
        preemptions=int(result.preemptions[row]),
        arrival_s=first,
        scheduled_s=float(result.scheduled_s[row]),
        first_token_s=float(result.first_token_s[row]),
        finish_s=last,
        e2e_s=last - first,
        parts=tuple(parts_of(log, spans, run.settings)),
        running_ahead=sum(one.state == "running" for one in everyone),
        waiting_ahead=sum(one.state == "waiting" for one in everyone),
        overtaken_by=int(overtook.sum()),
        ahead=tuple(sorted(everyone, key=lambda one: (-one.left_s, one.request))[:MOST_AHEAD]),
    )


def parts_of(log: EventLog, spans: Sequence[Span], settings: EngineSettings) -> list[Part]:
    """What a request's spans, in order, say of its time."""
    last = spans[-1].attempt
    own = _own_shares(spans)
    found: dict[str, list[Span]] = {}
    for span in spans:
        if span.attempt < last or span.phase is Phase.AWAY:
            found.setdefault(_of_earlier(span), []).append(span)
    parts = [_part(log, what, stays, sum(own[id(span)] for span in stays) or None) for what, stays in found.items()]
    now = [span for span in spans if span.attempt == last and span.phase is not Phase.AWAY]
    before = [span for span in now if span.phase is Phase.HOST and span.start_s < now[-1].start_s]
    parts += [_part(log, "host: the request", [span], None) for span in before]
    parts += _queue_parts(log, [span for span in now if span.phase is Phase.QUEUED], settings)
    loading = [span for span in now if span.phase is Phase.LOADING]
    parts += [_part(log, LOADING, loading, None)] if loading else []
    for phase in _ORDER:
        stays = [span for span in now if span.phase is phase]
        if stays:
            shares = sum(own[id(span)] for span in stays)
            parts.append(
                _part(log, _LATER.get(phase, phase.value), stays, shares if shares or phase in _WORKED else None)
            )
    after = [span for span in now if span.phase is Phase.HOST and span not in before]
    return parts + [_part(log, "host: the last token", [span], None) for span in after]


def _of_earlier(span: Span) -> str:
    if span.phase is Phase.AWAY:
        return "between attempts"
    return f"earlier attempts: {'queue' if span.phase is Phase.QUEUED else span.phase.value}"


def _part(log: EventLog, what: str, stays: Sequence[Span], own_s: float | None) -> Part:
    times = [(span.start_s, span.end_s) for span in stays]
    part = Part(what, _sum_s(times), own_s=own_s)
    if any(span.phase in {Phase.HOST, Phase.AWAY, Phase.LOADING} for span in stays):
        return replace(part, own_s=None)
    runs = all(span.phase in _WORKED for span in stays)
    if log.n_stages > 1 and runs:
        rides = [log.steps[i] for i in log.rides]
        steps = sum(any(a <= step.start_s < b for a, b in times) for step in rides)
        at_work = _within([stage for step in rides for stage in step.stages], times)
        mixed = _within([(step.start_s, step.end_s) for step in rides if step.chunks], times)
        return replace(part, steps=steps, with_chunks_s=_sum_s(mixed), stalled_s=part.time_s - _sum_s(at_work))
    rank = stays[0].rank
    mine = [step for step in log.steps if step.rank == rank and any(a <= step.start_s < b for a, b in times)]
    chunks = {step.start_s for step in log.steps if step.chunks}
    mixed = _within([(step.start_s, step.end_s) for step in mine if step.start_s in chunks], times)
    waits = _within([(step.worked_until_s, step.end_s) for step in mine], times) if runs else []
    return replace(part, steps=len(mine), with_chunks_s=_sum_s(mixed), stalled_s=_sum_s(waits))


def _own_shares(spans: Sequence[Span]) -> dict[int, float]:
    """What each span's phase cost the request: what it had paid grows at looks, not at the ends of phases."""
    shares = {id(span): 0.0 for span in spans}
    for name, phases in (
        ("prefill_s", (Phase.PREFILL, Phase.RECOMPUTE)),
        ("decode_s", (Phase.DECODE,)),
        ("copies_s", (Phase.PREEMPTED,)),
    ):
        before, owed, last = Paid(0.0, 0.0, 0.0), 0.0, None
        for span in spans:
            owed += getattr(span.paid, name) - getattr(before, name)
            before = span.paid
            if span.phase in phases:
                shares[id(span)] += owed
                owed, last = 0.0, span
        if last is not None:
            shares[id(last)] += owed
    return shares


def _sum_s(stretches: Iterable[Stretch]) -> float:
    """Length of stretches of time together, rounded once. [s]"""
    return float(sum((Fraction(stop) - Fraction(start) for start, stop in stretches), start=Fraction(0)))


def _union(stretches: Iterable[Stretch]) -> list[Stretch]:
    """Stretches of time in order, joined where they overlap or touch."""
    found: list[Stretch] = []
    for start, stop in sorted(stretches):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(stop, found[-1][1])
        else:
            found.append((start, stop))
    return found


def _within(stretches: Iterable[Stretch], stays: Iterable[Stretch]) -> list[Stretch]:
    """The union of stretches, in as far as it lies in ``stays``."""
    one, other = _union(stretches), _union(stays)
    found, i, j = [], 0, 0
    while i < len(one) and j < len(other):
        start, stop = max(one[i][0], other[j][0]), min(one[i][1], other[j][1])
        if start < stop:
            found.append((start, stop))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return found


def _queue_parts(log: EventLog, stays: Sequence[Span], settings: EngineSettings) -> list[Part]:
    """The queue, by what stood in the way at each moment at which requests were scheduled."""
    under_way = UNDER_WAY if log.n_stages == 1 else ALL_STAGES
    found: dict[str, list[Stretch]] = {}
    steps: dict[str, int] = {}
    chunks = [(step.start_s, step.end_s) for step in log.steps if step.chunks]
    for span in stays:
        place = span.start_s
        for start_s, stop_s, why in _obstacles(log, span, settings):
            if start_s > place:
                found.setdefault(under_way, []).append((place, start_s))
            found.setdefault(why, []).append((start_s, stop_s))
            steps[why] = steps.get(why, 0) + 1
            place = stop_s
        if place < span.end_s:
            found.setdefault(under_way, []).append((place, span.end_s))
    return [
        Part(what, _sum_s(times), steps.get(what, 0), with_chunks_s=_sum_s(_within(chunks, times)))
        for what, times in found.items()
    ]


def _obstacles(log: EventLog, span: Span, settings: EngineSettings) -> list[tuple[float, float, str]]:
    """Stretches of a stay in the queue that began with a try to schedule, and why it did not reach this request."""
    if log.n_stages == 1:
        return [
            (step.start_s, min(step.end_s, span.end_s), f"queue: {_obstacle(step, settings)}")
            for step in log.steps
            if step.rank == span.rank and span.start_s <= step.start_s < span.end_s
        ]
    launched: dict[float, Step] = {step.start_s: step for step in log.steps}
    found: list[tuple[float, float, str]] = []
    why = ""
    edges = [*log.moments, Moment(np.inf, 0, 0, 0, 0, 0)]
    for moment, after in pairwise(edges):
        if not span.start_s <= moment.time_s < span.end_s:
            continue
        step = launched.get(moment.time_s)
        if step is not None or moment.in_flight < log.n_stages or moment.preempted:
            tried = step or Step(moment.time_s, moment.time_s, 0, 0, 0, 0, 0, 0, moment.running, 0, 0, moment.preempted)
            why = f"queue: {_obstacle(tried, settings)}"
        if why:  # with as many micro-batches in flight as stages nobody tries
            found.append((moment.time_s, min(after.time_s, span.end_s), why))
    return found


def _obstacle(step: Step, settings: EngineSettings) -> str:
    """Why a step admitted no more requests (R7, B2 to B6)."""
    scheduling = settings.scheduling
    if step.preempted:
        return "KV cache full, a request was preempted"
    if step.running >= settings.max_num_seqs:
        return "max_num_seqs running"
    if step.tokens >= settings.max_num_batched_tokens:
        return "max_num_batched_tokens spent"
    if scheduling.batching == "static":
        return "the static batch went on"
    if scheduling.batching != "chunked" and step.chunks:
        return "the next in line did not fit into what was left of the KV cache or of max_num_batched_tokens"
    if scheduling.max_num_partial_prefills and step.chunks >= scheduling.max_num_partial_prefills:
        return "max_num_partial_prefills prompts unfinished"
    return "the next in line did not fit into the KV cache"


def _carried(served: Served, name: str, request: int, sent_s: float, there_s: float) -> list[Part]:
    """KV cache on its way to a replica: first it waits for its links, then it is sent."""
    one = carried(served, name, request, sent_s, there_s)
    if one is None:
        return []
    return [
        Part(f"KV {name}: waiting for the link", _sum_s([(one.asked_s, one.sent_s)])),
        Part(f"KV {name}: sending and latency", _sum_s([(one.sent_s, one.there_s)])),
    ]


def _ahead(run: ReplicaRun, row: int) -> list[Ahead]:
    """Requests that were in the system at its arrival and were scheduled before it."""
    requests, result = run.requests, run.result
    arrival_s, mine = float(result.arrival_s[row]), float(result.scheduled_s[row])
    rows = np.arange(len(requests))
    there = (result.finish_s > arrival_s) & (rows != row)
    there &= (result.arrival_s < arrival_s) | ((result.arrival_s == arrival_s) & (rows < row))
    first = there & (result.scheduled_s <= mine)
    return [
        Ahead(
            request=int(run.rows[j]),
            state="running" if result.scheduled_s[j] < arrival_s else "waiting",
            prompt_tokens=int(requests.prompt_tokens[j]),
            output_tokens=int(requests.output_tokens[j]),
            left_s=float(result.finish_s[j]) - arrival_s,
        )
        for j in np.flatnonzero(first).tolist()
    ]


def _why_rejected(request: int, stops: Sequence[tuple[ReplicaRun, int]]) -> str:
    if not stops:
        return f"request {request} was rejected on arrival: no decode replica could hold it"
    run, row = stops[-1]
    settings = run.settings
    longest = int(run.requests.prompt_tokens[row] + run.requests.max_tokens[row])
    tokens = settings.num_kv_blocks * settings.block_size
    limit = f", max_model_len = {settings.max_model_len}" if settings.max_model_len else ""
    if settings.scheduling.batching != "chunked":
        limit += f", max_num_batched_tokens = {settings.max_num_batched_tokens} (prompts are taken whole)"
    return (
        f"request {request} was rejected on arrival: prompt + max_tokens = {longest}; "
        f"the KV cache of a replica holds {tokens} tokens{limit}"
    )
