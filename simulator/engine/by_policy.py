"""The skip-ahead engine beyond first come, first served: policies, batching modes, clients that leave, and the host.

The loop of :mod:`simulator.engine.skip_ahead` with other rules for what a step is made of, those of
``docs/engine-scheduling.md``; what a step costs and how segments are counted is the same code. State.ints[STEP] counts the
steps of the decoding batch: where decoding sequences sit a step out (B3), it stands still, and so does all that is kept by step.
"""

import math

from simulator.engine.batch import (
    advance_decodes,
    append_running,
    leave_batch,
    pass_window_events,
    rebase_sums,
    unlink_running,
)
from simulator.engine.core import (
    BATCH,
    CLOCK,
    FIRST,
    FREE_BLOCKS,
    HEAP_SIZE,
    IDLE,
    INTERVAL,
    ITL_MAX,
    LAST,
    LAST_START,
    MAX_BLOCKS,
    MAX_RUNNING,
    MAX_WAITING,
    N_FREE_SLOTS,
    N_GROWING,
    N_PENDING,
    N_RUNNING,
    NEXT_ROW,
    PREEMPTIONS,
    REBASE_STEPS,
    SEGMENTS,
    SHARE_W,
    SLOT_BITS,
    STEP,
    STEP_ORIGIN,
    STEPS,
    T_PREEMPTIONS,
    T_WAITING,
    WAITING_INTEGRAL,
    Chunks,
    CostTable,
    Limits,
    Outcome,
    Price,
    State,
    Stream,
)
from simulator.engine.fcfs import release_next
from simulator.engine.heaps import pop_arrival, pop_key, push_arrival
from simulator.engine.jit import compiled, inlined
from simulator.engine.progressions import blocks_for, count_itl, end_of_steps, residue, spread, take_blocks
from simulator.engine.queues import (
    ABANDONED_OUTPUTS,
    ABANDONED_TOKENS,
    ALL,
    ATTEMPT_S,
    ATTEMPTS,
    BASE,
    CANCEL_S,
    CANCELLATIONS,
    CHUNK,
    CHUNK_TOKENS,
    DEADLINE_S,
    EMITTED,
    GONE,
    GONE_SLOT,
    GRANTED,
    HAS_BLOCK,
    HOST,
    IS_OPEN,
    LAST_TOKEN,
    N_GONE,
    N_PARTIALS,
    N_QUEUED,
    NOBODY,
    PARTIAL_SLOT,
    PUT_BACK_AT,
    RANK,
    RESERVED,
    RETRIES,
    SEEN,
    SLOT,
    SOME,
    STALL_START,
    STALLED,
    TENANT,
    TIMEOUT_S,
    TIMEOUTS,
    TTFT_TIMEOUT_S,
    WASTED,
    Queue,
    add_due,
    drop_partial,
    first_queued,
    is_after,
    join_again,
    join_queue,
    leave_queue,
    next_due,
    pop_due,
    start_counting,
    stop_counting,
    take_first,
)
from simulator.engine.records import CANCELLED, FINISHED, REJECTED, RUNNING, TIMED_OUT, WAITING
from simulator.engine.scheduling import CHUNKED, EDF, FAIR, FCFS, PREFILL_FIRST, STATIC
from simulator.engine.segments import (
    count_latencies,
    end_chunks,
    finish_request,
    price_step,
    record_segment,
    steps_alike,
    steps_until,
    widen_timeline,
)

MANY = 1 << 60
"""More steps than any segment has."""


@inlined
def _victim(state: State, queue: Queue) -> int:
    """Q2: who is preempted when blocks are short; somebody must run."""
    slot = state.ints[LAST]
    if FCFS < queue.rules.policy < FAIR:
        other = state.before[slot]
        while other >= 0:
            if is_after(queue, state.row[other], state.row[slot]):
                slot = other
            other = state.before[other]
    return int(slot)


@inlined
def _preempt(cost: CostTable, out: Outcome, state: State, queue: Queue, slot: int, block_size: int) -> None:
    """R6, Q2: free all blocks, those of this step included, forget the cache, and wait again."""
    ints = state.ints
    row = state.row[slot]
    if state.finish_step[slot] < 0:
        ahead = queue.slots[slot, CHUNK]
        queue.slots[slot, CHUNK] = 0
        queue.ints[CHUNK_TOKENS] -= ahead
        drop_partial(queue, slot)
    else:
        last_token = state.floats[CLOCK]
        if queue.ints[STALLED] == 1:
            last_token = max(queue.floats[STALL_START], state.last_token[slot])
        state.last_token[slot] = last_token
        granted = queue.ints[GRANTED]
        ahead = 1 if granted == ALL or (granted == SOME and queue.slots[slot, HAS_BLOCK] == 1) else 0
        stop_counting(queue, row, ints[STEP])
        leave_batch(cost, state, out, None, slot, block_size)
        state.finish_step[slot] = -1
    computed = state.computed[slot]
    ints[FREE_BLOCKS] += blocks_for(computed + ahead, block_size)
    unlink_running(state, slot)
    _free_slot(state, slot)
    ints[PREEMPTIONS] += 1
    state.timeline[T_PREEMPTIONS, int(state.floats[CLOCK] / state.floats[INTERVAL])] += 1.0
    out.preemptions[row] += 1
    out.status[row] = WAITING
    queue.row_ints[row, EMITTED] = state.emitted[slot]
    queue.row_ints[row, SEEN] = max(state.seen[slot], computed)
    queue.row_floats[row, LAST_TOKEN] = state.last_token[slot]
    join_again(queue, out.status, row, ints[SEGMENTS])


@inlined
def _free_slot(state: State, slot: int) -> None:
    """Let a slot be used again."""
    state.free_slots[state.ints[N_FREE_SLOTS]] = slot
    state.ints[N_FREE_SLOTS] += 1


@compiled
def _make_room(cost: CostTable, limits: Limits, out: Outcome, state: State, queue: Queue) -> None:
    """R5, Q2 where blocks are short: decoding sequences take theirs in order of admission and preempt others."""
    ints = state.ints
    bs = limits.block_size
    step = ints[STEP]
    slot = ints[FIRST]
    while slot >= 0:
        queue.slots[slot, HAS_BLOCK] = 0
        slot = state.after[slot]
    queue.ints[GRANTED] = SOME
    slot = ints[FIRST]
    while slot >= 0:
        after = state.after[slot]
        if state.finish_step[slot] >= 0 and residue(state.computed[slot] + step - state.joined[slot], bs) == 0:
            gone = False
            while ints[FREE_BLOCKS] < 1 and not gone:
                victim = _victim(state, queue)
                _preempt(cost, out, state, queue, victim, bs)
                gone = victim == slot
            after = state.after[slot]
            if not gone:
                ints[FREE_BLOCKS] -= 1
                queue.slots[slot, HAS_BLOCK] = 1
        slot = after


@inlined
def _known(stream: Stream, state: State, slot: int) -> int:
    """Tokens known of a running request."""
    return int(stream.prompt[state.row[slot]] + state.emitted[slot])


@compiled
def _continue_prompts(
    cost: CostTable, limits: Limits, stream: Stream, out: Outcome, state: State, queue: Queue
) -> bool:
    """R5, B1, B5: give tokens to those in prefill, in order of admission; return whether somebody was preempted."""
    ints = state.ints
    bs = limits.block_size
    preempted = False
    i = 0
    while i < queue.ints[N_PARTIALS]:
        left = limits.budget - ints[BATCH] - queue.ints[CHUNK_TOKENS]
        if left <= 0:
            break
        slot = queue.slots[i, PARTIAL_SLOT]
        i += 1
        if queue.slots[slot, CHUNK] > 0:
            continue
        done = state.computed[slot]
        want = min(_known(stream, state, slot) - done, left, queue.rules.longest_chunk)
        missing = blocks_for(done + want, bs) - blocks_for(done, bs)
        gone = False
        while missing > ints[FREE_BLOCKS] and not gone:
            victim = _victim(state, queue)
            _preempt(cost, out, state, queue, victim, bs)
            preempted = True
            gone = victim == slot
            i = 0  # the list has changed; those with a chunk are passed over
        if not gone:
            ints[FREE_BLOCKS] -= missing
            queue.slots[slot, CHUNK] = want
            queue.ints[CHUNK_TOKENS] += want
    return preempted


@compiled
def _n_unfinished(stream: Stream, state: State, queue: Queue) -> int:
    """B6: running requests whose prompt will not be complete after this step."""
    n = 0
    for i in range(queue.ints[N_PARTIALS]):
        slot = queue.slots[i, PARTIAL_SLOT]
        if state.computed[slot] + queue.slots[slot, CHUNK] < _known(stream, state, slot):
            n += 1
    return n


@inlined
def _has_blocks(limits: Limits, stream: Stream, state: State, queue: Queue, row: int, tokens: int) -> bool:
    """R7, B4, B7: whether there are blocks for the first ``tokens`` tokens of the first of the queue."""
    ints = state.ints
    bs = limits.block_size
    if queue.rules.batching == STATIC:
        longest = stream.prompt[row] + stream.max_tokens[row] - 1
        return bool(queue.ints[RESERVED] + blocks_for(longest, bs) <= limits.num_blocks)
    margin = queue.rules.margin if ints[N_RUNNING] > 0 else 0
    if limits.reserve_full:
        tokens = stream.prompt[row] + queue.row_ints[row, EMITTED]
    return bool(blocks_for(tokens, bs) + margin <= ints[FREE_BLOCKS])


@inlined
def _admit(cost: CostTable, limits: Limits, stream: Stream, out: Outcome, state: State, queue: Queue) -> bool:
    """R7, Q3, B2, B6: take requests from the queue; return whether somebody was preempted."""
    ints = state.ints
    rules = queue.rules
    bs = limits.block_size
    preempted = False
    while queue.ints[N_QUEUED] > 0:
        left = limits.budget - queue.ints[CHUNK_TOKENS] - (ints[BATCH] if queue.ints[GRANTED] == ALL else 0)
        if left <= 0:
            break
        row = first_queued(queue, out.status, ints[STEP])
        if preempted and queue.row_ints[row, PUT_BACK_AT] == ints[SEGMENTS]:
            break
        done = stream.cached[row]
        rest = stream.prompt[row] + queue.row_ints[row, EMITTED] - done
        want = min(rest, left, rules.longest_chunk)
        if want < rest and (rules.batching != CHUNKED or 0 < rules.max_partials <= _n_unfinished(stream, state, queue)):
            break
        if ints[N_RUNNING] == limits.max_num_seqs or not _has_blocks(limits, stream, state, queue, row, done + want):
            if not rules.preempt_lower or ints[N_RUNNING] == 0:
                break
            victim = _victim(state, queue)
            if queue.row_floats[state.row[victim], RANK] <= queue.row_floats[row, RANK]:
                break
            _preempt(cost, out, state, queue, victim, bs)
            preempted = True
            continue
        is_new = math.isnan(out.scheduled[row])
        take_first(queue, row, stream.prompt[row] - done if is_new else 0)
        if is_new:
            out.scheduled[row] = state.floats[CLOCK]
        ints[N_FREE_SLOTS] -= 1
        slot = state.free_slots[ints[N_FREE_SLOTS]]
        queue.row_ints[row, SLOT] = slot
        state.row[slot] = row
        state.emitted[slot] = queue.row_ints[row, EMITTED]
        state.seen[slot] = queue.row_ints[row, SEEN]
        state.last_token[slot] = queue.row_floats[row, LAST_TOKEN]
        state.computed[slot] = done
        out.status[row] = RUNNING
        append_running(state, slot)
        ints[FREE_BLOCKS] -= blocks_for(done + want, bs)
        if rules.batching == STATIC:
            queue.ints[RESERVED] += blocks_for(stream.prompt[row] + stream.max_tokens[row] - 1, bs)
        queue.slots[queue.ints[N_PARTIALS], PARTIAL_SLOT] = slot
        queue.ints[N_PARTIALS] += 1
        queue.slots[slot, CHUNK] = want
        queue.ints[CHUNK_TOKENS] += want
    return preempted


@inlined
def _collect_chunks(stream: Stream, state: State, queue: Queue) -> int:
    """Write the chunks of the step down; keep those in prefill who will still be after it. Return the number of chunks."""
    chunks = 0
    kept = 0
    for i in range(queue.ints[N_PARTIALS]):
        slot = queue.slots[i, PARTIAL_SLOT]
        size = queue.slots[slot, CHUNK]
        if size > 0:
            state.chunk_slot[chunks] = slot
            state.chunk_size[chunks] = size
            state.chunk_start[chunks] = state.computed[slot]
            chunks += 1
            queue.slots[slot, CHUNK] = 0
        if state.computed[slot] + size < _known(stream, state, slot):
            queue.slots[kept, PARTIAL_SLOT] = slot
            kept += 1
        elif queue.rules.policy == FAIR:
            queue.tenants[queue.row_ints[state.row[slot], TENANT], BASE] += queue.rules.output_weight
    queue.ints[N_PARTIALS] = kept
    return chunks


@inlined
def _serve_decodes(cost: CostTable, limits: Limits, out: Outcome, state: State, queue: Queue) -> int:
    """R5: the decoding sequences take the blocks of this step; return how many, -1 if somebody was preempted for them."""
    need = state.residues[residue(-state.ints[STEP], limits.block_size)]
    if need > state.ints[FREE_BLOCKS]:
        _make_room(cost, limits, out, state, queue)
        need = -1
    else:
        state.ints[FREE_BLOCKS] -= need
    queue.ints[GRANTED] = ALL
    return int(need)


@inlined
def _schedule(cost: CostTable, limits: Limits, stream: Stream, out: Outcome, state: State, queue: Queue) -> Chunks:
    """R5 to R8, B1 to B4: the tokens of a step."""
    ints, batching = state.ints, queue.rules.batching
    queue.ints[CHUNK_TOKENS] = 0
    queue.ints[GRANTED] = NOBODY
    prompts_first = batching >= PREFILL_FIRST
    preempted = False
    admits = True
    need = 0
    if prompts_first:
        if ints[N_RUNNING] == 0:
            queue.ints[IS_OPEN] = 1
        admits = batching == PREFILL_FIRST or queue.ints[IS_OPEN] == 1
    else:
        need = _serve_decodes(cost, limits, out, state, queue)
        preempted = need < 0
        if queue.ints[N_PARTIALS] > 0 and _continue_prompts(cost, limits, stream, out, state, queue):
            preempted = True
        admits = not preempted
    if admits and queue.ints[N_QUEUED] > 0:
        preempted = _admit(cost, limits, stream, out, state, queue)
    if prompts_first:
        if queue.ints[CHUNK_TOKENS] == 0:
            queue.ints[IS_OPEN] = 0
            need = _serve_decodes(cost, limits, out, state, queue)
            preempted = preempted or need < 0
        elif queue.ints[STALLED] == 0:
            queue.ints[STALLED] = 1
            queue.floats[STALL_START] = state.floats[CLOCK]
    tokens = queue.ints[CHUNK_TOKENS]
    if queue.ints[GRANTED] == ALL:
        tokens += ints[BATCH]
    chunks = _collect_chunks(stream, state, queue)
    if chunks == 0 and not preempted:
        ints[FREE_BLOCKS] += need  # the segment takes them, step by step
    return Chunks(chunks, tokens, ints[FREE_BLOCKS], preempted, unsure=False)


@inlined
def _next_seen(stream: Stream, state: State, queue: Queue) -> float:
    """H2: when the scheduler sees the next request; infinity if none is on its way."""
    when = math.inf
    if state.ints[N_PENDING] > 0:
        when = state.pending_time[0]
    if stream.concurrency == 0 and state.ints[NEXT_ROW] < len(stream.prompt):
        when = min(when, stream.arrival[state.ints[NEXT_ROW]])
    return float(when + queue.rules.request_s)


@inlined
def _next_departure(out: Outcome, queue: Queue) -> float:
    """L1: when the next client leaves; infinity if none will."""
    return next_due(queue, out.status) if queue.rules.clients_leave else math.inf


@inlined
def _waited(state: State, since: float, sign: float) -> None:
    """R13: waiting from ``since`` to now that the segment did not count, or (sign -1) should not have."""
    now = state.floats[CLOCK]
    if since < now:
        state.floats[WAITING_INTEGRAL] += sign * (now - since)
        spread(state.timeline, T_WAITING, state.floats[INTERVAL], since, now, sign)


@inlined
def _join_or_reject(
    stream: Stream, limits: Limits, out: Outcome, state: State, queue: Queue, row: int, arrival: float
) -> None:
    """R4, H2, L5: an attempt is seen by the scheduler."""
    ints, rules = state.ints, queue.rules
    when = arrival + rules.request_s
    queue.row_ints[row, ATTEMPTS] += 1
    if queue.row_ints[row, ATTEMPTS] > 1:
        queue.ints[RETRIES] += 1
    else:
        out.arrival[row] = arrival
    longest = stream.prompt[row] + stream.max_tokens[row]
    whole = (stream.prompt[row] if rules.batching == STATIC else longest - 1) - stream.cached[row]
    if (
        0 < limits.max_model_len < longest
        or blocks_for(longest - 1, limits.block_size) > limits.num_blocks
        or (rules.batching != CHUNKED and whole > limits.budget)
    ):
        out.status[row] = REJECTED
        if stream.concurrency > 0:
            release_next(stream, state, when)
        return
    queue.row_floats[row, ATTEMPT_S] = arrival
    queue.row_ints[row, EMITTED] = 0
    queue.row_ints[row, SEEN] = 0
    out.scheduled[row] = math.nan
    out.first_token[row] = math.nan
    if rules.policy == EDF:
        queue.row_floats[row, RANK] = arrival + queue.row_floats[row, DEADLINE_S]
    out.status[row] = WAITING
    join_queue(queue, out.status, row, ints[STEP])
    if when < state.floats[CLOCK] and when <= state.floats[LAST_START]:
        ints[MAX_WAITING] = max(ints[MAX_WAITING], queue.ints[N_QUEUED])
    _waited(state, when, 1.0)
    if rules.clients_leave:
        add_due(queue, out.status, row, not math.isnan(out.first_token[row]))


@inlined
def _abandon(stream: Stream, out: Outcome, queue: Queue, row: int, status: int, seen: int, emitted: int) -> None:
    """L6: count what an attempt cost that its client has left."""
    queue.ints[ABANDONED_TOKENS] += max(0, seen - stream.cached[row])
    queue.ints[ABANDONED_OUTPUTS] += emitted
    queue.row_floats[row, WASTED] = out.busy[row]
    queue.row_ints[row, GONE] = 0
    out.status[row] = status


@inlined
def _retire(stream: Stream, limits: Limits, state: State, queue: Queue, slot: int) -> None:
    """Forget what the queue keeps of a running request that ends."""
    row = state.row[slot]
    if state.finish_step[slot] >= 0:
        stop_counting(queue, row, state.ints[STEP])
    if queue.rules.batching == STATIC:
        longest = stream.prompt[row] + stream.max_tokens[row] - 1
        queue.ints[RESERVED] -= blocks_for(longest, limits.block_size)


@compiled
def _leave_replica(
    cost: CostTable, limits: Limits, stream: Stream, out: Outcome, state: State, queue: Queue, slot: int, status: int
) -> None:
    """L3: let a running request go whose client has left."""
    row = state.row[slot]
    _retire(stream, limits, state, queue, slot)
    if state.finish_step[slot] >= 0:
        leave_batch(cost, state, out, None, slot, limits.block_size)
        state.finish_step[slot] = -1
    else:
        drop_partial(queue, slot)
    computed = state.computed[slot]
    state.ints[FREE_BLOCKS] += blocks_for(computed, limits.block_size)
    unlink_running(state, slot)
    _free_slot(state, slot)
    _abandon(stream, out, queue, row, status, max(state.seen[slot], computed), state.emitted[slot])


@compiled
def _client_leaves(
    cost: CostTable, limits: Limits, stream: Stream, out: Outcome, state: State, queue: Queue, in_step: bool
) -> None:
    """L1 to L5: the first of those whose time has come gives up or cancels, unless what it waited for is there."""
    due = queue.due_time[0]
    row = pop_due(queue)
    since = queue.row_floats[row, ATTEMPT_S]
    status = CANCELLED
    if since + queue.row_floats[row, TIMEOUT_S] == due or (
        math.isnan(out.first_token[row]) and since + queue.row_floats[row, TTFT_TIMEOUT_S] == due
    ):
        status = TIMED_OUT
    elif since + queue.row_floats[row, CANCEL_S] != due:
        add_due(queue, out.status, row, not math.isnan(out.first_token[row]))
        return
    queue.ints[TIMEOUTS if status == TIMED_OUT else CANCELLATIONS] += 1
    noticed = due
    if out.status[row] == WAITING:
        leave_queue(queue, row)
        _waited(state, due, -1.0)
        _abandon(stream, out, queue, row, status, queue.row_ints[row, SEEN], queue.row_ints[row, EMITTED])
    elif in_step:
        noticed = state.floats[CLOCK]
        queue.row_ints[row, GONE] = status
        queue.slots[queue.ints[N_GONE], GONE_SLOT] = queue.row_ints[row, SLOT]
        queue.ints[N_GONE] += 1
    else:
        _leave_replica(cost, limits, stream, out, state, queue, queue.row_ints[row, SLOT], status)
    if status == TIMED_OUT and queue.row_ints[row, ATTEMPTS] < queue.rules.max_attempts:
        again = max(due + queue.waits[queue.row_ints[row, ATTEMPTS] - 1], noticed)
        state.ints[N_PENDING] = push_arrival(state.pending_time, state.pending_row, state.ints[N_PENDING], again, row)
    elif stream.concurrency > 0:
        release_next(stream, state, due)


@compiled
def _receive(
    cost: CostTable, limits: Limits, stream: Stream, out: Outcome, state: State, queue: Queue, in_step: bool
) -> None:
    """R2, L2: let clients leave and requests arrive, in order of time, up to now, or before now at the end of a step."""
    ints = state.ints
    now = state.floats[CLOCK]
    while True:
        arrival = math.inf
        row = -1
        if ints[N_PENDING] > 0:
            arrival = state.pending_time[0]
            row = state.pending_row[0]
        fresh = False
        if stream.concurrency == 0 and ints[NEXT_ROW] < len(stream.prompt):
            other = stream.arrival[ints[NEXT_ROW]]
            if other < arrival or (other == arrival and ints[NEXT_ROW] < row):
                arrival = other
                row = ints[NEXT_ROW]
                fresh = True
        when = arrival + queue.rules.request_s
        due = _next_departure(out, queue)
        first = min(due, when)
        if first > now or (in_step and first == now) or first == math.inf:
            return
        if due <= when:
            _client_leaves(cost, limits, stream, out, state, queue, in_step)
            continue
        if fresh:
            ints[NEXT_ROW] += 1
        else:
            ints[N_PENDING] = pop_arrival(state.pending_time, state.pending_row, ints[N_PENDING])
        _join_or_reject(stream, limits, out, state, queue, row, arrival)


@inlined
def _stop(limits: Limits, out: Outcome, state: State, queue: Queue, stop: float, next_arrival: float) -> float:
    """When a segment must stop because something may change in the queue: an arrival that matters, or a departure."""
    rules = queue.rules
    seat = state.ints[N_RUNNING] < limits.max_num_seqs
    matters = seat and queue.ints[N_QUEUED] == 0
    if rules.policy != FCFS:
        matters = seat or rules.preempt_lower
    if rules.batching == STATIC:
        matters = False
    if matters or rules.policy == FAIR or rules.clients_leave:
        stop = min(stop, next_arrival)
    return min(stop, _next_departure(out, queue))


@inlined
def _longest(limits: Limits, state: State, queue: Queue) -> int:
    """Steps after which the queue's order may have changed: counts of tenants grow with every step."""
    blocked = queue.ints[N_QUEUED] > 0 and state.ints[N_RUNNING] < limits.max_num_seqs
    return 1 if queue.rules.policy == FAIR and blocked and queue.rules.batching != STATIC else MANY


@compiled
def _count_latencies_after_stall(out: Outcome, state: State, queue: Queue, end: float) -> None:
    """B3: the first inter-token latencies after steps in which decoding sequences waited."""
    queue.ints[STALLED] = 0
    slot = state.ints[FIRST]
    while slot >= 0:
        if state.finish_step[slot] >= 0:
            gap = end - max(queue.floats[STALL_START], state.last_token[slot])
            count_itl(out.itl, state.bits_f, state.bits_i, gap, 0.0, 1, 1)
            state.floats[ITL_MAX] = max(state.floats[ITL_MAX], gap)
        slot = state.after[slot]


@inlined
def _with_host(price: Price, per_token: float) -> Price:
    """The price of a step in which a token pays for the host too (H1)."""
    return Price(
        price.d0,
        per_token,
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
        per_token,
    )


@inlined
def _settle_chunks(stream: Stream, limits: Limits, out: Outcome, state: State, queue: Queue, chunks: int) -> int:
    """Keep the queue's accounts of those whose chunk has ended; return how many finished whose client had left (L3)."""
    n_gone = 0
    for c in range(chunks):
        slot = state.chunk_slot[c]
        row = state.row[slot]
        if state.finish_step[slot] >= 0:
            state.last_token[slot] = state.floats[CLOCK]
            start_counting(queue, row, state.ints[STEP])
        elif out.status[row] == FINISHED:
            _retire(stream, limits, state, queue, slot)
            if queue.row_ints[row, GONE] != 0:
                n_gone += 1
                out.finish[row] = math.nan
                _abandon(stream, out, queue, row, queue.row_ints[row, GONE], state.computed[slot], state.emitted[slot])
    return n_gone


@inlined
def _end_decodes(cost: CostTable, limits: Limits, stream: Stream, out: Outcome, state: State, queue: Queue) -> int:
    """R10: decoding requests whose last token has come; return how many."""
    ints = state.ints
    n_done = 0
    while ints[HEAP_SIZE] > 0 and state.heap[0] >> SLOT_BITS <= ints[STEP]:
        key = state.heap[0]
        ints[HEAP_SIZE] = pop_key(state.heap, ints[HEAP_SIZE])
        slot = key & ((1 << SLOT_BITS) - 1)
        if state.finish_step[slot] == key >> SLOT_BITS:
            _retire(stream, limits, state, queue, slot)
            leave_batch(cost, state, out, None, slot, limits.block_size)
            finish_request(state, out, None, slot, blocks_for(state.computed[slot], limits.block_size))
            n_done += 1
    return n_done


@compiled
def _let_clients_go(cost: CostTable, limits: Limits, stream: Stream, out: Outcome, state: State, queue: Queue) -> None:
    """L3: at the end of a step, those leave whose client left during it."""
    for i in range(queue.ints[N_GONE]):
        slot = queue.slots[i, GONE_SLOT]
        status = queue.row_ints[state.row[slot], GONE]
        if status != 0:
            _leave_replica(cost, limits, stream, out, state, queue, slot, status)
    queue.ints[N_GONE] = 0


@compiled
def advance(
    cost: CostTable, limits: Limits, stream: Stream, out: Outcome, state: State, queue: Queue, until: float
) -> bool:
    """Run until no step can start before ``until``; return whether everything is done."""
    ints, floats, rules = state.ints, state.floats, queue.rules
    bs = limits.block_size
    while True:
        t = floats[CLOCK]
        next_arrival = _next_seen(stream, state, queue)
        if min(next_arrival, _next_departure(out, queue)) <= t:
            _receive(cost, limits, stream, out, state, queue, t < floats[CLOCK])
            next_arrival = _next_seen(stream, state, queue)
        if ints[N_RUNNING] == 0 and queue.ints[N_QUEUED] == 0:
            if next_arrival == math.inf:
                return True
            if next_arrival >= until:
                return False
            widen_timeline(state.timeline, floats, next_arrival)
            floats[IDLE] += next_arrival - t
            floats[CLOCK] = next_arrival
            continue
        if t >= until:
            return False
        if cost.window > 0:
            pass_window_events(cost, state)
        if ints[STEP] - ints[STEP_ORIGIN] >= REBASE_STEPS:
            rebase_sums(cost, state, out, None)

        # --- what runs: R5, R7, B1 to B4 ---
        chunks = _schedule(cost, limits, stream, out, state, queue)
        decoding = ints[BATCH]
        sits_out = chunks.n > 0 and rules.batching >= PREFILL_FIRST
        if sits_out:
            ints[BATCH] = 0
        batch = ints[BATCH]
        waiting = queue.ints[N_QUEUED]
        running = ints[N_RUNNING]
        ints[MAX_WAITING] = max(ints[MAX_WAITING], waiting)
        ints[MAX_RUNNING] = max(ints[MAX_RUNNING], running)

        # --- what it costs, and for how many steps: R9, H1 ---
        price = price_step(cost, stream, state, None, chunks.n, chunks.tokens, cost.dense[chunks.tokens])
        growth = 0.0 if chunks.n > 0 else price.slope * batch + cost.window_slope * ints[N_GROWING]
        d0 = price.d0
        q = growth
        longest = _longest(limits, state, queue)
        work = rules.host_step + rules.host_sequence * (batch + chunks.n) + rules.host_token * chunks.tokens
        if not rules.asynchronous:
            d0 += work
        elif d0 < work:  # the host sets the pace until the device's steps have grown as long
            if q > 0.0:
                longest = min(longest, max(1, math.ceil((work - d0) / q)))
                while longest > 1 and d0 + q * (longest - 1) > work:
                    longest -= 1
            d0 = work
            q = 0.0
        k = 1
        if chunks.n == 0 and not chunks.preempted:
            stop = _stop(limits, out, state, queue, until, next_arrival)
            k = min(steps_until(state, d0, q, stop, steps_alike(cost, limits, state, None)), longest)
        end = end_of_steps(t, d0, q, k)
        owned = limits.num_blocks - ints[FREE_BLOCKS]
        blocks_integral = owned * (end - t)
        if chunks.n == 0 and not chunks.preempted:
            owned, blocks_integral = take_blocks(state.residues, bs, ints[STEP], k, batch, owned, d0, q)
            ints[FREE_BLOCKS] = limits.num_blocks - owned
        ints[MAX_BLOCKS] = max(ints[MAX_BLOCKS], owned)

        # --- let it happen: R10 to R15, L1 to L6 ---
        floats[CLOCK] = end
        floats[LAST_START] = end_of_steps(t, d0, q, k - 1)
        ints[STEPS] += k
        ints[SEGMENTS] += 1
        out.steps_by_tokens[chunks.tokens] += k
        out.steps_by_rows[price.rows] += k
        record_segment(state, t, end, running, waiting, blocks_integral, end - t)
        host = k * (d0 - price.d0) + (q - growth) * (k * (k - 1) // 2)
        queue.floats[HOST] += host
        if batch > 0:
            advance_decodes(cost, state, None, price, growth, k)
            floats[SHARE_W] += host / chunks.tokens
            if queue.ints[STALLED] == 0:
                count_latencies(out, state, batch, d0, q, k)
            else:
                _count_latencies_after_stall(out, state, queue, end_of_steps(t, d0, q, 1))
                if k > 1:
                    count_latencies(out, state, batch, d0 + q, q, k - 1)
        if sits_out:
            ints[BATCH] = decoding
        else:
            ints[STEP] += k
        may_act = rules.clients_leave or stream.concurrency > 0
        if may_act and min(_next_seen(stream, state, queue), _next_departure(out, queue)) < end:
            _receive(cost, limits, stream, out, state, queue, t < end)
        n_done = 0
        if chunks.n > 0:
            whole = _with_host(price, price.per_token + host / chunks.tokens)
            n_done = end_chunks(cost, stream, out, state, None, chunks.n, whole, bs)
            n_done -= _settle_chunks(stream, limits, out, state, queue, chunks.n)
        if queue.ints[N_GONE] > 0:
            _let_clients_go(cost, limits, stream, out, state, queue)
        n_done += _end_decodes(cost, limits, stream, out, state, queue)
        if stream.concurrency > 0:
            for _ in range(n_done):
                release_next(stream, state, end + rules.output_s)
