"""The compiled engine's swapping: rules E1 to E4 of ``docs/engine-kv-memory.md``.

A preempted request keeps its slot, so what it has in host memory is one number of its slot.
"""

from typing import Any, NamedTuple

import numpy as np

from simulator.engine.jit import compiled
from simulator.engine.kv_memory import HostSwap

# columns of Swap.slots
SAVED, MOVED_SLOT, MOVED_BLOCKS, N_COLUMNS = range(4)
# indices into Swap.ints
FREE_HOST, N_MOVED, OUT_BLOCKS, IN_BLOCKS, FALLBACKS, MAX_HOST, N_INTS = range(7)


class Swap(NamedTuple):
    """Host memory for preempted requests. ``on`` is false where a replica has none.

    Attributes
    ----------
    slots
        [slots, 3] tokens of a preempted request in host memory; the last two columns list the slots whose blocks this step copies,
        and how many.
    ints
        counts, see the indices above.
    delay
        [1] time by which copies have lengthened steps. [s]
    charged
        [requests] the part of a request's busy time that its copies took. [s]
    """

    on: bool
    overlapped: bool
    block_s: float
    host_blocks: int
    slots: Any
    ints: Any
    delay: Any
    charged: Any


def new_swap(host: HostSwap | None, *, max_num_seqs: int, n: int) -> Swap:
    """Empty host memory, or the stand-in of none if ``host`` is None."""
    on = host is not None
    if host is None:
        host, max_num_seqs, n = HostSwap(0), 0, 0
    swap = Swap(
        on=on,
        overlapped=host.overlapped,
        block_s=float(host.block_s),
        host_blocks=host.blocks,
        slots=np.zeros((max_num_seqs, N_COLUMNS), dtype=np.int64),
        ints=np.zeros(N_INTS, dtype=np.int64),
        delay=np.zeros(1),
        charged=np.zeros(n),
    )
    swap.ints[FREE_HOST] = host.blocks
    return swap


@compiled
def _note_move(swap: Swap, slot: int, blocks: int) -> None:
    place = swap.ints[N_MOVED]
    swap.slots[place, MOVED_SLOT] = slot
    swap.slots[place, MOVED_BLOCKS] = blocks
    swap.ints[N_MOVED] = place + 1


@compiled
def copy_out(swap: Swap, slot: int, tokens: int, blocks: int) -> None:
    """E1: copy the ``blocks`` of a preempted request's ``tokens`` to host memory, if they fit."""
    ints = swap.ints
    swap.slots[slot, SAVED] = 0
    if blocks > ints[FREE_HOST]:
        ints[FALLBACKS] += 1
        return
    ints[FREE_HOST] -= blocks
    ints[OUT_BLOCKS] += blocks
    ints[MAX_HOST] = max(ints[MAX_HOST], swap.host_blocks - ints[FREE_HOST])
    swap.slots[slot, SAVED] = tokens
    _note_move(swap, slot, blocks)


@compiled
def copy_in(swap: Swap, slot: int, saved_blocks: int, hits: int) -> None:
    """E2: copy a readmitted request's blocks back, but for its ``hits`` in the prefix cache."""
    blocks = max(saved_blocks - hits, 0)
    swap.ints[FREE_HOST] += saved_blocks
    swap.ints[IN_BLOCKS] += blocks
    swap.slots[slot, SAVED] = 0
    if blocks > 0:
        _note_move(swap, slot, blocks)


@compiled
def charge_copies(swap: Swap, rows: Any, busy: Any, step_s: float) -> float:
    """E3, E4: time by which the copies lengthen a step, split by blocks among those whose blocks they are."""
    total = 0
    for i in range(swap.ints[N_MOVED]):
        total += swap.slots[i, MOVED_BLOCKS]
    delay = total * swap.block_s
    if swap.overlapped:
        delay = max(delay - step_s, 0.0)
    for i in range(swap.ints[N_MOVED]):
        row = rows[swap.slots[i, MOVED_SLOT]]
        share = delay * swap.slots[i, MOVED_BLOCKS] / total
        busy[row] += share
        swap.charged[row] += share
    swap.ints[N_MOVED] = 0
    swap.delay[0] += delay
    return delay
