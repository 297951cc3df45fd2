"""First come, first served in the compiled engine: arrivals, preemption, and what a step is made of (rules R2 to R7)."""

import math

from simulator.engine import speculation
from simulator.engine.batch import (
    append_running,
    blocks_needed,
    blocks_owned,
    chunk_keys,
    chunk_pairs,
    leave_batch,
    publishing_moment,
    tokens_per_sequence,
    unlink_running,
)
from simulator.engine.core import (
    BATCH,
    CLOCK,
    FIFO_HEAD,
    FIFO_TAIL,
    FIRST,
    FREE_BLOCKS,
    INTERVAL,
    LAST,
    LAST_START,
    MAX_WAITING,
    N_FREE_SLOTS,
    N_LOADING,
    N_PENDING,
    N_PREEMPTED,
    N_RUNNING,
    NEXT_ROW,
    PARTIAL,
    PREEMPTIONS,
    STEP,
    T_PREEMPTIONS,
    T_WAITING,
    WAITING_INTEGRAL,
    Chunks,
    CostTable,
    Extra,
    Limits,
    Outcome,
    State,
    Stream,
)
from simulator.engine.heaps import pop_arrival, push_arrival
from simulator.engine.jit import compiled, inlined
from simulator.engine.prefix_cache import (
    admit,
    give_back,
    grow,
    look_up,
    publish,
    take,
)
from simulator.engine.progressions import (
    blocks_for,
    spread,
)
from simulator.engine.records import REJECTED, RUNNING, WAITING
from simulator.engine.swap import SAVED, copy_in, copy_out
from simulator.engine.tiers import BLOCKED, N_READY, Loads, find_run, start_load


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
        blocks = blocks_for(longest - 1 + limits.lookahead, limits.block_size)
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
                waiting = ints[N_PREEMPTED] + ints[FIFO_TAIL] - ints[FIFO_HEAD] + ints[N_LOADING]
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
def preempt(cost: CostTable, state: State, out: Outcome, extra: Extra | None, slot: int, block_size: int) -> None:
    """R6: free all blocks, forget the cache, go to the front of the queue."""
    ints = state.ints
    decoded = slot != ints[PARTIAL]
    if not decoded:
        ints[PARTIAL] = -1
    else:
        leave_batch(cost, state, out, extra, slot, block_size)
        if extra is not None and extra.cache.on and extra.spec.on and not extra.cache.radix:  # P6
            full = state.computed[slot] // block_size
            publish(extra.cache, slot, state.row[slot], full, publishing_moment(state, extra))
        state.finish_step[slot] = -1
        state.last_token[slot] = state.floats[CLOCK]
    computed = state.computed[slot]
    state.seen[slot] = max(state.seen[slot], computed)
    row = state.row[slot]
    freed = blocks_owned(state, extra, slot, decoded, block_size)
    if extra is not None and extra.swap.on:
        copy_out(extra.swap, slot, computed, freed)
    if extra is not None and extra.cache.on:
        freed = give_back(extra.cache, slot, row, freed, ints[STEP])
    ints[FREE_BLOCKS] += freed
    state.computed[slot] = 0
    unlink_running(state, slot)
    state.stack[ints[N_PREEMPTED]] = slot
    ints[N_PREEMPTED] += 1
    ints[PREEMPTIONS] += 1
    state.timeline[T_PREEMPTIONS, int(state.floats[CLOCK] / state.floats[INTERVAL])] += 1.0
    out.preemptions[row] += 1
    out.status[row] = WAITING


@compiled
def make_room(cost: CostTable, limits: Limits, out: Outcome, state: State, extra: Extra | None) -> bool:
    """R5 where blocks are short: decoding sequences take theirs in order of admission and preempt the last to run.

    Return whether one had to preempt itself, which ends R5.
    """
    ints = state.ints
    bs = limits.block_size
    slot = ints[FIRST]
    while slot >= 0:
        need = blocks_needed(state, extra, slot, bs) if slot != ints[PARTIAL] else 0
        if need > 0:
            gone = False
            while ints[FREE_BLOCKS] < need and not gone:
                victim = ints[LAST]
                preempt(cost, state, out, extra, victim, bs)
                gone = victim == slot
            if gone:
                return True
            ints[FREE_BLOCKS] -= need
            if extra is not None and extra.cache.on:
                take(extra.cache, need)
            if extra is not None and extra.spec.on:
                speculation.take_own_blocks(extra.spec.batch, slot, ints[STEP])
        slot = state.after[slot]
    return False


@compiled
def goes_loading(
    cost: CostTable, limits: Limits, stream: Stream, state: State, extra: Extra, row: int, hits: int
) -> bool:
    """F3 to F6: ask the tiers for what follows the ``hits`` of the first in the queue; return whether it left to load it."""
    cache, loads, ints, bs = extra.cache, extra.loads, state.ints, limits.block_size
    if loads.loaded[row] != 0:
        return False
    longest = min((stream.prompt[row] - 1) // bs, cache.offsets[row + 1] - cache.offsets[row])
    first = max(hits, stream.cached[row] // bs)
    offset = cache.offsets[row]
    run = find_run(cache.tiers, cache.ids, offset + first, offset + longest) if first < longest else 0
    if run == 0:
        return False
    past, tokens = first * bs, run * bs
    attention = 0.0
    for j in range(cost.planes.shape[0]):
        value = cost.planes[j, 0] * (tokens * past + tokens * (tokens + 1) // 2)
        value += cost.planes[j, 1] * (past + tokens) + cost.planes[j, 2]
        if cost.window > 0:
            value += cost.planes[j, 3] * chunk_pairs(cost, past, tokens)
            value += cost.planes[j, 4] * chunk_keys(cost, past, tokens)
        attention = max(attention, value)
    prefill_s = tokens * cost.dense[limits.budget] / limits.budget + attention
    start = offset + first
    now = state.floats[CLOCK]
    if not start_load(cache.tiers, loads, cache.ids, start, start + run, row, ints[N_LOADING], now, prefill_s):
        return False
    loads.loaded[row] = past + tokens
    ints[N_LOADING] += 1
    ints[FIFO_HEAD] += 1
    return True


@compiled
def end_loads(state: State, loads: Loads) -> None:
    """F5: who has loaded comes back to the queue, before all who were never admitted, behind those who came back earlier."""
    ints = state.ints
    while ints[N_LOADING] > 0 and loads.times[0] <= state.floats[CLOCK]:
        row = loads.rows[0]
        ints[N_LOADING] = pop_arrival(loads.times, loads.rows, ints[N_LOADING])
        ints[FIFO_HEAD] -= 1
        place = ints[FIFO_HEAD]
        for _ in range(loads.ints[N_READY]):
            state.fifo[place] = state.fifo[place + 1]
            place += 1
        state.fifo[place] = row
        loads.ints[N_READY] += 1


@inlined
def schedule_chunks(
    cost: CostTable,
    limits: Limits,
    stream: Stream,
    out: Outcome,
    state: State,
    extra: Extra | None,
    free: int,
    preempted: bool,
    in_flight: bool,
) -> Chunks:
    """R5 and R7: the chunk that goes on, then those of requests taken from the queue, as far as budget and blocks reach.

    ``in_flight``: the prompt under way has a chunk in flight, so it waits for blocks instead of giving up its own (P3).
    """
    ints = state.ints
    bs = limits.block_size
    chunks = 0
    tokens = ints[BATCH] * tokens_per_sequence(extra)
    room = limits.budget - tokens
    unsure = False
    closed = preempted
    slot = ints[PARTIAL]
    if slot >= 0:
        row = state.row[slot]
        done = state.computed[slot]
        want = min(stream.prompt[row] + state.emitted[slot] - done, room)
        missing = blocks_for(done + want, bs) - blocks_for(done, bs)
        if missing > free:
            closed = True
            if not in_flight:
                free -= ints[FREE_BLOCKS]
                preempt(cost, state, out, extra, slot, bs)
                preempted = True
                free += ints[FREE_BLOCKS]
        else:
            free -= missing
            if extra is not None and extra.cache.on:
                grow(extra.cache, slot, row, missing, (done + want) // bs, publishing_moment(state, extra))
            room -= want
            tokens += want
            state.chunk_slot[0] = slot
            state.chunk_size[0] = want
            state.chunk_start[0] = done
            chunks = 1
    if extra is not None:
        extra.loads.ints[BLOCKED] = 0
    if not closed:
        waiting = n_waiting(state)
        while room > 0 and waiting > 0 and ints[N_RUNNING] < limits.max_num_seqs:
            resumed = ints[N_PREEMPTED] > 0
            if resumed:
                slot = state.stack[ints[N_PREEMPTED] - 1]
                row = state.row[slot]
                known = stream.prompt[row] + state.emitted[slot]
            else:
                row = state.fifo[ints[FIFO_HEAD]]
                known = stream.prompt[row]
            done = stream.cached[row]
            held = 0
            hits = 0
            if extra is not None and extra.cache.on:
                hits, held = look_up(extra.cache, state.row, row, (known - 1) // bs, ints[STEP])
                done = max(done, hits * bs)
            loaded = 0
            if extra is not None and extra.loads.on and not resumed:
                if goes_loading(cost, limits, stream, state, extra, row, hits):
                    waiting -= 1
                    continue
                loaded = max(extra.loads.loaded[row], 0)
                done = max(done, loaded)
            start = done
            saved = 0
            if extra is not None and extra.swap.on and resumed:
                saved = extra.swap.slots[slot, SAVED]
                done = max(done, saved)
            want = min(known - done, room)
            need = blocks_for(done + want, bs)
            if need - held > free or (limits.reserve_full and blocks_for(known, bs) - held > free):
                if extra is not None:
                    unsure = extra.cache.late
                    if extra.loads.on and not resumed and extra.loads.loaded[row] == 0:
                        extra.loads.ints[BLOCKED] = 1
                break
            if resumed:
                ints[N_PREEMPTED] -= 1
            else:
                ints[FIFO_HEAD] += 1
                ints[N_FREE_SLOTS] -= 1
                slot = state.free_slots[ints[N_FREE_SLOTS]]
                state.row[slot] = row
                state.emitted[slot] = 0
                state.seen[slot] = 0
                out.scheduled[row] = state.floats[CLOCK]
            out.status[row] = RUNNING
            state.computed[slot] = done
            append_running(state, slot)
            waiting -= 1
            free -= need
            if extra is not None and extra.cache.on:
                free += hits - admit(extra.cache, slot, row, hits, loaded, known, start, state.seen[slot])
                grow(extra.cache, slot, row, need - hits, (done + want) // bs, publishing_moment(state, extra))
            if extra is not None and extra.loads.on and not resumed:
                extra.loads.loaded[row] = -1
                if extra.loads.ints[N_READY] > 0:
                    extra.loads.ints[N_READY] -= 1
            if extra is not None and saved > 0:
                copy_in(extra.swap, slot, blocks_for(saved, bs), hits)
            room -= want
            tokens += want
            state.chunk_slot[chunks] = slot
            state.chunk_size[chunks] = want
            state.chunk_start[chunks] = done
            chunks += 1
            ints[PARTIAL] = slot
    return Chunks(chunks, tokens, free, preempted, unsure)
