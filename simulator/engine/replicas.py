"""Many replicas, seen from Python: sent requests while they run, looked at, advanced together.

The algorithm is in :mod:`simulator.engine.many`. Only plain replicas: the others are advanced by :mod:`simulator.engine.one_by_one`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from simulator.engine import core, many
from simulator.engine.block_hashes import BlockHashes
from simulator.engine.records import NOT_ARRIVED, EngineResult, EngineSettings, Requests, needs_queue
from simulator.engine.single import Engine
from simulator.errors import InputError
from simulator.roofline.pipeline_cost import PipelineCost
from simulator.roofline.step_cost import StepCost

FIRST_ROOM = 64
"""Requests that a replica's queue and inbox have room for at first; they grow when they must."""

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Kind:
    """``count`` equal replicas."""

    cost: StepCost | PipelineCost
    settings: EngineSettings
    count: int


class _Replica(Engine):
    """An engine whose parts may be taken out, and replaced by views of what it shares with others."""

    @property
    def parts(self) -> "_Parts":
        return _Parts(self._settings, self._cost, self._limits, self._out, self._state)

    def sharing(self, stream: core.Stream, out: core.Outcome, state: core.State) -> "_Replica":
        """The same engine, on these arrays."""
        found = _Replica.__new__(_Replica)
        found.__dict__.update(self.__dict__)
        found._stream, found._out, found._state = stream, out, state  # noqa: SLF001 - of its own class
        return found


class _Parts(NamedTuple):
    settings: EngineSettings
    cost: core.CostTable
    limits: core.Limits
    out: core.Outcome
    state: core.State


class Replicas:
    """All replicas of a fleet, in the order of ``kinds``.

    Parameters
    ----------
    requests
        all that may ever be sent to any of them. When is up to :meth:`serve` and :meth:`advance_to_finish`.
    links
        number of links between them.
    prefixes
        which prompts start alike, for a router that goes by it; None: no router does.
    last_arrival_s
        about when the last request is sent: sets the length of the timeline's intervals, as in :class:`Engine`. [s]

    Raises
    ------
    InputError
        If a kind has settings that a replica which is looked at while it runs does not follow.
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
        self.kind_of = np.repeat(np.arange(len(kinds)), [kind.count for kind in kinds])
        engines = [_engine(kind, requests, last_arrival_s) for kind in kinds]
        self._like = engines
        stream = core.Stream(
            arrival=np.zeros(n),
            prompt=np.ascontiguousarray(requests.prompt_tokens, dtype=np.int64),
            output=np.ascontiguousarray(requests.output_tokens, dtype=np.int64),
            cached=np.ascontiguousarray(requests.cached_tokens, dtype=np.int64),
            max_tokens=np.ascontiguousarray(requests.max_tokens, dtype=np.int64),
            concurrency=1,  # a closed loop: requests come by the inbox
        )
        out = _outcome_columns(engines, self.kind_of, n)
        board = many.Board(
            np.full(len(self.kind_of), np.inf),
            np.zeros(len(self.kind_of)),
            np.zeros((len(self.kind_of), many.N_BOARD_INTS), dtype=np.int64),
        )
        board.ints[:, many.KIND] = self.kind_of
        board.ints[:, many.BLOCKS] = [engines[kind].parts.settings.num_kv_blocks for kind in self.kind_of]
        self.many = many.Many(
            _stacked_kinds(engines),
            stream,
            out,
            _stacked_states(engines, self.kind_of, n),
            board,
            many.new_links(links),
            many.new_prefixes(prefixes),
        )
        self._finished = np.zeros(self.max_running, dtype=np.int64)

    def advance(self, stage: many.Stage, until_s: float = math.inf) -> None:
        """Run the steps of a stage's replicas that start before ``until_s``."""
        self._run(stage, many.RANGE, _NOBODY, _NEVER, _NEVER, _NOBODY, 0, until_s)

    def advance_to_finish(
        self, stage: many.Stage, order: Ints, when_s: Floats, since_s: Floats, source: Ints, until_s: float
    ) -> Ints:
        """Send requests ``order`` off, which come now, and run steps, in order of time, until something finishes or ``until_s``.

        Return the rows of the requests that finished: some, if a step that started before ``until_s`` ended with one. All of them
        have ``finish_s``, which may be later than ``until_s``; no step that starts at or after the earliest has been run.
        """
        place = 0
        while True:
            found = self._run(stage, many.FINISH, order, when_s, since_s, source, place, until_s)
            if found >= 0:
                return self._finished[:found]
            place = -1 - found
            self._grow()

    @property
    def max_running(self) -> int:
        """Requests that can run at a time."""
        return int(self.many.kinds.ints[self.kind_of, many.MAX_SEQS].sum())

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
        """Send requests ``order[first:]`` off, each at its time in ``when_s``, as far as that is before ``until_s``.

        Return the place of the next one.
        """
        place = first
        while True:
            place = self._run(stage, many.SERVE, order, when_s, since_s, source, place, until_s)
            if place == len(order) or when_s[order[place]] >= until_s:
                return place
            self._grow()

    def _run(
        self,
        stage: many.Stage,
        mode: int,
        order: Ints,
        when_s: Floats,
        since_s: Floats,
        source: Ints,
        place: int,
        until_s: float,
    ) -> int:
        return int(
            many.run(self.many, stage, mode, order, when_s, since_s, source, place, float(until_s), self._finished)
        )

    @property
    def finish_s(self) -> Floats:
        """[n] when each request finished. [s]"""
        return np.asarray(self.many.out.finish)

    @property
    def scheduled_s(self) -> Floats:
        """[n] when each request's first step started. [s]"""
        return np.asarray(self.many.out.scheduled)

    def itl_counts(self) -> Ints:
        """Inter-token latencies so far, all replicas."""
        return np.asarray(self.many.out.itl.sum(axis=0))

    @property
    def links(self) -> many.Links:
        """What carries KV caches to and between them; may be replaced by what other stages send over too."""
        return self.many.links

    @links.setter
    def links(self, links: many.Links) -> None:
        self.many = self.many._replace(links=links)

    def result(self, replica: int, rows: Ints) -> EngineResult:
        """What a replica has done; per-request columns are those of ``rows``, all its requests among them."""
        out = self.many.out
        columns = {name: getattr(out, name)[rows] for name in _COLUMNS}
        like = self._like[self.kind_of[replica]]
        # The common arrays are as long as the longest kind's.
        counts = {name: getattr(out, name)[replica, : len(getattr(like.parts.out, name))].copy() for name in _COUNTS}
        stream = self.many.stream
        cut = {name: getattr(stream, name)[rows] for name in core.Stream._fields if name != "concurrency"}
        mine = core.Stream(**cut, concurrency=stream.concurrency)
        view = like.sharing(mine, core.Outcome(**columns, **counts), self._state(replica))
        found: EngineResult = view.result()
        return found

    def _state(self, r: int) -> core.State:
        return core.State(*(array[r] for array in self.many.states))

    def _grow(self) -> None:
        """Double the queues and inboxes."""
        states = self.many.states
        longer = {
            name: np.concatenate([array, np.zeros_like(array)], axis=1)
            for name in ("fifo", "pending_time", "pending_row")
            for array in [getattr(states, name)]
        }
        self.many = self.many._replace(states=states._replace(**longer))


_NOBODY, _NEVER = np.zeros(0, dtype=np.int64), np.zeros(0)

#: Fields of an outcome: one value per request, and counts of a replica.
_COUNTS = ("steps_by_tokens", "steps_by_rows", "itl")
_COLUMNS = tuple(name for name in core.Outcome._fields if name not in _COUNTS)


def why_not_plain(kind: Kind, requests: Requests) -> str:
    """What a kind of replica has that :class:`Replicas` do not follow, in words; empty if nothing."""
    settings = kind.settings
    if isinstance(kind.cost, PipelineCost) or kind.cost.ranks > 1 or settings.expert_skew.on:
        return "several ranks or stages, or uneven experts"
    if needs_queue(settings, clients_leave=requests.clients_may_leave):
        return "a policy, batching mode, host that costs time, or clients that leave"
    if settings.prefix_cache != "off" or settings.swap is not None or settings.speculation is not None:
        return "a prefix cache, swap or speculation"
    return ""


def _engine(kind: Kind, requests: Requests, last_arrival_s: float) -> _Replica:
    """A replica that all others of its kind are like; it holds no request."""
    what = why_not_plain(kind, requests)
    if what or isinstance(kind.cost, PipelineCost):
        raise InputError(f"replicas advanced together: plain ones, not with {what}")
    few = replace(requests.take(slice(0, 0)), concurrency=0)
    interval_s = max(last_arrival_s / 512, 64 * float(kind.cost.dense_s[1]))
    return _Replica(kind.cost, kind.settings, few, timeline_interval_s=interval_s)


def _stacked(arrays: Sequence[NDArray[Any]], fill: float = 0) -> NDArray[Any]:
    """Arrays of one dtype and number of dimensions in one, each filled up to the largest."""
    shape = np.max([array.shape for array in arrays], axis=0)
    found = np.full((len(arrays), *shape), fill, dtype=arrays[0].dtype)
    for row, array in zip(found, arrays, strict=True):
        row[tuple(map(slice, array.shape))] = array
    return found


def _stacked_kinds(engines: Sequence[_Replica]) -> many.Kinds:
    costs = [engine.parts.cost for engine in engines]
    limits = [engine.parts.limits for engine in engines]
    ints = np.zeros((len(engines), many.N_KIND_INTS), dtype=np.int64)
    floats = np.zeros((len(engines), many.N_KIND_FLOATS))
    for row, cost, limit in zip(ints, costs, limits, strict=True):
        row[many.N_DENSE] = len(cost.dense)
        row[many.N_KNOTS], row[many.N_PLANES] = len(cost.knots), len(cost.planes)
        row[many.WINDOW], row[many.WINDOW_CHUNKED] = cost.window, cost.window_chunked
        row[many.MAX_SEQS : many.WINDOWED_MOST + 1] = limit
    floats[:, many.SEQ] = [cost.seq for cost in costs]
    floats[:, many.WINDOW_SLOPE] = [cost.window_slope for cost in costs]
    tables = {name: _stacked([getattr(cost, name) for cost in costs]) for name in many.Kinds._fields[:6]}
    return many.Kinds(**tables, floats=floats, ints=ints)


def _stacked_states(engines: Sequence[_Replica], kind_of: Ints, n: int) -> core.State:
    states = [engine.parts.state for engine in engines]
    replicas = len(kind_of)
    arrays: dict[str, NDArray[Any]] = {}
    for name in core.State._fields:
        if name in {"fifo", "pending_time", "pending_row"}:
            arrays[name] = np.zeros((replicas, FIRST_ROOM), dtype=getattr(states[0], name).dtype)
            continue
        common = _stacked([getattr(state, name) for state in states])
        if common.any():
            arrays[name] = common[kind_of]
        else:  # of zeros the system gives memory only where it is used
            arrays[name] = np.zeros((replicas, *common.shape[1:]), dtype=common.dtype)
    arrays["row"][:] = -1  # nobody has had a slot yet
    for r, kind in enumerate(kind_of):  # slots that smaller replicas do not have are never in use
        beyond = engines[kind].parts.settings.max_num_seqs
        arrays["slots"][r, beyond:, [core.FINISH_STEP, core.EVENT_STEP]] = -1
    arrays["bits_i"] = arrays["bits_f"].view(np.int64)  # the same bits
    arrays["ints"][:, core.NEXT_ROW] = n  # nobody is released
    return core.State(**arrays)


def _outcome_columns(engines: Sequence[_Replica], kind_of: Ints, n: int) -> core.Outcome:
    outs = [engine.parts.out for engine in engines]
    counts = {
        name: np.zeros((len(kind_of), max(len(getattr(out, name)) for out in outs)), dtype=np.int64) for name in _COUNTS
    }
    columns: dict[str, NDArray[Any]] = {
        name: np.full(n, np.nan) for name in ("arrival", "scheduled", "first_token", "finish")
    }
    columns |= {name: np.zeros(n) for name in ("busy", "busy_prefill", "busy_cached", "recompute")}
    columns["preemptions"] = np.zeros(n, dtype=np.int32)
    columns["status"] = np.full(n, NOT_ARRIVED, dtype=np.int8)
    return core.Outcome(**columns, **counts)
