"""Invariant I19: every run ends, also where the KV cache holds one long request and chunks are of a token or two."""

import numpy as np
import pytest

from simulator.engine.compiled import new_engine
from simulator.engine.records import EngineSettings, itl_bin
from simulator.engine.reference import Replica
from simulator.engine.reference_scheduler import Scheduler
from simulator.roofline.pipeline_cost import PipelineCost
from tests.engine.comparing import assert_results_equal
from tests.engine.engines import engine
from tests.engine.mixtures import tight_mixture
from tests.engine.strategies import Case, requests_of, step_cost

MEETINGS = (
    ("stages",),
    ("stages", "policy"),
    ("stages", "bounded windows"),
    ("stages", "swap"),
    ("stages", "tiers"),
    ("stages", "clients that leave"),
    ("stages", "batching"),
    ("ranks", "policy"),
    ("bounded windows",),
    ("policy", "clients that leave"),
    ("speculation", "prefix cache"),
    ("swap", "tiers"),
)
SEEDS = 40
"""Of each of them."""


def n_stages(case: Case) -> int:
    return len(case.cost.stages) if isinstance(case.cost, PipelineCost) else 1


def most_steps(case: Case) -> int:
    """The bound of I19, which has the reasons."""
    scheduling, requests = case.settings.scheduling, case.requests
    attempts = case.settings.retries.max_attempts
    bound = n_stages(case) * attempts * int((requests.prompt_tokens + requests.output_tokens).sum())
    if scheduling.batching == "prefill_first":
        bound *= 1 + case.settings.max_num_seqs
    if scheduling.policy in {"priority", "sjf", "edf"}:
        bound *= 2 * (2 * len(requests) * attempts + 1)
    return bound


def run_to_the_bound(case: Case) -> Replica:
    """The reference, stopped if it makes more steps than a run may take."""
    replica, most = Replica(*case), most_steps(case)
    while replica.clock.peek() < np.inf:
        replica.clock.step()
        assert replica.n_steps <= most, f"{replica.n_steps} steps until {replica.clock.now} s, {most} at most"
    return replica


@pytest.mark.parametrize("features", MEETINGS, ids=" and ".join)
def test_every_run_ends(features):
    for seed in range(SEEDS):
        case = tight_mixture(seed, features)
        try:
            replica = run_to_the_bound(case)
            ours = new_engine(*case)
            end_s = replica.clock.now
            ours.advance(2 * end_s + 1)  # one that goes on for ever is stopped there
            found = ours.result()
            theirs = replica.result()
            assert_results_equal(found, theirs)
        except AssertionError as error:
            error.add_note(f"tight_mixture({seed}, {features!r})")
            raise


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_the_foremost_is_not_preempted(policy, monkeypatch):
    features = ("stages",) if policy == "fcfs" else ("stages", "policy")
    cases = [tight_mixture(seed, features) for seed in range(150)]  # drawing one may run another
    seen = {"preemptions": 0, "with others in flight": 0}
    preempt = Scheduler.preempt

    def watched(scheduler, request, plan):
        others = [one for one in scheduler.running if one is not request]
        if policy == "fcfs":
            assert request is not scheduler.running[0]
        else:
            assert any((one.order, one.ticket) < (request.order, request.ticket) for one in others)
        seen["preemptions"] += 1
        seen["with others in flight"] += any(one.flights for one in others)
        preempt(scheduler, request, plan)

    monkeypatch.setattr(Scheduler, "preempt", watched)
    for case in cases:
        scheduling = case.settings.scheduling
        if scheduling.policy == policy and not scheduling.preempt_lower:  # a class may be preempted as a whole (Q3)
            run_to_the_bound(case)
    assert min(seen.values()) > 30


@pytest.mark.parametrize("name", ["reference", "compiled"])
def test_the_foremost_waits_for_the_blocks_of_those_in_flight(name):
    """Worked by hand: at 4 s the first lacks a block while the second is in flight, which gives its own at 5 s."""
    cost = step_cost([0.0, 1.0, 1.0], [0.0] * 3)
    pipeline = PipelineCost((cost, cost), np.zeros((1, 3)))
    settings = EngineSettings(max_num_seqs=2, max_num_batched_tokens=2, block_size=1, num_kv_blocks=6)
    found = engine(name)(pipeline, settings, requests_of([0.0, 0.0], [2, 2], [5, 3]))
    assert found.finish_s.tolist() == [11.0, 14.0]
    assert found.preemptions.tolist() == [0, 1]
    tokens_s = ([2.0, 4.0, 7.0, 9.0, 11.0], [3.0, 5.0, 14.0])
    gaps = [itl_bin(gap) for times in tokens_s for gap in np.diff(times)]
    assert np.repeat(np.arange(len(found.itl_counts)), found.itl_counts).tolist() == sorted(gaps)
