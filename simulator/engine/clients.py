"""Who comes and goes in the compiled engine: arrivals, rejections, clients that leave, attempts, and loads that are there.

Rules R2 to R4, L1 to L6 and M1. Of the two states that a function takes, ``shared`` is the replica's (its clock, the arrivals to come, its integrals) and
``state`` that of the part which serves the request; of a replica of one part they are the same. Columns of rows are one for all parts.
"""

import math

from simulator.engine.batch import blocks_left, blocks_owned, leave_batch, unlink_running
from simulator.engine.block_runs import ORDER
from simulator.engine.core import (
    AFTER,
    CLOCK,
    COMPUTED,
    EMITTED,
    FINISH_STEP,
    FIRST,
    FREE_BLOCKS,
    FREE_SLOT,
    INTERVAL,
    LAST_START,
    MAX_WAITING,
    N_FREE_SLOTS,
    N_LOADING,
    N_PENDING,
    NEXT_ROW,
    SEEN,
    STEP,
    T_WAITING,
    WAITING_INTEGRAL,
    CostTable,
    Extra,
    Limits,
    Outcome,
    State,
    Stream,
)
from simulator.engine.fcfs import release_next
from simulator.engine.heaps import pop_arrival, push_arrival
from simulator.engine.jit import compiled, compiled_once, inlined
from simulator.engine.kv_blocks import blocks_at_most, blocks_owned_at
from simulator.engine.prefix_cache import give_back
from simulator.engine.progressions import spread
from simulator.engine.queues import (
    ABANDONED_OUTPUTS,
    ABANDONED_TOKENS,
    ATTEMPT_S,
    ATTEMPTS,
    CANCEL_S,
    CANCELLATIONS,
    DEADLINE_S,
    GONE,
    GONE_SLOT,
    KEPT_EMITTED,
    KEPT_SEEN,
    N_GONE,
    N_QUEUED,
    PUT_BACK_AT,
    RANK,
    RETRIES,
    SLOT,
    TIMEOUT_S,
    TIMEOUTS,
    TTFT_TIMEOUT_S,
    WASTED,
    Queue,
    add_due,
    come_back,
    drop_partial,
    due_of,
    join_queue,
    leave_queue,
    next_due,
    pop_due,
)
from simulator.engine.records import CANCELLED, REJECTED, TIMED_OUT, WAITING
from simulator.engine.scheduling import CHUNKED, EDF, STATIC
from simulator.engine.segments import cut_to_length, retire
from simulator.engine.swap import forget
from simulator.engine.tiers import drop_load, next_ready


@inlined
def next_seen(stream: Stream, shared: State, queue: Queue) -> float:
    """H2: when the scheduler sees the next request; infinity if none is on its way."""
    when = math.inf
    if shared.ints[N_PENDING] > 0:
        when = shared.pending_time[0]
    if stream.concurrency == 0 and shared.ints[NEXT_ROW] < len(stream.prompt):
        when = min(when, stream.arrival[shared.ints[NEXT_ROW]])
    return float(when + queue.rules.request_s)


@inlined
def next_departure(out: Outcome, queue: Queue) -> float:
    """L1: when the next client leaves; infinity if none will."""
    return next_due(queue, out.status) if queue.rules.clients_leave else math.inf


@inlined
def next_load(state: State, extra: Extra | None) -> float:
    """F6: when the next load will be there; infinity if none is on its way."""
    if extra is not None and extra.loads.on:
        return float(next_ready(extra.loads, state.ints[N_LOADING]))
    return math.inf


@inlined
def n_waiting(state: State, queue: Queue) -> int:
    """Requests that wait, those that load among them (F5)."""
    return int(queue.ints[N_QUEUED] + state.ints[N_LOADING])


@inlined
def waited(shared: State, since: float, sign: float) -> None:
    """R13: waiting from ``since`` to now that the segment did not count, or (sign -1) should not have."""
    now = shared.floats[CLOCK]
    if since < now:
        shared.floats[WAITING_INTEGRAL] += sign * (now - since)
        spread(shared.timeline, T_WAITING, shared.floats[INTERVAL], since, now, sign)


@inlined
def take_arrival(stream: Stream, shared: State) -> tuple[int, float]:
    """Row and time of the next arrival, which is then no longer to come; by time, then row."""
    ints = shared.ints
    arrival = math.inf
    row = -1
    if ints[N_PENDING] > 0:
        arrival = shared.pending_time[0]
        row = shared.pending_row[0]
    if stream.concurrency == 0 and ints[NEXT_ROW] < len(stream.prompt):
        other = stream.arrival[ints[NEXT_ROW]]
        if other < arrival or (other == arrival and ints[NEXT_ROW] < row):
            ints[NEXT_ROW] += 1
            return int(ints[NEXT_ROW] - 1), float(other)
    ints[N_PENDING] = pop_arrival(shared.pending_time, shared.pending_row, ints[N_PENDING])
    return int(row), float(arrival)


@inlined
def is_rejected(
    stream: Stream, limits: Limits, out: Outcome, shared: State, queue: Queue, row: int, arrival: float
) -> bool:
    """R4, H2, L5: an attempt is seen by the scheduler, which may refuse it."""
    rules = queue.rules
    queue.row_ints[row, ATTEMPTS] += 1
    if queue.row_ints[row, ATTEMPTS] > 1:
        queue.counts[RETRIES] += 1
    else:
        out.arrival[row] = arrival
    longest = stream.prompt[row] + stream.max_tokens[row]
    whole = (stream.prompt[row] if rules.batching == STATIC else longest - 1) - stream.cached[row]
    if (
        0 < limits.max_model_len < longest
        or blocks_at_most(limits, 0, longest - 1 + limits.lookahead) > limits.num_blocks
        or (rules.batching != CHUNKED and whole > limits.budget)
    ):
        out.status[row] = REJECTED
        if stream.concurrency > 0:
            release_next(stream, shared, arrival + rules.request_s)
        return True
    return False


@inlined
def join(
    out: Outcome, shared: State, state: State, queue: Queue, extra: Extra | None, row: int, arrival: float
) -> None:
    """An attempt that was not refused joins the queue, and starts from nothing (L5, M20)."""
    rules = queue.rules
    queue.row_floats[row, ATTEMPT_S] = arrival
    queue.row_ints[row, KEPT_EMITTED] = 0
    queue.row_ints[row, KEPT_SEEN] = 0
    queue.row_ints[row, PUT_BACK_AT] = -1
    out.scheduled[row] = math.nan
    out.first_token[row] = math.nan
    if extra is not None:
        if extra.cache.on:
            extra.cache.reused[row] = 0
        if extra.loads.on:
            extra.loads.loaded[row] = 0
            extra.loads.start_s[row] = math.nan
            extra.loads.end_s[row] = math.nan
        if extra.spec.on:
            extra.spec.fraction[row] = 0
    if rules.policy == EDF:
        queue.row_floats[row, RANK] = arrival + queue.row_floats[row, DEADLINE_S]
    out.status[row] = WAITING
    join_queue(queue, out.status, row, state.ints[STEP])
    waited(shared, arrival + rules.request_s, 1.0)
    if rules.clients_leave:
        add_due(queue, out.status, row, not math.isnan(out.first_token[row]))


@inlined
def peaks_at(shared: State, when: float) -> bool:
    """Whether who joins at ``when``, within a segment, was there when a later step of it was scheduled."""
    return bool(when < shared.floats[CLOCK] and when <= shared.floats[LAST_START])


@inlined
def abandon(
    stream: Stream, out: Outcome, queue: Queue, extra: Extra | None, row: int, status: int, seen: int, emitted: int
) -> None:
    """L6: count what an attempt cost that its client has left."""
    reused = stream.cached[row]
    if extra is not None and extra.cache.on:
        reused = extra.cache.reused[row]
    queue.counts[ABANDONED_TOKENS] += max(0, seen - reused)
    queue.counts[ABANDONED_OUTPUTS] += emitted
    queue.row_floats[row, WASTED] = out.busy[row]
    queue.row_ints[row, GONE] = 0
    out.status[row] = status


@compiled
def leave_replica(
    cost: CostTable,
    limits: Limits,
    stream: Stream,
    out: Outcome,
    state: State,
    queue: Queue,
    extra: Extra | None,
    slot: int,
    status: int,
) -> None:
    """L3: let a running request go whose client has left."""
    ints = state.ints
    row = state.row[slot]
    decoded = state.slots[slot, FINISH_STEP] >= 0
    retire(limits, stream, state, queue, slot)
    if decoded:
        leave_batch(cost, limits, state, out, extra, slot)
        state.slots[slot, FINISH_STEP] = -1
    else:
        drop_partial(queue, slot)
    freed = blocks_owned(limits, state, extra, slot, decoded)
    passed = blocks_left(limits, state, extra, slot, decoded)
    if extra is not None:
        if extra.spec.on and decoded:
            cut_to_length(stream, state, extra, slot)
        if extra.cache.on:
            freed = give_back(extra.cache, slot, row, freed, passed, ints[STEP])
    ints[FREE_BLOCKS] += freed
    unlink_running(state, slot)
    free_slot(state, slot)
    abandon(
        stream,
        out,
        queue,
        extra,
        row,
        status,
        max(state.slots[slot, SEEN], state.slots[slot, COMPUTED]),
        state.slots[slot, EMITTED],
    )


@inlined
def free_slot(state: State, slot: int) -> None:
    """Let a slot be used again."""
    state.slots[state.ints[N_FREE_SLOTS], FREE_SLOT] = slot
    state.ints[N_FREE_SLOTS] += 1


@compiled
def departure_of(out: Outcome, queue: Queue, row: int, due: float) -> int:
    """L1: the status of a client whose time has come, counted; 0 if what it waited for is there."""
    since = queue.row_floats[row, ATTEMPT_S]
    status = CANCELLED
    if since + queue.row_floats[row, TIMEOUT_S] == due or (
        math.isnan(out.first_token[row]) and since + queue.row_floats[row, TTFT_TIMEOUT_S] == due
    ):
        status = TIMED_OUT
    elif since + queue.row_floats[row, CANCEL_S] != due:
        add_due(queue, out.status, row, not math.isnan(out.first_token[row]))
        return 0
    queue.counts[TIMEOUTS if status == TIMED_OUT else CANCELLATIONS] += 1
    return status


@compiled
def leave_waiting(
    limits: Limits,
    stream: Stream,
    out: Outcome,
    shared: State,
    state: State,
    queue: Queue,
    extra: Extra | None,
    row: int,
    status: int,
    due: float,
) -> None:
    """L3, M12, M13: let a request go that waits or loads."""
    loading = False
    if extra is not None:
        if extra.loads.on and state.ints[N_LOADING] > 0:
            loading = drop_load(extra.loads, state.ints[N_LOADING], row, due)
        if extra.swap.on and extra.swap.saved[row] > 0:
            saved = extra.swap.saved[row]
            forget(extra.swap, row, blocks_owned_at(limits, saved, saved))
    if loading:
        state.ints[N_LOADING] -= 1
    else:
        leave_queue(queue, row)
    waited(shared, due, -1.0)
    abandon(stream, out, queue, extra, row, status, queue.row_ints[row, KEPT_SEEN], queue.row_ints[row, KEPT_EMITTED])


@inlined
def tries_again(queue: Queue, row: int, status: int) -> bool:
    """L5: whether a client that has left comes back."""
    return bool(status == TIMED_OUT and queue.row_ints[row, ATTEMPTS] < queue.rules.max_attempts)


@compiled
def try_again(shared: State, queue: Queue, row: int, due: float, left: float) -> None:
    """L5: a client that gave up at ``due``, and whose attempt ``left`` the replica, arrives again."""
    again = max(due + queue.waits[queue.row_ints[row, ATTEMPTS] - 1], left)
    shared.ints[N_PENDING] = push_arrival(shared.pending_time, shared.pending_row, shared.ints[N_PENDING], again, row)


@inlined
def note_gone(queue: Queue, row: int, status: int) -> None:
    """L3: a client has left whose request is in a step under way."""
    queue.row_ints[row, GONE] = status
    queue.slots[queue.ints[N_GONE], GONE_SLOT] = queue.row_ints[row, SLOT]
    queue.ints[N_GONE] += 1


@compiled_once
def client_leaves(
    cost: CostTable,
    limits: Limits,
    stream: Stream,
    out: Outcome,
    shared: State,
    state: State,
    queue: Queue,
    extra: Extra | None,
    row: int,
    due: float,
    in_step: bool,
) -> None:
    """L1 to L5: a client whose time has come gives up or cancels, unless what it waited for is there."""
    status = departure_of(out, queue, row, due)
    if status == 0:
        return
    left = due
    if out.status[row] == WAITING:
        leave_waiting(limits, stream, out, shared, state, queue, extra, row, status, due)
    elif in_step:
        left = shared.floats[CLOCK]
        note_gone(queue, row, status)
    else:
        leave_replica(cost, limits, stream, out, state, queue, extra, queue.row_ints[row, SLOT], status)
    if tries_again(queue, row, status):
        try_again(shared, queue, row, due, left)
    elif stream.concurrency > 0:
        release_next(stream, shared, due)


@compiled
def let_clients_go(
    cost: CostTable,
    limits: Limits,
    stream: Stream,
    out: Outcome,
    state: State,
    queue: Queue,
    extra: Extra | None,
) -> None:
    """L3, M2: at the end of a step, those leave whose client left during it, in the order of admission."""
    if extra is not None and extra.cache.on:
        for i in range(1, queue.ints[N_GONE]):
            slot = queue.slots[i, GONE_SLOT]
            order = extra.cache.slots[slot, ORDER]
            j = i
            while j > 0 and extra.cache.slots[queue.slots[j - 1, GONE_SLOT], ORDER] > order:
                queue.slots[j, GONE_SLOT] = queue.slots[j - 1, GONE_SLOT]
                j -= 1
            queue.slots[j, GONE_SLOT] = slot
    for i in range(queue.ints[N_GONE]):
        slot = queue.slots[i, GONE_SLOT]
        status = queue.row_ints[state.row[slot], GONE]
        if status != 0:
            leave_replica(cost, limits, stream, out, state, queue, extra, slot, status)
    queue.ints[N_GONE] = 0


@compiled
def end_load(out: Outcome, state: State, queue: Queue, extra: Extra) -> None:
    """F5: the first of those who load comes back to the queue."""
    loads = extra.loads
    row = loads.rows[0]
    state.ints[N_LOADING] = pop_arrival(loads.times, loads.rows, state.ints[N_LOADING])
    come_back(queue, out.status, row)


@inlined
def end_any_load(out: Outcome, state: State, queue: Queue, extra: Extra | None) -> None:
    """The same where there may be no loads at all."""
    if extra is not None:
        end_load(out, state, queue, extra)


@compiled
def let_running_leave(
    cost: CostTable,
    limits: Limits,
    stream: Stream,
    out: Outcome,
    shared: State,
    state: State,
    queue: Queue,
    extra: Extra | None,
) -> None:
    """L3: those in the step under way whose clients leave before its end, in order of time, then row."""
    while True:
        due, row = shared.floats[CLOCK], -1
        slot = state.ints[FIRST]
        while slot >= 0:
            other = state.row[slot]
            when = due_of(queue, other, not math.isnan(out.first_token[other]))
            if queue.row_ints[other, GONE] == 0 and (when < due or (when == due and other < row)):
                due, row = when, other
            slot = state.slots[slot, AFTER]
        if row < 0:
            return
        client_leaves(cost, limits, stream, out, shared, state, queue, extra, row, due, True)  # noqa: FBT003


@inlined
def receive(
    cost: CostTable,
    limits: Limits,
    stream: Stream,
    out: Outcome,
    state: State,
    queue: Queue,
    extra: Extra | None,
    in_step: bool,
    known: float,
) -> None:
    """M1: let clients leave, loads end and requests arrive, in order of time, up to now, or at the end of a step before now and before ``known``."""
    now = state.floats[CLOCK]
    while True:
        due = next_departure(out, queue)
        ready = next_load(state, extra)
        first = min(due, ready, next_seen(stream, state, queue))
        if first > now or (in_step and first >= min(now, known)) or first == math.inf:
            return
        if due == first:
            row = pop_due(queue)
            client_leaves(cost, limits, stream, out, state, state, queue, extra, row, due, in_step)
        elif extra is not None and ready == first:
            end_load(out, state, queue, extra)
        else:
            row, arrival = take_arrival(stream, state)
            if not is_rejected(stream, limits, out, state, queue, row, arrival):
                join(out, state, state, queue, extra, row, arrival)
                if peaks_at(state, arrival + queue.rules.request_s):
                    state.ints[MAX_WAITING] = max(state.ints[MAX_WAITING], n_waiting(state, queue))


@compiled
def receive_in_step(
    cost: CostTable,
    limits: Limits,
    stream: Stream,
    out: Outcome,
    state: State,
    queue: Queue,
    extra: Extra | None,
    known: float,
) -> None:
    """M1, L3: who comes and goes while a step is under way; from ``known`` on only who of the step goes."""
    receive(cost, limits, stream, out, state, queue, extra, True, known)  # noqa: FBT003 - compiled code takes no keywords here
    if queue.rules.clients_leave and known < state.floats[CLOCK]:
        let_running_leave(cost, limits, stream, out, state, state, queue, extra)
