"""Replicas of any kind, sent requests while they run: each is an engine of its own, advanced by a call of its own.

What :mod:`simulator.engine.many` does for plain replicas in one call, this does for those with caches, policies, hosts, clients that leave, ranks
or stages: some 20 µs for each replica with work and each arrival. An engine gets its requests through the heap that a closed loop
keeps its clients in (R3), whose clients here send nothing by themselves.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from simulator.engine import core, many
from simulator.engine.block_hashes import BlockHashes
from simulator.engine.compiled import Engine, new_engine
from simulator.engine.heaps import push_arrival
from simulator.engine.records import FINISHED, ITL_BINS, NOT_ARRIVED, RUNNING, WAITING, EngineResult, Requests
from simulator.engine.replicas import Kind
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


class OneByOne:
    """Replicas, in the order of ``kinds``, and a router's look at them.

    Parameters
    ----------
    requests, prefixes, last_arrival_s
        as for :class:`simulator.engine.replicas.Replicas`.

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
        prefixes: BlockHashes | None = None,
        last_arrival_s: float = 0.0,
    ) -> None:
        self._requests = requests
        self._kinds = [kind for kind in kinds for _ in range(kind.count)]
        self._engines = [_engine(kind, requests, last_arrival_s) for kind in self._kinds]
        self._live: list[list[int]] = [[] for _ in self._engines]
        n = len(self._engines)
        self._board = many.Board(np.full(n, np.inf), np.zeros(n), np.zeros((n, many.N_BOARD_INTS), dtype=np.int64))
        self._prefixes = many.new_prefixes(prefixes)

    def serve(
        self,
        stage: many.Stage,
        links: many.Links,
        order: Ints,
        when_s: Floats,
        since_s: Floats,
        source: Ints,
        until_s: float,
        first: int,
    ) -> int:
        """Send requests ``order[first:]`` off, as :meth:`simulator.engine.replicas.Replicas.serve` does, then run until ``until_s``."""
        place = first
        while place < len(order) and when_s[order[place]] < until_s:
            request = int(order[place])
            now = float(when_s[request])
            for r in range(len(self._engines)):
                self._look(r, now, by_kv=stage.policy == many.LEAST_KV)
            r = int(many.choose(self._board, self._prefixes, stage, request, now))
            stage.given[request] = r
            many.transfer_in_order(links, stage, order[place : place + 1], when_s, since_s, source)
            self._send(r, request, float(stage.arrive_s[request]))
            place += 1
        for r, live in enumerate(self._live):
            if live:
                self._engines[r].advance(until_s)
        return place

    def _send(self, r: int, row: int, time_s: float) -> None:
        state = self._engines[r]._state  # noqa: SLF001 - of this room
        size = state.ints[core.N_PENDING]
        state.ints[core.N_PENDING] = push_arrival(state.pending_time, state.pending_row, size, time_s, row)
        self._live[r].append(row)

    def _look(self, r: int, now_s: float, *, by_kv: bool) -> None:
        """Run a replica up to ``now_s`` and bring its entry of the board up to date."""
        engine, mine = self._engines[r], self._board.ints[r]
        live = np.array(self._live[r], dtype=np.int64)
        if len(live):
            engine.advance(now_s)
            out = engine._out  # noqa: SLF001 - of this room
            status = out.status[live]
            here = np.isin(status, (NOT_ARRIVED, WAITING, RUNNING)) | (
                (status == FINISHED) & (out.finish[live] > now_s)
            )
            live = live[here]
            self._live[r] = live.tolist()
        mine[many.REQUESTS] = len(live)
        if not by_kv:
            return
        state, size = engine._state, self._kinds[r].settings.block_size  # noqa: SLF001 - of this room
        mine[many.BLOCKS] = self._kinds[r].settings.num_kv_blocks
        mine[many.OWNED] = mine[many.BLOCKS] - state.ints[core.FREE_BLOCKS]
        waiting = live[np.isnan(engine._out.scheduled[live])]  # noqa: SLF001
        mine[many.PROMISED] = int((-(-self._requests.prompt_tokens[waiting] // size)).sum())

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


def demand_kv_looks(kinds: Sequence[Kind]) -> None:
    """Refuse to look at the KV caches of replicas of several parts, each of which has its own.

    Raises
    ------
    InputError
        As said.
    """
    for kind in kinds:
        if isinstance(kind.cost, PipelineCost) or kind.cost.ranks > 1:
            raise InputError(
                "router.policy = 'least-kv': replicas of several ranks or stages have several KV caches; choose least-requests or "
                "power-of-two"
            )


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
