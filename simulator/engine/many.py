"""Many replicas as one struct of arrays: advanced together, looked at together, and chosen between in compiled code.

Each replica is the plain one of :mod:`simulator.engine.skip_ahead`, advanced by the same function. What is added is around it:

* all states lie in common arrays, one row per replica (:attr:`Many.states`), so that one call reaches every replica;
* a replica gets its requests through the heap that a closed loop keeps its clients in (R3), here an *inbox* of (time, row). Rows
  are those of one stream for all replicas, and their results lie in one set of columns;
* after each advance a replica's :class:`Board` entry says when its next step can start and what its load is.

A *stage* is a range of replicas, a rule that chooses one of them, and a link over which a request's KV cache gets there
(:class:`Stage`). ``docs/fleets.md`` has the rules, F1 to F8.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from simulator.engine.block_hashes import BlockHashes
from simulator.engine.core import (
    CLOCK,
    FIFO_HEAD,
    FIFO_TAIL,
    FREE_BLOCKS,
    FREE_SLOT,
    N_FREE_SLOTS,
    N_PENDING,
    N_PREEMPTED,
    N_RUNNING,
    CostTable,
    Limits,
    Outcome,
    State,
    Stream,
)
from simulator.engine.heaps import push_arrival
from simulator.engine.jit import compiled, entry, inlined
from simulator.engine.kv_blocks import blocks_at_most, blocks_owned_at
from simulator.engine.parts import part_of
from simulator.engine.skip_ahead import advance

# columns of Kinds.ints
(
    N_DENSE,
    N_KNOTS,
    N_PLANES,
    WINDOW,
    WINDOW_CHUNKED,
    MAX_SEQS,
    BUDGET,
    BLOCK_SIZE,
    NUM_BLOCKS,
    MAX_MODEL_LEN,
    RESERVE_FULL,
    LOOKAHEAD,
    GROUPS,
    WINDOWED,
    KV_WINDOW,
    KV_CHUNKED,
    WINDOWED_MOST,
    N_KIND_INTS,
) = range(18)
# columns of Kinds.floats
SEQ, WINDOW_SLOPE, N_KIND_FLOATS = range(3)
# columns of Board.ints
KIND, REQUESTS, PROMISED, SEEN_HEAD, OWNED, BLOCKS, ENDING, ENDING_BLOCKS, N_BOARD_INTS = range(9)
#: How a stage chooses; with ``GIVEN`` somebody else has.
GIVEN, LEAST_REQUESTS, LEAST_KV, POWER_OF_TWO, PREFIX = range(5)
#: What :func:`run` does.
SERVE, RANGE, FINISH = range(3)
# columns of Links.sums
BYTES, BUSY, WAITED, TRANSFERS, N_SUMS = range(5)


class Kinds(NamedTuple):
    """Cost tables and limits, one row per kind of replica, filled up to the longest."""

    dense: Any
    head: Any
    knots: Any
    value: Any
    slope: Any
    planes: Any
    floats: Any
    ints: Any


class Board(NamedTuple):
    """What the router may see of each replica.

    Attributes
    ----------
    next_s
        [replicas] when its next step can start; infinite if it has nothing to do.
    clock_s
        [replicas] when its last step ends: it may be under way.
    ints
        [replicas, 8] its kind, the requests it was given and has not finished, the KV blocks that the prompts among them
        will take which it has not admitted yet, the place in its queue up to which they have been counted, and its KV blocks, those
        in use and all. Then the requests that finish at the end of its last step, and their blocks, which are not in the
        figures before them: until that end they are there.
    """

    next_s: Any
    clock_s: Any
    ints: Any


class Links(NamedTuple):
    """Links that carry KV caches, first come, first served.

    Attributes
    ----------
    free_s
        [links] when a link has sent what it was given.
    sums
        [links, 4] bytes, seconds sending, seconds that transfers waited for the link, transfers.
    """

    free_s: Any
    sums: Any


def new_links(n: int) -> Links:
    """``n`` links that have carried nothing."""
    return Links(np.zeros(n), np.zeros((n, N_SUMS)))


class Prefixes(NamedTuple):
    """Which replica was last sent each block of prompt; empty unless a stage chooses by it."""

    ids: Any
    offsets: Any
    owner: Any


def new_prefixes(hashes: BlockHashes | None) -> Prefixes:
    """Nothing sent yet; ``hashes`` by KV block, None if no router goes by them."""
    if hashes is None:
        hashes = BlockHashes(np.zeros(0, dtype=np.int64), np.zeros(1, dtype=np.int64), 1)
    owner = np.full(int(hashes.ids.max(initial=-1)) + 1, -1, dtype=np.int64)
    return Prefixes(hashes.ids, hashes.offsets, owner)


class Many(NamedTuple):
    """All replicas of a fleet."""

    kinds: Kinds
    stream: Stream
    out: Outcome
    states: State
    board: Board
    links: Links
    prefixes: Prefixes


class Stage(NamedTuple):
    """Where requests go next, and how they get there.

    Attributes
    ----------
    first, last
        its replicas are first … last − 1.
    row0
        row of request 0 in the stream.
    policy
        one of ``GIVEN`` … ``PREFIX``.
    given
        [n] the replica of each request, counted from ``first``; −1 until it is chosen, where it is not given.
    draws
        [n, 2] (of ``POWER_OF_TWO``) two different replicas to choose between, counted from ``first``.
    match, imbalance, ratio
        of ``PREFIX``: share of the prompt's blocks that must be known to follow them, and the two thresholds beyond which loads
        are evened out instead: largest − smallest > imbalance, and largest > ratio × smallest.
    linked
        whether KV caches cross a link on the way.
    bandwidth, latency_s
        of a link [bytes/s], and the time after a transfer's last byte until it is there. [s]
    layers
        0: a transfer starts when the request is sent off. L: it starts as the first layer is ready, and after the last only 1/L of the
        bytes are left to send.
    inlet, outlet
        [replicas] the link by which KV comes to, and leaves, a replica; −1: none.
    bytes
        [n] of each request's transfer.
    sent_s, arrive_s, waited_s
        [n] filled in: when it was sent off, when it was there, how long it waited for links.
    """

    first: int
    last: int
    row0: int
    policy: int
    given: Any
    draws: Any
    match: float
    imbalance: int
    ratio: float
    linked: bool
    bandwidth: float
    latency_s: float
    layers: int
    inlet: Any
    outlet: Any
    bytes: Any
    sent_s: Any
    arrive_s: Any
    waited_s: Any


@inlined
def _cost(kinds: Kinds, kind: int) -> CostTable:
    """Cost table of one kind of replica."""
    ints = kinds.ints[kind]
    return CostTable(
        kinds.dense[kind, : ints[N_DENSE]],
        kinds.head[kind],
        kinds.knots[kind, : ints[N_KNOTS]],
        kinds.value[kind, : ints[N_KNOTS]],
        kinds.slope[kind, : ints[N_KNOTS]],
        kinds.floats[kind, SEQ],
        kinds.planes[kind, : ints[N_PLANES]],
        ints[WINDOW],
        ints[WINDOW_CHUNKED] != 0,
        kinds.floats[kind, WINDOW_SLOPE],
    )


@inlined
def _limits(ints: Any) -> Limits:
    """Settings of a kind of replica, of which ``ints`` is the row of ``Kinds.ints``."""
    return Limits(
        ints[MAX_SEQS],
        ints[BUDGET],
        ints[BLOCK_SIZE],
        ints[NUM_BLOCKS],
        ints[MAX_MODEL_LEN],
        ints[RESERVE_FULL] != 0,
        ints[LOOKAHEAD],
        ints[GROUPS],
        ints[WINDOWED],
        ints[KV_WINDOW],
        ints[KV_CHUNKED] != 0,
        ints[WINDOWED_MOST],
    )


@inlined
def _outcome(out: Outcome, r: int) -> Outcome:
    """Common columns, and the counts of one replica."""
    return Outcome(
        out.status,
        out.arrival,
        out.scheduled,
        out.first_token,
        out.finish,
        out.preemptions,
        out.busy,
        out.busy_prefill,
        out.busy_cached,
        out.recompute,
        out.steps_by_tokens[r],
        out.steps_by_rows[r],
        out.itl[r],
    )


@compiled
def look(
    board: Board,
    kinds: Any,
    prompt: Any,
    output: Any,
    finish: Any,
    ints: Any,
    floats: Any,
    pending_time: Any,
    fifo: Any,
    slots: Any,
    rows: Any,
    r: int,
) -> None:
    """Bring a replica's entry of the board up to date, from ``Kinds.ints`` and columns of the stream, the outcome and its state.

    Functions around the engine take the arrays they need: compiling a call with all of :class:`Many` takes seconds.
    """
    mine = board.ints[r]
    clock = floats[CLOCK]
    waiting = ints[N_PREEMPTED] + ints[FIFO_TAIL] - ints[FIFO_HEAD]
    mine[REQUESTS] = ints[N_RUNNING] + waiting + ints[N_PENDING]
    if ints[N_RUNNING] > 0 or waiting > 0:
        board.next_s[r] = clock
    elif ints[N_PENDING] > 0:
        board.next_s[r] = max(clock, pending_time[0])
    else:
        board.next_s[r] = math.inf
    limits = _limits(kinds[mine[KIND]])
    for place in range(mine[SEEN_HEAD], ints[FIFO_HEAD]):
        tokens = prompt[fifo[place]]
        mine[PROMISED] -= blocks_owned_at(limits, tokens, tokens)
    mine[SEEN_HEAD] = ints[FIFO_HEAD]
    mine[OWNED] = mine[BLOCKS] - ints[FREE_BLOCKS]
    board.clock_s[r] = clock
    mine[ENDING] = 0
    mine[ENDING_BLOCKS] = 0
    # Who finished last gave back the slots on top of the stack; a slot that nobody ever had is of row −1.
    for i in range(ints[N_FREE_SLOTS] - 1, -1, -1):
        row = rows[slots[i, FREE_SLOT]]
        if row < 0 or finish[row] != clock:
            break
        mine[ENDING] += 1
        tokens = prompt[row] + output[row] - 1
        mine[ENDING_BLOCKS] += blocks_owned_at(limits, tokens, tokens)


@compiled
def _has_room(ints: Any, fifo: Any, inbox: int, mine: Any) -> bool:
    """Make room for one more request in a replica's queue and inbox; False if its arrays are too short.

    ``inbox`` is the length of the inbox, ``mine`` the replica's row of :attr:`Board.ints`.
    """
    pending = ints[N_PENDING]
    if pending + 1 >= inbox:
        return False
    if ints[FIFO_TAIL] + pending + 1 <= len(fifo):
        return True
    head = ints[FIFO_HEAD]
    for place in range(head, ints[FIFO_TAIL]):
        fifo[place - head] = fifo[place]
    ints[FIFO_TAIL] -= head
    ints[FIFO_HEAD] = 0
    mine[SEEN_HEAD] = 0
    return bool(2 * (ints[FIFO_TAIL] + pending + 1) <= len(fifo))


@inlined
def _requests(board: Board, r: int, now: float) -> int:
    """Requests that a replica has at ``now``: those that finish with the step under way among them."""
    ending = board.ints[r, ENDING] if board.clock_s[r] > now else 0
    return int(board.ints[r, REQUESTS] + ending)


@inlined
def _load(board: Board, r: int, now: float, by_kv: bool) -> float:
    """Load of a replica: its requests, or the share of its KV blocks in use or promised."""
    if not by_kv:
        return float(_requests(board, r, now))
    mine = board.ints[r]
    ending = mine[ENDING_BLOCKS] if board.clock_s[r] > now else 0
    return float((mine[OWNED] + ending + mine[PROMISED]) / mine[BLOCKS])


@compiled
def _least(board: Board, first: int, last: int, now: float, by_kv: bool) -> int:
    """The first of the replicas with the least load."""
    best = first
    least = _load(board, best, now, by_kv)
    for r in range(first + 1, last):
        load = _load(board, r, now, by_kv)
        if load < least:
            least = load
            best = r
    return best


@compiled
def _by_prefix(board: Board, prefixes: Prefixes, stage: Stage, request: int, now: float) -> int:
    """F5: the replica that was last sent the longest known start of this prompt, unless loads are too uneven."""
    low = _requests(board, stage.first, now)
    high = low
    for r in range(stage.first + 1, stage.last):
        low = min(low, _requests(board, r, now))
        high = max(high, _requests(board, r, now))
    ids, offsets, owner = prefixes
    start, stop = offsets[request], offsets[request + 1]
    found = -1
    known = 0
    for place in range(start, stop):
        who = owner[ids[place]]
        if who < 0:
            break
        found = who
        known += 1
    uneven = high - low > stage.imbalance and high > stage.ratio * low
    if found >= 0 and not uneven and known > stage.match * (stop - start):
        best = found
    else:
        best = _least(board, stage.first, stage.last, now, False)  # noqa: FBT003 - compiled code takes no keywords here
    for place in range(start, stop):
        owner[ids[place]] = best
    return best


@entry
def choose(board: Board, prefixes: Prefixes, stage: Stage, request: int, now: float) -> int:
    """F3 to F5: the replica that a request goes to."""
    if stage.policy == PREFIX:
        return int(_by_prefix(board, prefixes, stage, request, now))
    if stage.policy == POWER_OF_TWO:
        best = int(stage.first + stage.draws[request, 0])
        other = int(stage.first + stage.draws[request, 1])
        if _requests(board, other, now) < _requests(board, best, now):
            best = other
        return best
    return int(_least(board, stage.first, stage.last, now, stage.policy == LEAST_KV))


@compiled
def _transfer(links: Links, stage: Stage, request: int, now: float, since: float, source: int, target: int) -> float:
    """F6: send a request's KV cache from replica ``source`` (−1: none) to ``target``; return when it is there.

    ``since`` is when it began to be computed.
    """
    ready = now
    if stage.layers > 0:
        ready = now - (1.0 - 1.0 / stage.layers) * (now - since)
    outlet = stage.outlet[source] if source >= 0 else -1
    inlet = stage.inlet[target]
    start = ready
    if outlet >= 0:
        start = max(start, links.free_s[outlet])
    if inlet >= 0:
        start = max(start, links.free_s[inlet])
    sending = stage.bytes[request] / stage.bandwidth
    end = start + sending
    if stage.layers > 0:
        end = max(end, now + sending / stage.layers)
    for k in range(2):
        link = outlet if k == 0 else inlet
        if link >= 0 and (k == 0 or inlet != outlet):
            links.free_s[link] = end
            links.sums[link, BYTES] += stage.bytes[request]
            links.sums[link, BUSY] += sending
            links.sums[link, WAITED] += start - ready
            links.sums[link, TRANSFERS] += 1.0
    stage.waited_s[request] = start - ready
    return float(end + stage.latency_s)


@entry
def transfer_in_order(links: Links, stage: Stage, order: Any, when: Any, since: Any, source: Any) -> None:
    """Send the KV caches of requests ``order``, whose replicas are given, off at their times in ``when``."""
    for i in range(len(order)):
        request = order[i]
        now = when[request]
        there = now
        if stage.linked and stage.bytes[request] > 0:
            there = _transfer(
                links, stage, request, now, since[request], source[request], stage.first + stage.given[request]
            )
        stage.sent_s[request] = now
        stage.arrive_s[request] = there


@compiled
def accepts(kind: Any, longest: int) -> bool:
    """R4: whether a replica, of which ``kind`` is the row of ``Kinds.ints``, will not reject a request of ``longest`` tokens."""
    if 0 < kind[MAX_MODEL_LEN] < longest:
        return False
    limits = _limits(kind)
    return bool(blocks_at_most(limits, 0, longest - 1 + limits.lookahead) <= limits.num_blocks)


@entry
def run(
    many: Many,
    stage: Stage,
    mode: int,
    order: Any,
    when: Any,
    since: Any,
    source: Any,
    place: int,
    until: float,
    rows: Any,
) -> int:
    """Send requests off and let replicas run; the one function that has all of :class:`Many`, because each takes long to compile.

    ``SERVE``: send ``order[place:]`` off, each at its time in ``when``, as long as that is before ``until``; every replica of the
    stage that has a step before then is advanced to it first, unless nobody looks. Return the place of the first that was not sent:
    the length of ``order``, or because of ``until``, or because arrays are too short.

    ``RANGE``: run the steps of the stage's replicas that start before ``until``; return 0.

    ``FINISH``: send ``order[place:]`` off at once (replicas have been advanced to it), then run the steps of all replicas of the fleet, in
    order of time, that start before ``until`` and before anything finishes. Return how many requests finished, in ``rows``,
    which has room for every running request; at the earliest of their ``finish`` times the caller may send more. They may finish
    later than ``until``. If arrays are too short, return −1 − the place of the first that was not sent.

    ``since`` and ``source``, by request, are as in :func:`_transfer`.
    """
    board, states, kinds = many.board, many.states, many.kinds
    prompt, output, finish = many.stream.prompt, many.stream.output, many.out.finish
    last = stage.last
    cursor = stage.first
    limit = until
    found = 0
    while True:
        # --- whom to advance, and until when ---
        if mode == RANGE:
            while cursor < last and board.next_s[cursor] >= until:
                cursor += 1
            if cursor == last:
                return 0
            r = cursor
            target = until
        elif place < len(order):
            request = order[place]
            now = when[request]
            if mode == SERVE:
                if now >= until:
                    return place
                if stage.policy == GIVEN:
                    cursor = last
                while cursor < last and board.next_s[cursor] >= now:
                    cursor += 1
            if mode == SERVE and cursor < last:
                r = cursor
                target = now
            else:
                # --- nobody: send a request off ---
                if stage.given[request] < 0:
                    stage.given[request] = choose(board, many.prefixes, stage, request, now) - stage.first
                r = stage.first + stage.given[request]
                ints, mine = states.ints[r], board.ints[r]
                if not _has_room(ints, states.fifo[r], states.pending_time.shape[1], mine):
                    return place if mode == SERVE else -1 - place  # asked again, it goes where it was to go
                there = now
                if stage.linked and stage.bytes[request] > 0:
                    there = _transfer(many.links, stage, request, now, since[request], source[request], r)
                stage.sent_s[request] = now
                stage.arrive_s[request] = there
                row = stage.row0 + request
                times = states.pending_time[r]
                ints[N_PENDING] = push_arrival(times, states.pending_row[r], ints[N_PENDING], there, row)
                kind = kinds.ints[mine[KIND]]
                if accepts(kind, prompt[row] + many.stream.max_tokens[row]):
                    mine[PROMISED] += blocks_owned_at(_limits(kind), prompt[row], prompt[row])
                mine[REQUESTS] += 1
                board.next_s[r] = max(board.clock_s[r], min(board.next_s[r], there))
                place += 1
                cursor = stage.first
                continue
        elif mode == SERVE:
            return place
        else:
            r = 0
            for other in range(1, len(board.next_s)):
                if board.next_s[other] < board.next_s[r]:
                    r = other
            if board.next_s[r] >= limit:
                return found
            # Exactly one step: the next one starts after this one's start.
            target = np.nextafter(board.next_s[r], math.inf)

        # --- let it run ---
        ints = states.ints[r]
        free, head = ints[N_FREE_SLOTS], ints[FIFO_HEAD]
        kind_of = board.ints[r, KIND]
        advance(
            _cost(kinds, kind_of),
            _limits(kinds.ints[kind_of]),
            many.stream,
            _outcome(many.out, r),
            part_of(states, r),
            target,
            target,
        )
        look(
            board,
            kinds.ints,
            prompt,
            output,
            finish,
            ints,
            states.floats[r],
            states.pending_time[r],
            states.fifo[r],
            states.slots[r],
            states.row[r],
            r,
        )
        if mode == FINISH:
            # Slots were taken by those admitted, and given back, on top of the stack, by those that finished.
            finished = ints[N_FREE_SLOTS] - free + ints[FIFO_HEAD] - head
            for i in range(finished):
                rows[found] = states.row[r, states.slots[r, ints[N_FREE_SLOTS] - 1 - i, FREE_SLOT]]
                found += 1
            if finished > 0:
                limit = min(limit, states.floats[r, CLOCK])
