"""Replicas of several schedulers' worth of state: attention ranks in lock-step.

Each rank is a :class:`~simulator.engine.core.State` of its own, and all of them lie in one set of arrays with a
leading axis; :func:`part_of` is the view of one. The last row belongs to the replica as a whole: its clock, the arrivals not
yet given to a rank, integrals and peaks. The phases of a step are those of a plain replica. Rules G1 to G6 of
``docs/engine-ranks.md``.
"""

import math
from typing import Any, NamedTuple

from simulator.engine.batch import advance_decodes, pass_window_events, rebase_sums
from simulator.engine.core import (
    BATCH,
    CLOCK,
    FIFO_TAIL,
    FREE_BLOCKS,
    IDLE,
    INTERVAL,
    LAST_START,
    MAX_BLOCKS,
    MAX_RUNNING,
    MAX_WAITING,
    N_GROWING,
    N_PENDING,
    N_RUNNING,
    NEXT_ROW,
    REBASE_STEPS,
    SEGMENTS,
    STEP,
    STEP_ORIGIN,
    STEPS,
    T_WAITING,
    WAITING_INTEGRAL,
    CostTable,
    Limits,
    Outcome,
    State,
    Stream,
)
from simulator.engine.fcfs import make_room, n_waiting, next_arrival_s, release_next, schedule_chunks
from simulator.engine.heaps import pop_arrival
from simulator.engine.jit import compiled, inlined
from simulator.engine.parts import OWN_GROWTH, load_price, part_of, store_price
from simulator.engine.progressions import blocks_for, end_of_steps, residue, spread, take_blocks
from simulator.engine.records import REJECTED, WAITING
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

# columns of Board.scheduled
N_CHUNKS, TOKENS, FREE, SHORT, STEP_NEED, PREEMPTED, N_SCHEDULED = range(7)
# indices into Board.floats: rank-seconds of busy time that no table of the cost accounts for
PADDING, IMBALANCE, N_BOARD_FLOATS = range(3)


class Board(NamedTuple):
    """What the ranks tell each other within a step, and what is only known of all of them."""

    scheduled: Any
    prices: Any
    floats: Any
    turn: Any
    """[1] accepted arrivals so far, whose remainder is the next rank by turns."""


class Experts(NamedTuple):
    """Time of the routed experts by tokens, and how much longer than on average they take, step by step (G5)."""

    time: Any
    excess: Any


@inlined
def _total_waiting(states: State, n_ranks: int) -> int:
    total = 0
    for g in range(n_ranks):
        total += n_waiting(part_of(states, g))
    return total


@compiled
def _choose_rank(states: State, n_ranks: int, turn: Any, least_loaded: bool) -> int:
    """G1: the rank that an accepted arrival joins."""
    best = int(turn[0] % n_ranks)
    turn[0] += 1
    if least_loaded:
        best = 0
        best_load = -1
        for g in range(n_ranks):
            rank = part_of(states, g)
            load = 4 * n_waiting(rank) + rank.ints[N_RUNNING]
            if best_load < 0 or load < best_load:
                best = g
                best_load = load
    return best


@inlined
def _receive_for_ranks(
    stream: Stream,
    limits: Limits,
    out: Outcome,
    states: State,
    board: Board,
    n_ranks: int,
    least_loaded: bool,
    before_now: bool,
) -> None:
    """R2, R4, G1: let everything that has arrived by now (or before now) join a rank's queue, or be rejected."""
    shared = part_of(states, n_ranks)
    ints, floats = shared.ints, shared.floats
    now = floats[CLOCK]
    while True:
        when = next_arrival_s(stream, shared)
        if when > now or when == math.inf or (before_now and when == now):
            return
        if stream.concurrency > 0:
            row = shared.pending_row[0]
            ints[N_PENDING] = pop_arrival(shared.pending_time, shared.pending_row, ints[N_PENDING])
        else:
            row = ints[NEXT_ROW]
            ints[NEXT_ROW] = row + 1
        out.arrival[row] = when
        longest = stream.prompt[row] + stream.max_tokens[row]
        blocks = blocks_for(longest - 1, limits.block_size)
        if (0 < limits.max_model_len < longest) or blocks > limits.num_blocks:
            out.status[row] = REJECTED
            if stream.concurrency > 0:
                release_next(stream, shared, when)
            continue
        out.status[row] = WAITING
        rank = part_of(states, _choose_rank(states, n_ranks, board.turn, least_loaded))
        rank.fifo[rank.ints[FIFO_TAIL]] = row
        rank.ints[FIFO_TAIL] += 1
        if when < now:
            floats[WAITING_INTEGRAL] += now - when
            if when <= floats[LAST_START]:  # it waited while later steps of the segment were scheduled
                ints[MAX_WAITING] = max(ints[MAX_WAITING], _total_waiting(states, n_ranks))
            spread(shared.timeline, T_WAITING, floats[INTERVAL], when, now, 1.0)


@inlined
def _schedule_rank(cost: CostTable, limits: Limits, stream: Stream, out: Outcome, rank: State, scheduled: Any) -> None:
    """R5 and R7 on one rank."""
    ints = rank.ints
    if cost.window > 0:
        pass_window_events(cost, rank)
    if ints[STEP] - ints[STEP_ORIGIN] >= REBASE_STEPS:
        rebase_sums(cost, rank, out, None)
    need = rank.residues[residue(-ints[STEP], limits.block_size)]
    short = need > ints[FREE_BLOCKS]
    if short:
        make_room(cost, limits, out, rank, None)
    free = ints[FREE_BLOCKS] - (0 if short else need)
    chunks = schedule_chunks(cost, limits, stream, out, rank, None, free, short, in_flight=False)
    scheduled[N_CHUNKS] = chunks.n
    scheduled[TOKENS] = chunks.tokens
    scheduled[FREE] = chunks.free
    scheduled[SHORT] = short
    scheduled[STEP_NEED] = need
    scheduled[PREEMPTED] = chunks.preempted


@inlined
def _own_blocks(
    limits: Limits, rank: State, scheduled: Any, d0: float, q: float, k: int, t: float, end: float
) -> float:
    """Blocks that a rank takes in k steps; return its blocks × time."""
    ints = rank.ints
    if scheduled[N_CHUNKS] > 0:
        ints[FREE_BLOCKS] = scheduled[FREE]
        return float((limits.num_blocks - scheduled[FREE]) * (end - t))
    owned = limits.num_blocks - ints[FREE_BLOCKS]
    if scheduled[SHORT] or ints[BATCH] == 0:
        return float(owned * (end - t))
    owned, integral = take_blocks(rank.residues, limits.block_size, ints[STEP], k, ints[BATCH], owned, d0, q)
    ints[FREE_BLOCKS] = limits.num_blocks - owned
    return integral


@inlined
def _steps_while_slowest(prices: Any, n_ranks: int, slowest: int, k: int) -> int:
    """How many of k steps pass until another rank than ``slowest`` takes longer."""
    d0, q = prices[slowest, 0], prices[slowest, OWN_GROWTH]
    for g in range(n_ranks):
        d0_g, q_g = prices[g, 0], prices[g, OWN_GROWTH]
        if q_g > q and d0_g + q_g * (k - 1) > d0 + q * (k - 1):
            k = min(k, max(1, int((d0 - d0_g) / (q_g - q)) + 2))
            while k > 1 and d0_g + q_g * (k - 1) > d0 + q * (k - 1):
                k -= 1
    return k


@compiled
def advance_ranks(
    cost: CostTable,
    experts: Experts,
    limits: Limits,
    stream: Stream,
    out: Outcome,
    states: State,
    board: Board,
    least_loaded: bool,
    until: float,
) -> bool:
    """Run ranks in lock-step until no step can start before ``until``; return whether everything is done."""
    n_ranks = board.scheduled.shape[0]
    shared = part_of(states, n_ranks)
    ints, floats = shared.ints, shared.floats
    skewed = len(experts.excess) > 0
    while True:
        _receive_for_ranks(stream, limits, out, states, board, n_ranks, least_loaded, before_now=False)
        t = floats[CLOCK]
        next_arrival = next_arrival_s(stream, shared)
        present = _total_waiting(states, n_ranks)
        for g in range(n_ranks):
            present += states.ints[g, N_RUNNING]
        if present == 0:
            if next_arrival == math.inf:
                return True
            if next_arrival >= until:
                return False
            widen_timeline(shared.timeline, floats, next_arrival)
            floats[IDLE] += next_arrival - t
            floats[CLOCK] = next_arrival
            continue
        if t >= until:
            return False

        # --- what runs, rank by rank: R5, R7 ---
        width = 0
        waiting = 0
        running = 0
        alike = not skewed
        stop = until
        for g in range(n_ranks):
            rank = part_of(states, g)
            rank.floats[CLOCK] = t
            rank.floats[INTERVAL] = floats[INTERVAL]
            scheduled = board.scheduled[g]
            _schedule_rank(cost, limits, stream, out, rank, scheduled)
            width = max(width, scheduled[TOKENS])
            queued = n_waiting(rank)
            waiting += queued
            running += rank.ints[N_RUNNING]
            if scheduled[N_CHUNKS] > 0 or scheduled[PREEMPTED]:
                alike = False
            if queued == 0 and rank.ints[N_RUNNING] < limits.max_num_seqs:
                stop = min(stop, next_arrival)
        ints[MAX_WAITING] = max(ints[MAX_WAITING], waiting)
        ints[MAX_RUNNING] = max(ints[MAX_RUNNING], running)

        # --- what it costs, and for how many steps: G2, G3, G5 ---
        excess = 0.0
        if skewed:
            excess = experts.excess[ints[STEPS] % len(experts.excess)] * experts.time[width]
        dense = cost.dense[width] + excess
        slowest = 0
        k = 1 << 62
        for g in range(n_ranks):
            rank = part_of(states, g)
            tokens = board.scheduled[g, TOKENS]
            growth = 0.0
            if tokens == 0:
                board.prices[g, :] = 0.0
                board.prices[g, 0] = dense
            else:
                price = price_step(cost, stream, rank, None, board.scheduled[g, N_CHUNKS], tokens, dense)
                if alike:
                    growth = price.slope * rank.ints[BATCH] + cost.window_slope * rank.ints[N_GROWING]
                    k = min(k, steps_alike(cost, limits, rank, None))
                store_price(board.prices, g, price, growth)
            d0, q = board.prices[slowest, 0], board.prices[slowest, OWN_GROWTH]
            if board.prices[g, 0] > d0 or (board.prices[g, 0] == d0 and growth > q):
                slowest = g
        d0, q = board.prices[slowest, 0], board.prices[slowest, OWN_GROWTH]
        if alike:
            k = _steps_while_slowest(board.prices, n_ranks, slowest, k)
            k = steps_until(shared, d0, q, stop, k)
        else:
            k = 1
        end = end_of_steps(t, d0, q, k)

        # --- let it happen: R10 to R15, G4 ---
        blocks_integral = 0.0
        owned = 0
        busy = 0.0
        for g in range(n_ranks):
            rank = part_of(states, g)
            blocks_integral += _own_blocks(limits, rank, board.scheduled[g], d0, q, k, t, end)
            owned += limits.num_blocks - rank.ints[FREE_BLOCKS]
            tokens = board.scheduled[g, TOKENS]
            out.steps_by_tokens[tokens] += k
            if tokens == 0:
                out.steps_by_rows[0] += k
                continue
            board.floats[PADDING] += k * (cost.dense[width] - cost.dense[tokens])
            board.floats[IMBALANCE] += k * excess
            growth = board.prices[g, OWN_GROWTH]
            busy += end - t
            if g != slowest:
                busy -= k * (d0 - board.prices[g, 0]) + (q - growth) * (k * (k - 1) // 2)
            price = load_price(board.prices, g)
            out.steps_by_rows[price.rows] += k
            if rank.ints[BATCH] > 0:
                batch = rank.ints[BATCH]
                advance_decodes(cost, rank, None, price, growth, k)
                count_latencies(out, rank, batch, d0, q, k)
            rank.ints[STEP] += k
            rank.floats[CLOCK] = end
        if busy != n_ranks * (end - t):
            floats[IDLE] += (end - t) - busy / n_ranks
        ints[MAX_BLOCKS] = max(ints[MAX_BLOCKS], owned)
        ints[STEPS] += k
        ints[SEGMENTS] += 1
        floats[CLOCK] = end
        floats[LAST_START] = end_of_steps(t, d0, q, k - 1)
        record_segment(shared, t, end, running, waiting, blocks_integral, busy / n_ranks)
        _receive_for_ranks(stream, limits, out, states, board, n_ranks, least_loaded, before_now=True)
        n_done = 0
        for g in range(n_ranks):
            if board.scheduled[g, TOKENS] > 0:
                rank = part_of(states, g)
                if board.scheduled[g, N_CHUNKS] > 0:
                    price = load_price(board.prices, g)
                    n_done += end_chunks(
                        cost, stream, out, rank, None, board.scheduled[g, N_CHUNKS], price, limits.block_size
                    )
                n_done += end_decodes(cost, stream, out, rank, None, limits.block_size)
        if stream.concurrency > 0:
            for _ in range(n_done):
                release_next(stream, shared, end)
