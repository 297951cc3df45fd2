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

from simulator.engine import speculation
from simulator.engine.batch import (
    advance_decodes,
    blocks_of_step,
    change_level,
    pass_window_events,
    publishing_moment,
    rebase_sums,
)
from simulator.engine.core import (
    BATCH,
    CLOCK,
    FREE_BLOCKS,
    IDLE,
    INTERVAL,
    KNOT,
    LAST_START,
    MAX_BLOCKS,
    MAX_RUNNING,
    MAX_WAITING,
    N_GROWING,
    N_LOADING,
    N_RUNNING,
    NEXT_ROW,
    REBASE_STEPS,
    SEGMENTS,
    STEP,
    STEP_ORIGIN,
    STEPS,
    STOP_ROW,
    T_WAITING,
    WAITING_INTEGRAL,
    CostTable,
    Extra,
    Limits,
    Outcome,
    State,
    Stream,
)
from simulator.engine.fcfs import (
    end_loads,
    make_room,
    n_waiting,
    next_arrival_s,
    receive,
    release_next,
    schedule_chunks,
)
from simulator.engine.jit import compiled
from simulator.engine.prefix_cache import (
    N_ENDED,
    release_ended,
    steps_to_fill,
    take,
)
from simulator.engine.progressions import (
    end_of_steps,
    spread,
    take_blocks,
)
from simulator.engine.segments import (
    count_latencies,
    end_chunks,
    end_decodes,
    lengthen,
    price_step,
    record_segment,
    steps_alike,
    steps_until,
    widen_timeline,
)
from simulator.engine.swap import N_MOVED, charge_copies
from simulator.engine.tiers import BLOCKED, next_ready


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
        receive(stream, limits, out, state, before_now=False)
        t = floats[CLOCK]
        next_arrival = next_arrival_s(stream, state)
        stop = until
        wakes = next_arrival
        if extra is not None and extra.loads.on:
            end_loads(state, extra.loads)
            stop = min(stop, next_ready(extra.loads, ints[N_LOADING]))
            wakes = min(wakes, next_ready(extra.loads, ints[N_LOADING]))
        if ints[N_RUNNING] == 0 and n_waiting(state) == 0:
            if wakes == math.inf:
                return True
            if wakes >= until:
                return False
            widen_timeline(state.timeline, floats, wakes)
            if extra is not None and ints[N_LOADING] > 0:
                floats[WAITING_INTEGRAL] += ints[N_LOADING] * (wakes - t)
                spread(state.timeline, T_WAITING, floats[INTERVAL], t, wakes, float(ints[N_LOADING]))
            floats[IDLE] += wakes - t
            floats[CLOCK] = wakes
            continue
        if t >= until or ints[NEXT_ROW] >= ints[STOP_ROW]:
            return False
        if cost.window > 0:
            pass_window_events(cost, state)
        if extra is not None and extra.spec.on:
            if cost.window > 0:
                speculation.pass_window_events(
                    extra.spec.batch, extra.spec.tariff.levels, ints[STEP], out.busy, state.row
                )
            level = extra.spec.level_by_batch[ints[BATCH]]
            if ints[BATCH] > 0 and level != extra.spec.batch.ints[speculation.LEVEL]:
                change_level(cost, stream, out, state, extra, level)
        if ints[STEP] - ints[STEP_ORIGIN] >= REBASE_STEPS:
            rebase_sums(cost, state, out, extra)

        # --- what runs: R5, R7 ---
        step = ints[STEP]
        step_need = blocks_of_step(state, extra, bs)
        short = step_need > ints[FREE_BLOCKS]
        if short:
            make_room(cost, limits, out, state, extra)
        elif extra is not None and extra.cache.on:
            take(extra.cache, step_need)
        batch = ints[BATCH]
        free = ints[FREE_BLOCKS] - (0 if short else step_need)
        chunks = schedule_chunks(cost, limits, stream, out, state, extra, free, short, in_flight=False)
        if extra is not None and chunks.tokens == 0:  # all who waited load
            continue
        waiting = n_waiting(state) + ints[N_LOADING]
        running = ints[N_RUNNING]
        ints[MAX_WAITING] = max(ints[MAX_WAITING], waiting)
        ints[MAX_RUNNING] = max(ints[MAX_RUNNING], running)

        # --- what it costs, and for how many steps: R9 ---
        price = price_step(cost, stream, state, extra, chunks.n, chunks.tokens, cost.dense[chunks.tokens])
        if extra is not None and extra.swap.on and extra.swap.ints[N_MOVED] > 0:
            price = lengthen(price, charge_copies(extra.swap, state.row, out.busy, price.d0))
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
                if n_waiting(state) == 0 and running < limits.max_num_seqs:
                    stop = min(stop, next_arrival)
                k = steps_until(state, price.d0, q, stop, steps_alike(cost, limits, state, extra))
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
        record_segment(state, t, end, running, waiting, blocks_integral, end - t)
        if batch > 0:
            advance_decodes(cost, state, extra, price, q, k)
            count_latencies(out, state, batch, price.d0, q, k)
        ints[STEP] = step + k
        n_done = 0
        if chunks.n > 0:
            n_done += end_chunks(cost, stream, out, state, extra, chunks.n, price, bs)
        n_done += end_decodes(cost, stream, out, state, extra, bs)
        if extra is not None and extra.cache.ints[N_ENDED] > 0:
            ints[FREE_BLOCKS] += release_ended(extra.cache, state.row, publishing_moment(state, extra))
        if stream.concurrency > 0 and n_done > 0:
            receive(stream, limits, out, state, before_now=True)
            for _ in range(n_done):
                release_next(stream, state, end)
