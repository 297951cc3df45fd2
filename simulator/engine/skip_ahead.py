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

from simulator.engine.batch import (
    advance_decodes,
    blocks_of_step,
    pass_window_events,
    rebase_sums,
)
from simulator.engine.core import (
    BATCH,
    CLOCK,
    FREE_BLOCKS,
    IDLE,
    LAST_START,
    MAX_BLOCKS,
    MAX_RUNNING,
    MAX_WAITING,
    N_GROWING,
    N_RUNNING,
    NEXT_ROW,
    OWNED,
    RAN,
    REBASE_STEPS,
    SEGMENTS,
    STEP,
    STEP_ORIGIN,
    STEPS,
    STOP_ROW,
    CostTable,
    Limits,
    Outcome,
    State,
    Stream,
)
from simulator.engine.fcfs import (
    make_room,
    n_waiting,
    next_arrival_s,
    receive,
    release_next,
    schedule_chunks,
)
from simulator.engine.jit import entry
from simulator.engine.kv_blocks import peak_of_steps, release_of_step, steps_to_room
from simulator.engine.progressions import (
    end_of_steps,
    take_blocks,
)
from simulator.engine.segments import (
    count_latencies,
    end_chunks,
    end_decodes,
    price_step,
    record_segment,
    steps_alike,
    steps_until,
    widen_timeline,
)


@entry
def advance(
    cost: CostTable, limits: Limits, stream: Stream, out: Outcome, state: State, until: float, known: float
) -> bool:
    """Run until no step can start before ``until``; return whether everything is done.

    Whoever comes before ``known`` is known; who comes later is seated by another call, after those that will be sent in between.
    Rows of ``stream`` may be appended between calls, as long as none arrives before the clock of a step already
    scheduled. A closed loop, which takes rows when it wants them, also stops before the next step once it has taken
    row ``STOP_ROW`` − 1.
    """
    ints, floats = state.ints, state.floats
    bs = limits.block_size
    while True:
        t = floats[CLOCK]
        if t >= known:
            return False
        receive(stream, limits, out, state, before_now=False)
        next_arrival = next_arrival_s(stream, state)
        if ints[N_RUNNING] == 0 and n_waiting(state) == 0:
            if next_arrival == math.inf:
                return True
            if next_arrival >= until:
                return False
            widen_timeline(state.timeline, floats, next_arrival)
            floats[IDLE] += next_arrival - t
            floats[CLOCK] = next_arrival
            continue
        if t >= until or ints[NEXT_ROW] >= ints[STOP_ROW]:
            return False
        if ints[STEP] - ints[STEP_ORIGIN] >= REBASE_STEPS:
            rebase_sums(cost, state, out, None)

        # --- what runs: R5, R7 ---
        step = ints[STEP]
        need = blocks_of_step(limits, state, None)
        short = need > ints[FREE_BLOCKS]
        if short:
            make_room(cost, limits, out, state)
        batch = ints[BATCH]
        free = ints[FREE_BLOCKS] - (0 if short else need)
        chunks = schedule_chunks(cost, limits, stream, out, state, free, short)
        waiting = n_waiting(state)
        running = ints[N_RUNNING]
        ints[RAN] = running
        ints[MAX_WAITING] = max(ints[MAX_WAITING], waiting)
        ints[MAX_RUNNING] = max(ints[MAX_RUNNING], running)

        # --- what it costs, and for how many steps: R9 ---
        price = price_step(cost, stream, state, None, chunks.n, chunks.tokens, cost.dense[chunks.tokens])
        k = 1
        q = 0.0
        if chunks.n > 0:
            ints[FREE_BLOCKS] = chunks.free
            end = t + price.d0
            owned = limits.num_blocks - chunks.free
            blocks_integral = owned * (end - t)
        else:
            q = price.slope * batch + cost.window_slope * ints[N_GROWING]
            if not chunks.preempted:
                stop = until
                if waiting == 0 and running < limits.max_num_seqs:
                    stop = min(stop, next_arrival)
                k = steps_until(state, price.d0, q, stop, steps_alike(cost, limits, state, None))
                if limits.windowed > 0 and chunks.wanted > 0:
                    k = min(k, steps_to_room(limits, state, chunks.wanted, False))  # noqa: FBT003 - compiled code takes no keywords here
            end = end_of_steps(t, price.d0, q, k)
            owned = limits.num_blocks - ints[FREE_BLOCKS]
            blocks_integral = owned * (end - t)
            if not short:
                gives = limits.windowed > 0
                owned, blocks_integral = take_blocks(state.residues, bs, gives, step, k, owned, price.d0, q)
                ints[FREE_BLOCKS] = limits.num_blocks - owned
                if gives:
                    owned = peak_of_steps(limits, state, k)
        ints[MAX_BLOCKS] = max(ints[MAX_BLOCKS], owned)
        if chunks.n > 0 or short:
            release_of_step(limits, state, None)

        # --- let it happen: R10 to R15 ---
        floats[CLOCK] = end
        floats[LAST_START] = end_of_steps(t, price.d0, q, k - 1)
        ints[STEPS] += k
        ints[SEGMENTS] += 1
        out.steps_by_tokens[chunks.tokens] += k
        out.steps_by_rows[price.rows] += k
        record_segment(state, t, end, running, waiting, blocks_integral, end - t)
        if batch > 0:
            advance_decodes(cost, state, None, price, q, k)
            count_latencies(out, state, batch, price.d0, q, k)
        ints[STEP] = step + k
        if cost.window > 0:
            pass_window_events(cost, limits, state, None)
        n_done = 0
        ints[OWNED] = limits.num_blocks - ints[FREE_BLOCKS]
        if chunks.n > 0:
            n_done += end_chunks(cost, limits, stream, out, state, None, None, chunks.n, price)
        n_done += end_decodes(cost, limits, stream, out, state, None, None)
        if stream.concurrency > 0 and n_done > 0 and end <= known:
            receive(stream, limits, out, state, before_now=True)
            for _ in range(n_done):
                release_next(stream, state, end)
