"""Queueing theory. Replicas that serve one request at a time, whose work is geometric with a mean of 200 steps, are servers of nearly
exponential work (the discretisation is below 1 %)."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from simulator.fleet import Fleet, Link, Router, serve

SERVERS, MEAN_S, LOAD = 4, 200.0, 0.75
N = 300_000


def mean_wait_s(served):
    """Without the first tenth."""
    wait = served.scheduled_s - served.arrival_s
    return float(wait[len(wait) // 10 :].mean())


def erlang_c(servers, load):
    """Probability that an arrival at M/M/c waits. A. K. Erlang's second formula, from Erlang's B by its recursion."""
    offered, blocked = servers * load, 1.0
    for k in range(1, servers + 1):
        blocked = offered * blocked / (k + offered * blocked)
    return blocked / (1 - load * (1 - blocked))


def waits(fleets):
    requests = fleets.customers(N, SERVERS * LOAD / MEAN_S, MEAN_S, 1)
    pool = fleets.servers(SERVERS)
    policies = ("random", "round-robin", "power-of-two", "least-requests")
    return {p: mean_wait_s(serve(Fleet((pool,), Router(p)), requests, seed=2)) for p in policies}


@pytest.fixture(scope="module")
def found(fleets):
    return waits(fleets)


def test_random_routing_splits_poisson_arrivals_into_as_many_m_m_1(found):
    """Exact: W = ρ/(μ − λ) at each."""
    assert found["random"] == pytest.approx(LOAD * MEAN_S / (1 - LOAD), rel=0.05)


def test_round_robin_makes_e_c_m_1(found):
    """Exact: between arrivals at one server lie c exponential gaps. GI/M/1: W = σ/(μ(1 − σ)), σ = A*(μ(1 − σ)); A* of Erlang-c gaps."""
    rate = SERVERS * LOAD / MEAN_S
    sigma = 0.5
    for _ in range(500):
        sigma = (rate / (rate + (1 - sigma) / MEAN_S)) ** SERVERS
    assert found["round-robin"] == pytest.approx(sigma * MEAN_S / (1 - sigma), rel=0.05)


def test_looking_at_replicas_lies_between_a_common_queue_and_turns(found):
    """A common queue (M/M/c, Erlang C) is a bound that no router which decides on arrival reaches; two choices lie between all and one."""
    common = erlang_c(SERVERS, LOAD) * MEAN_S / (SERVERS * (1 - LOAD))
    assert common < found["least-requests"] < found["power-of-two"] < found["random"]
    assert found["least-requests"] < found["round-robin"] < found["random"]


def test_one_replica_of_c_slots_is_the_common_queue(fleets):
    """M/M/c exactly, where a step takes as long for c sequences as for one; the limit of a perfect router."""
    pool = fleets.servers(1)
    settings = replace(pool.settings, max_num_seqs=SERVERS, max_num_batched_tokens=SERVERS)
    pool = replace(pool, settings=settings, cost=fleets.cost(1.0, 0.0, 0.0, tokens=SERVERS, rows=SERVERS))
    requests = fleets.customers(N, SERVERS * LOAD / MEAN_S, MEAN_S, 1)
    expected = erlang_c(SERVERS, LOAD) * MEAN_S / (SERVERS * (1 - LOAD))
    assert mean_wait_s(serve(Fleet((pool,)), requests)) == pytest.approx(expected, rel=0.05)


def test_of_two_choices_among_many_servers_both_are_busy_with_probability_of_the_load_squared(fleets):
    """Of many servers a share λ is busy, whoever chooses, and two drawn ones are nearly independent.

    So an arrival waits if both its servers are busy, with probability λ²; with a single choice, λ.
    """
    load, servers = 0.6, 100
    requests = fleets.customers(200_000, servers * load / MEAN_S, MEAN_S, 3)
    pool = fleets.servers(servers)

    def waiting(policy):
        served = serve(Fleet((pool,), Router(policy)), requests, seed=1)
        # A server steps in whole seconds of its own: who comes while it is free starts at once.
        return float((served.scheduled_s > served.arrival_s)[20_000:].mean())

    assert waiting("power-of-two") == pytest.approx(load**2, rel=0.05)
    assert waiting("random") == pytest.approx(load, rel=0.05)


def test_a_shared_link_is_an_m_d_1_queue(fleets):
    """Prompts of one length, prefilled at once by many idle replicas, arrive at the link as they arrived: W = λD²/(2(1 − ρ))."""
    n, sending = 60_000, 0.01
    rng = np.random.default_rng(5)
    requests = fleets.requests(n)
    whole = np.full(n, 4)
    requests = replace(
        requests,
        arrival_s=np.cumsum(rng.exponential(sending / 0.7, n)),
        prompt_tokens=whole,
        output_tokens=whole,
        max_tokens=whole,
    )
    cost = fleets.cost(step_s=1e-6, token_s=1e-9, key_s=0.0)
    prefill, decode = (fleets.pool(role, 8, cost=cost, kv_block_bytes=1e6) for role in ("prefill", "decode"))
    served = serve(Fleet((prefill, decode), link=Link(1e6 / sending)), requests)
    expected = 0.7 * sending / (2 * (1 - 0.7))
    assert served.waited_s["link"][n // 10 :].mean() == pytest.approx(expected, rel=0.05)
    assert served.transfer_s.min() == pytest.approx(sending)


def test_adding_a_replica_never_lowers_goodput_beyond_noise(fleets):
    """Common random numbers: the same requests at the same times."""
    requests = fleets.requests(3_000, rate=260.0, seed=4)
    for policy in ("round-robin", "least-requests", "least-kv", "power-of-two"):
        met = []
        for replicas in range(1, 7):
            served = serve(Fleet((fleets.pool(replicas=replicas),), Router(policy)), requests)
            ttft = served.first_token_s - served.arrival_s
            met.append(int((ttft <= 0.02).sum()))
        noise = 3 * math.sqrt(len(requests) * 0.25)
        assert all(more >= less - noise for less, more in pairwise(met)), (policy, met)
        assert met[-1] > met[0] + 10 * noise
