"""How many KV blocks tokens take in the compiled engine, with windowed layers that give blocks back: rules W1 to W6 of ``docs/engine-kv-memory.md``.

What a request owns between steps follows from its computed tokens. A sequence that decodes takes a block of every group when its context begins one, and
once its window is full gives one of every windowed group back when the window leaves one: both at fixed steps modulo the block size, so two histograms
of residues hold a whole batch. Windows that are chunks of the context are left at the events that end them, and blocks of a prefix cache that can be found
(W7 to W11) at events of their own, behind all others of a step. With speculation sequences take and give at steps
of their own, which :mod:`simulator.engine.speculation` lists.
"""

from typing import Any

from simulator.engine import speculation
from simulator.engine.block_runs import N_LEAVING
from simulator.engine.core import BATCH, COMPUTED, FREE_BLOCKS, JOINED, STEP, Extra, Limits, State
from simulator.engine.jit import compiled, compiled_once, inlined
from simulator.engine.prefix_cache import (
    append_given,
    blocks_to_eviction,
    leave_noted,
    note_leaving,
    pass_blocks,
    published_ahead,
)
from simulator.engine.progressions import blocks_before_window, blocks_for, residue, steps_with_blocks


@inlined
def blocks_passed(limits: Limits, done: int) -> int:
    """W2: blocks of each windowed group that lie before the window once ``done`` tokens are computed."""
    return int(blocks_before_window(done, limits.window, limits.chunked, limits.block_size))


@inlined
def blocks_owned_at(limits: Limits, done: int, stop: int) -> int:
    """W3: blocks of a request in a step that takes it from ``done`` computed tokens to ``stop``; at rest the two are the same."""
    blocks = blocks_for(stop, limits.block_size)
    if limits.windowed == 0:
        return int(blocks)
    return int(limits.groups * blocks - limits.windowed * blocks_passed(limits, done))


@inlined
def blocks_beyond(limits: Limits, first: int, passed: int, stop: int) -> int:
    """W9: blocks at the places from ``first`` to ``stop``, of windowed groups without the first ``passed``."""
    full = (limits.groups - limits.windowed) * max(0, stop - first)
    return int(full + limits.windowed * max(0, stop - max(first, passed)))


@inlined
def blocks_to_take(limits: Limits, done: int, stop: int) -> int:
    """W3: blocks that a running request takes for the tokens from ``done`` to ``stop``."""
    return int(limits.groups * (blocks_for(stop, limits.block_size) - blocks_for(done, limits.block_size)))


@inlined
def blocks_at_most(limits: Limits, start: int, stop: int) -> int:
    """W4: blocks that a request owns at most on its way from ``start`` computed tokens to ``stop``, however it is cut into chunks."""
    blocks = blocks_for(stop, limits.block_size)
    if limits.windowed == 0:
        return int(blocks)
    kept = min(blocks - blocks_passed(limits, start), limits.windowed_most)
    return int((limits.groups - limits.windowed) * blocks + limits.windowed * kept)


@compiled_once
def leave_behind(
    limits: Limits, state: State, extra: Extra | None, slot: int, before: int, done: int, by_chunk: bool
) -> None:
    """W2: a request that had ``before`` tokens and now has ``done`` gives back what its window has left; ``by_chunk``: as of :func:`~simulator.engine.prefix_cache.pass_blocks`."""
    if limits.windowed > 0:
        passed, past = blocks_passed(limits, done), blocks_passed(limits, before)
        if extra is not None and extra.cache.on:
            state.ints[FREE_BLOCKS] += pass_blocks(extra.cache, slot, past, passed, by_chunk)
        else:
            state.ints[FREE_BLOCKS] += limits.windowed * (passed - past)


@inlined
def leave_published(limits: Limits, state: State, extra: Extra | None) -> None:
    """W10: at the end of a step windows leave what can be found, behind what cannot."""
    if limits.windowed > 0 and extra is not None and extra.cache.ints[N_LEAVING] > 0:
        state.ints[FREE_BLOCKS] += leave_noted(extra.cache, state.row)


@inlined
def next_published_step(limits: Limits, state: State, extra: Extra | None, slot: int) -> int:
    """The step before which a decoding sequence's full window leaves its next block, if that can be found by then; else −1."""
    if limits.windowed == 0 or extra is None or not extra.cache.on:
        return -1
    done = state.slots[slot, COMPUTED] + state.ints[STEP] - state.slots[slot, JOINED]
    passed = blocks_passed(limits, done)
    if passed >= published_ahead(extra.cache, slot, state.row[slot]):
        return -1
    return int(state.ints[STEP] + (passed + 1) * limits.block_size + limits.window - 1 - done)


@inlined
def _place(limits: Limits, state: State, slot: int) -> int:
    """Where in ``State.residues`` a sequence's blocks are that its window leaves."""
    key = state.slots[slot, COMPUTED] - state.slots[slot, JOINED]
    return int(limits.block_size + residue(key - (limits.window - 2), limits.block_size))


@inlined
def begin_giving(limits: Limits, state: State, slot: int) -> None:
    """A decoding sequence's window is full: from now on it leaves blocks behind."""
    if limits.windowed > 0:
        state.residues[_place(limits, state, slot)] += limits.windowed


@inlined
def end_giving(limits: Limits, state: State, slot: int) -> None:
    """A decoding sequence whose window is full leaves the batch."""
    if limits.windowed > 0:
        state.residues[_place(limits, state, slot)] -= limits.windowed


@inlined
def release_of_step(limits: Limits, state: State, extra: Extra | None) -> None:
    """W2: what the windows of decoding sequences leave at the end of one step, which is still the present one.

    Not what ends a segment: published blocks, and chunks of the context.
    """
    if limits.windowed > 0 and state.ints[BATCH] > 0:
        if extra is not None and extra.spec.on:
            given = speculation.give_blocks_before(extra.spec.batch, state.ints[STEP] + 1)
        else:
            given = state.residues[limits.block_size + residue(-state.ints[STEP], limits.block_size)]
        state.ints[FREE_BLOCKS] += given
        if extra is not None and extra.cache.on:
            append_given(extra.cache, given)
            note_gifts(extra)


@compiled
def note_gifts(extra: Extra) -> None:
    """W6, W10: note the sequences whose passes have brought their windows past published blocks."""
    if not extra.spec.on:
        return
    ints, slots = extra.spec.batch.ints, extra.spec.batch.slots
    for i in range(ints[speculation.N_GIFTS]):
        slot = slots[i, speculation.GIFT]
        note_leaving(extra.cache, slot, slots[slot, speculation.PASSED], False)  # noqa: FBT003 - compiled code takes no keywords here
    ints[speculation.N_GIFTS] = 0


@compiled
def give_in_steps(limits: Limits, state: State, extra: Extra, k: int) -> int:
    """W10: what the windows of decoding sequences leave in k decode steps, and nobody can find, joins the end of the queue; return how many blocks.

    They are not yet at its front when these steps take blocks, so it does not matter which comes first.
    """
    if extra.spec.on:
        given = extra.spec.batch.ints[speculation.GIVEN]
    else:
        size = limits.block_size
        place = residue(-state.ints[STEP], size)
        cycle = 0
        given = 0
        for j in range(size):
            now = state.residues[size + place]
            cycle += now
            if j < k % size:
                given += now
            place = place - 1 if place > 0 else size - 1
        given += k // size * cycle
    append_given(extra.cache, given)
    note_gifts(extra)
    return int(given)


@compiled
def steps_to_eviction(limits: Limits, state: State, extra: Extra, need: int) -> int:
    """Decode steps that evict nothing after the first of them, for which ``need`` blocks are taken already; at least one."""
    room = blocks_to_eviction(extra.cache)
    step = state.ints[STEP]
    if extra.spec.on:
        few = limits.block_size
        while few > 1 and speculation.steps_with_room(extra.spec.batch, step, few, room + need) < few:
            few //= 2
        return few
    cycle = limits.groups * state.ints[BATCH]
    return int(1 + steps_with_blocks(state.residues, limits.block_size, False, step + 1, 1 << 40, cycle, room))  # noqa: FBT003


@compiled
def steps_to_room(limits: Limits, state: State, wanted: int, queue_first: bool) -> int:
    """Decode steps after which ``wanted`` blocks are free, behind those that the next one takes unless the queue comes first; or very many steps.

    It happens within ``block_size`` steps or never: in as many a batch gives back no more than it takes.
    """
    size = limits.block_size
    place = residue(-state.ints[STEP], size)
    free = state.ints[FREE_BLOCKS]
    if not queue_first:
        free -= state.residues[place]
    for steps in range(1, size):
        if queue_first:
            free -= state.residues[place]
        free += state.residues[size + place]
        place = place - 1 if place > 0 else size - 1
        if not queue_first:
            free -= state.residues[place]
        if free >= wanted:
            return steps
    return 1 << 60


@compiled
def add_steps(limits: Limits, state: State, k: int, profile: Any) -> None:
    """Add the blocks owned in the last of k decode steps, at most ``block_size`` of them, the last first, to ``profile``.

    ``State`` has taken the steps' blocks, but not counted the steps. Earlier ones own no more: what a batch takes in ``block_size`` steps it does
    not give back in as many.
    """
    size = limits.block_size
    owned = limits.num_blocks - state.ints[FREE_BLOCKS]
    place = residue(-(state.ints[STEP] + k - 1), size)
    for j in range(min(k, size)):
        owned += state.residues[size + place]
        profile[j] += owned
        owned -= state.residues[place]
        place = place + 1 if place + 1 < size else 0


@compiled
def add_alike(profile: Any, owned: int) -> None:
    """Add the same number of blocks to every step of a profile."""
    for j in range(len(profile)):
        profile[j] += owned


@compiled
def largest(profile: Any) -> int:
    """The largest number of blocks in a profile, 0 if it is empty."""
    most = 0
    for blocks in profile:
        most = max(most, blocks)
    return most


@compiled
def peak_of_steps(limits: Limits, state: State, k: int) -> int:
    """The most blocks owned in any of k decode steps that :func:`add_steps` would look at."""
    profile = profile_of(limits, state)[0]
    profile[:] = 0
    add_steps(limits, state, k, profile)
    return largest(profile)


@inlined
def profile_of(limits: Limits, state: State) -> tuple[Any]:
    """Room for the blocks owned in ``block_size`` steps; in a tuple, as functions compiled without reference counts may not return a view."""
    return (state.residues[2 * limits.block_size : 3 * limits.block_size],)
