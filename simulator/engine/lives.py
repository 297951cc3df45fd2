"""Who is in a replica and what each of them is doing, followed from one look at the engine to the next.

Nothing here steers the engine. Between two looks there is at most one moment at which requests are scheduled, so the columns that the engine
keeps of each request, before and after, say all that happened to it.
"""

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple, cast

import numpy as np

from simulator.engine import core, queues
from simulator.engine.records import CANCELLED, FINISHED, NOT_ARRIVED, REJECTED, RUNNING, TIMED_OUT, WAITING
from simulator.engine.single import Engine


class Phase(StrEnum):
    """What a request is doing."""

    HOST = "host"
    """On its way to the scheduler, or its last token on the way to the client (H2, H3)."""
    QUEUED = "queued"
    """Not yet part of any step."""
    LOADING = "loading"
    """Waiting for KV blocks from a tier below HBM."""
    PREFILL = "prefill"
    DECODE = "decode"
    PREEMPTED = "preempted"
    """Waiting again, its cache lost or in host memory."""
    RECOMPUTE = "recompute"
    """In prefill again after a preemption, until it emits its next token."""
    LEAVING = "leaving"
    """Its client has left; the step that it is part of goes on (L3, M21)."""
    AWAY = "away"
    """Its client has given up and will try again (L5)."""


IN_QUEUE = frozenset({Phase.QUEUED, Phase.PREEMPTED})
IN_STEPS = frozenset({Phase.PREFILL, Phase.DECODE, Phase.RECOMPUTE})


class Paid(NamedTuple):
    """What a request has paid for so far, in all its life, in seconds of the whole replica. [s]"""

    prefill_s: float
    decode_s: float
    copies_s: float


class Span(NamedTuple):
    """A request's stay in one phase, cut to the stretch looked at; who has not been scheduled yet is followed from its arrival, however early.

    ``attempt`` counts from 1; ``rank`` is where it was. ``paid`` is known at the end of prefills and of whatever ends decoding.
    """

    row: int
    phase: Phase
    start_s: float
    end_s: float
    paid: Paid
    rank: int = 0
    attempt: int = 1


@dataclass(slots=True)
class _Life:
    phase: Phase
    since_s: float
    rank: int
    attempt: int
    attempt_s: float
    preemptions: int
    prefill_s: float
    load: tuple[float, float] | None = None
    first_token_s: float = math.nan
    due_s: float = math.nan
    """When the client left, who is away."""


@dataclass
class Lives:
    """The requests of one replica.

    Attributes
    ----------
    scheduled_last
        whether requests are scheduled after all else that happens at one instant (pipelines), or at a step's start, before what happens
        during the step and at its end.
    n_parts
        ranks or stages, by which times are divided.
    spans
        so far, in order of their ends.
    rejected
        (row, arrival) of requests that were refused.
    running, waiting
        [ranks] who was there when the last step was scheduled.
    """

    engine: Engine
    scheduled_last: bool = False
    n_parts: int = 1
    spans: list[Span] = field(default_factory=list)
    rejected: list[tuple[int, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Take in who is there already."""
        engine = self.engine
        self._stream, self._out, self._state = engine._stream, engine._out, engine._state  # noqa: SLF001 - looking inside is its purpose
        self._queue = engine._queue  # noqa: SLF001
        self._parts = list(engine._parts())  # noqa: SLF001
        self._rules = None if self._queue is None else self._queue.rules
        self._slot = np.zeros(len(self._stream.prompt), dtype=np.int64)
        self._lives: dict[int, _Life] = {}
        self.running = [0] * len(self._parts)
        self.waiting = [0] * len(self._parts)
        self._seen_rows = int(self._state.ints[core.NEXT_ROW])
        rows = np.arange(self._seen_rows)
        status = self._out.status[rows]
        # Who came during the last step, and may have left again, is followed from its arrival.
        new = status == NOT_ARRIVED
        if not self.scheduled_last:
            seen_s = self._out.arrival[rows] + (0.0 if self._rules is None else self._rules.request_s)
            new |= (seen_s > self._state.floats[core.LAST_START]) & (status != REJECTED)
        self._coming: np.ndarray[Any, Any] = rows[new]
        self._find_slots()
        for row in rows[~new & np.isin(status, (WAITING, RUNNING, TIMED_OUT))].tolist():
            self._meet(row)
        if self._seen_rows:
            self.look(math.inf, engine.clock_s)

    def _meet(self, row: int) -> None:
        """Take in a request that is there when the stretch begins."""
        out, now_s, status = self._out, self.engine.clock_s, int(self._out.status[row])
        attempt, rank = self._attempts(row), self._rank(row)
        if status == TIMED_OUT and not self._tries_again(attempt):
            return
        arrival_s = float(out.arrival[row] if self._queue is None else self._queue.row_floats[row, queues.ATTEMPT_S])
        preemptions, paid_s = int(out.preemptions[row]), float(out.busy_prefill[row])
        life = self._lives[row] = _Life(Phase.AWAY, now_s, rank, attempt, arrival_s, preemptions, paid_s)
        life.first_token_s = float(out.first_token[row])
        if status == WAITING:
            life.phase = Phase.PREEMPTED
            if math.isnan(out.scheduled[row]):
                self._join(row, life, arrival_s)
        elif status == TIMED_OUT:
            life.due_s = self._due(row, life)
        elif status == RUNNING:
            life.phase = Phase.RECOMPUTE if preemptions else Phase.PREFILL
            if self._decodes(row, life):
                life.phase = Phase.DECODE
        self._note_load(row, life)

    # Reading the engine

    def _find_slots(self) -> None:
        """A plain replica does not say who is in which slot."""
        if self._queue is not None:
            return
        state = self._state
        used = np.ones(len(state.row), dtype=bool)
        used[state.slots[: state.ints[core.N_FREE_SLOTS], core.FREE_SLOT]] = False
        slots = np.flatnonzero(used)
        self._slot[state.row[slots]] = slots

    def _attempts(self, row: int) -> int:
        return 1 if self._queue is None else int(self._queue.row_ints[row, queues.ATTEMPTS])

    def _rank(self, row: int) -> int:
        return self.engine.rank_of(row)

    def _decodes(self, row: int, life: _Life) -> bool:
        slot = self._slot[row] if self._queue is None else self._queue.row_ints[row, queues.SLOT]
        return bool(self._parts[life.rank][0].slots[slot, core.FINISH_STEP] >= 0)

    def _tries_again(self, attempt: int) -> bool:
        return self._rules is not None and attempt < self._rules.max_attempts

    def _paid(self, row: int) -> Paid:
        out, n = self._out, self.n_parts
        prefill_s, copies_s = float(out.busy_prefill[row]), self.engine.copies_s(row)
        return Paid(prefill_s / n, (float(out.busy[row]) - prefill_s - copies_s) / n, copies_s / n)

    def _note_load(self, row: int, life: _Life) -> None:
        """Remember a load while it is known: the next attempt forgets it."""
        extra = self._parts[life.rank][2]
        if extra is not None and extra.loads.on and not math.isnan(extra.loads.start_s[row]):
            life.load = float(extra.loads.start_s[row]), float(extra.loads.end_s[row])

    def _due(self, row: int, life: _Life) -> float:
        """L1: when the client of an attempt leaves that has left."""
        floats = cast("queues.Queue", self._queue).row_floats[row]  # a plain replica's clients stay
        due = life.attempt_s + min(floats[queues.TIMEOUT_S], floats[queues.CANCEL_S])
        first_due = life.attempt_s + floats[queues.TTFT_TIMEOUT_S]
        in_time = self._out.first_token[row] <= first_due or life.first_token_s <= first_due
        return float(due if in_time else min(due, first_due))

    # Following

    def is_gone(self, row: int) -> bool:
        """Whether a request was here and will not be again."""
        return 0 <= row < self._seen_rows and row not in self._lives and row not in self._coming

    def look(self, start_s: float, end_s: float) -> None:
        """Note what has happened since the last look: requests were scheduled at ``start_s``, and the clock is at ``end_s`` now."""
        self._take_in()
        self._find_slots()
        self.running = [0] * len(self._parts)
        self.waiting = [0] * len(self._parts)
        rows = np.fromiter(self._lives, dtype=np.int64, count=len(self._lives))
        status, preemptions = self._out.status[rows].tolist(), self._out.preemptions[rows].tolist()
        attempts = [1] * len(rows) if self._queue is None else self._queue.row_ints[rows, queues.ATTEMPTS].tolist()
        news = zip(list(self._lives.items()), status, preemptions, attempts, strict=True)
        for (row, life), now, lost, attempt in news:
            if lost == life.preemptions and attempt == life.attempt:  # most are where they were
                if now == RUNNING and life.phase is Phase.DECODE:
                    self.running[life.rank] += 1
                    continue
                if now == WAITING and life.phase in IN_QUEUE:
                    self._note_load(row, life)
                    self.waiting[life.rank] += life.since_s <= start_s
                    continue
            self._catch_up(row, life, start_s, end_s)

    def _take_in(self) -> None:
        """Meet the rows that the engine has taken from the stream and seen."""
        seen = int(self._state.ints[core.NEXT_ROW])
        if seen > self._seen_rows:
            self._coming = np.concatenate([self._coming, np.arange(self._seen_rows, seen)])
            self._seen_rows = seen
        here = self._out.status[self._coming] != NOT_ARRIVED
        if not here.any():
            return
        for row in self._coming[here].tolist():
            arrival_s = float(self._out.arrival[row])
            if self._out.status[row] == REJECTED:
                self.rejected.append((row, arrival_s))
                continue
            life = self._lives[row] = _Life(Phase.QUEUED, arrival_s, self._rank(row), 1, arrival_s, 0, 0.0)
            self._join(row, life, arrival_s)
        self._coming = self._coming[~here]

    def _join(self, row: int, life: _Life, arrival_s: float) -> None:
        """An attempt arrives, and is seen by the scheduler (H2)."""
        life.phase, life.since_s, life.attempt_s = Phase.QUEUED, arrival_s, arrival_s
        life.load, life.first_token_s = None, math.nan
        if self._rules is not None and self._rules.request_s > 0:
            life.phase = Phase.HOST
            self._change(row, life, Phase.QUEUED, arrival_s + self._rules.request_s)

    def _catch_up(self, row: int, life: _Life, start_s: float, end_s: float) -> None:
        out = self._out
        status, attempts = int(out.status[row]), self._attempts(row)
        lost = bool(out.preemptions[row] > life.preemptions)
        life.preemptions = int(out.preemptions[row])
        if attempts > life.attempt and life.phase is Phase.AWAY and not self.scheduled_last:
            self._try_again(row, life, attempts, no_later_s=start_s)
        another = attempts > life.attempt
        if not another and life.phase in IN_QUEUE:
            self._note_load(row, life)
        if not (another and self.scheduled_last):
            here = status in {RUNNING, FINISHED} and not another
            self._follow_scheduling(row, life, lost=lost, here=here, at_s=start_s)
        if life.phase in IN_STEPS:
            self.running[life.rank] += 1
        elif (
            life.phase in IN_QUEUE
            and life.since_s <= start_s
            and not self._has_left(row, life, start_s, another=another)
        ):
            self.waiting[life.rank] += 1
        life.prefill_s = float(out.busy_prefill[row])
        while attempts > life.attempt:
            self._follow_leaving(row, life, end_s)
            self._try_again(row, life, attempts)
        if status == FINISHED:
            self._end(row, life, end_s)
            if self._rules is not None and self._rules.output_s > 0:
                life.phase, life.since_s = Phase.HOST, end_s
                self._end(row, life, end_s + self._rules.output_s)
            del self._lives[row]
        elif status in {TIMED_OUT, CANCELLED}:
            self._follow_leaving(row, life, end_s)
            if status == CANCELLED or not self._tries_again(attempts):
                del self._lives[row]
        else:
            life.first_token_s = float(out.first_token[row])
        if status == RUNNING:
            if life.phase is Phase.QUEUED:  # a new attempt of this very instant
                self._change(row, life, Phase.PREFILL, end_s)
            if self._decodes(row, life) and life.phase is not Phase.DECODE:
                self._change(row, life, Phase.DECODE, end_s)

    def _has_left(self, row: int, life: _Life, by_s: float, *, another: bool) -> bool:
        """Whether the client of one who waits was gone by then."""
        return (another or self._out.status[row] in {TIMED_OUT, CANCELLED}) and self._due(row, life) <= by_s

    def _follow_scheduling(self, row: int, life: _Life, *, lost: bool, here: bool, at_s: float) -> None:
        """R5 to R7: preempted, or admitted; who is gone again was admitted if it has paid for a chunk."""
        if lost:
            if life.phase is not Phase.PREEMPTED:
                self._change(row, life, Phase.PREEMPTED, at_s)
        elif life.phase in IN_QUEUE and (here or self._out.busy_prefill[row] > life.prefill_s):
            self._change(row, life, Phase.PREFILL if life.phase is Phase.QUEUED else Phase.RECOMPUTE, at_s)

    def _follow_leaving(self, row: int, life: _Life, end_s: float) -> None:
        """L3, M21: a client has left; its request with it, or when the steps end that it is part of."""
        if life.phase is Phase.AWAY:
            return
        life.due_s = self._due(row, life)
        if life.phase in IN_STEPS and life.due_s < end_s:
            self._change(row, life, Phase.LEAVING, life.due_s)
            self._change(row, life, Phase.AWAY, end_s)
        else:
            self._change(row, life, Phase.AWAY, life.due_s)

    def _try_again(self, row: int, life: _Life, attempts: int, no_later_s: float = math.inf) -> None:
        """L5: who was away arrives again, if not later than so."""
        queue = cast("queues.Queue", self._queue)
        arrival_s = float(queue.row_floats[row, queues.ATTEMPT_S])
        if attempts > life.attempt + 1:  # that one left too, and only the latest is known
            arrival_s = max(life.due_s + float(queue.waits[life.attempt - 1]), life.since_s)
        if arrival_s + queue.rules.request_s > no_later_s:
            return
        self._end(row, life, arrival_s)
        life.attempt, life.rank = life.attempt + 1, self._rank(row)
        self._join(row, life, arrival_s)

    def _change(self, row: int, life: _Life, phase: Phase, at_s: float) -> None:
        """End a request's phase and begin another one."""
        self._end(row, life, at_s)
        life.phase, life.since_s = phase, at_s

    def _end(self, row: int, life: _Life, at_s: float) -> None:
        """Note a phase that ends at ``at_s``; a stay in the queue is parted by the load in it."""
        pieces = [(life.phase, life.since_s, at_s)]
        if life.phase in IN_QUEUE and life.load is not None:
            start_s, stop_s = life.load[0], min(life.load[1], at_s)
            if life.since_s <= start_s < stop_s:
                pieces = [(Phase.LOADING, start_s, stop_s)]
                if life.since_s < start_s:
                    pieces.insert(0, (life.phase, life.since_s, start_s))
                if stop_s < at_s:
                    pieces.append((life.phase, stop_s, at_s))
        paid = self._paid(row)
        for phase, since_s, until_s in pieces:
            self.spans.append(Span(row, phase, since_s, until_s, paid, life.rank, life.attempt))

    def close(self, at_s: float) -> None:
        """End the stretch: whatever goes on is cut off at ``at_s``."""
        for row, life in self._lives.items():
            if life.since_s < at_s:
                self._note_load(row, life)
                gone = self._queue is not None and self._queue.row_ints[row, queues.GONE] != 0
                if gone and life.phase in IN_STEPS and self._due(row, life) < at_s:  # in flight still (M21)
                    self._change(row, life, Phase.LEAVING, self._due(row, life))
                self._end(row, life, at_s)
