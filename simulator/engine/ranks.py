"""Attention ranks in lock-step: schedulers, batches and caches of their own, whose steps start and end together.

Each rank has a :class:`~simulator.engine.core.State`, a queue and features of its own, and all of them lie in one set of arrays with a leading axis
(:mod:`simulator.engine.parts`). The last row belongs to the replica as a whole: its clock, the arrivals not yet given to a rank, integrals and
peaks. The phases of a step are those of a replica of one part. Rules G1 to G6 of ``docs/engine-ranks.md``, and of ``docs/engine-mixtures.md`` above all M17.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from simulator.engine import speculation
from simulator.engine.batch import advance_decodes
from simulator.engine.clients import (
    client_leaves,
    end_any_load,
    is_rejected,
    join,
    let_running_leave,
    next_departure,
    next_seen,
    peaks_at,
    take_arrival,
)
from simulator.engine.core import (
    BATCH,
    CLOCK,
    FREE_BLOCKS,
    IDLE,
    INTERVAL,
    LAST_START,
    MAX_BLOCKS,
    MAX_RUNNING,
    MAX_WAITING,
    N_LOADING,
    N_RUNNING,
    RAN,
    SEGMENTS,
    STEP,
    STEPS,
    CostTable,
    Extra,
    Limits,
    Outcome,
    Price,
    State,
    Stream,
)
from simulator.engine.fcfs import release_next
from simulator.engine.full_loop import (
    Pace,
    begin_step,
    charge_host,
    count_segment,
    end_step,
    longest_segment,
    pace_of,
    price_of,
    stop_of,
    take_segment,
    wait_for,
)
from simulator.engine.jit import compiled, compiled_once, entry, inlined
from simulator.engine.kv_blocks import add_alike, largest, profile_of, release_of_step
from simulator.engine.parts import (
    COPIES,
    HOST_SHARE,
    N_PRICES,
    OWN_D0,
    OWN_GROWTH,
    OWN_Q,
    extra_of,
    load_price,
    part_of,
    queue_of,
    store_price,
)
from simulator.engine.progressions import end_of_steps
from simulator.engine.queues import N_QUEUED, Queue, pop_due
from simulator.engine.scheduler import Scheduled, schedule
from simulator.engine.scheduling import PREFILL_FIRST
from simulator.engine.segments import lengthen, price_step, record_segment, steps_alike, steps_until
from simulator.engine.swap import N_MOVED, charge_copies, delay_of

# columns of Board.scheduled: the fields of Scheduled, the longest segment, and the decoding sequences that sit the step out (-1: none do)
N_CHUNKS, TOKENS, NEED, PREEMPTED, UNSURE, WANTED, LONGEST, SITTING, N_SCHEDULED = range(9)
# indices into Board.floats: rank-seconds of busy time that no table of the cost accounts for
PADDING, IMBALANCE, N_BOARD_FLOATS = range(3)


class Board(NamedTuple):
    """What the ranks tell each other within a step, and what is only known of all of them."""

    scheduled: Any
    prices: Any
    floats: Any
    turn: Any
    """[1] accepted arrivals so far, whose remainder is the next rank by turns."""
    rank: Any
    """[n] the rank that a request's present attempt joined."""


class Experts(NamedTuple):
    """Time of the routed experts by tokens, and how much longer than on average they take, step by step (G5)."""

    time: Any
    excess: Any


def new_board(n_ranks: int, n: int) -> Board:
    """A board for ``n_ranks`` ranks and ``n`` requests."""
    return Board(
        np.zeros((n_ranks, N_SCHEDULED), dtype=np.int64),
        np.zeros((n_ranks, N_PRICES)),
        np.zeros(N_BOARD_FLOATS),
        np.zeros(1, dtype=np.int64),
        np.zeros(n, dtype=np.int64),
    )


@inlined
def _total_waiting(states: State, queues: Queue, n_ranks: int) -> int:
    total = 0
    for g in range(n_ranks):
        total += queues.ints[g, N_QUEUED] + states.ints[g, N_LOADING]
    return total


@compiled
def _choose_rank(states: State, queues: Queue, board: Board, n_ranks: int, least_loaded: bool, within: bool) -> int:
    """G1: the rank that an accepted arrival joins; ``within`` the last step, those run that it was scheduled with."""
    best = int(board.turn[0] % n_ranks)
    board.turn[0] += 1
    if least_loaded:
        best = 0
        best_load = -1
        for g in range(n_ranks):
            load = states.ints[g, RAN if within else N_RUNNING]
            load += 4 * (queues.ints[g, N_QUEUED] + states.ints[g, N_LOADING])
            if best_load < 0 or load < best_load:
                best = g
                best_load = load
    return best


@inlined
def _next_load(states: State, extras: Extra | None, n_ranks: int) -> tuple[float, int]:
    """When the next load will be there, of equals that of the smallest row; and on which rank."""
    best = math.inf
    rank = -1
    if extras is not None and extras.loads.on:
        for g in range(n_ranks):
            if states.ints[g, N_LOADING] > 0:
                when = extras.loads.times[g, 0]
                if when < best or (when == best and extras.loads.rows[g, 0] < extras.loads.rows[rank, 0]):
                    best = when
                    rank = g
    return float(best), rank


@compiled_once
def _receive_for_ranks(
    cost: CostTable,
    limits: Limits,
    stream: Stream,
    out: Outcome,
    states: State,
    queues: Queue,
    extras: Extra | None,
    board: Board,
    n_ranks: int,
    least_loaded: bool,
    in_step: bool,
    known: float,
) -> None:
    """M1, G1: let clients leave, loads end and requests join a rank, in order of time; as :func:`simulator.engine.clients.receive`."""
    shared = part_of(states, n_ranks)
    queue = queue_of(queues, n_ranks)
    now = shared.floats[CLOCK]
    while True:
        due = next_departure(out, queue)
        ready, g = _next_load(states, extras, n_ranks)
        first = min(due, ready, next_seen(stream, shared, queue))
        if first > now or (in_step and first >= min(now, known)) or first == math.inf:
            return
        if due == first:
            row = pop_due(queue)
            g = board.rank[row]
            rank, own, extra = part_of(states, g), queue_of(queues, g), extra_of(extras, g)
            client_leaves(cost, limits, stream, out, shared, rank, own, extra, row, due, in_step)
        elif ready == first:
            end_any_load(out, part_of(states, g), queue_of(queues, g), extra_of(extras, g))
        else:
            row, arrival = take_arrival(stream, shared)
            if is_rejected(stream, limits, out, shared, queue, row, arrival):
                continue
            g = _choose_rank(states, queues, board, n_ranks, least_loaded, first < now)
            board.rank[row] = g
            join(out, shared, part_of(states, g), queue_of(queues, g), extra_of(extras, g), row, arrival)
            if peaks_at(shared, arrival + queue.rules.request_s):
                waiting = _total_waiting(states, queues, n_ranks)
                shared.ints[MAX_WAITING] = max(shared.ints[MAX_WAITING], waiting)


@inlined
def _read(scheduled: Any) -> Scheduled:
    """What a rank scheduled."""
    return Scheduled(
        int(scheduled[N_CHUNKS]),
        int(scheduled[TOKENS]),
        int(scheduled[NEED]),
        bool(scheduled[PREEMPTED]),
        bool(scheduled[UNSURE]),
        int(scheduled[WANTED]),
    )


@inlined
def _is_segment(scheduled: Any) -> bool:
    """Whether a rank decodes alone, and goes on with it."""
    return bool(scheduled[TOKENS] > 0 and scheduled[N_CHUNKS] == 0 and scheduled[PREEMPTED] == 0)


@compiled
def _schedule_rank(
    cost: CostTable,
    limits: Limits,
    stream: Stream,
    out: Outcome,
    rank: State,
    queue: Queue,
    extra: Extra | None,
    scheduled: Any,
    until: float,
    next_arrival: float,
) -> float:
    """R5 to R8 on one rank; return when something may change there."""
    begin_step(cost, out, rank, extra)
    found = schedule(cost, limits, stream, out, rank, queue, extra)
    scheduled[N_CHUNKS] = found.n
    scheduled[TOKENS] = found.tokens
    scheduled[NEED] = found.need
    scheduled[PREEMPTED] = found.preempted
    scheduled[UNSURE] = found.unsure
    scheduled[WANTED] = found.wanted
    scheduled[LONGEST] = longest_segment(limits, rank, queue, extra, found)
    scheduled[SITTING] = -1
    if found.n > 0 and queue.rules.batching >= PREFILL_FIRST:
        scheduled[SITTING] = rank.ints[BATCH]
        rank.ints[BATCH] = 0
    return stop_of(limits, out, rank, queue, extra, until, next_arrival)


@compiled
def _price_rank(
    cost: CostTable,
    limits: Limits,
    stream: Stream,
    out: Outcome,
    rank: State,
    queue: Queue,
    extra: Extra | None,
    scheduled: Any,
    prices: Any,
    g: int,
    dense: float,
    alike: bool,
) -> int:
    """G3, M17: what a step takes on one rank; return how many steps it can go on alike."""
    prices[g, COPIES] = 0.0
    if scheduled[TOKENS] == 0:
        prices[g, OWN_D0] = dense
        prices[g, OWN_Q] = 0.0
        prices[g, OWN_GROWTH] = 0.0
        if extra is not None and extra.swap.on and extra.swap.ints[N_MOVED] > 0:
            prices[g, COPIES] = delay_of(extra.swap, dense)
            charge_copies(extra.swap, out.busy, prices[g, COPIES])
            prices[g, OWN_D0] += prices[g, COPIES]
        return int(scheduled[LONGEST])
    price = price_step(cost, stream, rank, extra, scheduled[N_CHUNKS], scheduled[TOKENS], dense)
    if extra is not None and extra.swap.on and extra.swap.ints[N_MOVED] > 0:
        delay = delay_of(extra.swap, price.d0)
        charge_copies(extra.swap, out.busy, delay)
        price = lengthen(price, delay)
    pace = pace_of(cost, rank, queue.rules, extra, price, scheduled[N_CHUNKS], scheduled[TOKENS], scheduled[LONGEST])
    store_price(prices, g, price)
    prices[g, OWN_D0] = pace.d0
    prices[g, OWN_Q] = pace.q
    prices[g, OWN_GROWTH] = pace.growth
    if not alike:
        return 1
    k = min(pace.longest, steps_alike(cost, limits, rank, extra))
    if extra is not None and extra.spec.on:
        k = speculation.steps_with_room(extra.spec.batch, rank.ints[STEP], k, rank.ints[FREE_BLOCKS])
    return int(k)


@compiled_once
def _steps_while_slowest(prices: Any, n_ranks: int, slowest: int, k: int) -> int:
    """How many of k steps pass until another rank than ``slowest`` takes longer."""
    d0, q = prices[slowest, OWN_D0], prices[slowest, OWN_Q]
    for g in range(n_ranks):
        d0_g, q_g = prices[g, OWN_D0], prices[g, OWN_Q]
        if q_g > q and d0_g + q_g * (k - 1) > d0 + q * (k - 1):
            k = min(k, max(1, int((d0 - d0_g) / (q_g - q)) + 2))
            while k > 1 and d0_g + q_g * (k - 1) > d0 + q * (k - 1):
                k -= 1
    return k


@inlined
def _pace(prices: Any, g: int) -> Pace:
    return Pace(prices[g, OWN_D0], prices[g, OWN_Q], prices[g, OWN_GROWTH], 1)


@compiled
def _run_rank(
    cost: CostTable,
    limits: Limits,
    out: Outcome,
    rank: State,
    queue: Queue,
    extra: Extra | None,
    scheduled: Any,
    prices: Any,
    g: int,
    d0: float,
    q: float,
    k: int,
    t: float,
    end: float,
    profile: Any,
) -> float:
    """R10, R13, G4: k steps of one rank, within those of the replica (``d0``, ``q``); return its blocks × time."""
    owned = limits.num_blocks - rank.ints[FREE_BLOCKS]
    blocks_integral = float(owned * (end - t))
    if _is_segment(scheduled):
        k, owned, blocks_integral = take_segment(limits, rank, extra, _read(scheduled), d0, q, k, profile)
    else:
        add_alike(profile, owned)
        release_of_step(limits, rank, extra)
    tokens = scheduled[TOKENS]
    out.steps_by_tokens[tokens] += k
    rank.floats[CLOCK] = end
    if tokens == 0:
        out.steps_by_rows[0] += k
        return blocks_integral
    price, pace = load_price(prices, g), _pace(prices, g)
    out.steps_by_rows[price.rows] += k
    if rank.ints[BATCH] > 0:
        advance_decodes(cost, rank, extra, price, pace.growth, k)
        count_segment(out, rank, queue, t, d0, q, k)
    prices[g, HOST_SHARE] = charge_host(rank, queue, extra, price, pace, tokens, k) / tokens
    if scheduled[SITTING] >= 0:
        rank.ints[BATCH] = scheduled[SITTING]
    else:
        rank.ints[STEP] += k
    return blocks_integral


@compiled
def _end_rank(
    cost: CostTable,
    limits: Limits,
    stream: Stream,
    out: Outcome,
    rank: State,
    queue: Queue,
    extra: Extra | None,
    chunks: int,
    price: Price,
) -> int:
    """M2 on one rank; return how many requests finish."""
    return int(end_step(cost, limits, stream, out, rank, queue, extra, chunks, price))


@entry
def advance_ranks(
    cost: CostTable,
    experts: Experts,
    limits: Limits,
    stream: Stream,
    out: Outcome,
    states: State,
    queues: Queue,
    extras: Extra | None,
    board: Board,
    least_loaded: bool,
    until: float,
    known: float,
) -> bool:
    """Run ranks in lock-step until no step can start before ``until``; return whether everything is done.

    ``known`` as in :func:`simulator.engine.skip_ahead.advance`.
    """
    n_ranks = board.scheduled.shape[0]
    shared = part_of(states, n_ranks)
    queue = queue_of(queues, n_ranks)
    ints, floats = shared.ints, shared.floats
    skewed = len(experts.excess) > 0
    while True:
        t = floats[CLOCK]
        if t >= known:
            return False
        _receive_for_ranks(
            cost,
            limits,
            stream,
            out,
            states,
            queues,
            extras,
            board,
            n_ranks,
            least_loaded,
            False,  # noqa: FBT003
            math.inf,
        )
        next_arrival = next_seen(stream, shared, queue)
        present = 0
        loading = 0
        for g in range(n_ranks):
            present += queues.ints[g, N_QUEUED] + states.ints[g, N_RUNNING]
            loading += states.ints[g, N_LOADING]
        if present == 0:
            wakes = min(next_arrival, _next_load(states, extras, n_ranks)[0])
            if loading > 0:
                wakes = min(wakes, next_departure(out, queue))
            if wakes == math.inf:
                return True
            if wakes >= until:
                return False
            wait_for(shared, loading, wakes)
            continue
        if t >= until:
            return False

        # --- what runs, rank by rank: R5 to R8 ---
        width = 0
        running = 0
        alike = not skewed
        stop = until
        for g in range(n_ranks):
            states.floats[g, CLOCK] = t
            states.floats[g, INTERVAL] = floats[INTERVAL]
            scheduled = board.scheduled[g]
            rank, own, extra = part_of(states, g), queue_of(queues, g), extra_of(extras, g)
            when = _schedule_rank(cost, limits, stream, out, rank, own, extra, scheduled, until, next_arrival)
            stop = min(stop, when)
            width = max(width, scheduled[TOKENS])
            states.ints[g, RAN] = states.ints[g, N_RUNNING]
            running += states.ints[g, N_RUNNING]
            if (scheduled[TOKENS] > 0 and not _is_segment(scheduled)) or scheduled[PREEMPTED] != 0:
                alike = False
        if width == 0:  # all who waited load
            continue
        waiting = _total_waiting(states, queues, n_ranks)
        ints[MAX_WAITING] = max(ints[MAX_WAITING], waiting)
        ints[MAX_RUNNING] = max(ints[MAX_RUNNING], running)

        # --- what it costs, and for how many steps: G2, G3, G5 ---
        excess = 0.0
        if skewed:
            excess = experts.excess[ints[STEPS] % len(experts.excess)] * experts.time[width]
        dense = cost.dense[width] + excess
        slowest = 0
        k = 1 << 60
        prices = board.prices
        for g in range(n_ranks):
            rank, own, extra = part_of(states, g), queue_of(queues, g), extra_of(extras, g)
            scheduled = board.scheduled[g]
            few = _price_rank(cost, limits, stream, out, rank, own, extra, scheduled, prices, g, dense, alike)
            k = min(k, few)
            longer = prices[g, OWN_D0] > prices[slowest, OWN_D0]
            if longer or (prices[g, OWN_D0] == prices[slowest, OWN_D0] and prices[g, OWN_Q] > prices[slowest, OWN_Q]):
                slowest = g
        d0, q = prices[slowest, OWN_D0], prices[slowest, OWN_Q]
        if alike:
            k = _steps_while_slowest(prices, n_ranks, slowest, k)
            k = steps_until(shared, d0, q, stop, k)
        else:
            k = 1
        end = end_of_steps(t, d0, q, k)

        # --- let it happen: R10 to R15, G4 ---
        blocks_integral = 0.0
        owned = 0
        busy = 0.0
        profile = profile_of(limits, shared)[0]
        profile[:] = 0
        for g in range(n_ranks):
            tokens = board.scheduled[g, TOKENS]
            if tokens == 0:
                busy += prices[g, COPIES]
            else:
                board.floats[PADDING] += k * (cost.dense[width] - cost.dense[tokens])
                board.floats[IMBALANCE] += k * excess
                busy += end - t
                if g != slowest:
                    busy -= k * (d0 - prices[g, OWN_D0]) + (q - prices[g, OWN_Q]) * (k * (k - 1) // 2)
            rank, own, extra = part_of(states, g), queue_of(queues, g), extra_of(extras, g)
            scheduled = board.scheduled[g]
            blocks_integral += _run_rank(
                cost, limits, out, rank, own, extra, scheduled, prices, g, d0, q, k, t, end, profile
            )
            owned += limits.num_blocks - states.ints[g, FREE_BLOCKS]
        if limits.windowed > 0:
            owned = largest(profile)
        if busy != n_ranks * (end - t):
            floats[IDLE] += (end - t) - busy / n_ranks
        ints[MAX_BLOCKS] = max(ints[MAX_BLOCKS], owned)
        ints[STEPS] += k
        ints[SEGMENTS] += 1
        floats[CLOCK] = end
        floats[LAST_START] = end_of_steps(t, d0, q, k - 1)
        record_segment(shared, t, end, running, waiting, blocks_integral, busy / n_ranks)
        _receive_for_ranks(
            cost,
            limits,
            stream,
            out,
            states,
            queues,
            extras,
            board,
            n_ranks,
            least_loaded,
            True,  # noqa: FBT003
            known,
        )
        if queue.rules.clients_leave and known < end:
            for g in range(n_ranks):
                rank, own, extra = part_of(states, g), queue_of(queues, g), extra_of(extras, g)
                let_running_leave(cost, limits, stream, out, shared, rank, own, extra)
        n_done = 0
        for g in range(n_ranks):
            if board.scheduled[g, TOKENS] > 0:
                rank, own, extra = part_of(states, g), queue_of(queues, g), extra_of(extras, g)
                price = price_of(load_price(prices, g), prices[g, HOST_SHARE])
                n_done += _end_rank(cost, limits, stream, out, rank, own, extra, board.scheduled[g, N_CHUNKS], price)
        if stream.concurrency > 0:
            for _ in range(n_done):
                release_next(stream, shared, end + queue.rules.output_s)
