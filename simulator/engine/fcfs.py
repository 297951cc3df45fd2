"""First come, first served in the compiled engine: arrivals, preemption, and what a step is made of (rules R2 to R7)."""

import math

from simulator.engine.batch import (
    append_running,
    blocks_needed,
    leave_batch,
    unlink_running,
)
from simulator.engine.core import (
    AFTER,
    BATCH,
    CHUNK_SIZE,
    CHUNK_SLOT,
    CHUNK_START,
    CLOCK,
    COMPUTED,
    EMITTED,
    FIFO_HEAD,
    FIFO_TAIL,
    FINISH_STEP,
    FIRST,
    FREE_BLOCKS,
    FREE_SLOT,
    INTERVAL,
    LAST,
    LAST_START,
    LAST_TOKEN,
    MAX_WAITING,
    N_FREE_SLOTS,
    N_PENDING,
    N_PREEMPTED,
    N_RUNNING,
    NEXT_ROW,
    PARTIAL,
    PREEMPTED_SLOT,
    PREEMPTIONS,
    SEEN,
    T_PREEMPTIONS,
    T_WAITING,
    WAITING_INTEGRAL,
    Chunks,
    CostTable,
    Limits,
    Outcome,
    State,
    Stream,
)
from simulator.engine.heaps import pop_arrival, push_arrival
from simulator.engine.jit import compiled, inlined
from simulator.engine.kv_blocks import blocks_at_most, blocks_owned_at, blocks_to_take
from simulator.engine.progressions import spread
from simulator.engine.records import REJECTED, RUNNING, WAITING


@inlined
def next_arrival_s(stream: Stream, state: State) -> float:
    """When the next request arrives; infinity if none is on its way."""
    if stream.concurrency > 0:
        if state.ints[N_PENDING] > 0:
            return float(state.pending_time[0])
    elif state.ints[NEXT_ROW] < len(stream.prompt):
        return float(stream.arrival[state.ints[NEXT_ROW]])
    return math.inf


@inlined
def n_waiting(state: State) -> int:
    """Requests in the queue, without those that load."""
    return int(state.ints[N_PREEMPTED] + state.ints[FIFO_TAIL] - state.ints[FIFO_HEAD])


@inlined
def receive(stream: Stream, limits: Limits, out: Outcome, state: State, before_now: bool) -> None:
    """R2, R4: let everything that has arrived by now (or before now) join the queue, or be rejected."""
    ints, floats = state.ints, state.floats
    now = floats[CLOCK]
    n = len(stream.prompt)
    closed = stream.concurrency > 0
    while True:
        if closed:
            if ints[N_PENDING] == 0 or state.pending_time[0] > now:
                return
            when = state.pending_time[0]
            if before_now and when == now:
                return
            row = state.pending_row[0]
            ints[N_PENDING] = pop_arrival(state.pending_time, state.pending_row, ints[N_PENDING])
        else:
            row = ints[NEXT_ROW]
            if row >= n or stream.arrival[row] > now:
                return
            when = stream.arrival[row]
            ints[NEXT_ROW] = row + 1
        out.arrival[row] = when
        longest = stream.prompt[row] + stream.max_tokens[row]
        blocks = blocks_at_most(limits, 0, longest - 1 + limits.lookahead)
        if (0 < limits.max_model_len < longest) or blocks > limits.num_blocks:
            out.status[row] = REJECTED
            if closed:
                release_next(stream, state, when)
            continue
        out.status[row] = WAITING
        state.fifo[ints[FIFO_TAIL]] = row
        ints[FIFO_TAIL] += 1
        if when < now:
            floats[WAITING_INTEGRAL] += now - when
            if when <= floats[LAST_START]:  # it waited while later steps of the segment were scheduled
                waiting = ints[N_PREEMPTED] + ints[FIFO_TAIL] - ints[FIFO_HEAD]
                ints[MAX_WAITING] = max(ints[MAX_WAITING], waiting)
            spread(state.timeline, T_WAITING, floats[INTERVAL], when, now, 1.0)


@inlined
def release_next(stream: Stream, state: State, now: float) -> None:
    """R3: in a closed loop, one who leaves makes room for the next."""
    row = state.ints[NEXT_ROW]
    if row < len(stream.prompt):
        state.ints[NEXT_ROW] = row + 1
        state.ints[N_PENDING] = push_arrival(
            state.pending_time, state.pending_row, state.ints[N_PENDING], now + stream.arrival[row], row
        )


@compiled
def preempt(cost: CostTable, limits: Limits, state: State, out: Outcome, slot: int) -> None:
    """R6: free all blocks, forget the cache, go to the front of the queue."""
    ints = state.ints
    if slot == ints[PARTIAL]:
        ints[PARTIAL] = -1
    else:
        leave_batch(cost, limits, state, out, None, slot)
        state.slots[slot, FINISH_STEP] = -1
        state.sums[slot, LAST_TOKEN] = state.floats[CLOCK]
    computed = state.slots[slot, COMPUTED]
    state.slots[slot, SEEN] = max(state.slots[slot, SEEN], computed)
    row = state.row[slot]
    ints[FREE_BLOCKS] += blocks_owned_at(limits, computed, computed)
    state.slots[slot, COMPUTED] = 0
    unlink_running(state, slot)
    state.slots[ints[N_PREEMPTED], PREEMPTED_SLOT] = slot
    ints[N_PREEMPTED] += 1
    ints[PREEMPTIONS] += 1
    state.timeline[T_PREEMPTIONS, int(state.floats[CLOCK] / state.floats[INTERVAL])] += 1.0
    out.preemptions[row] += 1
    out.status[row] = WAITING


@compiled
def make_room(cost: CostTable, limits: Limits, out: Outcome, state: State) -> None:
    """R5 where blocks are short: decoding sequences take theirs in order of admission and preempt the last to run."""
    ints = state.ints
    slot = ints[FIRST]
    while slot >= 0:
        if slot != ints[PARTIAL] and blocks_needed(limits, state, None, slot) > 0:
            gone = False
            while ints[FREE_BLOCKS] < limits.groups and not gone:
                victim = ints[LAST]
                preempt(cost, limits, state, out, victim)
                gone = victim == slot
            if gone:
                return
            ints[FREE_BLOCKS] -= limits.groups
        slot = state.slots[slot, AFTER]


@inlined
def schedule_chunks(
    cost: CostTable,
    limits: Limits,
    stream: Stream,
    out: Outcome,
    state: State,
    free: int,
    preempted: bool,
) -> Chunks:
    """R5 and R7: the chunk that goes on, then those of requests taken from the queue, as far as budget and blocks reach."""
    ints = state.ints
    chunks = 0
    tokens = ints[BATCH]
    room = limits.budget - tokens
    closed = preempted
    slot = ints[PARTIAL]
    if slot >= 0:
        row = state.row[slot]
        done = state.slots[slot, COMPUTED]
        want = min(stream.prompt[row] + state.slots[slot, EMITTED] - done, room)
        missing = blocks_to_take(limits, done, done + want)
        if missing > free:
            closed = True
            free -= ints[FREE_BLOCKS]
            preempt(cost, limits, state, out, slot)
            preempted = True
            free += ints[FREE_BLOCKS]
        else:
            free -= missing
            room -= want
            tokens += want
            state.chunks[0, CHUNK_SLOT] = slot
            state.chunks[0, CHUNK_SIZE] = want
            state.chunks[0, CHUNK_START] = done
            chunks = 1
    wanted = 0
    if not closed:
        waiting = n_waiting(state)
        while room > 0 and waiting > 0 and ints[N_RUNNING] < limits.max_num_seqs:
            resumed = ints[N_PREEMPTED] > 0
            if resumed:
                slot = state.slots[ints[N_PREEMPTED] - 1, PREEMPTED_SLOT]
                row = state.row[slot]
                known = stream.prompt[row] + state.slots[slot, EMITTED]
            else:
                row = state.fifo[ints[FIFO_HEAD]]
                known = stream.prompt[row]
            done = stream.cached[row]
            want = min(known - done, room)
            need = blocks_owned_at(limits, done, done + want)
            first = blocks_at_most(limits, done, known) if limits.reserve_full else need
            if first > free:
                wanted = first
                break
            if resumed:
                ints[N_PREEMPTED] -= 1
            else:
                ints[FIFO_HEAD] += 1
                ints[N_FREE_SLOTS] -= 1
                slot = state.slots[ints[N_FREE_SLOTS], FREE_SLOT]
                state.row[slot] = row
                state.slots[slot, EMITTED] = 0
                state.slots[slot, SEEN] = 0
                out.scheduled[row] = state.floats[CLOCK]
            out.status[row] = RUNNING
            state.slots[slot, COMPUTED] = done
            append_running(state, slot)
            waiting -= 1
            free -= need
            room -= want
            tokens += want
            state.chunks[chunks, CHUNK_SLOT] = slot
            state.chunks[chunks, CHUNK_SIZE] = want
            state.chunks[chunks, CHUNK_START] = done
            chunks += 1
            ints[PARTIAL] = slot
    return Chunks(chunks, tokens, free, preempted, wanted)
