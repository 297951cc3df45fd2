"""The reference engine for replicas that step in parts: ranks in lock-step.

Written from docs/engine-ranks.md on top of :mod:`simulator.engine.reference`, whose clock, requests and ways of
scheduling a step, freeing blocks and emitting tokens they share. Comments name the rule a line carries out.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import simpy

from simulator.engine.records import EngineResult, of_the_whole
from simulator.engine.reference import STEP_ENDS, STEP_STARTS, Moment, Piece, Process, Replica, Request, StepRecord


@dataclass(eq=False)
class Rank(Replica):
    """One rank: a replica that starts no process of its own, and hands what belongs to all to ``whole``."""

    whole: "LockStep" = field(kw_only=True)

    def start(self) -> None:
        """The whole does."""

    def release(self, now_s: float) -> None:
        """Rows are released to no rank in particular (L1)."""
        self.whole.release(now_s)

    @property
    def load(self) -> int:
        """What least-loaded routing compares (L1)."""
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
            rank.rows, rank.totals, rank.itl_s = self.rows, self.totals, self.itl_s
            rank.steps_by_tokens, rank.steps_by_rows = self.steps_by_tokens, self.steps_by_rows
            self.ranks.append(rank)
        self.totals |= {"padding_s": 0.0, "imbalance_s": 0.0}
        super().start()

    def join(self, request: Request) -> None:
        """L1."""
        rank = self.ranks[self.accepted % len(self.ranks)]
        if self.settings.rank_routing == "least-loaded":
            rank = min(self.ranks, key=lambda rank: rank.load)
        self.accepted += 1
        rank.waiting.append(request)

    def serve(self) -> Process:
        """Process of the replica: steps of all ranks together (L2)."""
        cost, r = self.cost, len(self.ranks)
        while True:
            if not any(rank.running or rank.waiting for rank in self.ranks):
                self.work = simpy.Event(self.clock)
                yield self.work
                self.work = None
            yield Moment(self.clock, self.clock.now, STEP_STARTS)
            self.close_piece()
            batches = [(rank, *rank.schedule()) for rank in self.ranks if rank.running or rank.waiting]
            width = max(step.n for _, _, step in batches)
            excess_s = 0.0
            if self.excess:  # L5
                excess_s = self.excess[self.n_steps % len(self.excess)] * float(cost.expert_s[width])
            dense_s = float(cost.dense_s[width]) + excess_s
            own_s = [dense_s + self.rest_s(step) for _, _, step in batches]
            time_s = max(own_s)  # L3
            self.at_work = sum(own_s) / (r * time_s)
            self.n_steps += 1
            self.note_peaks()
            if self.on_steps is not None:
                end_s = self.clock.now + time_s
                self.on_steps({self.ranks.index(rank): replace(step, end_s=end_s) for rank, _, step in batches})
            yield Moment(self.clock, self.clock.now + time_s, STEP_ENDS)
            self.close_piece()
            self.at_work = 0.0
            for rank, batch, step in batches:  # L4
                rank.split_time(cost, dense_s, batch, step)
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
        """Peaks are of the whole replica (L6)."""
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
        """As of a plain replica; times of ranks are divided by their number (L4)."""
        return of_the_whole(super().result(timeline_interval_s), len(self.ranks))
