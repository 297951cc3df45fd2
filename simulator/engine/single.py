"""A replica of one part, seen from Python: one state that skips ahead exactly, whole runs or piece by piece.

The rules are in ``docs/engine-rules.md``, the algorithm in :mod:`simulator.engine.skip_ahead`.
"""

import math
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from simulator.engine import block_runs, core, full_loop, queues, skip_ahead, speculation, swap, tiers
from simulator.engine.new_queue import new_queue
from simulator.engine.new_state import new_cache, new_spec, new_state, warm_store
from simulator.engine.records import (
    ITL_BINS,
    NOT_ARRIVED,
    RUNNING,
    WAITING,
    EngineResult,
    EngineSettings,
    Requests,
    SpeculationResult,
    check_columns,
    check_windows,
    drafted_tokens,
    findable_hashes,
    fixed_drafting_s,
    needs_queue,
)
from simulator.engine.refusals import check_mixture
from simulator.errors import InputError
from simulator.roofline.speculation import with_drafter
from simulator.roofline.step_cost import StepCost


class Engine:
    """One replica and its state.

    Parameters
    ----------
    cost
        table of the deployment; must cover the settings' ``max_num_batched_tokens`` and ``max_num_seqs``.
    timeline_interval_s
        length of the first timeline intervals. They are doubled, pairs merged, whenever the run outgrows
        ``TIMELINE_INTERVALS`` of them. None: a 512th of the arrival span.
    log_size
        entries of the prefix cache's record of what it did, :attr:`cache_log`; 0: none is kept.

    Raises
    ------
    InputError
        If the cost table is smaller than the settings ask for.
    """

    _of_parts = False
    """Whether there are several ranks or stages."""
    _in_stages = False

    def __init__(
        self,
        cost: StepCost,
        settings: EngineSettings,
        requests: Requests,
        *,
        timeline_interval_s: float | None = None,
        log_size: int = 0,
    ) -> None:
        _check(cost, settings, timeline_interval_s)
        check_mixture(cost, settings, requests)
        check_columns(settings, requests)
        n = len(requests)
        self._settings = settings
        m = settings.max_num_seqs
        if settings.speculation is not None:
            cost = with_drafter(cost, settings.speculation.cost)
        self._cost = core.CostTable(
            np.ascontiguousarray(cost.dense_s, dtype=np.float64),
            np.stack([cost.head_s, cost.decode_walk_s]).astype(np.float64),
            np.ascontiguousarray(cost.decode_knots, dtype=np.float64),
            np.ascontiguousarray(cost.decode_value_s, dtype=np.float64),
            np.ascontiguousarray(cost.decode_slope_s, dtype=np.float64),
            float(cost.decode_seq_s),
            np.ascontiguousarray(cost.prefill_planes, dtype=np.float64),
            cost.window,
            cost.window_chunked,
            float(cost.window_slope_s),
        )
        self._limits = core.Limits(
            m,
            settings.max_num_batched_tokens,
            settings.block_size,
            settings.num_kv_blocks,
            settings.max_model_len,
            settings.scheduler_reserve_full_isl,
            settings.lookahead,
            settings.kv_groups.count,
            settings.kv_groups.windowed,
            settings.kv_groups.window,
            settings.kv_groups.chunked,
            settings.kv_groups.most_in_window(settings.block_size, settings.longest_advance),
        )
        self._stream = core.Stream(
            np.ascontiguousarray(requests.arrival_s, dtype=np.float64),
            np.ascontiguousarray(requests.prompt_tokens, dtype=np.int64),
            np.ascontiguousarray(requests.output_tokens, dtype=np.int64),
            np.ascontiguousarray(requests.cached_tokens, dtype=np.int64),
            np.ascontiguousarray(requests.max_tokens, dtype=np.int64),
            requests.concurrency,
        )
        self._out = core.Outcome(
            np.full(n, NOT_ARRIVED, dtype=np.int8),
            np.full(n, np.nan) if requests.concurrency else np.array(requests.arrival_s, dtype=np.float64),
            np.full(n, np.nan),
            np.full(n, np.nan),
            np.full(n, np.nan),
            np.zeros(n, dtype=np.int32),
            np.zeros(n),
            np.zeros(n),
            np.zeros(n),
            np.zeros(n),
            np.zeros(settings.max_num_batched_tokens + 1, dtype=np.int64),
            np.zeros(settings.max_rows + 1, dtype=np.int64),
            np.zeros(ITL_BINS, dtype=np.int64),
        )
        n_pending = requests.concurrency + (n if settings.retries.max_attempts > 1 else 0)
        self._state = new_state(n, n_pending, settings)
        self._queue: queues.Queue | None = None
        self._extra: core.Extra | None = None
        hashes = findable_hashes(settings, requests)
        remembers = hashes is not None or settings.speculation is not None or settings.swap is not None
        if remembers or self._of_parts or needs_queue(settings, clients_leave=requests.clients_may_leave):
            self._queue = new_queue(settings, requests, counts_by_step=not self._in_stages)
        if remembers:
            self._extra = core.Extra(
                cache=new_cache(hashes, settings, requests, log_size, by_epoch=self._in_stages),
                spec=new_spec(cost, settings, requests),
                swap=swap.new_swap(settings.swap, max_num_seqs=m, n=n),
                loads=tiers.new_loads(settings.load_policy, n, on=bool(settings.tiers)),
            )
        if self._extra is not None and settings.tiers and requests.stored_tokens is not None:
            warm_store(self._extra.cache, requests)
        floats, ints = self._state.floats, self._state.ints
        last = 0.0 if requests.concurrency or n == 0 else float(requests.arrival_s[-1])
        floats[core.INTERVAL] = timeline_interval_s or max(last / 512, 64 * float(cost.dense_s[1]))
        if requests.concurrency:
            first = min(requests.concurrency, n)
            order = np.argsort(requests.arrival_s[:first], kind="stable")  # a sorted array is a heap
            self._state.pending_row[:first] = order
            self._state.pending_time[:first] = requests.arrival_s[:first][order]
            ints[core.N_PENDING] = ints[core.NEXT_ROW] = first
        self.done = False

    @property
    def clock_s(self) -> float:
        """End of the last step. [s]"""
        return float(self._state.floats[core.CLOCK])

    def _parts(self) -> Iterable[tuple[core.State, queues.Queue | None, core.Extra | None]]:
        """State, queue and features of each part that serves requests."""
        return [(self._state, self._queue, self._extra)]

    def _whole(self) -> core.Extra | None:
        """The features of all parts, what they count summed up."""
        return self._extra

    @property
    def passes(self) -> int:
        """Steps so far, those of all parts; no sequence has been in more of them."""
        return int(self._figures()[0][core.STEPS])

    @property
    def n_waiting(self) -> int:
        """Requests in the queue, without those that load."""
        found = 0
        for state, queue, _ in self._parts():
            ints = state.ints
            plain = ints[core.N_PREEMPTED] + ints[core.FIFO_TAIL] - ints[core.FIFO_HEAD]
            found += int(plain if queue is None else queue.ints[queues.N_QUEUED])
        return found

    def rank_of(self, row: int) -> int:
        """The rank that a request's present attempt joined."""
        del row
        return 0

    def copies_s(self, row: int) -> float:
        """What a request has paid so far for copies to and from host memory, in seconds of a part. [s]"""
        return float(self._extra.swap.charged[row]) if self._extra is not None and self._extra.swap.on else 0.0

    @property
    def next_arrival_s(self) -> float:
        """When the scheduler sees the next request; infinite if none is on its way. [s]"""
        state, stream = self._state, self._stream
        when = float(state.pending_time[0]) if state.ints[core.N_PENDING] else math.inf
        row = int(state.ints[core.NEXT_ROW])
        if not stream.concurrency and row < len(stream.arrival):
            when = min(when, float(stream.arrival[row]))
        return when + self._settings.host.request_s

    @property
    def next_departure_s(self) -> float:
        """When the next client leaves, unless it is served before; infinite if none will. [s]"""
        queue = self._queue
        if queue is None or not queue.rules.clients_leave:
            return math.inf
        n = int(queue.counts[queues.N_DUE])
        row, ticket = queue.due_entry[:n] >> queues.ROW_BITS, queue.due_entry[:n] & queues.ROW_MASK
        here = np.isin(self._out.status[row], (WAITING, RUNNING)) & (queue.row_ints[row, queues.GONE] == 0)
        here &= queue.row_ints[row, queues.TICKET] == ticket
        return float(queue.due_time[:n][here].min(initial=math.inf))

    @property
    def next_load_s(self) -> float:
        """When the next load from the tiers below HBM will be there; infinite if none is on its way. [s]"""
        return min(
            tiers.next_ready(extra.loads, int(state.ints[core.N_LOADING])) if extra is not None else math.inf
            for state, _, extra in self._parts()
        )

    @property
    def cache_log(self) -> NDArray[np.int64]:
        """What the prefix cache did, as :attr:`simulator.engine.block_runs.Cache.log` says it."""
        if self._extra is None:
            return np.zeros((0, 4), dtype=np.int64)
        cache = self._extra.cache
        kept: NDArray[np.int64] = cache.log[: int(cache.ints[block_runs.N_LOG])]
        return kept

    def advance(self, until_s: float = math.inf, known_s: float = math.inf) -> None:
        """Run every step that starts before ``until_s``.

        Before ``known_s`` everybody who comes is known, to whom a router sends requests while it runs: later ones are seated by a later call.
        """
        replica = self._cost, self._limits, self._stream, self._out, self._state
        if self._queue is not None:
            self.done = bool(full_loop.advance(*replica, self._queue, self._extra, float(until_s), float(known_s)))
        else:
            self.done = bool(skip_ahead.advance(*replica, float(until_s), float(known_s)))

    def itl_between(self, start_s: float, stop_s: float) -> NDArray[np.int64]:
        """Run up to ``stop_s``; count the inter-token latencies of the steps that start in [``start_s``, ``stop_s``).

        Tokens that come with others of their pass are in bin 0.
        """
        self.advance(start_s)
        before, together = self._out.itl.copy(), self._extra_tokens()
        self.advance(stop_s)
        counts = self._out.itl - before
        counts[0] += self._extra_tokens() - together
        return np.asarray(counts)

    @property
    def decode_keys(self) -> float:
        """Σ S so far: keys that decoding sequences have seen."""
        extra = self._whole()
        if extra is not None and extra.spec.on:
            return float(extra.spec.tariff.keys[0].sum())
        return int(self._figures()[0][core.DECODE_KEYS])

    def _extra_tokens(self) -> int:
        """Tokens emitted beyond one per pass of speculative decoding, those of sequences not yet settled included."""
        found = 0
        for state, _, extra in self._parts():
            if extra is None or not extra.spec.on:
                continue
            batch = extra.spec.batch
            slots = batch.slots[batch.slots[:, speculation.NEED_STEP] >= 0]
            passes = state.ints[core.STEP] - slots[:, speculation.SINCE]
            before = slots[:, speculation.PROGRESS]
            after = before + passes * slots[:, speculation.RATE]
            together = (after >> speculation.UNIT_BITS) - (before >> speculation.UNIT_BITS) - passes
            found += int(batch.ints[speculation.EXTRA_TOKENS] + together.sum())
        return found

    def _figures(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Counts and times, as the state keeps them."""
        return self._state.ints, self._state.floats

    def result(self) -> EngineResult:
        """What has happened so far; requests still decoding are not yet charged for their latest steps."""
        (ints, floats), out, whole = self._figures(), self._out, self._whole()
        counts = out.steps_by_tokens
        rows = out.steps_by_rows
        totals = {
            "steps": int(ints[core.STEPS]),
            "dense_tokens": int(counts @ np.arange(len(counts))),
            "decode_tokens": int(ints[core.DECODE_TOKENS]),
            "decode_keys": int(ints[core.DECODE_KEYS]),
            "prefill_pairs": int(ints[core.PREFILL_PAIRS]),
            "prefill_keys": int(ints[core.PREFILL_KEYS]),
            "window_decode_keys": int(ints[core.WINDOW_DECODE_KEYS]),
            "window_prefill_pairs": int(ints[core.WINDOW_PAIRS]),
            "window_prefill_keys": int(ints[core.WINDOW_KEYS]),
            "chunks": int(ints[core.CHUNKS]),
            "rows": int(rows @ np.arange(len(rows))),
            "preemptions": int(ints[core.PREEMPTIONS]),
            "recomputed_tokens": int(ints[core.RECOMPUTED]),
            "segments": int(ints[core.SEGMENTS]),
            "decode_attention_s": float(floats[core.DECODE_ATTENTION]),
            "prefill_attention_s": float(floats[core.PREFILL_ATTENTION]),
            "running_s": float(floats[core.RUNNING_INTEGRAL]),
            "waiting_s": float(floats[core.WAITING_INTEGRAL]),
            "kv_blocks_s": float(floats[core.BLOCKS_INTEGRAL]),
            "max_running": int(ints[core.MAX_RUNNING]),
            "max_waiting": int(ints[core.MAX_WAITING]),
            "max_kv_blocks": int(ints[core.MAX_BLOCKS]),
        }
        # Of a plain replica, what it was told; nobody is admitted without it.
        reused = np.where(np.isnan(out.scheduled), 0, self._stream.cached)
        if whole is not None and whole.cache.on:
            cache = whole.cache
            reused = cache.reused
            totals |= {
                "cache_queried_tokens": int(cache.ints[block_runs.QUERIED]),
                "cache_hit_tokens": int(cache.ints[block_runs.HIT_TOKENS]),
                "cache_hit_pairs": int(cache.ints[block_runs.HIT_PAIRS]),
                "evicted_blocks": int(cache.ints[block_runs.EVICTED]),
            }
        first_token, finish = out.first_token, out.finish
        attempts = np.asarray(out.status != NOT_ARRIVED, dtype=np.int32)
        wasted = np.zeros(len(attempts))
        clients = np.zeros(queues.N_COUNTS, dtype=np.int64)
        host_s = 0.0
        if self._queue is not None:
            attempts = self._queue.row_ints[:, queues.ATTEMPTS].astype(np.int32)
            wasted, clients = self._queue.row_floats[:, queues.WASTED], self._queue.counts
            host_s = sum(float(queue.floats[queues.HOST]) for _, queue, _ in self._parts() if queue is not None)
            first_token = first_token + self._settings.host.output_s  # H3
            finish = finish + self._settings.host.output_s
        totals |= {
            "timeouts": int(clients[queues.TIMEOUTS]),
            "cancellations": int(clients[queues.CANCELLATIONS]),
            "retries": int(clients[queues.RETRIES]),
            "abandoned_tokens": int(clients[queues.ABANDONED_TOKENS]),
            "abandoned_outputs": int(clients[queues.ABANDONED_OUTPUTS]),
            "host_s": host_s,
        }
        swap_s = np.zeros(len(reused))
        if whole is not None and whole.swap.on:
            host = whole.swap
            swap_s = host.charged
            totals |= {
                "swap_out_blocks": int(host.ints[swap.OUT_BLOCKS]),
                "swap_in_blocks": int(host.ints[swap.IN_BLOCKS]),
                "swap_fallbacks": int(host.ints[swap.FALLBACKS]),
                "max_host_blocks": max(int(extra.swap.ints[swap.MAX_HOST]) for _, _, extra in self._parts() if extra),
                "swap_s": float(host.delay[0]),
            }
        load_start_s = load_end_s = np.full(len(reused), np.nan)
        if whole is not None and whole.loads.on:
            loads, counts_by_tier = whole.loads, whole.cache.tiers.counts
            load_start_s, load_end_s = loads.start_s, loads.end_s
            totals |= {"loads": int(loads.ints[tiers.STARTED]), "loads_declined": int(loads.ints[tiers.DECLINED])}
            for i, tier in enumerate(counts_by_tier):
                totals[f"tier{i}_stored_blocks"] = int(tier[tiers.STORED])
                totals[f"tier{i}_loaded_blocks"] = int(tier[tiers.LOADED])
        interval = float(floats[core.INTERVAL])
        end = self.clock_s
        used = min(math.ceil(end / interval), self._state.timeline.shape[1])
        means = self._state.timeline[:, :used] / interval
        timeline: dict[str, NDArray[np.float64]] = {
            "start_s": np.arange(used) * interval,
            "running": means[core.T_RUNNING],
            "waiting": means[core.T_WAITING],
            "kv_blocks": means[core.T_BLOCKS],
            "busy_fraction": means[core.T_BUSY],
            "preemptions_per_s": means[core.T_PREEMPTIONS],
        }
        found = self._speculation()
        if found is not None:
            totals["draft_s"] = found.draft_s
            totals["decode_keys"] = float(found.keys.sum())
            totals["window_decode_keys"] = float(found.window_keys.sum())
            totals["decode_attention_s"] -= self._decode_drafting_s(found)
        return EngineResult(
            status=out.status,
            arrival_s=out.arrival,
            scheduled_s=out.scheduled,
            first_token_s=first_token,
            finish_s=finish,
            preemptions=out.preemptions,
            busy_s=out.busy,
            busy_prefill_s=out.busy_prefill,
            busy_cached_s=out.busy_cached,
            recompute_s=out.recompute,
            attempts=attempts,
            wasted_s=wasted,
            reused_tokens=reused,
            swap_s=swap_s,
            load_start_s=load_start_s,
            load_end_s=load_end_s,
            idle_s=float(floats[core.IDLE]),
            end_s=end,
            steps_by_tokens=counts,
            steps_by_rows=rows,
            itl_counts=out.itl,
            itl_max_s=float(floats[core.ITL_MAX]),
            totals=totals,
            timeline=timeline,
            timeline_interval_s=interval,
            speculation=found,
        )

    def _speculation(self) -> SpeculationResult | None:
        whole = self._whole()
        if whole is None or not whole.spec.on:
            return None
        plan = self._settings.speculation
        batch, tariff = whole.spec.batch, whole.spec.tariff
        found = SpeculationResult(
            passes=tariff.passes,
            keys=tariff.keys[0],
            window_keys=tariff.keys[1],
            chunk_steps=tariff.chunk_steps,
            drafted_tokens=drafted_tokens(plan.cost, tariff.passes) if plan else 0,
            extra_tokens=int(batch.ints[speculation.EXTRA_TOKENS]),
            wasted_s=tariff.wasted,
            draft_s=0.0,
        )
        return replace(found, draft_s=self._decode_drafting_s(found) + float(tariff.floats[speculation.CHUNK_DRAFT]))

    def _decode_drafting_s(self, found: SpeculationResult) -> float:
        plan = self._settings.speculation
        whole = self._whole()
        if plan is None or whole is None:
            return 0.0
        return fixed_drafting_s(plan.cost, found.passes) + float(whole.spec.tariff.floats[speculation.KEYS_DRAFT])


def _check(cost: StepCost, settings: EngineSettings, timeline_interval_s: float | None) -> None:
    if cost.stages > 1:
        raise InputError(f"the cost table sums {cost.stages} pipeline stages: give the engine the PipelineCost instead")
    if cost.ranks > 1:
        raise InputError(
            f"the cost table is of {cost.ranks} ranks in lock-step, which is no plain replica: use new_engine"
        )
    if cost.max_tokens < settings.max_num_batched_tokens:
        raise InputError(
            f"the cost table ends at {cost.max_tokens} tokens, "
            f"engine.max_num_batched_tokens = {settings.max_num_batched_tokens}"
        )
    if cost.max_rows < settings.max_rows:
        raise InputError(
            f"the cost table ends at {cost.max_rows} rows, a step of engine.max_num_seqs = {settings.max_num_seqs} may "
            f"have {settings.max_rows}"
        )
    if settings.max_num_seqs >= 1 << core.SLOT_BITS:
        raise InputError(f"engine.max_num_seqs = {settings.max_num_seqs}: at most {(1 << core.SLOT_BITS) - 1}")
    check_windows(cost, settings)
    if timeline_interval_s is not None and not 0 < timeline_interval_s < math.inf:
        raise InputError(f"timeline_interval_s = {timeline_interval_s}: must be positive and finite")
