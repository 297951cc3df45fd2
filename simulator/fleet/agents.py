"""Agents, and users, who send their next request when an answer has come: SimPy processes around the compiled engine.

A process never looks at a replica. It sends requests off and sleeps; between two of its moments the replicas run, step by step in order
of time, until the first of them finishes something that somebody waits for.
"""

from collections.abc import Generator, Iterator
from dataclasses import replace
from heapq import heappush
from typing import Any

import numpy as np
import simpy
from numpy.typing import NDArray
from simpy.events import NORMAL

from simulator.engine import many
from simulator.engine.block_hashes import BlockHashes
from simulator.engine.one_by_one import new_replicas
from simulator.engine.records import COLUMNS, Requests
from simulator.engine.replicas import Kind
from simulator.errors import InputError
from simulator.fleet.records import Agents, Fleet, Served
from simulator.fleet.stages import Plan, StageResult, admissible, fits, goes_on, served, stages_of

Steps = Generator[simpy.Event, None, None]
_NOBODY = np.zeros(0, dtype=np.int64)


def serve_agents(fleet: Fleet, requests: Requests, agents: Agents, *, seed: int = 1) -> Served:
    """Let agents work through their tasks; task after task goes to whichever agent is free.

    Parameters
    ----------
    requests
        of all tasks, in order; ``arrival_s`` is not read.
    seed
        of the routers that choose at random. A hash router keeps the requests of a task together, unless they have tenants.

    Raises
    ------
    InputError
        If clients would leave, a router looks at what it cannot see, or steps take no time.
    """
    if requests.clients_may_leave:
        raise InputError("clients: agents wait; leave timeouts and cancellations out, or state agents.deadline_s")
    task = np.repeat(np.arange(len(agents.turns)), agents.turns)
    requests = replace(
        requests,
        arrival_s=np.zeros(len(task)),
        concurrency=0,
        tenant=task if requests.tenant is None else requests.tenant,
    )
    return _Path(fleet, requests, seed).run(agents)


class _Clock(simpy.Environment):
    """An environment in which an event can happen at an exact time."""

    def happens(self, event: simpy.Event, time_s: float) -> simpy.Event:
        """Let ``event`` happen at ``time_s``: adding a delay to the present time would round."""
        event._ok, event._value = True, None  # noqa: SLF001 - as SimPy's own Timeout does it
        heappush(self._queue, (time_s, NORMAL, next(self._eid), event))
        return event


class _Path:
    """The way of requests through a fleet, for processes that wait at its end."""

    def __init__(self, fleet: Fleet, requests: Requests, seed: int) -> None:
        self._fleet, self._requests = fleet, requests
        self._n = len(requests)
        self._stages = stages_of(fleet, requests)
        self._refused = ~admissible(fleet, requests, self._stages)
        self._goes_on = goes_on(fleet, requests)
        prefixes = [stage.prefixes for stage in self._stages]
        if any(prefixes[1:]):
            raise InputError(
                "decode_router.policy = 'prefix-affinity': only the router that requests enter by goes by prefixes"
            )
        self._records = [stage.record(seed, row0=k * self._n) for k, stage in enumerate(self._stages)]
        self._replicas = new_replicas(
            [Kind(pool.cost, pool.settings, pool.replicas) for pool in fleet.pools],
            _stacked([stage.requests for stage in self._stages]),
            policies=[record.policy for record in self._records],
            links=sum(stage.n_links for stage in self._stages),
            prefixes=prefixes[0],
        )
        self._able = [
            np.concatenate([np.tile(fits(pool.settings, stage.requests), (pool.replicas, 1)) for pool in stage.pools])
            for stage in self._stages
        ]
        self._seen_after_s = [
            np.repeat([pool.settings.host.request_s for pool in stage.pools], [pool.replicas for pool in stage.pools])
            for stage in self._stages
        ]
        self._when = np.full(self._n, np.nan)
        self._since = np.full(self._n, np.nan)
        self._source = np.full(self._n, -1, dtype=np.int64)
        self._clock = _Clock()
        self._waiting: dict[int, simpy.Event] = {}
        self._sent: list[list[int]] = [[] for _ in self._stages]
        self._refused_at = np.full(self._n, np.nan)

    def run(self, agents: Agents) -> Served:
        """Start the agents and let time pass until nothing is left to happen."""
        clock, replicas = self._clock, self._replicas
        first = np.concatenate([[0], np.cumsum(agents.turns)])
        tasks = iter(range(len(agents.turns)))
        for _ in range(min(agents.count, len(agents.turns))):
            clock.process(self._work(agents, tasks, first))
        while True:
            done = self._run_replicas()
            finish = replicas.finish_s
            for row in done[np.lexsort((done, finish[done]))]:
                clock.happens(self._waiting.pop(int(row)), float(finish[row]))
            now = clock.peek()
            if now == np.inf:
                return self._served()
            while clock.peek() == now:
                clock.step()

    def _run_replicas(self) -> NDArray[np.int64]:
        """Send off what is sent now, and let the replicas run until something happens; return the rows that finished."""
        replicas, last = self._replicas, len(self._records) - 1
        for k, record in enumerate(self._records):
            sent = self._sent[k]
            order = np.array(sent, dtype=np.int64)
            sent.clear()
            sure = bool(self._able[k][:, order].all())
            if k == last and sure:
                return replicas.advance_to_finish(
                    record, order, self._when, self._since, self._source, self._clock.peek()
                )
            if len(order):
                replicas.advance_to_finish(record, order, self._when, self._since, self._source, -np.inf)
            for request in order[~self._able[k][record.given[order], order]]:  # they are rejected as they are seen (R4)
                row = k * self._n + int(request)
                seen_s = float(record.arrive_s[request] + self._seen_after_s[k][record.given[request]])  # H2
                self._clock.happens(self._waiting.pop(row), seen_s)
                self._goes_on[request] = False
        return replicas.advance_to_finish(
            self._records[last], _NOBODY, self._when, self._since, self._source, self._clock.peek()
        )

    def _work(self, agents: Agents, tasks: Iterator[int], first: NDArray[np.int64]) -> Steps:
        """F8: one agent."""
        clock = self._clock
        for task in tasks:
            started = None
            for request in range(int(first[task]), int(first[task + 1])):
                yield clock.timeout(float(agents.think_s[request]))
                if started is None:
                    started = clock.now
                elif clock.now > started + agents.deadline_s:
                    break
                yield from self._answer(request)

    def _answer(self, request: int) -> Steps:
        """F1: one request, until its last token."""
        clock = self._clock
        if self._refused[request]:
            self._refused_at[request] = clock.now
            return
        for k, sent in enumerate(self._sent):
            row = k * self._n + request
            self._when[request] = clock.now
            self._waiting[row] = answer = clock.event()
            sent.append(request)
            yield answer
            if not self._goes_on[request]:
                return
            self._since[request] = self._replicas.scheduled_s[row]
            self._source[request] = self._records[k].first + self._records[k].given[request]

    def _served(self) -> Served:
        replicas, found = self._replicas, []
        for k, (plan, record) in enumerate(zip(self._stages, self._records, strict=True)):
            found.append(self._stage_result(plan, record, k * self._n))
        return served(self._fleet, self._requests, found, self._refused_at, replicas.links.sums, None)

    def _stage_result(self, plan: Plan, record: many.Stage, row0: int) -> StageResult:
        sent = np.flatnonzero(~np.isnan(record.sent_s))
        given = record.given[sent]
        rows = [sent[given == r] for r in range(plan.replicas)]
        results = [self._replicas.result(plan.first + r, row0 + mine) for r, mine in enumerate(rows)]
        return StageResult(plan, record, rows, results)


def _stacked(parts: list[Requests]) -> Requests:
    """Requests of all stages in one."""
    if len(parts) == 1:
        return parts[0]
    columns: dict[str, Any] = {}
    for name in COLUMNS:
        values = [getattr(part, name) for part in parts]
        if all(value is not None for value in values):
            columns[name] = np.concatenate(values)
    hashes = [part.hashes for part in parts if part.hashes is not None]
    return Requests(**columns, hashes=BlockHashes.stacked(hashes) if len(hashes) == len(parts) else None)
