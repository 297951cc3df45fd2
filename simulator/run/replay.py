"""Replicas of a run, run again one by one to look inside.

Whoever chose where requests went, and when they were sent on, a replica that gets the same requests at the same times does the same. So each one is
followed by itself, and what it finishes is compared with what the run said.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from simulator.engine.compiled import new_engine
from simulator.engine.event_log import MAX_STEPS, EventLog, Span, record
from simulator.engine.one_by_one import ROW_COLUMNS
from simulator.engine.records import FINISHED, EngineResult, EngineSettings, Requests
from simulator.fleet.records import Link, Pool, PoolResult, Served
from simulator.run.outcome import ConservationError

Ints = NDArray[np.int64]

#: Times of a run that is cut elsewhere differ in their last digits.
TOLERANCE = 1e-9
#: By so much, of its time, a request is sent earlier that was sent at the very end of a step: it must not come after that step's other end.
_EARLIER = 1e-12


@dataclass(frozen=True)
class ReplicaRun:
    """One replica and what it was sent.

    Attributes
    ----------
    number
        counted over all pools.
    rows
        of the fleet's stream, in the order of ``requests``.
    requests
        as they came to this replica.
    """

    pool: Pool
    number: int
    rows: Ints
    requests: Requests
    result: EngineResult

    @property
    def name(self) -> str:
        """Its pool, if pools have names of their own, and its number."""
        return f"replica {self.number}" if self.pool.name == "replicas" else f"{self.pool.name}, replica {self.number}"

    @property
    def settings(self) -> EngineSettings:
        """Of its engine."""
        return self.pool.settings

    def row_of(self, request: int) -> int:
        """Row of a request of the stream; −1 if it was not sent here."""
        found = np.flatnonzero(self.rows == request)
        return int(found[0]) if len(found) else -1

    def log(
        self, start_s: float = 0.0, end_s: float = math.inf, *, max_steps: int = MAX_STEPS, watched: int = -1
    ) -> EventLog:
        """What happened in a stretch of time, as :func:`simulator.engine.event_log.record` says it.

        Raises
        ------
        ConservationError
            If the replica does not do again what it did in the run.
        """
        engine = new_engine(self.pool.cost, self.pool.settings, self.requests)
        log = record(engine, start_s, end_s, max_steps=max_steps, watched=watched)
        again, before = engine.result(), self.result
        done = (again.status == FINISHED) & (again.finish_s <= log.end_s)
        off = np.abs(again.finish_s[done] - before.finish_s[done])
        if not (off <= TOLERANCE * again.finish_s[done]).all():
            raise ConservationError(f"replica {self.number}: run again, it finishes requests at other times")
        return replace(log, spans=tuple(self._as_sent(log))) if self._moved.any() else log

    @property
    def _moved(self) -> NDArray[np.bool_]:
        """[n] whose arrival was made earlier."""
        return np.asarray(self.requests.arrival_s != self.result.arrival_s) & (self.requests.concurrency == 0)

    def _as_sent(self, log: EventLog) -> list[Span]:
        earlier, sent = self.requests.arrival_s, self.result.arrival_s
        return [
            span._replace(start_s=float(sent[span.row])) if span.start_s == earlier[span.row] else span
            for span in log.spans
        ]


def replicas_of(served: Served) -> list[ReplicaRun]:
    """Every replica of a fleet's run, in order."""
    found: list[ReplicaRun] = []
    for pool in served.pools:
        for r, (rows, result) in enumerate(zip(pool.rows, pool.replicas, strict=True)):
            closed = pool.requests.concurrency
            if closed:
                mine = pool.requests.take(rows, concurrency=len(range(r, closed, len(pool.rows))))
                found.append(ReplicaRun(pool.pool, len(found), rows, mine, result))
            else:
                found.append(_open(pool, len(found), rows, result))
    return found


def _open(pool: PoolResult, number: int, rows: Ints, result: EngineResult) -> ReplicaRun:
    """A replica whose requests came when they came; in order of arrival there, which a link may have changed."""
    order = np.argsort(result.arrival_s, kind="stable")
    result = replace(result, **{name: getattr(result, name)[order] for name in ROW_COLUMNS})
    requests = replace(pool.requests, arrival_s=np.zeros(len(pool.requests))).take(rows[order])
    requests = replace(requests, arrival_s=_before_steps_end(result))
    return ReplicaRun(pool.pool, number, rows[order], requests, result)


def _before_steps_end(result: EngineResult) -> NDArray[np.float64]:
    """Arrivals; of those who were sent when an answer of the same replica came, a trifle earlier."""
    arrival_s = result.arrival_s.copy()
    tied = np.isin(arrival_s, result.finish_s[result.status == FINISHED])
    arrival_s[tied] *= 1 - _EARLIER
    return np.asarray(np.maximum.accumulate(arrival_s)) if len(arrival_s) else arrival_s


def stops_of(replicas: Sequence[ReplicaRun], request: int) -> list[tuple[ReplicaRun, int]]:
    """Replicas that a request came to, in order, and its row there."""
    return [(one, row) for one in replicas if (row := one.row_of(request)) >= 0]


def logs_of(
    replicas: Sequence[ReplicaRun], start_s: float, end_s: float, *, max_steps: int = MAX_STEPS
) -> list[EventLog]:
    """Logs of a stretch of every replica's run, at most ``max_steps`` steps together."""
    each = max(max_steps // len(replicas), 1)
    return [one.log(start_s, end_s, max_steps=each) for one in replicas]


@dataclass(frozen=True)
class Carried:
    """A KV cache that was sent to a replica: asked for at ``asked_s``, sent from ``sent_s`` on, there at ``there_s``."""

    request: int
    link: str
    """``store`` or ``link``."""
    target: int
    asked_s: float
    sent_s: float
    there_s: float


def carried(served: Served, name: str, request: int, asked_s: float, there_s: float) -> Carried | None:
    """A request's transfer over a fleet's ``store`` or ``link``, the instants at its ends given; None if there was none.

    A layerwise transfer may begin before it is asked for; what is told is how long the request waits (F6).
    """
    link: Link | None = getattr(served.fleet, name)
    if link is None or not served.moved[name][request]:
        return None
    ready_s = asked_s
    if link.layerwise:
        ready_s -= (1 - 1 / served.fleet.entry[0].layers) * (asked_s - float(served.scheduled_s[request]))
    sent_s = min(max(ready_s + float(served.waited_s[name][request]), asked_s), there_s)
    target = served.prefill_replica if name == "store" else served.replica
    return Carried(request, name, int(target[request]), asked_s, sent_s, there_s)


def all_carried(served: Served, replicas: Sequence[ReplicaRun], start_s: float, end_s: float) -> list[Carried]:
    """Every KV cache that was on its way in a stretch of time, by the time it was asked for."""
    n = len(served.requests)
    came = {name: np.full(n, np.nan) for name in ("store", "link")}
    left = np.full(n, np.nan)
    for one in replicas:
        came["link" if one.pool.role == "decode" else "store"][one.rows] = one.result.arrival_s
        if one.pool.role == "prefill":
            left[one.rows] = one.result.finish_s
    found: list[Carried] = []
    for name, asked in (("store", served.arrival_s), ("link", left)):
        on_its_way = (asked < end_s) & (came[name] > start_s)
        for request in np.flatnonzero(on_its_way).tolist():
            sent = carried(served, name, request, float(asked[request]), float(came[name][request]))
            found += [] if sent is None else [sent]
    return sorted(found, key=lambda sent: (sent.asked_s, sent.request))
