"""Compiled data structures of the scheduler: who is first, who leaves when, what each tenant was served.

The queue is a heap of (rank, ticket), or one list for each tenant; heap entries of requests that are gone stay until they
surface. The rules are those of ``docs/engine-scheduling.md``. Nothing here knows blocks, a step's cost or the running batch.
"""

import math
from typing import Any, NamedTuple

from simulator.engine.heaps import pop_arrival, push_arrival
from simulator.engine.jit import compiled, inlined
from simulator.engine.records import RUNNING, WAITING
from simulator.engine.scheduling import FAIR, FCFS

# indices into Queue.ints
(
    N_QUEUED,
    HEAP,
    PUT_BACKS,
    RETURNS,
    N_PARTIALS,
    LAST_TENANT,
    IS_OPEN,
    RESERVED,
    STALLED,
    N_GONE,
    GRANTED,
    CHUNK_TOKENS,
    TRIES,
    N_QUEUE_INTS,
) = range(14)
# indices into Queue.counts
(
    TICKETS,
    N_DUE,
    TIMEOUTS,
    CANCELLATIONS,
    RETRIES,
    ABANDONED_TOKENS,
    ABANDONED_OUTPUTS,
    N_COUNTS,
) = range(8)
# indices into Queue.floats
HOST, STALL_START, N_QUEUE_FLOATS = range(3)

# columns of Queue.row_ints: GONE is the status of one who leaves at the end of the step, KEPT_EMITTED and KEPT_SEEN are kept while a
# preempted request waits, PUT_BACK_AT is the try at scheduling of its last preemption (-1: none in this attempt), AFTER and BEFORE link a tenant's list
TICKET, KEPT_EMITTED, KEPT_SEEN, PUT_BACK_AT, SLOT, ATTEMPTS, GONE, AFTER, BEFORE, TENANT = range(10)
# columns of Queue.row_floats: ATTEMPT_S is the arrival of the attempt
RANK, KEPT_LAST_TOKEN, WASTED, ATTEMPT_S, DEADLINE_S, TTFT_TIMEOUT_S, TIMEOUT_S, CANCEL_S = range(8)
# columns of Queue.tenants: a count is BASE + output_weight · DECODING · step
FRONT, BACK, BASE, DECODING = range(4)
# columns of Queue.slots: HELD counts the chunks that a pipeline has in flight
PARTIAL_SLOT, CHUNK, HAS_BLOCK, GONE_SLOT, HELD = range(5)

NOBODY, SOME, ALL = range(3)
"""Values of GRANTED: which decoding sequences already own the block of this step's token."""
ROW_BITS = 32
"""Entries of the heaps are ticket << ROW_BITS | row, or the other way round: both stay below 2**31."""
ROW_MASK = (1 << ROW_BITS) - 1
RETURN_STEP = 2.0**-40
"""Ranks of those who return from loading, under ``fcfs``, lie between -1, the last preempted, and 0, new arrivals."""


class Rules(NamedTuple):
    """Settings of :mod:`simulator.engine.scheduling`, as numbers."""

    policy: int
    preempt_lower: bool
    batching: int
    longest_chunk: int
    max_partials: int
    margin: int
    prompt_weight: int
    output_weight: int
    host_step: float
    host_sequence: float
    host_token: float
    asynchronous: bool
    request_s: float
    output_s: float
    max_attempts: int
    clients_leave: bool
    counts_by_step: bool


class Queue(NamedTuple):
    """State of the queue and of the clients, in few arrays: the fewer there are, the sooner a function is compiled and called.

    Attributes
    ----------
    ints, counts
        of the queue; of all clients, which several queues of one replica share.
    row_ints, row_floats
        [n, columns] of requests; columns that nobody will read are left out at the end.
    tenants, slots
        [tenants, 4], [slots, 5]; PARTIAL_SLOT and GONE_SLOT are lists of slots, in order of admission and of leaving.
    heap_rank, heap_entry
        who waits, but for ``fair``.
    due_time, due_entry
        when clients leave.
    waits
        [max_attempts] wait after each attempt. [s]
    """

    rules: Rules
    ints: Any
    counts: Any
    floats: Any
    row_ints: Any
    row_floats: Any
    tenants: Any
    slots: Any
    heap_rank: Any
    heap_entry: Any
    due_time: Any
    due_entry: Any
    waits: Any


@inlined
def _is_queued(queue: Queue, status: Any, entry: int) -> bool:
    """Whether the attempt of a heap entry still waits."""
    row = entry & ROW_MASK
    return bool(queue.row_ints[row, TICKET] == entry >> ROW_BITS and status[row] == WAITING)


@compiled
def _drop_gone(queue: Queue, status: Any) -> int:
    """Rebuild the heap from those who still wait; return its size."""
    kept = 0
    for i in range(queue.ints[HEAP]):
        if _is_queued(queue, status, queue.heap_entry[i]):
            kept = push_arrival(queue.heap_rank, queue.heap_entry, kept, queue.heap_rank[i], queue.heap_entry[i])
    return kept


@inlined
def _push(queue: Queue, status: Any, row: int) -> None:
    """Add a row to the heap; a full one is first rid of those who have gone."""
    size = queue.ints[HEAP]
    if size == len(queue.heap_rank):
        size = _drop_gone(queue, status)
    entry = queue.row_ints[row, TICKET] << ROW_BITS | row
    queue.ints[HEAP] = push_arrival(queue.heap_rank, queue.heap_entry, size, queue.row_floats[row, RANK], entry)


@inlined
def count_of(queue: Queue, tenant: int, step: int) -> int:
    """What a tenant was served up to the (decode) step ``step`` (Q4)."""
    return int(queue.tenants[tenant, BASE] + queue.rules.output_weight * queue.tenants[tenant, DECODING] * step)


@inlined
def start_counting(queue: Queue, row: int, step: int) -> None:
    """Count a decoding request's tokens from ``step`` on."""
    if queue.rules.policy == FAIR and queue.rules.counts_by_step:
        tenant = queue.row_ints[row, TENANT]
        queue.tenants[tenant, DECODING] += 1
        queue.tenants[tenant, BASE] -= queue.rules.output_weight * step


@inlined
def stop_counting(queue: Queue, row: int, step: int) -> None:
    """Count a decoding request's tokens up to ``step`` and no further."""
    if queue.rules.policy == FAIR and queue.rules.counts_by_step:
        tenant = queue.row_ints[row, TENANT]
        queue.tenants[tenant, DECODING] -= 1
        queue.tenants[tenant, BASE] += queue.rules.output_weight * step


@compiled
def least_served(queue: Queue, step: int) -> int:
    """Tenant with the smallest count of those with somebody waiting, then the smallest number; -1: nobody waits."""
    best = -1
    least = 0
    for tenant in range(len(queue.tenants)):
        if queue.tenants[tenant, FRONT] >= 0:
            count = count_of(queue, tenant, step)
            if best < 0 or count < least:
                best = tenant
                least = count
    return best


@inlined
def _lift(queue: Queue, tenant: int, step: int) -> None:
    """Q4: nobody of the tenant waits; let it not claim more than those who do, or than the last who did."""
    other = least_served(queue, step)
    if other < 0:
        other = queue.ints[LAST_TENANT]
    if other >= 0:
        queue.tenants[tenant, BASE] += max(0, count_of(queue, other, step) - count_of(queue, tenant, step))


@inlined
def join_queue(queue: Queue, status: Any, row: int, step: int) -> None:
    """Give an attempt its ticket and its place (Q1)."""
    queue.row_ints[row, TICKET] = queue.counts[TICKETS]
    queue.counts[TICKETS] += 1
    queue.ints[N_QUEUED] += 1
    if queue.rules.policy != FAIR:
        if queue.rules.policy == FCFS:
            queue.row_floats[row, RANK] = 0.0
        _push(queue, status, row)
        return
    tenant = queue.row_ints[row, TENANT]
    if queue.tenants[tenant, FRONT] < 0:
        _lift(queue, tenant, step)
        queue.tenants[tenant, FRONT] = row
    else:
        queue.row_ints[queue.tenants[tenant, BACK], AFTER] = row
    queue.row_ints[row, BEFORE] = queue.tenants[tenant, BACK]
    queue.row_ints[row, AFTER] = -1
    queue.tenants[tenant, BACK] = row


@compiled
def join_again(queue: Queue, status: Any, row: int) -> None:
    """Let a preempted request wait again (Q1)."""
    ints = queue.ints
    ints[N_QUEUED] += 1
    queue.row_ints[row, PUT_BACK_AT] = ints[TRIES]
    if queue.rules.policy != FAIR:
        if queue.rules.policy == FCFS:
            ints[PUT_BACKS] += 1
            queue.row_floats[row, RANK] = -float(ints[PUT_BACKS])
        _push(queue, status, row)
        return
    tenant = queue.row_ints[row, TENANT]
    front = queue.tenants[tenant, FRONT]
    queue.row_ints[row, AFTER] = front
    queue.row_ints[row, BEFORE] = -1
    if front >= 0:
        queue.row_ints[front, BEFORE] = row
    else:
        queue.tenants[tenant, BACK] = row
    queue.tenants[tenant, FRONT] = row


@compiled
def come_back(queue: Queue, status: Any, row: int) -> None:
    """F5, M11: let who has loaded wait again, where its key puts it; under ``fcfs`` behind the preempted, before all others."""
    ints = queue.ints
    ints[N_QUEUED] += 1
    if queue.rules.policy != FAIR:
        if queue.rules.policy == FCFS:
            ints[RETURNS] += 1
            queue.row_floats[row, RANK] = -1.0 + ints[RETURNS] * RETURN_STEP
        _push(queue, status, row)
        return
    tenant = queue.row_ints[row, TENANT]
    before = -1
    after = queue.tenants[tenant, FRONT]
    while after >= 0 and (
        queue.row_ints[after, PUT_BACK_AT] >= 0 or queue.row_ints[after, TICKET] < queue.row_ints[row, TICKET]
    ):
        before = after
        after = queue.row_ints[after, AFTER]
    queue.row_ints[row, BEFORE] = before
    queue.row_ints[row, AFTER] = after
    if before >= 0:
        queue.row_ints[before, AFTER] = row
    else:
        queue.tenants[tenant, FRONT] = row
    if after >= 0:
        queue.row_ints[after, BEFORE] = row
    else:
        queue.tenants[tenant, BACK] = row


@inlined
def first_queued(queue: Queue, status: Any, step: int) -> int:
    """Row of the first of the queue; somebody must wait."""
    if queue.rules.policy == FAIR:
        return int(queue.tenants[least_served(queue, step), FRONT])
    ints = queue.ints
    while not _is_queued(queue, status, queue.heap_entry[0]):
        ints[HEAP] = pop_arrival(queue.heap_rank, queue.heap_entry, ints[HEAP])
    return int(queue.heap_entry[0] & ROW_MASK)


@inlined
def leave_queue(queue: Queue, row: int) -> None:
    """Let a waiting request go; a heap entry stays until it surfaces."""
    queue.ints[N_QUEUED] -= 1
    if queue.rules.policy == FAIR:
        tenant = queue.row_ints[row, TENANT]
        before, after = queue.row_ints[row, BEFORE], queue.row_ints[row, AFTER]
        if before >= 0:
            queue.row_ints[before, AFTER] = after
        else:
            queue.tenants[tenant, FRONT] = after
        if after >= 0:
            queue.row_ints[after, BEFORE] = before
        else:
            queue.tenants[tenant, BACK] = before


@inlined
def take_first(queue: Queue, row: int) -> None:
    """Take ``row``, which ``first_queued`` said is first, from the queue."""
    leave_queue(queue, row)
    if queue.rules.policy != FAIR:
        queue.ints[HEAP] = pop_arrival(queue.heap_rank, queue.heap_entry, queue.ints[HEAP])


@inlined
def count_prompt(queue: Queue, row: int, tokens: int) -> None:
    """Q4: count ``tokens`` of the prompt of a request that is admitted."""
    if queue.rules.policy == FAIR:
        queue.ints[LAST_TENANT] = queue.row_ints[row, TENANT]
        queue.tenants[queue.row_ints[row, TENANT], BASE] += queue.rules.prompt_weight * tokens


@inlined
def drop_partial(queue: Queue, slot: int) -> None:
    """Take a slot out of those in prefill, if it is there."""
    ints = queue.ints
    kept = 0
    for i in range(ints[N_PARTIALS]):
        if queue.slots[i, PARTIAL_SLOT] != slot:
            queue.slots[kept, PARTIAL_SLOT] = queue.slots[i, PARTIAL_SLOT]
            kept += 1
    ints[N_PARTIALS] = kept


@inlined
def is_after(queue: Queue, row: int, other: int) -> bool:
    """Whether ``row`` has the larger key (Q2)."""
    if queue.row_floats[row, RANK] != queue.row_floats[other, RANK]:
        return bool(queue.row_floats[row, RANK] > queue.row_floats[other, RANK])
    return bool(queue.row_ints[row, TICKET] > queue.row_ints[other, TICKET])


@inlined
def _is_present(queue: Queue, status: Any, entry: int) -> bool:
    """Whether the attempt of a due entry waits or runs, and its client has not left."""
    row = entry >> ROW_BITS
    here = status[row] == WAITING or status[row] == RUNNING
    return bool(queue.row_ints[row, TICKET] == entry & ROW_MASK and here and queue.row_ints[row, GONE] == 0)


@inlined
def due_of(queue: Queue, row: int, has_token: bool) -> float:
    """When the client of an attempt leaves, infinity if never (L1)."""
    due = queue.row_floats[row, ATTEMPT_S] + min(queue.row_floats[row, TIMEOUT_S], queue.row_floats[row, CANCEL_S])
    if not has_token:
        due = min(due, queue.row_floats[row, ATTEMPT_S] + queue.row_floats[row, TTFT_TIMEOUT_S])
    return float(due)


@compiled
def add_due(queue: Queue, status: Any, row: int, has_token: bool) -> None:
    """Note when the client of an attempt will leave, if ever (L1). Ties go by row (L2)."""
    due = due_of(queue, row, has_token)
    if due == math.inf:
        return
    size = queue.counts[N_DUE]
    if size == len(queue.due_time):
        kept = 0
        for i in range(size):
            if _is_present(queue, status, queue.due_entry[i]):
                kept = push_arrival(queue.due_time, queue.due_entry, kept, queue.due_time[i], queue.due_entry[i])
        size = kept
    queue.counts[N_DUE] = push_arrival(
        queue.due_time, queue.due_entry, size, due, row << ROW_BITS | queue.row_ints[row, TICKET]
    )


@inlined
def next_due(queue: Queue, status: Any) -> float:
    """When the next client leaves; infinity if none will."""
    counts = queue.counts
    while counts[N_DUE] > 0 and not _is_present(queue, status, queue.due_entry[0]):
        counts[N_DUE] = pop_arrival(queue.due_time, queue.due_entry, counts[N_DUE])
    return float(queue.due_time[0]) if counts[N_DUE] > 0 else math.inf


@inlined
def pop_due(queue: Queue) -> int:
    """Row of the client who leaves next, which ``next_due`` said there is."""
    row = queue.due_entry[0] >> ROW_BITS
    queue.counts[N_DUE] = pop_arrival(queue.due_time, queue.due_entry, queue.counts[N_DUE])
    return int(row)
