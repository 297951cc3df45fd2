"""The reference engine: one replica, step by step, in plain Python on SimPy.

Written from docs/engine-rules.md and docs/engine-scheduling.md to be read, not to be fast; the comments name the rule a
line carries out. It shares nothing with the compiled engine but the records of :mod:`simulator.engine.records`, and is its
oracle.

SimPy is the clock. What happens at one instant is ordered by the priority of its event (R2, L2): a step takes effect,
then clients leave, then arrivals join, then the next step is scheduled.
"""

from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from heapq import heappush
from itertools import pairwise
from math import ceil, floor, inf, isnan, nan
from typing import Any

import numpy as np
import simpy
from numpy.typing import NDArray
from simpy.events import EventPriority

from simulator.engine.records import (
    CANCELLED,
    FINISHED,
    ITL_BINS,
    NOT_ARRIVED,
    REJECTED,
    RUNNING,
    TIMED_OUT,
    WAITING,
    EngineResult,
    EngineSettings,
    Requests,
    cache_hashes,
    check_columns,
    itl_bin,
)
from simulator.engine.reference_cache import Block, BlockPool, RadixPool
from simulator.engine.reference_queue import Queue
from simulator.engine.reference_speculation import Speculator
from simulator.engine.reference_swap import HostPool
from simulator.engine.reference_tiers import TierStack
from simulator.errors import InputError
from simulator.roofline.speculation import with_drafter
from simulator.roofline.step_cost import StepCost, window_keys

STEP_ENDS, LEAVING, ARRIVAL, STEP_STARTS = EventPriority(0), EventPriority(1), EventPriority(2), EventPriority(3)

Process = Generator[simpy.Event, Any, None]


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
    rank: float = 0.0
    """What its policy orders by, before the ticket (Q1)."""
    tenant: int = 0
    ticket: int = -1
    put_back: int = 0
    """Which put back into the queue it was (Q1); 0: none in this attempt."""
    leaving: int = 0
    """What its status will be at the end of the step in progress, because its client has left (L3); 0: it has not."""
    status: int = NOT_ARRIVED
    computed: int = 0
    emitted: int = 0
    blocks: int = 0
    seen: int = 0
    """Largest ``computed`` it ever had (R12)."""
    start: int = 0
    """``computed`` when it was last admitted (C8)."""
    reused_tokens: int = 0
    saved: int = 0
    """Tokens whose blocks are in host memory (E1)."""
    swap_s: float = 0.0
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

    @property
    def known(self) -> int:
        """Tokens known: the prompt and the output so far."""
        return self.prompt_tokens + self.emitted

    @property
    def in_prefill(self) -> bool:
        """Whether its tokens of a step are a chunk, not a decode token."""
        return self.must_emit or self.known - self.computed > 1


@dataclass(frozen=True)
class StepRecord:
    """One step, as it was scheduled: what ``on_step`` gets, at the step's start.

    ``host_s`` is what the host adds to the device's time. ``scheduled`` maps rows to tokens; ``computed`` (before the step) and ``blocks`` (for the step) cover all running rows,
    in the order of admission. ``preempted`` rows are in the order of preemption, ``waiting`` in the order of the queue.
    """

    start_s: float
    end_s: float
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
    host_s: float
    scheduled: dict[int, int]
    computed: dict[int, int]
    blocks: dict[int, int]
    free_blocks: int
    admitted: tuple[int, ...]
    preempted: tuple[int, ...]
    waiting: tuple[int, ...]
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


@dataclass
class Plan:
    """A step in the making: the tokens of each request, and what is left of the budget."""

    budget: int
    batch: dict[Request, int] = field(default_factory=dict)
    preempted: list[Request] = field(default_factory=list)
    admitted: list[Request] = field(default_factory=list)


@dataclass
class Replica:
    """One replica: ``advance`` moves it through simulated time, ``result`` reads it."""

    cost: StepCost
    settings: EngineSettings
    requests: Requests
    on_step: Callable[[StepRecord], None] | None = None
    acceptance_seed: int | None = None
    """With speculation: draw every pass's accepted drafts, instead of the deterministic progress of P3."""

    clock: Clock = field(default_factory=Clock)
    rows: list[Request] = field(default_factory=list)
    running: list[Request] = field(default_factory=list)
    waiting: Queue = field(init=False)
    free_blocks: int = 0
    pool: BlockPool | None = None
    """The blocks one by one, where a prefix cache must tell them apart."""
    tiers: TierStack | None = None
    loading: list[Request] = field(default_factory=list)
    """Who waits for a load (F5)."""
    swapped: HostPool | None = None
    """Host memory for preempted requests, where there is some."""
    unreleased: int = 0
    """First row of a closed loop that nobody has asked for yet."""
    work: simpy.Event | None = None
    """What an idle replica waits for."""
    at_work: float = 0.0
    """Share of the replica at work now: 1 during a step, unless parts of it wait for each other."""
    in_step: bool = False
    step_end_s: float = 0.0
    is_open: bool = True
    """Whether a static batch is being formed (B4)."""
    arrived: int = 0
    finished: int = 0
    rejected: int = 0
    left: int = 0
    """Requests whose latest attempt timed out or was cancelled."""
    steps_by_tokens: list[int] = field(default_factory=list)
    steps_by_rows: list[int] = field(default_factory=list)
    itl_s: list[float] = field(default_factory=list)
    """Every inter-token latency, in the order of emission."""
    preempted_s: list[float] = field(default_factory=list)
    """When each preemption happened."""
    totals: dict[str, float] = field(default_factory=dict)
    pieces: list[Piece] = field(default_factory=list)
    speculator: Speculator | None = None

    def __post_init__(self) -> None:
        """Fill the rows and start the processes."""
        settings = self.settings
        if self.cost.max_tokens < settings.max_num_batched_tokens or self.cost.max_rows < settings.max_rows:
            raise InputError(
                f"StepCost covers {self.cost.max_tokens} tokens and {self.cost.max_rows} rows; engine settings ask for "
                f"max_num_batched_tokens = {settings.max_num_batched_tokens}, max_num_seqs = {settings.max_num_seqs}, "
                f"{settings.max_rows} rows"
            )
        check_columns(settings, self.requests)
        if settings.speculation is not None:
            self.cost = with_drafter(self.cost, settings.speculation.cost)
            self.speculator = Speculator(settings.speculation, self.cost, settings, self.requests, self.acceptance_seed)
        names = ("prompt_tokens", "output_tokens", "cached_tokens", "max_tokens")
        columns = [getattr(self.requests, name).tolist() for name in names]
        self.rows = [Request(row, *lengths) for row, lengths in enumerate(zip(*columns, strict=True))]
        for request in self.rows:
            request.rank = self.column({"priority": "priority", "sjf": "predicted_tokens"}, request.row, 0.0)
            request.tenant = int(self.column({"fair": "tenant"}, request.row, 0))
        self.waiting = Queue(settings.scheduling)
        self.free_blocks = settings.num_kv_blocks
        hashes = cache_hashes(settings, self.requests)
        if hashes is not None:
            pool = RadixPool if settings.prefix_cache == "radix" else BlockPool
            self.pool = pool(settings.num_kv_blocks, hashes)
            if settings.tiers:
                self.tiers = self.pool.tiers = TierStack(settings.tiers)
        if settings.swap is not None:
            self.swapped = HostPool(settings.swap)
        self.steps_by_tokens = [0] * (settings.max_num_batched_tokens + 1)
        self.steps_by_rows = [0] * (settings.max_rows + 1)
        counts = ("steps", "dense_tokens", "decode_tokens", "decode_keys", "prefill_pairs", "prefill_keys", "chunks")
        windowed = ("window_decode_keys", "window_prefill_pairs", "window_prefill_keys")
        more = ("rows", "preemptions", "recomputed_tokens", "segments", "max_running", "max_waiting", "max_kv_blocks")
        clients = ("timeouts", "cancellations", "retries", "abandoned_tokens", "abandoned_outputs")
        self.totals = dict.fromkeys(counts + windowed + more + clients, 0) | dict.fromkeys(
            ("decode_attention_s", "prefill_attention_s", "host_s"), 0.0
        )
        self.start()

    def start(self) -> None:
        """Let the first arrivals come and the steps begin."""
        for _ in range(self.requests.concurrency or len(self.rows)):
            self.release(0.0)
        self.clock.process(self.serve())

    def advance(self, until_s: float = inf) -> None:
        """Let everything up to and including ``until_s`` happen."""
        while self.clock.peek() <= until_s and self.clock.peek() < inf:
            self.clock.step()

    # Arrivals

    def column(self, by_policy: dict[str, str], row: int, default: float) -> float:
        """Entry of the column that the policy reads, or the default."""
        name = by_policy.get(self.settings.scheduling.policy)
        return float(getattr(self.requests, name)[row]) if name is not None else default

    def release(self, now_s: float) -> None:
        """Let the next row arrive, ``arrival_s`` from now (R3); an open loop releases all rows at time 0."""
        if self.unreleased < len(self.rows):
            request = self.rows[self.unreleased]
            self.unreleased += 1
            request.arrival_s = now_s + float(self.requests.arrival_s[request.row])
            self.clock.process(self.client(request, request.arrival_s))

    def client(self, request: Request, arrival_s: float) -> Process:
        """Process of one client: arrive, join or be rejected; give up, perhaps, and try again (L1 to L5)."""
        while True:
            yield Moment(self.clock, arrival_s + self.settings.host.request_s, ARRIVAL, request.row)  # H2
            self.close_piece()
            if not self.join(request, arrival_s):
                break
            status = yield from self.give_up(request)
            if status is None:
                return
            due_s, noticed_s = self.clock.now, self.clock.now
            self.close_piece()
            if request.status == RUNNING and self.in_step:  # L3
                request.leaving, noticed_s = status, self.step_end_s
            else:
                if request.status == RUNNING:
                    self.running.remove(request)
                else:
                    self.waiting.leave(request)
                self.end_attempt(request, status)
            if status == CANCELLED or request.attempts == self.settings.retries.max_attempts:
                break
            arrival_s = max(due_s + float(self.settings.retries.waits_s()[request.attempts - 1]), noticed_s)  # L5
        if self.requests.concurrency:
            self.release(self.clock.now)

    def join(self, request: Request, arrival_s: float) -> bool:
        """Let an attempt join the queue, or reject it (R4); return whether it joined."""
        scheduling, settings = self.settings.scheduling, self.settings
        if request.attempts:
            self.left -= 1
            self.totals["retries"] += 1
        else:
            self.arrived += 1
        request.attempts += 1
        request.attempt_s = arrival_s
        longest = request.prompt_tokens + request.max_tokens
        at_once = request.prompt_tokens if scheduling.batching == "static" else longest - 1
        if (
            0 < settings.max_model_len < longest
            or self.blocks_for(longest - 1 + settings.lookahead) > settings.num_kv_blocks
            or (scheduling.batching != "chunked" and at_once - request.cached_tokens > settings.max_num_batched_tokens)
        ):
            request.status = REJECTED
            self.rejected += 1
            return False
        request.emitted = request.seen = request.reused_tokens = 0
        request.scheduled_s = request.first_token_s = request.last_token_s = nan
        if scheduling.policy == "edf" and self.requests.deadline_s is not None:
            request.rank = arrival_s + float(self.requests.deadline_s[request.row])
        request.status = WAITING
        self.enqueue(request)
        if self.work is not None and not self.work.triggered:
            self.work.succeed()
        return True

    def give_up(self, request: Request) -> Generator[simpy.Event, Any, int | None]:
        """Wait until the client of an attempt leaves; return the status it leaves with, None if it is served (L1)."""
        dues = []
        for name, status in (("ttft_timeout_s", TIMED_OUT), ("timeout_s", TIMED_OUT), ("cancel_s", CANCELLED)):
            column = getattr(self.requests, name)
            if column is not None and column[request.row] < inf:
                dues.append((request.attempt_s + float(column[request.row]), status, name))
        for due_s, status, name in sorted(dues):
            yield Moment(self.clock, due_s, LEAVING, request.row)
            if request.status not in {WAITING, RUNNING}:
                return None
            if name != "ttft_timeout_s" or not request.emitted:
                self.totals["timeouts" if status == TIMED_OUT else "cancellations"] += 1
                return status
        return None

    def end_attempt(self, request: Request, status: int) -> None:
        """Let a request out of the replica whose client has left, and count what it cost (L3, L6)."""
        self.totals["abandoned_tokens"] += max(0, request.seen - request.cached_tokens)
        self.totals["abandoned_outputs"] += request.emitted
        self.free(request)
        request.computed = request.leaving = 0
        request.wasted_s = request.busy_s
        request.status = status
        self.left += 1

    def enqueue(self, request: Request) -> None:
        """Put an accepted arrival into the queue."""
        self.waiting.join(request)

    # Steps

    def serve(self) -> Process:
        """Process of the replica: step after step, idle when nobody runs or waits (R1)."""
        while True:
            if not self.running and not self.waiting:
                self.work = self.clock.event()
                yield self.work
                self.work = None
            yield Moment(self.clock, self.clock.now, STEP_STARTS)
            if not self.running and not self.waiting:  # whoever waited has left in this instant
                continue
            self.close_piece()
            batch, record = self.schedule()
            if record is None:  # all who waited load
                continue
            self.in_step, self.step_end_s = True, record.end_s
            self.at_work = 1.0
            if self.on_step is not None:
                self.on_step(record)
            yield Moment(self.clock, record.end_s, STEP_ENDS)
            self.close_piece()
            self.in_step, self.at_work = False, 0.0
            self.charge(batch, record)
            self.take_effect(batch)

    def blocks_for(self, tokens: int) -> int:
        """Return the blocks that hold ``tokens`` tokens."""
        return -(-tokens // self.settings.block_size)

    def preempt(self, request: Request, plan: Plan) -> None:
        """Free a running request's blocks and let it wait again (R6, Q2)."""
        self.running.remove(request)
        plan.budget += plan.batch.pop(request, 0)
        plan.preempted.append(request)
        if self.swapped is not None and self.swapped.copy_out(request.row, request.blocks):
            request.saved = request.computed
        self.free(request)
        request.computed = 0
        request.status = WAITING
        request.preemptions += 1
        self.waiting.join_again(request)

    def grow(self, request: Request, tokens: int, computed: int | None = None) -> None:
        """Let a request own the blocks of ``tokens`` tokens, of which the step is sure to compute ``computed`` (all, if None)."""
        missing = self.blocks_for(tokens) - request.blocks
        request.blocks += missing
        self.free_blocks -= missing
        if self.pool is not None:
            self.pool.take(request.row, missing)
            self.pool.publish(request.row, (tokens if computed is None else computed) // self.settings.block_size)

    def free(self, request: Request) -> None:
        """Take all blocks from a request."""
        if self.pool is None:
            self.free_blocks += request.blocks
        else:
            if self.speculator is not None:  # P6
                self.pool.publish(request.row, request.computed // self.settings.block_size)
            self.pool.release(request.row)
            self.free_blocks = self.pool.free
        request.blocks = 0

    def publish_at_end(self, request: Request) -> None:
        """Let what a request has computed be found from now on, if it could not be yet (D2)."""
        if self.pool is not None:
            self.pool.publish_at_end(request.row, request.computed // self.settings.block_size)
            self.free_blocks = self.pool.free

    def admit_to_blocks(self, request: Request, hits: list[Block]) -> None:
        """Let an admitted request own what it found in the prefix cache (C6, C8)."""
        request.reused_tokens += max(0, request.start - request.seen)
        if self.pool is not None:
            self.pool.share(request.row, hits)
            self.pool.count_admission(request.known, max(len(hits) * self.settings.block_size, request.loaded))
            self.free_blocks = self.pool.free
        request.blocks = len(hits)

    def speculates(self, request: Request) -> bool:
        """Whether a running request's step is a pass of speculative decoding."""
        return self.speculator is not None and not request.in_prefill

    def wants(self, request: Request, budget: int) -> tuple[int, int]:
        """Tokens a running request wants of the step, and the tokens its blocks must then hold (R5, P2)."""
        if self.speculator is not None and not request.in_prefill:
            return self.speculator.queries, self.speculator.slots(request)
        wanted = min(request.known - request.computed, budget, self.longest_chunk)
        return wanted, request.computed + wanted

    def context(self, request: Request) -> float:
        """Keys that a decoding request's last token sees (R9, P4)."""
        return request.computed + 1 if self.speculator is None else self.speculator.context(request)

    def seen(self, request: Request) -> float:
        """As :meth:`context`, in the windowed layers."""
        if not self.cost.window or self.speculator is None:
            return self.keys_in_window(request.computed + 1)
        return self.speculator.seen(request)

    def logit_rows(self, request: Request, tokens: int) -> int:
        """Logit rows of a scheduled request: a decoding one has one per token, a chunk one if it completes (R9, P4)."""
        return int(request.computed + tokens == request.known) if request.in_prefill else tokens

    def keys_in_window(self, context: int) -> int:
        """Keys that the query at ``context`` sees in the windowed layers (R9)."""
        return int(window_keys(context, self.cost.window, chunked=self.cost.window_chunked))

    def chunk_work(self, past: int, tokens: int) -> tuple[int, int, int, int, int]:
        """Return what a chunk of ``tokens`` on ``past`` earlier ones adds to A, K, P, AW and KW (R9)."""
        stop, window = past + tokens, self.cost.window
        if not window:
            return pairs(past, tokens), stop, 1, 0, 0
        window_pairs = sum(self.keys_in_window(context) for context in range(past + 1, stop + 1))
        keys = past % window + tokens if self.cost.window_chunked else min(stop, tokens + window - 1)
        return pairs(past, tokens), stop, 1, window_pairs, keys

    def goes_loading(self, request: Request, hits: int) -> bool:
        """Ask the tiers for what follows the hits of the first in the queue; return whether it leaves to load it (F3 to F5)."""
        if self.tiers is None or self.pool is None or not request.asks:
            return False
        now_s, bs, budget = self.clock.now, self.settings.block_size, self.settings.max_num_batched_tokens
        first = max(hits, request.cached_tokens // bs)
        run = self.tiers.run(self.pool.ids[request.row][first : (request.known - 1) // bs])
        if not run:
            return False
        tokens = len(run) * bs
        A, K, P, AW, KW = self.chunk_work(first * bs, tokens)
        prefill_s = tokens * float(self.cost.dense_s[budget]) / budget + self.cost.prefill_attention_s(A, K, P, AW, KW)
        request.asks = False
        ready_s = self.tiers.ready_s(run, now_s)
        policy = self.settings.load_policy
        if policy == "never" or (policy == "cheaper" and ready_s - now_s >= prefill_s):  # F4
            self.tiers.counts["loads_declined"] += 1
            return False
        self.tiers.load(run, now_s)
        request.loaded = first * bs + tokens
        request.load_start_s, request.load_end_s = now_s, ready_s
        request.returned_s = ready_s
        self.waiting.leave(request)
        self.loading.append(request)
        self.clock.process(self.load(request))
        return True

    def load(self, request: Request) -> Process:
        """Process of one load: when it is there, the request comes back to the queue (F5)."""
        yield Moment(self.clock, request.load_end_s, ARRIVAL)
        self.close_piece()
        self.loading.remove(request)
        self.waiting.come_back(request)
        if self.work is not None and not self.work.triggered:
            self.work.succeed()

    def go_on(self, plan: Plan) -> None:
        """Give tokens to those who run, decoding requests first (R5, B1)."""
        if self.speculator is not None:
            self.speculator.begin(sum(not request.in_prefill for request in self.running))
        for request in sorted(self.running, key=lambda request: request.in_prefill):
            if not plan.budget:
                break
            if request.status != RUNNING:
                continue
            wanted, held = self.wants(request, plan.budget)
            while self.free_blocks < self.blocks_for(held) - request.blocks:
                victim = self.waiting.victim(self.running)
                self.preempt(victim, plan)
                if victim is request:
                    break
            if request.status != RUNNING:  # it had to preempt itself
                continue
            self.grow(request, held, computed=0 if self.speculates(request) else held)
            plan.batch[request] = wanted
            plan.budget -= wanted

    @property
    def longest_chunk(self) -> int:
        """Tokens of one prompt in a step at most (B5)."""
        return self.settings.scheduling.long_prefill_token_threshold or self.settings.max_num_batched_tokens

    def fits(self, request: Request, tokens: int, held: int) -> bool:
        """Whether there is a seat, and blocks for the first ``tokens`` tokens, for the first of the queue (R7, B4, B7).

        ``held`` blocks of them are in use already (C6).
        """
        settings = self.settings
        if len(self.running) == settings.max_num_seqs:
            return False
        if settings.scheduling.batching == "static":
            reserved = [self.blocks_for(one.prompt_tokens + one.max_tokens - 1) for one in (*self.running, request)]
            return sum(reserved) <= settings.num_kv_blocks
        margin = floor(settings.scheduling.watermark * settings.num_kv_blocks) if self.running else 0
        if settings.scheduler_reserve_full_isl:
            tokens = request.known
        return self.blocks_for(tokens) - held + margin <= self.free_blocks

    def is_unfinished(self, request: Request, plan: Plan) -> bool:
        """Whether part of a running request's prompt is left after this step (B6)."""
        return request.in_prefill and request.computed + plan.batch.get(request, 0) < request.known

    def admit(self, plan: Plan) -> None:
        """Take requests from the queue (R7)."""
        scheduling = self.settings.scheduling
        while plan.budget and self.waiting:
            request = self.waiting.first()
            if request in plan.preempted:  # Q3
                return
            longest = (request.known - 1) // self.settings.block_size
            hits = self.pool.lookup(request.row, longest) if self.pool is not None else []  # C5
            if len(self.running) < self.settings.max_num_seqs and self.goes_loading(request, len(hits)):
                continue
            start = max(len(hits) * self.settings.block_size, request.cached_tokens, request.loaded)
            computed = max(start, request.saved)  # E2
            rest = request.known - computed
            chunk = min(rest, plan.budget, self.longest_chunk)
            if chunk < rest:
                unfinished = sum(self.is_unfinished(one, plan) for one in self.running)
                limit = scheduling.max_num_partial_prefills
                if scheduling.batching != "chunked" or 0 < limit <= unfinished:  # B2, B6
                    return
            if not self.fits(request, computed + chunk, sum(block.owners > 0 for block in hits)):
                victim = self.waiting.lower_victim(request, self.running)
                if victim is None:
                    return
                self.preempt(victim, plan)
                continue
            self.waiting.take(request, is_new=isnan(request.scheduled_s))
            self.running.append(request)
            request.status = RUNNING
            request.must_emit = True
            request.start, request.computed = start, computed
            self.admit_to_blocks(request, hits)
            request.asks, request.loaded = False, 0
            if self.swapped is not None and request.saved:
                self.swapped.copy_in(request.row, len(hits))
                request.saved = 0
            self.grow(request, computed + chunk)
            plan.batch[request] = chunk
            plan.budget -= chunk
            plan.admitted.append(request)
            if isnan(request.scheduled_s):
                request.scheduled_s = self.clock.now

    def choose(self) -> Plan:
        """Choose the tokens of the step that starts now (R5 to R8, B1 to B4)."""
        plan = Plan(self.settings.max_num_batched_tokens)
        if self.settings.scheduling.batching in {"chunked", "orca"}:
            self.go_on(plan)
            if not plan.preempted:
                self.admit(plan)
            return plan
        is_static = self.settings.scheduling.batching == "static"
        self.is_open = self.is_open or not self.running
        if self.is_open or not is_static:
            self.admit(plan)
        if not plan.batch:
            self.is_open = False
            self.go_on(plan)
        return plan

    def host_s(self, n: int, sequences: int, device_s: float) -> float:
        """Time by which the host makes a step longer (H1). [s]"""
        host = self.settings.host
        work_s = host.step_s + host.sequence_s * sequences + host.token_s * n
        return max(0.0, work_s - device_s) if host.asynchronous else work_s

    def schedule(self) -> tuple[dict[Request, int], StepRecord | None]:
        """Choose the tokens of the step that starts now; return them and what they cost (R9, H1).

        No record if there is nothing to do, since all who waited went to load (F5).
        """
        now_s = self.clock.now
        plan = self.choose()
        batch, preempted, admitted = plan.batch, plan.preempted, plan.admitted
        if not batch:
            return batch, None
        for request, tokens in batch.items():
            if request.computed + tokens == request.known:
                self.waiting.count_output(request)
        decodes = [request for request in batch if not request.in_prefill]
        chunks = [self.chunk_work(one.computed, tokens) for one, tokens in batch.items() if one.in_prefill]
        work: dict[str, Any] = {
            "n": sum(batch.values()),
            "B": len(decodes),
            "S": sum(self.context(request) for request in decodes),
            **{name: sum(chunk[i] for chunk in chunks) for i, name in enumerate(("A", "K", "P", "AW", "KW"))},
            "R": sum(self.logit_rows(request, tokens) for request, tokens in batch.items()),
            "SW": sum(self.seen(request) for request in decodes),
        }
        self.totals["preemptions"] += len(preempted)
        self.preempted_s += [now_s] * len(preempted)
        used = self.settings.num_kv_blocks - self.free_blocks
        waiting = len(self.waiting) + len(self.loading)
        peaks = {"max_running": len(self.running), "max_waiting": waiting, "max_kv_blocks": used}
        for name, value in peaks.items():
            self.totals[name] = max(self.totals[name], value)
        device_s = self.step_s(work)
        if self.swapped is not None:  # E3, E4
            for row, share_s in self.swapped.end_copies(device_s).items():
                self.rows[row].busy_s += share_s
                self.rows[row].swap_s += share_s
            device_s += self.swapped.delay_s
        host_s = self.host_s(work["n"], len(batch), device_s)
        record = StepRecord(
            start_s=now_s,
            end_s=now_s + (device_s + host_s),
            **work,
            host_s=host_s,
            scheduled={request.row: tokens for request, tokens in batch.items()},
            computed={request.row: request.computed for request in self.running},
            blocks={request.row: request.blocks for request in self.running},
            free_blocks=self.free_blocks,
            admitted=tuple(request.row for request in admitted),
            preempted=tuple(request.row for request in preempted),
            waiting=tuple(request.row for request in self.waiting),
            arrived=self.arrived,
            finished=self.finished,
            rejected=self.rejected,
            left=self.left,
        )
        return batch, record

    def step_s(self, work: dict[str, Any]) -> float:
        """Time of a step (R9, P4)."""
        if self.speculator is None:
            return self.cost.step_s(**work)
        without = work | {"B": 0, "S": 0, "SW": 0}
        decodes_s = self.speculator.decode_s(work["B"], work["S"], work["SW"])
        chunk_tokens = work["n"] - self.speculator.queries * work["B"]
        return self.cost.step_s(**without) + decodes_s + self.speculator.chunk_s(chunk_tokens)

    def charge(self, batch: dict[Request, int], step: StepRecord) -> None:
        """Split a step's time among its requests (R11, R12) and count it. Before ``computed`` grows."""
        again = self.split_time(self.cost, float(self.cost.dense_s[step.n]) + step.host_s, batch, step)
        self.totals["recomputed_tokens"] += again
        self.count(step)

    def split_time(self, cost: StepCost, dense_s: float, batch: dict[Request, int], step: StepRecord) -> int:
        """Let requests pay their shares of a step with these tables, its dense layers ``dense_s`` long, host included.

        Returns the tokens computed again.
        """
        recomputed = 0
        dense_per_token_s = dense_s / step.n
        head_per_row_s = float(cost.head_s[step.R]) / step.R if step.R else 0.0
        piece = max(j for j, knot in enumerate(cost.decode_knots) if knot <= step.S)
        slope_s = float(cost.decode_slope_s[piece])
        intercept_s = float(cost.decode_value_s[piece]) - slope_s * float(cost.decode_knots[piece])
        planes = [[float(entry) for entry in plane] for plane in cost.prefill_planes]
        plane = max(planes, key=lambda plane: dot(plane, (step.A, step.K, step.P, step.AW, step.KW)))
        per_key_s = plane[1]
        chunk_tokens = sum(tokens for request, tokens in batch.items() if request.in_prefill)
        chunk_s = self.speculator.chunk_s(chunk_tokens) / chunk_tokens if self.speculator and chunk_tokens else 0.0
        if self.speculator is not None:
            self.speculator.count(step.B, step.S, step.SW, chunk_tokens)
        for request, tokens in batch.items():
            start, stop = request.computed, request.computed + tokens
            if self.speculator is not None and not request.in_prefill:
                request.busy_s += self.speculator.share(request, step.B, step.S, dense_per_token_s, head_per_row_s)
                continue
            share_s = dense_per_token_s * tokens
            if stop == request.known:
                share_s += head_per_row_s
            if request.in_prefill:
                share_s += chunk_s * tokens
                share_s += dot(plane, self.chunk_work(start, tokens))
                again = max(0, min(stop, request.seen) - start)
                request.busy_prefill_s += share_s
                request.busy_cached_s += per_key_s * request.start
                request.recompute_s += share_s * again / tokens
                recomputed += again
            else:
                share_s += slope_s * (start + 1) + intercept_s / step.B + cost.decode_seq_s
                share_s += cost.window_slope_s * self.keys_in_window(start + 1)
            request.busy_s += share_s
        return recomputed

    def count(self, step: StepRecord) -> None:
        """Add a step to the totals."""
        cost = self.cost
        decode_s = cost.decode_attention_s(step.S) + cost.window_slope_s * step.SW + cost.decode_seq_s * step.B
        if self.speculator is not None:
            decode_s = self.speculator.decode_s(step.B, step.S, step.SW) - self.speculator.draft_s(step.B, step.S)
        self.steps_by_tokens[step.n] += 1
        self.steps_by_rows[step.R] += 1
        sums = {
            "steps": 1,
            "segments": 1,
            "dense_tokens": step.n,
            "decode_tokens": step.B,
            "decode_keys": step.S,
            "prefill_pairs": step.A,
            "prefill_keys": step.K,
            "window_decode_keys": step.SW,
            "window_prefill_pairs": step.AW,
            "window_prefill_keys": step.KW,
            "chunks": step.P,
            "rows": step.R,
            "decode_attention_s": decode_s if step.B else 0.0,
            "host_s": step.host_s,
            "prefill_attention_s": cost.prefill_attention_s(step.A, step.K, step.P, step.AW, step.KW),
        }
        for name, value in sums.items():
            self.totals[name] += value

    def take_effect(self, batch: dict[Request, int]) -> None:
        """End the step: tokens are emitted, requests leave or finish, blocks are freed, rows released (R10, L3, R3)."""
        now_s = self.clock.now
        output_s = self.settings.host.output_s  # H3
        for request, tokens in batch.items():
            is_chunk, emits = request.in_prefill, 1
            if self.speculator is not None and not is_chunk:
                emits = self.speculator.take(request)
            request.computed += tokens if is_chunk else emits
            if is_chunk:
                self.publish_at_end(request)
            request.seen = max(request.seen, request.computed)
            if request.computed < request.known:
                continue
            if self.speculator is not None and is_chunk:
                self.speculator.first(request)
            request.emitted += emits
            request.must_emit = False
            if request.emitted == 1:
                request.first_token_s = now_s + output_s
            else:
                self.itl_s.append(now_s - request.last_token_s)
            request.last_token_s = now_s
        for request in [request for request in self.running if request.leaving]:
            self.running.remove(request)
            self.end_attempt(request, request.leaving)
        done = [one for one in batch if one.status == RUNNING and one.emitted == one.output_tokens]
        for request in done:
            self.running.remove(request)
            self.publish_at_end(request)
            self.free(request)
            request.status = FINISHED
            request.finish_s = now_s + output_s
            self.finished += 1
            if self.requests.concurrency:
                self.release(now_s + output_s)

    # Reading

    def close_piece(self) -> None:
        """Note the state since the last event; called by each event before it changes anything."""
        start_s = self.pieces[-1].end_s if self.pieces else 0.0
        if self.clock.now > start_s:
            used = self.settings.num_kv_blocks - self.free_blocks
            waiting = len(self.waiting) + len(self.loading)
            self.pieces.append(Piece(start_s, self.clock.now, len(self.running), waiting, used, self.at_work))

    def result(self, timeline_interval_s: float | None = None) -> EngineResult:
        """Result of a run that came to its end, with a timeline if asked for one."""

        def column(name: str, dtype: type = np.float64) -> NDArray[Any]:
            return np.array([getattr(request, name) for request in self.rows], dtype=dtype)

        itl_counts = np.zeros(ITL_BINS, dtype=np.int64)
        for value_s in self.itl_s:
            itl_counts[itl_bin(value_s)] += 1
        integrals = {
            name + "_s": sum((getattr(piece, name) * (piece.end_s - piece.start_s) for piece in self.pieces), start=0.0)
            for name in ("running", "waiting", "kv_blocks")
        }
        speculation = None if self.speculator is None else self.speculator.result()
        if speculation is not None:
            self.totals["draft_s"] = speculation.draft_s
        return EngineResult(
            status=column("status", np.int8),
            arrival_s=column("arrival_s"),
            scheduled_s=column("scheduled_s"),
            first_token_s=column("first_token_s"),
            finish_s=column("finish_s"),
            preemptions=column("preemptions", np.int32),
            busy_s=column("busy_s"),
            busy_prefill_s=column("busy_prefill_s"),
            busy_cached_s=column("busy_cached_s"),
            recompute_s=column("recompute_s"),
            reused_tokens=column("reused_tokens", np.int64),
            attempts=column("attempts", np.int32),
            wasted_s=column("wasted_s"),
            swap_s=column("swap_s"),
            load_start_s=column("load_start_s"),
            load_end_s=column("load_end_s"),
            idle_s=sum(((1 - piece.busy) * (piece.end_s - piece.start_s) for piece in self.pieces), start=0.0),
            end_s=self.pieces[-1].end_s if self.pieces else 0.0,
            steps_by_tokens=np.array(self.steps_by_tokens, dtype=np.int64),
            steps_by_rows=np.array(self.steps_by_rows, dtype=np.int64),
            itl_counts=itl_counts,
            itl_max_s=max(self.itl_s, default=0.0),
            totals=self.totals
            | integrals
            | (self.pool.counts if self.pool is not None else {})
            | (self.swapped.counts if self.swapped is not None else {})
            | (self.tiers.counts if self.tiers is not None else {}),
            timeline=timeline(self.pieces, self.preempted_s, timeline_interval_s) if timeline_interval_s else {},
            timeline_interval_s=timeline_interval_s or 0.0,
            speculation=speculation,
        )


def pairs(past: int, tokens: int) -> int:
    """Count the (query, key) pairs of a chunk of ``tokens`` on ``past`` earlier tokens, its own included.

    >>> pairs(10, 3)  # 11 + 12 + 13
    36
    """
    return tokens * past + tokens * (tokens + 1) // 2


def dot(coefficients: Sequence[float], amounts: Sequence[int]) -> float:
    """Sum of products.

    >>> dot([0.5, 0.25], [3, 4])
    2.5
    """
    return sum((a * b for a, b in zip(coefficients, amounts, strict=True)), start=0.0)


def timeline(pieces: list[Piece], preempted_s: list[float], interval_s: float) -> dict[str, NDArray[np.float64]]:
    """Means of the state over intervals of equal length (R15)."""
    end_s = pieces[-1].end_s if pieces else 0.0
    edges = [i * interval_s for i in range(ceil(end_s / interval_s) + 1)]
    means: dict[str, list[float]] = {"start_s": [], "running": [], "waiting": [], "kv_blocks": [], "busy_fraction": []}
    left = deque(pieces)
    for start_s, stop_s in pairwise(edges):
        sums = dict.fromkeys(("running", "waiting", "kv_blocks", "busy"), 0.0)
        while left and left[0].start_s < stop_s:
            piece = left[0]
            length_s = min(piece.end_s, stop_s) - max(piece.start_s, start_s)
            for name in sums:
                sums[name] += getattr(piece, name) * length_s
            if piece.end_s > stop_s:
                break
            left.popleft()
        means["start_s"].append(start_s)
        for name in ("running", "waiting", "kv_blocks"):
            means[name].append(sums[name] / interval_s)
        means["busy_fraction"].append(sums["busy"] / interval_s)
    counts = np.bincount([int(time_s / interval_s) for time_s in preempted_s], minlength=len(means["start_s"]))
    return {name: np.array(values) for name, values in means.items()} | {"preemptions_per_s": counts / interval_s}


def simulate_reference(
    cost: StepCost,
    settings: EngineSettings,
    requests: Requests,
    *,
    timeline_interval_s: float | None = None,
    on_step: Callable[[StepRecord], None] | None = None,
    acceptance_seed: int | None = None,
) -> EngineResult:
    """Run the requests through one replica until all are finished or rejected.

    ``on_step`` is called with each step's :class:`StepRecord` as the step starts. Times of one step are sums of a
    handful of terms and the clock adds steps one by one, so with all times on a grid of 2**-k s every float is exact.
    ``acceptance_seed`` lets every pass of speculative decoding draw its accepted drafts.
    Cost: some 30 microseconds per request and step; for oracles and debugging.

    Raises
    ------
    InputError
        if the tables of ``cost`` are shorter than the settings allow a step to be.
    """
    replica = Replica(cost, settings, requests, on_step, acceptance_seed)
    replica.advance()
    return replica.result(timeline_interval_s)
