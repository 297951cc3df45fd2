"""The reference engine for replicas of several parts: ranks in lock-step, and pipeline stages.

Written from docs/engine-ranks.md on top of :mod:`simulator.engine.reference`, whose clock, requests and ways of
scheduling a step, freeing blocks and emitting tokens they share. Comments name the rule a line carries out.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import isnan, nan

import simpy

from simulator.engine.records import FINISHED, RUNNING, EngineResult, of_the_whole
from simulator.engine.reference import (
    STEP_ENDS,
    STEP_STARTS,
    Moment,
    Piece,
    Plan,
    Process,
    Replica,
    Request,
    StepRecord,
)
from simulator.roofline.pipeline_cost import PipelineCost


@dataclass(eq=False)
class Rank(Replica):
    """One rank: a replica that starts no process of its own, and hands what belongs to all to ``whole``."""

    whole: "LockStep" = field(kw_only=True)

    def start(self) -> None:
        """The whole does."""

    def release(self, now_s: float) -> None:
        """Rows are released to no rank in particular (G1)."""
        self.whole.release(now_s)

    def step_of(self) -> tuple["Rank", dict[Request, int], StepRecord]:
        """What it schedules; there is always something, since ranks load nothing."""
        batch, step = self.schedule()
        if step is None:
            raise RuntimeError("a rank with requests scheduled nothing")
        return self, batch, step

    @property
    def crowd(self) -> int:
        """What least-loaded routing compares (G1)."""
        return 4 * len(self.waiting) + len(self.running)


@dataclass(eq=False)
class LockStep(Replica):
    """A replica of several ranks, ``cost.ranks`` of them."""

    on_steps: Callable[[dict[int, StepRecord]], None] | None = None
    """Called with the records of the ranks that have tokens, by rank, as a step starts."""
    ranks: list[Rank] = field(default_factory=list)
    accepted: int = 0
    n_steps: int = 0

    def __post_init__(self) -> None:
        """Make the ranks, which count into the same totals."""
        self.excess = self.settings.expert_skew.excess().tolist()
        super().__post_init__()

    def start(self) -> None:
        """Make the ranks, then begin."""
        for _ in range(self.cost.ranks):
            rank = Rank(self.cost, self.settings, self.requests, clock=self.clock, whole=self)
            rank.rows, rank.totals = self.rows, self.totals
            rank.itl_s, rank.preempted_s = self.itl_s, self.preempted_s
            rank.steps_by_tokens, rank.steps_by_rows = self.steps_by_tokens, self.steps_by_rows
            self.ranks.append(rank)
        self.totals |= {"padding_s": 0.0, "imbalance_s": 0.0}
        super().start()

    def enqueue(self, request: Request) -> None:
        """G1."""
        rank = self.ranks[self.accepted % len(self.ranks)]
        if self.settings.rank_routing == "least-loaded":
            rank = min(self.ranks, key=lambda rank: rank.crowd)
        self.accepted += 1
        rank.waiting.join(request)

    def serve(self) -> Process:
        """Process of the replica: steps of all ranks together (G2)."""
        cost, r = self.cost, len(self.ranks)
        while True:
            if not any(rank.running or rank.waiting for rank in self.ranks):
                self.work = simpy.Event(self.clock)
                yield self.work
                self.work = None
            yield Moment(self.clock, self.clock.now, STEP_STARTS)
            self.close_piece()
            batches = [rank.step_of() for rank in self.ranks if rank.running or rank.waiting]
            width = max(step.n for _, _, step in batches)
            excess_s = 0.0
            if self.excess:  # G5
                excess_s = self.excess[self.n_steps % len(self.excess)] * float(cost.expert_s[width])
            dense_s = float(cost.dense_s[width]) + excess_s
            own_s = [dense_s + self.rest_s(step) for _, _, step in batches]
            time_s = max(own_s)  # G3
            self.at_work = sum(own_s) / (r * time_s)
            self.n_steps += 1
            self.note_peaks()
            if self.on_steps is not None:
                end_s = self.clock.now + time_s
                self.on_steps({self.ranks.index(rank): replace(step, end_s=end_s) for rank, _, step in batches})
            yield Moment(self.clock, self.clock.now + time_s, STEP_ENDS)
            self.close_piece()
            self.at_work = 0.0
            for rank, batch, step in batches:  # G4
                self.totals["recomputed_tokens"] += rank.split_time(cost, dense_s, batch, step)
                rank.count(step)
                self.totals["padding_s"] += float(cost.dense_s[width] - cost.dense_s[step.n])
                self.totals["imbalance_s"] += excess_s
            idle = r - len(batches)
            self.totals["steps"] += idle
            self.steps_by_tokens[0] += idle
            self.steps_by_rows[0] += idle
            for rank, batch, _ in batches:
                rank.take_effect(batch)

    def rest_s(self, step: StepRecord) -> float:
        """What a rank adds to the dense layers: head and attention. [s]"""
        names = ("B", "S", "P", "A", "K", "R", "SW", "AW", "KW")
        return self.cost.step_s(n=0, **{name: getattr(step, name) for name in names})

    @property
    def used_blocks(self) -> int:
        """KV blocks owned on all ranks."""
        return sum(self.settings.num_kv_blocks - rank.free_blocks for rank in self.ranks)

    @property
    def n_waiting(self) -> int:
        """Requests in the queues of all ranks."""
        return sum(len(rank.waiting) for rank in self.ranks)

    @property
    def n_running(self) -> int:
        """Running requests of all ranks."""
        return sum(len(rank.running) for rank in self.ranks)

    def note_peaks(self) -> None:
        """Peaks are of the whole replica (G6)."""
        peaks = {"max_running": self.n_running, "max_waiting": self.n_waiting, "max_kv_blocks": self.used_blocks}
        for name, value in peaks.items():
            self.totals[name] = max(self.totals[name], value)

    def close_piece(self) -> None:
        """As of a plain replica, over all ranks."""
        start_s = self.pieces[-1].end_s if self.pieces else 0.0
        if self.clock.now > start_s:
            self.pieces.append(
                Piece(start_s, self.clock.now, self.n_running, self.n_waiting, self.used_blocks, self.at_work)
            )

    def result(self, timeline_interval_s: float | None = None) -> EngineResult:
        """As of a plain replica; times of ranks are divided by their number (G4)."""
        return of_the_whole(super().result(timeline_interval_s), len(self.ranks))


@dataclass(eq=False)
class Pipeline(Replica):
    """A replica of the stages of ``pipeline``; ``cost`` is their sum."""

    pipeline: PipelineCost = field(kw_only=True)
    held: dict[Request, int] = field(default_factory=dict)
    """Micro-batches in flight that each running request is in."""
    in_flight: int = 0
    stages_at_work: int = 0
    n_steps: int = 0
    asked: bool = False

    def start(self) -> None:
        """Let the first arrivals come; each is a reason to schedule."""
        self.excess = self.settings.expert_skew.excess().tolist()
        self.free_s = [0.0] * len(self.pipeline.stages)
        self.totals |= {"padding_s": 0.0, "imbalance_s": 0.0}
        for _ in range(self.requests.concurrency or len(self.rows)):
            self.release(0.0)

    def enqueue(self, request: Request) -> None:
        """P4: an arrival is a reason to schedule."""
        self.waiting.join(request)
        self.ask()

    def ask(self) -> None:
        """Schedule at this instant, after all that happens before (P4)."""
        if not self.asked:
            self.asked = True
            self.clock.process(self.fill())

    def fill(self) -> Process:
        """Schedule micro-batches until as many as stages are in flight, or nothing changes any more (P4)."""
        yield Moment(self.clock, self.clock.now, STEP_STARTS)
        self.asked = False
        self.close_piece()
        while self.in_flight < len(self.pipeline.stages):
            batch, preempted = self.form()
            self.totals["preemptions"] += len(preempted)
            self.preempted_s += [self.clock.now] * len(preempted)
            if batch:
                self.launch(batch, preempted)
            elif not preempted:
                break

    def form(self) -> tuple[dict[Request, int], list[Request]]:
        """Choose a micro-batch (P1 to P3); return its tokens and who was preempted for it."""
        budget = self.settings.max_num_batched_tokens
        plan = Plan(budget)
        batch, preempted = plan.batch, plan.preempted
        stopped = False
        for request in [
            one for one in self.running if not self.held.get(one) or one.known > one.computed
        ]:  # R5, P1, P2
            if stopped or not budget:
                break
            if request.status != RUNNING:  # preempted for one before it
                continue
            wanted = min(request.known - request.computed, budget)
            while not stopped and self.free_blocks < self.blocks_for(request.computed + wanted) - request.blocks:
                if self.held.get(request):  # P3
                    stopped = True
                    continue
                victim = [one for one in self.running if not self.held.get(one)][-1]
                self.preempt(victim, plan)
                stopped = victim is request
            if stopped:
                break
            self.grow(request, request.computed + wanted)
            batch[request] = wanted
            budget -= wanted
        while (
            not (stopped or preempted) and budget and self.waiting and len(self.running) < self.settings.max_num_seqs
        ):  # R7
            request = self.waiting.first()
            chunk = min(request.known - request.cached_tokens, budget)
            reach = request.known if self.settings.scheduler_reserve_full_isl else request.cached_tokens + chunk
            if self.blocks_for(reach) > self.free_blocks:
                break
            self.waiting.take(request, is_new=isnan(request.scheduled_s))
            self.running.append(request)
            request.status, request.must_emit = RUNNING, True
            request.computed = request.start = request.cached_tokens
            self.admit_to_blocks(request, [])
            self.grow(request, request.computed + chunk)
            batch[request] = chunk
            budget -= chunk
            if isnan(request.scheduled_s):
                request.scheduled_s = self.clock.now
        return batch, preempted

    def launch(self, batch: dict[Request, int], preempted: list[Request]) -> None:
        """Send a micro-batch on its way (P5); its requests pay (P6), and its prompts advance (P2)."""
        stages = self.pipeline.stages
        step = self.record(batch, preempted)
        work = {name: getattr(step, name) for name in ("n", "B", "S", "P", "A", "K", "R", "SW", "AW", "KW")}
        excess = self.excess[self.n_steps % len(self.excess)] if self.excess else 0.0
        self.n_steps += 1
        ready_s = self.clock.now
        for j, cost in enumerate(stages):
            excess_s = excess * float(cost.expert_s[step.n]) if len(cost.expert_s) else 0.0
            time_s = cost.step_s(**work) + excess_s
            begin_s = max(ready_s, self.free_s[j])
            self.free_s[j] = begin_s + time_s
            self.clock.process(self.occupy(begin_s, self.free_s[j]))
            ready_s = self.free_s[j] + (float(self.pipeline.send_s[j, step.n]) if j + 1 < len(stages) else 0.0)
            again = self.split_time(cost, float(cost.dense_s[step.n]) + excess_s, batch, step)
            self.totals["imbalance_s"] += excess_s
        self.totals["recomputed_tokens"] += again
        self.count(step)
        if self.on_step is not None:
            self.on_step(replace(step, end_s=ready_s))
        chunks = {request for request in batch if request.in_prefill}
        for request, tokens in batch.items():
            self.held[request] = self.held.get(request, 0) + 1
            request.computed += tokens
            request.seen = max(request.seen, request.computed)
        emitting = [one for one in batch if one not in chunks or one.computed == one.known]
        self.in_flight += 1
        self.clock.process(self.complete(batch, emitting, Moment(self.clock, ready_s, STEP_ENDS)))

    def record(self, batch: dict[Request, int], preempted: list[Request]) -> StepRecord:
        """What a micro-batch is, as it is scheduled; ``end_s`` is not known yet."""
        decodes = [request for request in batch if not request.in_prefill]
        chunks = [self.chunk_work(one.computed, tokens) for one, tokens in batch.items() if one.in_prefill]
        used = self.settings.num_kv_blocks - self.free_blocks
        peaks = {"max_running": len(self.running), "max_waiting": len(self.waiting), "max_kv_blocks": used}
        for name, value in peaks.items():
            self.totals[name] = max(self.totals[name], value)
        sums = {name: sum(chunk[i] for chunk in chunks) for i, name in enumerate(("A", "K", "P", "AW", "KW"))}
        return StepRecord(
            start_s=self.clock.now,
            end_s=nan,
            n=sum(batch.values()),
            B=len(decodes),
            S=sum(request.computed + 1 for request in decodes),
            **sums,
            R=sum(request.computed + tokens == request.known for request, tokens in batch.items()),
            SW=sum(self.keys_in_window(request.computed + 1) for request in decodes),
            scheduled={request.row: tokens for request, tokens in batch.items()},
            computed={request.row: request.computed for request in self.running},
            blocks={request.row: request.blocks for request in self.running},
            free_blocks=self.free_blocks,
            admitted=tuple(one.row for one in batch if one.computed == one.start and one.in_prefill),
            preempted=tuple(request.row for request in preempted),
            waiting=tuple(request.row for request in self.waiting),
            arrived=self.arrived,
            finished=self.finished,
            rejected=self.rejected,
            left=self.left,
            host_s=0.0,
        )

    def occupy(self, begin_s: float, end_s: float) -> Process:
        """Process of a stage at work on one micro-batch."""
        for moment_s, change in ((begin_s, 1), (end_s, -1)):
            yield Moment(self.clock, moment_s, STEP_ENDS)
            self.close_piece()
            self.stages_at_work += change
            self.at_work = self.stages_at_work / len(self.pipeline.stages)

    def complete(self, batch: dict[Request, int], emitting: list[Request], moment: Moment) -> Process:
        """Process of a micro-batch in flight: it takes effect at its end (P4, R10)."""
        yield moment
        self.close_piece()
        now_s = self.clock.now
        self.in_flight -= 1
        for request in batch:
            self.held[request] -= 1
        for request in emitting:
            request.emitted += 1
            request.must_emit = False
            if request.emitted == 1:
                request.first_token_s = now_s
            else:
                self.itl_s.append(now_s - request.last_token_s)
            request.last_token_s = now_s
        for request in [one for one in emitting if one.emitted == one.output_tokens]:
            self.running.remove(request)
            self.free(request)
            request.status, request.finish_s = FINISHED, now_s
            self.finished += 1
            if self.requests.concurrency:
                self.release(now_s)
        self.ask()

    def result(self, timeline_interval_s: float | None = None) -> EngineResult:
        """As of a plain replica; times of stages are divided by their number (P6)."""
        return of_the_whole(super().result(timeline_interval_s), len(self.pipeline.stages))
