"""The decoding batch of the compiled engine: who is in it, what each pays, when each ends or needs a block.

Nobody in it is visited from step to step; :mod:`simulator.engine.skip_ahead` says how that can be.
"""

from typing import Any

from simulator.engine import speculation
from simulator.engine.block_runs import PUBLISHED
from simulator.engine.core import (
    AFTER,
    BATCH,
    BEFORE,
    COMPUTED,
    DECODE_ATTENTION,
    DECODE_KEYS,
    DECODE_TOKENS,
    EMITTED,
    EVENT_STEP,
    FINISH_STEP,
    FIRST,
    GROWING,
    HEAP_SIZE,
    JOINED,
    KEYS_SUM,
    KNOT,
    LAST,
    N_EVENTS,
    N_GROWING,
    N_RUNNING,
    SETTLED_R0,
    SETTLED_R1,
    SETTLED_W,
    SHARE_R0,
    SHARE_R1,
    SHARE_W,
    SLOT_BITS,
    STEP,
    STEP_ORIGIN,
    WINDOW_DECODE_KEYS,
    WINDOW_SUM,
    CostTable,
    Extra,
    Limits,
    Outcome,
    Price,
    State,
    Stream,
)
from simulator.engine.heaps import GROUP_BITS, pop_key, push_key
from simulator.engine.jit import compiled, compiled_once, inlined
from simulator.engine.kv_blocks import (
    begin_giving,
    blocks_owned_at,
    blocks_passed,
    end_giving,
    leave_behind,
    next_published_step,
)
from simulator.engine.prefix_cache import catch_up, moment_of, watch
from simulator.engine.progressions import (
    residue,
    window_pairs,
)
from simulator.engine.speculation import Spec


@inlined
def chunk_pairs(cost: CostTable, done: int, size: int) -> int:
    """Windowed pairs of a chunk of ``size`` tokens on ``done`` earlier ones."""
    pairs = window_pairs(done + size, cost.window, cost.window_chunked)
    return pairs - window_pairs(done, cost.window, cost.window_chunked)


@inlined
def chunk_keys(cost: CostTable, done: int, size: int) -> int:
    """Keys that a chunk's windowed layers read."""
    if cost.window_chunked:
        return done % cost.window + size
    return min(done + size, size + cost.window - 1)


@compiled
def _rebuilt(state: State, heap: Any, column: int, slot: int) -> int:
    """Fill a heap of (step, slot) keys anew from a column of steps, without those of ``slot``; return its size.

    Not from the keys that still hold: a slot that changed hands may have left the same key several times.
    """
    size = 0
    group = state.ints[STEP] >> GROUP_BITS
    for other in range(len(state.slots)):
        step = state.slots[other, column]
        if other != slot and step >= 0 and step >> GROUP_BITS == group:
            size = push_key(heap, size, step << SLOT_BITS | other)
    return size


@inlined
def push_window_event(cost: CostTable, limits: Limits, state: State, extra: Extra | None, slot: int, seen: int) -> None:
    """Note when a sequence that now sees ``seen`` keys stops growing, starts over, or leaves a published block; full windows that slide do no more."""
    ints = state.ints
    step = ints[STEP]
    if seen < cost.window:
        state.slots[slot, GROWING] = 1
        ints[N_GROWING] += 1
        state.slots[slot, EVENT_STEP] = step + cost.window - seen
    elif cost.window_chunked and cost.window > 1:
        state.slots[slot, GROWING] = 0
        state.slots[slot, EVENT_STEP] = step + 1
    else:
        state.slots[slot, GROWING] = 0
        state.slots[slot, EVENT_STEP] = next_published_step(limits, state, extra, slot)
        if state.slots[slot, EVENT_STEP] < 0:
            begin_giving(limits, state, slot)
            return
    if ints[N_EVENTS] == len(state.events):
        ints[N_EVENTS] = _rebuilt(state, state.events, EVENT_STEP, slot)
    ints[N_EVENTS] = push_key(state.events, ints[N_EVENTS], state.slots[slot, EVENT_STEP] << SLOT_BITS | slot)


@inlined
def pass_window_events(cost: CostTable, limits: Limits, state: State, extra: Extra | None) -> None:
    """Bring the windowed sums to the present step, and give back what windows leave at events: chunks of the context, and published blocks; stale events are dropped."""
    ints = state.ints
    while ints[N_EVENTS] > 0:
        key = state.events[0]
        slot = key & ((1 << SLOT_BITS) - 1)
        if state.slots[slot, EVENT_STEP] == key >> SLOT_BITS:
            if key >> SLOT_BITS > ints[STEP]:
                return
            ints[N_EVENTS] = pop_key(state.events, ints[N_EVENTS])
            if state.slots[slot, GROWING] == 1:  # the window is full
                ints[N_GROWING] -= 1
                push_window_event(cost, limits, state, extra, slot, cost.window)
            else:  # the next chunk of the context begins, or a published block is left
                if extra is not None and extra.cache.late:
                    catch_up(extra.cache, state.row, ints[STEP] - 1)
                done = state.slots[slot, COMPUTED] + ints[STEP] - state.slots[slot, JOINED]
                leave_behind(limits, state, extra, slot, done - 1, done, False)  # noqa: FBT003 - compiled code takes no keywords here
                seen = cost.window
                if cost.window_chunked and cost.window > 1:
                    ints[WINDOW_SUM] += 1 - cost.window
                    seen = 1
                push_window_event(cost, limits, state, extra, slot, seen)
        else:
            ints[N_EVENTS] = pop_key(state.events, ints[N_EVENTS])


@inlined
def settle(cost: CostTable, state: State, out: Outcome, extra: Extra | None, slot: int, step: int) -> None:
    """Charge a decoding sequence for the steps since it joined, or was last settled."""
    floats = state.floats
    if extra is not None and extra.spec.on:
        sequences, tariff = extra.spec.batch, extra.spec.tariff
        w, r0 = floats[SHARE_W] - state.sums[slot, SETTLED_W], floats[SHARE_R0] - state.sums[slot, SETTLED_R0]
        r1 = floats[SHARE_R1] - state.sums[slot, SETTLED_R1]
        pays, wasted = speculation.settle(
            sequences, tariff.levels, tariff.floats, tariff.v, slot, step, state.ints[STEP_ORIGIN], w, r0, r1
        )
        out.busy[state.row[slot]] += pays
        tariff.wasted[state.row[slot]] += wasted
        state.slots[slot, EMITTED] = speculation.emitted_of(sequences, slot)
        state.slots[slot, COMPUTED] = sequences.slots[slot, speculation.BASE] + state.slots[slot, EMITTED]
        state.slots[slot, JOINED] = step
        return
    if cost.window > 0:
        start = state.slots[slot, COMPUTED]
        keys = window_pairs(start + step - state.slots[slot, JOINED], cost.window, cost.window_chunked)
        keys -= window_pairs(start, cost.window, cost.window_chunked)
        out.busy[state.row[slot]] += cost.window_slope * keys
    first_keys = state.slots[slot, COMPUTED] + 1 - (state.slots[slot, JOINED] - state.ints[STEP_ORIGIN])
    out.busy[state.row[slot]] += (
        (floats[SHARE_W] - state.sums[slot, SETTLED_W])
        + first_keys * (floats[SHARE_R0] - state.sums[slot, SETTLED_R0])
        + (floats[SHARE_R1] - state.sums[slot, SETTLED_R1])
    )
    state.slots[slot, COMPUTED] += step - state.slots[slot, JOINED]
    state.slots[slot, EMITTED] += step - state.slots[slot, JOINED]
    state.slots[slot, JOINED] = step


@inlined
def mark_joined(state: State, slot: int, step: int) -> None:
    """Remember the running sums at which a sequence starts (or goes on) decoding."""
    state.slots[slot, JOINED] = step
    state.sums[slot, SETTLED_W] = state.floats[SHARE_W]
    state.sums[slot, SETTLED_R0] = state.floats[SHARE_R0]
    state.sums[slot, SETTLED_R1] = state.floats[SHARE_R1]


@compiled
def rebase_sums(cost: CostTable, state: State, out: Outcome, extra: Extra | None) -> None:
    """Charge everyone and restart the running sums at zero."""
    ints = state.ints
    step = ints[STEP]
    slot = ints[FIRST]
    while slot >= 0:
        if state.slots[slot, FINISH_STEP] >= 0:
            settle(cost, state, out, extra, slot, step)
            state.sums[slot, SETTLED_W] = 0.0
            state.sums[slot, SETTLED_R0] = 0.0
            state.sums[slot, SETTLED_R1] = 0.0
        slot = state.slots[slot, AFTER]
    state.floats[SHARE_W] = 0.0
    state.floats[SHARE_R0] = 0.0
    state.floats[SHARE_R1] = 0.0
    ints[STEP_ORIGIN] = step
    if extra is not None and extra.spec.on:
        extra.spec.tariff.v[:] = 0.0
        extra.spec.tariff.floats[: speculation.CHUNK_DRAFT] = 0.0


@inlined
def rate_of(spec: Spec, row: int) -> int:
    """Tokens per pass of a request at the level in force, in units of 2**-16 (P3)."""
    kind = spec.classes[row] if len(spec.classes) > 0 else 0
    return int(spec.rates[kind, spec.batch.ints[speculation.LEVEL]])


@compiled
def change_level(cost: CostTable, stream: Stream, out: Outcome, state: State, extra: Extra, level: int) -> None:
    """P1: charge every decoding sequence at the old level of speculation and let it go on at the new one."""
    ints, spec = state.ints, extra.spec
    step = ints[STEP]
    slot = ints[FIRST]
    while slot >= 0:
        if state.slots[slot, FINISH_STEP] >= 0:
            settle(cost, state, out, extra, slot, step)
            mark_joined(state, slot, step)
        slot = state.slots[slot, AFTER]
    spec.batch.ints[speculation.LEVEL] = level
    ints[HEAP_SIZE] = 0
    slot = ints[FIRST]
    while slot >= 0:
        if state.slots[slot, FINISH_STEP] >= 0:
            row = state.row[slot]
            speculation.change_rate(spec.batch, slot, step, rate_of(spec, row))
            state.slots[slot, FINISH_STEP] = step + speculation.passes_left(spec.batch, slot, stream.output[row])
            key = state.slots[slot, FINISH_STEP] << SLOT_BITS | slot
            ints[HEAP_SIZE] = push_key(state.heap, ints[HEAP_SIZE], key)
        slot = state.slots[slot, AFTER]


@inlined
def append_running(state: State, slot: int) -> None:
    """Put a request at the end of the running list."""
    ints = state.ints
    state.slots[slot, BEFORE] = ints[LAST]
    state.slots[slot, AFTER] = -1
    if ints[LAST] >= 0:
        state.slots[ints[LAST], AFTER] = slot
    else:
        ints[FIRST] = slot
    ints[LAST] = slot
    ints[N_RUNNING] += 1


@inlined
def unlink_running(state: State, slot: int) -> None:
    """Take a request out of the running list."""
    ints = state.ints
    before, after = state.slots[slot, BEFORE], state.slots[slot, AFTER]
    if before >= 0:
        state.slots[before, AFTER] = after
    else:
        ints[FIRST] = after
    if after >= 0:
        state.slots[after, BEFORE] = before
    else:
        ints[LAST] = before
    ints[N_RUNNING] -= 1


@inlined
def leave_batch(cost: CostTable, limits: Limits, state: State, out: Outcome, extra: Extra | None, slot: int) -> None:
    """Settle a decoding sequence and take it out of the batch's sums."""
    ints = state.ints
    step = ints[STEP]
    if extra is not None and extra.spec.on:
        settle(cost, state, out, extra, slot, step)
        speculation.leave(extra.spec.batch, slot)
        ints[BATCH] -= 1
        return
    if cost.window > 0:
        ints[WINDOW_SUM] -= cost.window
        if state.slots[slot, GROWING] == 1:
            ints[WINDOW_SUM] += state.slots[slot, EVENT_STEP] - step
            ints[N_GROWING] -= 1
        elif state.slots[slot, EVENT_STEP] < 0:
            end_giving(limits, state, slot)
        state.slots[slot, EVENT_STEP] = -1
    settle(cost, state, out, extra, slot, step)
    ints[BATCH] -= 1
    ints[KEYS_SUM] -= state.slots[slot, COMPUTED] + 1
    state.residues[residue(state.slots[slot, COMPUTED] - step, limits.block_size)] -= limits.groups


@inlined
def blocks_owned(limits: Limits, state: State, extra: Extra | None, slot: int, decoded: bool) -> int:
    """Blocks of a request, which looks ahead once it has decoded (P2)."""
    if extra is not None and extra.spec.on and decoded:
        return speculation.blocks_of(extra.spec.batch, slot)
    return int(blocks_owned_at(limits, state.slots[slot, COMPUTED], state.slots[slot, COMPUTED]))


@compiled_once
def blocks_left(limits: Limits, state: State, extra: Extra | None, slot: int, decoded: bool) -> int:
    """W2: blocks of each windowed group that a request's window has left, for its prefix cache; 0 without one."""
    if extra is None or limits.windowed == 0:
        return 0
    if extra.spec.on and decoded:
        return int(extra.spec.batch.slots[slot, speculation.PASSED])
    return blocks_passed(limits, state.slots[slot, COMPUTED])


@inlined
def publishing_moment(state: State, extra: Extra) -> int:
    """Moment of what a chunk publishes now; with speculation, which publishes nothing late, a count."""
    if extra.spec.on:
        extra.spec.batch.ints[speculation.MOMENT] += 1
        return int(extra.spec.batch.ints[speculation.MOMENT])
    return int(moment_of(extra.cache, state.ints[STEP], True))  # noqa: FBT003 - compiled code takes no keywords here


@inlined
def blocks_of_step(limits: Limits, state: State, extra: Extra | None) -> int:
    """Blocks that the decoding sequences need in this step."""
    step = state.ints[STEP]
    if extra is not None and extra.spec.on:
        return int(extra.spec.batch.ring[speculation.TAKES + 1, step & extra.spec.batch.mask])
    return int(state.residues[residue(-step, limits.block_size)])


@inlined
def blocks_needed(limits: Limits, state: State, extra: Extra | None, slot: int) -> int:
    """Blocks that a decoding sequence needs in this step."""
    step = state.ints[STEP]
    if extra is not None and extra.spec.on:
        slots = extra.spec.batch.slots
        return int(slots[slot, speculation.NEED]) if slots[slot, speculation.NEED_STEP] == step else 0
    begins = residue(state.slots[slot, COMPUTED] + step - state.slots[slot, JOINED], limits.block_size) == 0
    return int(limits.groups if begins else 0)


@inlined
def tokens_per_sequence(extra: Extra | None) -> int:
    """Tokens of one decoding sequence in a step, and its logit rows."""
    if extra is not None and extra.spec.on:
        level = extra.spec.batch.ints[speculation.LEVEL]
        return int(extra.spec.tariff.levels[level, speculation.QUERIES])
    return 1


@inlined
def start_decoding(
    cost: CostTable, limits: Limits, stream: Stream, state: State, extra: Extra | None, slot: int, rest: int
) -> None:
    """Let a request whose prompt is computed join the decoding batch, ``rest`` tokens from its end."""
    ints = state.ints
    step = ints[STEP]
    done = state.slots[slot, COMPUTED]
    mark_joined(state, slot, step)
    ints[BATCH] += 1
    if extra is not None and extra.spec.on:
        row = state.row[slot]
        speculation.mark(extra.spec.tariff.floats, extra.spec.tariff.v, slot)
        kept = extra.cache.slots[slot, PUBLISHED] if extra.cache.on else 0
        speculation.join(
            extra.spec.batch,
            slot,
            step,
            rate_of(extra.spec, row),
            stream.prompt[row],
            state.slots[slot, EMITTED],
            stream.output[row],
            kept,
        )
        rest = speculation.passes_left(extra.spec.batch, slot, stream.output[row])
    else:
        ints[KEYS_SUM] += done + 1
        if cost.window > 0:
            seen = done % cost.window + 1 if cost.window_chunked else min(done + 1, cost.window)
            ints[WINDOW_SUM] += seen
            push_window_event(cost, limits, state, extra, slot, seen)
        state.residues[residue(done - step, limits.block_size)] += limits.groups
        if extra is not None and extra.cache.late:
            watch(extra.cache, slot, state.row[slot], done, step)
    state.slots[slot, FINISH_STEP] = step + rest
    if ints[HEAP_SIZE] == len(state.heap):
        ints[HEAP_SIZE] = _rebuilt(state, state.heap, FINISH_STEP, slot)
    ints[HEAP_SIZE] = push_key(state.heap, ints[HEAP_SIZE], (step + rest) << SLOT_BITS | slot)


@inlined
def advance_decodes(cost: CostTable, state: State, extra: Extra | None, price: Price, q: float, k: int) -> None:
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
        share = speculation.fixed_share(extra.spec, cost.knots, knot, batch, per_token)
        since = ints[STEP] - ints[STEP_ORIGIN]
        speculation.count_passes(extra.spec, cost.knots, knot, batch, k, per_token, since)
    else:
        intercept = cost.value[knot] - cost.slope[knot] * cost.knots[knot]
        share = price.per_token + price.per_row + cost.seq + intercept / batch
        ints[DECODE_KEYS] += k * total_keys + batch * growth
        ints[KEYS_SUM] = total_keys + k * batch
        ints[WINDOW_DECODE_KEYS] += k * ints[WINDOW_SUM] + ints[N_GROWING] * growth
        ints[WINDOW_SUM] += k * ints[N_GROWING]
    floats[SHARE_W] += k * share
    floats[SHARE_R0] += k * price.slope
    floats[SHARE_R1] += price.slope * (k * (ints[STEP] - ints[STEP_ORIGIN]) + growth)
