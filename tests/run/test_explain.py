"""Explanations add up, to the last bit, and name those that were there first."""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.engine.compiled import Engine, simulate
from simulator.engine.event_log import record
from simulator.engine.records import FINISHED
from simulator.errors import InfeasibleError, InputError
from simulator.run import load_scenario, run_scenario
from simulator.run.explain import explain, follow
from simulator.run.resolve import resolve
from tests.engine.strategies import dyadic_cases, real_case

NAME = "llama-3-8b-azure-chat"


def explained(case, row):
    result = simulate(*case)
    log = record(Engine(*case), float(result.arrival_s[row]), float(result.finish_s[row]))
    return follow(case.requests, case.settings, result, log, row), result, log


@settings(max_examples=100, deadline=None)
@given(case=dyadic_cases(), pick=st.integers(0, 100))
def test_parts_sum_to_the_latency_exactly(case, pick):
    finished = np.flatnonzero(simulate(*case).status == FINISHED)
    if not len(finished):
        return
    row = int(finished[pick % len(finished)])
    found, result, log = explained(case, row)
    assert sum(part.time_s for part in found.parts) == found.e2e_s == result.finish_s[row] - result.arrival_s[row]
    queue = sum(part.time_s for part in found.parts if part.what.startswith("queue"))
    assert queue == found.scheduled_s - found.arrival_s
    again = sum(part.time_s for part in found.parts if part.what in {"preempted", "recompute"})
    assert (again > 0) == (found.preemptions > 0)
    own = sum(part.own_s or 0.0 for part in found.parts)
    assert own == pytest.approx(result.busy_s[row], rel=1e-12)
    for part in found.parts:
        assert part.with_chunks_s <= part.time_s
        # A request's share of a step is less than the step.
        assert part.own_s is None or part.own_s <= part.time_s * (1 + 1e-9)
    # The parts of the queue are the steps between arrival and admission.
    before = [step for step in log.steps if step.start_s < found.scheduled_s]
    assert sum(part.steps for part in found.parts if part.what.startswith("queue")) == len(before)


@pytest.mark.parametrize("seed", range(12))
def test_on_real_costs_the_parts_are_exact_rationals_rounded_once(seed):
    case = real_case(seed)
    result = simulate(*case)
    row = int(np.flatnonzero(result.status == FINISHED)[seed])
    found, _, log = explained(case, row)
    spans = [span for span in log.spans if span.row == row]
    exact = sum((Fraction(span.end_s) - Fraction(span.start_s) for span in spans), Fraction(0))
    assert exact == Fraction(spans[-1].end_s) - Fraction(spans[0].start_s)
    assert spans[0].start_s == found.arrival_s
    assert float(exact) == pytest.approx(found.e2e_s, rel=1e-12)
    assert sum(part.time_s for part in found.parts) == pytest.approx(found.e2e_s, rel=1e-14)


def test_the_queue_says_what_stood_in_the_way():
    base = ["traffic.n_requests=400", "traffic.arrival.rate_per_s=200"]
    causes = {
        "max_num_seqs running": ["engine.max_num_seqs=8"],
        "the next in line did not fit into the KV cache": ["engine.num_gpu_blocks_override=1200"],
        "max_num_batched_tokens spent": ["engine.max_num_batched_tokens=512"],
    }
    for cause, changes in causes.items():
        found = explain(resolve(load_scenario(NAME, [*base, *changes])), 300)
        worst = max(found.parts, key=lambda part: part.time_s if part.what.startswith("queue") else 0.0)
        assert worst.what == f"queue: {cause}"
        assert worst.time_s > 0.5 * sum(part.time_s for part in found.parts if part.what.startswith("queue"))


def test_who_was_ahead_is_who_was_there():
    resolved = resolve(load_scenario(NAME, ["traffic.n_requests=600", "replicas=2", "traffic.arrival.rate_per_s=60"]))
    table = run_scenario(resolved.scenario).result.requests
    found = explain(resolved, 431)
    assert (found.request, found.replica) == (431, 1)
    for name in ("arrival_s", "scheduled_s", "first_token_s", "finish_s"):
        assert getattr(found, name) == pytest.approx(table[name][431], rel=1e-12)
    there = (table["replica"] == 1) & (table["arrival_s"] < found.arrival_s) & (table["finish_s"] > found.arrival_s)
    running = there & (table["scheduled_s"] < found.arrival_s)
    assert (found.running_ahead, found.waiting_ahead) == (running.sum(), (there & ~running).sum())
    assert found.overtaken_by == 0
    assert all(there[one.request] and one.request % 2 == 1 for one in found.ahead)
    longest = max(float(table["finish_s"][i]) for i in np.flatnonzero(there))
    assert found.ahead[0].left_s == pytest.approx(longest - found.arrival_s)


def test_requests_that_cannot_be_explained_are_refused():
    resolved = resolve(load_scenario(NAME, ["traffic.n_requests=50", "engine.max_model_len=200"]))
    with pytest.raises(InputError, match="0 … 49"):
        explain(resolved, 50)
    rejected = int(np.flatnonzero(run_scenario(resolved.scenario).result.requests["status"] == 1)[0])
    with pytest.raises(InfeasibleError, match="rejected on arrival"):
        explain(resolved, rejected)


def test_a_closed_loops_request_is_found(bench):
    requests = bench.requests(n=60, concurrency=5)
    cost, limits = bench.cost(), replace(bench.settings, max_num_seqs=3)
    result = simulate(cost, limits, requests)
    log = record(Engine(cost, limits, requests), float(result.arrival_s[40]), float(result.finish_s[40]))
    found = follow(requests, limits, result, log, 40)
    assert sum(part.time_s for part in found.parts) == pytest.approx(found.e2e_s, rel=1e-12)
    assert found.running_ahead + found.waiting_ahead == 4
