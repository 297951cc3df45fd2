"""Replicas of any kind, sent requests while they run: each is an engine of its own, advanced by a call of its own.

What :mod:`simulator.engine.many` does for plain replicas in one call, this does for those with caches, policies, hosts, clients that leave, ranks
or stages: some 20 µs for each replica with work and each arrival. With agents, a few calls more for each finish. An engine gets its requests through the heap that a closed loop
keeps its clients in (R3), whose clients here send nothing by themselves.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from simulator.engine import core, many, queues
from simulator.engine.block_hashes import BlockHashes
from simulator.engine.compiled import new_engine
from simulator.engine.heaps import push_arrival
from simulator.engine.records import (
    FINISHED,
    ITL_BINS,
    NOT_ARRIVED,
    RUNNING,
    STATUS_NAMES,
    TIMED_OUT,
    WAITING,
    EngineResult,
    Requests,
)
from simulator.engine.replicas import Kind, Replicas, why_not_plain
from simulator.engine.single import Engine
from simulator.errors import InputError
from simulator.roofline.pipeline_cost import PipelineCost

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

#: Columns of an engine's result with one value per request.
ROW_COLUMNS = (
    "status",
    "arrival_s",
    "scheduled_s",
    "first_token_s",
    "finish_s",
    "preemptions",
    "busy_s",
    "busy_prefill_s",
    "busy_cached_s",
    "recompute_s",
    "reused_tokens",
    "attempts",
    "wasted_s",
    "swap_s",
    "load_start_s",
    "load_end_s",
)

_NOBODY = np.zeros(0, dtype=np.int64)
_IS_HERE = np.isin(np.arange(len(STATUS_NAMES)), (NOT_ARRIVED, WAITING, RUNNING))
_WAITERS = "agents, and clients who wait for a router's choice"


class OneByOne:
    """Replicas, in the order of ``kinds``, and a router's look at them: the same calls as :class:`simulator.engine.replicas.Replicas`.

    Parameters
    ----------
    requests, links, prefixes, last_arrival_s
        as there.

    Raises
    ------
    InputError
        As the engines do.
    """

    def __init__(
        self,
        kinds: Sequence[Kind],
        requests: Requests,
        *,
        links: int = 0,
        prefixes: BlockHashes | None = None,
        last_arrival_s: float = 0.0,
    ) -> None:
        n = len(requests)
        self._requests = requests
        self._kinds = [kind for kind in kinds for _ in range(kind.count)]
        self._engines = [_engine(kind, requests, last_arrival_s) for kind in self._kinds]
        self._live = [_NOBODY] * len(self._engines)
        self._news = [_NOBODY]
        self._first_news_s = np.inf
        self._board = many.Board(
            np.full(len(self._kinds), np.inf),
            np.zeros(len(self._kinds)),
            np.zeros((len(self._kinds), many.N_BOARD_INTS), dtype=np.int64),
        )
        self.links = many.new_links(links)
        self._prefixes = many.new_prefixes(prefixes)
        self.finish_s = np.full(n, np.nan)
        """[n] when each request finished, known once :meth:`advance_to_finish` has returned its row. [s]"""
        self.scheduled_s = np.full(n, np.nan)
        """[n] likewise, when its first step started. [s]"""
        # The soonest that something can finish, by replica: tokens that are left, since when, passes made, and the least time of one.
        self._left, self._there_s = requests.output_tokens.copy(), np.zeros(n)
        self._reached_s = np.full(len(self._kinds), -np.inf)
        self._passes = np.zeros(len(self._kinds), dtype=np.int64)
        self._soonest_s = np.full(len(self._kinds), np.inf)
        self._pass_s = np.array([_least_pass_s(kind) for kind in self._kinds])

    def serve(
        self,
        stage: many.Stage,
        order: Ints,
        when_s: Floats,
        since_s: Floats,
        source: Ints,
        until_s: float,
        first: int = 0,
    ) -> int:
        """As :meth:`simulator.engine.replicas.Replicas.serve`."""
        place = first
        while place < len(order) and when_s[order[place]] < until_s:
            self._send_off(stage, order[place : place + 1], when_s, since_s, source)
            place += 1
        return place

    def advance(self, stage: many.Stage, until_s: float = math.inf) -> None:
        """Run the steps of a stage's replicas that start before ``until_s``."""
        for r in range(stage.first, stage.last):
            self._run(r, until_s)

    def advance_to_finish(
        self, stage: many.Stage, order: Ints, when_s: Floats, since_s: Floats, source: Ints, until_s: float
    ) -> Ints:
        """As :meth:`simulator.engine.replicas.Replicas.advance_to_finish`, but not step by step.

        Whichever replica may finish something soonest runs up to then: as many passes ahead as its requests have tokens to
        come, at the least time that a pass can take. So a replica is called some times for each finish, and never runs a step that
        starts after another's.

        Raises
        ------
        InputError
            If steps may take no time, or for pipeline stages: several micro-batches are under way, and whoever ends with one may
            have come back before the next is composed, at the same instant.
        """
        if any(isinstance(kind.cost, PipelineCost) for kind in self._kinds):
            raise InputError(f"{_WAITERS}: not with pipeline stages; use tensor parallelism")
        if self._pass_s.min() <= 0:
            raise InputError(f"{_WAITERS}: a step of their replicas must take time")
        for place in range(len(order)):
            self._send_off(stage, order[place : place + 1], when_s, since_s, source)
        if until_s == -math.inf:  # only sent; what a look at replicas has found is reported when time may pass
            return _NOBODY
        while True:
            r = int(np.argmin(self._soonest_s))
            target = float(self._soonest_s[r])
            if target >= min(until_s, self._first_news_s):
                found = np.concatenate(self._news)
                self._news, self._first_news_s = [_NOBODY], np.inf
                return found
            self._run(r, target)

    def _send_off(self, stage: many.Stage, one: Ints, when_s: Floats, since_s: Floats, source: Ints) -> None:
        """Send one request off, at its time in ``when_s``."""
        request = int(one[0])
        now = float(when_s[request])
        if stage.given[request] < 0:
            for r in range(stage.first, stage.last):
                self._look(r, now, by_kv=stage.policy == many.LEAST_KV)
            stage.given[request] = many.choose(self._board, self._prefixes, stage, request, now) - stage.first
        r = stage.first + int(stage.given[request])
        many.transfer_in_order(self.links, stage, one, when_s, since_s, source)
        row, there = stage.row0 + request, float(stage.arrive_s[request])
        state = self._engines[r]._state  # noqa: SLF001 - of this room
        size = state.ints[core.N_PENDING]
        state.ints[core.N_PENDING] = push_arrival(state.pending_time, state.pending_row, size, there, row)
        self._live[r] = np.append(self._live[r], row)
        self._there_s[row] = there
        self._soonest_s[r] = min(self._soonest_s[r], self._soonest(r, np.array([row]), there))

    def _soonest(self, r: int, rows: Ints, reached_s: float) -> float:
        """The least time at which one of a replica's requests can finish that has not when it has run up to ``reached_s``."""
        passes = -(-self._left[rows] // (self._kinds[r].settings.lookahead + 1))
        soonest_s = np.maximum(self._there_s[rows], reached_s) + passes * self._pass_s[r]
        return float(soonest_s.min(initial=np.inf))

    def _run(self, r: int, until_s: float) -> None:
        """Run the steps of a replica that start before ``until_s``, and note what finished."""
        engine, live = self._engines[r], self._live[r]
        if not len(live) or until_s <= self._reached_s[r]:
            return
        self._reached_s[r] = until_s
        engine.advance(until_s, until_s)
        out = engine._out  # noqa: SLF001 - of this room
        status = out.status[live]
        here = _IS_HERE[status]
        if engine._queue is not None:  # noqa: SLF001 - who has given up may try again
            attempts = engine._queue.row_ints[live, queues.ATTEMPTS]  # noqa: SLF001
            here |= (status == TIMED_OUT) & (attempts < self._kinds[r].settings.retries.max_attempts)
        done: Ints = live[status == FINISHED]
        if len(done):
            self.finish_s[done] = out.finish[done] + self._kinds[r].settings.host.output_s  # H3
            self.scheduled_s[done] = out.scheduled[done]
            first_s = float(self.finish_s[done].min())
            if first_s < self._soonest_s[r]:  # cannot be: then others may have run too far
                raise AssertionError(f"replica {r}: something finished at {first_s} s, before {self._soonest_s[r]} s")
            self._news.append(done)
            self._first_news_s = min(self._first_news_s, first_s)
        self._live[r] = live = live[here]
        passes = int(engine.passes)
        emitted = (passes - self._passes[r]) * (self._kinds[r].settings.lookahead + 1)
        self._passes[r] = passes
        begun = live[~np.isnan(out.first_token[live])]
        self._left[begun] = np.maximum(1, self._left[begun] - emitted)
        self._soonest_s[r] = self._soonest(r, live, until_s)

    def _look(self, r: int, now_s: float, *, by_kv: bool) -> None:
        """Run a replica up to ``now_s`` and bring its entry of the board up to date."""
        engine, mine = self._engines[r], self._board.ints[r]
        self._run(r, now_s)
        live, out = self._live[r], engine._out  # noqa: SLF001 - of this room
        # A router sees the moment of the arrival: who is gone with the end of the step under way is still there.
        in_step = engine.clock_s > now_s
        present = core.RAN if in_step else core.N_RUNNING
        parts = [state.ints for state, _, _ in engine._parts()]  # noqa: SLF001
        on_their_way = int((out.status[live] == NOT_ARRIVED).sum())
        here = sum(int(ints[present] + ints[core.N_LOADING]) for ints in parts)
        mine[many.REQUESTS] = on_their_way + engine.n_waiting + here
        if not by_kv:
            return
        state, settings = engine._state, self._kinds[r].settings  # noqa: SLF001 - of this room
        mine[many.BLOCKS] = settings.num_kv_blocks
        mine[many.OWNED] = state.ints[core.OWNED] if in_step else mine[many.BLOCKS] - state.ints[core.FREE_BLOCKS]
        waiting = live[np.isnan(out.scheduled[live])]
        blocks = settings.kv_groups.blocks(self._requests.prompt_tokens[waiting], settings.block_size)
        mine[many.PROMISED] = int(blocks.sum())

    def itl_counts(self) -> Ints:
        """Inter-token latencies so far, all replicas; tokens that come with others of their pass are in bin 0."""
        counts = np.zeros(ITL_BINS, dtype=np.int64)
        for engine in self._engines:
            counts += engine._out.itl  # noqa: SLF001 - of this room
            counts[0] += engine._extra_tokens()  # noqa: SLF001
        return counts

    def result(self, replica: int, rows: Ints) -> EngineResult:
        """What a replica has done; per-request columns are those of ``rows``, all its requests among them."""
        found = self._engines[replica].result()
        columns = {name: getattr(found, name)[rows] for name in ROW_COLUMNS}
        speculation = found.speculation
        if speculation is not None:
            speculation = replace(speculation, wasted_s=speculation.wasted_s[rows])
        return replace(found, **columns, speculation=speculation)


def new_replicas(
    kinds: Sequence[Kind],
    requests: Requests,
    *,
    policies: Iterable[int],
    links: int = 0,
    prefixes: BlockHashes | None = None,
    last_arrival_s: float = 0.0,
) -> Replicas | OneByOne:
    """All replicas of a fleet, advanced together where all are plain ones.

    Parameters
    ----------
    policies
        how routers choose between them.
    requests, links, prefixes, last_arrival_s
        as for :class:`simulator.engine.replicas.Replicas`.

    Raises
    ------
    InputError
        If a router looks at the KV caches of replicas of several parts, each of which has its own; or as the engines do.
    """
    if not any(why_not_plain(kind, requests) for kind in kinds):
        return Replicas(kinds, requests, links=links, prefixes=prefixes, last_arrival_s=last_arrival_s)
    if many.LEAST_KV in policies and any(isinstance(kind.cost, PipelineCost) or kind.cost.ranks > 1 for kind in kinds):
        raise InputError(
            "router.policy = 'least-kv': replicas of several ranks or stages have several KV caches; choose least-requests or "
            "power-of-two"
        )
    return OneByOne(kinds, requests, links=links, prefixes=prefixes, last_arrival_s=last_arrival_s)


def _least_pass_s(kind: Kind) -> float:
    """What a pass of a replica takes at least, rounding of sums of them aside; 0 for stages, where passes overlap. [s]"""
    if isinstance(kind.cost, PipelineCost):
        return 0.0
    return float(kind.cost.dense_s[1:].min()) * (1 - 1e-9)


def _engine(kind: Kind, requests: Requests, last_arrival_s: float) -> Engine:
    """An engine that waits for requests to be sent to it."""
    n = len(requests)
    cost = kind.cost.total if isinstance(kind.cost, PipelineCost) else kind.cost
    engine = new_engine(
        kind.cost,
        kind.settings,
        replace(requests, arrival_s=np.zeros(n), concurrency=n),
        timeline_interval_s=max(last_arrival_s / 512, 64 * float(cost.dense_s[1])),
    )
    ints = engine._state.ints  # noqa: SLF001 - of this room
    ints[core.N_PENDING] = 0
    ints[core.NEXT_ROW] = n
    return engine
