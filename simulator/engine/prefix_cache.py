"""The compiled engine's prefix cache: what requests find, own, publish and give back.

Rules C3 to C9 of ``docs/engine-prefix-cache.md``, and W7 to W11 of ``docs/engine-kv-memory.md`` where layers lie in groups. What is looked up, owned, freed and evicted is a few runs
(:mod:`simulator.engine.block_runs`) and not each of their blocks. A request owns a table of runs, its published blocks, which are always its first; the rest of its blocks is a number that the engine knows.
Each group of layers has chains and tables of its own. What a window leaves is taken from the front of a table, at the end of a step (:func:`leave_noted`), and
until its published blocks are gone a decoding request's window leaves them at steps that end a segment (:func:`published_ahead`).

Blocks that decoding fills are published late, just before anybody looks (:func:`catch_up`). That they are found as if they had been
published in time rests on the stamp of each: the step that filled it, and the order of admission within that.
"""

from typing import Any

from simulator.engine.block_runs import (
    ADMISSIONS,
    ADMITS,
    BEGIN,
    BLANK,
    COUNT,
    END,
    ENDED,
    ENDED_BLOCKS,
    ENDED_FULL,
    ENDED_KEY,
    ENDED_PASSED,
    EPOCH,
    FILL_STEP,
    FREES,
    GIVES,
    HIT_PAIRS,
    HIT_TOKENS,
    ID,
    LEAVES,
    LEAVING,
    LEAVING_KEY,
    LEFT,
    N_ENDED,
    N_LEAVING,
    NEWER,
    NEXT,
    NOBODY,
    ORDER,
    OWNERS,
    PART,
    PART_BITS,
    PART_MASK,
    PASSED,
    PLACE,
    PUBLISHED,
    PUBLISHES,
    QUERIED,
    SLOT_BITS,
    STAMP,
    STAMP_BITS,
    START,
    Cache,
    append,
    append_run,
    cut,
    enter,
    new_node,
    note,
    oldest,
    remove,
    split,
)
from simulator.engine.heaps import GROUP_BITS, pop_key, push_key
from simulator.engine.jit import compiled, compiled_once, inlined
from simulator.engine.progressions import blocks_before_window

FEW_RUNS = 3
"""Runs of a unit that are sought one by one, before the rest is found at once."""


@compiled_once
def _find_holders(cache: Cache, chain: int, part: int, stop: int) -> None:
    """Write down the oldest run that holds each of the blocks ``part`` to ``stop`` of a chain, 0 if none does: where it is in many runs, once for all."""
    nodes, holders = cache.nodes, cache.holders
    holders[part:stop] = 0
    first = cache.first[chain]
    node = first
    while node > 0:
        start = nodes[node, ID] & PART_MASK
        for i in range(max(part, start), min(stop, start + nodes[node, COUNT])):
            if holders[i] == 0:
                holders[i] = node
        node = nodes[node, NEWER]
        if node == first:
            break


@inlined
def _next_run(cache: Cache, chain: int, part: int, stop: int, before: int) -> tuple[int, int]:
    """The oldest run of a chain that holds its block ``part``, 0 if none does; and up to which block, at most ``stop``, it is the one found.

    ``before`` runs of the chain have been found right before it. Where there are many, all that follow are found at once.
    """
    if before < FEW_RUNS:
        return oldest(cache, chain, part, stop)
    if before == FEW_RUNS:
        _find_holders(cache, chain, part, stop)
    return _held_from(cache, part, stop)


@compiled
def _held_from(cache: Cache, part: int, stop: int) -> tuple[int, int]:
    """As :func:`_next_run`, from what :func:`_find_holders` has found."""
    holders, nodes = cache.holders, cache.nodes
    node, end = holders[part], part + 1
    if node == 0:
        return 0, end
    while end < stop and holders[end] == node:
        end += 1
    while (nodes[node, ID] & PART_MASK) + nodes[node, COUNT] <= part:  # it has been parted since
        node = nodes[node, NEWER]
    return int(node), int(end)


@compiled_once
def _locate(cache: Cache, row: int, block: int) -> tuple[int, int]:
    """Which unit, and which block of it, is a request's block of that place; the end of its last unit is the start of the next."""
    place = cache.offsets[row]
    if cache.largest == 1:
        return place + block, 0
    while block > 0 and block >= cache.sizes[place]:
        block -= cache.sizes[place]
        place += 1
    return place, block


@compiled_once
def _scan(cache: Cache, row: int, group: int, first: int, stop: int) -> tuple[int, int]:
    """Up to which place from ``first`` on, at most ``stop``, blocks of a group are all published; and how many of them somebody owns."""
    place, part = cache.offsets[row], 0
    if first > 0:
        place, part = _locate(cache, row, first)
    found, held, runs = first, 0, 0
    while found < stop:
        size = cache.sizes[place]
        chain = cache.ids[place] * cache.groups + group
        node, end = _next_run(cache, chain, part, min(size, part + stop - found), runs)
        if node == 0:
            return found, held
        found += end - part
        if cache.nodes[node, OWNERS] > 0:
            held += end - part
        part = end
        runs += 1
        if part == size:
            place, part, runs = place + 1, 0, 0
    return stop, held


@inlined
def passed_by(cache: Cache, tokens: int) -> int:
    """W2: blocks of each windowed group that lie before the window once ``tokens`` tokens are computed."""
    if cache.windowed == 0:
        return 0
    return int(blocks_before_window(tokens, cache.window, cache.chunked, cache.block_size))


@compiled_once
def _end_before(cache: Cache, group: int, found: int, place: int, part: int) -> tuple[int, int, int]:
    """The end of the last published run of a group before block ``found`` of a request, which is block ``part`` of its unit ``place``; and where that is."""
    nodes = cache.nodes
    while found > 0:
        if part == 0:
            place -= 1
            part = cache.sizes[place]
        end = 0
        first = cache.first[cache.ids[place] * cache.groups + group]
        node = first
        while node > 0:
            start = nodes[node, ID] & PART_MASK
            if start < part:
                end = max(end, min(part, start + nodes[node, COUNT]))
            node = nodes[node, NEWER]
            if node == first:
                break
        found -= part - end
        part = end
        if end > 0:
            break
    return found, place, part


@compiled
def _before_window(cache: Cache, row: int, hits: int) -> int:
    """W8: places, at most ``hits``, before which windows that slide find all their blocks, searched from the right."""
    place, part = _locate(cache, row, hits)
    group = 0
    while hits > 0 and group < cache.windowed:
        first = passed_by(cache, hits * cache.block_size)
        found, at, end = hits, place, part
        group_finds = True
        goes_on = False
        while found > first:
            if end == 0:
                at -= 1
                end, goes_on = cache.sizes[at], False
            chain = cache.ids[at] * cache.groups + group
            if goes_on:
                node = cache.holders[end - 1]
            else:
                node = oldest(cache, chain, end - 1, end)[0]
                start = cache.nodes[node, ID] & PART_MASK
                if node > 0 and start > 0 and end - start < found - first:
                    _find_holders(cache, chain, 0, start)
                    goes_on = True
            if node == 0:
                hits, place, part = _end_before(cache, group, found, at, end)
                group_finds = False
                break
            start = cache.nodes[node, ID] & PART_MASK
            found -= end - start
            end = start
        group = group + 1 if group_finds else 0
    return hits


@compiled
def _within_chunk(cache: Cache, row: int, hits: int) -> int:
    """W8: places, at most ``hits``, before which windows that are chunks find all their blocks, searched from the start of the chunk."""
    while hits > 0:
        first = passed_by(cache, hits * cache.block_size)
        for group in range(cache.windowed):
            hits = _scan(cache, row, group, first, hits)[0]
        if hits > first or passed_by(cache, hits * cache.block_size) == hits:
            break
    return hits


@compiled
def look_up(cache: Cache, rows: Any, row: int, longest: int, step: int, least: int) -> tuple[int, int]:
    """C5, C6, W8, W9: places that a request in ``step`` finds among its first ``longest``, and how many of the blocks there that it comes to own somebody owns.

    ``rows`` are those of the slots. Prefill starts at ``least`` tokens at least.
    """
    if cache.late:
        catch_up(cache, rows, step)
    hits = min(longest, cache.counts[row])
    if cache.groups == 1 and cache.windowed == 0:
        return _scan(cache, row, 0, 0, hits)
    held = 0
    for group in range(cache.windowed, cache.groups):
        found, owned = _scan(cache, row, group, 0, hits)
        if found < hits and group > cache.windowed:
            held = 0
            for other in range(cache.windowed, group):
                held += _scan(cache, row, other, 0, found)[1]
        hits = found
        held += owned
    if cache.windowed == 0:
        return hits, held
    bound = hits
    hits = _within_chunk(cache, row, hits) if cache.chunked else _before_window(cache, row, hits)
    if hits < bound:
        held = 0
        for group in range(cache.windowed, cache.groups):
            held += _scan(cache, row, group, 0, hits)[1]
    first = passed_by(cache, max(hits * cache.block_size, least))
    if first < hits:
        for group in range(cache.windowed):
            held += _scan(cache, row, group, first, hits)[1]
    return hits, held


@compiled
def admit(
    cache: Cache, slot: int, row: int, hits: int, passed: int, loaded: int, known: int, start: int, seen: int
) -> int:
    """C6, C8, C9, W9: let a request own its hits, before it takes new blocks; return how many of them were free.

    Its window has ``passed`` blocks of each group; ``loaded`` tokens have come from below HBM (F5).
    """
    ints, nodes = cache.ints, cache.nodes
    freed = 0
    place, part = 0, 0
    for group in range(cache.groups):
        table = slot * cache.groups + group
        entry = table * cache.stride
        found = min(passed, hits) if group < cache.windowed else 0
        place, part = cache.offsets[row], 0
        if found > 0:
            place, part = _locate(cache, row, found)
        runs = 0
        while found < hits:
            size = cache.sizes[place]
            chain = cache.ids[place] * cache.groups + group
            node, stop = _next_run(cache, chain, part, min(size, part + hits - found), runs)
            if cache.largest > 1:
                node = cut(cache, node, part, stop)
            if nodes[node, OWNERS] == 0:
                remove(cache, node)
                freed += stop - part
            nodes[node, OWNERS] += 1
            cache.table[entry] = node << PART_BITS | stop - part
            entry += 1
            found += stop - part
            part = stop
            runs += 1
            if part == size:
                place, part, runs = place + 1, 0, 0
        cache.spans[table, BEGIN] = 0
        cache.spans[table, END] = entry - table * cache.stride
    cache.slots[slot, PLACE] = place
    cache.slots[slot, PART] = part
    cache.slots[slot, PUBLISHED] = hits
    cache.slots[slot, LEFT] = passed
    cache.slots[slot, START] = start
    cache.slots[slot, ORDER] = ints[ADMISSIONS]
    cache.slots[slot, FILL_STEP] = -1
    cache.reused[row] += max(0, start - seen)
    tokens = max(hits * cache.block_size, loaded)
    ints[ADMISSIONS] += 1
    ints[QUERIED] += known
    ints[HIT_TOKENS] += tokens
    ints[HIT_PAIRS] += tokens * (tokens + 1) // 2
    if len(cache.log) > 0:
        note(cache, ADMITS, row, hits, known)
    return freed


@compiled
def publish(cache: Cache, slot: int, row: int, full: int, moment: int) -> int:
    """C3, W7: let the first ``full`` blocks of each group of a request be found from ``moment`` on, as far as it owns them and they have ids.

    D3: in a tree, those already there replace the request's own. Return how many blocks that frees.
    """
    nodes = cache.nodes
    full = min(full, cache.counts[row])
    published = cache.slots[slot, PUBLISHED]
    if full <= published:
        return 0
    if len(cache.log) > 0:
        note(cache, PUBLISHES, row, full, moment)
    place, part = 0, 0
    freed = 0
    for group in range(cache.groups):
        table = slot * cache.groups + group
        entry = table * cache.stride + cache.spans[table, END]
        done = published
        place, part = cache.slots[slot, PLACE], cache.slots[slot, PART]
        if group < cache.windowed and cache.slots[slot, LEFT] > done:
            done = min(cache.slots[slot, LEFT], full)
            place, part = _locate(cache, row, done)
        while done < full:
            size = cache.sizes[place]
            chain = cache.ids[place] * cache.groups + group
            stop = min(size, part + full - done)
            node = 0
            if cache.radix:
                node, stop = oldest(cache, chain, part, stop)
            count = stop - part
            if node > 0:
                if cache.largest > 1:
                    node = cut(cache, node, part, stop)
                cache.ints[BLANK] += count
                if nodes[node, OWNERS] == 0:
                    remove(cache, node)
                else:
                    freed += count
                nodes[node, OWNERS] += 1
            else:
                node = new_node(cache)
                nodes[node, ID] = chain << PART_BITS | part
                nodes[node, COUNT] = count
                nodes[node, OWNERS] = 1
                nodes[node, STAMP] = moment << STAMP_BITS | cache.slots[slot, ORDER]
                enter(cache, node)
            cache.table[entry] = node << PART_BITS | count
            entry += 1
            done += count
            part = stop
            if part == size:
                place, part = place + 1, 0
        cache.spans[table, END] = entry - table * cache.stride
    cache.slots[slot, PLACE] = place
    cache.slots[slot, PART] = part
    cache.slots[slot, PUBLISHED] = full
    return freed


@inlined
def moment_of(cache: Cache, step: int, is_chunk: bool) -> int:
    """Moment at which what a chunk, or the decoding, of ``step`` fills is published."""
    if cache.by_epoch:
        step = cache.ints[EPOCH]
    return int(2 * step + int(is_chunk != cache.prompts_first))


@compiled
def give_back(cache: Cache, slot: int, row: int, owned: int, passed: int, step: int) -> int:
    """C7: a request is preempted before ``step``; return how many blocks become free."""
    _leave(cache, slot, row, step)
    return release(cache, slot, row, owned, passed)


@inlined
def _disown(cache: Cache, node: int) -> int:
    """C7: let a request no longer own a run; return how many blocks become free."""
    nodes = cache.nodes
    nodes[node, OWNERS] -= 1
    if nodes[node, OWNERS] > 0:
        return 0
    append(cache, node)
    return int(nodes[node, COUNT])


@compiled
def release(cache: Cache, slot: int, row: int, owned: int, passed: int) -> int:
    """C7, W10: a request gives back its ``owned`` blocks, whose windows have left ``passed`` of each group; return how many become free."""
    nodes = cache.nodes
    places = owned + cache.windowed * passed
    if cache.groups > 1:
        places //= cache.groups
    freed = 0
    for group in range(cache.groups):
        anonymous = places - max(cache.slots[slot, PUBLISHED], passed if group < cache.windowed else 0)
        freed += anonymous
        append_run(cache, anonymous)
        table = slot * cache.groups + group
        base = table * cache.stride
        for i in range(cache.spans[table, END] - 1, cache.spans[table, BEGIN] - 1, -1):
            node = cache.table[base + i] >> PART_BITS
            left = (cache.table[base + i] & PART_MASK) - nodes[node, COUNT]
            n = 0
            while left > 0:  # it has been parted since
                cache.pieces[n] = node
                n += 1
                node = nodes[node, NEXT]
                left -= nodes[node, COUNT]
            freed += _disown(cache, node)
            for k in range(n - 1, -1, -1):
                freed += _disown(cache, cache.pieces[k])
        cache.spans[table, BEGIN] = 0
        cache.spans[table, END] = 0
    cache.slots[slot, PUBLISHED] = 0
    cache.slots[slot, FILL_STEP] = -1
    if len(cache.log) > 0:
        note(cache, FREES, row, owned, passed)
    return int(freed)


# Windows


@compiled
def append_given(cache: Cache, count: int) -> None:
    """W10: blocks that nobody can find, and that windows have left, join the end of the queue."""
    if count > 0:
        if len(cache.log) > 0:
            note(cache, GIVES, -1, count, 0)
        append_run(cache, count)


@compiled_once
def pass_blocks(cache: Cache, slot: int, before: int, passed: int, by_chunk: bool) -> int:
    """W2, W10: at the end of a step a window that had passed ``before`` blocks of each group has ``passed`` now; return how many become free at once.

    What can be found goes later (:func:`leave_noted`), in the order in which requests were scheduled: decoding ones, then ``by_chunk`` those with a chunk.
    """
    if passed == before:
        return 0
    published = cache.slots[slot, PUBLISHED]
    anonymous = cache.windowed * max(0, passed - max(before, published))
    append_given(cache, anonymous)
    if before < published:
        note_leaving(cache, slot, passed, by_chunk)
    return int(anonymous)


@compiled_once
def note_leaving(cache: Cache, slot: int, passed: int, by_chunk: bool) -> None:
    """W10: a window that has ``passed`` so many blocks of each group leaves published ones at the end of this step."""
    ints = cache.ints
    i = ints[N_LEAVING]
    ints[N_LEAVING] = i + 1
    key = int(by_chunk) << STAMP_BITS | cache.slots[slot, ORDER]
    while i > 0 and cache.lists[i - 1, LEAVING_KEY] > key:
        cache.lists[i, LEAVING_KEY] = cache.lists[i - 1, LEAVING_KEY]
        cache.lists[i, LEAVING] = cache.lists[i - 1, LEAVING]
        i -= 1
    cache.lists[i, LEAVING_KEY] = key
    cache.lists[i, LEAVING] = slot
    cache.slots[slot, PASSED] = passed


@compiled
def leave_noted(cache: Cache, rows: Any) -> int:
    """W10: give back the published blocks that windows leave at the end of this step; return how many become free."""
    nodes = cache.nodes
    freed = 0
    for noted in range(cache.ints[N_LEAVING]):
        slot = cache.lists[noted, LEAVING]
        passed = cache.slots[slot, PASSED]
        count = min(passed, cache.slots[slot, PUBLISHED]) - cache.slots[slot, LEFT]
        cache.slots[slot, LEFT] = passed
        if len(cache.log) > 0:
            note(cache, LEAVES, rows[slot], passed, 0)
        for group in range(cache.windowed):
            table = slot * cache.groups + group
            base = table * cache.stride
            i = cache.spans[table, BEGIN]
            n = 0
            left = count
            while left > 0:
                node = cache.table[base + i] >> PART_BITS
                size = cache.table[base + i] & PART_MASK
                while size > 0 and left > 0:
                    if nodes[node, COUNT] > left:
                        split(cache, node, left)
                    cache.pieces[n] = node
                    n += 1
                    size -= nodes[node, COUNT]
                    left -= nodes[node, COUNT]
                    node = nodes[node, NEXT]
                if size > 0:
                    cache.table[base + i] = node << PART_BITS | size
                else:
                    i += 1
            cache.spans[table, BEGIN] = i
            for k in range(n - 1, -1, -1):
                freed += _disown(cache, cache.pieces[k])
    cache.ints[N_LEAVING] = 0
    return int(freed)


@inlined
def published_ahead(cache: Cache, slot: int, row: int) -> int:
    """Blocks of each group of a decoding request that can be found before its window leaves them, or are found by then."""
    return int(cache.counts[row] if cache.late else cache.slots[slot, PUBLISHED])


@inlined
def blocks_to_eviction(cache: Cache) -> int:
    """Blocks that can be taken before one that can be found."""
    node = cache.nodes[0, NEXT]
    if node > 0 and cache.nodes[node, ID] == NOBODY:
        return int(cache.nodes[node, COUNT])
    return 0


@compiled
def watch(cache: Cache, slot: int, row: int, computed: int, step: int) -> None:
    """C4: note the step at which a decoding request, at ``computed`` tokens before ``step``, fills its next block with an id."""
    done = cache.slots[slot, PUBLISHED]
    if done >= cache.counts[row]:
        cache.slots[slot, FILL_STEP] = -1
        return
    when = step + (done + 1) * cache.block_size - 1 - computed
    cache.slots[slot, FILL_STEP] = when
    if cache.n_fills[0] == len(cache.fills):
        # Not from the keys that still hold: a slot that changed hands may have left the same key several times.
        size = 0
        for other in range(len(cache.slots)):
            other_step = cache.slots[other, FILL_STEP]
            if other != slot and other_step >= 0 and other_step >> GROUP_BITS == when >> GROUP_BITS:
                size = push_key(cache.fills, size, cache.slots[other, FILL_STEP] << SLOT_BITS | other)
        cache.n_fills[0] = size
    cache.n_fills[0] = push_key(cache.fills, cache.n_fills[0], when << SLOT_BITS | slot)


@compiled
def next_fill(cache: Cache) -> int:
    """The next step that fills a decoding request's block with an id; -1: none. Stale keys are dropped."""
    while cache.n_fills[0] > 0:
        key = cache.fills[0]
        if cache.slots[key & ((1 << SLOT_BITS) - 1), FILL_STEP] == key >> SLOT_BITS:
            return int(key >> SLOT_BITS)
        cache.n_fills[0] = pop_key(cache.fills, cache.n_fills[0])
    return -1


@compiled
def steps_to_fill(cache: Cache, step: int) -> int:
    """Steps that may follow ``step``, whose own fills have been published, before R7 may find another block."""
    when = next_fill(cache)
    return int(when - step) if when >= 0 else 1 << SLOT_BITS


@compiled
def catch_up(cache: Cache, rows: Any, step: int) -> None:
    """C3, C4: publish every block that decoding fills in steps up to ``step``."""
    when = next_fill(cache)
    while 0 <= when <= step:
        slot = cache.fills[0] & ((1 << SLOT_BITS) - 1)
        cache.n_fills[0] = pop_key(cache.fills, cache.n_fills[0])
        _fill(cache, slot, rows[slot], when)
        when = next_fill(cache)


@compiled
def _fill(cache: Cache, slot: int, row: int, step: int) -> None:
    """Publish the block that a decoding request fills in ``step``, and look out for its next."""
    publish(cache, slot, row, cache.slots[slot, PUBLISHED] + 1, moment_of(cache, step, False))  # noqa: FBT003
    watch(cache, slot, row, cache.slots[slot, PUBLISHED] * cache.block_size, step + 1)


@compiled
def _leave(cache: Cache, slot: int, row: int, step: int) -> None:
    """C4: a decoding request stops before ``step``: publish what it has filled, and watch it no longer."""
    when = cache.slots[slot, FILL_STEP]
    while 0 <= when < step:
        publish(cache, slot, row, cache.slots[slot, PUBLISHED] + 1, moment_of(cache, when, False))  # noqa: FBT003
        when += cache.block_size
        if cache.slots[slot, PUBLISHED] >= cache.counts[row]:
            break
    cache.slots[slot, FILL_STEP] = -1


@compiled_once
def note_end(
    cache: Cache, slot: int, row: int, computed: int, owned: int, passed: int, step: int, by_chunk: bool
) -> None:
    """A request has finished before ``step`` with ``computed`` tokens in ``owned`` blocks, its windows past ``passed`` of each group; :func:`release_ended` gives its blocks back.

    That happens in the order in which they were scheduled: decoding requests, then ``by_chunk`` those whose last chunk it was, by admission.
    """
    ints = cache.ints
    _leave(cache, slot, row, step)
    i = ints[N_ENDED]
    ints[N_ENDED] = i + 1
    key = int(by_chunk) << STAMP_BITS | cache.slots[slot, ORDER]
    while i > 0 and cache.lists[i - 1, ENDED_KEY] > key:
        cache.lists[i, ENDED_KEY] = cache.lists[i - 1, ENDED_KEY]
        cache.lists[i, ENDED] = cache.lists[i - 1, ENDED]
        cache.lists[i, ENDED_BLOCKS] = cache.lists[i - 1, ENDED_BLOCKS]
        cache.lists[i, ENDED_FULL] = cache.lists[i - 1, ENDED_FULL]
        cache.lists[i, ENDED_PASSED] = cache.lists[i - 1, ENDED_PASSED]
        i -= 1
    cache.lists[i, ENDED_KEY] = key
    cache.lists[i, ENDED] = slot
    cache.lists[i, ENDED_BLOCKS] = owned
    cache.lists[i, ENDED_FULL] = computed // cache.block_size
    cache.lists[i, ENDED_PASSED] = passed


@inlined
def publish_rest(cache: Cache, slot: int, row: int, full: int, passed: int, moment: int) -> int:
    """P6, W7: a request that stops publishes what it has filled and its window has not left; return what that frees (D3)."""
    cache.slots[slot, LEFT] = max(cache.slots[slot, LEFT], passed)
    return publish(cache, slot, row, full, moment)


@compiled
def release_ended(cache: Cache, rows: Any, moment: int) -> int:
    """C7: the requests that finished give back their blocks; return how many become free.

    Blocks of outputs that have not been published are now (D2, P6).
    """
    freed = 0
    for i in range(cache.ints[N_ENDED]):
        slot = cache.lists[i, ENDED]
        row, passed = rows[slot], cache.lists[i, ENDED_PASSED]
        freed += publish_rest(cache, slot, row, cache.lists[i, ENDED_FULL], passed, moment)
        freed += release(cache, slot, row, cache.lists[i, ENDED_BLOCKS], passed)
    cache.ints[N_ENDED] = 0
    return freed
