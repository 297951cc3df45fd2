"""Rounds of a pipeline: micro-batches that only decode complete and set off again, again and again, without the scheduler.

As long as nobody comes, goes, begins or ends, a try to schedule finds just the group that has completed, and what it costs is known: its keys
grow by its batch, its blocks fall due by its residues. What a round leaves of the time goes through the stages pass by pass, since micro-batches
wait for each other there; what it leaves in sums is an arithmetic progression and is added up when something changes (as a segment of a plain replica).
Neither changes a time: rules S1 to S5 and R5 give the same instants.
"""

import math

from simulator.engine.batch import advance_decodes
from simulator.engine.core import (
    BATCH,
    CLOCK,
    FREE_BLOCKS,
    KEYS_SUM,
    N_GROWING,
    N_RUNNING,
    SEGMENTS,
    SHARE_W,
    STEP,
    STEPS,
    WINDOW_SUM,
    CostTable,
    Limits,
    Outcome,
    State,
    Stream,
)
from simulator.engine.flight import ALIKE, PASSED, Flight, StageTable, count_decodes, enter_stages, note_peaks
from simulator.engine.jit import compiled, inlined
from simulator.engine.parts import HOST_SHARE, load_price, part_of, store_price
from simulator.engine.progressions import residue
from simulator.engine.queues import KEPT_EMITTED, N_GONE, N_PARTIALS, N_QUEUED, Queue, first_queued
from simulator.engine.scheduler import blocks_wanted
from simulator.engine.scheduling import CHUNKED, FAIR, PREFILL_FIRST
from simulator.engine.segments import count_latencies, price_step, record_segment, steps_in_piece, steps_to_finish


@compiled
def _nobody_is_admitted(
    limits: Limits, stream: Stream, out: Outcome, shared: State, states: State, flight: Flight, queue: Queue
) -> bool:
    """R7: whether nobody can be taken from the queue as long as groups only decode, which takes blocks and frees none unless windows leave some."""
    rules = queue.rules
    if queue.ints[N_QUEUED] == 0:
        return True
    if rules.policy == FAIR or rules.preempt_lower:
        return False
    if shared.ints[N_RUNNING] >= limits.max_num_seqs:
        return True
    if rules.batching != CHUNKED or limits.windowed > 0:
        return False
    largest = 0
    for g in range(len(flight.done)):
        largest = max(largest, states.ints[g, BATCH])
    row = first_queued(queue, out.status, 0)
    known = stream.prompt[row] + queue.row_ints[row, KEPT_EMITTED]
    done = stream.cached[row]
    want = min(known - done, limits.budget - largest, rules.longest_chunk)
    wanted = blocks_wanted(limits, shared, queue, done, done + want, known, 0)
    return bool(want > 0 and wanted > shared.ints[FREE_BLOCKS])


@inlined
def may_go_round(
    stages: StageTable,
    limits: Limits,
    stream: Stream,
    out: Outcome,
    shared: State,
    states: State,
    flight: Flight,
    queue: Queue,
) -> bool:
    """Whether the next tries find nobody but the group that has completed."""
    if queue.rules.batching >= PREFILL_FIRST or len(stages.excess) > 0:
        return False
    if queue.ints[N_PARTIALS] > 0 or queue.ints[N_GONE] > 0:
        return False
    for g in range(len(flight.done)):
        if states.ints[g, BATCH] > 0 and (
            flight.done[g] == math.inf or flight.last[g] < 0.0
        ):  # one waits or has waited (S3)
            return False
    return bool(_nobody_is_admitted(limits, stream, out, shared, states, flight, queue))


@inlined
def go_round(
    cost: CostTable,
    stages: StageTable,
    limits: Limits,
    stream: Stream,
    out: Outcome,
    shared: State,
    states: State,
    flight: Flight,
    queue: Queue,
    waiting: int,
    changes: float,
) -> None:
    """Let groups complete and set off again, one after the other, until before the first completion that may change more.

    ``waiting`` requests wait; at ``changes`` somebody comes or goes.
    """
    n_groups = len(flight.done)
    ints, floats = shared.ints, shared.floats
    for g in range(n_groups):
        flight.passes[g, PASSED] = 0
        flight.passes[g, ALIKE] = 0
        if flight.done[g] < math.inf and flight.chunks[g] == 0:
            group = part_of(states, g)
            flight.passes[g, ALIKE] = steps_in_piece(cost, group, steps_to_finish(group)) - 1
    passed = 0
    while True:
        g = 0
        for other in range(1, n_groups):
            if flight.done[other] < flight.done[g]:
                g = other
        when = flight.done[g]
        if when >= changes or flight.passes[g, PASSED] >= flight.passes[g, ALIKE]:
            break
        group = part_of(states, g)
        batch = group.ints[BATCH]
        past = flight.passes[g, PASSED] + 1
        need = group.residues[residue(-(group.ints[STEP] + past), limits.block_size)]
        left = 0
        if limits.windowed > 0:
            left = group.residues[limits.block_size + residue(-(group.ints[STEP] + past - 1), limits.block_size)]
        if need > ints[FREE_BLOCKS] + left:
            break
        t = floats[CLOCK]
        owned = limits.num_blocks - ints[FREE_BLOCKS]
        record_segment(shared, t, when, ints[N_RUNNING], waiting, owned * (when - t), 0.0)
        count_latencies(out, group, batch, when - flight.last[g], 0.0, 1)
        group.floats[SHARE_W] += flight.prices[g, HOST_SHARE]
        floats[CLOCK] = when
        flight.last[g] = when
        flight.passes[g, PASSED] = past
        ints[FREE_BLOCKS] += left - need
        if limits.windowed > 0:
            note_peaks(limits, shared, waiting)
        keys = group.ints[KEYS_SUM] + past * batch
        windowed = group.ints[WINDOW_SUM] + past * group.ints[N_GROWING]
        price = load_price(flight.prices, g)
        enter_stages(stages, flight, out, shared, queue, None, g, price, group.ints, keys, windowed, batch, 0.0)
        passed += 1
    if passed == 0:
        return
    ints[STEPS] += passed
    ints[SEGMENTS] += 1
    note_peaks(limits, shared, waiting)  # at the last one blocks are the most
    for g in range(n_groups):
        k = flight.passes[g, PASSED]
        if k == 0:
            continue
        group = part_of(states, g)
        price = load_price(flight.prices, g)
        batch = group.ints[BATCH]
        growth = price.slope * batch + cost.window_slope * group.ints[N_GROWING]
        advance_decodes(cost, group, None, price, growth, k)
        group.ints[STEP] += k
        out.steps_by_tokens[batch] += k
        out.steps_by_rows[batch] += k
        if queue.rules.policy == FAIR:
            count_decodes(group, queue, k)
        store_price(flight.prices, g, price_step(cost, stream, group, None, 0, batch, cost.dense[batch]))
