"""What happened in a stretch of a run, step by step and request by request.

The compiled engine is cut at every step of the stretch (rule I9: a cut changes nothing) and looked at in between. So there is
no tracing code in the engine, a traced run is the run itself, and the price, some 0.1 ms a step, is paid only where one looks.
"""

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from simulator.engine import core
from simulator.engine.compiled import Engine
from simulator.engine.records import FINISHED, REJECTED, RUNNING
from simulator.errors import InputError

MAX_STEPS = 100_000
"""Longest stretch: a minute of Python, and as much as a trace viewer can show."""


class Phase(StrEnum):
    """What a request is doing."""

    QUEUED = "queued"
    """Not yet part of any step."""
    PREFILL = "prefill"
    DECODE = "decode"
    PREEMPTED = "preempted"
    """Waiting again, its cache lost."""
    RECOMPUTE = "recompute"
    """In prefill again after a preemption, until it emits its next token."""


class Step(NamedTuple):
    """One step, in the symbols of ``docs/engine-rules.md``.

    ``tokens`` n, ``batch`` B, ``keys`` S, ``chunks`` P, ``pairs`` A, ``rows`` R; ``running`` and ``waiting`` requests and
    ``kv_blocks`` owned once the step is scheduled; ``preempted`` at its start.
    """

    start_s: float
    end_s: float
    tokens: int
    batch: int
    keys: int
    chunks: int
    pairs: int
    rows: int
    running: int
    waiting: int
    kv_blocks: int
    preempted: int


class Span(NamedTuple):
    """A request's stay in one phase, cut to the stretch looked at; a queue alone starts with the arrival, however early.

    ``busy_prefill_s`` is, at the end of a prefill or recomputation, what the request has paid for prefill in all its life.
    """

    row: int
    phase: Phase
    start_s: float
    end_s: float
    busy_prefill_s: float = 0.0


@dataclass(frozen=True)
class EventLog:
    """A stretch of one replica's run.

    Attributes
    ----------
    start_s, end_s
        what was looked at: from the first step that starts at or after the time asked for, to the end of the last one.
    steps
        in order.
    spans
        in order of their ends. A request's spans join without gaps: each starts, to the bit, when the one before ended.
    rejected
        (row, arrival) of the requests refused in the stretch.
    complete
        whether the stretch reaches the time asked for; False if ``max_steps`` cut it short.
    """

    start_s: float
    end_s: float
    steps: tuple[Step, ...]
    spans: tuple[Span, ...]
    rejected: tuple[tuple[int, float], ...]
    complete: bool


class _Counters(NamedTuple):
    """Totals whose growth over a step says what the step was."""

    batch: int
    keys: int
    chunks: int
    pairs: int
    preempted: int
    blocks_s: float


class Recorder:
    """Follows an engine step by step."""

    def __init__(self, engine: Engine) -> None:
        if engine.clients_come_and_go:
            raise InputError(
                "a run cannot be followed step by step where clients leave (timeouts and cancellations in [clients]) or requests "
                "are seen late (engine.host.request_s)"
            )
        self._engine = engine
        self._stream, self._out, self._state = engine._stream, engine._out, engine._state  # noqa: SLF001 - looking inside is its purpose
        n = len(self._stream.prompt)
        self._phase: dict[int, Phase] = {}
        self._since: dict[int, float] = {}
        self._preemptions = np.zeros(n, dtype=np.int32)
        self._slot = np.zeros(n, dtype=np.int64)
        self._seen_rows = 0
        self._queue = np.zeros(0, dtype=np.int64)
        self._by_tokens = self._out.steps_by_tokens.copy()
        self._by_rows = self._out.steps_by_rows.copy()
        self.steps: list[Step] = []
        self.spans: list[Span] = []
        self.rejected: list[tuple[int, float]] = []
        self._meet()

    def _meet(self) -> None:
        """Take in the requests that are there when the stretch begins."""
        now_s = self._engine.clock_s
        self._seen_rows = int(self._state.ints[core.NEXT_ROW])
        rows = np.arange(self._seen_rows)
        status, scheduled = self._out.status[rows], self._out.scheduled[rows]
        done = (status == FINISHED) | (status == REJECTED)
        self._queue = rows[~done & np.isnan(scheduled)]
        self._preemptions[rows] = self._out.preemptions[rows]
        self._find_slots()
        for row in rows[~done & ~np.isnan(scheduled)].tolist():
            self._phase[row] = self._phase_of(row)
            self._since[row] = now_s

    def _find_slots(self) -> None:
        state = self._state
        used = np.ones(len(state.row), dtype=bool)
        used[state.slots[: state.ints[core.N_FREE_SLOTS], core.FREE_SLOT]] = False
        slots = np.flatnonzero(used)
        self._slot[state.row[slots]] = slots

    def _phase_of(self, row: int) -> Phase:
        """Phase of a request that was scheduled at least once and is not done."""
        if self._out.status[row] != RUNNING:
            return Phase.PREEMPTED
        if self._state.slots[self._slot[row], core.FINISH_STEP] >= 0:
            return Phase.DECODE
        return Phase.RECOMPUTE if self._out.preemptions[row] else Phase.PREFILL

    def _counters(self) -> _Counters:
        ints = self._state.ints
        return _Counters(
            int(ints[core.DECODE_TOKENS]),
            round(self._engine.decode_keys),
            int(ints[core.CHUNKS]),
            int(ints[core.PREFILL_PAIRS]),
            int(ints[core.PREEMPTIONS]),
            float(self._state.floats[core.BLOCKS_INTEGRAL]),
        )

    def _next_s(self) -> float:
        """Start of the next step, or a lower bound of it; infinite if there is none."""
        ints, state = self._state.ints, self._state
        if ints[core.N_RUNNING] or self._engine.n_waiting:
            return self._engine.clock_s
        if self._stream.concurrency:
            pending = ints[core.N_PENDING] > 0
            arrival = float(state.pending_time[0]) if pending else math.inf
        else:
            row = ints[core.NEXT_ROW]
            arrival = float(self._stream.arrival[row]) if row < len(self._stream.arrival) else math.inf
        return max(self._engine.clock_s, min(arrival, self._engine.next_load_s))

    def step(self, before_s: float) -> bool:
        """Run and note the next step, if it starts before ``before_s``; return whether there was one to try."""
        start_s = self._next_s()
        if start_s >= before_s or math.isinf(start_s):
            return False
        before = self._counters()
        n_steps = int(self._state.ints[core.STEPS])
        self._engine.advance(math.nextafter(start_s, math.inf))
        arrived = self._note_arrivals()
        if int(self._state.ints[core.STEPS]) == n_steps:  # whoever arrived was rejected
            return True
        self._note_step(before, arrived)
        return True

    def _note_arrivals(self) -> NDArray[np.int64]:
        """Queue the rows that the engine has taken from the stream; return the queue as it was before admissions."""
        seen = int(self._state.ints[core.NEXT_ROW])
        if seen > self._seen_rows:
            self._queue = np.concatenate([self._queue, np.arange(self._seen_rows, seen)])
            self._seen_rows = seen
        refused = self._out.status[self._queue] == REJECTED
        if refused.any():
            self.rejected += [(row, float(self._out.arrival[row])) for row in self._queue[refused].tolist()]
            self._queue = self._queue[~refused]
        return self._queue

    def _note_step(self, before: _Counters, queue: NDArray[np.int64]) -> None:
        out, floats = self._out, self._state.floats
        start_s, end_s = float(floats[core.LAST_START]), self._engine.clock_s
        self._find_slots()
        admitted = queue[~np.isnan(out.scheduled[queue])]
        if len(admitted):
            self._queue = queue[np.isnan(out.scheduled[queue])]
        for row in admitted.tolist():
            self._phase[row] = Phase.QUEUED
            self._since[row] = float(out.arrival[row])
        followed = np.fromiter(self._phase, dtype=np.int64, count=len(self._phase))
        preempted = self._follow(followed, start_s, end_s)
        after = self._counters()
        by_tokens = int(np.flatnonzero(out.steps_by_tokens != self._by_tokens)[0])
        by_rows = int(np.flatnonzero(out.steps_by_rows != self._by_rows)[0])
        self._by_tokens[by_tokens] += 1
        self._by_rows[by_rows] += 1
        self.steps.append(
            Step(
                start_s=start_s,
                end_s=end_s,
                tokens=by_tokens,
                batch=after.batch - before.batch,
                keys=after.keys - before.keys,
                chunks=after.chunks - before.chunks,
                pairs=after.pairs - before.pairs,
                rows=by_rows,
                running=len(followed) - preempted,
                waiting=int((out.arrival[self._queue] <= start_s).sum()) + preempted,
                kv_blocks=round((after.blocks_s - before.blocks_s) / (end_s - start_s)),
                preempted=after.preempted - before.preempted,
            )
        )

    def _follow(self, rows: NDArray[np.int64], start_s: float, end_s: float) -> int:
        """Note who changed phase in a step; return how many are preempted."""
        out = self._out
        again = out.preemptions[rows] > self._preemptions[rows]
        self._preemptions[rows] = out.preemptions[rows]
        preempted = 0
        for row, lost in zip(rows.tolist(), again.tolist(), strict=True):
            done = out.status[row] == FINISHED
            now = None if done else self._phase_of(row)
            preempted += now is Phase.PREEMPTED
            if lost:
                self._change(row, Phase.PREEMPTED, start_s)
            if self._phase[row] in {Phase.QUEUED, Phase.PREEMPTED} and now is not Phase.PREEMPTED:
                self._change(row, Phase.RECOMPUTE if out.preemptions[row] else Phase.PREFILL, start_s)
            if now is not self._phase[row]:
                self._change(row, now, end_s)
        return preempted

    def _change(self, row: int, phase: Phase | None, at_s: float) -> None:
        """End a request's phase and begin another one; None: it is done."""
        self.spans.append(Span(row, self._phase[row], self._since[row], at_s, float(self._out.busy_prefill[row])))
        if phase is None:
            del self._phase[row], self._since[row]
        else:
            self._phase[row], self._since[row] = phase, at_s

    def close(self, at_s: float) -> None:
        """End the stretch: whatever goes on is cut off at ``at_s``."""
        for row, phase in self._phase.items():
            self.spans.append(Span(row, phase, self._since[row], at_s, float(self._out.busy_prefill[row])))
        arrival = self._out.arrival[self._queue]
        for row, when in zip(self._queue.tolist(), arrival.tolist(), strict=True):
            if when < at_s:
                self.spans.append(Span(row, Phase.QUEUED, when, at_s))


def record(engine: Engine, start_s: float = 0.0, end_s: float = math.inf, *, max_steps: int = MAX_STEPS) -> EventLog:
    """Run an engine through a stretch of its time and tell what happened there.

    Parameters
    ----------
    engine
        new, or advanced to a time before ``start_s``. It stands at the end of the stretch afterwards and can go on.
    start_s, end_s
        steps that start in [``start_s``, ``end_s``) are noted. [s]
    max_steps
        the stretch ends early after so many.

    Raises
    ------
    InputError
        If clients may leave the run, or requests are seen later than they arrive.
    """
    if start_s > engine.clock_s:
        engine.advance(start_s)
    recorder = Recorder(engine)
    first_s = engine.clock_s
    complete = True
    while recorder.step(end_s):
        if len(recorder.steps) >= max_steps:
            complete = False
            break
    last_s = engine.clock_s if recorder.steps else first_s
    recorder.close(last_s)
    return EventLog(
        start_s=first_s,
        end_s=last_s,
        steps=tuple(recorder.steps),
        spans=tuple(recorder.spans),
        rejected=tuple(recorder.rejected),
        complete=complete,
    )
