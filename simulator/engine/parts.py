"""Replicas of several parts in the compiled engine: one set of arrays for all, and the views of one part.

What each part has for itself lies in arrays with a leading axis; what is one for all has none.
"""

from typing import Any

from simulator.engine.block_runs import Cache
from simulator.engine.core import Extra, Price, State
from simulator.engine.jit import inlined, inlined_or_none
from simulator.engine.queues import Queue
from simulator.engine.speculation import Batch, Spec, Tariff
from simulator.engine.swap import Swap
from simulator.engine.tiers import Loads, Tiers

# columns of stored prices after the fields of Price: the pace of the part's own steps, the time of its copies, and what a chunk's token pays for the host
OWN_D0 = len(Price._fields)
OWN_Q, OWN_GROWTH, COPIES, HOST_SHARE, N_PRICES = range(OWN_D0 + 1, OWN_D0 + 6)


@inlined
def _of(array: Any, g: int) -> tuple[Any]:
    """Row ``g`` of vectors that each part has for itself, or the vector that is one for all; the branch is taken when this is compiled.

    In a tuple: functions compiled without reference counts may not return a view by itself.
    """
    if array.ndim == 2:
        return (array[g],)
    return (array,)


@inlined
def _table_of(array: Any, g: int) -> tuple[Any]:
    """The same for tables."""
    if array.ndim == 3:
        return (array[g],)
    return (array,)


@inlined
def _rings_of(array: Any, g: int) -> tuple[Any]:
    """The same for arrays of three axes."""
    if array.ndim == 4:
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
        _of(states.row, g)[0],
        _table_of(states.slots, g)[0],
        _table_of(states.sums, g)[0],
        _of(states.events, g)[0],
        _table_of(states.chunks, g)[0],
        _table_of(states.timeline, g)[0],
        _of(states.bits_f, g)[0],
        _of(states.bits_i, g)[0],
    )


@inlined
def queue_of(queues: Queue, g: int) -> Queue:
    """View of one part's queue; what rows say is one for all."""
    return Queue(
        queues.rules,
        _of(queues.ints, g)[0],
        queues.counts,
        _of(queues.floats, g)[0],
        queues.row_ints,
        queues.row_floats,
        _table_of(queues.tenants, g)[0],
        _table_of(queues.slots, g)[0],
        _of(queues.heap_rank, g)[0],
        _of(queues.heap_entry, g)[0],
        queues.due_time,
        queues.due_entry,
        queues.waits,
    )


@inlined
def _tiers_of(tiers: Tiers, g: int) -> Tiers:
    """View of one part's tiers."""
    return Tiers(
        tiers.on,
        tiers.through,
        _rings_of(tiers.rings, g)[0],
        _table_of(tiers.counts, g)[0],
        _table_of(tiers.times, g)[0],
    )


@inlined
def _cache_of(cache: Cache, g: int) -> Cache:
    """View of one part's prefix cache."""
    return Cache(
        cache.on,
        cache.radix,
        cache.late,
        cache.prompts_first,
        cache.by_epoch,
        cache.block_size,
        cache.groups,
        cache.windowed,
        cache.window,
        cache.chunked,
        _table_of(cache.nodes, g)[0],
        _of(cache.first, g)[0],
        cache.ids,
        cache.offsets,
        cache.sizes,
        cache.largest,
        cache.counts,
        _of(cache.table, g)[0],
        cache.stride,
        _table_of(cache.spans, g)[0],
        _table_of(cache.slots, g)[0],
        _table_of(cache.lists, g)[0],
        cache.pieces,
        cache.holders,
        _of(cache.fills, g)[0],
        _of(cache.n_fills, g)[0],
        cache.reused,
        _tiers_of(cache.tiers, g),
        cache.log,
        _of(cache.ints, g)[0],
    )


@inlined
def _batch_of(batch: Batch, g: int) -> Batch:
    """View of one part's speculating batch."""
    return Batch(
        _of(batch.ints, g)[0],
        _table_of(batch.slots, g)[0],
        _table_of(batch.ring, g)[0],
        _of(batch.events, g)[0],
        batch.lookahead,
        batch.mask,
        batch.block_size,
        batch.groups,
        batch.windowed,
        batch.window,
        batch.chunked,
    )


@inlined
def _tariff_of(tariff: Tariff, g: int) -> Tariff:
    """View of what one part's passes cost."""
    return Tariff(
        tariff.levels,
        tariff.value,
        tariff.slope,
        tariff.draft_curve,
        tariff.draft,
        tariff.chunk,
        _of(tariff.floats, g)[0],
        _table_of(tariff.v, g)[0],
        tariff.wasted,
        _table_of(tariff.passes, g)[0],
        _table_of(tariff.keys, g)[0],
        _of(tariff.chunk_steps, g)[0],
    )


@inlined
def _spec_of(spec: Spec, g: int) -> Spec:
    """View of one part's speculation."""
    return Spec(
        spec.on,
        _batch_of(spec.batch, g),
        _tariff_of(spec.tariff, g),
        spec.level_by_batch,
        spec.rates,
        spec.classes,
        spec.fraction,
    )


@inlined
def _swap_of(swap: Swap, g: int) -> Swap:
    """View of one part's host memory."""
    return Swap(
        swap.on,
        swap.overlapped,
        swap.block_s,
        swap.host_blocks,
        swap.saved,
        _table_of(swap.moves, g)[0],
        _of(swap.ints, g)[0],
        _of(swap.delay, g)[0],
        swap.charged,
    )


@inlined
def _loads_of(loads: Loads, g: int) -> Loads:
    """View of one part's loads."""
    return Loads(
        loads.on,
        loads.policy,
        _of(loads.times, g)[0],
        _of(loads.rows, g)[0],
        loads.loaded,
        loads.start_s,
        loads.end_s,
        _of(loads.ints, g)[0],
    )


@inlined_or_none
def extra_of(extras: Any, g: int) -> Any:
    """View of one part's features, if there are any."""
    return Extra(
        _cache_of(extras.cache, g), _spec_of(extras.spec, g), _swap_of(extras.swap, g), _loads_of(extras.loads, g)
    )


@inlined
def store_price(prices: Any, g: int, price: Price) -> None:
    """Write down the price of a part's step."""
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
