"""What a step is made of in the compiled engine, whatever the policy, the batching mode and the features: rules R5 to R8 with Q, B, C, E, F and P.

``docs/engine-mixtures.md`` says what holds where they meet. State.ints[STEP] counts the steps of the decoding batch: where decoding sequences sit a
step out (B3), it stands still, and so does all that is kept by step.
"""

import math
from typing import NamedTuple

from simulator.engine import speculation
from simulator.engine.batch import (
    append_running,
    blocks_left,
    blocks_needed,
    blocks_of_step,
    blocks_owned,
    change_level,
    chunk_keys,
    chunk_pairs,
    leave_batch,
    publishing_moment,
    tokens_per_sequence,
    unlink_running,
)
from simulator.engine.block_runs import take
from simulator.engine.clients import free_slot
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
    FINISH_STEP,
    FIRST,
    FREE_BLOCKS,
    FREE_SLOT,
    INTERVAL,
    LAST,
    LAST_TOKEN,
    N_ADMITTED,
    N_FREE_SLOTS,
    N_LOADING,
    N_RUNNING,
    PREEMPTIONS,
    SEEN,
    STEP,
    T_PREEMPTIONS,
    CostTable,
    Extra,
    Limits,
    Outcome,
    State,
    Stream,
)
from simulator.engine.jit import compiled, inlined
from simulator.engine.kv_blocks import blocks_at_most, blocks_beyond, blocks_owned_at, blocks_to_take
from simulator.engine.prefix_cache import admit, give_back, look_up, publish, publish_rest
from simulator.engine.progressions import blocks_for
from simulator.engine.queues import (
    ALL,
    BASE,
    CHUNK,
    CHUNK_TOKENS,
    GONE_SLOT,
    GRANTED,
    HAS_BLOCK,
    HELD,
    IS_OPEN,
    KEPT_EMITTED,
    KEPT_LAST_TOKEN,
    KEPT_SEEN,
    N_GONE,
    N_PARTIALS,
    N_QUEUED,
    NOBODY,
    PARTIAL_SLOT,
    PUT_BACK_AT,
    RANK,
    RESERVED,
    SLOT,
    SOME,
    STALL_START,
    STALLED,
    TENANT,
    TRIES,
    Queue,
    count_prompt,
    drop_partial,
    first_queued,
    is_after,
    join_again,
    stop_counting,
    take_first,
)
from simulator.engine.records import RUNNING, WAITING
from simulator.engine.scheduling import CHUNKED, FAIR, FCFS, PREFILL_FIRST, STATIC
from simulator.engine.segments import reserved_blocks
from simulator.engine.swap import copy_in, copy_out
from simulator.engine.tiers import BLOCKED, find_run, start_load


class Scheduled(NamedTuple):
    """What a step is made of: the decoding batch, and the chunks in ``State.chunks``.

    ``need`` blocks of the decoding sequences are taken, though not yet from the free ones, which a segment does step by step; only where it is a segment.
    ``unsure``: the first of the queue could not be admitted, but decoding may publish a block that it can share. ``wanted``: as of
    :class:`~simulator.engine.core.Chunks`.
    """

    n: int
    tokens: int
    need: int
    preempted: bool
    unsure: bool
    wanted: int


@inlined
def _victim(state: State, queue: Queue) -> int:
    """Q2: who is preempted when blocks are short; somebody must run."""
    slot = state.ints[LAST]
    if FCFS < queue.rules.policy < FAIR:
        other = state.slots[slot, BEFORE]
        while other >= 0:
            if is_after(queue, state.row[other], state.row[slot]):
                slot = other
            other = state.slots[other, BEFORE]
    return int(slot)


@compiled
def preempt(
    cost: CostTable, limits: Limits, out: Outcome, state: State, queue: Queue, extra: Extra | None, slot: int
) -> None:
    """R6, Q2, M4: free all blocks, those of this step included, forget the cache, and wait again."""
    ints = state.ints
    row = state.row[slot]
    if state.slots[slot, FINISH_STEP] < 0:
        ahead = queue.slots[slot, CHUNK]
        queue.slots[slot, CHUNK] = 0
        queue.ints[CHUNK_TOKENS] -= ahead
        drop_partial(queue, slot)
        owned = blocks_owned_at(limits, state.slots[slot, COMPUTED], state.slots[slot, COMPUTED] + ahead)
        passed = blocks_left(limits, state, extra, slot, False)  # noqa: FBT003 - compiled code takes no keywords here
    else:
        last_token = state.floats[CLOCK]
        if queue.ints[STALLED] == 1:
            last_token = max(queue.floats[STALL_START], state.sums[slot, LAST_TOKEN])
        state.sums[slot, LAST_TOKEN] = last_token
        granted = queue.ints[GRANTED]
        ahead = 1 if granted == ALL or (granted == SOME and queue.slots[slot, HAS_BLOCK] == 1) else 0
        if extra is not None and extra.spec.on and granted == ALL:
            ahead = blocks_needed(limits, state, extra, slot)
        stop_counting(queue, row, ints[STEP])
        leave_batch(cost, limits, state, out, extra, slot)
        state.slots[slot, FINISH_STEP] = -1
        owned = blocks_owned_at(limits, state.slots[slot, COMPUTED], state.slots[slot, COMPUTED] + ahead)
        passed = blocks_left(limits, state, extra, slot, True)  # noqa: FBT003
        if extra is not None and extra.spec.on:
            owned = blocks_owned(limits, state, extra, slot, True)  # noqa: FBT003 - compiled code takes no keywords here
            if granted == ALL:
                owned += ahead
            extra.spec.fraction[row] = speculation.fraction_of(extra.spec.batch, slot)
            if extra.cache.on and not extra.cache.radix:  # P6
                full = state.slots[slot, COMPUTED] // limits.block_size
                publish_rest(extra.cache, slot, row, full, passed, publishing_moment(state, extra))
    computed = state.slots[slot, COMPUTED]
    if extra is not None and extra.swap.on:
        copy_out(extra.swap, row, computed, blocks_owned_at(limits, computed, computed))
    if extra is not None and extra.cache.on:
        owned = give_back(extra.cache, slot, row, owned, passed, ints[STEP])
    ints[FREE_BLOCKS] += owned
    unlink_running(state, slot)
    free_slot(state, slot)
    ints[PREEMPTIONS] += 1
    state.timeline[T_PREEMPTIONS, int(state.floats[CLOCK] / state.floats[INTERVAL])] += 1.0
    out.preemptions[row] += 1
    out.status[row] = WAITING
    queue.row_ints[row, KEPT_EMITTED] = state.slots[slot, EMITTED]
    queue.row_ints[row, KEPT_SEEN] = max(state.slots[slot, SEEN], computed)
    queue.row_floats[row, KEPT_LAST_TOKEN] = state.sums[slot, LAST_TOKEN]
    join_again(queue, out.status, row)


@compiled
def _waits(out: Outcome, state: State, queue: Queue, slot: int) -> bool:
    """S3: whether others run, all of them in flight, whom Q2 would choose before a request that must preempt itself."""
    others = 0
    for other in range(len(state.row)):
        row = state.row[other]
        if other == slot or out.status[row] != RUNNING or queue.row_ints[row, SLOT] != other:
            continue
        others += 1
        if FCFS < queue.rules.policy < FAIR:
            before = is_after(queue, state.row[slot], row)
        else:
            before = state.slots[other, ADMITTED] < state.slots[slot, ADMITTED]
        if before:
            return False
    return others > 0


@compiled
def _make_room(
    cost: CostTable, limits: Limits, out: Outcome, state: State, queue: Queue, extra: Extra | None
) -> tuple[bool, bool]:
    """R5, Q2 where blocks are short: decoding sequences take theirs in order of admission and preempt others.

    Return whether somebody was preempted, and whether one waits (S3): then it is all that the list has left.
    """
    ints = state.ints
    preempted = False
    slot = ints[FIRST]
    while slot >= 0:
        queue.slots[slot, HAS_BLOCK] = 0
        slot = state.slots[slot, AFTER]
    queue.ints[GRANTED] = SOME
    slot = ints[FIRST]
    while slot >= 0:
        after = state.slots[slot, AFTER]
        need = blocks_needed(limits, state, extra, slot) if state.slots[slot, FINISH_STEP] >= 0 else 0
        if need > 0:
            gone = False
            while ints[FREE_BLOCKS] < need and not gone:
                victim = _victim(state, queue)
                if victim == slot and _waits(out, state, queue, slot):
                    return preempted, True
                preempt(cost, limits, out, state, queue, extra, victim)
                preempted = True
                gone = victim == slot
            after = state.slots[slot, AFTER]
            if not gone:
                ints[FREE_BLOCKS] -= need
                queue.slots[slot, HAS_BLOCK] = 1
                if extra is not None:
                    if extra.cache.on:
                        take(extra.cache, need)
                    if extra.spec.on:
                        speculation.take_own_blocks(extra.spec.batch, slot, ints[STEP])
        slot = after
    return preempted, False


@inlined
def _known(stream: Stream, state: State, slot: int) -> int:
    """Tokens known of a running request."""
    return int(stream.prompt[state.row[slot]] + state.slots[slot, EMITTED])


@compiled
def _place_after(state: State, queue: Queue, slot: int) -> int:
    """How many of those in prefill were admitted no later than a request, which may have just left them."""
    place = 0
    while (
        place < queue.ints[N_PARTIALS]
        and state.slots[queue.slots[place, PARTIAL_SLOT], ADMITTED] <= state.slots[slot, ADMITTED]
    ):
        place += 1
    return place


@compiled
def _continue_prompts(
    cost: CostTable, limits: Limits, stream: Stream, out: Outcome, state: State, queue: Queue, extra: Extra | None
) -> tuple[bool, bool]:
    """R5, B1, B5: give tokens to those in prefill, in order of admission; return whether somebody was preempted, and whether somebody waits (S3, M22)."""
    ints = state.ints
    preempted = False
    waits = False
    i = 0
    while i < queue.ints[N_PARTIALS]:
        left = limits.budget - ints[BATCH] * tokens_per_sequence(extra) - queue.ints[CHUNK_TOKENS]
        if left <= 0:
            break
        slot = queue.slots[i, PARTIAL_SLOT]
        i += 1
        if queue.slots[slot, CHUNK] > 0:
            continue
        done = state.slots[slot, COMPUTED]
        want = min(_known(stream, state, slot) - done, left, queue.rules.longest_chunk)
        missing = blocks_to_take(limits, done, done + want)
        if missing > ints[FREE_BLOCKS] and queue.slots[slot, HELD] > 0:
            waits = True
            continue
        gone = False
        while missing > ints[FREE_BLOCKS] and not gone:
            victim = _victim(state, queue)
            if victim == slot and _waits(out, state, queue, slot):
                return preempted, True
            preempt(cost, limits, out, state, queue, extra, victim)
            preempted = True
            gone = victim == slot
            i = _place_after(state, queue, slot)
        if not gone:
            ints[FREE_BLOCKS] -= missing
            if extra is not None and extra.cache.on:
                take(extra.cache, missing)
            queue.slots[slot, CHUNK] = want
            queue.ints[CHUNK_TOKENS] += want
    return preempted, waits


@compiled
def _publish_chunks(limits: Limits, state: State, queue: Queue, extra: Extra) -> None:
    """C3, M7: let the blocks be found that the chunks scheduled so far will fill."""
    for i in range(queue.ints[N_PARTIALS]):
        slot = queue.slots[i, PARTIAL_SLOT]
        if queue.slots[slot, CHUNK] > 0:
            full = (state.slots[slot, COMPUTED] + queue.slots[slot, CHUNK]) // limits.block_size
            publish(extra.cache, slot, state.row[slot], full, publishing_moment(state, extra))


@compiled
def _n_unfinished(stream: Stream, state: State, queue: Queue) -> int:
    """B6: running requests whose prompt will not be complete after this step."""
    n = 0
    for i in range(queue.ints[N_PARTIALS]):
        slot = queue.slots[i, PARTIAL_SLOT]
        if state.slots[slot, COMPUTED] + queue.slots[slot, CHUNK] < _known(stream, state, slot):
            n += 1
    for i in range(queue.ints[N_GONE]):  # of a pipeline, those whose chunks are in flight run on (M21)
        slot = queue.slots[i, GONE_SLOT]
        if state.slots[slot, FINISH_STEP] < 0 and state.slots[slot, COMPUTED] < _known(stream, state, slot):
            n += 1
    return n


@inlined
def blocks_wanted(
    limits: Limits,
    state: State,
    queue: Queue,
    done: int,
    tokens: int,
    known: int,
    held: int,
) -> int:
    """R7, B7, C6: blocks that must be free to take the first of the queue from ``done`` tokens to ``tokens``, ``held`` of which others own."""
    margin = queue.rules.margin if state.ints[N_RUNNING] > 0 else 0
    wanted = blocks_at_most(limits, done, known) if limits.reserve_full else blocks_owned_at(limits, done, tokens)
    return int(wanted - held + margin)


@compiled
def _goes_loading(
    cost: CostTable, limits: Limits, stream: Stream, state: State, extra: Extra, row: int, hits: int
) -> bool:
    """F3 to F6: ask the tiers for what follows the ``hits`` of the first in the queue; return whether it leaves to load it."""
    cache, loads, ints, bs = extra.cache, extra.loads, state.ints, limits.block_size
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
    return True


@inlined
def published_to(state: State, queue: Queue) -> int:
    """C4, M7: the last step whose decoding has filled its blocks when R7 looks."""
    later = queue.rules.preempt_lower or queue.rules.batching >= PREFILL_FIRST
    return int(state.ints[STEP] - int(later))


@inlined
def _admit_first(
    limits: Limits,
    stream: Stream,
    out: Outcome,
    state: State,
    queue: Queue,
    extra: Extra | None,
    row: int,
    done: int,
    want: int,
) -> int:
    """R7: the first of the queue runs, from ``done`` tokens on, with a chunk of ``want``; return its slot."""
    ints, rules = state.ints, queue.rules
    is_new = math.isnan(out.scheduled[row])
    take_first(queue, row)
    count_prompt(queue, row, stream.prompt[row] - done if is_new else 0)
    if is_new:
        out.scheduled[row] = state.floats[CLOCK]
    ints[N_FREE_SLOTS] -= 1
    slot = state.slots[ints[N_FREE_SLOTS], FREE_SLOT]
    queue.row_ints[row, SLOT] = slot
    state.row[slot] = row
    state.slots[slot, EMITTED] = queue.row_ints[row, KEPT_EMITTED]
    state.slots[slot, SEEN] = queue.row_ints[row, KEPT_SEEN]
    state.sums[slot, LAST_TOKEN] = queue.row_floats[row, KEPT_LAST_TOKEN]
    state.slots[slot, COMPUTED] = done
    out.status[row] = RUNNING
    state.slots[slot, ADMITTED] = ints[N_ADMITTED]
    ints[N_ADMITTED] += 1
    append_running(state, slot)
    ints[FREE_BLOCKS] -= blocks_owned_at(limits, done, done + want)
    if rules.batching == STATIC:
        queue.ints[RESERVED] += reserved_blocks(limits, stream, row)
    queue.slots[queue.ints[N_PARTIALS], PARTIAL_SLOT] = slot
    queue.ints[N_PARTIALS] += 1
    queue.slots[slot, CHUNK] = want
    queue.ints[CHUNK_TOKENS] += want
    if extra is not None and extra.spec.on:
        speculation.start_at(extra.spec.batch, slot, extra.spec.fraction[row])
    return int(slot)


@inlined
def admit_waiting(
    cost: CostTable, limits: Limits, stream: Stream, out: Outcome, state: State, queue: Queue, extra: Extra | None
) -> tuple[bool, bool, int]:
    """R7, Q3, B2, B6, M3: take requests from the queue; return whether somebody was preempted, Scheduled.unsure and Scheduled.wanted."""
    ints, rules, bs = state.ints, queue.rules, limits.block_size
    preempted = False
    unsure = False
    wanted = 0
    while queue.ints[N_QUEUED] > 0:
        left = limits.budget - queue.ints[CHUNK_TOKENS]
        if queue.ints[GRANTED] == ALL:
            left -= ints[BATCH] * tokens_per_sequence(extra)
        if left <= 0:
            break
        row = first_queued(queue, out.status, ints[STEP])
        if preempted and queue.row_ints[row, PUT_BACK_AT] == queue.ints[TRIES]:
            break
        seat = ints[N_RUNNING] < limits.max_num_seqs
        known = stream.prompt[row] + queue.row_ints[row, KEPT_EMITTED]
        start = stream.cached[row]
        hits = 0
        held = 0
        loaded = 0
        saved = 0
        may_ask = False
        if extra is not None:
            if extra.swap.on:
                saved = extra.swap.saved[row]
            if extra.cache.on:
                least = max(start, saved)
                hits, held = look_up(extra.cache, state.row, row, (known - 1) // bs, published_to(state, queue), least)
                start = max(start, hits * bs)
            if extra.loads.on:
                may_ask = seat and extra.loads.loaded[row] == 0
                if may_ask and _goes_loading(cost, limits, stream, state, extra, row, hits):
                    take_first(queue, row)
                    continue
                loaded = max(extra.loads.loaded[row], 0)
                start = max(start, loaded)
        done = max(start, saved)
        rest = known - done
        want = min(rest, left, rules.longest_chunk)
        cut = want < rest and (
            rules.batching != CHUNKED or 0 < rules.max_partials <= _n_unfinished(stream, state, queue)
        )
        blocks = blocks_wanted(limits, state, queue, done, done + want, known, held)
        has_blocks = blocks <= ints[FREE_BLOCKS]
        if rules.batching == STATIC:  # B4
            has_blocks = queue.ints[RESERVED] + reserved_blocks(limits, stream, row) <= limits.num_blocks
        if cut or not seat or not has_blocks:
            if not cut and rules.preempt_lower and ints[LAST] >= 0:
                victim = _victim(state, queue)
                if queue.row_floats[state.row[victim], RANK] > queue.row_floats[row, RANK]:
                    preempt(cost, limits, out, state, queue, extra, victim)
                    preempted = True
                    continue
            if not cut and seat and rules.batching != STATIC:
                wanted = blocks
            if extra is not None:
                unsure = extra.cache.late and seat
                extra.loads.ints[BLOCKED] = int(may_ask and extra.loads.loaded[row] == 0)
            break
        slot = _admit_first(limits, stream, out, state, queue, extra, row, done, want)
        if extra is not None:
            if extra.cache.on:
                need = blocks_owned_at(limits, done, done + want)
                passed = blocks_left(limits, state, extra, slot, False)  # noqa: FBT003 - compiled code takes no keywords here
                found = blocks_beyond(limits, 0, passed, hits)
                ints[FREE_BLOCKS] += found - admit(
                    extra.cache, slot, row, hits, passed, loaded, known, start, state.slots[slot, SEEN]
                )
                take(extra.cache, need - found)
                if not extra.cache.radix and not rules.preempt_lower:
                    publish(extra.cache, slot, row, (done + want) // bs, publishing_moment(state, extra))
            if extra.loads.on:
                extra.loads.loaded[row] = -1
            if saved > 0:
                passed = blocks_left(limits, state, extra, slot, False)  # noqa: FBT003
                missing = blocks_beyond(limits, hits, passed, blocks_for(saved, bs))
                copy_in(extra.swap, row, blocks_owned_at(limits, saved, saved), missing)
    return preempted, unsure, wanted


@inlined
def collect_chunks(stream: Stream, state: State, queue: Queue) -> int:
    """Write the chunks of the step down; keep those in prefill who will still be after it. Return the number of chunks."""
    chunks = 0
    kept = 0
    for i in range(queue.ints[N_PARTIALS]):
        slot = queue.slots[i, PARTIAL_SLOT]
        size = queue.slots[slot, CHUNK]
        if size > 0:
            state.chunks[chunks, CHUNK_SLOT] = slot
            state.chunks[chunks, CHUNK_SIZE] = size
            state.chunks[chunks, CHUNK_START] = state.slots[slot, COMPUTED]
            chunks += 1
            queue.slots[slot, CHUNK] = 0
        if state.slots[slot, COMPUTED] + size < _known(stream, state, slot):
            queue.slots[kept, PARTIAL_SLOT] = slot
            kept += 1
        elif queue.rules.policy == FAIR:
            queue.tenants[queue.row_ints[state.row[slot], TENANT], BASE] += queue.rules.output_weight
    queue.ints[N_PARTIALS] = kept
    return chunks


@inlined
def _serve_decodes(
    cost: CostTable, limits: Limits, stream: Stream, out: Outcome, state: State, queue: Queue, extra: Extra | None
) -> tuple[int, bool, bool]:
    """R5, P1: the decoding sequences take the blocks of this step.

    Return how many they were, 0 if they were short and each took its own; whether somebody was preempted; and whether who is left waits (S3).
    """
    ints = state.ints
    preempted = False
    waits = False
    if extra is not None and extra.spec.on:
        level = extra.spec.level_by_batch[ints[BATCH]]
        if ints[BATCH] > 0 and level != extra.spec.batch.ints[speculation.LEVEL]:
            change_level(cost, stream, out, state, extra, level)
    need = blocks_of_step(limits, state, extra)
    if need > ints[FREE_BLOCKS]:
        preempted, waits = _make_room(cost, limits, out, state, queue, extra)
        need = 0
    else:
        ints[FREE_BLOCKS] -= need
        if extra is not None and extra.cache.on:
            take(extra.cache, need)
    queue.ints[GRANTED] = NOBODY if waits else ALL
    return int(need), preempted, waits


@inlined
def schedule(
    cost: CostTable, limits: Limits, stream: Stream, out: Outcome, state: State, queue: Queue, extra: Extra | None
) -> Scheduled:
    """R5 to R8, B1 to B4, M3: the tokens of a step; none if all who wait have gone to load and nobody runs."""
    ints, batching = state.ints, queue.rules.batching
    queue.ints[CHUNK_TOKENS] = 0
    queue.ints[GRANTED] = NOBODY
    queue.ints[TRIES] += 1
    prompts_first = batching >= PREFILL_FIRST
    preempted = False
    unsure = False
    wanted = 0
    admits = True
    waits = False
    need = 0
    if extra is not None:
        extra.loads.ints[BLOCKED] = 0
    if prompts_first:
        if ints[N_RUNNING] == 0:
            queue.ints[IS_OPEN] = 1
        admits = batching == PREFILL_FIRST or queue.ints[IS_OPEN] == 1
    else:
        need, preempted, waits = _serve_decodes(cost, limits, stream, out, state, queue, extra)
        if queue.ints[N_PARTIALS] > 0 and not waits:
            lost, waits = _continue_prompts(cost, limits, stream, out, state, queue, extra)
            preempted = preempted or lost
            if extra is not None and extra.cache.on and not extra.cache.radix and not queue.rules.preempt_lower:
                _publish_chunks(limits, state, queue, extra)
        admits = not preempted and not waits
    if admits and queue.ints[N_QUEUED] > 0:
        preempted, unsure, wanted = admit_waiting(cost, limits, stream, out, state, queue, extra)
    if extra is not None and extra.cache.on and not extra.cache.radix and queue.rules.preempt_lower:
        _publish_chunks(limits, state, queue, extra)
    if prompts_first:
        if queue.ints[CHUNK_TOKENS] == 0:
            queue.ints[IS_OPEN] = 0
            need, lost, waits = _serve_decodes(cost, limits, stream, out, state, queue, extra)
            preempted = preempted or lost
        elif queue.ints[STALLED] == 0:
            queue.ints[STALLED] = 1
            queue.floats[STALL_START] = state.floats[CLOCK]
    tokens = queue.ints[CHUNK_TOKENS]
    if queue.ints[GRANTED] == ALL:
        tokens += ints[BATCH] * tokens_per_sequence(extra)
    chunks = collect_chunks(stream, state, queue)
    if chunks == 0 and not preempted:
        ints[FREE_BLOCKS] += need  # the segment takes them, step by step
    elif extra is not None and extra.spec.on and queue.ints[GRANTED] == ALL:
        speculation.take_blocks_of_step(extra.spec.batch, ints[STEP])
    return Scheduled(chunks, tokens, need, preempted, unsure, wanted)
