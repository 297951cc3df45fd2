"""The reference engine: one replica, step by step, in plain Python on SimPy.

Written from the rules in docs/engine-*.md to be read, not to be fast; the comments name the rule a line carries out. It shares
nothing with the compiled engine but the records of :mod:`simulator.engine.records`, and is its oracle.

There is one loop for every replica. Each event that may let work begin asks for it; then, as long as no more steps are in progress than
the replica has stages, its schedulers (:mod:`~simulator.engine.reference_scheduler`; one, or one per attention rank) choose a step,
:mod:`~simulator.engine.reference_pricing` says what it takes, and its end takes effect. A plain replica is one rank and one stage. SimPy is the clock;
what happens at one instant is ordered by the priority of its event (M1).
"""

from collections import deque
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from math import ceil, inf
from typing import Any

import numpy as np
import simpy
from numpy.typing import NDArray

from simulator.engine.records import (
    CANCELLED,
    FINISHED,
    ITL_BINS,
    REJECTED,
    RUNNING,
    TIMED_OUT,
    WAITING,
    EngineResult,
    EngineSettings,
    Requests,
    cache_hashes,
    check_columns,
    check_windows,
    itl_bin,
    of_the_whole,
)
from simulator.engine.reference_pricing import Part, Pricing
from simulator.engine.reference_scheduler import Scheduler, new_pool
from simulator.engine.reference_speculation import Speculator
from simulator.engine.reference_state import (
    ARRIVAL,
    LEAVING,
    LOADED,
    STEP_ENDS,
    STEP_STARTS,
    Clock,
    Moment,
    Piece,
    Plan,
    Request,
    StepRecord,
    Work,
)
from simulator.engine.refusals import LASTING, check_mixture
from simulator.errors import InputError
from simulator.roofline.pipeline_cost import PipelineCost
from simulator.roofline.speculation import with_drafter
from simulator.roofline.step_cost import StepCost

Process = Generator[simpy.Event, Any, None]


@dataclass(frozen=True)
class Ride:
    """A request's part in a step: a chunk up to ``stop`` tokens, or a pass of a decoding request."""

    request: Request
    is_chunk: bool
    start: int
    stop: int
    emits: bool


@dataclass(frozen=True)
class Step:
    """What one scheduler has in a step in progress."""

    scheduler: Scheduler
    level: int
    rides: tuple[Ride, ...]
    held: tuple[Request, ...]
    """Who may neither be preempted nor let go before it ends (L3, M21)."""


@dataclass
class Replica:
    """One replica: ``advance`` moves it through simulated time, ``result`` reads it."""

    cost: StepCost | PipelineCost
    settings: EngineSettings
    requests: Requests
    on_step: Callable[[StepRecord], None] | None = None
    """Called with what each scheduler has scheduled, as the step starts."""
    acceptance_seed: int | None = None
    """With speculation: draw every pass's accepted drafts, instead of the deterministic progress of P3."""

    clock: Clock = field(default_factory=Clock)
    rows: list[Request] = field(default_factory=list)
    schedulers: list[Scheduler] = field(default_factory=list)
    speculator: Speculator | None = None
    unreleased: int = 0
    """First row of a closed loop that nobody has asked for yet."""
    asked: bool = False
    """Whether steps will be scheduled at this instant."""
    in_progress: int = 0
    """Steps in progress."""
    n_steps: int = 0
    at_work: list[float] = field(default_factory=list)
    """Shares of the replica at work now: 1 in all during a step, unless parts of it wait for each other."""
    accepted: int = 0
    """Arrivals that joined."""
    arrived: int = 0
    finished: int = 0
    rejected: int = 0
    left: int = 0
    """Requests whose latest attempt timed out or was cancelled."""
    itl_s: list[float] = field(default_factory=list)
    """Every inter-token latency, in the order of emission."""
    preempted_s: list[float] = field(default_factory=list)
    """When each preemption happened."""
    pieces: list[Piece] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Put the parts together and let the first requests arrive."""
        settings, requests = self.settings, self.requests
        check_mixture(self.cost, settings, requests, LASTING)
        check_columns(settings, requests)
        stages = self.cost.stages if isinstance(self.cost, PipelineCost) else (self.cost,)
        total = self.cost.total if isinstance(self.cost, PipelineCost) else self.cost
        check_tables(total, settings)
        check_windows(total, settings)
        if settings.speculation is not None:
            stages = (total,) = (with_drafter(total, settings.speculation.cost),)
            self.speculator = Speculator(settings.speculation, total, settings, requests, self.acceptance_seed)
        self.stages = stages
        self.send_s = self.cost.send_s if isinstance(self.cost, PipelineCost) else np.zeros((0, 0))
        self.free_s = [0.0] * len(stages)
        self.pricing = Pricing(total, stages, settings, self.speculator)
        self.totals = self.pricing.totals
        self.has_parts = total.ranks * len(stages) > 1 or settings.expert_skew.on
        if self.has_parts:
            self.totals |= {"padding_s": 0.0, "imbalance_s": 0.0}
        self.rows = list(map(self.new_request, range(len(requests))))
        hashes = cache_hashes(settings, requests)
        for rank in range(total.ranks):
            pool = new_pool(settings, hashes)
            scheduler = Scheduler(rank, total, settings, self.clock, pool, self.speculator, self.begin_load)
            scheduler.warm(requests)
            self.schedulers.append(scheduler)
        for _ in range(requests.concurrency or len(self.rows)):
            self.release(0.0)

    def new_request(self, row: int) -> Request:
        """A request as it will arrive."""
        stream = self.requests
        lengths = (stream.prompt_tokens, stream.output_tokens, stream.cached_tokens, stream.max_tokens)
        prompt, output, cached, longest = (int(column[row]) for column in lengths)
        request = Request(row, prompt, output, cached, longest)
        policy = self.settings.scheduling.policy
        column = {"priority": stream.priority, "sjf": stream.predicted_tokens}.get(policy)
        request.order = float(column[row]) if column is not None else 0.0
        if policy == "fair" and stream.tenant is not None:
            request.tenant = int(stream.tenant[row])
        return request

    def advance(self, until_s: float = inf) -> None:
        """Let everything up to and including ``until_s`` happen."""
        while self.clock.peek() <= until_s and self.clock.peek() < inf:
            self.clock.step()

    # Clients

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
            due_s, left_s = self.clock.now, self.clock.now
            self.close_piece()
            if request.flights:  # L3, M21
                request.leaving, left_s = status, request.held_until_s
            else:
                self.let_go(request, status)
            self.ask()  # also who is in flight may have kept others from being scheduled (M21, M22)
            if status == CANCELLED or request.attempts == self.settings.retries.max_attempts:
                break
            arrival_s = max(due_s + float(self.settings.retries.waits_s()[request.attempts - 1]), left_s)  # L5
        if self.requests.concurrency:
            self.release(self.clock.now)

    def join(self, request: Request, arrival_s: float) -> bool:
        """Let an attempt join the queue, or reject it (R4); return whether it joined."""
        scheduling = self.settings.scheduling
        if request.attempts:
            self.left -= 1
            self.totals["retries"] += 1
        else:
            self.arrived += 1
        request.begin_attempt(arrival_s)
        if self.speculator is not None:
            self.speculator.begin_attempt(request.row)
        if self.never_fits(request):
            request.status = REJECTED
            self.rejected += 1
            return False
        if scheduling.policy == "edf" and self.requests.deadline_s is not None:
            request.order = arrival_s + float(self.requests.deadline_s[request.row])
        request.status = WAITING
        scheduler = self.route()
        request.rank = scheduler.rank
        scheduler.queue.join(request)
        self.ask()
        return True

    def never_fits(self, request: Request) -> bool:
        """Whether an attempt is rejected (R4, P2, B2 to B4)."""
        settings, batching = self.settings, self.settings.scheduling.batching
        longest = request.prompt_tokens + request.max_tokens
        at_once = request.prompt_tokens if batching == "static" else longest - 1
        return (
            0 < settings.max_model_len < longest
            or self.schedulers[0].most_blocks(longest - 1 + settings.lookahead, 0) > settings.num_kv_blocks
            or (batching != "chunked" and at_once - request.cached_tokens > settings.max_num_batched_tokens)
        )

    def route(self) -> Scheduler:
        """The scheduler that the next accepted arrival joins (G1)."""
        self.accepted += 1
        if self.settings.rank_routing == "least-loaded":
            return min(self.schedulers, key=lambda one: 4 * one.n_waiting + len(one.running))
        return self.schedulers[(self.accepted - 1) % len(self.schedulers)]

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

    def let_go(self, request: Request, status: int) -> None:
        """Let a request out of the replica whose client has left, and count what it cost (L3, L6, M20)."""
        self.pricing.add(
            abandoned_tokens=max(0, request.seen - request.reused_tokens), abandoned_outputs=request.emitted
        )
        self.schedulers[request.rank].let_go(request)
        request.leaving = 0
        request.wasted_s = request.busy_s
        request.status = status
        self.left += 1

    def begin_load(self, request: Request) -> None:
        """Let a load take its time."""
        self.clock.process(self.load(request, request.attempts))

    def load(self, request: Request, attempt: int) -> Process:
        """Process of one load: when it is there, the request comes back to the queue, unless its client has left (F5, M12)."""
        yield Moment(self.clock, request.load_end_s, LOADED, request.row)
        if request.loading and request.attempts == attempt:
            self.close_piece()
            self.schedulers[request.rank].has_loaded(request)
            self.ask()

    # Steps

    def ask(self) -> None:
        """Schedule at this instant, after all that happens before (R1, M1, S4)."""
        if not self.asked:
            self.asked = True
            self.clock.process(self.fill())

    def fill(self) -> Process:
        """Schedule steps until as many as there are stages are in progress, or nothing changes any more (S4, M3)."""
        yield Moment(self.clock, self.clock.now, STEP_STARTS)
        self.asked = False
        self.close_piece()
        while self.in_progress < len(self.stages):
            able = [scheduler for scheduler in self.schedulers if scheduler.running or scheduler.queue]
            plans = [(scheduler, scheduler.choose()) for scheduler in able]
            preempted = sum(len(plan.preempted) for _, plan in plans)
            self.totals["preemptions"] += preempted
            self.preempted_s += [self.clock.now] * preempted
            with_tokens = [(scheduler, plan) for scheduler, plan in plans if plan.batch]
            if with_tokens:
                self.launch(with_tokens)
            elif not preempted:
                break

    def launch(self, plans: list[tuple[Scheduler, Plan]]) -> None:
        """Send a step on its way through the stages (G3, S5); its requests pay (G4, S6), and its prompts advance (S2)."""
        pricing, now_s = self.pricing, self.clock.now
        works = [pricing.work_of(plan) for _, plan in plans]
        width = max(work.n for work in works)
        first, ready_s = self.pass_stage(0, plans, works, width, now_s)
        for stage in range(1, len(self.stages)):
            sent_s = ready_s + float(self.send_s[stage - 1, width])
            _, ready_s = self.pass_stage(stage, plans, works, width, sent_s)
        self.note_peaks()
        for (scheduler, plan), work, part in zip(plans, works, first, strict=True):
            pricing.count(plan, work)
            if scheduler.host is not None:
                scheduler.host.copies.clear()
            if self.on_step is not None:
                self.on_step(self.record(scheduler, plan, work, part, ready_s))
        pricing.count_idle_ranks(len(self.schedulers) - len(plans))
        self.n_steps += 1
        self.in_progress += 1
        steps = [self.begin(scheduler, plan, ready_s) for scheduler, plan in plans]
        self.clock.process(self.complete(steps, ready_s))

    def pass_stage(
        self, stage: int, plans: list[tuple[Scheduler, Plan]], works: list[Work], width: int, ready_s: float
    ) -> tuple[list[Part], float]:
        """Let a step pass one stage, where it can be from ``ready_s`` on; return what each rank does there, and when it leaves."""
        pricing, cost = self.pricing, self.stages[stage]
        excess_s = pricing.excess_s(cost, self.n_steps, width)
        dense_s = float(cost.dense_s[width]) + excess_s
        parts = [
            pricing.part(stage, dense_s, scheduler.host, plan, work)
            for (scheduler, plan), work in zip(plans, works, strict=True)
        ]
        for (scheduler, plan), work, part in zip(plans, works, parts, strict=True):
            again = pricing.charge(stage, part, plan, work)
            if stage == 0:
                self.totals["recomputed_tokens"] += again
            self.totals["host_s"] += part.host_s
            if self.has_parts:
                self.totals["padding_s"] += float(cost.dense_s[width] - cost.dense_s[work.n])
                self.totals["imbalance_s"] += excess_s
            for row, share_s in scheduler.host.shares(part.copies_s) if scheduler.host is not None else ():
                self.rows[row].busy_s += share_s
                self.rows[row].swap_s += share_s
        longest_s = max(part.time_s for part in parts)
        begin_s = max(ready_s, self.free_s[stage])
        self.free_s[stage] = begin_s + longest_s
        share = sum(part.time_s for part in parts) / (len(self.schedulers) * len(self.stages) * longest_s)
        self.clock.process(self.occupy(begin_s, self.free_s[stage], share))
        return parts, self.free_s[stage]

    def begin(self, scheduler: Scheduler, plan: Plan, end_s: float) -> Step:
        """Let prompts advance (S2), and hold who is in the step, or in a plain replica who runs (L3, M21)."""
        rides = []
        for request, tokens in plan.batch.items():
            is_chunk, start, stop = request.in_prefill, request.computed, request.computed + tokens
            rides.append(Ride(request, is_chunk, start, stop, self.pricing.emits(request, tokens)))
            if is_chunk:
                request.computed = stop
                request.seen = max(request.seen, stop)
        held = tuple(plan.batch if len(self.stages) > 1 else scheduler.running)
        for request in held:
            request.flights += 1
            request.held_until_s = end_s
        return Step(scheduler, plan.level, tuple(rides), held)

    def occupy(self, begin_s: float, end_s: float, share: float) -> Process:
        """Process of a stage at work on one step."""
        yield Moment(self.clock, begin_s, STEP_ENDS)
        self.close_piece()
        self.at_work.append(share)
        yield Moment(self.clock, end_s, STEP_ENDS)
        self.close_piece()
        self.at_work.remove(share)

    def complete(self, steps: list[Step], end_s: float) -> Process:
        """Process of a step in progress: it takes effect at its end (M2)."""
        yield Moment(self.clock, end_s, STEP_ENDS)
        self.close_piece()
        self.in_progress -= 1
        for step in steps:
            for request in step.held:
                request.flights -= 1
            done = [(ride.request, self.end_ride(step, ride)) for ride in step.rides]
            step.scheduler.leave_behind(done)
            for request in [one for one in step.scheduler.running if one.leaving and not one.flights]:
                self.let_go(request, request.leaving)
            for request in [ride.request for ride in step.rides]:
                if request.status == RUNNING and request.emitted == request.output_tokens:
                    self.finish(step.scheduler, request)
        self.ask()

    def end_ride(self, step: Step, ride: Ride) -> int:
        """Compute a request's tokens and emit what they give (R10, P3); return how many it has computed then."""
        request, now_s, emits = ride.request, self.clock.now, 1
        computed = ride.stop
        if ride.is_chunk:
            step.scheduler.chunk_is_there(request, ride.start, ride.stop)
            if ride.emits and self.speculator is not None:
                self.speculator.first(request)
        else:
            emits = 1 if self.speculator is None else self.speculator.take(request, step.level)
            request.computed += emits
            request.seen = max(request.seen, request.computed)
            computed = request.computed
        if not ride.emits:
            return computed
        request.emitted += emits
        request.must_emit = False
        if request.emitted == 1:
            request.first_token_s = now_s + self.settings.host.output_s  # H3
        else:
            self.itl_s.append(now_s - request.last_token_s)
        request.last_token_s = now_s
        return computed

    def finish(self, scheduler: Scheduler, request: Request) -> None:
        """Let a request go that has all its tokens (R10, R3)."""
        scheduler.finish(request)
        request.status = FINISHED
        request.finish_s = self.clock.now + self.settings.host.output_s  # H3
        self.finished += 1
        if self.requests.concurrency:
            self.release(request.finish_s)

    # Reading

    @property
    def n_running(self) -> int:
        """Running requests of all schedulers."""
        return sum(len(scheduler.running) for scheduler in self.schedulers)

    @property
    def n_waiting(self) -> int:
        """Waiting requests of all schedulers."""
        return sum(scheduler.n_waiting for scheduler in self.schedulers)

    @property
    def used_blocks(self) -> int:
        """KV blocks owned on all schedulers."""
        return sum(scheduler.used_blocks for scheduler in self.schedulers)

    def note_peaks(self) -> None:
        """Note peaks, those of the whole replica (R13, G6)."""
        self.pricing.note_peaks(max_running=self.n_running, max_waiting=self.n_waiting, max_kv_blocks=self.used_blocks)

    def close_piece(self) -> None:
        """Note the state since the last event; called by each event before it changes anything."""
        start_s = self.pieces[-1].end_s if self.pieces else 0.0
        if self.clock.now > start_s:
            state = (self.n_running, self.n_waiting, self.used_blocks, sum(self.at_work))
            self.pieces.append(Piece(start_s, self.clock.now, *state))

    def record(self, scheduler: Scheduler, plan: Plan, work: Work, part: Part, end_s: float) -> StepRecord:
        """What a scheduler has scheduled."""
        return StepRecord(
            rank=scheduler.rank,
            start_s=self.clock.now,
            end_s=end_s,
            **asdict(work),
            host_s=part.host_s,
            level=plan.level,
            scheduled={request.row: tokens for request, tokens in plan.batch.items()},
            computed={request.row: request.computed for request in scheduler.running},
            blocks={request.row: scheduler.pool.owned(request.row) for request in scheduler.running},
            free_blocks=scheduler.pool.free,
            admitted=tuple(request.row for request in plan.admitted),
            preempted=tuple(request.row for request in plan.preempted),
            waiting=tuple(request.row for request in scheduler.queue),
            loading=tuple(request.row for request in scheduler.loading),
            arrived=self.arrived,
            finished=self.finished,
            rejected=self.rejected,
            left=self.left,
        )

    def counts(self) -> dict[str, float]:
        """Counts of the schedulers' memories: sums, of the peak of host memory the largest (M20)."""
        found: dict[str, float] = {}
        for scheduler in self.schedulers:
            for part in (scheduler.pool, scheduler.host, scheduler.tiers):
                for name, value in part.counts.items() if part is not None else ():
                    join = max if name == "max_host_blocks" else sum
                    found[name] = join((found.get(name, 0), value))
        return found

    def result(self, timeline_interval_s: float | None = None) -> EngineResult:
        """Result of a run that came to its end, with a timeline if asked for one; times of parts are divided by their number."""

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
        drafting = {} if speculation is None else {"draft_s": speculation.draft_s}
        floats = ("arrival_s", "scheduled_s", "first_token_s", "finish_s", "load_start_s", "load_end_s")
        shares = ("busy_s", "busy_prefill_s", "busy_cached_s", "recompute_s", "wasted_s", "swap_s")
        whole = {"status": np.int8, "preemptions": np.int32, "attempts": np.int32, "reused_tokens": np.int64}
        result = EngineResult(
            **{name: column(name) for name in (*floats, *shares)},
            **{name: column(name, dtype) for name, dtype in whole.items()},
            idle_s=sum(((1 - piece.busy) * (piece.end_s - piece.start_s) for piece in self.pieces), start=0.0),
            end_s=self.pieces[-1].end_s if self.pieces else 0.0,
            steps_by_tokens=np.array(self.pricing.steps_by_tokens, dtype=np.int64),
            steps_by_rows=np.array(self.pricing.steps_by_rows, dtype=np.int64),
            itl_counts=itl_counts,
            itl_max_s=max(self.itl_s, default=0.0),
            totals=self.totals | integrals | drafting | self.counts(),
            timeline=timeline(self.pieces, self.preempted_s, timeline_interval_s) if timeline_interval_s else {},
            timeline_interval_s=timeline_interval_s or 0.0,
            speculation=speculation,
        )
        parts = len(self.schedulers) * len(self.stages)
        return of_the_whole(result, parts) if parts > 1 else result


def check_tables(cost: StepCost, settings: EngineSettings) -> None:
    """Refuse tables that do not reach as far as the settings let a step go.

    Raises
    ------
    InputError
        As said; or for uneven experts of a table without any.
    """
    if cost.max_tokens < settings.max_num_batched_tokens or cost.max_rows < settings.max_rows:
        raise InputError(
            f"StepCost covers {cost.max_tokens} tokens and {cost.max_rows} rows; engine settings ask for "
            f"max_num_batched_tokens = {settings.max_num_batched_tokens}, max_num_seqs = {settings.max_num_seqs}, "
            f"{settings.max_rows} rows"
        )
    if settings.expert_skew.on and not len(cost.expert_s):
        raise InputError(f"engine.expert_skew.mean = {settings.expert_skew.mean}: the table has no routed experts")


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
    cost: StepCost | PipelineCost,
    settings: EngineSettings,
    requests: Requests,
    *,
    timeline_interval_s: float | None = None,
    on_step: Callable[[StepRecord], None] | None = None,
    acceptance_seed: int | None = None,
) -> EngineResult:
    """Run the requests through one replica until all are finished or rejected, or their clients have left.

    ``on_step`` is called with each step's :class:`~simulator.engine.reference_state.StepRecord` as the step starts. Times of one step are sums of a
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
