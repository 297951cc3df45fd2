"""Speculative decoding in the skip-ahead engine: sequences that grow by different, broken numbers of tokens per step.

Progress is counted in units of 2**-16 tokens (P3 of ``docs/engine-speculation.md``). A sequence's rate is constant while the
level is, so the batch's keys S still grow by the same amount in every step. What the plain engine keeps by residues of block size and by
windows that grow one key per step is kept here for each sequence:

* a ring of lists says which sequences take KV blocks at which step: a sequence gains at least a token per step, so its next block is at
  most ``block_size`` steps away. Taking a block is O(1), a step without one costs one look at the ring. Where layers with a window give blocks back, a
  second list of each step says who does before it; a sequence whose window leaves none for longer is looked at every ``block_size`` steps;
* a heap holds the steps at which windows fill up, or start over.

Nothing here knows the queue or the clock. Functions are compiled apart from the engine's loop and take few arrays, which is what
keeps both the calls and the compilation short.
"""

import math
from typing import Any, NamedTuple

from simulator.engine.heaps import pop_key, push_key
from simulator.engine.jit import compiled, inlined
from simulator.engine.progressions import blocks_before_window, blocks_for

UNIT_BITS = 16
UNIT = 1 << UNIT_BITS
PER_TOKEN = 1.0 / UNIT
SLOT_BITS = 20
"""As in the engine's finish keys: step << SLOT_BITS | slot."""
SLOT_MASK = (1 << SLOT_BITS) - 1

# indices into Batch.ints; contexts and rates are in units of 2**-16 tokens
(
    LEVEL,
    KEYS,
    RATES,
    SEEN_KEYS,
    SEEN_RATES,
    N_WINDOW_EVENTS,
    EXTRA_TOKENS,
    MOMENT,
    BATCH_SIZE,
    GIVEN,
    N_GIFTS,
    N_SPEC_INTS,
) = range(12)
# columns of Batch.slots
(
    BASE,
    PROGRESS,
    RATE,
    SINCE,
    PAGES,
    PASSED,
    NEED,
    NEED_STEP,
    NEED_AFTER,
    NEED_BEFORE,
    GIVE,
    GIVE_STEP,
    GIVE_AFTER,
    GIVE_BEFORE,
    GIVE_TO,
    IS_GIFT,
    GIFT,
    KEPT,
    MOST,
    SEEN,
    SEEN_SINCE,
    GROWING,
    EVENT_STEP,
    N_SLOT_COLUMNS,
) = range(24)
# the first of the four columns of Batch.slots, and of the two rows of Batch.ring, of either kind of list: amount, step, neighbours; and
# first, sum of amounts
NEEDS, TAKES = NEED, 0
GIVES_BACK, GIVES = GIVE, 2
GIFTS, N_RING_ROWS = range(4, 6)
AMOUNT, AT_STEP, NEXT_IN_LIST, PREVIOUS_IN_LIST = range(4)
# columns of Tariff.levels
QUERIES, SEQ, WINDOW_SLOPE, N_LEVEL_COLUMNS = range(4)
# layers of Tariff.draft_curve
DRAFT_VALUE, DRAFT_SLOPE = 0, 1
# indices into Tariff.floats: running sums of what rejected drafts cost, like those of shares in the engine's loop, and times
SHARE_V, SHARE_D0, SHARE_D1, CHUNK_DRAFT, KEYS_DRAFT, N_SPEC_FLOATS = range(6)


class Batch(NamedTuple):
    """The sequences that decode.

    Attributes
    ----------
    ints
        level in force, and the batch's sums: see the indices above.
    slots
        [slots, columns] of a sequence: ``BASE`` prompt tokens less one, which is ``computed`` before any output; ``PROGRESS`` tokens emitted by step
        ``SINCE``, and ``RATE`` per step; ``PAGES`` blocks of each group, of which ``PASSED`` of the windowed ones are given back (W2);
        ``NEED`` more blocks at ``NEED_STEP``, and neighbours in that step's list; ``GIVE`` fewer before ``GIVE_STEP``, likewise, when ``GIVE_TO`` are passed;
        of each group the first ``KEPT`` can be found in a prefix cache; leaving one of them, which may be soon, ``IS_GIFT`` and not counted in ``GIVE``; ``GIFT`` lists the sequences that have; ``MOST`` tokens that it computes; ``SEEN``
        windowed keys at ``SEEN_SINCE``, whether they are ``GROWING``, and the ``EVENT_STEP`` at which that changes.
    ring
        first sequence of the list of each step, and the blocks that the list needs; the same of those that give back before the step; and how many of these
        may leave blocks that can be found.
    events
        heap of window events.
    lookahead, mask, block_size
        KV slots beyond the last token's; size of the ring less one; tokens per block.
    groups, windowed
        groups of layers, each with blocks of its own, and those of them that have a window.
    window, chunked
        keys that windowed layers see, 0 for none, and whether windows are chunks of the context.
    """

    ints: Any
    slots: Any
    ring: Any
    events: Any
    lookahead: int
    mask: int
    block_size: int
    groups: int
    windowed: int
    window: int
    chunked: bool


class Tariff(NamedTuple):
    """What passes cost, who pays, and what was counted.

    ``levels`` [levels, columns] and the curves ``value``, ``slope`` (verification and drafting together), ``draft_curve``, ``draft`` and ``chunk`` are
    those of SpeculationCost; ``v`` [slots, 3] are the running sums of waste when a sequence was last settled; the rest as in SpeculationResult.
    """

    levels: Any
    value: Any
    slope: Any
    draft_curve: Any
    draft: Any
    chunk: Any
    floats: Any
    v: Any
    wasted: Any
    passes: Any
    keys: Any
    chunk_steps: Any


class Spec(NamedTuple):
    """Speculative decoding of a replica; with ``on`` False all arrays are empty.

    ``level_by_batch``; ``rates`` by class and level; ``classes`` by row, of length 0 if all are 0; ``fraction`` [requests] of a token that a
    preempted request's progress has beyond its emitted ones (P3).
    """

    on: bool
    batch: Batch
    tariff: Tariff
    level_by_batch: Any
    rates: Any
    classes: Any
    fraction: Any


class DecodeTerms(NamedTuple):
    """What the decoding sequences add to a step, its slope per key, and by how much it grows from step to step."""

    seconds: float
    slope: float
    growth: float


@inlined
def _unlist(batch: Batch, slot: int, columns: int, rows: int) -> None:
    """Take a sequence out of the list of its step."""
    slots, ring = batch.slots, batch.ring
    at = slots[slot, columns + AT_STEP] & batch.mask
    before, after = slots[slot, columns + PREVIOUS_IN_LIST], slots[slot, columns + NEXT_IN_LIST]
    if before >= 0:
        slots[before, columns + NEXT_IN_LIST] = after
    else:
        ring[rows, at] = after
    if after >= 0:
        slots[after, columns + PREVIOUS_IN_LIST] = before
    ring[rows + 1, at] -= slots[slot, columns + AMOUNT]


@inlined
def _list(batch: Batch, slot: int, columns: int, rows: int, step: int, amount: int) -> None:
    """Put a sequence into the list of a step."""
    slots, ring = batch.slots, batch.ring
    at = step & batch.mask
    first = ring[rows, at]
    slots[slot, columns + AMOUNT] = amount
    slots[slot, columns + AT_STEP] = step
    slots[slot, columns + PREVIOUS_IN_LIST] = -1
    slots[slot, columns + NEXT_IN_LIST] = first
    if first >= 0:
        slots[first, columns + PREVIOUS_IN_LIST] = slot
    ring[rows, at] = slot
    ring[rows + 1, at] += amount


@inlined
def _list_need(batch: Batch, slot: int, step: int) -> None:
    """Find the first step from ``step`` on at which a sequence lacks blocks (P2), and list it there."""
    slots = batch.slots
    rate = slots[slot, RATE]
    now = slots[slot, PROGRESS] + (step - slots[slot, SINCE]) * rate
    room = slots[slot, PAGES] * batch.block_size - slots[slot, BASE] - batch.lookahead
    missing = (room << UNIT_BITS) - now
    passes = (missing + rate - 1) // rate if missing > 0 else 0
    held = slots[slot, BASE] + ((now + passes * rate) >> UNIT_BITS) + 1 + batch.lookahead
    pages = blocks_for(held, batch.block_size) - slots[slot, PAGES]
    _list(batch, slot, NEEDS, TAKES, step + passes, batch.groups * pages)


@compiled
def _list_gift(batch: Batch, slot: int, step: int) -> None:
    """Find the first step after ``step`` before which a sequence's window leaves blocks (W2, W6), and list it there.

    One that is further off than ``block_size`` steps is looked for again then.
    """
    slots, window = batch.slots, batch.window
    rate = slots[slot, RATE]
    now = slots[slot, PROGRESS] + (step - slots[slot, SINCE]) * rate
    computed = slots[slot, BASE] + (now >> UNIT_BITS)
    if batch.chunked:
        target = (computed // window + 1) * window
    else:
        target = (slots[slot, PASSED] + 1) * batch.block_size + window - 1
    far = max(1, (((target - slots[slot, BASE]) << UNIT_BITS) - now + rate - 1) // rate)
    passes = min(batch.block_size, far)
    computed = min(slots[slot, BASE] + ((now + passes * rate) >> UNIT_BITS), slots[slot, MOST])
    passed = max(blocks_before_window(computed, window, batch.chunked, batch.block_size), slots[slot, PASSED])
    kept = slots[slot, KEPT]
    _list(
        batch, slot, GIVES_BACK, GIVES, step + passes, batch.windowed * max(0, passed - max(slots[slot, PASSED], kept))
    )
    slots[slot, GIVE_TO] = passed
    # A segment of at most block_size steps may pass one at which a sequence is looked for again, and come to where that then leaves a block.
    slots[slot, IS_GIFT] = 1 if slots[slot, PASSED] < kept and far < 2 * batch.block_size else 0
    batch.ring[GIFTS, (step + passes) & batch.mask] += slots[slot, IS_GIFT]


@inlined
def take_own_blocks(batch: Batch, slot: int, step: int) -> None:
    """Let one sequence take the blocks it needs at ``step``."""
    _unlist(batch, slot, NEEDS, TAKES)
    batch.slots[slot, PAGES] += batch.slots[slot, NEED] // batch.groups
    _list_need(batch, slot, step)


@inlined
def take_blocks_of_step(batch: Batch, step: int) -> None:
    """Let every sequence take the blocks it needs at ``step``."""
    at = step & batch.mask
    slot = batch.ring[TAKES, at]
    batch.ring[TAKES, at] = -1
    batch.ring[TAKES + 1, at] = 0
    while slot >= 0:
        after = batch.slots[slot, NEED_AFTER]
        batch.slots[slot, PAGES] += batch.slots[slot, NEED] // batch.groups
        _list_need(batch, slot, step)
        slot = after


@compiled
def give_blocks_before(batch: Batch, step: int) -> int:
    """W2, W6: let every sequence give back what its window has left before ``step``; return how many blocks, without those that can be found.

    Whose window has left some of those is listed in GIFT.
    """
    at = step & batch.mask
    slot = batch.ring[GIVES, at]
    given = batch.ring[GIVES + 1, at]
    batch.ring[GIVES, at] = -1
    batch.ring[GIVES + 1, at] = 0
    batch.ring[GIFTS, at] = 0
    while slot >= 0:
        after = batch.slots[slot, GIVE_AFTER]
        is_gift = batch.slots[slot, PASSED] < min(batch.slots[slot, GIVE_TO], batch.slots[slot, KEPT])
        batch.slots[slot, PASSED] = batch.slots[slot, GIVE_TO]
        if is_gift:
            batch.slots[batch.ints[N_GIFTS], GIFT] = slot
            batch.ints[N_GIFTS] += 1
        _list_gift(batch, slot, step)
        slot = after
    return int(given)


@compiled
def steps_to_gift(batch: Batch, step: int, k: int) -> int:
    """Steps from ``step`` on, at most k and ``block_size``, before the last of which no window leaves blocks that can be found, or is looked at for that."""
    if batch.windowed == 0:
        return k
    most = min(k, batch.block_size)
    k = 1
    while k < most and batch.ring[GIFTS, (step + k) & batch.mask] == 0:
        k += 1
    return k


@compiled
def steps_to_any_gift(batch: Batch, step: int) -> int:
    """Steps from ``step`` on, at most ``block_size``, before the last of which no window leaves blocks."""
    k = 1
    while k < batch.block_size and batch.ring[GIVES, (step + k) & batch.mask] < 0:
        k += 1
    return k


@inlined
def take_blocks_of_steps(
    batch: Batch, step: int, k: int, free: int, owned: int, d0: float, q: float, profile: Any
) -> tuple[int, int, float]:
    """Take blocks for up to ``k`` steps of lengths d0, d0 + q, …, as many as ``free`` blocks allow, and give back what windows leave.

    Returns the steps taken, the blocks then owned, and Σ over the steps of (blocks owned) × (step length). The first step must fit. Where
    windows give blocks back there are at most ``block_size`` steps, and what is owned in each is added to ``profile``.
    """
    total = 0.0
    first = 0
    batch.ints[GIVEN] = 0
    for j in range(k):
        need = batch.ring[TAKES + 1, (step + j) & batch.mask]
        if need > free:
            k = j
            break
        if need > 0:
            total += owned * ((j - first) * d0 + q * (0.5 * (j * (j - 1) - first * (first - 1))))
            first = j
            take_blocks_of_step(batch, step + j)
            free -= need
            owned += need
        if batch.windowed > 0:
            profile[j] += owned
            given = give_blocks_before(batch, step + j + 1)
            if given > 0:
                total += owned * ((j + 1 - first) * d0 + q * (0.5 * ((j + 1) * j - first * (first - 1))))
                first = j + 1
                free += given
                owned -= given
                batch.ints[GIVEN] += given
    total += owned * ((k - first) * d0 + q * (0.5 * (k * (k - 1) - first * (first - 1))))
    return k, owned, total


@inlined
def steps_with_room(batch: Batch, step: int, k: int, free: int) -> int:
    """Steps, at most k, for which ``free`` blocks certainly are enough; 1 if they are for the first."""
    # A sequence may begin a block just before the steps, ends within one, and has not looked ahead yet if it is new (P2).
    each = 2 + (batch.lookahead + batch.block_size) // batch.block_size
    pages = ((k * batch.ints[RATES]) >> UNIT_BITS) // batch.block_size + each * batch.ints[BATCH_SIZE]
    if batch.groups * pages <= free:
        return k
    first = 0
    while first < k - 1 and batch.ring[TAKES + 1, (step + first) & batch.mask] == 0:
        first += 1
    need = batch.ring[TAKES + 1, (step + first) & batch.mask]
    return max(1, first + 1 if need <= free else first)


@inlined
def blocks_of(batch: Batch, slot: int) -> int:
    """Blocks that a sequence owns."""
    return int(batch.groups * batch.slots[slot, PAGES] - batch.windowed * batch.slots[slot, PASSED])


@compiled
def _window_event(batch: Batch, slot: int, step: int) -> None:
    """Set a sequence's windowed keys at ``step``, and note when they stop growing, or start over (P4)."""
    slots, ints = batch.slots, batch.ints
    rate = slots[slot, RATE]
    context = _context(slots, slot) + (step - slots[slot, SINCE]) * rate
    full = batch.window << UNIT_BITS
    seen = (context - UNIT) % full + UNIT if batch.chunked else min(context, full)
    ends = full + UNIT if batch.chunked else full
    growing = 1 if seen < ends else 0
    slots[slot, SEEN] = seen
    slots[slot, SEEN_SINCE] = step
    slots[slot, GROWING] = growing
    ints[SEEN_KEYS] += seen
    ints[SEEN_RATES] += growing * rate
    if growing == 0:
        slots[slot, EVENT_STEP] = -1
        return
    slots[slot, EVENT_STEP] = step + (ends - seen + rate - 1) // rate
    if ints[N_WINDOW_EVENTS] == len(batch.events):
        # Not from the keys that still hold: a slot that changed hands may have left the same key several times.
        size = 0
        for other in range(len(slots)):
            if other != slot and slots[other, EVENT_STEP] >= 0:
                size = push_key(batch.events, size, slots[other, EVENT_STEP] << SLOT_BITS | other)
        ints[N_WINDOW_EVENTS] = size
    key = slots[slot, EVENT_STEP] << SLOT_BITS | slot
    ints[N_WINDOW_EVENTS] = push_key(batch.events, ints[N_WINDOW_EVENTS], key)


@inlined
def _forget_window(batch: Batch, slot: int) -> None:
    """Take a sequence's windowed keys out of the sums; they must hold at the present step."""
    slots, ints = batch.slots, batch.ints
    ints[SEEN_KEYS] -= slots[slot, SEEN]
    ints[SEEN_RATES] -= slots[slot, GROWING] * slots[slot, RATE]
    slots[slot, EVENT_STEP] = -1


@inlined
def _context(slots: Any, slot: int) -> int:
    """Keys that a sequence's last token sees at the step ``SINCE``, in units."""
    return int(((slots[slot, BASE] + 1) << UNIT_BITS) + slots[slot, PROGRESS])


@inlined
def _settle_window(batch: Batch, slope: float, slot: int, step: int) -> float:
    """Bring a sequence's windowed keys to ``step``; return what it pays for those since it was last settled."""
    slots = batch.slots
    n = step - slots[slot, SEEN_SINCE]
    grows = slots[slot, GROWING] * slots[slot, RATE]
    keys = (n * slots[slot, SEEN] + grows * (n * (n - 1) // 2)) * PER_TOKEN
    slots[slot, SEEN] += n * grows
    slots[slot, SEEN_SINCE] = step
    return float(slope * keys)


@inlined
def mark(floats: Any, v: Any, slot: int) -> None:
    """Remember the running sums of waste at which a sequence starts, or goes on."""
    v[slot, 0] = floats[SHARE_V]
    v[slot, 1] = floats[SHARE_D0]
    v[slot, 2] = floats[SHARE_D1]


@inlined
def settle(
    batch: Batch, levels: Any, floats: Any, v: Any, slot: int, step: int, origin: int, w: float, r0: float, r1: float
) -> tuple[float, float]:
    """Bring a sequence's progress to ``step``; return its share of the steps since it was last settled, and what of it is waste (P5).

    ``w``, ``r0`` and ``r1`` are what the batch's running sums of shares have gained meanwhile; r1 counts steps from ``origin``.
    """
    slots = batch.slots
    level = batch.ints[LEVEL]
    n = step - slots[slot, SINCE]
    rate = slots[slot, RATE]
    context = _context(slots, slot)
    first = (context - (slots[slot, SINCE] - origin) * rate) * PER_TOKEN
    pays = w + first * r0 + rate * PER_TOKEN * r1
    if batch.window > 0:
        pays += _settle_window(batch, levels[level, WINDOW_SLOPE], slot, step)
    wasted = 0.0
    q = levels[level, QUERIES]
    if level > 0:
        keys_s = first * (floats[SHARE_D0] - v[slot, 1]) + rate * PER_TOKEN * (floats[SHARE_D1] - v[slot, 2])
        wasted = (q - rate * PER_TOKEN) * (floats[SHARE_V] - v[slot, 0] + keys_s / (q - 1))
    mark(floats, v, slot)
    before = slots[slot, PROGRESS]
    after = before + n * rate
    slots[slot, PROGRESS] = after
    slots[slot, SINCE] = step
    batch.ints[EXTRA_TOKENS] += (after >> UNIT_BITS) - (before >> UNIT_BITS) - n
    return pays, wasted


@inlined
def emitted_of(batch: Batch, slot: int) -> int:
    """Tokens a settled sequence has emitted."""
    return int(batch.slots[slot, PROGRESS] >> UNIT_BITS)


@inlined
def fraction_of(batch: Batch, slot: int) -> int:
    """What a settled sequence's progress has beyond its emitted tokens, in units."""
    return int(batch.slots[slot, PROGRESS] & (UNIT - 1))


@inlined
def start_at(batch: Batch, slot: int, fraction: int) -> None:
    """Let a request that is admitted start with the fraction of its earlier progress (P3)."""
    batch.slots[slot, PROGRESS] = fraction


@inlined
def passes_left(batch: Batch, slot: int, output: int) -> int:
    """Passes until a settled sequence has emitted ``output`` tokens."""
    rate = batch.slots[slot, RATE]
    return int(((output << UNIT_BITS) - batch.slots[slot, PROGRESS] + rate - 1) // rate)


@inlined
def _add(batch: Batch, slot: int, step: int, rate: int) -> None:
    """Add a settled sequence to the batch's sums."""
    batch.slots[slot, RATE] = rate
    batch.ints[KEYS] += _context(batch.slots, slot)
    batch.ints[RATES] += rate
    batch.ints[BATCH_SIZE] += 1
    if batch.window > 0:
        _window_event(batch, slot, step)
    _list_need(batch, slot, step)
    if batch.windowed > 0:
        _list_gift(batch, slot, step)


@compiled
def join(batch: Batch, slot: int, step: int, rate: int, prompt: int, emitted: int, output: int, kept: int) -> None:
    """Let a sequence start decoding with ``emitted`` of its ``output`` tokens; the fraction of its earlier progress stays (P3).

    Of each group its first ``kept`` blocks can be found in a prefix cache.
    """
    slots = batch.slots
    slots[slot, MOST] = prompt + output - 1
    slots[slot, KEPT] = kept
    slots[slot, BASE] = prompt - 1
    slots[slot, PROGRESS] = (emitted << UNIT_BITS) | (slots[slot, PROGRESS] & (UNIT - 1))
    computed = prompt + emitted - 1
    slots[slot, PAGES] = blocks_for(computed, batch.block_size)
    slots[slot, PASSED] = 0
    if batch.windowed > 0:
        slots[slot, PASSED] = blocks_before_window(computed, batch.window, batch.chunked, batch.block_size)
    slots[slot, SINCE] = step
    _add(batch, slot, step, rate)


@compiled
def leave(batch: Batch, slot: int) -> None:
    """Take a settled sequence out of the batch; its blocks are the caller's to free."""
    batch.ints[KEYS] -= _context(batch.slots, slot)
    batch.ints[RATES] -= batch.slots[slot, RATE]
    batch.ints[BATCH_SIZE] -= 1
    if batch.window > 0:
        _forget_window(batch, slot)
    _unlist(batch, slot, NEEDS, TAKES)
    if batch.windowed > 0:
        batch.ring[GIFTS, batch.slots[slot, GIVE_STEP] & batch.mask] -= batch.slots[slot, IS_GIFT]
        _unlist(batch, slot, GIVES_BACK, GIVES)
    batch.slots[slot, NEED_STEP] = -1


@compiled
def change_rate(batch: Batch, slot: int, step: int, rate: int) -> None:
    """Let a settled sequence go on at another rate."""
    leave(batch, slot)
    _add(batch, slot, step, rate)


@inlined
def cut_surplus(batch: Batch, slot: int, output: int) -> None:
    """Take what the last pass of a finished sequence gave beyond its ``output`` off the count."""
    batch.ints[EXTRA_TOKENS] -= emitted_of(batch, slot) - output


@compiled
def pass_window_events(batch: Batch, levels: Any, step: int, busy: Any, rows: Any) -> None:
    """Bring windowed sums to ``step``, charging the sequences whose window fills or starts over for their keys so far."""
    ints = batch.ints
    while ints[N_WINDOW_EVENTS] > 0:
        key = batch.events[0]
        slot = key & SLOT_MASK
        due = key >> SLOT_BITS
        holds = batch.slots[slot, EVENT_STEP] == due
        if holds and due > step:
            return
        ints[N_WINDOW_EVENTS] = pop_key(batch.events, ints[N_WINDOW_EVENTS])
        if holds:
            busy[rows[slot]] += _settle_window(batch, levels[ints[LEVEL], WINDOW_SLOPE], slot, step)
            _forget_window(batch, slot)
            _window_event(batch, slot, step)


@inlined
def steps_in_reach(batch: Batch, next_knot: float, step: int, k: int) -> int:
    """Steps, at most k, until S reaches a knot of the cost curve or a window is crossed."""
    ints = batch.ints
    if next_knot < math.inf:
        edge = math.ceil(next_knot * UNIT)
        k = min(k, (edge - ints[KEYS] + ints[RATES] - 1) // ints[RATES])
    while ints[N_WINDOW_EVENTS] > 0:
        key = batch.events[0]
        if batch.slots[key & SLOT_MASK, EVENT_STEP] == key >> SLOT_BITS:
            return int(min(k, (key >> SLOT_BITS) - step))
        ints[N_WINDOW_EVENTS] = pop_key(batch.events, ints[N_WINDOW_EVENTS])
    return k


@inlined
def decode_terms(spec: Spec, knots: Any, walk: float, knot: int, size: int) -> DecodeTerms:
    """Verification's attention and drafting of ``size`` sequences (P4) on the piece of the cost curve that starts at ``knot``.

    ``walk`` is what a key costs on top while so many sequences decode.
    """
    ints, tariff = spec.batch.ints, spec.tariff
    level = ints[LEVEL]
    slope = tariff.slope[level, knot] + walk
    seconds = tariff.value[level, knot] + tariff.slope[level, knot] * (ints[KEYS] * PER_TOKEN - knots[knot])
    seconds += walk * (ints[KEYS] * PER_TOKEN)
    seconds += tariff.levels[level, SEQ] * size + tariff.draft[level, size]
    growth = slope * (ints[RATES] * PER_TOKEN)
    window_slope = tariff.levels[level, WINDOW_SLOPE]
    seconds += window_slope * (ints[SEEN_KEYS] * PER_TOKEN)
    growth += window_slope * (ints[SEEN_RATES] * PER_TOKEN)
    return DecodeTerms(seconds, slope, growth)


@inlined
def fixed_share(spec: Spec, knots: Any, knot: int, size: int, per_token: float) -> float:
    """What each of ``size`` sequences pays for a step whatever its context; ``per_token`` includes the token's logit row (P5)."""
    tariff = spec.tariff
    level = spec.batch.ints[LEVEL]
    intercept = tariff.value[level, knot] + tariff.draft[level, size] - tariff.slope[level, knot] * knots[knot]
    return float(tariff.levels[level, QUERIES] * per_token + tariff.levels[level, SEQ] + intercept / size)


@inlined
def count_passes(spec: Spec, knots: Any, knot: int, size: int, k: int, per_token: float, since_origin: int) -> None:
    """Count k steps of ``size`` sequences, the first ``since_origin`` steps after the running sums', and let the batch's sums grow."""
    ints, tariff = spec.batch.ints, spec.tariff
    level = ints[LEVEL]
    growth = 0.5 * (k * (k - 1))
    tariff.passes[level, size] += k
    tariff.keys[0, level] += (k * ints[KEYS] + ints[RATES] * growth) * PER_TOKEN
    tariff.keys[1, level] += (k * ints[SEEN_KEYS] + ints[SEEN_RATES] * growth) * PER_TOKEN
    if level > 0:
        draft_slope = tariff.draft_curve[DRAFT_SLOPE, level, knot]
        draft = tariff.draft_curve[DRAFT_VALUE, level, knot] + draft_slope * (ints[KEYS] * PER_TOKEN - knots[knot])
        tariff.floats[KEYS_DRAFT] += k * draft + draft_slope * (ints[RATES] * PER_TOKEN) * growth
        more = tariff.levels[level, QUERIES] - 1
        intercept = tariff.draft_curve[DRAFT_VALUE, level, knot] - draft_slope * knots[knot]
        fixed = (tariff.draft[level, size] + intercept) / (size * more)
        tariff.floats[SHARE_V] += k * (per_token + fixed)
        tariff.floats[SHARE_D0] += k * draft_slope
        tariff.floats[SHARE_D1] += draft_slope * (k * since_origin + growth)
    ints[KEYS] += k * ints[RATES]
    ints[SEEN_KEYS] += k * ints[SEEN_RATES]


@inlined
def count_host(spec: Spec, per_token: float) -> None:
    """H1, P5: a rejected draft wastes its share of the host's work too."""
    if spec.batch.ints[LEVEL] > 0:
        spec.tariff.floats[SHARE_V] += per_token


@inlined
def chunk_time(spec: Spec, tokens: int) -> float:
    """The drafter's pass over a step's chunk tokens, counted."""
    tariff = spec.tariff
    tariff.chunk_steps[tokens] += 1
    tariff.floats[CHUNK_DRAFT] += tariff.chunk[tokens]
    return float(tariff.chunk[tokens])
