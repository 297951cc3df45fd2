"""Segments of steps in the compiled engine: what a step costs, how many are alike, and what they leave behind.

The phases that every loop is made of, whatever its queue.
"""

import math
from typing import Any

from simulator.engine import speculation
from simulator.engine.batch import (
    blocks_left,
    blocks_owned,
    chunk_keys,
    chunk_pairs,
    leave_batch,
    publishing_moment,
    start_decoding,
    tokens_per_sequence,
    unlink_running,
)
from simulator.engine.block_runs import START
from simulator.engine.core import (
    BATCH,
    BLOCKS_INTEGRAL,
    CHUNK_SIZE,
    CHUNK_SLOT,
    CHUNK_START,
    CHUNKS,
    CLOCK,
    COMPUTED,
    EMITTED,
    FINISH_STEP,
    FREE_BLOCKS,
    FREE_SLOT,
    HEAD,
    HEAP_SIZE,
    INTERVAL,
    ITL_MAX,
    KEYS_SUM,
    KNOT,
    LAST_TOKEN,
    N_EVENTS,
    N_FREE_SLOTS,
    PARTIAL,
    PREFILL_ATTENTION,
    PREFILL_KEYS,
    PREFILL_PAIRS,
    RECOMPUTED,
    RUNNING_INTEGRAL,
    SEEN,
    SLOT_BITS,
    STEP,
    T_BLOCKS,
    T_BUSY,
    T_RUNNING,
    T_WAITING,
    WAITING_INTEGRAL,
    WALK,
    WINDOW_KEYS,
    WINDOW_PAIRS,
    WINDOW_SUM,
    CostTable,
    Extra,
    Limits,
    Outcome,
    Price,
    State,
    Stream,
)
from simulator.engine.heaps import pop_key
from simulator.engine.jit import compiled, inlined
from simulator.engine.kv_blocks import blocks_at_most, blocks_owned_at, leave_behind
from simulator.engine.prefix_cache import note_end, publish
from simulator.engine.progressions import (
    count_itl,
    end_of_steps,
    spread,
    steps_to_reach,
    steps_with_blocks,
)
from simulator.engine.queues import GONE, RESERVED, Queue, start_counting, stop_counting
from simulator.engine.records import FINISHED
from simulator.engine.scheduling import STATIC
from simulator.engine.tiers import write_through


@compiled
def widen_timeline(timeline: Any, floats: Any, end: float) -> float:
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
def find_knot(cost: CostTable, state: State, extra: Extra | None) -> int:
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
def price_step(
    cost: CostTable, stream: Stream, state: State, extra: Extra | None, chunks: int, tokens: int, dense: float
) -> Price:
    """R9: what the step costs, its dense layers ``dense`` seconds."""
    ints = state.ints
    batch = ints[BATCH]
    decoded = batch * tokens_per_sequence(extra)
    rows = decoded
    pairs = 0
    keys = 0
    seen_pairs = 0
    seen_keys = 0
    for c in range(chunks):
        slot = state.chunks[c, CHUNK_SLOT]
        row = state.row[slot]
        done = state.chunks[c, CHUNK_START]
        size = state.chunks[c, CHUNK_SIZE]
        pairs += size * done + size * (size + 1) // 2
        keys += done + size
        if cost.window > 0:
            seen_pairs += chunk_pairs(cost, done, size)
            seen_keys += chunk_keys(cost, done, size)
        if done + size == stream.prompt[row] + state.slots[slot, EMITTED]:
            rows += 1
    d0 = dense + cost.head[HEAD, rows]
    slope = 0.0
    attention = 0.0
    if batch > 0:
        knot = find_knot(cost, state, extra)
        walk = cost.head[WALK, batch]
        slope = cost.slope[knot]
        attention = cost.value[knot] + slope * (ints[KEYS_SUM] - cost.knots[knot]) + cost.seq * batch
        attention += walk * ints[KEYS_SUM]
        slope += walk
        attention += cost.window_slope * ints[WINDOW_SUM]
        if extra is not None and extra.spec.on:
            terms = speculation.decode_terms(extra.spec, cost.knots, walk, knot, batch)
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
    per_row = cost.head[HEAD, rows] / rows if rows > 0 else 0.0
    per_chunk = per_token
    if extra is not None and extra.spec.on and chunks > 0:
        drafting = speculation.chunk_time(extra.spec, tokens - decoded)
        d0 += drafting
        per_chunk += drafting / (tokens - decoded)
    return Price(
        d0, per_token, per_row, slope, attention, rows, pairs, keys, seen_pairs, seen_keys, plane, prefill, per_chunk
    )


@inlined
def lengthen(price: Price, seconds: float) -> Price:
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
def steps_in_piece(cost: CostTable, state: State, k: int) -> int:
    """Steps, at most k, until a knot or a window is crossed."""
    ints = state.ints
    batch, knot = ints[BATCH], ints[KNOT]
    if knot + 1 < len(cost.knots):
        k = min(k, (math.ceil(cost.knots[knot + 1]) - ints[KEYS_SUM] + batch - 1) // batch)
    if ints[N_EVENTS] > 0:
        k = min(k, (state.events[0] >> SLOT_BITS) - ints[STEP])
    return int(k)


@inlined
def steps_to_finish(state: State) -> int:
    """Steps of the batch until the first sequence has its last token."""
    ints = state.ints
    while True:
        key = state.heap[0]
        if state.slots[key & ((1 << SLOT_BITS) - 1), FINISH_STEP] == key >> SLOT_BITS:
            return int((key >> SLOT_BITS) - ints[STEP])
        ints[HEAP_SIZE] = pop_key(state.heap, ints[HEAP_SIZE])


@inlined
def steps_alike(cost: CostTable, limits: Limits, state: State, extra: Extra | None) -> int:
    """How many decode steps the batch can take until somebody finishes, blocks run out, or a knot or window is crossed.

    With speculation, blocks come later.
    """
    ints = state.ints
    step, batch, knot = ints[STEP], ints[BATCH], ints[KNOT]
    k = steps_to_finish(state)
    if extra is not None and extra.spec.on:
        edge = cost.knots[knot + 1] if knot + 1 < len(cost.knots) else math.inf
        k = speculation.steps_in_reach(extra.spec.batch, edge, step, k)
        return int(speculation.steps_to_gift(extra.spec.batch, step, k)) if extra.cache.on else int(k)
    k = steps_in_piece(cost, state, k)
    gives = limits.windowed > 0
    cycle = limits.groups * batch
    return int(steps_with_blocks(state.residues, limits.block_size, gives, step, k, cycle, ints[FREE_BLOCKS]))


@inlined
def steps_until(state: State, d0: float, q: float, stop: float, k: int) -> int:
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
def record_segment(
    state: State, t: float, end: float, running: int, waiting: int, blocks_integral: float, busy: float
) -> None:
    """R13, R15: integrals over time, ``busy`` seconds of it at work, and the timeline."""
    floats, timeline = state.floats, state.timeline
    interval = floats[INTERVAL]
    if end >= timeline.shape[1] * interval:
        interval = widen_timeline(timeline, floats, end)
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
def count_latencies(out: Outcome, state: State, batch: int, d0: float, q: float, k: int) -> None:
    """R10: k tokens of each of ``batch`` sequences, in steps that last d0, d0 + q, …"""
    count_itl(out.itl, state.bits_f, state.bits_i, d0, q, k, batch)
    state.floats[ITL_MAX] = max(state.floats[ITL_MAX], d0 + q * (k - 1))


@inlined
def finish_request(
    state: State, out: Outcome, extra: Extra | None, slot: int, owned: int, passed: int, by_chunk: bool
) -> None:
    """Free the ``owned`` blocks and the slot of a request that has left the batch, or whose last chunk was all it needed.

    Its window has ``passed`` blocks of each group.
    """
    ints = state.ints
    row = state.row[slot]
    out.status[row] = FINISHED
    out.finish[row] = state.floats[CLOCK]
    if extra is not None and extra.cache.on:
        note_end(extra.cache, slot, row, state.slots[slot, COMPUTED], owned, passed, ints[STEP], by_chunk)
        owned = 0
    ints[FREE_BLOCKS] += owned
    state.slots[slot, FINISH_STEP] = -1
    unlink_running(state, slot)
    state.slots[ints[N_FREE_SLOTS], FREE_SLOT] = slot
    ints[N_FREE_SLOTS] += 1


@inlined
def cut_to_length(stream: Stream, state: State, extra: Extra, slot: int) -> None:
    """Take from a request that has left the batch what its last pass gave beyond its output."""
    row = state.row[slot]
    if state.slots[slot, EMITTED] >= stream.output[row]:
        speculation.cut_surplus(extra.spec.batch, slot, stream.output[row])
        state.slots[slot, EMITTED] = stream.output[row]
        state.slots[slot, COMPUTED] = stream.prompt[row] + stream.output[row] - 1


@inlined
def reserved_blocks(limits: Limits, stream: Stream, row: int) -> int:
    """B4: blocks that a static batch keeps for a request."""
    return int(blocks_at_most(limits, 0, stream.prompt[row] + stream.max_tokens[row] - 1 + limits.lookahead))


@inlined
def retire(limits: Limits, stream: Stream, state: State, queue: Queue, slot: int) -> None:
    """Forget what the queue keeps of a running request that ends."""
    row = state.row[slot]
    if state.slots[slot, FINISH_STEP] >= 0:
        stop_counting(queue, row, state.ints[STEP])
    if queue.rules.batching == STATIC:
        queue.ints[RESERVED] -= reserved_blocks(limits, stream, row)


@inlined
def end_chunks(
    cost: CostTable,
    limits: Limits,
    stream: Stream,
    out: Outcome,
    state: State,
    queue: Queue | None,
    extra: Extra | None,
    chunks: int,
    price: Price,
) -> int:
    """R10 to R12 for chunks; return how many requests finish. ``State`` is already at the step's end.

    A request whose client has left (L3) is left as it is, even with its last token.
    """
    ints, floats, block_size = state.ints, state.floats, limits.block_size
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
        slot = state.chunks[c, CHUNK_SLOT]
        size = state.chunks[c, CHUNK_SIZE]
        row = state.row[slot]
        done = state.chunks[c, CHUNK_START]
        known = stream.prompt[row] + state.slots[slot, EMITTED]
        pays = (
            price.per_chunk_token * size
            + cost.planes[plane, 0] * (size * done + size * (size + 1) // 2)
            + cost.planes[plane, 1] * (done + size)
            + cost.planes[plane, 2]
        )
        if cost.window > 0:
            pays += cost.planes[plane, 3] * chunk_pairs(cost, done, size)
            pays += cost.planes[plane, 4] * chunk_keys(cost, done, size)
        start = stream.cached[row]
        if extra is not None and extra.cache.on:
            start = extra.cache.slots[slot, START]
        out.busy_cached[row] += cost.planes[plane, 1] * start
        if done + size == known:
            pays += price.per_row
        out.busy[row] += pays
        out.busy_prefill[row] += pays
        again = min(done + size, state.slots[slot, SEEN]) - done
        if again > 0:
            out.recompute[row] += pays * again / size
            ints[RECOMPUTED] += again
        leave_behind(limits, state, extra, slot, done, done + size, True)  # noqa: FBT003 - compiled code takes no keywords here
        done += size
        state.slots[slot, COMPUTED] = max(done, state.slots[slot, COMPUTED])  # a later chunk may be in flight already
        if extra is not None and extra.cache.radix:
            ints[FREE_BLOCKS] += publish(extra.cache, slot, row, done // block_size, publishing_moment(state, extra))
        if extra is not None and extra.cache.tiers.through:
            offset = extra.cache.offsets[row]
            stop = min(min(done, stream.prompt[row]) // block_size, extra.cache.offsets[row + 1] - offset)
            write_through(extra.cache.tiers, extra.cache.ids, offset + (done - size) // block_size, offset + stop)
        if done < known:
            ints[PARTIAL] = slot
            continue
        if state.slots[slot, EMITTED] == 0:
            out.first_token[row] = end
        else:
            gap = end - state.sums[slot, LAST_TOKEN]
            count_itl(out.itl, state.bits_f, state.bits_i, gap, 0.0, 1, 1)
            floats[ITL_MAX] = max(floats[ITL_MAX], gap)
        state.slots[slot, EMITTED] += 1
        rest = stream.output[row] - state.slots[slot, EMITTED]
        if rest == 0:
            if queue is not None:
                if queue.row_ints[row, GONE] != 0:
                    continue
                retire(limits, stream, state, queue, slot)
            owned, left = blocks_owned_at(limits, done, done), blocks_left(limits, state, extra, slot, False)  # noqa: FBT003
            finish_request(state, out, extra, slot, owned, left, True)  # noqa: FBT003
            n_done += 1
        else:
            start_decoding(cost, limits, stream, state, extra, slot, rest)
            if queue is not None:
                state.sums[slot, LAST_TOKEN] = end
                start_counting(queue, row, ints[STEP])
    return n_done


@inlined
def end_decodes(
    cost: CostTable,
    limits: Limits,
    stream: Stream,
    out: Outcome,
    state: State,
    queue: Queue | None,
    extra: Extra | None,
) -> int:
    """R10: decoding requests whose last token has come; return how many."""
    ints = state.ints
    n_done = 0
    while ints[HEAP_SIZE] > 0 and state.heap[0] >> SLOT_BITS <= ints[STEP]:
        key = state.heap[0]
        ints[HEAP_SIZE] = pop_key(state.heap, ints[HEAP_SIZE])
        slot = key & ((1 << SLOT_BITS) - 1)
        if state.slots[slot, FINISH_STEP] == key >> SLOT_BITS:
            if queue is not None:
                retire(limits, stream, state, queue, slot)
            leave_batch(cost, limits, state, out, extra, slot)
            owned = blocks_owned(limits, state, extra, slot, True)  # noqa: FBT003 - compiled code takes no keywords here
            left = blocks_left(limits, state, extra, slot, True)  # noqa: FBT003
            if extra is not None and extra.spec.on:
                cut_to_length(stream, state, extra, slot)
            finish_request(state, out, extra, slot, owned, left, False)  # noqa: FBT003
            n_done += 1
    return n_done
