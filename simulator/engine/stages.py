"""Pipeline stages: several micro-batches of one replica in flight.

A micro-batch is a group of requests that stay together (S2), so what a plain replica keeps of its batch is kept for each group: sums, residues, heaps and the
list of its decoding sequences, in arrays with a leading axis. Slots, the queue, the KV blocks and the cache are one for all groups; the integers that count
them are lent to a group while it is being scheduled or completes. The last row belongs to the replica as a whole. Where prompts go first (B3), decoding sequences
may sit a try out: they stay in their group, the *idle* one, which others join when they complete. So there is one group more than micro-batches fly.

Rules S1 to S7 of ``docs/engine-ranks.md``; M18, M21 and M22 of ``docs/engine-mixtures.md``.
"""

import math
from typing import Any

from simulator.engine.batch import (
    advance_decodes,
    append_running,
    leave_batch,
    pass_window_events,
    publishing_moment,
    start_decoding,
    unlink_running,
)
from simulator.engine.block_runs import EPOCH, N_ENDED
from simulator.engine.clients import (
    departure_of,
    end_any_load,
    is_rejected,
    join,
    leave_replica,
    leave_waiting,
    n_waiting,
    next_departure,
    next_load,
    next_seen,
    note_gone,
    take_arrival,
    tries_again,
    try_again,
)
from simulator.engine.core import (
    ADMITTED,
    AFTER,
    BATCH,
    BEFORE,
    CHUNK_SIZE,
    CHUNK_SLOT,
    CHUNK_START,
    CLOCK,
    COMPUTED,
    EMITTED,
    FIRST,
    FREE_BLOCKS,
    INTERVAL,
    KEYS_SUM,
    LAST,
    LAST_START,
    LAST_TOKEN,
    N_ADMITTED,
    N_FREE_SLOTS,
    N_LOADING,
    N_RUNNING,
    SEGMENTS,
    SHARE_W,
    STEP,
    STEPS,
    WINDOW_SUM,
    CostTable,
    Extra,
    Limits,
    Outcome,
    State,
    Stream,
)
from simulator.engine.fcfs import release_next
from simulator.engine.flight import IMBALANCE, Flight, StageTable, count_decodes, enter_stages, note_peaks
from simulator.engine.full_loop import begin_step, count_latencies_after_stall, price_of, wait_for
from simulator.engine.jit import compiled, entry, inlined
from simulator.engine.kv_blocks import leave_published, release_of_step
from simulator.engine.parts import HOST_SHARE, extra_of, load_price, part_of, store_price
from simulator.engine.prefix_cache import catch_up, release_ended
from simulator.engine.queues import (
    ALL,
    GONE,
    GONE_SLOT,
    GRANTED,
    HELD,
    KEPT_LAST_TOKEN,
    N_GONE,
    N_PARTIALS,
    N_QUEUED,
    PARTIAL_SLOT,
    SLOT,
    STALL_START,
    STALLED,
    TRIES,
    Queue,
    drop_partial,
    pop_due,
)
from simulator.engine.records import WAITING
from simulator.engine.rounds import go_round, may_go_round
from simulator.engine.scheduler import schedule
from simulator.engine.scheduling import FAIR, PREFILL_FIRST, STATIC
from simulator.engine.segments import (
    count_latencies,
    end_chunks,
    end_decodes,
    price_step,
    record_segment,
)


@inlined
def _hand_over(giver: Any, taker: Any) -> None:
    """Lend the counts of what is one for all groups."""
    for name in (FREE_BLOCKS, N_RUNNING, N_FREE_SLOTS, N_LOADING, N_ADMITTED):
        taker[name] = giver[name]


@inlined
def _link(state: State, slot: int) -> None:
    """Put a running request into the group's list, at its place in the order of admission."""
    ints, slots = state.ints, state.slots
    before = ints[LAST]
    while before >= 0 and slots[before, ADMITTED] > slots[slot, ADMITTED]:
        before = slots[before, BEFORE]
    after = ints[FIRST] if before < 0 else slots[before, AFTER]
    slots[slot, BEFORE] = before
    slots[slot, AFTER] = after
    if before >= 0:
        slots[before, AFTER] = slot
    else:
        ints[FIRST] = slot
    if after >= 0:
        slots[after, BEFORE] = slot
    else:
        ints[LAST] = slot


@inlined
def _detach(state: State, slot: int) -> None:
    """Take a request that goes on running out of the group's list."""
    unlink_running(state, slot)
    state.ints[N_RUNNING] += 1


@compiled
def _schedule_group(
    cost: CostTable,
    limits: Limits,
    stream: Stream,
    out: Outcome,
    shared: State,
    group: State,
    flight: Flight,
    queue: Queue,
    extra: Extra | None,
    g: int,
) -> tuple[int, int, bool]:
    """S1 to S3, M22: schedule among the sequences of a group, unfinished prompts and the queue; return chunks, tokens, and whether it preempted.

    Afterwards prompts that go on are in nobody's list; those that end with their chunk are in the group's.
    """
    ints = group.ints
    group.floats[CLOCK] = shared.floats[CLOCK]
    group.floats[INTERVAL] = shared.floats[INTERVAL]
    begin_step(cost, out, group, extra)
    for i in range(queue.ints[N_PARTIALS]):
        slot = queue.slots[i, PARTIAL_SLOT]
        if queue.slots[slot, HELD] == 0:
            _link(group, slot)
    queue.ints[STALLED] = 1  # sequences had their last token when the group completed, or each at its own time
    queue.floats[STALL_START] = flight.last[g]
    if extra is not None:
        extra.cache.ints[EPOCH] = queue.ints[TRIES] + 1
    found = schedule(cost, limits, stream, out, group, queue, extra)
    if found.n == 0 and not found.preempted:
        ints[FREE_BLOCKS] -= found.need
    for i in range(queue.ints[N_PARTIALS]):
        slot = queue.slots[i, PARTIAL_SLOT]
        if queue.slots[slot, HELD] == 0:
            _detach(group, slot)
    for c in range(found.n):
        slot = group.chunks[c, CHUNK_SLOT]
        known = stream.prompt[group.row[slot]] + group.slots[slot, EMITTED]
        if queue.slots[slot, HELD] > 0 and group.slots[slot, COMPUTED] + group.chunks[c, CHUNK_SIZE] == known:
            _link(group, slot)  # no victim before, but in its place now
    if ints[BATCH] > 0 and queue.ints[GRANTED] == ALL:
        if queue.rules.policy == FAIR:
            count_decodes(group, queue, 1)
        if extra is not None and extra.cache.late:
            catch_up(extra.cache, group.row, ints[STEP])
    return found.n, found.tokens, found.preempted


@inlined
def _launch(
    cost: CostTable,
    stages: StageTable,
    stream: Stream,
    out: Outcome,
    shared: State,
    group: State,
    flight: Flight,
    queue: Queue,
    extra: Extra | None,
    g: int,
    chunks: int,
    tokens: int,
) -> None:
    """S2, S5: a group's micro-batch, ``chunks`` chunks and its decoding sequences, sets off."""
    flight.chunks[g] = chunks
    excess = 0.0
    if len(stages.excess) > 0:
        excess = stages.excess[shared.ints[STEPS] % len(stages.excess)]
    dense = cost.dense[tokens]
    if excess > 0.0:
        for j in range(len(flight.free)):
            dense += excess * stages.experts[j, tokens]
    flight.floats[IMBALANCE] += dense - cost.dense[tokens]
    price = price_step(cost, stream, group, None, chunks, tokens, dense)
    store_price(flight.prices, g, price)
    enter_stages(
        stages,
        flight,
        out,
        shared,
        queue,
        extra,
        g,
        price,
        group.ints,
        group.ints[KEYS_SUM],
        group.ints[WINDOW_SUM],
        tokens,
        excess,
    )
    shared.ints[STEPS] += 1
    shared.ints[SEGMENTS] += 1
    out.steps_by_tokens[tokens] += 1
    out.steps_by_rows[price.rows] += 1
    for c in range(chunks):
        slot = group.chunks[c, CHUNK_SLOT]
        group.slots[slot, COMPUTED] += group.chunks[c, CHUNK_SIZE]
        queue.slots[slot, HELD] += 1
        known = stream.prompt[group.row[slot]] + group.slots[slot, EMITTED]
        flight.group[slot] = g if group.slots[slot, COMPUTED] == known else -1


@compiled
def _move_chunks(giver: State, taker: State, chunks: int) -> None:
    """B3: prompts set off without the sequences that sit the try out."""
    for c in range(chunks):
        slot = giver.chunks[c, CHUNK_SLOT]
        for column in (CHUNK_SLOT, CHUNK_SIZE, CHUNK_START):
            taker.chunks[c, column] = giver.chunks[c, column]
        unlink_running(giver, slot)
        append_running(taker, slot)
    giver.ints[N_RUNNING] += chunks
    taker.ints[N_RUNNING] = giver.ints[N_RUNNING]


@compiled
def _merge(
    cost: CostTable,
    limits: Limits,
    stream: Stream,
    out: Outcome,
    giver: State,
    taker: State,
    flight: Flight,
    giver_extra: Extra | None,
    taker_extra: Extra | None,
    from_g: int,
    to_g: int,
) -> None:
    """B3, S3: the sequences of a group that has completed join those that are idle."""
    if flight.last[to_g] >= 0.0:
        slot = taker.ints[FIRST]
        while slot >= 0:
            taker.sums[slot, LAST_TOKEN] = flight.last[to_g]
            slot = taker.slots[slot, AFTER]
    slot = giver.ints[FIRST]
    while slot >= 0:
        after = giver.slots[slot, AFTER]
        leave_batch(cost, limits, giver, out, giver_extra, slot)
        _detach(giver, slot)
        rest = stream.output[giver.row[slot]] - giver.slots[slot, EMITTED]
        start_decoding(cost, limits, stream, taker, taker_extra, slot, rest)
        giver.sums[slot, LAST_TOKEN] = flight.last[from_g]
        flight.group[slot] = to_g
        _link(taker, slot)
        slot = after
    flight.last[to_g] = -1.0


@compiled
def _let_go(
    cost: CostTable,
    limits: Limits,
    stream: Stream,
    out: Outcome,
    shared: State,
    group: State,
    flight: Flight,
    queue: Queue,
    extra: Extra | None,
) -> None:
    """M21: those leave whose client has left and whose last micro-batch has completed, in the order of admission."""
    for i in range(1, queue.ints[N_GONE]):
        slot = queue.slots[i, GONE_SLOT]
        j = i
        while j > 0 and group.slots[queue.slots[j - 1, GONE_SLOT], ADMITTED] > group.slots[slot, ADMITTED]:
            queue.slots[j, GONE_SLOT] = queue.slots[j - 1, GONE_SLOT]
            j -= 1
        queue.slots[j, GONE_SLOT] = slot
    kept = 0
    for i in range(queue.ints[N_GONE]):
        slot = queue.slots[i, GONE_SLOT]
        row = group.row[slot]
        if _in_flight(flight, queue, slot):
            queue.slots[kept, GONE_SLOT] = slot
            kept += 1
            continue
        status = queue.row_ints[row, GONE]
        if flight.group[slot] < 0:
            _link(group, slot)
        leave_replica(cost, limits, stream, out, group, queue, extra, slot, status)
        if tries_again(queue, row, status):
            try_again(shared, queue, row, queue.row_floats[row, KEPT_LAST_TOKEN], shared.floats[CLOCK])
    queue.ints[N_GONE] = kept


@inlined
def _in_flight(flight: Flight, queue: Queue, slot: int) -> bool:
    """S2: whether a running request is part of a micro-batch in flight."""
    g = flight.group[slot]
    return bool(queue.slots[slot, HELD] > 0 or (g >= 0 and flight.done[g] < math.inf))


@inlined
def _complete(
    cost: CostTable,
    limits: Limits,
    stream: Stream,
    out: Outcome,
    shared: State,
    group: State,
    flight: Flight,
    queue: Queue,
    extra: Extra | None,
    g: int,
) -> int:
    """S4, M2: a micro-batch takes effect; return how many requests finish."""
    ints = group.ints
    now = shared.floats[CLOCK]
    group.floats[CLOCK] = now
    group.floats[INTERVAL] = shared.floats[INTERVAL]
    price = price_of(load_price(flight.prices, g), flight.prices[g, HOST_SHARE])
    if ints[BATCH] > 0:
        batch = ints[BATCH]
        advance_decodes(cost, group, None, price, 0.0, 1)
        group.floats[SHARE_W] += flight.prices[g, HOST_SHARE]
        if flight.last[g] >= 0.0:
            count_latencies(out, group, batch, now - flight.last[g], 0.0, 1)
        else:
            queue.floats[STALL_START] = -1.0
            count_latencies_after_stall(out, group, queue, now)
    release_of_step(limits, group, extra)
    ints[STEP] += 1
    if cost.window > 0:
        pass_window_events(cost, limits, group, extra)
    n_done = 0
    chunks = flight.chunks[g]
    flight.done[g] = math.inf
    flight.last[g] = now
    if chunks > 0:
        for c in range(chunks):
            queue.slots[group.chunks[c, CHUNK_SLOT], HELD] -= 1
        n_done += end_chunks(cost, limits, stream, out, group, queue, extra, chunks, price)
    leave_published(limits, group, extra)
    if queue.ints[N_GONE] > 0:
        _let_go(cost, limits, stream, out, shared, group, flight, queue, extra)
    n_done += end_decodes(cost, limits, stream, out, group, queue, extra)
    if extra is not None and extra.cache.ints[N_ENDED] > 0:
        ints[FREE_BLOCKS] += release_ended(extra.cache, group.row, publishing_moment(group, extra))
    return int(n_done)


@compiled
def _client_leaves(
    cost: CostTable,
    limits: Limits,
    stream: Stream,
    out: Outcome,
    shared: State,
    states: State,
    flight: Flight,
    queue: Queue,
    extras: Extra | None,
    row: int,
    due: float,
) -> None:
    """L1 to L5, M21: a client whose time has come gives up or cancels, unless what it waited for is there."""
    status = departure_of(out, queue, row, due)
    if status == 0:
        return
    waits_to_leave = False
    if out.status[row] == WAITING:
        leave_waiting(limits, stream, out, shared, shared, queue, extra_of(extras, 0), row, status, due)
    else:
        slot = queue.row_ints[row, SLOT]
        waits_to_leave = _in_flight(flight, queue, slot)
        if waits_to_leave:
            drop_partial(queue, slot)
            note_gone(queue, row, status)
            queue.row_floats[row, KEPT_LAST_TOKEN] = due
        else:
            g = max(flight.group[slot], 0)
            group = part_of(states, g)
            _hand_over(shared.ints, group.ints)
            if flight.group[slot] < 0:
                _link(group, slot)
            leave_replica(cost, limits, stream, out, group, queue, extra_of(extras, g), slot, status)
            _hand_over(group.ints, shared.ints)
    if tries_again(queue, row, status):
        if not waits_to_leave:
            try_again(shared, queue, row, due, due)
    elif stream.concurrency > 0:
        release_next(stream, shared, due)


@compiled
def _receive_for_stages(
    cost: CostTable,
    limits: Limits,
    stream: Stream,
    out: Outcome,
    shared: State,
    states: State,
    flight: Flight,
    queue: Queue,
    extras: Extra | None,
    before_now: bool,
) -> None:
    """M1: let clients leave, loads end and requests arrive, in order of time, up to now, or before now."""
    now = shared.floats[CLOCK]
    while True:
        due = next_departure(out, queue)
        ready = next_load(shared, extra_of(extras, 0))
        first = min(due, ready, next_seen(stream, shared, queue))
        if first > now or (before_now and first == now) or first == math.inf:
            return
        if due == first:
            row = pop_due(queue)
            _client_leaves(cost, limits, stream, out, shared, states, flight, queue, extras, row, due)
        elif ready == first:
            end_any_load(out, shared, queue, extra_of(extras, 0))
        else:
            row, arrival = take_arrival(stream, shared)
            if not is_rejected(stream, limits, out, shared, queue, row, arrival):
                join(out, shared, shared, queue, extra_of(extras, 0), row, arrival)


@compiled
def _try(
    cost: CostTable,
    stages: StageTable,
    limits: Limits,
    stream: Stream,
    out: Outcome,
    shared: State,
    states: State,
    flight: Flight,
    queue: Queue,
    extras: Extra | None,
) -> bool:
    """S4: try to schedule a micro-batch; return whether another try makes sense."""
    flying = 0
    chosen = -1
    empty = -1
    for g in range(len(flight.done)):
        if flight.done[g] < math.inf:
            flying += 1
        elif states.ints[g, BATCH] > 0:
            chosen = g
        else:
            empty = g
    if flying == len(flight.free):
        return False
    nobody_comes = queue.ints[N_QUEUED] == 0 and queue.ints[N_PARTIALS] == 0
    if chosen < 0 and nobody_comes and queue.rules.batching != STATIC:  # whose batch a try in vain closes
        return False
    g = chosen if chosen >= 0 else empty
    group = part_of(states, g)
    extra = extra_of(extras, g)
    _hand_over(shared.ints, group.ints)
    chunks, tokens, preempted = _schedule_group(cost, limits, stream, out, shared, group, flight, queue, extra, g)
    _hand_over(group.ints, shared.ints)
    if tokens == 0:
        return bool(preempted)
    if chunks > 0 and group.ints[BATCH] > 0 and queue.rules.batching >= PREFILL_FIRST:
        _move_chunks(group, part_of(states, empty), chunks)
        g = empty
    group = part_of(states, g)
    _launch(cost, stages, stream, out, shared, group, flight, queue, extra_of(extras, g), g, chunks, tokens)
    note_peaks(limits, shared, n_waiting(shared, queue))
    return True


@compiled
def _land(
    cost: CostTable,
    limits: Limits,
    stream: Stream,
    out: Outcome,
    shared: State,
    states: State,
    flight: Flight,
    queue: Queue,
    extras: Extra | None,
    g: int,
) -> int:
    """S4: micro-batch g completes; return how many requests finish."""
    group = part_of(states, g)
    extra = extra_of(extras, g)
    _hand_over(shared.ints, group.ints)
    n_done = _complete(cost, limits, stream, out, shared, group, flight, queue, extra, g)
    if group.ints[BATCH] > 0:
        for other in range(len(flight.done)):
            if other != g and flight.done[other] == math.inf and states.ints[other, BATCH] > 0:
                taker = part_of(states, other)
                _hand_over(group.ints, taker.ints)
                _merge(cost, limits, stream, out, group, taker, flight, extra, extra_of(extras, other), g, other)
                break
    _hand_over(group.ints, shared.ints)
    return int(n_done)


@entry
def advance_stages(
    cost: CostTable,
    stages: StageTable,
    limits: Limits,
    stream: Stream,
    out: Outcome,
    states: State,
    queue: Queue,
    extras: Extra | None,
    flight: Flight,
    until: float,
) -> bool:
    """Run until nothing can happen before ``until``; return whether everything is done. ``cost`` sums the stages."""
    n_groups = len(flight.done)
    shared = part_of(states, n_groups)
    ints, floats = shared.ints, shared.floats
    floats[LAST_START] = -1.0  # who arrives between two instants was there at no micro-batch's scheduling
    n_done = 0
    while True:
        before_now = stream.concurrency > 0 and n_done > 0  # who is released by a finish comes after those (M1)
        _receive_for_stages(cost, limits, stream, out, shared, states, flight, queue, extras, before_now)
        if before_now:
            for _ in range(n_done):
                release_next(stream, shared, floats[CLOCK] + queue.rules.output_s)
            n_done = 0
            continue
        t = floats[CLOCK]
        next_arrival = next_seen(stream, shared, queue)
        if ints[N_RUNNING] == 0 and queue.ints[N_QUEUED] == 0:
            wakes = min(next_arrival, next_load(shared, extra_of(extras, 0)))
            if ints[N_LOADING] > 0:
                wakes = min(wakes, next_departure(out, queue))
            if wakes == math.inf:
                return True
            if wakes >= until:
                return False
            wait_for(shared, ints[N_LOADING], wakes)
            continue
        if t >= until:
            return False

        # --- schedule: S1 to S5 ---
        while _try(cost, stages, limits, stream, out, shared, states, flight, queue, extras):
            pass

        # --- to the next instant, past completions after which nothing changes ---
        changes = min(next_load(shared, extra_of(extras, 0)), next_departure(out, queue))
        waiting = n_waiting(shared, queue)
        if extras is None and may_go_round(stages, limits, stream, out, shared, states, flight, queue):
            soon = min(changes, next_arrival, until)
            go_round(cost, stages, limits, stream, out, shared, states, flight, queue, waiting, soon)
            t = floats[CLOCK]
        when = math.inf
        first = -1
        flying = 0
        for g in range(n_groups):
            if flight.done[g] < math.inf:
                flying += 1
                if flight.done[g] < when:
                    when = flight.done[g]
                    first = g
        if flying < len(flight.free):
            changes = min(changes, next_arrival)
        if changes < when:
            when = changes
            first = -1
        if when >= until:
            return False
        owned = limits.num_blocks - ints[FREE_BLOCKS]
        record_segment(shared, t, when, ints[N_RUNNING], waiting, owned * (when - t), 0.0)
        floats[CLOCK] = when
        if first >= 0:
            n_done = _land(cost, limits, stream, out, shared, states, flight, queue, extras, first)
