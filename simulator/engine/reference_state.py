"""What the parts of the reference engine pass to each other: its clock, a request in the replica, a step as it was scheduled."""

from dataclasses import dataclass, field
from heapq import heappush
from math import inf, nan

import simpy
from simpy.events import EventPriority

from simulator.engine.records import NOT_ARRIVED

STEP_ENDS, LEAVING, LOADED, ARRIVAL, STEP_STARTS = (EventPriority(i) for i in range(5))
"""What happens at one instant, in this order (M1)."""


class Clock(simpy.Environment):
    """A SimPy environment with absolute times.

    SimPy's own ``timeout(delay)`` happens at ``now + delay``, which in floats may miss the arrival that the delay
    was computed from.
    """

    def insert(self, event: simpy.Event, time_s: float, priority: EventPriority, row: int) -> None:
        """Put a triggered event into the queue."""
        # SimPy orders by priority, then by creation; a fraction of a priority puts the row in between.
        heappush(self._queue, (time_s, EventPriority(priority + row / 2**40), next(self._eid), event))  # type: ignore[arg-type]  # SimPy only compares priorities


class Moment(simpy.Event):
    """Happens at exactly ``time_s``, among the events of ``priority`` in the order of rows."""

    def __init__(self, clock: Clock, time_s: float, priority: EventPriority, row: int = 0) -> None:
        super().__init__(clock)
        self._ok = True
        self._value = None
        clock.insert(self, time_s, priority, row)


@dataclass(eq=False)
class Request:
    """One request and its state in the replica. Fields named as in EngineResult mean the same."""

    row: int
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    max_tokens: int
    rank: int = 0
    """Scheduler that it has joined (G1)."""
    order: float = 0.0
    """What its policy orders by, before the ticket (Q1)."""
    tenant: int = 0
    ticket: int = -1
    put_back: int = 0
    """Which put back into the queue it was (Q1); 0: none in this attempt."""
    leaving: int = 0
    """What its status will be when the replica lets it go, because its client has left (L3, M21); 0: it has not."""
    flights: int = 0
    """Steps in progress that hold it: it is neither preempted meanwhile nor let go."""
    held_until_s: float = 0.0
    """When the last of them ends."""
    status: int = NOT_ARRIVED
    computed: int = 0
    emitted: int = 0
    seen: int = 0
    """Largest ``computed`` it ever had in this attempt (R12)."""
    start: int = 0
    """``computed`` when it was last admitted, but for saved tokens (C8)."""
    reused_tokens: int = 0
    saved: int = 0
    """Tokens whose blocks are in host memory (E1)."""
    swap_s: float = 0.0
    loading: bool = False
    returned_s: float = inf
    """When it came back to the queue from loading."""
    asks: bool = True
    """Whether it may still load from below HBM (F3)."""
    loaded: int = 0
    """Tokens that lie ready since it has loaded them (F5)."""
    load_start_s: float = nan
    load_end_s: float = nan
    must_emit: bool = True
    """No token emitted since it was last admitted."""
    last_token_s: float = nan
    attempt_s: float = nan
    """Arrival of the attempt."""
    attempts: int = 0
    arrival_s: float = nan
    scheduled_s: float = nan
    first_token_s: float = nan
    finish_s: float = nan
    preemptions: int = 0
    busy_s: float = 0.0
    busy_prefill_s: float = 0.0
    busy_cached_s: float = 0.0
    recompute_s: float = 0.0
    wasted_s: float = 0.0

    def begin_attempt(self, arrival_s: float) -> None:
        """Start from nothing (L5, M20)."""
        self.attempts += 1
        self.attempt_s = arrival_s
        self.emitted = self.seen = self.reused_tokens = self.loaded = 0
        self.asks, self.returned_s = True, inf
        self.scheduled_s = self.first_token_s = self.last_token_s = self.load_start_s = self.load_end_s = nan

    @property
    def known(self) -> int:
        """Tokens known: the prompt and the output so far."""
        return self.prompt_tokens + self.emitted

    @property
    def in_prefill(self) -> bool:
        """Whether its tokens of a step are a chunk, not a decode token."""
        return self.must_emit or self.known - self.computed > 1

    @property
    def may_go_on(self) -> bool:
        """Whether it can be scheduled: a decode is in one step at a time, chunks of a prompt may follow each other (S1, S2, M21)."""
        return not self.leaving and (not self.flights or (self.in_prefill and self.computed < self.known))


@dataclass
class Plan:
    """A step of one scheduler in the making."""

    budget: int
    batch: dict[Request, int] = field(default_factory=dict)
    """Tokens of each request, in the order of scheduling."""
    preempted: list[Request] = field(default_factory=list)
    admitted: list[Request] = field(default_factory=list)
    stuck: bool = False
    """Whether somebody who runs waits for blocks (S3, M22)."""
    level: int = 0
    """Of speculation (P1)."""


@dataclass(frozen=True)
class Work:
    """What a scheduler's step is to the cost table (R9)."""

    n: int
    B: int
    S: float
    P: int
    A: int
    K: int
    R: int
    SW: float
    AW: int
    KW: int


@dataclass(frozen=True)
class StepRecord(Work):
    """One step of one scheduler, as it was scheduled: what ``on_step`` gets, at the step's start.

    ``host_s`` is what the host adds to the device's time. ``scheduled`` maps rows to tokens; ``computed`` (before the step) and ``blocks`` (for the step) cover all running rows,
    in the order of admission. ``preempted`` rows are in the order of preemption, ``waiting`` in the order of the queue; ``loading`` wait for a load.
    Counts from ``arrived`` on are of the whole replica, the rest of scheduler ``rank``.
    """

    rank: int
    start_s: float
    end_s: float
    host_s: float
    level: int
    scheduled: dict[int, int]
    computed: dict[int, int]
    blocks: dict[int, int]
    free_blocks: int
    admitted: tuple[int, ...]
    preempted: tuple[int, ...]
    waiting: tuple[int, ...]
    loading: tuple[int, ...]
    arrived: int
    finished: int
    rejected: int
    left: int

    @property
    def running(self) -> tuple[int, ...]:
        """Running rows in order of admission."""
        return tuple(self.blocks)


@dataclass
class Piece:
    """State of the replica, constant between two events."""

    start_s: float
    end_s: float
    running: int
    waiting: int
    kv_blocks: int
    busy: float
