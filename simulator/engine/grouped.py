"""Replicas of several parts, seen from Python: attention ranks in lock-step, by the compiled engine.

The rules are in ``docs/engine-ranks.md``, the algorithm in :mod:`simulator.engine.ranks`.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulator.engine import ranks, skip_ahead
from simulator.engine.compiled import Engine
from simulator.engine.records import EngineResult, EngineSettings, Requests, of_the_whole
from simulator.errors import InputError
from simulator.roofline.step_cost import StepCost

#: Fields of a state that are one for all its parts.
_ONE = ("pending_time", "pending_row", "timeline", "bits_f", "bits_i")


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
        refuse_features(settings, "several ranks, or uneven experts")
        if settings.expert_skew.on and not len(cost.expert_s):
            raise InputError(
                f"engine.expert_skew.mean = {settings.expert_skew.mean}: the model has no routed experts, or its table does "
                "not say their time (StepCost.expert_s)"
            )
        super().__init__(cost, settings, requests, timeline_interval_s=timeline_interval_s)
        self._ranks = cost.ranks
        self._least_loaded = settings.rank_routing == "least-loaded"
        self._states = stacked(self._state, cost.ranks + 1)
        self._state = part(self._states, cost.ranks)
        self._board = ranks.Board(
            np.zeros((cost.ranks, ranks.N_SCHEDULED), dtype=np.int64),
            np.zeros((cost.ranks, ranks.N_PRICES)),
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


def refuse_features(settings: EngineSettings, what: str) -> None:
    """Refuse settings that replicas of several parts do not follow.

    Raises
    ------
    InputError
        Naming the setting.
    """
    if settings.prefix_cache != "off":
        raise InputError(f"engine.prefix_cache = {settings.prefix_cache!r}: not together with {what}; use 'off'")


def stacked(state: skip_ahead.State, parts: int) -> skip_ahead.State:
    """As many states in one set of arrays; what is one for all is not copied."""

    def stack(name: str, array: NDArray[Any]) -> NDArray[Any]:
        if name in _ONE:
            return array
        if not array.any():  # of zeros the system gives memory only where it is used
            return np.zeros((parts, *array.shape), dtype=array.dtype)
        return np.stack([array] * parts)

    return skip_ahead.State(*(stack(name, array) for name, array in zip(state._fields, state, strict=True)))


def part(states: skip_ahead.State, g: int) -> skip_ahead.State:
    """View of one of the stacked states."""
    fields = zip(states._fields, states, strict=True)
    return skip_ahead.State(*(array if name in _ONE else array[g] for name, array in fields))


def merged(states: skip_ahead.State) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Counts and times of all parts together; clock and interval are those of the last, which is the replica's own."""
    ints, floats = states.ints.sum(axis=0), states.floats.sum(axis=0)
    for name in (skip_ahead.CLOCK, skip_ahead.INTERVAL, skip_ahead.LAST_START):
        floats[name] = states.floats[-1, name]
    floats[skip_ahead.ITL_MAX] = states.floats[:, skip_ahead.ITL_MAX].max()
    for name in (skip_ahead.STEPS, skip_ahead.SEGMENTS, skip_ahead.MAX_RUNNING, skip_ahead.MAX_WAITING, skip_ahead.MAX_BLOCKS):
        ints[name] = states.ints[-1, name]
    return ints, floats
