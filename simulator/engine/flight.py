"""Micro-batches of a pipeline in flight, and their way through its stages: rules S2, S5 and M18 of the engine.

What a group of requests keeps while it is scheduled and completes is in :mod:`simulator.engine.stages`.
"""

from typing import Any, NamedTuple

from simulator.engine.core import (
    AFTER,
    BATCH,
    CLOCK,
    FINISH_STEP,
    FIRST,
    FREE_BLOCKS,
    INTERVAL,
    KNOT,
    MAX_BLOCKS,
    MAX_RUNNING,
    MAX_WAITING,
    N_RUNNING,
    T_BUSY,
    Extra,
    Limits,
    Outcome,
    Price,
    State,
)
from simulator.engine.jit import compiled, inlined
from simulator.engine.parts import HOST_SHARE
from simulator.engine.progressions import spread
from simulator.engine.queues import BASE, HOST, TENANT, Queue
from simulator.engine.segments import widen_timeline
from simulator.engine.swap import N_MOVED, charge_copies, delay_of

# indices into Flight.floats: stage-seconds of work, and of it what uneven experts added
WORK, IMBALANCE, N_FLIGHT_FLOATS = range(3)
# columns of Flight.passes: how often a group may complete before anything about it changes, and how often it has, see ``rounds``
ALIKE, PASSED, N_PASSES = range(3)


class StageTable(NamedTuple):
    """Times of each stage; decode pieces are on the union of all stages' knots, planes padded with zeros."""

    dense: Any
    head: Any
    knots: Any
    value: Any
    slope: Any
    walk: Any
    seq: Any
    planes: Any
    window_slope: Any
    experts: Any
    excess: Any
    send: Any


class Flight(NamedTuple):
    """Micro-batches in flight.

    Attributes
    ----------
    done
        [groups] when each group completes, inf if it is not in flight.
    last
        [groups] when each did last, which is when its sequences had their last token; −1: each sequence had it at its own time (``LAST_TOKEN``).
    chunks
        [groups] how many chunks it holds.
    free
        [pp] when each stage has its last micro-batch behind it.
    entered, left
        [groups, pp] when each group's latest micro-batch enters and leaves each stage: for who looks inside.
    group
        [slots] the group whose list a running request is in: the one it decodes in, or that ends its prompt; −1 before.
    prices
        [groups, columns] see :func:`simulator.engine.parts.store_price`; ``floats``: see the indices above; ``passes``: [groups, columns] see there.
    """

    done: Any
    last: Any
    chunks: Any
    free: Any
    entered: Any
    left: Any
    group: Any
    prices: Any
    floats: Any
    passes: Any


@inlined
def enter_stages(
    stages: StageTable,
    flight: Flight,
    out: Outcome,
    shared: State,
    queue: Queue,
    extra: Extra | None,
    g: int,
    price: Price,
    ints: Any,
    keys: int,
    windowed: int,
    tokens: int,
    excess: float,
) -> None:
    """S5, M18: send a micro-batch through the stages.

    ``ints`` are those of its group, whose decoding sequences attend ``keys`` keys, ``windowed`` in windowed layers.
    """
    n_stages = len(flight.free)
    floats, rules = shared.floats, queue.rules
    batch, knot = ints[BATCH], ints[KNOT]
    ready = floats[CLOCK]
    chunks = flight.chunks[g]
    copies = 0.0
    host = 0.0
    # The way through the stages first: the timeline must reach its end before it is marked.
    for j in range(n_stages):
        time = stages.dense[j, tokens] + stages.head[j, price.rows]
        if excess > 0.0:
            time += excess * stages.experts[j, tokens]
        if batch > 0:
            time += stages.value[j, knot] + stages.slope[j, knot] * (keys - stages.knots[knot])
            time += stages.walk[j, batch] * keys
            time += stages.seq[j] * batch + stages.window_slope[j] * windowed
        if chunks > 0:
            attention = 0.0
            for p in range(stages.planes.shape[1]):
                value = stages.planes[j, p, 0] * price.pairs + stages.planes[j, p, 1] * price.keys
                value += stages.planes[j, p, 2] * chunks
                value += stages.planes[j, p, 3] * price.seen_pairs + stages.planes[j, p, 4] * price.seen_keys
                attention = max(attention, value)
            time += attention
        if extra is not None and extra.swap.on and extra.swap.ints[N_MOVED] > 0:
            delay = delay_of(extra.swap, time)
            copies += delay
            time += delay
        if j == 0:
            work = rules.host_step + rules.host_sequence * (batch + chunks) + rules.host_token * tokens
            host = max(work - time, 0.0) if rules.asynchronous else work
            time += host
        start = max(ready, flight.free[j])
        end = start + time
        flight.free[j] = end
        flight.entered[g, j] = start
        flight.left[g, j] = end
        flight.floats[WORK] += time
        if end >= shared.timeline.shape[1] * floats[INTERVAL]:
            widen_timeline(shared.timeline, floats, end)
        spread(shared.timeline, T_BUSY, floats[INTERVAL], start, end, 1.0 / n_stages)
        ready = end
        if j + 1 < n_stages:
            ready += stages.send[j, tokens]
    flight.done[g] = ready
    if extra is not None and extra.swap.on and extra.swap.ints[N_MOVED] > 0:
        charge_copies(extra.swap, out.busy, copies)
    queue.floats[HOST] += host
    flight.prices[g, HOST_SHARE] = host / tokens


@compiled
def count_decodes(group: State, queue: Queue, passes: int) -> None:
    """Q4, M22: count the tokens that a micro-batch gives each of its decoding sequences in some passes."""
    slot = group.ints[FIRST]
    while slot >= 0:
        if group.slots[slot, FINISH_STEP] >= 0:
            queue.tenants[queue.row_ints[group.row[slot], TENANT], BASE] += passes * queue.rules.output_weight
        slot = group.slots[slot, AFTER]


@inlined
def note_peaks(limits: Limits, shared: State, waiting: int) -> None:
    """S7: peaks, as a micro-batch has been scheduled."""
    ints = shared.ints
    ints[MAX_WAITING] = max(ints[MAX_WAITING], waiting)
    ints[MAX_RUNNING] = max(ints[MAX_RUNNING], ints[N_RUNNING])
    ints[MAX_BLOCKS] = max(ints[MAX_BLOCKS], limits.num_blocks - ints[FREE_BLOCKS])
