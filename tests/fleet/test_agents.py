"""Agents: who waits for answers."""

from dataclasses import replace

import numpy as np
import pytest

from simulator.engine.records import FINISHED, NOT_ARRIVED, REJECTED
from simulator.engine.replicas import Kind, why_not_plain
from simulator.engine.scheduling import HostOverheads
from simulator.errors import InputError
from simulator.fleet import Agents, Fleet, Link, Router, serve_agents
from simulator.roofline.pipeline_cost import PipelineCost


def crew(fleets, n=300, *, count=6, turns=5, think_s=0.02, deadline_s=np.inf, **more):
    requests = fleets.requests(n, prompt=40, cached=12)
    agents = Agents(count, np.full(n // turns, turns), np.full(n, think_s), deadline_s)
    fleet = Fleet(
        (fleets.pool("prefill", 2), fleets.pool("decode", 2)),
        Router("least-requests"),
        Router("least-requests"),
        Link(1e8, 1e-4, "source"),
        store=Link(1e9, 1e-4),
        **more,
    )
    return fleet, requests, agents


def test_turns_of_a_task_follow_each_other_by_the_time_to_think(fleets):
    fleet, requests, agents = crew(fleets)
    served = serve_agents(fleet, requests, agents)
    assert served.finished.all()
    arrival, finish = served.arrival_s.reshape(-1, 5), served.finish_s.reshape(-1, 5)
    assert np.array_equal(arrival[:, 1:], finish[:, :-1] + 0.02)
    assert (served.store_s > 0).all()
    assert (served.transfer_s[requests.output_tokens > 1] > 0).all()
    # At most ``count`` at work at any time, and always, until tasks run out.
    events = sorted([(t, 1) for t in arrival[:, 0]] + [(t, -1) for t in finish[:, -1]])
    at_work = np.cumsum([step for _, step in events])
    assert at_work.max() == 6


def test_replicas_of_their_own_calls_make_the_same_path(fleets):
    """Two pools, a store and links, once with plain replicas and once with hosts that take no time, which are not plain."""
    fleet, requests, agents = crew(fleets)
    host = HostOverheads(step_s=1e-15)
    slow = [replace(pool, settings=replace(pool.settings, host=host)) for pool in fleet.pools]
    assert why_not_plain(Kind(slow[0].cost, slow[0].settings, 1), requests)
    plain, other = (serve_agents(replace(fleet, pools=tuple(pools)), requests, agents) for pools in (fleet.pools, slow))
    assert other.finished.all()
    assert np.array_equal(plain.replica, other.replica)
    for name in ("arrival_s", "finish_s", "store_s", "transfer_s"):
        assert getattr(other, name) == pytest.approx(getattr(plain, name), rel=1e-6, abs=1e-9), name


def test_a_run_is_the_same_again(fleets):
    one, other = (serve_agents(*crew(fleets), seed=3) for _ in range(2))
    for name in ("arrival_s", "finish_s", "replica", "prefill_replica", "transfer_s"):
        assert np.array_equal(getattr(one, name), getattr(other, name), equal_nan=True)


def test_one_agent_turns_at_the_rate_of_its_answers_and_thoughts(fleets):
    """X = 1/(R + Z): nobody else is there, so each answer takes prefill, transfer and decode alone."""
    fleet, requests, agents = crew(fleets, 100, count=1, think_s=0.3)
    served = serve_agents(fleet, requests, agents)
    answer_s = served.finish_s - served.arrival_s
    assert served.end_s == pytest.approx((answer_s + 0.3).sum(), rel=1e-12)
    assert (served.waited_s["link"] == 0).all()
    assert (served.scheduled_s == served.arrival_s + served.store_s).all()


def test_whoever_is_late_leaves_the_rest_of_a_task(fleets):
    fleet, requests, agents = crew(fleets, deadline_s=0.12)
    served = serve_agents(fleet, requests, agents)
    status = served.status.reshape(-1, 5)
    left = status == NOT_ARRIVED
    assert 0 < left.sum() < left.size
    assert (np.diff(left.astype(int), axis=1) >= 0).all()  # the rest, not a part in between
    arrival = served.arrival_s.reshape(-1, 5)
    assert (np.nan_to_num(arrival - arrival[:, :1]) <= 0.12).all()
    late = served.finish_s.reshape(-1, 5) + 0.02 - arrival[:, :1] > 0.12
    assert (left[:, 1:] == (late[:, :-1] | left[:, :-1])).all()
    counts = np.bincount(served.status, minlength=7)
    assert counts.sum() == 300
    assert counts[FINISHED] + counts[NOT_ARRIVED] == 300


def test_a_rejected_request_is_an_answer_too(fleets):
    fleet, requests, agents = crew(fleets, 50)
    prompts = requests.prompt_tokens.copy()
    prompts[[3, 20]] = 900
    served = serve_agents(fleet, replace(requests, prompt_tokens=prompts), agents)
    assert np.flatnonzero(served.status == REJECTED).tolist() == [3, 20]
    assert (np.delete(served.status, [3, 20]) == FINISHED).all()
    assert served.arrival_s[4] == served.arrival_s[3] + 0.02
    # Where only some replicas would reject it, the replica itself does.
    small = replace(fleets.pool(), name="small", settings=replace(fleets.settings, num_kv_blocks=20))
    unified = Fleet((small, replace(fleets.pool(), name="large")), Router("round-robin"))
    served = serve_agents(unified, requests, agents)
    lengths = requests.prompt_tokens + requests.max_tokens - 1
    rejected = (lengths > 80) & (np.arange(50) % 2 == 0)
    assert np.array_equal(served.status == REJECTED, rejected)
    assert rejected.any()


def test_a_hash_router_keeps_a_task_on_its_replica(fleets):
    _, requests, agents = crew(fleets)
    served = serve_agents(Fleet((fleets.pool(replicas=3),), Router("hash")), requests, agents)
    replicas = served.replica.reshape(-1, 5)
    assert (replicas == replicas[:, :1]).all()
    assert len(set(replicas[:, 0])) == 3


def test_what_agents_cannot_wait_for_is_refused(fleets):
    _, requests, agents = crew(fleets)
    cost = fleets.cost()
    first = replace(cost, head_s=cost.head_s * 0)
    stages = fleets.pool(cost=PipelineCost((first, cost), send_s=np.zeros((1, 65))))
    with pytest.raises(InputError, match="not with pipeline stages"):
        serve_agents(Fleet((stages,)), requests, agents)
    with pytest.raises(InputError, match="tasks have"):
        Agents(2, np.array([3, 3]), np.zeros(5))
