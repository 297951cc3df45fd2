"""Replicas of several parts in the compiled engine: one set of arrays for all, and the view of one part.

What each part has for itself lies in arrays with a leading axis; what is one for all has none.
"""

from typing import Any

from simulator.engine.core import Price, State
from simulator.engine.jit import inlined

OWN_GROWTH = len(Price._fields)
"""Column of stored prices after the fields of Price: growth from step to step."""
N_PRICES = OWN_GROWTH + 1


@inlined
def _of(array: Any, g: int) -> tuple[Any]:
    """Row ``g`` of what each part has for itself, or what is one for all; the branch is taken when this is compiled.

    In a tuple: functions compiled without reference counts may not return a view by itself.
    """
    if array.ndim == 2:
        return (array[g],)
    return (array,)


@inlined
def part_of(states: State, g: int) -> State:
    """View of one part's state."""
    return State(
        _of(states.ints, g)[0],
        _of(states.floats, g)[0],
        _of(states.fifo, g)[0],
        _of(states.pending_time, g)[0],
        _of(states.pending_row, g)[0],
        _of(states.heap, g)[0],
        _of(states.residues, g)[0],
        _of(states.stack, g)[0],
        _of(states.free_slots, g)[0],
        _of(states.row, g)[0],
        _of(states.computed, g)[0],
        _of(states.joined, g)[0],
        _of(states.emitted, g)[0],
        _of(states.seen, g)[0],
        _of(states.finish_step, g)[0],
        _of(states.after, g)[0],
        _of(states.before, g)[0],
        _of(states.w, g)[0],
        _of(states.r0, g)[0],
        _of(states.r1, g)[0],
        _of(states.last_token, g)[0],
        _of(states.events, g)[0],
        _of(states.event_step, g)[0],
        _of(states.growing, g)[0],
        _of(states.chunk_slot, g)[0],
        _of(states.chunk_size, g)[0],
        _of(states.chunk_start, g)[0],
        states.timeline,
        _of(states.bits_f, g)[0],
        _of(states.bits_i, g)[0],
    )


@inlined
def store_price(prices: Any, g: int, price: Price, growth: float) -> None:
    """Write down the price of a part's step, and by how much its steps grow."""
    row = prices[g]
    row[0] = price.d0
    row[1] = price.per_token
    row[2] = price.per_row
    row[3] = price.slope
    row[4] = price.attention
    row[5] = price.rows
    row[6] = price.pairs
    row[7] = price.keys
    row[8] = price.seen_pairs
    row[9] = price.seen_keys
    row[10] = price.plane
    row[11] = price.prefill
    row[12] = price.per_chunk_token
    row[OWN_GROWTH] = growth


@inlined
def load_price(prices: Any, g: int) -> Price:
    """Read what :func:`store_price` wrote."""
    row = prices[g]
    return Price(
        row[0],
        row[1],
        row[2],
        row[3],
        row[4],
        int(row[5]),
        int(row[6]),
        int(row[7]),
        int(row[8]),
        int(row[9]),
        int(row[10]),
        row[11],
        row[12],
    )
