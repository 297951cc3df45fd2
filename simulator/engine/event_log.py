"""What happened in a stretch of a run, step by step and request by request.

The compiled engine is cut at every step of the stretch, or in a pipeline at every instant at which something happens (rule I9: a cut changes
nothing), and looked at in between. So there is no tracing code in the engine, a traced run is the run itself, and the price, some 0.1 ms a step,
is paid only where one looks.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from simulator.engine import core, parts, ranks
from simulator.engine.grouped import RankEngine, StageEngine
from simulator.engine.lives import Lives, Paid, Phase, Span
from simulator.engine.single import Engine

__all__ = ["MAX_STEPS", "EventLog", "Moment", "Paid", "Phase", "Span", "Step", "record"]

MAX_STEPS = 100_000
"""Longest stretch: a minute of Python, and as much as a trace viewer can show."""

#: Columns of stored prices.
_ROWS, _PAIRS = core.Price._fields.index("rows"), core.Price._fields.index("pairs")


class Step(NamedTuple):
    """One step of one scheduler, in the symbols of ``docs/engine-rules.md``; in a pipeline a micro-batch.

    ``tokens`` n, ``batch`` B, ``keys`` S, ``chunks`` P, ``pairs`` A, ``rows`` R; ``running`` and ``waiting`` requests of the scheduler once the step is scheduled (in a
    pipeline, once all steps of that instant are), and ``kv_blocks`` owned then in the whole replica; ``preempted`` at its start. A rank that has nothing to do takes part in
    a step with no tokens. ``worked_until_s`` is when a rank is done, and waits for the slowest one; ``stages`` are the times at which a micro-batch enters and leaves each stage.
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
    rank: int = 0
    worked_until_s: float = math.nan
    stages: tuple[tuple[float, float], ...] = ()


class Moment(NamedTuple):
    """The whole replica, once everything has happened that happens at ``time_s``; ``in_flight`` counts steps in progress."""

    time_s: float
    running: int
    waiting: int
    kv_blocks: int
    preempted: int
    in_flight: int


@dataclass(frozen=True)
class EventLog:
    """A stretch of one replica's run.

    Attributes
    ----------
    start_s, end_s
        what was looked at: from the first step that starts at or after the time asked for, to the end of the last one; of a pipeline, to the last instant.
    steps
        in order of their starts, those of one instant by rank.
    spans
        in order of their ends. A request's spans join without gaps: each starts, to the bit, when the one before ended.
    moments
        at the start of each step and when the replica falls idle, or in a pipeline at each instant.
    rejected
        (row, arrival) of the requests refused in the stretch.
    complete
        whether the stretch reaches the time asked for; False if ``max_steps`` cut it short.
    rides
        in a pipeline, the steps that the watched request was part of.
    n_ranks, n_stages
        of the replica.
    """

    start_s: float
    end_s: float
    steps: tuple[Step, ...]
    spans: tuple[Span, ...]
    moments: tuple[Moment, ...]
    rejected: tuple[tuple[int, float], ...]
    complete: bool
    rides: tuple[int, ...] = ()
    n_ranks: int = 1
    n_stages: int = 1


class _Counters(NamedTuple):
    """Totals of one scheduler, whose growth over a step says what the step was."""

    batch: int
    keys: float
    chunks: int
    pairs: int
    preempted: int

    def since(self, other: "_Counters") -> "_Counters":
        """What has come since."""
        return _Counters(
            self.batch - other.batch,
            self.keys - other.keys,
            self.chunks - other.chunks,
            self.pairs - other.pairs,
            self.preempted - other.preempted,
        )


class _Recorder:
    """Follows a replica of one part step by step."""

    n_ranks = 1
    n_stages = 1

    def __init__(self, engine: Engine, watched: int) -> None:
        self._engine = engine
        self._watched = watched
        self._state, self._out = engine._state, engine._out  # noqa: SLF001 - looking inside is its purpose
        self._parts = list(engine._parts())  # noqa: SLF001
        self._num_blocks = engine._limits.num_blocks  # noqa: SLF001
        self._by_tokens = self._out.steps_by_tokens.copy()
        self._by_rows = self._out.steps_by_rows.copy()
        self.lives = self._follow()
        self.steps: list[Step] = []
        self.moments: list[Moment] = []
        self.rides: list[int] = []

    def _follow(self) -> Lives:
        return Lives(self._engine)

    def _next_s(self) -> float:
        """Start of the next step, or a lower bound of it; infinite if there is none."""
        engine = self._engine
        if engine.n_waiting or any(state.ints[core.N_RUNNING] for state, _, _ in self._parts):
            return engine.clock_s
        return max(engine.clock_s, self._wakes_s())

    def _wakes_s(self) -> float:
        """When something happens where nobody runs or can be scheduled; a client may leave while its blocks are loaded."""
        engine = self._engine
        loading = any(state.ints[core.N_LOADING] for state, _, _ in self._parts)
        return min(engine.next_arrival_s, engine.next_load_s, engine.next_departure_s if loading else math.inf)

    def _counters(self) -> list[_Counters]:
        found = []
        for state, _, extra in self._parts:
            ints = state.ints
            keys = (
                float(extra.spec.tariff.keys[0].sum())
                if extra is not None and extra.spec.on
                else int(ints[core.DECODE_KEYS])
            )
            counts = (core.CHUNKS, core.PREFILL_PAIRS, core.PREEMPTIONS)
            found.append(_Counters(int(ints[core.DECODE_TOKENS]), keys, *(int(ints[name]) for name in counts)))
        return found

    def step(self, before_s: float) -> bool:
        """Run and note the next step, if it starts before ``before_s``; return whether there was one to try."""
        start_s = self._next_s()
        if start_s >= before_s or math.isinf(start_s):
            return False
        before, blocks_s = self._counters(), float(self._state.floats[core.BLOCKS_INTEGRAL])
        n_steps = int(self._state.ints[core.STEPS])
        self._engine.advance(math.nextafter(start_s, math.inf))
        if int(self._state.ints[core.STEPS]) == n_steps:  # who arrived was rejected, or loads
            self.lives.look(math.inf, self._engine.clock_s)
            return True
        start_s, end_s = float(self._state.floats[core.LAST_START]), self._engine.clock_s
        self.lives.look(start_s, end_s)
        kv_blocks = round((float(self._state.floats[core.BLOCKS_INTEGRAL]) - blocks_s) / (end_s - start_s))
        grown = [now.since(then) for now, then in zip(self._counters(), before, strict=True)]
        for rank in range(self.n_ranks):
            tokens, rows, worked_until_s = self._shape(rank, start_s, end_s)
            self.steps.append(
                Step(
                    start_s=start_s,
                    end_s=end_s,
                    tokens=tokens,
                    batch=grown[rank].batch,
                    keys=round(grown[rank].keys),
                    chunks=grown[rank].chunks,
                    pairs=grown[rank].pairs,
                    rows=rows,
                    running=self.lives.running[rank],
                    waiting=self.lives.waiting[rank],
                    kv_blocks=kv_blocks,
                    preempted=grown[rank].preempted,
                    rank=rank,
                    worked_until_s=worked_until_s,
                )
            )
        if self.moments and self.moments[-1].time_s == start_s:  # it was not idle after all
            self.moments.pop()
        preempted = sum(one.preempted for one in grown)
        self.moments.append(Moment(start_s, sum(self.lives.running), sum(self.lives.waiting), kv_blocks, preempted, 1))
        if self._next_s() > end_s:
            loading = sum(int(state.ints[core.N_LOADING]) for state, _, _ in self._parts)
            owned = self._num_blocks * self.n_ranks - sum(
                int(state.ints[core.FREE_BLOCKS]) for state, _, _ in self._parts
            )
            self.moments.append(Moment(end_s, 0, loading, owned, 0, 0))
        return True

    def _shape(self, rank: int, start_s: float, end_s: float) -> tuple[int, int, float]:
        """Tokens and logit rows of the step just taken, and until when it was worked on."""
        del rank, start_s
        out = self._out
        tokens = int(np.flatnonzero(out.steps_by_tokens != self._by_tokens)[0])
        rows = int(np.flatnonzero(out.steps_by_rows != self._by_rows)[0])
        self._by_tokens[tokens] += 1
        self._by_rows[rows] += 1
        return tokens, rows, end_s


class _RankRecorder(_Recorder):
    """Follows ranks in lock-step."""

    def __init__(self, engine: RankEngine, watched: int) -> None:
        self._board = engine._board  # noqa: SLF001
        self.n_ranks = len(self._board.scheduled)
        super().__init__(engine, watched)

    def _follow(self) -> Lives:
        return Lives(self._engine, n_parts=self.n_ranks)

    def _shape(self, rank: int, start_s: float, end_s: float) -> tuple[int, int, float]:
        tokens, price = int(self._board.scheduled[rank, ranks.TOKENS]), self._board.prices[rank]
        if tokens == 0:
            return 0, 0, min(end_s, start_s + float(price[parts.COPIES]))
        return tokens, int(price[_ROWS]), min(end_s, start_s + float(price[parts.OWN_D0]))


class _StageRecorder(_Recorder):
    """Follows micro-batches through pipeline stages, from instant to instant."""

    def __init__(self, engine: StageEngine, watched: int) -> None:
        self._flight, self._groups = engine._flight, engine._states  # noqa: SLF001
        self.n_stages = len(self._flight.free)
        super().__init__(engine, watched)

    def _follow(self) -> Lives:
        return Lives(self._engine, scheduled_last=True, n_parts=self.n_stages)

    def _next_s(self) -> float:
        engine, done = self._engine, self._flight.done
        if not self._state.ints[core.N_RUNNING] and not engine.n_waiting:
            return self._wakes_s()
        when = min(float(done.min()), engine.next_load_s, engine.next_departure_s)
        if np.isfinite(done).sum() < self.n_stages:
            when = min(when, engine.next_arrival_s)
        return when

    def step(self, before_s: float) -> bool:
        """Let the next instant happen and note what sets off, if it is before ``before_s``; return whether there was one."""
        when = self._next_s()
        if when >= before_s or math.isinf(when):
            return False
        flight, ints = self._flight, self._groups.ints
        done, preempted = flight.done.copy(), int(ints[:, core.PREEMPTIONS].sum())
        self._engine.advance(math.nextafter(when, math.inf))
        now_s = self._engine.clock_s
        self.lives.look(now_s, now_s)
        flying = np.isfinite(flight.done)
        waiting = self._engine.n_waiting + int(self._state.ints[core.N_LOADING])
        moment = Moment(
            now_s,
            int(self._state.ints[core.N_RUNNING]),
            waiting,
            self._num_blocks - int(self._state.ints[core.FREE_BLOCKS]),
            int(ints[:, core.PREEMPTIONS].sum()) - preempted,
            int(flying.sum()),
        )
        self.moments.append(moment)
        new = np.flatnonzero(flying & (flight.done != done))
        for g in new[np.argsort(flight.done[new])].tolist():
            self._note_micro_batch(g, moment)
        return True

    def _note_micro_batch(self, g: int, moment: Moment) -> None:
        flight, ints = self._flight, self._groups.ints[g]
        n, batch = int(flight.chunks[g]), int(ints[core.BATCH])
        chunks = self._groups.chunks[g, :n]
        if self._watched >= 0 and self._holds(g, chunks[:, core.CHUNK_SLOT]):
            self.rides.append(len(self.steps))
        self.steps.append(
            Step(
                start_s=moment.time_s,
                end_s=float(flight.done[g]),
                tokens=int(chunks[:, core.CHUNK_SIZE].sum()) + batch,
                batch=batch,
                keys=int(ints[core.KEYS_SUM]) if batch else 0,
                chunks=n,
                pairs=int(flight.prices[g, _PAIRS]),
                rows=int(flight.prices[g, _ROWS]),
                running=moment.running,
                waiting=moment.waiting,
                kv_blocks=moment.kv_blocks,
                preempted=moment.preempted,
                worked_until_s=float(flight.done[g]),
                stages=tuple(zip(flight.entered[g].tolist(), flight.left[g].tolist(), strict=True)),
            )
        )

    def _holds(self, g: int, chunk_slots: np.ndarray) -> bool:
        """Whether a micro-batch holds the watched request: a chunk of it, or its next token."""
        slots = np.flatnonzero(self._state.row == self._watched)
        decodes = (self._flight.group[slots] == g) & (self._state.slots[slots, core.FINISH_STEP] >= 0)
        return bool(np.isin(chunk_slots, slots).any() or (decodes.any() and self._groups.ints[g, core.BATCH] > 0))


def _recorder(engine: Engine, watched: int) -> _Recorder:
    if isinstance(engine, StageEngine):
        return _StageRecorder(engine, watched)
    if isinstance(engine, RankEngine):
        return _RankRecorder(engine, watched)
    return _Recorder(engine, watched)


def record(
    engine: Engine, start_s: float = 0.0, end_s: float = math.inf, *, max_steps: int = MAX_STEPS, watched: int = -1
) -> EventLog:
    """Run an engine through a stretch of its time and tell what happened there.

    Parameters
    ----------
    engine
        new, or advanced to a time before ``start_s``. It stands at the end of the stretch afterwards and can go on.
    start_s, end_s
        steps that start in [``start_s``, ``end_s``) are noted. [s]
    max_steps
        the stretch ends early after so many; those of ranks count each.
    watched
        row with which the stretch ends, and whose micro-batches :attr:`EventLog.rides` lists; −1: none.
    """
    if start_s > engine.clock_s:
        engine.advance(start_s)
    recorder = _recorder(engine, watched)
    first_s = engine.clock_s if recorder.n_stages == 1 else max(engine.clock_s, start_s)
    complete = True
    while recorder.step(end_s):
        if recorder.lives.is_gone(watched):
            break
        if len(recorder.steps) >= max_steps:
            complete = False
            break
    last_s = engine.clock_s if recorder.moments else first_s
    recorder.lives.close(last_s)
    return EventLog(
        start_s=first_s,
        end_s=last_s,
        steps=tuple(recorder.steps),
        spans=tuple(recorder.lives.spans),
        moments=tuple(recorder.moments),
        rejected=tuple(recorder.lives.rejected),
        complete=complete,
        rides=tuple(recorder.rides),
        n_ranks=recorder.n_ranks,
        n_stages=recorder.n_stages,
    )
