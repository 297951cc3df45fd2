"""Pipeline stages: several micro-batches of one replica in flight.

A micro-batch is a group of requests that stay together (P2), so what a plain replica keeps of its batch is kept for each group: sums,
residues, heaps and the running list, in arrays with a leading axis. Slots, the queue and the KV blocks are one for all
groups; the integers that count them are lent to a group while it is being scheduled or completes. The last row belongs to the
replica as a whole. Rules P1 to P7 of ``docs/engine-ranks.md``.
"""

import math
from typing import Any, NamedTuple

from simulator.engine.batch import advance_decodes, append_running, pass_window_events, rebase_sums, unlink_running
from simulator.engine.core import (
    BATCH,
    CLOCK,
    FIFO_HEAD,
    FIFO_TAIL,
    FREE_BLOCKS,
    INTERVAL,
    KEYS_SUM,
    KNOT,
    LAST_START,
    MAX_BLOCKS,
    MAX_RUNNING,
    MAX_WAITING,
    N_FREE_SLOTS,
    N_PREEMPTED,
    N_RUNNING,
    PARTIAL,
    REBASE_STEPS,
    SEGMENTS,
    STEP,
    STEP_ORIGIN,
    STEPS,
    T_BUSY,
    WINDOW_SUM,
    CostTable,
    Limits,
    Outcome,
    Price,
    State,
    Stream,
)
from simulator.engine.fcfs import make_room, n_waiting, next_arrival_s, receive, release_next, schedule_chunks
from simulator.engine.jit import compiled, inlined
from simulator.engine.parts import load_price, part_of, store_price
from simulator.engine.progressions import residue, spread
from simulator.engine.segments import (
    count_latencies,
    end_chunks,
    end_decodes,
    price_step,
    record_segment,
    widen_timeline,
)

GROUP_BITS = 38
"""Group g numbers its steps from g << 38, so that a slot's stale heap keys of one group mean nothing to another."""

# indices into Flight.floats: stage-seconds of work, and of it what uneven experts added
WORK, IMBALANCE, N_FLIGHT_FLOATS = range(3)


class StageTable(NamedTuple):
    """Times of each stage; decode pieces are on the union of all stages' knots, planes padded with zeros."""

    dense: Any
    head: Any
    knots: Any
    value: Any
    slope: Any
    seq: Any
    planes: Any
    window_slope: Any
    experts: Any
    excess: Any
    send: Any


class Flight(NamedTuple):
    """Micro-batches in flight.

    ``done`` [pp] is when each group completes, inf if it is not in flight, ``last`` when it did last; ``chunks`` [pp] how many
    chunks it holds; ``free`` [pp] when each stage has its last one behind it; ``held`` [slots] chunks in flight of each request.
    """

    done: Any
    last: Any
    chunks: Any
    free: Any
    held: Any
    prices: Any
    floats: Any


@inlined
def _hand_over(giver: Any, taker: Any) -> None:
    """Lend the counts of what is one for all groups."""
    for name in (FREE_BLOCKS, N_RUNNING, N_PREEMPTED, N_FREE_SLOTS, FIFO_HEAD, FIFO_TAIL):
        taker[name] = giver[name]


@inlined
def _link(state: State, slot: int) -> None:
    """Put a running request at the end of the group's list."""
    append_running(state, slot)
    state.ints[N_RUNNING] -= 1


@inlined
def _detach(state: State, slot: int) -> None:
    """Take a request that goes on running out of the group's list."""
    unlink_running(state, slot)
    state.ints[N_RUNNING] += 1


@inlined
def _enter_stages(
    stages: StageTable, flight: Flight, shared: State, group: State, g: int, price: Price, tokens: int, excess: float
) -> None:
    """P5: send a micro-batch through the stages."""
    n_stages = len(flight.free)
    ints, floats = group.ints, shared.floats
    batch, knot = ints[BATCH], ints[KNOT]
    ready = floats[CLOCK]
    chunks = flight.chunks[g]
    # The way through the stages first: the timeline must reach its end before it is marked.
    for j in range(n_stages):
        time = stages.dense[j, tokens] + stages.head[j, price.rows]
        if excess > 0.0:
            time += excess * stages.experts[j, tokens]
        if batch > 0:
            time += stages.value[j, knot] + stages.slope[j, knot] * (ints[KEYS_SUM] - stages.knots[knot])
            time += stages.seq[j] * batch + stages.window_slope[j] * ints[WINDOW_SUM]
        if chunks > 0:
            attention = 0.0
            for p in range(stages.planes.shape[1]):
                value = stages.planes[j, p, 0] * price.pairs + stages.planes[j, p, 1] * price.keys
                value += stages.planes[j, p, 2] * chunks
                value += stages.planes[j, p, 3] * price.seen_pairs + stages.planes[j, p, 4] * price.seen_keys
                attention = max(attention, value)
            time += attention
        start = max(ready, flight.free[j])
        end = start + time
        flight.free[j] = end
        flight.floats[WORK] += time
        if end >= shared.timeline.shape[1] * floats[INTERVAL]:
            widen_timeline(shared.timeline, floats, end)
        spread(shared.timeline, T_BUSY, floats[INTERVAL], start, end, 1.0 / n_stages)
        ready = end
        if j + 1 < n_stages:
            ready += stages.send[j, tokens]
    flight.done[g] = ready


@inlined
def _launch(
    cost: CostTable,
    stages: StageTable,
    limits: Limits,
    stream: Stream,
    out: Outcome,
    shared: State,
    group: State,
    flight: Flight,
    g: int,
) -> int:
    """P1 to P4: try to schedule a micro-batch of group g; return its tokens, or −1 if it only preempted."""
    ints = group.ints
    bs = limits.block_size
    group.floats[CLOCK] = shared.floats[CLOCK]
    group.floats[INTERVAL] = shared.floats[INTERVAL]
    _hand_over(shared.ints, ints)
    partial = shared.ints[PARTIAL]
    held = partial >= 0 and flight.held[partial] > 0
    ints[PARTIAL] = partial
    if cost.window > 0:
        pass_window_events(cost, group)
    if ints[STEP] - ints[STEP_ORIGIN] >= REBASE_STEPS:
        rebase_sums(cost, group, out, None)
    if partial >= 0 and not held:
        _link(group, partial)
    need = group.residues[residue(-ints[STEP], bs)]
    short = need > ints[FREE_BLOCKS]
    passed_over = False
    if short:
        passed_over = make_room(cost, limits, out, group, None) and held
    if passed_over:
        ints[PARTIAL] = -1
    elif held:  # no victim of the above, but in its place in the order of admission
        _link(group, partial)
    free = ints[FREE_BLOCKS] - (0 if short else need)
    chunks = schedule_chunks(cost, limits, stream, out, group, None, free, short, held)
    if chunks.n > 0:
        ints[FREE_BLOCKS] = chunks.free
    elif not short:
        ints[FREE_BLOCKS] -= need
    flight.chunks[g] = chunks.n
    if chunks.tokens > 0:
        excess = 0.0
        if len(stages.excess) > 0:
            excess = stages.excess[shared.ints[STEPS] % len(stages.excess)]
        dense = cost.dense[chunks.tokens]
        if excess > 0.0:
            for j in range(len(flight.free)):
                dense += excess * stages.experts[j, chunks.tokens]
        flight.floats[IMBALANCE] += dense - cost.dense[chunks.tokens]
        price = price_step(cost, stream, group, None, chunks.n, chunks.tokens, dense)
        store_price(flight.prices, g, price, 0.0)
        _enter_stages(stages, flight, shared, group, g, price, chunks.tokens, excess)
        shared.ints[STEPS] += 1
        shared.ints[SEGMENTS] += 1
        out.steps_by_tokens[chunks.tokens] += 1
        out.steps_by_rows[price.rows] += 1
    under_way = ints[PARTIAL]
    for c in range(chunks.n):
        slot = group.chunk_slot[c]
        group.computed[slot] += group.chunk_size[c]
        flight.held[slot] += 1
        under_way = slot
        if group.computed[slot] == stream.prompt[group.row[slot]] + group.emitted[slot]:
            under_way = -1
    if passed_over:
        under_way = partial
    elif under_way >= 0:
        _detach(group, under_way)
    ints[PARTIAL] = -1
    shared.ints[PARTIAL] = under_way
    _hand_over(ints, shared.ints)
    if chunks.tokens == 0 and chunks.preempted:
        return -1
    return chunks.tokens


@inlined
def _complete(
    cost: CostTable, limits: Limits, stream: Stream, out: Outcome, shared: State, group: State, flight: Flight, g: int
) -> int:
    """P4: a micro-batch takes effect; return how many requests finish."""
    ints = group.ints
    now = shared.floats[CLOCK]
    group.floats[CLOCK] = now
    _hand_over(shared.ints, ints)
    price = load_price(flight.prices, g)
    if ints[BATCH] > 0:
        batch = ints[BATCH]
        advance_decodes(cost, group, None, price, 0.0, 1)
        count_latencies(out, group, batch, now - flight.last[g], 0.0, 1)
    ints[STEP] += 1
    n_done = 0
    if flight.chunks[g] > 0:
        for c in range(flight.chunks[g]):
            flight.held[group.chunk_slot[c]] -= 1
        n_done += end_chunks(cost, stream, out, group, None, flight.chunks[g], price, limits.block_size)
        ints[PARTIAL] = -1
    n_done += end_decodes(cost, stream, out, group, None, limits.block_size)
    _hand_over(ints, shared.ints)
    flight.done[g] = math.inf
    flight.last[g] = now
    return n_done


@compiled
def advance_stages(
    cost: CostTable,
    stages: StageTable,
    limits: Limits,
    stream: Stream,
    out: Outcome,
    states: State,
    flight: Flight,
    until: float,
) -> bool:
    """Run until nothing can happen before ``until``; return whether everything is done. ``cost`` sums the stages."""
    n_stages = len(flight.free)
    shared = part_of(states, n_stages)
    ints, floats = shared.ints, shared.floats
    floats[LAST_START] = -1.0  # who arrives between two instants was there at no micro-batch's scheduling
    while True:
        receive(stream, limits, out, shared, before_now=False)
        t = floats[CLOCK]
        next_arrival = next_arrival_s(stream, shared)
        if ints[N_RUNNING] == 0 and n_waiting(shared) == 0:
            if next_arrival == math.inf:
                return True
            if next_arrival >= until:
                return False
            widen_timeline(shared.timeline, floats, next_arrival)
            floats[CLOCK] = next_arrival
            continue
        if t >= until:
            return False

        # --- schedule: P1 to P5 ---
        while True:
            chosen = -1
            for g in range(n_stages):
                if flight.done[g] == math.inf and (chosen < 0 or states.ints[g, BATCH] > 0):
                    chosen = g
            if chosen < 0:
                break
            tokens = _launch(cost, stages, limits, stream, out, shared, part_of(states, chosen), flight, chosen)
            if tokens == 0:
                break
            if tokens > 0:
                ints[MAX_WAITING] = max(ints[MAX_WAITING], n_waiting(shared))
                ints[MAX_RUNNING] = max(ints[MAX_RUNNING], ints[N_RUNNING])
                ints[MAX_BLOCKS] = max(ints[MAX_BLOCKS], limits.num_blocks - ints[FREE_BLOCKS])

        # --- to the next instant ---
        when = math.inf
        first = -1
        full = True
        for g in range(n_stages):
            if flight.done[g] == math.inf:
                full = False
            elif flight.done[g] < when:
                when = flight.done[g]
                first = g
        if not full and next_arrival < when:
            when = next_arrival
            first = -1
        if when >= until:
            return False
        owned = limits.num_blocks - ints[FREE_BLOCKS]
        record_segment(shared, t, when, ints[N_RUNNING], n_waiting(shared), owned * (when - t), 0.0)
        floats[CLOCK] = when
        if first >= 0:
            n_done = _complete(cost, limits, stream, out, shared, part_of(states, first), flight, first)
            if stream.concurrency > 0 and n_done > 0:
                receive(stream, limits, out, shared, before_now=True)
                for _ in range(n_done):
                    release_next(stream, shared, when)
