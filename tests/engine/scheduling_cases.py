"""Random cases with policies, batching modes, hosts and clients that leave, on top of the dyadic cases of strategies.py."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
from hypothesis import strategies as st

from simulator.engine.records import CANCELLED, FINISHED, TIMED_OUT
from simulator.engine.scheduling import BATCHINGS, POLICIES, HostOverheads, Retries, Scheduling
from tests.engine.strategies import Case, Pick, dyadic_case, dyadic_cost, one_of

GRID_S = 2.0**-6


def scheduled_case(pick: Pick) -> Case:
    """A dyadic case in which something beyond a plain replica is switched on."""
    case = dyadic_case(pick)
    batching = one_of(pick, (*BATCHINGS, "chunked", "chunked"))
    policy = one_of(pick, (*POLICIES, "priority", "priority", "priority"))
    case = with_batching(pick, case, batching)
    case = with_policy(pick, case, policy)
    if pick(0, 1):
        case = with_host(pick, case)
    return with_clients(pick, case) if pick(0, 1) else case


def with_batching(pick: Pick, case: Case, batching: str) -> Case:
    cost, settings, requests = case
    chunked = batching == "chunked"
    threshold = pick(1, 8) if chunked and pick(0, 1) else 0
    scheduling = Scheduling(
        batching=batching,
        long_prefill_token_threshold=threshold,
        max_num_partial_prefills=pick(1, 3) if chunked and pick(0, 2) == 0 else 0,
        watermark=one_of(pick, (0.0, 0.0, 0.125, 0.5)),
    )
    budget = settings.max_num_batched_tokens
    if not chunked:  # whole prompts must fit, most of them
        budget = max(budget, int((requests.prompt_tokens + requests.max_tokens).max()) - pick(0, 3))
        cost = dyadic_cost(pick, budget, settings.max_num_seqs, one_of(pick, (2.0**-6, 2.0**-3)))
    return Case(cost, replace(settings, scheduling=scheduling, max_num_batched_tokens=budget), requests)


def with_policy(pick: Pick, case: Case, policy: str) -> Case:
    cost, settings, requests = case
    n = len(requests)
    scheduling = replace(
        settings.scheduling,
        policy=policy,
        preempt_lower=policy == "priority" and settings.scheduling.batching != "static" and pick(0, 3) > 0,
        prompt_weight=pick(0, 2),
        output_weight=pick(0, 3),
    )
    columns = {
        "priority": np.array([pick(0, 2) for _ in range(n)]),
        "predicted_tokens": np.array([float(pick(1, 20)) for _ in range(n)]),
        "deadline_s": GRID_S * np.array([float(pick(0, 200)) for _ in range(n)]),
        "tenant": np.array([pick(0, 3) for _ in range(n)]),
    }
    return Case(cost, replace(settings, scheduling=scheduling), replace(requests, **columns))


def with_host(pick: Pick, case: Case) -> Case:
    cost, settings, requests = case
    asynchronous = pick(0, 2) > 0
    typical_s = GRID_S * round(float(cost.dense_s[len(cost.dense_s) // 2]) / GRID_S)
    host = HostOverheads(
        step_s=typical_s + GRID_S * pick(0, 40) if asynchronous else GRID_S * pick(0, 40) * pick(0, 1),
        sequence_s=GRID_S * pick(0, 3),
        token_s=GRID_S * pick(0, 1),
        asynchronous=asynchronous,
        request_s=GRID_S * pick(0, 20) * pick(0, 1),
        output_s=GRID_S * pick(0, 9) * pick(0, 1),
    )
    return Case(cost, replace(settings, host=host), requests)


def with_clients(pick: Pick, case: Case) -> Case:
    cost, settings, requests = case
    n = len(requests)
    scale_s = one_of(pick, (0.25, 1.0, 4.0, 16.0)) * 8 * float(cost.dense_s[1:].mean())
    unit_s = max(GRID_S, 2.0 ** round(np.log2(scale_s) - 5))
    earliest_s = settings.host.request_s + unit_s
    columns = {}
    for name in ("ttft_timeout_s", "timeout_s", "cancel_s"):
        if pick(0, 1):
            chosen = [pick(0, 2) > 0 for _ in range(n)]
            columns[name] = np.array([earliest_s + unit_s * pick(0, 96) if some else np.inf for some in chosen])
    retries = Retries(max_attempts=pick(1, 3), backoff_s=unit_s * pick(0, 12), backoff_factor=float(pick(1, 2)))
    return Case(cost, replace(settings, retries=retries), replace(requests, **columns))


def random_scheduled_case(seed: int) -> Case:
    """The case of a seed."""
    rng = np.random.default_rng([seed, 4])
    return scheduled_case(lambda low, high: int(rng.integers(low, high, endpoint=True)))


@st.composite
def scheduled_cases(draw: st.DrawFn) -> Case:
    """Cases drawn by hypothesis, so that a failure shrinks."""
    return scheduled_case(lambda low, high: draw(st.integers(low, high)))


def scheduling_events_of(case: Case, result, steps) -> set[str]:
    """Name the special situations of scheduling that a run met."""
    _, settings, requests = case
    scheduling = settings.scheduling
    events = set()
    order = {row: i for i, row in enumerate(np.lexsort((np.arange(len(requests)), result.arrival_s)).tolist())}
    admitted = [row for step in steps for row in step.admitted]
    if any(order[a] > order[b] for a, b in pairwise(admitted)):
        events.add("overtaking")
    if scheduling.preempt_lower and any(step.preempted and step.admitted for step in steps):
        events.add("preemption by class")
    if any(_not_last(before, step) for before, step in pairwise(steps)):
        events.add("victim that is not the last to run")
    unfinished = [
        sum(step.computed[row] + step.scheduled.get(row, 0) < requests.prompt_tokens[row] for row in step.running)
        for step in steps
    ]
    if any(n > 1 for n in unfinished):
        events.add("several unfinished prompts")
    stalled = [step for step in steps if step.P and not step.B and len(step.scheduled) < len(step.running)]
    if scheduling.batching in {"prefill_first", "static"} and stalled:
        events.add("decodes that sit a step out")
    if scheduling.batching == "static" and any(step.waiting and step.B for step in steps):
        events.add("waiting for a static batch")
    if settings.host.asynchronous and any(step.host_s > 0 for step in steps):
        events.add("host slower than device")
    if settings.host.asynchronous and any(a.host_s > 0 and b.host_s == 0 for a, b in pairwise(steps)):
        events.add("device overtakes the host")
    if not settings.host.asynchronous and any(step.host_s > 0 for step in steps):
        events.add("host work in sequence")
    for name in ("timeouts", "cancellations", "retries"):
        if result.totals[name]:
            events.add(name)
    if result.totals["abandoned_outputs"]:
        events.add("left while decoding")
    if (np.isin(result.status, (TIMED_OUT, CANCELLED)) & np.isnan(result.scheduled_s)).any():
        events.add("left without having run")
    if ((result.attempts > 1) & (result.status == FINISHED)).any():
        events.add("finished in a later attempt")
    if requests.concurrency and np.isin(result.status, (TIMED_OUT, CANCELLED)).any():
        events.add("closed loop with clients that leave")
    if scheduling.policy == "fair" and len(set(requests.tenant.tolist())) > 1:
        events.add("several tenants")
    return events


def _not_last(before, step) -> bool:
    """Whether somebody preempted was not at the end of the running list."""
    survivors = [row for row in before.running if row in set(step.running) - set(step.preempted)]
    last = before.running.index(survivors[-1]) if survivors else -1
    return any(row in before.running and before.running.index(row) < last for row in step.preempted)
