"""The skip-ahead engine: one replica, advanced from event to event in closed form.

Between two events the steps of a decoding batch are an arithmetic progression: every sequence gains one token, so S grows
by B and a step takes ``D0 + q·i`` with ``q = slope·B``. A run of k such steps is one *segment*, whatever k is. A step
with a prefill chunk in it is a segment of one. Nothing loops over tokens, and nothing loops over the batch except a step
that runs out of KV blocks (rules R5 and R6 of ``docs/engine-rules.md``, which this module implements).

How a sequence is known without being visited:

* its finish is a key (step index, slot) in a heap; preempted sequences leave stale keys that are dropped when they surface;
* its need for a new block at step J is the residue (computed − J) mod block_size in a histogram that never moves;
* its share of time is the difference of three running sums between joining and leaving the batch:
  ``W`` (what a token pays), ``R0`` = Σ slope and ``R1`` = Σ slope·step;
* its keys in windowed layers grow by one per step until the window is full: a second heap holds the steps at which
  sequences stop growing (and, when windows are chunks of the context, start over).

Everything lives in arrays owned by the caller, so a run can be cut at any time and resumed.
"""

import math
from typing import Any, NamedTuple

from simulator.engine import speculation
from simulator.engine.heaps import pop_arrival, pop_key, push_arrival, push_key
from simulator.engine.jit import compiled, inlined
from simulator.engine.prefix_cache import (
    N_ENDED,
    START,
    Cache,
    admit,
    give_back,
    grow,
    look_up,
    note_end,
    publish,
    release_ended,
    steps_to_fill,
    take,
    watch,
)
from simulator.engine.progressions import (
    blocks_for,
    count_itl,
    end_of_steps,
    residue,
    spread,
    steps_to_reach,
    steps_with_blocks,
    take_blocks,
    window_pairs,
)
from simulator.engine.records import FINISHED, REJECTED, RUNNING, WAITING
from simulator.engine.speculation import Spec
from simulator.engine.swap import N_MOVED, SAVED, Swap, charge_copies, copy_in, copy_out
from simulator.engine.tiers import BLOCKED, N_READY, Loads, find_run, next_ready, start_load

# indices into State.ints
(
    STEP,
    STEP_ORIGIN,
    BATCH,
    KEYS_SUM,
    FREE_BLOCKS,
    HEAP_SIZE,
    N_RUNNING,
    FIRST,
    LAST,
    PARTIAL,
    N_PREEMPTED,
    N_FREE_SLOTS,
    FIFO_HEAD,
    FIFO_TAIL,
    NEXT_ROW,
    N_PENDING,
    KNOT,
    STEPS,
    DECODE_TOKENS,
    DECODE_KEYS,
    PREFILL_PAIRS,
    PREFILL_KEYS,
    CHUNKS,
    PREEMPTIONS,
    RECOMPUTED,
    SEGMENTS,
    MAX_RUNNING,
    MAX_WAITING,
    MAX_BLOCKS,
    WINDOW_SUM,
    N_GROWING,
    N_EVENTS,
    WINDOW_DECODE_KEYS,
    WINDOW_PAIRS,
    WINDOW_KEYS,
    STOP_ROW,
    N_LOADING,
    N_INTS,
) = range(38)
# indices into State.floats
(
    CLOCK,
    SHARE_W,
    SHARE_R0,
    SHARE_R1,
    IDLE,
    DECODE_ATTENTION,
    PREFILL_ATTENTION,
    RUNNING_INTEGRAL,
    WAITING_INTEGRAL,
    BLOCKS_INTEGRAL,
    ITL_MAX,
    INTERVAL,
    LAST_START,
    N_FLOATS,
) = range(14)
# rows of State.timeline
T_RUNNING, T_WAITING, T_BLOCKS, T_BUSY, T_PREEMPTIONS = range(5)

SLOT_BITS = 20
"""A finish key is step << SLOT_BITS | slot."""
REBASE_STEPS = 1 << 14
"""Running sums restart after this many steps, before the differences lose digits."""


class CostTable(NamedTuple):
    """Arrays of a StepCost."""

    dense: Any
    head: Any
    knots: Any
    value: Any
    slope: Any
    seq: float
    planes: Any
    window: int
    window_chunked: bool
    window_slope: float


class Limits(NamedTuple):
    """EngineSettings, as numbers."""

    max_num_seqs: int
    budget: int
    block_size: int
    num_blocks: int
    max_model_len: int
    reserve_full: bool
    lookahead: int


class Stream(NamedTuple):
    """Requests, as arrays; ``concurrency`` 0 is the open loop."""

    arrival: Any
    prompt: Any
    output: Any
    cached: Any
    max_tokens: Any
    concurrency: int


class Outcome(NamedTuple):
    """Per-request results, and histograms."""

    status: Any
    arrival: Any
    scheduled: Any
    first_token: Any
    finish: Any
    preemptions: Any
    busy: Any
    busy_prefill: Any
    busy_cached: Any
    recompute: Any
    steps_by_tokens: Any
    steps_by_rows: Any
    itl: Any


class State(NamedTuple):
    """Everything that changes, and survives a cut."""

    ints: Any
    floats: Any
    fifo: Any
    pending_time: Any
    pending_row: Any
    heap: Any
    residues: Any
    stack: Any
    free_slots: Any
    row: Any
    computed: Any
    joined: Any
    emitted: Any
    seen: Any
    finish_step: Any
    after: Any
    before: Any
    w: Any
    r0: Any
    r1: Any
    last_token: Any
    events: Any
    event_step: Any
    growing: Any
    chunk_slot: Any
    chunk_size: Any
    chunk_start: Any
    timeline: Any
    bits_f: Any
    bits_i: Any


class Extra(NamedTuple):
    """What goes beyond a plain replica: a record of arrays and flags for each feature.

    Numba compiles ``advance`` twice: without (None) every ``if extra is not None`` vanishes; with it, all features are
    compiled in, and their flags switch them at run time.
    """

    cache: Cache
    spec: Spec
    swap: Swap
    loads: Loads


@inlined
def _chunk_pairs(cost: CostTable, done: int, size: int) -> int:
    """Windowed pairs of a chunk of ``size`` tokens on ``done`` earlier ones."""
    pairs = window_pairs(done + size, cost.window, cost.window_chunked)
    return pairs - window_pairs(done, cost.window, cost.window_chunked)


@inlined
def _chunk_keys(cost: CostTable, done: int, size: int) -> int:
    """Keys that a chunk's windowed layers read."""
    if cost.window_chunked:
        return done % cost.window + size
    return min(done + size, size + cost.window - 1)


@inlined
def _push_event(cost: CostTable, state: State, slot: int, seen: int) -> None:
    """Note when a sequence that now sees ``seen`` keys stops growing, or starts over; full windows that slide never do."""
    ints = state.ints
    step = ints[STEP]
    if seen < cost.window:
        state.growing[slot] = 1
        ints[N_GROWING] += 1
        state.event_step[slot] = step + cost.window - seen
    elif cost.window_chunked and cost.window > 1:
        state.growing[slot] = 0
        state.event_step[slot] = step + 1
    else:
        state.growing[slot] = 0
        state.event_step[slot] = -1
        return
    if ints[N_EVENTS] == len(state.events):
        size = 0
        for i in range(ints[N_EVENTS]):
            key = state.events[i]
            if state.event_step[key & ((1 << SLOT_BITS) - 1)] == key >> SLOT_BITS:
                size = push_key(state.events, size, key)
        ints[N_EVENTS] = size
    ints[N_EVENTS] = push_key(state.events, ints[N_EVENTS], state.event_step[slot] << SLOT_BITS | slot)


@inlined
def _pass_events(cost: CostTable, state: State) -> None:
    """Bring the windowed sums to the present step; stale events are dropped."""
    ints = state.ints
    while ints[N_EVENTS] > 0:
        key = state.events[0]
        slot = key & ((1 << SLOT_BITS) - 1)
        if state.event_step[slot] == key >> SLOT_BITS:
            if key >> SLOT_BITS > ints[STEP]:
                return
            ints[N_EVENTS] = pop_key(state.events, ints[N_EVENTS])
            if state.growing[slot] == 1:  # the window is full
                ints[N_GROWING] -= 1
                _push_event(cost, state, slot, cost.window)
            else:  # the next chunk of the context begins
                ints[WINDOW_SUM] += 1 - cost.window
                _push_event(cost, state, slot, 1)
        else:
            ints[N_EVENTS] = pop_key(state.events, ints[N_EVENTS])


@compiled
def _widen(timeline: Any, floats: Any, end: float) -> float:
    """Double the interval, merging pairs, until ``end`` lies inside the timeline; return the interval."""
    interval = float(floats[INTERVAL])
    size = timeline.shape[1]
    while end >= size * interval:
        for r in range(timeline.shape[0]):
            for b in range(size // 2):
                timeline[r, b] = timeline[r, 2 * b] + timeline[r, 2 * b + 1]
            timeline[r, size // 2 :] = 0.0
        interval *= 2.0
    floats[INTERVAL] = interval
    return interval


@inlined
def _settle(cost: CostTable, state: State, out: Outcome, extra: Extra | None, slot: int, step: int) -> None:
    """Charge a decoding sequence for the steps since it joined, or was last settled."""
    floats = state.floats
    if extra is not None and extra.spec.on:
        sequences, tariff = extra.spec.batch, extra.spec.tariff
        w, r0 = floats[SHARE_W] - state.w[slot], floats[SHARE_R0] - state.r0[slot]
        r1 = floats[SHARE_R1] - state.r1[slot]
        pays, wasted = speculation.settle(
            sequences, tariff.levels, tariff.floats, tariff.v, slot, step, state.ints[STEP_ORIGIN], w, r0, r1
        )
        out.busy[state.row[slot]] += pays
        tariff.wasted[state.row[slot]] += wasted
        state.emitted[slot] = speculation.emitted_of(sequences, slot)
        state.computed[slot] = sequences.slots[slot, speculation.BASE] + state.emitted[slot]
        state.joined[slot] = step
        return
    if cost.window > 0:
        start = state.computed[slot]
        keys = window_pairs(start + step - state.joined[slot], cost.window, cost.window_chunked)
        keys -= window_pairs(start, cost.window, cost.window_chunked)
        out.busy[state.row[slot]] += cost.window_slope * keys
    first_keys = state.computed[slot] + 1 - (state.joined[slot] - state.ints[STEP_ORIGIN])
    out.busy[state.row[slot]] += (
        (floats[SHARE_W] - state.w[slot])
        + first_keys * (floats[SHARE_R0] - state.r0[slot])
        + (floats[SHARE_R1] - state.r1[slot])
    )
    state.computed[slot] += step - state.joined[slot]
    state.emitted[slot] += step - state.joined[slot]
    state.joined[slot] = step


@inlined
def _join(state: State, slot: int, step: int) -> None:
    """Remember the running sums at which a sequence starts (or goes on) decoding."""
    state.joined[slot] = step
    state.w[slot] = state.floats[SHARE_W]
    state.r0[slot] = state.floats[SHARE_R0]
    state.r1[slot] = state.floats[SHARE_R1]


@compiled
def _rebase(cost: CostTable, state: State, out: Outcome, extra: Extra | None) -> None:
    """Charge everyone and restart the running sums at zero."""
    ints = state.ints
    step = ints[STEP]
    slot = ints[FIRST]
    while slot >= 0:
        if state.finish_step[slot] >= 0:
            _settle(cost, state, out, extra, slot, step)
            state.w[slot] = 0.0
            state.r0[slot] = 0.0
            state.r1[slot] = 0.0
        slot = state.after[slot]
    state.floats[SHARE_W] = 0.0
    state.floats[SHARE_R0] = 0.0
    state.floats[SHARE_R1] = 0.0
    ints[STEP_ORIGIN] = step
    if extra is not None and extra.spec.on:
        extra.spec.tariff.v[:] = 0.0
        extra.spec.tariff.floats[: speculation.CHUNK_DRAFT] = 0.0


@inlined
def _rate(spec: Spec, row: int) -> int:
    """Tokens per pass of a request at the level in force, in units of 2**-16 (P3)."""
    kind = spec.classes[row] if len(spec.classes) > 0 else 0
    return int(spec.rates[kind, spec.batch.ints[speculation.LEVEL]])


@compiled
def _change_level(cost: CostTable, stream: Stream, out: Outcome, state: State, extra: Extra, level: int) -> None:
    """P1: charge every decoding sequence at the old level of speculation and let it go on at the new one."""
    ints, spec = state.ints, extra.spec
    step = ints[STEP]
    slot = ints[FIRST]
    while slot >= 0:
        if slot != ints[PARTIAL]:
            _settle(cost, state, out, extra, slot, step)
            _join(state, slot, step)
        slot = state.after[slot]
    spec.batch.ints[speculation.LEVEL] = level
    ints[HEAP_SIZE] = 0
    slot = ints[FIRST]
    while slot >= 0:
        if slot != ints[PARTIAL]:
            row = state.row[slot]
            speculation.change_rate(spec.batch, slot, step, _rate(spec, row))
            state.finish_step[slot] = step + speculation.passes_left(spec.batch, slot, stream.output[row])
            key = state.finish_step[slot] << SLOT_BITS | slot
            ints[HEAP_SIZE] = push_key(state.heap, ints[HEAP_SIZE], key)
        slot = state.after[slot]


@inlined
def _unlink(state: State, slot: int) -> None:
    """Take a request out of the running list."""
    ints = state.ints
    before, after = state.before[slot], state.after[slot]
    if before >= 0:
        state.after[before] = after
    else:
        ints[FIRST] = after
    if after >= 0:
        state.before[after] = before
    else:
        ints[LAST] = before
    ints[N_RUNNING] -= 1


@inlined
def _leave_batch(cost: CostTable, state: State, out: Outcome, extra: Extra | None, slot: int, block_size: int) -> None:
    """Settle a decoding sequence and take it out of the batch's sums."""
    ints = state.ints
    step = ints[STEP]
    if extra is not None and extra.spec.on:
        _settle(cost, state, out, extra, slot, step)
        speculation.leave(extra.spec.batch, slot)
        ints[BATCH] -= 1
        return
    if cost.window > 0:
        ints[WINDOW_SUM] -= cost.window
        if state.growing[slot] == 1:
            ints[WINDOW_SUM] += state.event_step[slot] - step
            ints[N_GROWING] -= 1
        state.event_step[slot] = -1
    _settle(cost, state, out, extra, slot, step)
    ints[BATCH] -= 1
    ints[KEYS_SUM] -= state.computed[slot] + 1
    state.residues[residue(state.computed[slot] - step, block_size)] -= 1


@inlined
def _owned(state: State, extra: Extra | None, slot: int, decoded: bool, block_size: int) -> int:
    """Blocks of a request, which looks ahead once it has decoded (P2)."""
    if extra is not None and extra.spec.on and decoded:
        return int(extra.spec.batch.slots[slot, speculation.BLOCKS])
    return blocks_for(state.computed[slot], block_size)


@inlined
def _moment(state: State, extra: Extra) -> int:
    """Stamp of what is published now: the step, or with speculation, which publishes nothing late, a count."""
    if extra.spec.on:
        extra.spec.batch.ints[speculation.MOMENT] += 1
        return int(extra.spec.batch.ints[speculation.MOMENT])
    return int(state.ints[STEP])


@compiled
def _preempt(cost: CostTable, state: State, out: Outcome, extra: Extra | None, slot: int, block_size: int) -> None:
    """R6: free all blocks, forget the cache, go to the front of the queue."""
    ints = state.ints
    decoded = slot != ints[PARTIAL]
    if not decoded:
        ints[PARTIAL] = -1
    else:
        _leave_batch(cost, state, out, extra, slot, block_size)
        if extra is not None and extra.cache.on and extra.spec.on and not extra.cache.radix:  # P6
            full = state.computed[slot] // block_size
            publish(extra.cache, slot, state.row[slot], full, _moment(state, extra))
        state.finish_step[slot] = -1
        state.last_token[slot] = state.floats[CLOCK]
    computed = state.computed[slot]
    state.seen[slot] = max(state.seen[slot], computed)
    row = state.row[slot]
    freed = _owned(state, extra, slot, decoded, block_size)
    if extra is not None and extra.swap.on:
        copy_out(extra.swap, slot, computed, freed)
    if extra is not None and extra.cache.on:
        freed = give_back(extra.cache, slot, row, freed, ints[STEP])
    ints[FREE_BLOCKS] += freed
    state.computed[slot] = 0
    _unlink(state, slot)
    state.stack[ints[N_PREEMPTED]] = slot
    ints[N_PREEMPTED] += 1
    ints[PREEMPTIONS] += 1
    state.timeline[T_PREEMPTIONS, int(state.floats[CLOCK] / state.floats[INTERVAL])] += 1.0
    out.preemptions[row] += 1
    out.status[row] = WAITING


@inlined
def _finish(state: State, out: Outcome, extra: Extra | None, slot: int, owned: int) -> None:
    """Free the ``owned`` blocks and the slot of a request that has left the batch."""
    ints = state.ints
    row = state.row[slot]
    out.status[row] = FINISHED
    out.finish[row] = state.floats[CLOCK]
    if extra is not None and extra.cache.on:
        note_end(extra.cache, slot, row, state.computed[slot], owned, ints[STEP])
        owned = 0
    ints[FREE_BLOCKS] += owned
    if extra is not None and extra.spec.on:
        extra.spec.batch.slots[slot, speculation.PROGRESS] = 0
    state.finish_step[slot] = -1
    _unlink(state, slot)
    state.free_slots[ints[N_FREE_SLOTS]] = slot
    ints[N_FREE_SLOTS] += 1


@inlined
def _receive(stream: Stream, limits: Limits, out: Outcome, state: State, before_now: bool) -> None:
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
                _release(stream, state, when)
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
def _release(stream: Stream, state: State, now: float) -> None:
    """R3: in a closed loop, one who leaves makes room for the next."""
    row = state.ints[NEXT_ROW]
    if row < len(stream.prompt):
        state.ints[NEXT_ROW] = row + 1
        state.ints[N_PENDING] = push_arrival(
            state.pending_time, state.pending_row, state.ints[N_PENDING], now + stream.arrival[row], row
        )


@inlined
def _drop_stale(state: State) -> None:
    """Rebuild the finish heap from the keys that still hold."""
    ints = state.ints
    size = 0
    for i in range(ints[HEAP_SIZE]):
        key = state.heap[i]
        if state.finish_step[key & ((1 << SLOT_BITS) - 1)] == key >> SLOT_BITS:
            size = push_key(state.heap, size, key)
    ints[HEAP_SIZE] = size


class Chunks(NamedTuple):
    """The tokens of a step: those of the decoding batch, and the chunks in ``State.chunk_slot``."""

    n: int
    tokens: int
    free: int
    preempted: bool
    unsure: bool
    """The first of the queue lacks blocks, but decoding may publish one that it can share."""


class Price(NamedTuple):
    """What a step costs (R9), with the parts by which it is shared (R11)."""

    d0: float
    per_token: float
    per_row: float
    slope: float
    attention: float
    rows: int
    pairs: int
    keys: int
    seen_pairs: int
    seen_keys: int
    plane: int
    prefill: float
    per_chunk_token: float


@inlined
def _next_arrival(stream: Stream, state: State) -> float:
    """When the next request arrives; infinity if none is on its way."""
    if stream.concurrency > 0:
        if state.ints[N_PENDING] > 0:
            return float(state.pending_time[0])
    elif state.ints[NEXT_ROW] < len(stream.prompt):
        return float(stream.arrival[state.ints[NEXT_ROW]])
    return math.inf


@inlined
def _n_waiting(state: State) -> int:
    """Requests in the queue, without those that load."""
    return int(state.ints[N_PREEMPTED] + state.ints[FIFO_TAIL] - state.ints[FIFO_HEAD])


@inlined
def _step_need(state: State, extra: Extra | None, block_size: int) -> int:
    """Blocks that the decoding sequences need in this step."""
    step = state.ints[STEP]
    if extra is not None and extra.spec.on:
        return int(extra.spec.batch.ring[speculation.RING_NEED, step & extra.spec.batch.mask])
    return int(state.residues[residue(-step, block_size)])


@inlined
def _needs(state: State, extra: Extra | None, slot: int, block_size: int) -> int:
    """Blocks that a decoding sequence needs in this step."""
    step = state.ints[STEP]
    if extra is not None and extra.spec.on:
        slots = extra.spec.batch.slots
        return int(slots[slot, speculation.NEED]) if slots[slot, speculation.BLOCK_STEP] == step else 0
    return int(residue(state.computed[slot] + step - state.joined[slot], block_size) == 0)


@inlined
def _tokens_per_sequence(extra: Extra | None) -> int:
    """Tokens of one decoding sequence in a step, and its logit rows."""
    if extra is not None and extra.spec.on:
        level = extra.spec.batch.ints[speculation.LEVEL]
        return int(extra.spec.tariff.levels[level, speculation.QUERIES])
    return 1


@compiled
def _make_room(cost: CostTable, limits: Limits, out: Outcome, state: State, extra: Extra | None) -> bool:
    """R5 where blocks are short: decoding sequences take theirs in order of admission and preempt the last to run.

    Return whether one had to preempt itself, which ends R5.
    """
    ints = state.ints
    bs = limits.block_size
    slot = ints[FIRST]
    while slot >= 0:
        need = _needs(state, extra, slot, bs) if slot != ints[PARTIAL] else 0
        if need > 0:
            gone = False
            while ints[FREE_BLOCKS] < need and not gone:
                victim = ints[LAST]
                _preempt(cost, state, out, extra, victim, bs)
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
def _goes_loading(
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
            value += cost.planes[j, 3] * _chunk_pairs(cost, past, tokens)
            value += cost.planes[j, 4] * _chunk_keys(cost, past, tokens)
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
def _end_loads(state: State, loads: Loads) -> None:
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
def _append(state: State, slot: int) -> None:
    """Put a request at the end of the running list."""
    ints = state.ints
    state.before[slot] = ints[LAST]
    state.after[slot] = -1
    if ints[LAST] >= 0:
        state.after[ints[LAST]] = slot
    else:
        ints[FIRST] = slot
    ints[LAST] = slot
    ints[N_RUNNING] += 1


@inlined
def _schedule_chunks(
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
    tokens = ints[BATCH] * _tokens_per_sequence(extra)
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
                _preempt(cost, state, out, extra, slot, bs)
                preempted = True
                free += ints[FREE_BLOCKS]
        else:
            free -= missing
            if extra is not None and extra.cache.on:
                grow(extra.cache, slot, row, missing, (done + want) // bs, _moment(state, extra))
            room -= want
            tokens += want
            state.chunk_slot[0] = slot
            state.chunk_size[0] = want
            state.chunk_start[0] = done
            chunks = 1
    if extra is not None:
        extra.loads.ints[BLOCKED] = 0
    if not closed:
        waiting = _n_waiting(state)
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
                if _goes_loading(cost, limits, stream, state, extra, row, hits):
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
            _append(state, slot)
            waiting -= 1
            free -= need
            if extra is not None and extra.cache.on:
                free += hits - admit(extra.cache, slot, row, hits, loaded, known, start, state.seen[slot])
                grow(extra.cache, slot, row, need - hits, (done + want) // bs, _moment(state, extra))
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


@inlined
def _find_knot(cost: CostTable, state: State, extra: Extra | None) -> int:
    """The piece of the curve of decode attention on which the batch is; noted in ``KNOT``."""
    total_keys = float(state.ints[KEYS_SUM])
    if extra is not None and extra.spec.on:
        total_keys = extra.spec.batch.ints[speculation.KEYS] * speculation.PER_TOKEN
    knot = state.ints[KNOT]
    while knot + 1 < len(cost.knots) and cost.knots[knot + 1] <= total_keys:
        knot += 1
    while cost.knots[knot] > total_keys:
        knot -= 1
    state.ints[KNOT] = knot
    return int(knot)


@inlined
def _price(
    cost: CostTable, stream: Stream, state: State, extra: Extra | None, chunks: int, tokens: int, dense: float
) -> Price:
    """R9: what the step costs, its dense layers ``dense`` seconds."""
    ints = state.ints
    batch = ints[BATCH]
    decoded = batch * _tokens_per_sequence(extra)
    rows = decoded
    pairs = 0
    keys = 0
    seen_pairs = 0
    seen_keys = 0
    for c in range(chunks):
        slot = state.chunk_slot[c]
        row = state.row[slot]
        done = state.chunk_start[c]
        size = state.chunk_size[c]
        pairs += size * done + size * (size + 1) // 2
        keys += done + size
        if cost.window > 0:
            seen_pairs += _chunk_pairs(cost, done, size)
            seen_keys += _chunk_keys(cost, done, size)
        if done + size == stream.prompt[row] + state.emitted[slot]:
            rows += 1
    d0 = dense + cost.head[rows]
    slope = 0.0
    attention = 0.0
    if batch > 0:
        knot = _find_knot(cost, state, extra)
        slope = cost.slope[knot]
        attention = cost.value[knot] + slope * (ints[KEYS_SUM] - cost.knots[knot]) + cost.seq * batch
        attention += cost.window_slope * ints[WINDOW_SUM]
        if extra is not None and extra.spec.on:
            terms = speculation.decode_terms(extra.spec, cost.knots, knot, batch)
            slope = terms.slope
            attention = terms.seconds
        d0 += attention
    plane = 0
    prefill = 0.0
    if chunks > 0:
        prefill = -1.0
        for j in range(cost.planes.shape[0]):
            value = cost.planes[j, 0] * pairs + cost.planes[j, 1] * keys + cost.planes[j, 2] * chunks
            if cost.window > 0:
                value += cost.planes[j, 3] * seen_pairs + cost.planes[j, 4] * seen_keys
            if value > prefill:
                prefill = value
                plane = j
        d0 += prefill
    per_token = dense / tokens
    per_row = cost.head[rows] / rows if rows > 0 else 0.0
    per_chunk = per_token
    if extra is not None and extra.spec.on and chunks > 0:
        drafting = speculation.chunk_time(extra.spec, tokens - decoded)
        d0 += drafting
        per_chunk += drafting / (tokens - decoded)
    return Price(
        d0, per_token, per_row, slope, attention, rows, pairs, keys, seen_pairs, seen_keys, plane, prefill, per_chunk
    )


@inlined
def _steps_in_piece(cost: CostTable, limits: Limits, state: State, extra: Extra | None, k: int) -> int:
    """Steps, at most k, until a knot or a window is crossed, or blocks run out; with speculation, blocks come later."""
    ints = state.ints
    step, batch, knot = ints[STEP], ints[BATCH], ints[KNOT]
    if extra is not None and extra.spec.on:
        edge = cost.knots[knot + 1] if knot + 1 < len(cost.knots) else math.inf
        return int(speculation.steps_in_reach(extra.spec.batch, edge, step, k))
    if knot + 1 < len(cost.knots):
        k = min(k, (math.ceil(cost.knots[knot + 1]) - ints[KEYS_SUM] + batch - 1) // batch)
    if ints[N_EVENTS] > 0:
        k = min(k, (state.events[0] >> SLOT_BITS) - step)
    return int(steps_with_blocks(state.residues, limits.block_size, step, k, batch, ints[FREE_BLOCKS]))


@inlined
def _lengthen(price: Price, seconds: float) -> Price:
    """The price of a step that lasts ``seconds`` longer."""
    return Price(
        price.d0 + seconds,
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
        price.per_chunk_token,
    )


@inlined
def _steps_alike(cost: CostTable, limits: Limits, state: State, extra: Extra | None) -> int:
    """How many decode steps the batch can take until somebody finishes, blocks run out, or a knot or window is crossed."""
    ints = state.ints
    step = ints[STEP]
    while True:
        key = state.heap[0]
        if state.finish_step[key & ((1 << SLOT_BITS) - 1)] == key >> SLOT_BITS:
            break
        ints[HEAP_SIZE] = pop_key(state.heap, ints[HEAP_SIZE])
    k = (key >> SLOT_BITS) - step
    return _steps_in_piece(cost, limits, state, extra, k)


@inlined
def _steps_until(state: State, d0: float, q: float, stop: float, k: int) -> int:
    """How many of k steps to take so that ``stop`` is not passed by a whole step, nor an interval of the timeline."""
    t = state.floats[CLOCK]
    k = steps_to_reach(t, d0, q, stop, k)
    interval = state.floats[INTERVAL]
    edge = (int(t / interval) + 1) * interval
    if k > 1 and end_of_steps(t, d0, q, k) > edge:
        k = steps_to_reach(t, d0, q, edge, k)
        if k > 1 and end_of_steps(t, d0, q, k) > edge:
            k -= 1
    return k


@inlined
def _record_segment(
    state: State, t: float, end: float, running: int, waiting: int, blocks_integral: float, busy: float
) -> None:
    """R13, R15: integrals over time, ``busy`` seconds of it at work, and the timeline."""
    floats, timeline = state.floats, state.timeline
    interval = floats[INTERVAL]
    if end >= timeline.shape[1] * interval:
        interval = _widen(timeline, floats, end)
    length = end - t
    b = int(t / interval)
    if end <= (b + 1) * interval:
        timeline[T_RUNNING, b] += running * length
        timeline[T_WAITING, b] += waiting * length
        timeline[T_BLOCKS, b] += blocks_integral
        timeline[T_BUSY, b] += busy
    else:
        spread(timeline, T_RUNNING, interval, t, end, running)
        spread(timeline, T_WAITING, interval, t, end, waiting)
        spread(timeline, T_BLOCKS, interval, t, end, blocks_integral / length)
        spread(timeline, T_BUSY, interval, t, end, busy / length)
    floats[RUNNING_INTEGRAL] += running * length
    floats[WAITING_INTEGRAL] += waiting * length
    floats[BLOCKS_INTEGRAL] += blocks_integral


@inlined
def _advance_decodes(cost: CostTable, state: State, extra: Extra | None, price: Price, q: float, k: int) -> None:
    """R10, R11: k steps of the decoding batch, by their sums. ``State.ints[STEP]`` is still that of the first."""
    ints, floats = state.ints, state.floats
    batch = ints[BATCH]
    total_keys = ints[KEYS_SUM]
    growth = k * (k - 1) // 2
    ints[DECODE_TOKENS] += k * batch
    floats[DECODE_ATTENTION] += k * price.attention + q * growth
    knot = ints[KNOT]
    if extra is not None and extra.spec.on:
        per_token = price.per_token + price.per_row
        share = speculation.fixed_share(extra.spec, cost.knots, knot, batch, price.slope, per_token)
        since = ints[STEP] - ints[STEP_ORIGIN]
        speculation.count_passes(extra.spec, cost.knots, knot, batch, k, per_token, since)
    else:
        intercept = cost.value[knot] - price.slope * cost.knots[knot]
        share = price.per_token + price.per_row + cost.seq + intercept / batch
        ints[DECODE_KEYS] += k * total_keys + batch * growth
        ints[KEYS_SUM] = total_keys + k * batch
        ints[WINDOW_DECODE_KEYS] += k * ints[WINDOW_SUM] + ints[N_GROWING] * growth
        ints[WINDOW_SUM] += k * ints[N_GROWING]
    floats[SHARE_W] += k * share
    floats[SHARE_R0] += k * price.slope
    floats[SHARE_R1] += price.slope * (k * (ints[STEP] - ints[STEP_ORIGIN]) + growth)


@inlined
def _count_latencies(out: Outcome, state: State, batch: int, d0: float, q: float, k: int) -> None:
    """R10: k tokens of each of ``batch`` sequences, in steps that last d0, d0 + q, …"""
    count_itl(out.itl, state.bits_f, state.bits_i, d0, q, k, batch)
    state.floats[ITL_MAX] = max(state.floats[ITL_MAX], d0 + q * (k - 1))


@inlined
def _start_decoding(
    cost: CostTable, stream: Stream, state: State, extra: Extra | None, slot: int, rest: int, block_size: int
) -> None:
    """Let a request whose prompt is computed join the decoding batch, ``rest`` tokens from its end."""
    ints = state.ints
    step = ints[STEP]
    done = state.computed[slot]
    _join(state, slot, step)
    ints[BATCH] += 1
    if extra is not None and extra.spec.on:
        row = state.row[slot]
        speculation.mark(extra.spec.tariff.floats, extra.spec.tariff.v, slot)
        speculation.join(extra.spec.batch, slot, step, _rate(extra.spec, row), stream.prompt[row], state.emitted[slot])
        rest = speculation.passes_left(extra.spec.batch, slot, stream.output[row])
    else:
        ints[KEYS_SUM] += done + 1
        if cost.window > 0:
            seen = done % cost.window + 1 if cost.window_chunked else min(done + 1, cost.window)
            ints[WINDOW_SUM] += seen
            _push_event(cost, state, slot, seen)
        state.residues[residue(done - step, block_size)] += 1
        if extra is not None and extra.cache.late:
            watch(extra.cache, slot, state.row[slot], done, step)
    state.finish_step[slot] = step + rest
    if ints[HEAP_SIZE] == len(state.heap):
        _drop_stale(state)
    ints[HEAP_SIZE] = push_key(state.heap, ints[HEAP_SIZE], (step + rest) << SLOT_BITS | slot)


@inlined
def _end_chunks(
    cost: CostTable,
    stream: Stream,
    out: Outcome,
    state: State,
    extra: Extra | None,
    chunks: int,
    price: Price,
    block_size: int,
) -> int:
    """R10 to R12 for chunks; return how many requests finish. ``State`` is already at the step's end."""
    ints, floats = state.ints, state.floats
    end = floats[CLOCK]
    plane = price.plane
    n_done = 0
    ints[CHUNKS] += chunks
    ints[PREFILL_PAIRS] += price.pairs
    ints[PREFILL_KEYS] += price.keys
    ints[WINDOW_PAIRS] += price.seen_pairs
    ints[WINDOW_KEYS] += price.seen_keys
    floats[PREFILL_ATTENTION] += price.prefill
    ints[PARTIAL] = -1
    for c in range(chunks):
        slot = state.chunk_slot[c]
        size = state.chunk_size[c]
        row = state.row[slot]
        done = state.chunk_start[c]
        known = stream.prompt[row] + state.emitted[slot]
        pays = (
            price.per_chunk_token * size
            + cost.planes[plane, 0] * (size * done + size * (size + 1) // 2)
            + cost.planes[plane, 1] * (done + size)
            + cost.planes[plane, 2]
        )
        if cost.window > 0:
            pays += cost.planes[plane, 3] * _chunk_pairs(cost, done, size)
            pays += cost.planes[plane, 4] * _chunk_keys(cost, done, size)
        start = stream.cached[row]
        if extra is not None and extra.cache.on:
            start = extra.cache.slots[slot, START]
        out.busy_cached[row] += cost.planes[plane, 1] * start
        if done + size == known:
            pays += price.per_row
        out.busy[row] += pays
        out.busy_prefill[row] += pays
        again = min(done + size, state.seen[slot]) - done
        if again > 0:
            out.recompute[row] += pays * again / size
            ints[RECOMPUTED] += again
        done += size
        state.computed[slot] = max(done, state.computed[slot])  # a later chunk may be in flight already
        if extra is not None and extra.cache.radix:
            ints[FREE_BLOCKS] += publish(extra.cache, slot, row, done // block_size, _moment(state, extra))
        if done < known:
            ints[PARTIAL] = slot
            continue
        if state.emitted[slot] == 0:
            out.first_token[row] = end
        else:
            gap = end - state.last_token[slot]
            count_itl(out.itl, state.bits_f, state.bits_i, gap, 0.0, 1, 1)
            floats[ITL_MAX] = max(floats[ITL_MAX], gap)
        state.emitted[slot] += 1
        rest = stream.output[row] - state.emitted[slot]
        if rest == 0:
            _finish(state, out, extra, slot, blocks_for(done, block_size))
            n_done += 1
        else:
            _start_decoding(cost, stream, state, extra, slot, rest, block_size)
    return n_done


@inlined
def _end_decodes(
    cost: CostTable, stream: Stream, out: Outcome, state: State, extra: Extra | None, block_size: int
) -> int:
    """R10: decoding requests whose last token has come; return how many."""
    ints = state.ints
    n_done = 0
    while ints[HEAP_SIZE] > 0 and state.heap[0] >> SLOT_BITS <= ints[STEP]:
        key = state.heap[0]
        ints[HEAP_SIZE] = pop_key(state.heap, ints[HEAP_SIZE])
        slot = key & ((1 << SLOT_BITS) - 1)
        if state.finish_step[slot] == key >> SLOT_BITS:
            _leave_batch(cost, state, out, extra, slot, block_size)
            owned = _owned(state, extra, slot, True, block_size)  # noqa: FBT003 - compiled code takes no keywords here
            if extra is not None and extra.spec.on:
                row = state.row[slot]
                speculation.cut_surplus(extra.spec.batch, slot, stream.output[row])
                state.computed[slot] = stream.prompt[row] + stream.output[row] - 1
            _finish(state, out, extra, slot, owned)
            n_done += 1
    return n_done


@compiled
def advance(
    cost: CostTable, limits: Limits, stream: Stream, out: Outcome, state: State, extra: Extra | None, until: float
) -> bool:
    """Run until no step can start before ``until``; return whether everything is done.

    Rows of ``stream`` may be appended between calls, as long as none arrives before the clock of a step already
    scheduled. A closed loop, which takes rows when it wants them, also stops before the next step once it has taken
    row ``STOP_ROW`` − 1. ``extra`` is None for a plain replica: then its branches are not even compiled.
    """
    ints, floats = state.ints, state.floats
    bs = limits.block_size
    while True:
        _receive(stream, limits, out, state, before_now=False)
        t = floats[CLOCK]
        next_arrival = _next_arrival(stream, state)
        stop = until
        wakes = next_arrival
        if extra is not None and extra.loads.on:
            _end_loads(state, extra.loads)
            stop = min(stop, next_ready(extra.loads, ints[N_LOADING]))
            wakes = min(wakes, next_ready(extra.loads, ints[N_LOADING]))
        if ints[N_RUNNING] == 0 and _n_waiting(state) == 0:
            if wakes == math.inf:
                return True
            if wakes >= until:
                return False
            _widen(state.timeline, floats, wakes)
            if extra is not None and ints[N_LOADING] > 0:
                floats[WAITING_INTEGRAL] += ints[N_LOADING] * (wakes - t)
                spread(state.timeline, T_WAITING, floats[INTERVAL], t, wakes, float(ints[N_LOADING]))
            floats[IDLE] += wakes - t
            floats[CLOCK] = wakes
            continue
        if t >= until or ints[NEXT_ROW] >= ints[STOP_ROW]:
            return False
        if cost.window > 0:
            _pass_events(cost, state)
        if extra is not None and extra.spec.on:
            if cost.window > 0:
                speculation.pass_window_events(
                    extra.spec.batch, extra.spec.tariff.levels, ints[STEP], out.busy, state.row
                )
            level = extra.spec.level_by_batch[ints[BATCH]]
            if ints[BATCH] > 0 and level != extra.spec.batch.ints[speculation.LEVEL]:
                _change_level(cost, stream, out, state, extra, level)
        if ints[STEP] - ints[STEP_ORIGIN] >= REBASE_STEPS:
            _rebase(cost, state, out, extra)

        # --- what runs: R5, R7 ---
        step = ints[STEP]
        step_need = _step_need(state, extra, bs)
        short = step_need > ints[FREE_BLOCKS]
        if short:
            _make_room(cost, limits, out, state, extra)
        elif extra is not None and extra.cache.on:
            take(extra.cache, step_need)
        batch = ints[BATCH]
        free = ints[FREE_BLOCKS] - (0 if short else step_need)
        chunks = _schedule_chunks(cost, limits, stream, out, state, extra, free, short, in_flight=False)
        if extra is not None and chunks.tokens == 0:  # all who waited load
            continue
        waiting = _n_waiting(state) + ints[N_LOADING]
        running = ints[N_RUNNING]
        ints[MAX_WAITING] = max(ints[MAX_WAITING], waiting)
        ints[MAX_RUNNING] = max(ints[MAX_RUNNING], running)

        # --- what it costs, and for how many steps: R9 ---
        price = _price(cost, stream, state, extra, chunks.n, chunks.tokens, cost.dense[chunks.tokens])
        if extra is not None and extra.swap.on and extra.swap.ints[N_MOVED] > 0:
            price = _lengthen(price, charge_copies(extra.swap, state.row, out.busy, price.d0))
        k = 1
        q = 0.0
        if chunks.n > 0:
            ints[FREE_BLOCKS] = chunks.free
            end = t + price.d0
            blocks_integral = (limits.num_blocks - chunks.free) * (end - t)
            if extra is not None and extra.spec.on and not short:
                speculation.take_blocks_of_step(extra.spec.batch, step)
        else:
            q = price.slope * batch + cost.window_slope * ints[N_GROWING]
            if extra is not None and extra.spec.on:
                q = speculation.decode_terms(extra.spec, cost.knots, ints[KNOT], batch).growth
            if not chunks.preempted:
                if extra is not None and extra.loads.on:  # a load may have begun
                    stop = min(stop, next_ready(extra.loads, ints[N_LOADING]))
                if _n_waiting(state) == 0 and running < limits.max_num_seqs:
                    stop = min(stop, next_arrival)
                k = _steps_until(state, price.d0, q, stop, _steps_alike(cost, limits, state, extra))
                if extra is not None and chunks.unsure:
                    k = min(k, steps_to_fill(extra.cache, step))
                if extra is not None and extra.loads.ints[BLOCKED] == 1:  # what is evicted it may load
                    k = 1
            before = limits.num_blocks - ints[FREE_BLOCKS]
            owned = before
            blocks_integral = 0.0
            if not short:
                if extra is not None and extra.spec.on:
                    k, owned, blocks_integral = speculation.take_blocks_of_steps(
                        extra.spec.batch, step, k, ints[FREE_BLOCKS], before, price.d0, q
                    )
                else:
                    owned, blocks_integral = take_blocks(state.residues, bs, step, k, batch, before, price.d0, q)
                if extra is not None and extra.cache.on:
                    take(extra.cache, owned - before - step_need)
                ints[FREE_BLOCKS] = limits.num_blocks - owned
            end = end_of_steps(t, price.d0, q, k)
            if short:
                blocks_integral = owned * (end - t)
        ints[MAX_BLOCKS] = max(ints[MAX_BLOCKS], limits.num_blocks - ints[FREE_BLOCKS])

        # --- let it happen: R10 to R15 ---
        floats[CLOCK] = end
        floats[LAST_START] = end_of_steps(t, price.d0, q, k - 1)
        ints[STEPS] += k
        ints[SEGMENTS] += 1
        out.steps_by_tokens[chunks.tokens] += k
        out.steps_by_rows[price.rows] += k
        _record_segment(state, t, end, running, waiting, blocks_integral, end - t)
        if batch > 0:
            _advance_decodes(cost, state, extra, price, q, k)
            _count_latencies(out, state, batch, price.d0, q, k)
        ints[STEP] = step + k
        n_done = 0
        if chunks.n > 0:
            n_done += _end_chunks(cost, stream, out, state, extra, chunks.n, price, bs)
        n_done += _end_decodes(cost, stream, out, state, extra, bs)
        if extra is not None and extra.cache.ints[N_ENDED] > 0:
            ints[FREE_BLOCKS] += release_ended(extra.cache, state.row, _moment(state, extra))
        if stream.concurrency > 0 and n_done > 0:
            _receive(stream, limits, out, state, before_now=True)
            for _ in range(n_done):
                _release(stream, state, end)
