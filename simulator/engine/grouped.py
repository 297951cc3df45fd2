"""Replicas of several parts, seen from Python: attention ranks in lock-step, and pipeline stages, by the compiled engine.

The rules are in ``docs/engine-ranks.md``, the algorithms in :mod:`simulator.engine.ranks` and :mod:`simulator.engine.stages`.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from simulator.engine import block_runs, core, flight, heaps, parts, queues, ranks, speculation, stages, swap, tiers
from simulator.engine.records import EngineResult, EngineSettings, Requests, of_the_whole
from simulator.engine.refusals import check_mixture
from simulator.engine.single import Engine
from simulator.errors import InputError
from simulator.roofline.pipeline_cost import PipelineCost
from simulator.roofline.step_cost import StepCost

#: What each rank has for itself; columns of rows, and what is known of all requests, are one.
_OF_RANK: dict[type, tuple[str, ...]] = {
    core.State: tuple(
        name
        for name in core.State._fields
        if name not in {"pending_time", "pending_row", "timeline", "bits_f", "bits_i"}
    ),
    queues.Queue: ("ints", "floats", "tenants", "slots", "heap_rank", "heap_entry"),
    block_runs.Cache: ("nodes", "first", "table", "spans", "slots", "lists", "fills", "n_fills", "ints"),
    tiers.Tiers: ("rings", "counts", "times"),
    tiers.Loads: ("times", "rows", "ints"),
    swap.Swap: ("moves", "ints", "delay"),
    speculation.Batch: ("ints", "slots", "ring", "events"),
    speculation.Tariff: ("floats", "v", "passes", "keys", "chunk_steps"),
}

#: Counts and times of each rank, which are summed for a result.
_COUNTED: dict[type, tuple[str, ...]] = {
    block_runs.Cache: ("ints",),
    tiers.Tiers: ("counts",),
    tiers.Loads: ("ints",),
    swap.Swap: ("ints", "delay"),
    speculation.Batch: ("ints",),
    speculation.Tariff: ("floats", "passes", "keys", "chunk_steps"),
}

#: What each micro-batch has for itself.
_OF_GROUP: dict[type, tuple[str, ...]] = {
    core.State: ("ints", "floats", "heap", "residues", "events", "chunks"),
    block_runs.Cache: ("fills", "n_fills"),
}


class RankEngine(Engine):
    """One replica whose ``cost.ranks`` ranks step together, or whose experts are uneven.

    Raises
    ------
    InputError
        As :class:`~simulator.engine.single.Engine`; if the settings ask for what ranks cannot do, or for uneven experts
        of a table without any.
    """

    _of_parts = True

    def __init__(
        self, cost: StepCost, settings: EngineSettings, requests: Requests, *, timeline_interval_s: float | None = None
    ) -> None:
        check_mixture(cost, settings, requests)
        check_experts(cost, settings)
        super().__init__(replace(cost, ranks=1), settings, requests, timeline_interval_s=timeline_interval_s)
        self._ranks = cost.ranks
        self._least_loaded = settings.rank_routing == "least-loaded"
        self._states = stacked(self._state, cost.ranks + 1, _OF_RANK)
        self._queues = stacked(self._queue, cost.ranks + 1, _OF_RANK)
        self._extras = None if self._extra is None else stacked(self._extra, cost.ranks + 1, _OF_RANK)
        self._state = part(self._states, cost.ranks, _OF_RANK)
        self._board = ranks.new_board(cost.ranks, len(requests))
        self._experts = ranks.Experts(np.ascontiguousarray(cost.expert_s), settings.expert_skew.excess())

    def advance(self, until_s: float = math.inf, known_s: float = math.inf) -> None:
        """Run every step that starts before ``until_s``; ``known_s`` as there."""
        self.done = bool(
            ranks.advance_ranks(
                self._cost,
                self._experts,
                self._limits,
                self._stream,
                self._out,
                self._states,
                self._queues,
                self._extras,
                self._board,
                self._least_loaded,
                float(until_s),
                float(known_s),
            )
        )

    def rank_of(self, row: int) -> int:
        """The rank that a request's present attempt joined."""
        return int(self._board.rank[row])

    def _parts(self) -> Iterable[tuple[core.State, queues.Queue | None, core.Extra | None]]:
        for g in range(self._ranks):
            extra = None if self._extras is None else part(self._extras, g, _OF_RANK)
            yield part(self._states, g, _OF_RANK), part(self._queues, g, _OF_RANK), extra

    def _whole(self) -> core.Extra | None:
        if self._extras is None:
            return None
        return taken(self._extras, _COUNTED, lambda array: array[:-1].sum(axis=0))  # type: ignore[no-any-return]

    def _figures(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        return merged(self._states)

    def result(self) -> EngineResult:
        """What has happened so far; times of ranks are divided by their number."""
        found = super().result()
        found.totals["steps"] = int(found.steps_by_tokens.sum())
        found.totals["padding_s"] = float(self._board.floats[ranks.PADDING])
        found.totals["imbalance_s"] = float(self._board.floats[ranks.IMBALANCE])
        return of_the_whole(found, self._ranks)


class StageEngine(Engine):
    """One replica whose stages hold a micro-batch each.

    Raises
    ------
    InputError
        As :class:`RankEngine`.
    """

    _of_parts = True
    _in_stages = True

    def __init__(
        self,
        cost: PipelineCost,
        settings: EngineSettings,
        requests: Requests,
        *,
        timeline_interval_s: float | None = None,
    ) -> None:
        check_mixture(cost, settings, requests)
        check_experts(cost.total, settings)
        super().__init__(replace(cost.total, stages=1), settings, requests, timeline_interval_s=timeline_interval_s)
        self._stages = len(cost.stages)
        n = self._stages + 1
        self._states = stacked(self._state, n + 1, _OF_GROUP)
        self._extras = None if self._extra is None else stacked(self._extra, n, _OF_GROUP)
        first_steps = np.arange(n + 1) << heaps.GROUP_BITS
        for name in (core.STEP, core.STEP_ORIGIN):
            self._states.ints[:, name] = first_steps
        self._state = part(self._states, n, _OF_GROUP)
        self._flight = flight.Flight(
            done=np.full(n, np.inf),
            last=np.zeros(n),
            chunks=np.zeros(n, dtype=np.int64),
            free=np.zeros(self._stages),
            entered=np.zeros((n, self._stages)),
            left=np.zeros((n, self._stages)),
            group=np.full(settings.max_num_seqs, -1, dtype=np.int64),
            prices=np.zeros((n, parts.N_PRICES)),
            floats=np.zeros(flight.N_FLIGHT_FLOATS),
            passes=np.zeros((n, flight.N_PASSES), dtype=np.int64),
        )
        self._table = stage_table(cost, settings)

    def advance(self, until_s: float = math.inf, known_s: float = math.inf) -> None:
        """Let everything before ``until_s`` happen, and nothing later: whatever ``known_s``, who comes then is seated then."""
        del known_s
        self.done = bool(
            stages.advance_stages(
                self._cost,
                self._table,
                self._limits,
                self._stream,
                self._out,
                self._states,
                cast("queues.Queue", self._queue),  # there is one in every replica of parts
                self._extras,
                self._flight,
                float(until_s),
            )
        )

    def _figures(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        return merged(self._states)

    def result(self) -> EngineResult:
        """What has happened so far; times of stages are divided by their number.

        Before the end, work of micro-batches in flight is not idle time, although no request has paid for it yet.
        """
        found = super().result()
        found.totals["padding_s"] = 0.0
        found.totals["imbalance_s"] = float(self._flight.floats[flight.IMBALANCE])
        idle_s = found.end_s - float(self._flight.floats[flight.WORK]) / self._stages
        return replace(of_the_whole(found, self._stages), idle_s=idle_s)


def stage_table(cost: PipelineCost, settings: EngineSettings) -> flight.StageTable:
    """Arrays of a pipeline's tables, over the knots of their sum."""
    knots = cost.total.decode_knots
    pieces = [np.searchsorted(stage.decode_knots, knots, side="right") - 1 for stage in cost.stages]
    planes = np.zeros((len(cost.stages), max(len(stage.prefill_planes) for stage in cost.stages), 5))
    for j, stage in enumerate(cost.stages):
        planes[j, : len(stage.prefill_planes)] = stage.prefill_planes
    none = np.zeros(cost.total.max_tokens + 1)
    both = list(zip(cost.stages, pieces, strict=True))
    return flight.StageTable(
        dense=np.stack([stage.dense_s for stage in cost.stages]),
        head=np.stack([stage.head_s for stage in cost.stages]),
        knots=np.ascontiguousarray(knots),
        value=np.array([[stage.decode_attention_s(S) for S in knots] for stage in cost.stages]),
        slope=np.stack([stage.decode_slope_s[j] for stage, j in both]),
        walk=np.stack([stage.decode_walk_s for stage in cost.stages]),
        seq=np.array([stage.decode_seq_s for stage in cost.stages]),
        planes=planes,
        window_slope=np.array([stage.window_slope_s for stage in cost.stages]),
        experts=np.stack([stage.expert_s if len(stage.expert_s) else none for stage in cost.stages]),
        excess=settings.expert_skew.excess(),
        send=np.ascontiguousarray(cost.send_s),
    )


def check_experts(cost: StepCost, settings: EngineSettings) -> None:
    """Refuse uneven experts of a table without any.

    Raises
    ------
    InputError
        As said.
    """
    if settings.expert_skew.on and not len(cost.expert_s):
        raise InputError(
            f"engine.expert_skew.mean = {settings.expert_skew.mean}: the model has no routed experts, or its table does "
            "not say their time (StepCost.expert_s)"
        )


def stacked(record: Any, parts: int, own: Mapping[type, Collection[str]]) -> Any:
    """As many records in one set of arrays; only the fields that ``own`` names for a record's type are there for each."""
    fields = []
    for name, value in zip(record._fields, record, strict=True):
        if hasattr(value, "_fields"):
            fields.append(stacked(value, parts, own))
        elif name not in own.get(type(record), ()):
            fields.append(value)
        elif not value.any():  # of zeros the system gives memory only where it is used
            fields.append(np.zeros((parts, *value.shape), dtype=value.dtype))
        else:
            fields.append(np.stack([value] * parts))
    return type(record)(*fields)


def taken(record: Any, own: Mapping[type, Collection[str]], take: Callable[[NDArray[Any]], Any]) -> Any:
    """One record of the stacked ones: what ``take`` makes of each array that is there for each part."""
    fields = []
    for name, value in zip(record._fields, record, strict=True):
        if hasattr(value, "_fields"):
            fields.append(taken(value, own, take))
        else:
            fields.append(take(value) if name in own.get(type(record), ()) else value)
    return type(record)(*fields)


def part(record: Any, g: int, own: Mapping[type, Collection[str]]) -> Any:
    """View of one of the stacked records."""
    return taken(record, own, lambda array: array[g])


def merged(states: core.State) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Counts and times of all parts together; clock and interval are those of the last, which is the replica's own."""
    ints, floats = states.ints.sum(axis=0), states.floats.sum(axis=0)
    for name in (core.CLOCK, core.INTERVAL, core.LAST_START):
        floats[name] = states.floats[-1, name]
    floats[core.ITL_MAX] = states.floats[:, core.ITL_MAX].max()
    for name in (
        core.STEPS,
        core.SEGMENTS,
        core.MAX_RUNNING,
        core.MAX_WAITING,
        core.MAX_BLOCKS,
    ):
        ints[name] = states.ints[-1, name]
    return ints, floats
