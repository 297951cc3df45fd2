"""The compiled engine's tiers of the prefix cache below HBM: rules F1 to F8 of ``docs/engine-kv-memory.md``.

A tier is a ring of ids, the most recently used first; the entry of an id is a place in an array, so every operation on one
block is O(1) per tier.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from simulator.engine.heaps import push_arrival
from simulator.engine.jit import compiled, entry
from simulator.engine.kv_memory import LOAD_POLICIES, Tier

ALWAYS, NEVER, CHEAPER = range(len(LOAD_POLICIES))

# last axis of Tiers.rings
NEXT, PREVIOUS = range(2)
ABSENT = -1
"""NEXT of an id that a tier does not hold. Place 0 is the end of its ring, place i + 1 the id i."""
# columns of Tiers.counts
CAPACITY, SIZE, STORED, LOADED, ON_WAY, THROUGH, N_COUNTS = range(7)
# columns of Tiers.times
BLOCK_S, LATENCY_S, LINK_FREE_S, N_TIMES = range(4)
# indices into Loads.ints
BLOCKED, STARTED, DECLINED, N_INTS = range(4)


class Tiers(NamedTuple):
    """What the memory below HBM holds. ``on`` is false where there is none; ``through`` says whether any of it is written through.

    Attributes
    ----------
    rings
        [tiers, ids + 1, 2] the rings, see above.
    counts
        [tiers, 6] capacity, size, blocks stored and loaded so far, a scratch column, and whether what is computed is written through.
    times
        [tiers, 3] time to load a block, latency, and when the tier's link is free. [s]
    """

    on: bool
    through: bool
    rings: Any
    counts: Any
    times: Any


class Loads(NamedTuple):
    """Requests that load from the tiers, and what they have loaded. ``on`` is false where there are no tiers.

    Attributes
    ----------
    times, rows
        heap of the loads on their way: when they will be there, and whose they are. As many as State.ints[N_LOADING].
    loaded
        [requests] tokens that lie ready for a waiting request; −1 once it asks no more.
    start_s, end_s
        [requests] when a request began to load, and when its load is there. NaN if it never did. [s]
    ints
        whether the first of the queue could not be admitted and may still ask; counts of loads started and declined.
    """

    on: bool
    policy: int
    times: Any
    rows: Any
    loaded: Any
    start_s: Any
    end_s: Any
    ints: Any


def new_tiers(tiers: Sequence[Tier], n_ids: int) -> Tiers:
    """Empty tiers for ids below ``n_ids``."""
    rings = np.full((len(tiers), n_ids + 1 if tiers else 0, 2), ABSENT, dtype=np.int64)
    rings[:, :1] = 0
    counts = np.zeros((len(tiers), N_COUNTS), dtype=np.int64)
    times = np.zeros((len(tiers), N_TIMES))
    for i, tier in enumerate(tiers):
        counts[i, CAPACITY] = tier.blocks
        counts[i, THROUGH] = tier.write_through
        times[i, BLOCK_S] = tier.block_s
        times[i, LATENCY_S] = tier.latency_s
    return Tiers(len(tiers) > 0, any(tier.write_through for tier in tiers), rings, counts, times)


def warm_up(tiers: Tiers, ids: NDArray[np.int64]) -> None:
    """F10: let the last tier, which is empty, hold what has been used in the order of ``ids``."""
    newest_first = ids[::-1]
    _, first = np.unique(newest_first, return_index=True)
    held = newest_first[np.sort(first)][: int(tiers.counts[-1, CAPACITY])]
    ring = np.concatenate([[0], held + 1])
    tiers.rings[-1, ring, NEXT] = np.roll(ring, -1)
    tiers.rings[-1, ring, PREVIOUS] = np.roll(ring, 1)
    tiers.counts[-1, SIZE] = len(held)


def new_loads(policy: str, n: int, *, on: bool) -> Loads:
    """No loads yet, of ``n`` requests."""
    n = n if on else 0
    return Loads(
        on=on,
        policy=LOAD_POLICIES.index(policy),
        times=np.zeros(n + 1),
        rows=np.zeros(n + 1, dtype=np.int64),
        loaded=np.zeros(n, dtype=np.int64),
        start_s=np.full(n, np.nan),
        end_s=np.full(n, np.nan),
        ints=np.zeros(N_INTS, dtype=np.int64),
    )


@compiled
def _unlink(rings: Any, tier: int, place: int) -> None:
    after, before = rings[tier, place, NEXT], rings[tier, place, PREVIOUS]
    rings[tier, before, NEXT] = after
    rings[tier, after, PREVIOUS] = before


@compiled
def _to_front(rings: Any, tier: int, place: int) -> None:
    first = rings[tier, 0, NEXT]
    rings[tier, place, NEXT] = first
    rings[tier, place, PREVIOUS] = 0
    rings[tier, first, PREVIOUS] = place
    rings[tier, 0, NEXT] = place


@compiled
def write_through(tiers: Tiers, ids: Any, first: int, stop: int) -> None:
    """F9: the blocks ``ids[first:stop]`` have been computed; put them into the tiers that are written through, one tier after the other."""
    for tier in range(len(tiers.counts)):
        if tiers.counts[tier, THROUGH] == 1:
            for j in range(first, stop):
                put(tiers, tier, ids[j])


@entry
def move_down(tiers: Tiers, block_id: int) -> None:
    """F2: a block is evicted from HBM; let the tiers keep it."""
    put(tiers, 0, block_id)


@compiled
def put(tiers: Tiers, first: int, block_id: int) -> None:
    """F2: let a tier keep a block, each passing on the one it has not used for longest."""
    rings, counts = tiers.rings, tiers.counts
    place = block_id + 1
    for tier in range(first, len(counts)):
        if rings[tier, place, NEXT] != ABSENT:
            _unlink(rings, tier, place)
            _to_front(rings, tier, place)
            return
        evicted = 0
        if counts[tier, SIZE] == counts[tier, CAPACITY]:
            evicted = rings[tier, 0, PREVIOUS]
            _unlink(rings, tier, evicted)
            rings[tier, evicted, NEXT] = ABSENT
        else:
            counts[tier, SIZE] += 1
        _to_front(rings, tier, place)
        counts[tier, STORED] += 1
        if evicted == 0:
            return
        place = evicted


@compiled
def find_run(tiers: Tiers, ids: Any, first: int, stop: int) -> int:
    """F3: how many of the blocks ``ids[first:stop]`` are held by some tier, up to the first that is not; see ON_WAY."""
    rings, counts = tiers.rings, tiers.counts
    counts[:, ON_WAY] = 0
    for j in range(first, stop):
        tier = 0
        while tier < len(counts) and rings[tier, ids[j] + 1, NEXT] == ABSENT:
            tier += 1
        if tier == len(counts):
            return j - first
        counts[tier, ON_WAY] += 1
    return stop - first


@compiled
def start_load(
    tiers: Tiers, loads: Loads, ids: Any, first: int, stop: int, row: int, n_loading: int, now: float, prefill_s: float
) -> bool:
    """F4, F6, F7: load the run that :func:`find_run` has just found, unless computing it again takes no longer.

    ``n_loading`` is the number of loads on their way. Returns whether there is one more.
    """
    rings, counts, times = tiers.rings, tiers.counts, tiers.times
    ready = now
    for tier in range(len(counts)):
        if counts[tier, ON_WAY] > 0:
            end = max(now, times[tier, LINK_FREE_S]) + counts[tier, ON_WAY] * times[tier, BLOCK_S]
            ready = max(ready, end + times[tier, LATENCY_S])
    loads.loaded[row] = -1
    if loads.policy == NEVER or (loads.policy == CHEAPER and ready - now >= prefill_s):
        loads.ints[DECLINED] += 1
        return False
    for tier in range(len(counts)):
        if counts[tier, ON_WAY] > 0:
            times[tier, LINK_FREE_S] = max(now, times[tier, LINK_FREE_S]) + counts[tier, ON_WAY] * times[tier, BLOCK_S]
            counts[tier, LOADED] += counts[tier, ON_WAY]
    for j in range(stop - 1, first - 1, -1):
        tier = 0
        while rings[tier, ids[j] + 1, NEXT] == ABSENT:
            tier += 1
        _unlink(rings, tier, ids[j] + 1)
        _to_front(rings, tier, ids[j] + 1)
    loads.start_s[row] = now
    loads.end_s[row] = ready
    loads.ints[STARTED] += 1
    push_arrival(loads.times, loads.rows, n_loading, ready, row)
    return True


@compiled
def drop_load(loads: Loads, n_loading: int, row: int, now: float) -> bool:
    """M12: a client leaves; return whether its request was loading."""
    found = False
    for i in range(n_loading):
        found = found or loads.rows[i] == row
    if found:
        loads.end_s[row] = now
        kept = 0
        for i in range(n_loading):
            if loads.rows[i] != row:
                kept = push_arrival(loads.times, loads.rows, kept, loads.times[i], loads.rows[i])
    return found


@entry
def next_ready(loads: Loads, n_loading: int) -> float:
    """When the next load will be there; infinity if none is on its way. [s]"""
    if n_loading > 0:
        return float(loads.times[0])
    return math.inf
