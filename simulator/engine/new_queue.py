"""The arrays of :class:`simulator.engine.queues.Queue`, from settings and requests."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulator.engine import queues
from simulator.engine.records import EngineSettings, Requests
from simulator.engine.scheduling import BATCHINGS, POLICIES


def new_queue(settings: EngineSettings, requests: Requests) -> queues.Queue:
    """Return an empty queue for ``requests``; columns that the settings do not read are not kept."""
    scheduling, host = settings.scheduling, settings.host
    n, m = len(requests), settings.max_num_seqs
    leave = requests.clients_may_leave
    rules = queues.Rules(
        policy=POLICIES.index(scheduling.policy),
        preempt_lower=scheduling.preempt_lower,
        batching=BATCHINGS.index(scheduling.batching),
        longest_chunk=scheduling.long_prefill_token_threshold or settings.max_num_batched_tokens,
        max_partials=scheduling.max_num_partial_prefills,
        margin=math.floor(scheduling.watermark * settings.num_kv_blocks),
        prompt_weight=scheduling.prompt_weight,
        output_weight=scheduling.output_weight,
        host_step=host.step_s,
        host_sequence=host.sequence_s,
        host_token=host.token_s,
        asynchronous=host.asynchronous,
        request_s=host.request_s,
        output_s=host.output_s,
        max_attempts=settings.retries.max_attempts,
        clients_leave=leave,
    )
    fair = scheduling.policy == "fair"
    rank = {"priority": requests.priority, "sjf": requests.predicted_tokens}.get(scheduling.policy)
    tenant = _column(requests.tenant, n * fair, 0, np.int64)
    tenants = int(tenant.max(initial=-1)) + 1
    ints = np.zeros(queues.N_QUEUE_INTS, dtype=np.int64)
    ints[queues.LAST_TENANT] = -1
    waiting = 0 if fair else n
    due = n if leave else 0
    return queues.Queue(
        rules=rules,
        ints=ints,
        floats=np.zeros(queues.N_QUEUE_FLOATS),
        rank=np.zeros(n) if rank is None else np.array(rank, dtype=np.float64),
        ticket=_whole(n),
        emitted=_whole(n),
        seen=_whole(n),
        last_token=np.zeros(n),
        put_back_at=_whole(n) - 1,
        slot=np.zeros(n, dtype=np.int32),
        gone=np.zeros(n, dtype=np.int8),
        attempt=np.zeros(n),
        attempts=np.zeros(n, dtype=np.int32),
        wasted=np.zeros(n),
        after=_whole(n * fair),
        before=_whole(n * fair),
        tenant=tenant,
        deadline=_column(requests.deadline_s, n * (scheduling.policy == "edf"), 0.0, np.float64),
        ttft_timeout=_column(requests.ttft_timeout_s, n * leave, math.inf, np.float64),
        timeout=_column(requests.timeout_s, n * leave, math.inf, np.float64),
        cancel=_column(requests.cancel_s, n * leave, math.inf, np.float64),
        front=_whole(tenants) - 1,
        back=_whole(tenants) - 1,
        base=_whole(tenants),
        decoding=_whole(tenants),
        partials=_whole(m),
        chunk=_whole(m),
        granted=_whole(m),
        gone_slots=_whole(m),
        heap_rank=np.zeros(waiting),
        heap_entry=_whole(waiting),
        due_time=np.zeros(due),
        due_entry=_whole(due),
        waits=settings.retries.waits_s(),
    )


def _whole(n: int) -> NDArray[np.int64]:
    return np.zeros(n, dtype=np.int64)


def _column(values: NDArray[Any] | None, n: int, default: float, dtype: type) -> NDArray[Any]:
    """Column of a stream as the compiled engine reads it: [n], contiguous; empty if nobody will read it."""
    if values is None or not n:
        return np.full(n, default, dtype=dtype)
    return np.ascontiguousarray(values, dtype=dtype)
