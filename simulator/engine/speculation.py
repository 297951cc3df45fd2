"""Speculative decoding in the skip-ahead engine: sequences that grow by different, broken numbers of tokens per step.

Progress is counted in units of 2**-16 tokens (P3 of ``docs/engine-speculation.md``). A sequence's rate is constant while the
level is, so the batch's keys S still grow by the same amount in every step. What the plain engine keeps by residues of block size and by
windows that grow one key per step is kept here for each sequence:

* a ring of lists says which sequences take KV blocks at which step: a sequence gains at least a token per step, so its next block is at
  most ``block_size`` steps away. Taking a block is O(1), a step without one costs one look at the ring;
* a heap holds the steps at which windows fill up, or start over.

All functions take :class:`Spec` and plain numbers; nothing here knows the queue or the clock.
"""

import math
from typing import Any, NamedTuple

from simulator.engine.heaps import pop_key, push_key
from simulator.engine.jit import compiled, inlined
from simulator.engine.progressions import blocks_for

UNIT_BITS = 16
UNIT = 1 << UNIT_BITS
PER_TOKEN = 1.0 / UNIT
SLOT_BITS = 20
"""As in the engine's finish keys: step << SLOT_BITS | slot."""
SLOT_MASK = (1 << SLOT_BITS) - 1

# indices into Spec.ints; sums of contexts and rates are in units of 2**-16 tokens
LEVEL, KEYS, RATE, SEEN, SEEN_RATE, N_WINDOW_EVENTS, EXTRA_TOKENS, N_SPEC_INTS = range(8)
# indices into Spec.floats
SHARE_V, CHUNK_DRAFT, N_SPEC_FLOATS = range(3)


class DecodeTerms(NamedTuple):
    """What the decoding sequences add to a step, and by how much that grows in the next."""

    seconds: float
    slope: float
    growth: float


class Spec(NamedTuple):
    """Tables and state of speculative decoding; with ``on`` False all arrays are empty.

    Attributes
    ----------
    lookahead, mask, block_size
        KV slots beyond the last token's; size of the ring less one; tokens per block.
    window, chunked
        keys that windowed layers see, 0 for none, and whether windows are chunks of the context.
    levels, queries, rates, classes
        level by batch, tokens verified by level, rate by class and level, class by row (or of length 0: all 0).
    value, slope, seq, window_slope, draft, draft_slope, chunk
        of the SpeculationCost; ``slope`` is that of verification and drafting together.
    base
        [slots] prompt tokens less one: what ``computed`` is before any output.
    progress, rate
        [slots] tokens emitted, at the step ``since``; and tokens per step.
    since
        [slots] step at which ``progress`` holds.
    v
        [slots] running sum of waste at ``since``.
    blocks, need, block_step
        [slots] blocks owned; how many it takes at step ``block_step``.
    ring_first, ring_need, ring_after, ring_before
        lists of the sequences by ``block_step``, and the blocks each list takes.
    seen, seen_since, growing, event_step, events
        [slots] windowed keys at step ``seen_since``; whether they grow; step at which that ends; heap of those steps.
    ints, floats
        see the indices above.
    passes, keys, window_keys, chunk_steps, wasted
        as in SpeculationResult.
    """

    on: bool
    lookahead: int
    mask: int
    block_size: int
    window: int
    chunked: bool
    levels: Any
    queries: Any
    rates: Any
    classes: Any
    value: Any
    slope: Any
    seq: Any
    window_slope: Any
    draft: Any
    draft_slope: Any
    chunk: Any
    base: Any
    progress: Any
    rate: Any
    since: Any
    seen_since: Any
    v: Any
    blocks: Any
    need: Any
    block_step: Any
    ring_first: Any
    ring_need: Any
    ring_after: Any
    ring_before: Any
    seen: Any
    growing: Any
    event_step: Any
    events: Any
    ints: Any
    floats: Any
    passes: Any
    keys: Any
    window_keys: Any
    chunk_steps: Any
    wasted: Any


@inlined
def _ring_add(spec: Spec, slot: int) -> None:
    """Put a sequence into the list of its ``block_step``."""
    at = spec.block_step[slot] & spec.mask
    first = spec.ring_first[at]
    spec.ring_before[slot] = -1
    spec.ring_after[slot] = first
    if first >= 0:
        spec.ring_before[first] = slot
    spec.ring_first[at] = slot
    spec.ring_need[at] += spec.need[slot]


@inlined
def _ring_remove(spec: Spec, slot: int) -> None:
    """Take a sequence out of its list."""
    at = spec.block_step[slot] & spec.mask
    before, after = spec.ring_before[slot], spec.ring_after[slot]
    if before >= 0:
        spec.ring_after[before] = after
    else:
        spec.ring_first[at] = after
    if after >= 0:
        spec.ring_before[after] = before
    spec.ring_need[at] -= spec.need[slot]


@inlined
def _ring_place(spec: Spec, slot: int, step: int) -> None:
    """Find the first step from ``step`` on at which a sequence lacks blocks (P2), and list it there."""
    rate = spec.rate[slot]
    now = spec.progress[slot] + (step - spec.since[slot]) * rate
    room = spec.blocks[slot] * spec.block_size - spec.base[slot] - spec.lookahead
    passes = 0
    if room > 0:
        missing = (room << UNIT_BITS) - now
        if missing > 0:
            passes = (missing + rate - 1) // rate
    held = spec.base[slot] + ((now + passes * rate) >> UNIT_BITS) + 1 + spec.lookahead
    spec.need[slot] = blocks_for(held, spec.block_size) - spec.blocks[slot]
    spec.block_step[slot] = step + passes
    _ring_add(spec, slot)


@compiled
def take_own_blocks(spec: Spec, slot: int, step: int) -> None:
    """Let one sequence take the blocks it needs at ``step``."""
    _ring_remove(spec, slot)
    spec.blocks[slot] += spec.need[slot]
    _ring_place(spec, slot, step)


@compiled
def take_blocks_of_step(spec: Spec, step: int) -> None:
    """Let every sequence take the blocks it needs at ``step``."""
    at = step & spec.mask
    slot = spec.ring_first[at]
    spec.ring_first[at] = -1
    spec.ring_need[at] = 0
    while slot >= 0:
        after = spec.ring_after[slot]
        spec.blocks[slot] += spec.need[slot]
        _ring_place(spec, slot, step)
        slot = after


@compiled
def take_blocks_of_steps(
    spec: Spec, step: int, k: int, free: int, owned: int, d0: float, q: float
) -> tuple[int, int, float]:
    """Take blocks for up to ``k`` steps of lengths d0, d0 + q, …, as many as ``free`` blocks allow.

    Returns the steps taken, the blocks then owned, and Σ over the steps of (blocks owned) × (step length). The first step must fit.
    """
    total = 0.0
    first = 0
    for j in range(k):
        need = spec.ring_need[(step + j) & spec.mask]
        if need > 0:
            if need > free:
                k = j
                break
            total += owned * ((j - first) * d0 + q * (0.5 * (j * (j - 1) - first * (first - 1))))
            first = j
            take_blocks_of_step(spec, step + j)
            free -= need
            owned += need
    total += owned * ((k - first) * d0 + q * (0.5 * (k * (k - 1) - first * (first - 1))))
    return k, owned, total


@inlined
def _window_event(spec: Spec, slot: int, step: int) -> None:
    """Note when a sequence's windowed keys stop growing, or start over; ``seen`` holds at ``step``."""
    seen, rate = spec.seen[slot], spec.rate[slot]
    full = spec.window << UNIT_BITS
    if spec.chunked:
        spec.growing[slot] = 1
        passes = (full + UNIT - seen + rate - 1) // rate
    elif seen < full:
        spec.growing[slot] = 1
        passes = (full - seen + rate - 1) // rate
    else:
        spec.growing[slot] = 0
        spec.event_step[slot] = -1
        return
    spec.event_step[slot] = step + passes
    ints = spec.ints
    if ints[N_WINDOW_EVENTS] == len(spec.events):
        size = 0
        for i in range(ints[N_WINDOW_EVENTS]):
            key = spec.events[i]
            if spec.event_step[key & SLOT_MASK] == key >> SLOT_BITS:
                size = push_key(spec.events, size, key)
        ints[N_WINDOW_EVENTS] = size
    ints[N_WINDOW_EVENTS] = push_key(spec.events, ints[N_WINDOW_EVENTS], spec.event_step[slot] << SLOT_BITS | slot)


@inlined
def seen_of(spec: Spec, context: int) -> int:
    """Windowed keys of a context, both in units (P4)."""
    full = spec.window << UNIT_BITS
    if spec.chunked:
        return (context - UNIT) % full + UNIT
    return min(context, full)


@inlined
def context_of(spec: Spec, slot: int) -> int:
    """Keys that a sequence's last token sees at the step of its progress, in units."""
    return ((spec.base[slot] + 1) << UNIT_BITS) + spec.progress[slot]


@inlined
def _settle_window(spec: Spec, slot: int, row: int, step: int, busy: Any) -> None:
    """Charge a sequence for its windowed keys since ``seen_since``, and bring ``seen`` to ``step``."""
    n = step - spec.seen_since[slot]
    grows = spec.growing[slot] * spec.rate[slot]
    keys = (n * spec.seen[slot] + grows * (n * (n - 1) // 2)) * PER_TOKEN
    busy[row] += spec.window_slope[spec.ints[LEVEL]] * keys
    spec.seen[slot] += n * grows
    spec.seen_since[slot] = step


@inlined
def settle(
    spec: Spec, slot: int, row: int, step: int, origin: int, w: float, r0: float, r1: float, busy: Any
) -> None:
    """Charge a sequence for the steps since it was last settled (P5), and bring its progress to ``step``.

    ``w``, ``r0`` and ``r1`` are what the batch's running sums of shares have gained meanwhile; r1 counts steps from ``origin``.
    """
    n = step - spec.since[slot]
    rate = spec.rate[slot]
    growth = n * (n - 1) // 2
    context = context_of(spec, slot)
    level = spec.ints[LEVEL]
    first = (context - (spec.since[slot] - origin) * rate) * PER_TOKEN
    pays = w + first * r0 + rate * PER_TOKEN * r1
    if spec.window > 0:
        _settle_window(spec, slot, row, step, busy)
    busy[row] += pays
    q = spec.queries[level]
    if q > 1:
        keys = (n * context + rate * growth) * PER_TOKEN
        rejected = q - rate * PER_TOKEN
        spec.wasted[row] += rejected * (
            spec.floats[SHARE_V] - spec.v[slot] + spec.draft_slope[level] * keys / (q - 1)
        )
    spec.v[slot] = spec.floats[SHARE_V]
    before = spec.progress[slot]
    spec.progress[slot] = before + n * rate
    spec.ints[EXTRA_TOKENS] += (spec.progress[slot] >> UNIT_BITS) - (before >> UNIT_BITS) - n
    spec.since[slot] = step


@inlined
def emitted_of(spec: Spec, slot: int) -> int:
    """Tokens a sequence has emitted at the step of its progress."""
    return int(spec.progress[slot] >> UNIT_BITS)


@inlined
def passes_left(spec: Spec, slot: int, output: int) -> int:
    """Passes until a sequence has emitted ``output`` tokens."""
    rate = spec.rate[slot]
    return int(((output << UNIT_BITS) - spec.progress[slot] + rate - 1) // rate)


@inlined
def _add(spec: Spec, slot: int, row: int, step: int) -> None:
    """Give a sequence its rate at the present level, and add it to the batch's sums."""
    ints = spec.ints
    kind = spec.classes[row] if len(spec.classes) > 0 else 0
    spec.rate[slot] = spec.rates[kind, ints[LEVEL]]
    context = context_of(spec, slot)
    ints[KEYS] += context
    ints[RATE] += spec.rate[slot]
    if spec.window > 0:
        spec.seen[slot] = seen_of(spec, context)
        spec.seen_since[slot] = step
        ints[SEEN] += spec.seen[slot]
        _window_event(spec, slot, step)
        ints[SEEN_RATE] += spec.growing[slot] * spec.rate[slot]
    _ring_place(spec, slot, step)


@inlined
def _subtract(spec: Spec, slot: int) -> None:
    """Take a settled sequence out of the batch's sums."""
    ints = spec.ints
    ints[KEYS] -= context_of(spec, slot)
    ints[RATE] -= spec.rate[slot]
    if spec.window > 0:
        ints[SEEN] -= spec.seen[slot]
        ints[SEEN_RATE] -= spec.growing[slot] * spec.rate[slot]
        spec.event_step[slot] = -1
    _ring_remove(spec, slot)
    spec.block_step[slot] = -1


@compiled
def join(spec: Spec, slot: int, row: int, step: int, prompt: int, emitted: int) -> None:
    """Let a sequence start decoding with ``emitted`` tokens; the fraction of its earlier progress stays (P3)."""
    spec.base[slot] = prompt - 1
    spec.progress[slot] = (emitted << UNIT_BITS) | (spec.progress[slot] & (UNIT - 1))
    spec.blocks[slot] = blocks_for(prompt + emitted - 1, spec.block_size)
    spec.since[slot] = step
    spec.v[slot] = spec.floats[SHARE_V]
    _add(spec, slot, row, step)


@compiled
def leave(spec: Spec, slot: int) -> None:
    """Take a settled sequence out of the batch; its blocks are the caller's to free."""
    _subtract(spec, slot)


@inlined
def cut_surplus(spec: Spec, slot: int, output: int) -> None:
    """Take what the last pass of a finished sequence gave beyond its ``output`` off the count."""
    spec.ints[EXTRA_TOKENS] -= emitted_of(spec, slot) - output


@compiled
def change_rate(spec: Spec, slot: int, row: int, step: int) -> None:
    """Bring a settled sequence to the new level. Its keys in ``Spec.ints`` move with it."""
    _subtract(spec, slot)
    _add(spec, slot, row, step)


@compiled
def pass_window_events(spec: Spec, step: int, busy: Any, rows: Any) -> None:
    """Bring windowed sums to ``step``, charging the sequences whose window fills or starts over for their keys so far."""
    ints = spec.ints
    while ints[N_WINDOW_EVENTS] > 0:
        key = spec.events[0]
        slot = key & SLOT_MASK
        due = key >> SLOT_BITS
        if spec.event_step[slot] == due:
            if due > step:
                return
            ints[N_WINDOW_EVENTS] = pop_key(spec.events, ints[N_WINDOW_EVENTS])
            _settle_window(spec, slot, rows[slot], step, busy)
            ints[SEEN] -= spec.seen[slot]
            ints[SEEN_RATE] -= spec.growing[slot] * spec.rate[slot]
            spec.seen[slot] = seen_of(spec, context_of(spec, slot) + (step - spec.since[slot]) * spec.rate[slot])
            _window_event(spec, slot, step)
            ints[SEEN] += spec.seen[slot]
            ints[SEEN_RATE] += spec.growing[slot] * spec.rate[slot]
        else:
            ints[N_WINDOW_EVENTS] = pop_key(spec.events, ints[N_WINDOW_EVENTS])


@inlined
def decode_terms(spec: Spec, knots: Any, knot: int, batch: int) -> DecodeTerms:
    """Verification's attention and drafting (P4) on the piece of the cost curve that starts at ``knot``."""
    ints = spec.ints
    level = ints[LEVEL]
    slope = spec.slope[level, knot]
    seconds = spec.value[level, knot] + slope * (ints[KEYS] * PER_TOKEN - knots[knot])
    # The drafts' own slope starts at 0 keys, the curve's piece at its knot.
    seconds += spec.draft_slope[level] * knots[knot]
    seconds += spec.seq[level] * batch + spec.draft[level, batch]
    growth = slope * (ints[RATE] * PER_TOKEN)
    if spec.window > 0:
        seconds += spec.window_slope[level] * (ints[SEEN] * PER_TOKEN)
        growth += spec.window_slope[level] * (ints[SEEN_RATE] * PER_TOKEN)
    return DecodeTerms(seconds, slope, growth)


@inlined
def steps_in_reach(spec: Spec, knots: Any, knot: int, step: int, k: int) -> int:
    """Steps, at most k, until a knot of the cost curve or a window is crossed."""
    ints = spec.ints
    if knot + 1 < len(knots):
        edge = math.ceil(knots[knot + 1] * UNIT)
        k = min(k, (edge - ints[KEYS] + ints[RATE] - 1) // ints[RATE])
    while ints[N_WINDOW_EVENTS] > 0:
        key = spec.events[0]
        if spec.event_step[key & SLOT_MASK] == key >> SLOT_BITS:
            return min(k, (key >> SLOT_BITS) - step)
        ints[N_WINDOW_EVENTS] = pop_key(spec.events, ints[N_WINDOW_EVENTS])
    return k


@inlined
def count_passes(spec: Spec, batch: int, k: int, per_token: float, per_row: float) -> None:
    """Count k steps of the batch, and let its sums grow."""
    ints = spec.ints
    level = ints[LEVEL]
    growth = 0.5 * (k * (k - 1))
    spec.passes[level, batch] += k
    spec.keys[level] += (k * ints[KEYS] + ints[RATE] * growth) * PER_TOKEN
    ints[KEYS] += k * ints[RATE]
    if spec.window > 0:
        spec.window_keys[level] += (k * ints[SEEN] + ints[SEEN_RATE] * growth) * PER_TOKEN
        ints[SEEN] += k * ints[SEEN_RATE]
    if level > 0:
        share = spec.draft[level, batch] / (batch * (spec.queries[level] - 1))
        spec.floats[SHARE_V] += k * (per_token + per_row + share)


@inlined
def chunk_time(spec: Spec, tokens: int) -> float:
    """The drafter's pass over a step's chunk tokens."""
    spec.chunk_steps[tokens] += 1
    spec.floats[CHUNK_DRAFT] += spec.chunk[tokens]
    return float(spec.chunk[tokens])
