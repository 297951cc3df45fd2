"""The skip-ahead engine with everything: policies, batching modes, clients that leave, a host, prefix caches, tiers, swap and speculation.

The loop of :mod:`simulator.engine.skip_ahead` with other rules for what a step is made of (:mod:`simulator.engine.scheduler`) and for who comes and goes
(:mod:`simulator.engine.clients`); what a step costs and how segments are counted is the same code. Rules: ``docs/engine-mixtures.md``.
"""

import math
from typing import Any, NamedTuple

from simulator.engine import speculation
from simulator.engine.batch import (
    advance_decodes,
    pass_window_events,
    publishing_moment,
    rebase_sums,
    tokens_per_sequence,
)
from simulator.engine.block_runs import N_ENDED, take
from simulator.engine.clients import (
    let_clients_go,
    n_waiting,
    next_departure,
    next_load,
    next_seen,
    receive,
    receive_in_step,
)
from simulator.engine.core import (
    AFTER,
    BATCH,
    CLOCK,
    FINISH_STEP,
    FIRST,
    FREE_BLOCKS,
    IDLE,
    INTERVAL,
    ITL_MAX,
    KNOT,
    LAST_START,
    LAST_TOKEN,
    MAX_BLOCKS,
    MAX_RUNNING,
    MAX_WAITING,
    N_GROWING,
    N_LOADING,
    N_RUNNING,
    OWNED,
    RAN,
    REBASE_STEPS,
    SEGMENTS,
    SHARE_W,
    STEP,
    STEP_ORIGIN,
    STEPS,
    T_WAITING,
    WAITING_INTEGRAL,
    WALK,
    CostTable,
    Extra,
    Limits,
    Outcome,
    Price,
    State,
    Stream,
)
from simulator.engine.fcfs import release_next
from simulator.engine.jit import compiled, entry, inlined
from simulator.engine.kv_blocks import (
    add_steps,
    give_in_steps,
    largest,
    leave_published,
    profile_of,
    release_of_step,
    steps_to_eviction,
    steps_to_room,
)
from simulator.engine.prefix_cache import release_ended, steps_to_fill
from simulator.engine.progressions import count_itl, end_of_steps, spread, take_blocks
from simulator.engine.queues import HOST, N_GONE, N_QUEUED, STALL_START, STALLED, Queue, Rules
from simulator.engine.scheduler import Scheduled, published_to, schedule
from simulator.engine.scheduling import FAIR, FCFS, PREFILL_FIRST, STATIC
from simulator.engine.segments import (
    count_latencies,
    end_chunks,
    end_decodes,
    lengthen,
    price_step,
    record_segment,
    steps_alike,
    steps_until,
    widen_timeline,
)
from simulator.engine.swap import N_MOVED, charge_copies, delay_of
from simulator.engine.tiers import BLOCKED


class Pace(NamedTuple):
    """Steps of one part that last ``d0``, ``d0`` + ``q``, …, for at most ``longest`` steps; of it the device ``growth`` per step."""

    d0: float
    q: float
    growth: float
    longest: int


@inlined
def begin_step(cost: CostTable, out: Outcome, state: State, extra: Extra | None) -> None:
    """Bring the sums that are kept by step to the present one."""
    ints = state.ints
    if cost.window > 0 and extra is not None and extra.spec.on:
        batch, tariff = extra.spec.batch, extra.spec.tariff
        speculation.pass_window_events(batch, tariff.levels, ints[STEP], out.busy, state.row)
    if ints[STEP] - ints[STEP_ORIGIN] >= REBASE_STEPS:
        rebase_sums(cost, state, out, extra)


@inlined
def stop_of(
    limits: Limits, out: Outcome, state: State, queue: Queue, extra: Extra | None, until: float, next_arrival: float
) -> float:
    """When a segment must stop because something may change in the queue: an arrival that matters, a departure, or a load."""
    rules = queue.rules
    seat = state.ints[N_RUNNING] < limits.max_num_seqs
    matters = seat and queue.ints[N_QUEUED] == 0
    if rules.policy != FCFS:
        matters = seat or rules.preempt_lower
    if rules.batching == STATIC:
        matters = state.ints[N_RUNNING] == 0  # of ranks one may be empty while others go on
    stop = min(until, next_load(state, extra))
    if matters or rules.policy == FAIR or rules.clients_leave:
        stop = min(stop, next_arrival)
    return min(stop, next_departure(out, queue))


@inlined
def longest_segment(limits: Limits, state: State, queue: Queue, extra: Extra | None, scheduled: Scheduled) -> int:
    """Steps after which R7 may decide otherwise though nothing happens: tenants' counts grow, blocks are published, evicted or left by a window."""
    few = 1 << 60
    if limits.windowed > 0:
        if extra is not None and extra.spec.on:  # each sequence has a pace of its own: steps are looked at one by one
            few = limits.block_size
            if scheduled.wanted > 0:
                few = speculation.steps_to_any_gift(extra.spec.batch, state.ints[STEP])
        elif scheduled.wanted > 0:
            few = int(steps_to_room(limits, state, scheduled.wanted, queue.rules.batching >= PREFILL_FIRST))
        if extra is not None and extra.cache.on and scheduled.wanted > 0:  # W11: hits may shrink
            few = min(few, steps_to_eviction(limits, state, extra, scheduled.need))
    blocked = queue.ints[N_QUEUED] > 0 and state.ints[N_RUNNING] < limits.max_num_seqs
    if queue.rules.policy == FAIR and blocked and queue.rules.batching != STATIC:
        return 1
    if extra is not None:
        if extra.loads.ints[BLOCKED] == 1:
            return 1
        if scheduled.unsure:
            return min(few, int(steps_to_fill(extra.cache, published_to(state, queue))))
    return few


@inlined
def pace_of(
    cost: CostTable,
    state: State,
    rules: Rules,
    extra: Extra | None,
    price: Price,
    chunks: int,
    tokens: int,
    longest: int,
) -> Pace:
    """H1, M16: how long steps last once the host has done its part."""
    batch = state.ints[BATCH]
    growth = 0.0
    if chunks == 0:
        growth = price.slope * batch + cost.window_slope * state.ints[N_GROWING]
        if extra is not None and extra.spec.on:
            terms = speculation.decode_terms(extra.spec, cost.knots, cost.head[WALK, batch], state.ints[KNOT], batch)
            growth = terms.growth
    d0 = price.d0
    q = growth
    work = rules.host_step + rules.host_sequence * (batch + chunks) + rules.host_token * tokens
    if not rules.asynchronous:
        d0 += work
    elif d0 < work:  # the host sets the pace until the device's steps have grown as long
        if q > 0.0:
            longest = min(longest, max(1, math.ceil((work - d0) / q)))
            while longest > 1 and d0 + q * (longest - 1) > work:
                longest -= 1
        d0 = work
        q = 0.0
    return Pace(d0, q, growth, longest)


@inlined
def take_segment(
    limits: Limits, state: State, extra: Extra | None, scheduled: Scheduled, d0: float, q: float, k: int, profile: Any
) -> tuple[int, int, float]:
    """R5, C2, W2: let up to k decode steps take and give back their blocks; return how many fit, the blocks owned then, and blocks × time.

    Where windows are bounded the blocks owned in steps, among them those with the most, are added to ``profile``.
    """
    ints = state.ints
    step = ints[STEP]
    before = limits.num_blocks - ints[FREE_BLOCKS]
    if extra is not None and extra.spec.on:
        k, owned, integral = speculation.take_blocks_of_steps(
            extra.spec.batch, step, k, ints[FREE_BLOCKS], before, d0, q, profile
        )
    else:
        gives = limits.windowed > 0
        owned, integral = take_blocks(state.residues, limits.block_size, gives, step, k, before, d0, q)
    if extra is not None and extra.cache.on:
        taken = owned - before - scheduled.need
        if limits.windowed > 0:
            taken += give_in_steps(limits, state, extra, k)
        take(extra.cache, taken)
    ints[FREE_BLOCKS] = limits.num_blocks - owned
    if limits.windowed > 0 and not (extra is not None and extra.spec.on):
        add_steps(limits, state, k, profile)
    return k, owned, integral


@inlined
def charge_host(
    state: State, queue: Queue, extra: Extra | None, price: Price, pace: Pace, tokens: int, k: int
) -> float:
    """H1: share the time by which the host made k steps longer than the device's; return it."""
    host = k * (pace.d0 - price.d0) + (pace.q - pace.growth) * (k * (k - 1) // 2)
    queue.floats[HOST] += host
    if state.ints[BATCH] > 0:
        state.floats[SHARE_W] += tokens_per_sequence(extra) * host / tokens
        if extra is not None and extra.spec.on:
            speculation.count_host(extra.spec, host / tokens)
    return float(host)


@compiled
def count_latencies_after_stall(out: Outcome, state: State, queue: Queue, end: float) -> None:
    """B3: the first inter-token latencies after steps in which decoding sequences waited."""
    queue.ints[STALLED] = 0
    slot = state.ints[FIRST]
    while slot >= 0:
        if state.slots[slot, FINISH_STEP] >= 0:
            gap = end - max(queue.floats[STALL_START], state.sums[slot, LAST_TOKEN])
            count_itl(out.itl, state.bits_f, state.bits_i, gap, 0.0, 1, 1)
            state.floats[ITL_MAX] = max(state.floats[ITL_MAX], gap)
        slot = state.slots[slot, AFTER]


@inlined
def count_segment(out: Outcome, state: State, queue: Queue, t: float, d0: float, q: float, k: int) -> None:
    """R10, B3: inter-token latencies of k decode steps that start at t."""
    batch = state.ints[BATCH]
    if queue.ints[STALLED] == 0:
        count_latencies(out, state, batch, d0, q, k)
        return
    count_latencies_after_stall(out, state, queue, end_of_steps(t, d0, q, 1))
    if k > 1:
        count_latencies(out, state, batch, d0 + q, q, k - 1)


@inlined
def price_of(price: Price, host_per_token: float) -> Price:
    """The price of a step in which a chunk's token pays for the host too (H1)."""
    return Price(
        price.d0,
        price.per_token,
        price.per_row,
        price.slope,
        price.attention,
        price.rows,
        price.pairs,
        price.keys,
        price.seen_pairs,
        price.seen_keys,
        price.plane,
        price.prefill,
        price.per_chunk_token + host_per_token,
    )


@inlined
def end_step(
    cost: CostTable,
    limits: Limits,
    stream: Stream,
    out: Outcome,
    state: State,
    queue: Queue,
    extra: Extra | None,
    chunks: int,
    price: Price,
) -> int:
    """M2: what takes effect at the end of a step; return how many requests finish."""
    n_done = 0
    if cost.window > 0:
        pass_window_events(cost, limits, state, extra)
    if chunks > 0:
        n_done += end_chunks(cost, limits, stream, out, state, queue, extra, chunks, price)
    leave_published(limits, state, extra)
    if queue.ints[N_GONE] > 0:
        let_clients_go(cost, limits, stream, out, state, queue, extra)
    n_done += end_decodes(cost, limits, stream, out, state, queue, extra)
    if extra is not None and extra.cache.ints[N_ENDED] > 0:
        state.ints[FREE_BLOCKS] += release_ended(extra.cache, state.row, publishing_moment(state, extra))
    return n_done


@inlined
def wait_for(shared: State, loading: int, wakes: float) -> None:
    """R1, F5: idle until ``wakes``, while ``loading`` requests wait for their loads."""
    floats = shared.floats
    t = floats[CLOCK]
    widen_timeline(shared.timeline, floats, wakes)
    if loading > 0:
        floats[WAITING_INTEGRAL] += loading * (wakes - t)
        spread(shared.timeline, T_WAITING, floats[INTERVAL], t, wakes, float(loading))
    floats[IDLE] += wakes - t
    floats[CLOCK] = wakes


@entry
def advance(
    cost: CostTable,
    limits: Limits,
    stream: Stream,
    out: Outcome,
    state: State,
    queue: Queue,
    extra: Extra | None,
    until: float,
    known: float,
) -> bool:
    """Run until no step can start before ``until``; return whether everything is done. ``known`` as in :func:`simulator.engine.skip_ahead.advance`."""
    ints, floats, rules = state.ints, state.floats, queue.rules
    while True:
        t = floats[CLOCK]
        if t >= known:
            return False
        next_arrival = next_seen(stream, state, queue)
        if min(next_arrival, next_departure(out, queue), next_load(state, extra)) <= t:
            receive(cost, limits, stream, out, state, queue, extra, False, math.inf)  # noqa: FBT003 - compiled code takes no keywords here
            next_arrival = next_seen(stream, state, queue)
        if ints[N_RUNNING] == 0 and queue.ints[N_QUEUED] == 0:
            wakes = min(next_arrival, next_load(state, extra))
            if extra is not None and ints[N_LOADING] > 0:
                wakes = min(wakes, next_departure(out, queue))
            if wakes == math.inf:
                return True
            if wakes >= until:
                return False
            wait_for(state, ints[N_LOADING], wakes)
            continue
        if t >= until:
            return False

        # --- what runs: R5, R7, B1 to B4 ---
        begin_step(cost, out, state, extra)
        chunks = schedule(cost, limits, stream, out, state, queue, extra)
        if extra is not None and chunks.tokens == 0:  # all who waited load
            continue
        decoding = ints[BATCH]
        sits_out = chunks.n > 0 and rules.batching >= PREFILL_FIRST
        if sits_out:
            ints[BATCH] = 0
        waiting = n_waiting(state, queue)
        running = ints[N_RUNNING]
        ints[RAN] = running
        ints[MAX_WAITING] = max(ints[MAX_WAITING], waiting)
        ints[MAX_RUNNING] = max(ints[MAX_RUNNING], running)

        # --- what it costs, and for how many steps: R9, H1 ---
        price = price_step(cost, stream, state, extra, chunks.n, chunks.tokens, cost.dense[chunks.tokens])
        if extra is not None and extra.swap.on and extra.swap.ints[N_MOVED] > 0:
            delay = delay_of(extra.swap, price.d0)
            charge_copies(extra.swap, out.busy, delay)
            price = lengthen(price, delay)
        longest = longest_segment(limits, state, queue, extra, chunks)
        pace = pace_of(cost, state, rules, extra, price, chunks.n, chunks.tokens, longest)
        d0, q = pace.d0, pace.q
        k = 1
        owned = limits.num_blocks - ints[FREE_BLOCKS]
        blocks_integral = owned * d0
        if chunks.n == 0 and not chunks.preempted:
            stop = stop_of(limits, out, state, queue, extra, until, next_arrival)
            k = min(steps_until(state, d0, q, stop, steps_alike(cost, limits, state, extra)), pace.longest)
            profile = profile_of(limits, state)[0]
            profile[:] = 0
            k, owned, blocks_integral = take_segment(limits, state, extra, chunks, d0, q, k, profile)
            if limits.windowed > 0:
                owned = largest(profile)
        else:
            release_of_step(limits, state, extra)
        end = end_of_steps(t, d0, q, k)
        ints[MAX_BLOCKS] = max(ints[MAX_BLOCKS], owned)

        # --- let it happen: R10 to R15, L1 to L6 ---
        floats[CLOCK] = end
        floats[LAST_START] = end_of_steps(t, d0, q, k - 1)
        ints[STEPS] += k
        ints[SEGMENTS] += 1
        out.steps_by_tokens[chunks.tokens] += k
        out.steps_by_rows[price.rows] += k
        record_segment(state, t, end, running, waiting, blocks_integral, end - t)
        if ints[BATCH] > 0:
            advance_decodes(cost, state, extra, price, pace.growth, k)
            count_segment(out, state, queue, t, d0, q, k)
        host = charge_host(state, queue, extra, price, pace, chunks.tokens, k)
        if sits_out:
            ints[BATCH] = decoding
        else:
            ints[STEP] += k
        may_act = rules.clients_leave or stream.concurrency > 0
        if may_act and min(next_seen(stream, state, queue), next_departure(out, queue)) < end:
            receive_in_step(cost, limits, stream, out, state, queue, extra, known)
        ints[OWNED] = limits.num_blocks - ints[FREE_BLOCKS]
        n_done = end_step(
            cost, limits, stream, out, state, queue, extra, chunks.n, price_of(price, host / chunks.tokens)
        )
        if stream.concurrency > 0:
            for _ in range(n_done):
                release_next(stream, state, end + rules.output_s)
