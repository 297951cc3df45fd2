"""A stretch of a run as a trace that Chrome (``chrome://tracing``) and Perfetto (``ui.perfetto.dev``) open.

The format is the Trace Event Format: one JSON object with ``traceEvents``; times in microseconds. A replica is a process with a thread for
each of its ranks or stages, on which steps are complete events; its counters sample the moments at which requests are scheduled, and each request is an
asynchronous span with its phases nested inside. Links that carry KV caches are a process of their own.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from simulator.engine.event_log import EventLog, Phase, Span, Step
from simulator.errors import InputError

STEP_THREAD = 0
MICROSECONDS = 1e6
WAITS = "waits for the slowest rank"
TRIES_AGAIN = "gave up, will try again"

#: What is asked about a request, by its index in the stream.
About = Callable[[int], Mapping[str, Any]]
Event = dict[str, Any]


class Track(NamedTuple):
    """One replica: its name, what it did, and which requests of the stream its rows are. ``num_kv_blocks`` are those of a rank."""

    name: str
    log: EventLog
    rows: NDArray[np.int64]
    num_kv_blocks: int


class Transfer(NamedTuple):
    """A KV cache on its way to replica ``target``: asked for at ``asked_s``, sent from ``sent_s`` on, there at ``there_s``."""

    request: int
    link: str
    target: str
    asked_s: float
    sent_s: float
    there_s: float


def trace_document(
    tracks: Sequence[Track], *, name: str, transfers: Sequence[Transfer] = (), about: About | None = None
) -> dict[str, Any]:
    """Trace of replicas side by side.

    Parameters
    ----------
    name
        of the scenario.
    transfers
        of KV caches over links and from stores.
    about
        what to show of a request besides its phases, by its index in the stream.
    """
    events: list[Event] = []
    for pid, track in enumerate(tracks):
        events += _metadata(pid, track)
        events += _ranks(pid, track.log) if track.log.n_stages == 1 else _stages(pid, track.log)
        events += _counters(pid, track)
        events += _requests(pid, track, about)
    events += _transfers(len(tracks), transfers)
    # Viewers want asynchronous events in order of time; at one instant an end goes before a begin, an outer begin first.
    order = {"M": 0, "e": 1, "b": 2, "C": 3, "X": 4, "i": 5}
    events.sort(key=lambda event: (event.get("ts", -1.0), order[event["ph"]], event.pop("depth", 0)))
    return {"displayTimeUnit": "ms", "traceEvents": events, "otherData": {"scenario": name}}


def write_trace(document: Mapping[str, Any], path: Path) -> None:
    """Write a trace; equal traces give equal bytes.

    Raises
    ------
    InputError
        If the file cannot be written.
    """
    try:
        path.write_text(json.dumps(document, separators=(",", ":"), allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"--trace {path}: cannot be written: {error.strerror}") from None


def _named(pid: int, name: str, threads: Sequence[str]) -> list[Event]:
    """Metadata: what a process and its threads are called, and in which order they are shown."""
    common = {"ph": "M", "pid": pid}
    events = [
        {**common, "name": "process_name", "tid": STEP_THREAD, "args": {"name": name}},
        {**common, "name": "process_sort_index", "tid": STEP_THREAD, "args": {"sort_index": pid}},
    ]
    for tid, thread in enumerate(threads):
        events.append({**common, "name": "thread_name", "tid": tid, "args": {"name": thread}})
        events.append({**common, "name": "thread_sort_index", "tid": tid, "args": {"sort_index": tid}})
    return events


def _metadata(pid: int, track: Track) -> list[Event]:
    log = track.log
    threads = (
        [f"stage {j}" for j in range(log.n_stages)] if log.n_stages > 1 else [f"rank {g}" for g in range(log.n_ranks)]
    )
    return _named(pid, track.name, threads if len(threads) > 1 else ["steps"])


def _us(time_s: float) -> float:
    """Microseconds to a thousandth: finer than any step, and short in print."""
    return round(time_s * MICROSECONDS, 3)


def _slice(pid: int, tid: int, name: str, start_s: float, end_s: float, args: Mapping[str, Any]) -> list[Event]:
    """A complete event; none if it is too short to be seen."""
    start, length = _us(start_s), round(_us(end_s) - _us(start_s), 3)
    if length <= 0:
        return []
    return [
        {"ph": "X", "cat": "step", "name": name, "pid": pid, "tid": tid, "ts": start, "dur": length, "args": dict(args)}
    ]


def _kind(step: Step) -> str:
    return "mixed" if step.chunks and step.batch else "prefill" if step.chunks else "decode"


def _composition(step: Step) -> dict[str, int]:
    return {
        "n tokens": step.tokens,
        "B decoding": step.batch,
        "S keys": step.keys,
        "P chunks": step.chunks,
        "A pairs": step.pairs,
        "R rows": step.rows,
        "preempted": step.preempted,
    }


def _ranks(pid: int, log: EventLog) -> list[Event]:
    """Steps on one thread a rank; what it waits for the slowest one is a slice of its own."""
    events = []
    for step in log.steps:
        if step.tokens:
            events += _slice(pid, step.rank, _kind(step), step.start_s, step.worked_until_s, _composition(step))
        waits_from_s = step.worked_until_s if step.tokens else step.start_s
        events += _slice(pid, step.rank, WAITS, waits_from_s, step.end_s, {})
    return events


def _stages(pid: int, log: EventLog) -> list[Event]:
    """Micro-batches on one thread a stage: gaps are bubbles."""
    events = []
    for number, step in enumerate(log.steps):
        args = {"micro-batch": number, **_composition(step)}
        for stage, (entered_s, left_s) in enumerate(step.stages):
            events += _slice(pid, stage, _kind(step), entered_s, left_s, args)
    return events


def _counters(pid: int, track: Track) -> list[Event]:
    """Requests and KV blocks of the whole replica at each moment that the log has."""
    events = []
    blocks = track.num_kv_blocks * track.log.n_ranks
    for moment in track.log.moments:
        common = {"ph": "C", "cat": "state", "pid": pid, "tid": STEP_THREAD, "ts": _us(moment.time_s)}
        requests = {"running": moment.running, "waiting": moment.waiting}
        events.append({**common, "name": "requests", "args": requests})
        owned = {"owned": moment.kv_blocks, "free": blocks - moment.kv_blocks}
        events.append({**common, "name": "KV blocks", "args": owned})
    return events


def _pair(
    pid: int, request: int, name: str, start_s: float, end_s: float, depth: int, args: Mapping[str, Any]
) -> list[Event]:
    """Begin and end of an asynchronous span; none if a viewer would see the end before the begin."""
    if _us(start_s) == _us(end_s):
        return []
    common = {"cat": "request", "name": name, "id": request, "pid": pid, "tid": STEP_THREAD}
    return [
        {"ph": "b", **common, "ts": _us(start_s), "args": dict(args), "depth": depth},
        {"ph": "e", **common, "ts": _us(end_s), "depth": -depth},
    ]


def _name_of(span: Span) -> str:
    return TRIES_AGAIN if span.phase is Phase.AWAY else span.phase.value


def _requests(pid: int, track: Track, about: About | None) -> list[Event]:
    log, events = track.log, []
    lives: dict[int, tuple[float, float]] = {}
    for span in log.spans:
        start, stop = lives.get(span.row, (span.start_s, span.end_s))
        lives[span.row] = (min(start, span.start_s), max(stop, span.end_s))
    for row, (start_s, end_s) in lives.items():
        request = int(track.rows[row])
        args = {} if about is None else about(request)
        events += _pair(pid, request, f"request {request}", start_s, end_s, 0, args)
    for span in log.spans:
        args = {"rank": span.rank} if log.n_ranks > 1 else {}
        args |= {"attempt": span.attempt} if span.attempt > 1 else {}
        events += _pair(pid, int(track.rows[span.row]), _name_of(span), span.start_s, span.end_s, 1, args)
    for row, when_s in log.rejected:
        events.append(
            {
                "ph": "i",
                "s": "p",
                "cat": "request",
                "name": f"request {int(track.rows[row])} rejected",
                "pid": pid,
                "tid": STEP_THREAD,
                "ts": _us(when_s),
            }
        )
    return events


def _transfers(pid: int, transfers: Sequence[Transfer]) -> list[Event]:
    events = _named(pid, "KV caches on their way", ["links"]) if transfers else []
    for one in transfers:
        args = {"link": one.link, "to": one.target}
        events += _pair(pid, one.request, f"{one.link}: request {one.request}", one.asked_s, one.there_s, 0, args)
        events += _pair(pid, one.request, "waits for the link", one.asked_s, one.sent_s, 1, {})
        events += _pair(pid, one.request, "sent", one.sent_s, one.there_s, 1, {})
    return events
