"""The compiled engine's swapping: rules E1 to E4 of ``docs/engine-kv-memory.md``.

What a preempted request has in host memory is one number of its row.
"""

from typing import Any, NamedTuple

import numpy as np

from simulator.engine.jit import compiled
from simulator.engine.kv_memory import HostSwap

# columns of Swap.moves
MOVED_ROW, MOVED_BLOCKS, N_COLUMNS = range(3)
# indices into Swap.ints
FREE_HOST, N_MOVED, OUT_BLOCKS, IN_BLOCKS, FALLBACKS, MAX_HOST, N_INTS = range(7)


class Swap(NamedTuple):
    """Host memory for preempted requests. ``on`` is false where a replica has none.

    Attributes
    ----------
    saved
        [requests] tokens of a preempted request in host memory.
    moves
        [moves, 2] whose blocks this step copies, and how many.
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
    saved: Any
    moves: Any
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
        saved=np.zeros(n, dtype=np.int64),
        # In one step nobody is preempted twice, or admitted after it.
        moves=np.zeros((2 * max_num_seqs + 2, N_COLUMNS), dtype=np.int64),
        ints=np.zeros(N_INTS, dtype=np.int64),
        delay=np.zeros(1),
        charged=np.zeros(n),
    )
    swap.ints[FREE_HOST] = host.blocks
    return swap


@compiled
def _note_move(swap: Swap, row: int, blocks: int) -> None:
    place = swap.ints[N_MOVED]
    swap.moves[place, MOVED_ROW] = row
    swap.moves[place, MOVED_BLOCKS] = blocks
    swap.ints[N_MOVED] = place + 1


@compiled
def copy_out(swap: Swap, row: int, tokens: int, blocks: int) -> None:
    """E1: copy the ``blocks`` of a preempted request's ``tokens`` to host memory, if they fit."""
    ints = swap.ints
    swap.saved[row] = 0
    if blocks > ints[FREE_HOST]:
        ints[FALLBACKS] += 1
        return
    ints[FREE_HOST] -= blocks
    ints[OUT_BLOCKS] += blocks
    ints[MAX_HOST] = max(ints[MAX_HOST], swap.host_blocks - ints[FREE_HOST])
    swap.saved[row] = tokens
    if blocks > 0:
        _note_move(swap, row, blocks)


@compiled
def copy_in(swap: Swap, row: int, saved_blocks: int, blocks: int) -> None:
    """E2: copy ``blocks`` of a readmitted request back, those that it has not found in the prefix cache."""
    swap.ints[FREE_HOST] += saved_blocks
    swap.ints[IN_BLOCKS] += blocks
    swap.saved[row] = 0
    if blocks > 0:
        _note_move(swap, row, blocks)


@compiled
def forget(swap: Swap, row: int, saved_blocks: int) -> None:
    """M13: a client leaves whose request is in host memory."""
    swap.ints[FREE_HOST] += saved_blocks
    swap.saved[row] = 0


@compiled
def delay_of(swap: Swap, step_s: float) -> float:
    """E3: time by which the copies lengthen a step of ``step_s``."""
    total = 0
    for i in range(swap.ints[N_MOVED]):
        total += swap.moves[i, MOVED_BLOCKS]
    delay = total * swap.block_s
    return float(max(delay - step_s, 0.0) if swap.overlapped else delay)


@compiled
def charge_copies(swap: Swap, busy: Any, delay: float) -> None:
    """E4: split the ``delay`` of a step by blocks among those whose blocks are copied."""
    total = 0
    for i in range(swap.ints[N_MOVED]):
        total += swap.moves[i, MOVED_BLOCKS]
    for i in range(swap.ints[N_MOVED]):
        row = swap.moves[i, MOVED_ROW]
        share = delay * swap.moves[i, MOVED_BLOCKS] / total
        busy[row] += share
        swap.charged[row] += share
    swap.ints[N_MOVED] = 0
    swap.delay[0] += delay
