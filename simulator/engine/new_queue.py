"""The arrays of :class:`simulator.engine.queues.Queue`, from settings and requests."""

import math

import numpy as np
from numpy.typing import NDArray

from simulator.engine import queues
from simulator.engine.records import EngineSettings, Requests
from simulator.engine.scheduling import BATCHINGS, POLICIES


def new_queue(settings: EngineSettings, requests: Requests, *, counts_by_step: bool = True) -> queues.Queue:
    """Return an empty queue for ``requests``; columns that the settings do not read are not kept.

    ``counts_by_step``: whether tenants' counts follow from the number of steps, or are kept up by each micro-batch (M22).
    """
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
        host_step=float(host.step_s),
        host_sequence=float(host.sequence_s),
        host_token=float(host.token_s),
        asynchronous=host.asynchronous,
        request_s=float(host.request_s),
        output_s=float(host.output_s),
        max_attempts=settings.retries.max_attempts,
        clients_leave=leave,
        counts_by_step=counts_by_step,
    )
    fair = scheduling.policy == "fair"
    row_ints = _whole(n, queues.TENANT + 1 if fair else queues.AFTER)
    row_ints[:, queues.PUT_BACK_AT] = -1
    tenants = 0
    if fair and requests.tenant is not None:
        row_ints[:, queues.TENANT] = requests.tenant
        tenants = int(requests.tenant.max(initial=-1)) + 1
    by_tenant = _whole(tenants, queues.DECODING + 1)
    by_tenant[:, [queues.FRONT, queues.BACK]] = -1
    width = queues.CANCEL_S if leave else queues.DEADLINE_S if scheduling.policy == "edf" else queues.ATTEMPT_S
    row_floats = np.zeros((n, width + 1))
    kept = {
        queues.RANK: {"priority": requests.priority, "sjf": requests.predicted_tokens}.get(scheduling.policy),
        queues.DEADLINE_S: requests.deadline_s if scheduling.policy == "edf" else None,
    }
    if leave:
        row_floats[:, queues.TTFT_TIMEOUT_S :] = math.inf
        kept[queues.TTFT_TIMEOUT_S] = requests.ttft_timeout_s
        kept[queues.TIMEOUT_S] = requests.timeout_s
        kept[queues.CANCEL_S] = requests.cancel_s
    for column, values in kept.items():
        if values is not None:
            row_floats[:, column] = values
    ints = np.zeros(queues.N_QUEUE_INTS, dtype=np.int64)
    ints[queues.LAST_TENANT] = -1
    waiting, due = 0 if fair else n, n if leave else 0
    return queues.Queue(
        rules=rules,
        ints=ints,
        counts=np.zeros(queues.N_COUNTS, dtype=np.int64),
        floats=np.zeros(queues.N_QUEUE_FLOATS),
        row_ints=row_ints,
        row_floats=row_floats,
        tenants=by_tenant,
        slots=_whole(m, queues.HELD + 1),
        heap_rank=np.zeros(waiting),
        heap_entry=np.zeros(waiting, dtype=np.int64),
        due_time=np.zeros(due),
        due_entry=np.zeros(due, dtype=np.int64),
        waits=settings.retries.waits_s(),
    )


def _whole(rows: int, columns: int) -> NDArray[np.int64]:
    return np.zeros((rows, columns), dtype=np.int64)
