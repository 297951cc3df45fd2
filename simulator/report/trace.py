"""A stretch of a run as a trace that Chrome (``chrome://tracing``) and Perfetto (``ui.perfetto.dev``) open.

The format is the Trace Event Format: one JSON object with ``traceEvents``; times in microseconds. A replica is a process.
Its steps are complete events on one thread, its counters sample the start of each step, and each request is an
asynchronous span with its phases nested inside.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from simulator.engine.event_log import EventLog
from simulator.errors import InputError

STEP_THREAD = 0
MICROSECONDS = 1e6


def trace_document(
    logs: Sequence[EventLog], *, name: str, num_kv_blocks: int, about: Callable[[int], Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """Trace of one or several replicas, log r being replica r of a round-robin fleet.

    Parameters
    ----------
    name
        of the scenario.
    about
        what to show of a request besides its phases, by its index in the stream.
    """
    events: list[dict[str, Any]] = []
    for replica, log in enumerate(logs):
        events += _metadata(replica, f"{name}: replica {replica}" if len(logs) > 1 else name)
        events += _steps(replica, log)
        events += _counters(replica, log, num_kv_blocks)
        events += _requests(replica, len(logs), log, about)
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


def _metadata(pid: int, name: str) -> list[dict[str, Any]]:
    return [
        {"ph": "M", "name": "process_name", "pid": pid, "tid": STEP_THREAD, "args": {"name": name}},
        {"ph": "M", "name": "thread_name", "pid": pid, "tid": STEP_THREAD, "args": {"name": "steps"}},
    ]


def _us(time_s: float) -> float:
    """Microseconds to a thousandth: finer than any step, and short in print."""
    return round(time_s * MICROSECONDS, 3)


def _steps(pid: int, log: EventLog) -> list[dict[str, Any]]:
    events = []
    for step in log.steps:
        kind = "mixed" if step.chunks and step.batch else "prefill" if step.chunks else "decode"
        events.append(
            {
                "ph": "X",
                "cat": "step",
                "name": kind,
                "pid": pid,
                "tid": STEP_THREAD,
                "ts": _us(step.start_s),
                "dur": round(_us(step.end_s) - _us(step.start_s), 3),
                "args": {
                    "n tokens": step.tokens,
                    "B decoding": step.batch,
                    "S keys": step.keys,
                    "P chunks": step.chunks,
                    "A pairs": step.pairs,
                    "R rows": step.rows,
                    "preempted": step.preempted,
                },
            }
        )
    return events


def _counters(pid: int, log: EventLog, num_kv_blocks: int) -> list[dict[str, Any]]:
    """Requests and KV blocks, sampled at the start of each step; zero while the replica idles."""
    events = []

    def sample(time_s: float, running: int, waiting: int, blocks: int) -> None:
        common = {"ph": "C", "cat": "state", "pid": pid, "tid": STEP_THREAD, "ts": _us(time_s)}
        events.append({**common, "name": "requests", "args": {"running": running, "waiting": waiting}})
        events.append({**common, "name": "KV blocks", "args": {"owned": blocks, "free": num_kv_blocks - blocks}})

    for i, step in enumerate(log.steps):
        sample(step.start_s, step.running, step.waiting, step.kv_blocks)
        idle = i + 1 < len(log.steps) and log.steps[i + 1].start_s > step.end_s
        if idle or i + 1 == len(log.steps):
            sample(step.end_s, 0, 0, 0)
    return events


def _requests(
    pid: int, replicas: int, log: EventLog, about: Callable[[int], Mapping[str, Any]] | None
) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    lives: dict[int, tuple[float, float]] = {}
    for span in log.spans:
        start, stop = lives.get(span.row, (span.start_s, span.end_s))
        lives[span.row] = (min(start, span.start_s), max(stop, span.end_s))

    def pair(row: int, name: str, start_s: float, end_s: float, depth: int, args: Mapping[str, Any]) -> None:
        if _us(start_s) == _us(end_s):  # a viewer would see the end before the begin
            return
        index = row * replicas + pid
        common = {"cat": "request", "name": name, "id": index, "pid": pid, "tid": STEP_THREAD}
        events.append({"ph": "b", **common, "ts": _us(start_s), "args": dict(args), "depth": depth})
        events.append({"ph": "e", **common, "ts": _us(end_s), "depth": -depth})

    for row, (start_s, end_s) in lives.items():
        index = row * replicas + pid
        pair(row, f"request {index}", start_s, end_s, 0, {} if about is None else about(index))
    for span in log.spans:
        pair(span.row, span.phase.value, span.start_s, span.end_s, 1, {})
    for row, when_s in log.rejected:
        index = row * replicas + pid
        events.append(
            {
                "ph": "i",
                "s": "p",
                "cat": "request",
                "name": f"request {index} rejected",
                "pid": pid,
                "tid": STEP_THREAD,
                "ts": _us(when_s),
            }
        )
    return events
