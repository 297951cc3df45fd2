"""Replicas of several parts, seen from Python: attention ranks in lock-step, and pipeline stages, by the compiled engine.

The rules are in ``docs/engine-ranks.md``, the algorithms in :mod:`simulator.engine.ranks` and :mod:`simulator.engine.stages`.
"""

import math
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulator.engine import core, parts, ranks, stages
from simulator.engine.compiled import Engine
from simulator.engine.records import EngineResult, EngineSettings, Requests, needs_queue, of_the_whole
from simulator.errors import InputError
from simulator.roofline.pipeline_cost import PipelineCost
from simulator.roofline.step_cost import StepCost

#: Fields of a state that are one for all ranks.
_ONE = ("pending_time", "pending_row", "timeline", "bits_f", "bits_i")

#: Fields of a state that each micro-batch has for itself.
_OF_GROUP = ("ints", "floats", "heap", "residues", "events", "chunk_slot", "chunk_size", "chunk_start")


class RankEngine(Engine):
    """One replica whose ``cost.ranks`` ranks step together, or whose experts are uneven.

    Raises
    ------
    InputError
        As :class:`~simulator.engine.compiled.Engine`; if the settings ask for what ranks cannot do, or for uneven experts
        of a table without any.
    """

    def __init__(
        self, cost: StepCost, settings: EngineSettings, requests: Requests, *, timeline_interval_s: float | None = None
    ) -> None:
        refuse_features(settings, requests, "several ranks, or uneven experts")
        check_experts(cost, settings)
        super().__init__(replace(cost, ranks=1), settings, requests, timeline_interval_s=timeline_interval_s)
        self._ranks = cost.ranks
        self._least_loaded = settings.rank_routing == "least-loaded"
        one_each = [name for name in self._state._fields if name not in _ONE]
        self._states = stacked(self._state, cost.ranks + 1, one_each)
        self._state = part(self._states, cost.ranks, one_each)
        self._board = ranks.Board(
            np.zeros((cost.ranks, ranks.N_SCHEDULED), dtype=np.int64),
            np.zeros((cost.ranks, parts.N_PRICES)),
            np.zeros(ranks.N_BOARD_FLOATS),
            np.zeros(1, dtype=np.int64),
        )
        self._experts = ranks.Experts(np.ascontiguousarray(cost.expert_s), settings.expert_skew.excess())

    def advance(self, until_s: float = math.inf) -> None:
        """Run every step that starts before ``until_s``."""
        self.done = bool(
            ranks.advance_ranks(
                self._cost,
                self._experts,
                self._limits,
                self._stream,
                self._out,
                self._states,
                self._board,
                self._least_loaded,
                float(until_s),
            )
        )

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

    def __init__(
        self,
        cost: PipelineCost,
        settings: EngineSettings,
        requests: Requests,
        *,
        timeline_interval_s: float | None = None,
    ) -> None:
        refuse_features(settings, requests, "pipeline stages")
        check_experts(cost.total, settings)
        super().__init__(replace(cost.total, stages=1), settings, requests, timeline_interval_s=timeline_interval_s)
        n = self._stages = len(cost.stages)
        self._states = stacked(self._state, n + 1, _OF_GROUP)
        first_steps = np.arange(n + 1) << stages.GROUP_BITS
        for name in (core.STEP, core.STEP_ORIGIN):
            self._states.ints[:, name] = first_steps
        self._state = part(self._states, n, _OF_GROUP)
        self._flight = stages.Flight(
            done=np.full(n, np.inf),
            last=np.zeros(n),
            chunks=np.zeros(n, dtype=np.int64),
            free=np.zeros(n),
            held=np.zeros(settings.max_num_seqs, dtype=np.int64),
            prices=np.zeros((n, parts.N_PRICES)),
            floats=np.zeros(stages.N_FLIGHT_FLOATS),
        )
        self._table = stage_table(cost, settings)

    def advance(self, until_s: float = math.inf) -> None:
        """Let everything before ``until_s`` happen."""
        self.done = bool(
            stages.advance_stages(
                self._cost,
                self._table,
                self._limits,
                self._stream,
                self._out,
                self._states,
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
        found.totals["imbalance_s"] = float(self._flight.floats[stages.IMBALANCE])
        idle_s = found.end_s - float(self._flight.floats[stages.WORK]) / self._stages
        return replace(of_the_whole(found, self._stages), idle_s=idle_s)


def stage_table(cost: PipelineCost, settings: EngineSettings) -> stages.StageTable:
    """Arrays of a pipeline's tables, over the knots of their sum."""
    knots = cost.total.decode_knots
    pieces = [np.searchsorted(stage.decode_knots, knots, side="right") - 1 for stage in cost.stages]
    planes = np.zeros((len(cost.stages), max(len(stage.prefill_planes) for stage in cost.stages), 5))
    for j, stage in enumerate(cost.stages):
        planes[j, : len(stage.prefill_planes)] = stage.prefill_planes
    none = np.zeros(cost.total.max_tokens + 1)
    both = list(zip(cost.stages, pieces, strict=True))
    return stages.StageTable(
        dense=np.stack([stage.dense_s for stage in cost.stages]),
        head=np.stack([stage.head_s for stage in cost.stages]),
        knots=np.ascontiguousarray(knots),
        value=np.array([[stage.decode_attention_s(S) for S in knots] for stage in cost.stages]),
        slope=np.stack([stage.decode_slope_s[j] for stage, j in both]),
        seq=np.array([stage.decode_seq_s for stage in cost.stages]),
        planes=planes,
        window_slope=np.array([stage.window_slope_s for stage in cost.stages]),
        experts=np.stack([stage.expert_s if len(stage.expert_s) else none for stage in cost.stages]),
        excess=settings.expert_skew.excess(),
        send=np.ascontiguousarray(cost.send_s),
    )


def refuse_features(settings: EngineSettings, requests: Requests, what: str) -> None:
    """Refuse settings that replicas of several parts do not follow.

    Raises
    ------
    InputError
        Naming the setting.
    """
    if settings.prefix_cache != "off":
        raise InputError(f"engine.prefix_cache = {settings.prefix_cache!r}: not together with {what}; use 'off'")
    if settings.swap is not None or settings.tiers:
        raise InputError(f"engine.preemption = 'swap' and engine.cache_tiers: not together with {what}")
    if settings.speculation is not None:
        raise InputError(f"engine.speculation: not together with {what}")
    if needs_queue(settings, clients_leave=requests.clients_may_leave):
        raise InputError(
            f"{what}: only with engine.policy and batching at their defaults, long_prefill_token_threshold and watermark 0, a "
            f"host that costs nothing, and clients that do not leave; here {settings.scheduling}, {settings.host}, "
            f"clients_may_leave={requests.clients_may_leave}"
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


def stacked(state: core.State, parts: int, names: Collection[str]) -> core.State:
    """As many states in one set of arrays; only the fields ``names`` are there for each."""

    def stack(name: str, array: NDArray[Any]) -> NDArray[Any]:
        if name not in names:
            return array
        if not array.any():  # of zeros the system gives memory only where it is used
            return np.zeros((parts, *array.shape), dtype=array.dtype)
        return np.stack([array] * parts)

    return core.State(*(stack(name, array) for name, array in zip(state._fields, state, strict=True)))


def part(states: core.State, g: int, names: Collection[str]) -> core.State:
    """View of one of the stacked states."""
    fields = zip(states._fields, states, strict=True)
    return core.State(*(array[g] if name in names else array for name, array in fields))


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
