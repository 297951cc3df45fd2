"""The arithmetic of skipping ahead: runs of steps whose lengths are an arithmetic progression, in closed form.

A run of k decode steps that starts at t takes d0, d0 + q, d0 + 2q, …: the sum S of attended keys grows by the same amount in every
step. Here are its end, its steps before an instant, its share of the ITL histogram, the KV blocks it takes, and the keys it sees
through a window. Everything is compiled; nothing knows a request.
"""

import math
from typing import Any

from simulator.engine.jit import inlined
from simulator.engine.records import ITL_BINS, ITL_MIN_EXPONENT

RAW_SHIFT = 45
"""Bits of a float64 below the 7 leading mantissa bits that index an ITL bin."""
RAW_ORIGIN = (1023 + ITL_MIN_EXPONENT) << 7


@inlined
def blocks_for(tokens: int, block_size: int) -> int:
    """Blocks that hold ``tokens``; a shift for vLLM's usual 16, because integer division is slow."""
    if block_size == 16:
        return (tokens + 15) >> 4
    return (tokens + block_size - 1) // block_size


@inlined
def residue(tokens: int, block_size: int) -> int:
    """Non-negative ``tokens`` mod ``block_size``."""
    if block_size == 16:
        return tokens & 15
    return tokens % block_size


@inlined
def blocks_before_window(tokens: int, window: int, chunked: bool, block_size: int) -> int:
    """W2: blocks all of whose tokens lie before the first that the next token sees, once ``tokens`` tokens are computed."""
    if chunked:
        return tokens // window * window // block_size
    return max(0, tokens - window + 1) // block_size


@inlined
def end_of_steps(t: float, d0: float, q: float, k: int) -> float:
    """End of the k-th step of a progression that starts at t; written once, so that every use rounds alike."""
    return t + (k * d0 + q * (0.5 * (k * (k - 1))))


@inlined
def steps_to_reach(t: float, d0: float, q: float, target: float, k_max: int) -> int:
    """Smallest k in 1 … k_max whose step ends at or after ``target`` (k_max if none does)."""
    if end_of_steps(t, d0, q, k_max) < target or k_max <= 1:
        return k_max
    dt = target - t
    if q == 0.0:
        guess = dt / d0
    else:
        half = d0 - 0.5 * q
        guess = 2.0 * dt / (half + math.sqrt(half * half + 2.0 * q * dt))
    k = min(max(math.ceil(guess), 1), k_max)
    while k > 1 and end_of_steps(t, d0, q, k - 1) >= target:
        k -= 1
    while end_of_steps(t, d0, q, k) < target:
        k += 1
    return k


@inlined
def count_itl(itl: Any, bits_f: Any, bits_i: Any, d0: float, q: float, k: int, weight: int) -> None:
    """Add the latencies d0 + q·i, i < k, each ``weight`` times."""
    i = 0
    while i < k:
        bits_f[0] = d0 + q * i
        raw = bits_i[0] >> RAW_SHIFT
        index = min(max(raw - RAW_ORIGIN, 0), ITL_BINS - 1)
        bits_f[0] = d0 + q * (k - 1)
        if bits_i[0] >> RAW_SHIFT == raw or q == 0.0:
            itl[index] += (k - i) * weight
            return
        bits_i[0] = (raw + 1) << RAW_SHIFT
        edge = bits_f[0]
        after = min(max(math.ceil((edge - d0) / q), i + 1), k)
        while after > i + 1 and d0 + q * (after - 1) >= edge:
            after -= 1
        while after < k and d0 + q * after < edge:
            after += 1
        itl[index] += (after - i) * weight
        i = after


@inlined
def steps_with_blocks(residues: Any, block_size: int, gives: bool, step: int, k: int, cycle: int, free: int) -> int:
    """Largest number of decode steps, at most k, that ``free`` blocks allow.

    The batch takes ``cycle`` blocks in ``block_size`` steps; where it ``gives`` blocks back too, those follow in ``residues``.
    """
    if free >= cycle * ((k - 1) // block_size + 1):
        return k
    i = residue(-step, block_size)
    net = cycle
    room = cycle  # blocks that must be free for a cycle
    if gives:
        net = 0
        room = 0
        place = i
        for _ in range(block_size):
            net += residues[place]
            room = max(room, net)
            net -= residues[block_size + place]
            place = place - 1 if place > 0 else block_size - 1
        if net == 0 and free >= room:
            return k
    cycles = (free - room) // net + 1 if free >= room else 0
    rest = free - cycles * net
    steps = cycles * block_size
    while steps < k and residues[i] <= rest:
        rest -= residues[i]
        if gives:
            rest += residues[block_size + i]
        steps += 1
        i = i - 1 if i > 0 else block_size - 1
    return min(steps, k)


@inlined
def take_blocks(
    residues: Any, block_size: int, gives: bool, step: int, k: int, owned: int, d0: float, q: float
) -> tuple[int, float]:
    """Blocks owned after k decode steps from ``step`` on, and Σ over them of (blocks owned) × (step length).

    ``gives``: as of :func:`steps_with_blocks`; what a step gives back is owned until its end.
    """
    i = residue(-step, block_size)
    total = 0.0
    own = owned
    first = 0
    if k > block_size:  # whole cycles, each taking the same number of blocks, summed in closed form
        cycles = k // block_size
        first = cycles * block_size
        a0 = 0.0
        a1 = 0.0
        for j in range(block_size):
            own += residues[i]
            a0 += own
            a1 += float(own) * j
            if gives:
                own -= residues[block_size + i]
            i = i - 1 if i > 0 else block_size - 1
        net = own - owned
        s1 = 0.5 * cycles * (cycles - 1)
        s2 = (cycles - 1) * cycles * (2.0 * cycles - 1) / 6.0
        per = float(block_size)
        total = cycles * (d0 * a0 + q * a1)
        total += s1 * (d0 * net * per + q * per * a0 + q * net * 0.5 * per * (per - 1))
        total += s2 * q * per * per * net
        own = owned + cycles * net
    length = d0 + q * first
    for _ in range(first, k):
        own += residues[i]
        total += own * length
        if gives:
            own -= residues[block_size + i]
        length += q
        i = i - 1 if i > 0 else block_size - 1
    return own, total


@inlined
def window_pairs(context: int, window: int, chunked: bool) -> int:
    """Σ w(t) over t = 1 … ``context``: windowed keys of the first ``context`` queries of a sequence."""
    if chunked:
        cycles = context // window
        rest = context - cycles * window
        return cycles * (window * (window + 1) // 2) + rest * (rest + 1) // 2
    if context <= window:
        return context * (context + 1) // 2
    return window * (window + 1) // 2 + (context - window) * window


@inlined
def spread(timeline: Any, row: int, interval: float, start: float, end: float, weight: float) -> None:
    """Add ``weight`` × time to the intervals that [start, end] touches, in proportion."""
    b = int(start / interval)
    x = start
    while x < end:
        edge = min((b + 1) * interval, end)
        if edge > x:
            timeline[row, b] += weight * (edge - x)
            x = edge
        b += 1
