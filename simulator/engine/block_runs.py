"""The blocks of the compiled engine's prefix cache, in runs: those that can be found in chains, those that are free in a queue.

Rules C1 and C2 of ``docs/engine-prefix-cache.md``, and what :mod:`simulator.engine.prefix_cache` is made of. A *node* is a run of blocks: published ones that follow each other within one *unit*, or, in the
queue of free blocks only, unpublished ones, which are all alike. A unit is a number of blocks of which every request that has one has those before it: those into which the tokens of one id are cut,
and of ids that always follow each other (:meth:`~simulator.engine.block_hashes.BlockHashes.units`).

A node is one row of :attr:`Cache.nodes`, 64 bytes, a cache line. Node 0 is the end of the queue, which is a ring; a run in it is taken from its end, as if its blocks
stood there the last one first (C7). Runs of one unit in one group of layers form a ring too, its *chain*, from the oldest on, in which the first that holds a block is the one found. Whoever owns a part of a run parts it in two:
the table of another owner names the first part, from which it is led to the others.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from simulator.engine.block_hashes import BlockHashes
from simulator.engine.jit import compiled, compiled_once, entry, inlined
from simulator.engine.kv_memory import Tier
from simulator.engine.tiers import Tiers, move_down, new_tiers
from simulator.roofline.kv_groups import KvGroups

# columns of Cache.nodes
NEXT, PREVIOUS, COUNT, ID, OWNERS, NEWER, OLDER, STAMP = range(8)
"""NEXT of a run that is owned is the one that was parted from it. ID is chain << PART_BITS | place of the run's first block in its unit; the chain of a unit in a group is
unit · groups + group."""
# columns of Cache.spans
BEGIN, END = range(2)
# indices into Cache.ints
(
    N_NODES,
    SPARE,
    BLANK,
    ADMISSIONS,
    N_ENDED,
    QUERIED,
    HIT_TOKENS,
    HIT_PAIRS,
    EVICTED,
    N_LOG,
    EPOCH,
    N_LEAVING,
    N_INTS,
) = range(13)
# columns of Cache.slots, a cache line of them
PUBLISHED, START, ORDER, FILL_STEP, PLACE, PART, LEFT, PASSED, N_COLUMNS = range(9)
# columns of Cache.lists
ENDED, ENDED_BLOCKS, ENDED_FULL, ENDED_PASSED, ENDED_KEY, LEAVING, LEAVING_KEY, N_LISTS = range(8)
NOBODY = -1
"""Id of a run of blocks that nobody can find."""
PART_BITS = 20
PART_MASK = (1 << PART_BITS) - 1
LONG_UNIT = 256
"""Blocks of a unit at most, unless one id has more: who looks for a block goes through the runs of its unit. Where decoding publishes blocks one by one, a unit is one id."""
SLOT_BITS = 20
"""A key of the fill heap is step << SLOT_BITS | slot."""
STAMP_BITS = 31
"""A stamp is (2·step + turn) << STAMP_BITS | the number of its owner's admission: the order in which R5 and R7 schedule.

Where prompts may be cut, decoding requests have turn 0 and chunks 1 (B1); where prompts come first (B3, B4) it is the other way round.
"""
# kinds of entries in Cache.log
TAKES, ADMITS, PUBLISHES, FREES, LEAVES, GIVES = range(6)


class Cache(NamedTuple):
    """Everything a prefix cache knows. ``on`` is false where a replica has none, ``radix`` true where it is a tree (D1 to D4).

    ``late`` says that blocks which decoding fills are published too. A tree's blank blocks are ``ints[BLANK]``; in its queue stand
    published ones only.

    Attributes
    ----------
    nodes
        [blocks + 2, 8] see the columns' names.
    first
        [ids · groups] oldest run published of a chain; 0: none.
    ids, offsets, sizes
        the units of each request, as the ids of its :class:`BlockHashes`, and how many blocks of each it has at most.
    largest, counts
        the largest of ``sizes``; [requests] blocks of each request that have an id.
    table, stride
        runs that slot s owns of group g are in ``table[(s * groups + g) * stride :]``, each as node << PART_BITS | blocks.
    spans
        [slots · groups, 2] where those that are left of them begin there, and where they end.
    slots
        [slots, 8] of a running request, how many of its blocks of a group are published, where its prefill started (C8), the number of its
        admission, and the step that fills its next block with an id (-1: none). PLACE, PART: which of its units, and which block of it, is the first that is not published.
        LEFT: the first block of windowed groups that its tables may hold; PASSED: which it will be once those that it leaves at the end of this step are given back.
    lists
        [slots, 7] the slots whose requests finished in this step, the blocks they have to give back, how many of them are full, how many of a group their windows have passed, and the keys by
        which they are ordered; those whose windows leave published blocks at its end, and their keys.
    pieces
        scratch of :func:`release` and of what windows leave; ``holders`` [largest] of :func:`_find_holders`.
    fills, n_fills
        heap of the steps that fill blocks, and [1] its size.
    reused
        [requests] tokens never computed (C8).
    groups, windowed, window, chunked
        groups of layers, those of them that have a window, which come first, and that.
    tiers
        the memory that evicted blocks move to.
    log
        [entries, 4] kind, row or -1, and two amounts: a record of what happened, as far as there is room.
    """

    on: bool
    radix: bool
    late: bool
    prompts_first: bool
    by_epoch: bool
    block_size: int
    groups: int
    windowed: int
    window: int
    chunked: bool
    nodes: Any
    first: Any
    ids: Any
    offsets: Any
    sizes: Any
    largest: int
    counts: Any
    table: Any
    stride: int
    spans: Any
    slots: Any
    lists: Any
    pieces: Any
    holders: Any
    fills: Any
    n_fills: Any
    reused: Any
    tiers: Tiers
    log: Any
    ints: Any


def new_cache(
    hashes: BlockHashes | None,
    *,
    num_blocks: int,
    max_num_seqs: int,
    block_size: int,
    n: int,
    groups: KvGroups = KvGroups(),  # noqa: B008 - it is frozen
    parts: int = 1,
    longest: int = 1,
    counts: NDArray[np.int64] | None = None,
    radix: bool = False,
    prompts_first: bool = False,
    by_epoch: bool = False,
    late: bool = True,
    tiers: tuple[Tier, ...] = (),
    log_size: int = 0,
) -> Cache:
    """An empty cache over ``num_blocks`` free blocks, or the stand-in of none if ``hashes`` is None.

    ``parts``, ``counts``: blocks per id of ``hashes``, and how many of them each request has, unless one for each; ``longest``: ids of a unit at most. Units of more than a block do not go with tiers.
    ``prompts_first``: whether a step is prompts or decodes (B3, B4). ``by_epoch``: whether ``ints[EPOCH]`` orders what is published, because groups count steps each for itself. ``late``: whether blocks that decoding fills are published as they are filled.
    ``log_size``: entries of the record that tests replay.
    """
    on = hashes is not None
    if hashes is None:
        hashes = BlockHashes(np.zeros(0, dtype=np.int64), np.zeros(1, dtype=np.int64), 1)
        num_blocks = max_num_seqs = n = 0
        tiers = ()
    if counts is None:
        counts = np.diff(hashes.offsets)
    stride = int(counts.max(initial=0))
    ids, offsets, lengths = hashes.units(longest)
    sizes = parts * lengths
    largest = int(sizes.max(initial=1))
    n_units = int(ids.max(initial=-1)) + 1
    cache = Cache(
        on=on,
        radix=radix,
        late=late and hashes.covers_output and not radix,
        prompts_first=prompts_first,
        by_epoch=by_epoch,
        block_size=block_size,
        groups=groups.count,
        windowed=groups.windowed,
        window=groups.window,
        chunked=groups.chunked,
        nodes=np.zeros((num_blocks + 2, 8), dtype=np.int64),
        first=np.zeros(n_units * groups.count, dtype=np.int64),
        ids=ids,
        offsets=offsets,
        sizes=sizes,
        largest=largest,
        counts=counts,
        table=np.zeros(max_num_seqs * groups.count * stride, dtype=np.int64),
        stride=stride,
        spans=np.zeros((max_num_seqs * groups.count, 2), dtype=np.int64),
        slots=np.zeros((max_num_seqs, N_COLUMNS), dtype=np.int64),
        lists=np.zeros((max_num_seqs, N_LISTS), dtype=np.int64),
        pieces=np.zeros(max(largest, stride), dtype=np.int64),
        holders=np.zeros(largest, dtype=np.int64),
        fills=np.zeros(2 * max_num_seqs + 2, dtype=np.int64),
        n_fills=np.zeros(1, dtype=np.int64),
        reused=np.zeros(n, dtype=np.int64),
        tiers=new_tiers(tiers, n_units),
        log=np.zeros((log_size, 4), dtype=np.int64),
        ints=np.zeros(N_INTS, dtype=np.int64),
    )
    cache.ints[N_NODES] = 1
    cache.slots[:, FILL_STEP] = -1
    if on:
        append_run(cache, num_blocks)
    return cache


@compiled_once
def note(cache: Cache, kind: int, row: int, a: int, b: int) -> None:
    """Add an entry to the log, if there is room."""
    place = cache.ints[N_LOG]
    if place < len(cache.log):
        cache.log[place, 0] = kind
        cache.log[place, 1] = row
        cache.log[place, 2] = a
        cache.log[place, 3] = b
    cache.ints[N_LOG] = place + 1


@inlined
def new_node(cache: Cache) -> int:
    """A node out of use."""
    ints = cache.ints
    node = ints[SPARE]
    if node > 0:
        ints[SPARE] = cache.nodes[node, NEXT]
    else:
        node = ints[N_NODES]
        ints[N_NODES] = node + 1
    return int(node)


@inlined
def _drop_node(cache: Cache, node: int) -> None:
    """Put a node out of use."""
    cache.nodes[node, NEXT] = cache.ints[SPARE]
    cache.ints[SPARE] = node


@inlined
def append(cache: Cache, node: int) -> None:
    """Put a node at the end of the queue."""
    nodes = cache.nodes
    last = nodes[0, PREVIOUS]
    nodes[node, NEXT] = 0
    nodes[node, PREVIOUS] = last
    nodes[last, NEXT] = node
    nodes[0, PREVIOUS] = node


@inlined
def remove(cache: Cache, node: int) -> None:
    """Take a node out of the queue."""
    nodes = cache.nodes
    after, before = nodes[node, NEXT], nodes[node, PREVIOUS]
    nodes[before, NEXT] = after
    nodes[after, PREVIOUS] = before


@entry
def append_run(cache: Cache, count: int) -> None:
    """Put ``count`` unpublished blocks at the end of the queue; a tree has them apart."""
    if cache.radix:
        cache.ints[BLANK] += count
        return
    if count == 0:
        return
    last = cache.nodes[0, PREVIOUS]
    if last > 0 and cache.nodes[last, ID] == NOBODY:
        cache.nodes[last, COUNT] += count
        return
    node = new_node(cache)
    cache.nodes[node, ID] = NOBODY
    cache.nodes[node, COUNT] = count
    append(cache, node)


@inlined
def _withdraw(cache: Cache, node: int) -> None:
    """Let a run no longer be found."""
    nodes = cache.nodes
    chain = nodes[node, ID] >> PART_BITS
    newer, older = nodes[node, NEWER], nodes[node, OLDER]
    if newer == node:
        cache.first[chain] = 0
        return
    nodes[older, NEWER] = newer
    nodes[newer, OLDER] = older
    if cache.first[chain] == node:
        cache.first[chain] = newer


@inlined
def enter(cache: Cache, node: int) -> None:
    """Let a run be found, behind all of its chain with an earlier stamp."""
    nodes = cache.nodes
    chain = nodes[node, ID] >> PART_BITS
    first = cache.first[chain]
    if first == 0:
        cache.first[chain] = node
        nodes[node, NEWER] = node
        nodes[node, OLDER] = node
        return
    older = nodes[first, OLDER]
    stamp = nodes[node, STAMP]
    while nodes[older, STAMP] > stamp:
        if older == first:
            cache.first[chain] = node
            older = nodes[first, OLDER]
            break
        older = nodes[older, OLDER]
    newer = nodes[older, NEWER]
    nodes[node, OLDER] = older
    nodes[node, NEWER] = newer
    nodes[older, NEWER] = node
    nodes[newer, OLDER] = node


@inlined
def oldest(cache: Cache, chain: int, part: int, stop: int) -> tuple[int, int]:
    """The oldest run of a chain that holds its block ``part``, 0 if none does; and up to which block, at most ``stop``, it is the one found."""
    nodes = cache.nodes
    first = cache.first[chain]
    if cache.largest == 1:
        return first, stop
    node = first
    while node > 0:
        start = nodes[node, ID] & PART_MASK
        if start > part:
            stop = min(stop, start)
        elif start + nodes[node, COUNT] > part:
            return int(node), int(min(stop, start + nodes[node, COUNT]))
        node = nodes[node, NEWER]
        if node == first:
            node = 0
    return 0, stop


@compiled
def split(cache: Cache, node: int, count: int) -> int:
    """Part a run behind its first ``count`` blocks; return the second part."""
    nodes = cache.nodes
    rest = new_node(cache)
    nodes[rest, ID] = nodes[node, ID] + count
    nodes[rest, COUNT] = nodes[node, COUNT] - count
    nodes[rest, OWNERS] = nodes[node, OWNERS]
    nodes[rest, STAMP] = nodes[node, STAMP]
    nodes[node, COUNT] = count
    newer = nodes[node, NEWER]
    nodes[rest, OLDER] = node
    nodes[rest, NEWER] = newer
    nodes[newer, OLDER] = rest
    nodes[node, NEWER] = rest
    if nodes[node, OWNERS] > 0:
        nodes[rest, NEXT] = nodes[node, NEXT]
        nodes[node, NEXT] = rest
    else:  # in the queue, where its last blocks are taken first
        before = nodes[node, PREVIOUS]
        nodes[rest, PREVIOUS] = before
        nodes[rest, NEXT] = node
        nodes[before, NEXT] = rest
        nodes[node, PREVIOUS] = rest
    return rest


@inlined
def cut(cache: Cache, node: int, part: int, stop: int) -> int:
    """Part a run so that blocks ``part`` to ``stop`` of its unit are one by themselves; return that."""
    begin = cache.nodes[node, ID] & PART_MASK
    if stop < begin + cache.nodes[node, COUNT]:
        split(cache, node, stop - begin)
    if part > begin:
        node = split(cache, node, part - begin)
    return node


@compiled
def take(cache: Cache, count: int) -> None:
    """C2: take blocks from the front of the queue; the taker counts them."""
    if count <= 0:
        return
    nodes = cache.nodes
    if len(cache.log) > 0:
        note(cache, TAKES, -1, count, 0)
    blank = min(count, cache.ints[BLANK])
    cache.ints[BLANK] -= blank
    left = count - blank
    while left > 0:
        node = nodes[0, NEXT]
        if nodes[node, ID] == NOBODY:
            if nodes[node, COUNT] > left:
                nodes[node, COUNT] -= left
                return
            left -= nodes[node, COUNT]
        elif nodes[node, COUNT] > left:
            nodes[node, COUNT] -= left
            cache.ints[EVICTED] += left
            return
        else:
            _withdraw(cache, node)
            cache.ints[EVICTED] += nodes[node, COUNT]
            if cache.tiers.on:
                move_down(cache.tiers, nodes[node, ID] >> PART_BITS)
            left -= nodes[node, COUNT]
        remove(cache, node)
        _drop_node(cache, node)
