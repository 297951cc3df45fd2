"""Summary-only runs: requests are made, served and forgotten block by block, in memory that does not grow with their number.

The same deployments, the same engine, the same summary; what is missing is the table of requests. Counts are those of
a run that keeps its table, means are exact, and percentiles come from histograms, within 0.4 %. Requests are made anew for
every pass over them: one that only looks at arrival times, to place the measured window (in a closed loop, where
arrivals depend on the run, a run of its own); the run itself; and one with everything queued at t = 0, for the capacity.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from simulator.engine.records import FINISHED, EngineResult, EngineSettings, Requests
from simulator.engine.streaming import Retired, StreamingEngine
from simulator.results.summary import Requests as RequestCounts
from simulator.results.summary import Summary, Window
from simulator.results.tables import Table
from simulator.roofline.step_cost import StepCost
from simulator.run.consumption import ideal_chip_seconds, pairs_of
from simulator.run.histogram import LogHistogram, as_float, fixed_sum
from simulator.run.options import SloOptions
from simulator.run.outcome import (
    ConservationError,
    Outcome,
    check_order,
    check_shares,
    check_tokens,
    demand_equal,
    step_time_s,
)
from simulator.run.statistics import BATCHES, lag_one_of_means, mean_estimate
from simulator.run.summarise import Facts, compose
from simulator.run.tally import LATENCIES, Tally, met_limits
from simulator.run.window import Capacity, Measured, cut_window
from simulator.traffic import Stream, StreamBlocks
from simulator.traffic.blocks import BLOCK_ROWS

_NONE = np.zeros(0, dtype=np.int64)
REPLICA_ROWS = 4_096
"""Requests of a block per replica, if there are many replicas: Python spends half a millisecond around each replica's share …"""
MOST_ROWS = 3_000_000
"""… and of a block in all: 120 MB."""
GATHERED_ROWS = 1 << 16
"""Requests counted at a time."""


class Consumer(Protocol):
    """What takes a replica's requests when they are done."""

    def consume(self, done: Retired) -> None:
        """Take requests, in any batches."""
        ...


@dataclass(frozen=True)
class EqualReplicas:
    """What serves a stream: equal replicas, request i by replica i mod ``replicas``."""

    cost: StepCost
    settings: EngineSettings
    replicas: int
    workers: int = 1
    block_rows: int = BLOCK_ROWS

    @property
    def groups(self) -> list[range]:
        """Replicas that share a worker, and what counts their requests."""
        edges = np.linspace(0, self.replicas, min(self.workers, self.replicas) + 1).astype(int)
        return [range(first, last) for first, last in pairwise(edges.tolist())]

    @property
    def rows(self) -> int:
        """Requests per block: as many for each replica as make what Python does around them small."""
        return max(self.block_rows, min(self.replicas * REPLICA_ROWS, MOST_ROWS))

    def serve(
        self,
        blocks: StreamBlocks,
        consumers: Sequence[Consumer],
        *,
        concurrency: int,
        interval_s: Sequence[float | None] | None = None,
        itl_window_s: tuple[float, float] | None = None,
        at_once: bool = False,
    ) -> tuple[list[EngineResult], NDArray[np.int64] | None]:
        """Serve the whole stream; results have no per-request columns. Second, the inter-token latencies of the window.

        ``consumers`` are one for each of :attr:`groups`; the rows they are given are those of the whole stream.

        ``at_once``: everything is queued at t = 0. A queue of ``max_num_seqs`` + 1 is as good as an endless one, because a
        step admits no more; so the replica serves a closed loop of 2 · ``max_num_seqs`` + 1 clients without think time.
        """
        n = self.replicas
        clients = [len(range(r, concurrency, n)) for r in range(n)]
        if at_once:
            clients = [2 * self.settings.max_num_seqs + 1] * n
        gathering = [_Gathering(consumer, n) for consumer in consumers]
        engines: list[StreamingEngine] = []
        for group, gathers in zip(self.groups, gathering, strict=True):
            engines += [
                StreamingEngine(
                    self.cost,
                    self.settings,
                    partial(gathers.take, r),
                    concurrency=clients[r],
                    timeline_interval_s=None if interval_s is None else interval_s[r],
                    itl_window_s=itl_window_s,
                )
                for r in group
            ]
        held: list[list[Requests]] = [[] for _ in range(n)]

        def feed(block: Stream, start: int, group: range, gathers: _Gathering) -> None:
            for r in group:
                held[r].append(_part(block, (r - start) % n, n, clients[r], at_once=at_once))
                # A backlog that grows is copied less and less often: its blocks grow with it.
                if sum(map(len, held[r])) >= engines[r].live_rows:
                    engines[r].feed(_joined(held[r]))
                    held[r].clear()
            gathers.flush()

        def finish(group: range, gathers: _Gathering) -> list[EngineResult]:
            found = []
            for r in group:
                if held[r]:
                    engines[r].feed(_joined(held[r]))
                found.append(engines[r].finish())
            gathers.flush()
            return found

        start = 0
        with ThreadPoolExecutor(len(gathering) + 1) if len(gathering) > 1 else nullcontext() as pool:
            each: Callable[..., Iterator[Any]] = map if pool is None else pool.map
            for block in _ahead(blocks.blocks(self.rows), pool):
                list(each(partial(feed, block, start), self.groups, gathering))
                start += len(block)
            results = [result for found in each(finish, self.groups, gathering) for result in found]
        counts = [engine.itl_counts_measured for engine in engines]
        known = [one for one in counts if one is not None]
        return results, np.asarray(np.sum(known, axis=0)) if known else None


class _Gathering:
    """Requests that the replicas of a group are done with, handed on many at a time, with their rows in the whole stream."""

    def __init__(self, consumer: Consumer, replicas: int) -> None:
        self._consumer, self._replicas = consumer, replicas
        self._held: list[Retired] = []
        self._rows = 0

    def take(self, replica: int, done: Retired) -> None:
        self._held.append(done._replace(row=done.row * self._replicas + replica))
        self._rows += len(done.row)
        if self._rows >= GATHERED_ROWS:
            self.flush()

    def flush(self) -> None:
        if self._held:
            self._consumer.consume(Retired(*(np.concatenate(column) for column in zip(*self._held, strict=True))))
        self._held, self._rows = [], 0


def _ahead(blocks: Iterator[Stream], pool: ThreadPoolExecutor | None) -> Iterator[Stream]:
    """The same, the next one in the making while one is worked on."""
    if pool is None:
        yield from blocks
        return
    coming = pool.submit(next, blocks, None)
    while (block := coming.result()) is not None:
        coming = pool.submit(next, blocks, None)
        yield block


def _part(block: Stream, first: int, step: int, clients: int, *, at_once: bool) -> Requests:
    rows = slice(first, None, step)
    arrival = block.arrival_s[rows]
    return Requests(
        arrival_s=np.zeros(len(arrival)) if at_once else arrival,
        prompt_tokens=block.prompt_tokens[rows],
        output_tokens=block.output_tokens[rows],
        cached_tokens=block.cached_tokens[rows],
        max_tokens=block.max_tokens[rows],
        concurrency=clients,
    )


def _joined(parts: Sequence[Requests]) -> Requests:
    if len(parts) == 1:
        return parts[0]
    names = ("arrival_s", "prompt_tokens", "output_tokens", "cached_tokens", "max_tokens")
    columns: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    return replace(parts[0], **columns)


@dataclass(frozen=True)
class Placing:
    """Which requests are measured, and in which of the :data:`BATCHES` batches each of them counts.

    Attributes
    ----------
    window, offline
        as in :class:`simulator.run.window.Measured`, the window's end still unknown.
    first, n
        open loop: the first row inside the window, and the number of rows inside. None in a closed loop, where batches
        are equal stretches of time.
    """

    window: Window
    offline: bool
    first: int = 0
    n: int | None = None

    def inside(self, arrival_s: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Which arrivals are measured."""
        if self.offline:
            return np.ones(len(arrival_s), dtype=bool)
        return np.asarray((arrival_s >= self.window.start_s) & (arrival_s <= self.window.stop_s))

    def batch(self, row: NDArray[np.int64], arrival_s: NDArray[np.float64]) -> NDArray[np.int64]:
        """Batch of measured requests, by their index in the stream and their arrival."""
        if self.n is not None:
            edges = np.linspace(0, self.n, BATCHES + 1).astype(np.int64)
            return np.asarray(np.searchsorted(edges, row - self.first, side="right") - 1)
        start, stop = self.window.start_s, self.window.stop_s
        share = (arrival_s - start) / (stop - start) if stop > start else np.zeros(len(arrival_s))
        return np.minimum((share * BATCHES).astype(np.int64), BATCHES - 1)


class RunningTally:
    """Sums over the requests of one replica, as they are done. Merging adds those of another; order never matters.

    Parameters
    ----------
    replicas
        of the stream: row i went to replica i mod ``replicas``.
    """

    def __init__(self, placing: Placing, slo: SloOptions, cost: StepCost, *, replicas: int) -> None:
        self._placing = placing
        self._slo = slo
        self._cost = cost
        self.replica_busy = [0] * replicas
        self.counts: Counter[str] = Counter()
        self.times: Counter[str] = Counter()
        self.samples = {name: LogHistogram() for name in (*LATENCIES, "busy_s")}
        self.met = np.zeros(BATCHES, dtype=np.int64)
        self.inside = np.zeros(BATCHES, dtype=np.int64)
        self.first_accepted_s, self.last_accepted_s = np.inf, -np.inf

    def consume(self, done: Retired) -> None:
        """Add requests that are finished or rejected, by their rows in the stream."""
        replica = done.row % len(self.replica_busy)
        edges = np.flatnonzero(np.diff(replica, prepend=-1))
        for start, stop in pairwise([*edges.tolist(), len(replica)]):
            self.replica_busy[replica[start]] += fixed_sum(done.busy_s[start:stop])
        finished = done.status == FINISHED
        accepted = done.arrival_s[finished]
        if len(accepted):
            self.first_accepted_s = min(self.first_accepted_s, float(accepted.min()))
            self.last_accepted_s = max(self.last_accepted_s, float(accepted.max()))
        check_order(accepted, done.scheduled_s[finished], done.first_token_s[finished], done.finish_s[finished])
        check_shares(done.busy_s, done.busy_prefill_s, done.busy_cached_s, done.recompute_s)
        ttft, e2e = done.first_token_s - done.arrival_s, done.finish_s - done.arrival_s
        gaps = done.output_tokens - 1
        tpot = np.full(len(gaps), np.nan)
        np.divide(e2e - ttft, gaps, out=tpot, where=gaps > 0)
        queue = done.scheduled_s - done.arrival_s
        window = self._placing.window
        stop_s = np.inf if self._placing.offline else window.stop_s
        in_window = finished & (done.finish_s >= window.start_s) & (done.finish_s <= stop_s)
        prompt, output = done.prompt_tokens, done.output_tokens
        full, windowed = pairs_of(prompt[finished], done.cached_tokens[finished], output[finished], self._cost)
        self.counts.update(
            rows=len(finished),
            finished=int(finished.sum()),
            preemptions=int(done.preemptions.sum()),
            preempted=int((done.preemptions > 0).sum()),
            prompt_tokens=int(prompt[finished].sum()),
            cached_tokens=int(done.cached_tokens[finished].sum()),
            output_tokens=int(output[finished].sum()),
            window_requests=int(in_window.sum()),
            window_prompt_tokens=int(prompt[in_window].sum()),
            window_output_tokens=int(output[in_window].sum()),
            pairs=full,
            window_pairs=windowed,
        )
        self.times.update(
            busy=fixed_sum(done.busy_s),
            prefill=fixed_sum(done.busy_prefill_s),
            cached=fixed_sum(done.busy_cached_s),
            recompute=fixed_sum(done.recompute_s),
            decoding=fixed_sum((done.finish_s - done.first_token_s)[finished]),
        )
        inside = self._placing.inside(done.arrival_s)
        batch = self._placing.batch(done.row[inside], done.arrival_s[inside])
        latencies: Table = {"ttft_s": ttft, "tpot_s": tpot, "e2e_s": e2e, "queue_s": queue, "busy_s": done.busy_s}
        met = met_limits(latencies, finished, self._slo)[inside]
        self.inside += np.bincount(batch, minlength=BATCHES)
        self.met += np.bincount(batch[met], minlength=BATCHES)
        measured = finished[inside]
        self.counts.update(measured=int(measured.sum()), one_token=int((output[inside][measured] == 1).sum()))
        for name, sample in self.samples.items():
            values = latencies[name][inside]
            known = measured & ~np.isnan(values)
            sample.add(values[known], batch[known])

    def merge(self, other: "RunningTally") -> None:
        """Add what another replica counted."""
        self.replica_busy = [a + b for a, b in zip(self.replica_busy, other.replica_busy, strict=True)]
        self.counts += other.counts
        self.times += other.times
        for name, sample in self.samples.items():
            sample.merge(other.samples[name])
        self.met += other.met
        self.inside += other.inside
        self.first_accepted_s = min(self.first_accepted_s, other.first_accepted_s)
        self.last_accepted_s = max(self.last_accepted_s, other.last_accepted_s)

    def tally(self, *, total: int, recomputed_tokens: int, chips: int, ideal_chip_s: float) -> Tally:
        """The sums as a summary takes them; ``chips`` of a replica."""
        counts, e2e = self.counts, self.samples["e2e_s"]
        rejected = counts["rows"] - counts["finished"]
        inside, met = int(self.inside.sum()), int(self.met.sum())
        shares = self.met / self.inside if self.inside.all() else None
        means = e2e.batch_means() if e2e.n >= 5 * BATCHES else None

        def chip_s(name: str) -> float:
            return as_float(self.times[name]) * chips

        return Tally(
            counts=RequestCounts(
                total=total,
                arrived=counts["rows"],
                finished=counts["finished"],
                running=0,
                waiting=0,
                rejected=rejected,
                not_arrived=total - counts["rows"],
                measured=counts["measured"],
                preemptions=counts["preemptions"],
                preempted=counts["preempted"],
                prompt_tokens=counts["prompt_tokens"],
                cached_tokens=counts["cached_tokens"],
                output_tokens=counts["output_tokens"],
                recomputed_tokens=recomputed_tokens,
            ),
            accepted=counts["finished"],
            first_accepted_s=self.first_accepted_s,
            last_accepted_s=self.last_accepted_s,
            inside=inside,
            window_requests=counts["window_requests"],
            window_prompt_tokens=counts["window_prompt_tokens"],
            window_output_tokens=counts["window_output_tokens"],
            chip_s_busy=chip_s("busy"),
            chip_s_prefill=chip_s("prefill"),
            chip_s_cached=chip_s("cached"),
            chip_s_recompute=chip_s("recompute"),
            ideal_chip_s=ideal_chip_s,
            decoding_s=as_float(self.times["decoding"]),
            gaps=counts["output_tokens"] - counts["finished"],
            latency={name: self.samples[name].distribution() for name in LATENCIES},
            busy=self.samples["busy_s"].distribution(scale=chips),
            one_token_outputs=counts["one_token"],
            met=met,
            met_share=mean_estimate(inside, met / inside if inside else None, shares),
            e2e_p99_s=e2e.quantile(0.99) if e2e.n else None,
            e2e_lag=None if means is None else lag_one_of_means(means),
            useful_pairs=(counts["pairs"], counts["window_pairs"]) if recomputed_tokens else None,
        )


class _Span:
    """First and last arrival, of a run that is made to learn them."""

    def __init__(self) -> None:
        self.first_s, self.last_s = np.inf, -np.inf

    def consume(self, done: Retired) -> None:
        self.first_s = min(self.first_s, float(done.arrival_s.min()))
        self.last_s = max(self.last_s, float(done.arrival_s.max()))


class _Ideal:
    """Finished requests, and what they would take alone."""

    def __init__(self, facts: Facts, mean_batch: float) -> None:
        self._facts = facts
        self._mean_batch = mean_batch
        self.finished = 0
        self.chip_s = 0

    def consume(self, done: Retired) -> None:
        finished = done.status == FINISHED
        self.finished += int(finished.sum())
        ideal = ideal_chip_seconds(
            done.prompt_tokens[finished],
            done.cached_tokens[finished],
            done.output_tokens[finished],
            cost=self._facts.ideal_cost,
            settings=self._facts.settings,
            mean_batch=self._mean_batch,
        )
        self.chip_s += fixed_sum(ideal)


def run_streaming(
    fleet: EqualReplicas, blocks: StreamBlocks, facts: Facts, say: Callable[[str], None]
) -> tuple[Summary, Table, Outcome] | None:
    """Serve a stream block by block; return summary, timeline and an outcome without requests. None: all were rejected.

    Raises
    ------
    ConservationError
        If requests or chip time do not add up: a fault of the program.
    """
    n = fleet.replicas
    placing, interval_s = _place(fleet, blocks, facts, say)
    tallies = [RunningTally(placing, facts.slo, fleet.cost, replicas=n) for _ in fleet.groups]
    say("simulating block by block")
    open_loop = not blocks.concurrency and not placing.offline
    results, itl = fleet.serve(
        blocks,
        tallies,
        concurrency=blocks.concurrency,
        interval_s=interval_s,
        itl_window_s=(placing.window.start_s, placing.window.stop_s) if open_loop else None,
    )
    requests = Requests(np.zeros(0), _NONE, _NONE, _NONE, _NONE, concurrency=blocks.concurrency)
    outcome = Outcome(requests, tuple(results), fleet.cost.chips, itl)
    for other in tallies[1:]:
        tallies[0].merge(other)
    _check(outcome, tallies[0], len(blocks), fleet.cost)
    if not tallies[0].counts["finished"]:
        return None
    say("measuring capacity")
    ideals = [_Ideal(facts, outcome.total("decode_tokens") / outcome.total("steps")) for _ in fleet.groups]
    at_once, _ = fleet.serve(blocks, ideals, concurrency=0, at_once=True)
    capacity = Capacity(
        finished=sum(ideal.finished for ideal in ideals),
        end_s=max(result.end_s for result in at_once),
        max_running=int(max(result.totals["max_running"] for result in at_once)),
    )
    sums = tallies[0].tally(
        total=len(blocks),
        recomputed_tokens=int(outcome.total("recomputed_tokens")),
        chips=outcome.chips_per_replica,
        ideal_chip_s=as_float(sum(ideal.chip_s for ideal in ideals)),
    )
    window = placing.window.model_copy(
        update={"end_s": outcome.end_s} | ({"stop_s": outcome.end_s} if placing.offline else {})
    )
    summary, timeline = compose(outcome, Measured(window, _NONE, placing.offline), sums, capacity, facts)
    return summary, timeline, outcome


def _place(
    fleet: EqualReplicas, blocks: StreamBlocks, facts: Facts, say: Callable[[str], None]
) -> tuple[Placing, list[float | None] | None]:
    """Place the measured window; and the timeline intervals that an engine would choose that knew the whole stream."""
    cuts = {
        "warm_up_fraction": facts.options.warm_up_fraction,
        "drain_fraction": facts.options.drain_fraction,
    }
    if blocks.concurrency:
        say("finding when requests arrive")
        spans = [_Span() for _ in fleet.groups]
        fleet.serve(blocks, spans, concurrency=blocks.concurrency)
        first, last = min(span.first_s for span in spans), max(span.last_s for span in spans)
        return Placing(*cut_window(first, last, np.nan, **cuts)), None
    say("finding when requests arrive")
    first, tail = np.inf, np.zeros(0)
    for arrival in blocks.arrivals_s(fleet.rows):
        first = min(first, float(arrival[0]))
        tail = np.concatenate([tail, arrival[-fleet.replicas :]])[-fleet.replicas :]
    window, offline = cut_window(first, float(tail[-1]), np.nan, **cuts)
    before = inside = 0
    for arrival in blocks.arrivals_s(fleet.rows):
        below = int(np.searchsorted(arrival, window.start_s, side="left"))
        before += below
        if not offline:
            inside += int(np.searchsorted(arrival, window.stop_s, side="right")) - below
    placing = Placing(window, offline, 0, len(blocks)) if offline else Placing(window, offline, before, inside)
    # tail[i] is the last arrival of the replica that serves row len − replicas + i.
    ends = {(len(blocks) - fleet.replicas + i) % fleet.replicas: float(tail[i]) for i in range(fleet.replicas)}
    shortest = 64 * float(fleet.cost.dense_s[1])
    return placing, [max(ends[r] / 512, shortest) for r in range(fleet.replicas)]


def _check(outcome: Outcome, tally: RunningTally, total: int, cost: StepCost) -> None:
    """The laws of :func:`simulator.run.outcome.check_conservation`, from sums."""
    counts = tally.counts
    if counts["rows"] != total:
        raise ConservationError(f"{total} requests entered, {counts['rows']} were finished or rejected")
    for r, (replica, busy) in enumerate(zip(outcome.replicas, tally.replica_busy, strict=True)):
        demand_equal(f"replica {r}: busy + idle", as_float(busy) + replica.idle_s, "its time", replica.end_s)
    computed = counts["prompt_tokens"] - counts["cached_tokens"] + counts["output_tokens"] - counts["finished"]
    check_tokens(outcome, computed, counts["output_tokens"])
    if counts["finished"]:
        step_time_s(outcome, cost)
