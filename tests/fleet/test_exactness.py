"""A fleet is its replicas: what each does with the requests it was sent is what it would have done alone, to the last bit."""

import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from simulator.engine.block_hashes import BlockHashes
from simulator.engine.compiled import new_engine, simulate
from simulator.engine.kv_memory import HostSwap
from simulator.engine.records import FINISHED, EngineResult, EngineSettings, Speculation
from simulator.engine.scheduling import HostOverheads, Retries, Scheduling
from simulator.fleet import Agents, Fleet, Link, Router, serve, serve_agents
from simulator.fleet.records import LOAD_BASED, STATE_FREE
from simulator.fleet.routing import assign, two_replicas
from simulator.roofline.pipeline_cost import PipelineCost
from simulator.roofline.speculation import SpeculationCost
from tests.engine.mixtures import random_mixture
from tests.engine.strategies import dyadic_case

COLUMNS = [f.name for f in fields(EngineResult) if f.name.endswith(("_s", "status", "preemptions", "tokens"))]
EXACT = (
    "status",
    "scheduled_s",
    "first_token_s",
    "finish_s",
    "load_start_s",
    "load_end_s",
    "preemptions",
    "attempts",
    "reused_tokens",
)
"""What is equal to the last bit on the dyadic grid."""
WITHOUT_PREFIXES = [policy for policy in LOAD_BASED if policy != "prefix-affinity"]


def equal(a, b, *, but=("segments",)):
    for name in COLUMNS:
        left, right = getattr(a, name), getattr(b, name)
        assert np.array_equal(left, right, equal_nan=True), name
    assert {k: v for k, v in a.totals.items() if k not in but} == {k: v for k, v in b.totals.items() if k not in but}
    assert np.array_equal(a.itl_counts, b.itl_counts)


def alone(pool, requests, rows):
    order = rows[np.argsort(requests.arrival_s[rows], kind="stable")]
    return order, simulate(pool.cost, pool.settings, requests.take(order))


@pytest.mark.parametrize("policy", ["round-robin", "random", *WITHOUT_PREFIXES])
def test_a_fleet_of_one_replica_is_the_plain_engine(fleets, policy):
    requests = fleets.requests(400)
    pool = fleets.pool()
    served = serve(Fleet((pool,), Router(policy)), requests)
    equal(served.pools[0].replicas[0], simulate(pool.cost, pool.settings, requests), but=())
    assert (served.replica == 0).all()


@pytest.mark.parametrize("policy", STATE_FREE)
@pytest.mark.parametrize("workers", [1, 3])
def test_a_state_free_fleet_is_its_split_streams(fleets, policy, workers):
    requests = replace(fleets.requests(500), tenant=np.arange(500) // 7)
    pool = fleets.pool(replicas=4)
    router = Router(policy)
    served = serve(Fleet((pool,), router), requests, seed=5, workers=workers)
    given = assign(router, requests, 4, 5)
    assert np.array_equal(served.replica, given)
    for r, result in enumerate(served.pools[0].replicas):
        equal(result, simulate(pool.cost, pool.settings, requests.take(np.flatnonzero(given == r))), but=())
    if policy == "hash":  # a tenant stays where it is
        assert all(len(set(served.replica[requests.tenant == t])) == 1 for t in range(10))


@pytest.mark.parametrize("policy", WITHOUT_PREFIXES)
@pytest.mark.parametrize("seed", range(12))
def test_looking_at_replicas_changes_nothing_they_do(policy, seed, fleets):
    """Dyadic costs and times, where float sums are exact: preemption, full batches, ties and windows among them."""
    rng = np.random.default_rng(seed)
    case = dyadic_case(lambda low, high: int(rng.integers(low, high + 1)))
    if case.requests.concurrency:
        case = case._replace(requests=replace(case.requests, arrival_s=np.sort(case.requests.arrival_s), concurrency=0))
    pool = fleets.pool(replicas=3, cost=case.cost, settings=case.settings)
    served = serve(Fleet((pool,), Router(policy)), case.requests, seed=seed)
    (found,) = served.pools
    assert sorted(np.concatenate(found.rows)) == list(range(len(case.requests)))
    for rows, result in zip(found.rows, found.replicas, strict=True):
        if not len(rows):
            continue
        order, by_itself = alone(pool, case.requests, rows)
        assert np.array_equal(order, rows)
        for name in ("status", "scheduled_s", "first_token_s", "finish_s", "preemptions"):
            assert np.array_equal(getattr(result, name), getattr(by_itself, name), equal_nan=True), name
        for name in (
            "steps",
            "dense_tokens",
            "decode_tokens",
            "decode_keys",
            "prefill_pairs",
            "max_running",
            "max_waiting",
        ):
            assert result.totals[name] == by_itself.totals[name], name
        assert np.array_equal(result.itl_counts, by_itself.itl_counts)
        assert result.busy_s == pytest.approx(by_itself.busy_s, rel=1e-9)


def test_smooth_costs_differ_by_rounding_alone(fleets):
    requests = fleets.requests(800, rate=200.0)
    pool = fleets.pool(replicas=3)
    (found,) = serve(Fleet((pool,), Router("least-requests")), requests).pools
    for rows, result in zip(found.rows, found.replicas, strict=True):
        _, by_itself = alone(pool, requests, rows)
        latency = by_itself.finish_s - by_itself.arrival_s
        assert (np.abs(result.finish_s - by_itself.finish_s) <= 1e-9 * latency).all()


def in_system(served, requests, request):
    """Requests at each replica when one arrives, from finish times alone."""
    now = requests.arrival_s[request]
    before = np.arange(request)
    here = before[~(served.finish_s[before] <= now)]
    return np.bincount(served.replica[here], minlength=len(served.pools[0].replicas))


def test_least_requests_goes_to_the_first_of_the_emptiest(fleets):
    requests = fleets.requests(400, rate=150.0)
    served = serve(Fleet((fleets.pool(replicas=4),), Router("least-requests")), requests)
    for request in range(400):
        assert served.replica[request] == int(np.argmin(in_system(served, requests, request)))
    assert len(set(served.replica)) == 4


def test_power_of_two_goes_to_the_emptier_of_two(fleets):
    requests = fleets.requests(400, rate=150.0)
    served = serve(Fleet((fleets.pool(replicas=4),), Router("power-of-two")), requests, seed=3)
    pairs = two_replicas(3, "router", 400, 4)
    assert (pairs[:, 0] != pairs[:, 1]).all()
    for request, (one, other) in enumerate(pairs):
        load = in_system(served, requests, request)
        assert served.replica[request] == (other if load[other] < load[one] else one)


def test_least_kv_goes_to_the_replica_with_most_room(fleets):
    """One long request fills half of replica 0's cache; short ones then go to the other until that is as full."""
    requests = fleets.requests(5, rate=None)
    requests = replace(
        requests,
        arrival_s=np.array([0.0, 0.02, 0.021, 0.022, 0.023]),
        prompt_tokens=np.array([400, 30, 30, 30, 30]),
        output_tokens=np.full(5, 100),
        max_tokens=np.full(5, 100),
    )
    pool = fleets.pool(replicas=2)
    assert serve(Fleet((pool,), Router("least-kv")), requests).replica.tolist() == [0, 1, 1, 1, 1]
    assert serve(Fleet((pool,), Router("least-requests")), requests).replica.tolist() == [0, 1, 0, 1, 0]


@pytest.mark.parametrize("seed", range(10))
def test_clients_in_a_closed_loop_are_agents_of_one_turn(fleets, seed):
    """One replica, agents without a router's choice: the engine's own closed loop, to the last bit on dyadic times."""
    rng = np.random.default_rng(seed)
    case = dyadic_case(lambda low, high: int(rng.integers(low, high + 1)))
    count = 3
    requests = replace(case.requests, concurrency=count)
    pool = fleets.pool(cost=case.cost, settings=case.settings)
    n = len(requests)
    served = serve_agents(Fleet((pool,)), requests, Agents(count, np.ones(n, dtype=np.int64), requests.arrival_s))
    plain = simulate(case.cost, case.settings, requests)
    assert np.array_equal(served.status, plain.status)
    for name in ("arrival_s", "scheduled_s", "first_token_s", "finish_s"):
        assert np.array_equal(getattr(served, name), getattr(plain, name), equal_nan=True), name


def test_heterogeneous_pools_keep_their_own_settings(fleets):
    fast = fleets.pool(replicas=2)
    small = EngineSettings(max_num_seqs=4, max_num_batched_tokens=16, block_size=8, num_kv_blocks=50)
    slow = replace(
        fleets.pool(replicas=2, cost=fleets.cost(step_s=4e-3, tokens=16, rows=4), settings=small), name="slow"
    )
    requests = fleets.requests(400, rate=100.0)
    served = serve(Fleet((fast, slow), Router("least-requests")), requests)
    assert served.finished.all()
    for pool in served.pools:
        for rows, result in zip(pool.rows, pool.replicas, strict=True):
            _, by_itself = alone(pool.pool, requests, rows)
            assert result.finish_s == pytest.approx(by_itself.finish_s, rel=1e-9)
            assert result.totals["max_running"] <= pool.pool.settings.max_num_seqs


@pytest.mark.parametrize("policy", ["least-requests", "prefix-affinity"])
def test_replicas_with_caches_do_what_they_would_alone(fleets, policy):
    """Each is advanced by a call of its own, from arrival to arrival."""
    requests = fleets.requests(300, rate=100.0)
    family = np.arange(300) % 5
    counts = requests.prompt_tokens // 4
    offsets = np.concatenate([[0], np.cumsum(counts)])
    ids = np.concatenate([100 * f + np.arange(k) for f, k in zip(family, counts, strict=True)])
    requests = replace(requests, hashes=BlockHashes(ids, offsets, 4))
    pool = fleets.pool(replicas=3, settings=replace(fleets.settings, prefix_cache="blocks"))
    served = serve(Fleet((pool,), Router(policy, match_fraction=0.2)), requests)
    (found,) = served.pools
    hits = 0
    for rows, result in zip(found.rows, found.replicas, strict=True):
        _, by_itself = alone(pool, requests, rows)
        assert result.finish_s == pytest.approx(by_itself.finish_s, rel=1e-9)
        assert np.array_equal(result.reused_tokens, by_itself.reused_tokens)
        assert result.totals["cache_hit_tokens"] == by_itself.totals["cache_hit_tokens"]
        hits += result.totals["cache_hit_tokens"]
    assert hits > 0
    if policy == "prefix-affinity":  # a family stays together, as long as loads allow
        first = [served.replica[family == f][:8] for f in range(5)]
        assert all(len(set(replicas)) == 1 for replicas in first)


def dyadic_cost(fleets, rows=16):
    """Times whose sums are exact."""
    cost = fleets.cost(step_s=2.0**-10, token_s=2.0**-13, key_s=2.0**-22, rows=rows)
    return replace(cost, head_s=np.arange(rows + 1.0) * 2.0**-15)


def kinds_of_replicas(fleets):
    """Settings and costs beyond the plain loop, and what their requests need."""
    plain = fleets.settings
    cost = dyadic_cost(fleets)
    rng = np.random.default_rng(3)
    yield "host", cost, replace(plain, host=HostOverheads(step_s=2.0**-11, request_s=2.0**-10, output_s=2.0**-9)), {}
    priority = {"priority": rng.integers(0, 3, 300)}
    yield "priority", cost, replace(plain, scheduling=Scheduling(policy="priority", preempt_lower=True)), priority
    leaving = {"timeout_s": rng.uniform(0.02, 0.3, 300)}
    yield "leaving", fleets.cost(), replace(plain, retries=Retries(max_attempts=2, backoff_s=0.01)), leaving
    yield "ranks", replace(cost, ranks=2), plain, {}
    first = replace(cost, head_s=cost.head_s * 0)
    yield "stages", PipelineCost((first, cost), send_s=np.zeros((1, 65))), plain, {}


@pytest.mark.parametrize("name", ["host", "priority", "leaving", "ranks", "stages"])
def test_replicas_of_any_kind_do_what_they_would_alone(fleets, name):
    """Each is advanced by a call of its own, from arrival to arrival, behind a router that looks at it."""
    _, cost, settings, columns = next(kind for kind in kinds_of_replicas(fleets) if kind[0] == name)
    requests = replace(fleets.requests(300, rate=150.0), **columns)
    pool = fleets.pool(replicas=3, cost=cost, settings=settings)
    (found,) = serve(Fleet((pool,), Router("least-requests")), requests).pools
    assert min(map(len, found.rows)) > 30
    for rows, result in zip(found.rows, found.replicas, strict=True):
        engine = new_engine(cost, settings, requests.take(rows))
        engine.advance()
        by_itself = engine.result()
        assert np.array_equal(result.status, by_itself.status)
        assert np.array_equal(result.preemptions, by_itself.preemptions)
        for column in ("scheduled_s", "first_token_s", "finish_s"):
            assert getattr(result, column) == pytest.approx(getattr(by_itself, column), rel=1e-9, nan_ok=True)
        assert result.busy_s.sum() == pytest.approx(by_itself.busy_s.sum(), rel=1e-9)


@pytest.mark.parametrize("name", ["priority", "ranks", "stages"])
def test_a_router_sees_the_moment_of_the_arrival_on_replicas_of_any_kind(fleets, name):
    """Who is gone with the end of the step under way is still there."""
    _, cost, settings, columns = next(kind for kind in kinds_of_replicas(fleets) if kind[0] == name)
    requests = replace(fleets.requests(300, rate=150.0), **columns)
    pool = fleets.pool(replicas=4, cost=cost, settings=settings)
    served = serve(Fleet((pool,), Router("least-requests")), requests)
    for request in range(300):
        assert served.replica[request] == int(np.argmin(in_system(served, requests, request)))


@pytest.mark.parametrize("policy", WITHOUT_PREFIXES)
def test_replicas_beyond_the_plain_loop_look_like_plain_ones(fleets, policy):
    """A host that takes no time changes the loop that a replica runs in, and nothing that a router sees."""
    settings = replace(fleets.settings, host=HostOverheads(output_s=2.0**-40))
    for seed in range(3):
        requests = fleets.requests(400, rate=500.0, seed=seed)
        plain, other = (
            serve(Fleet((fleets.pool(replicas=3, settings=each),), Router(policy)), requests, seed=1)
            for each in (fleets.settings, settings)
        )
        assert np.array_equal(plain.replica, other.replica)


def test_who_comes_back_when_nobody_else_is_left_is_served(fleets):
    """The router looks at 0.13 s while the first client is away, and at 0.25 s when only its second try is left on that replica."""
    settings = replace(fleets.settings, max_num_seqs=1, retries=Retries(max_attempts=2, backoff_s=0.0625))
    requests = replace(
        fleets.requests(4, rate=None),
        arrival_s=np.array([0.0, 0.0, 0.13, 0.25]),
        prompt_tokens=np.full(4, 16),
        output_tokens=np.array([200, 20, 2, 2]),
        max_tokens=np.array([200, 20, 2, 2]),
        timeout_s=np.array([0.125, 9.0, 9.0, 9.0]),
    )
    served = serve(Fleet((fleets.pool(replicas=2, settings=settings),), Router("least-requests")), requests)
    assert served.replica.tolist() == [0, 1, 0, 1]
    (found,) = served.pools
    for rows, result in zip(found.rows, found.replicas, strict=True):
        by_itself = simulate(fleets.cost(), settings, requests.take(rows))
        for name in EXACT:
            assert np.array_equal(getattr(result, name), getattr(by_itself, name), equal_nan=True), name
        assert result.attempts.tolist() == [2 if row == 0 else 1 for row in rows]


@pytest.mark.parametrize(
    "features",
    [
        ("clients that leave",),
        ("ranks",),
        ("ranks", "clients that leave"),
        ("policy", "clients that leave"),
        ("tiers",),
    ],
    ids=" and ".join,
)
def test_replicas_of_any_mixture_do_what_they_would_alone(features, fleets):
    """Who comes within a step is seated in order of time, whether a router sends it or it tries again by itself (M1); ranks are chosen by loads of that moment (G1)."""
    compared = 0
    for seed in range(40):
        cost, settings, requests = random_mixture(seed, features)
        if requests.concurrency:
            requests = replace(requests, arrival_s=np.cumsum(requests.arrival_s), concurrency=0)
        requests = replace(requests, stored_tokens=None)  # each replica's store would hold those of all rows
        pool = fleets.pool(replicas=2, cost=cost, settings=settings)
        (found,) = serve(Fleet((pool,), Router("least-requests")), requests, seed=seed).pools
        for rows, result in zip(found.rows, found.replicas, strict=True):
            if not len(rows):
                continue
            by_itself = simulate(cost, settings, requests.take(rows))
            for name in EXACT:
                left, right = getattr(result, name), getattr(by_itself, name)
                assert np.array_equal(left, right, equal_nan=True), f"random_mixture({seed}, {features!r}): {name}"
            assert np.array_equal(result.itl_counts, by_itself.itl_counts)
            for name, value in by_itself.totals.items():
                assert not isinstance(value, int) or name == "segments" or result.totals[name] == value, name
            compared += 1
    assert compared > 60


@pytest.mark.parametrize("kind", ["plain", "host"])
def test_what_a_link_brings_later_is_seated_later(fleets, kind):
    """A request without cached tokens overtakes, within a step too, those whose caches are on their way from the store."""
    requests = fleets.requests(300, rate=400.0, prompt=40)
    requests = replace(requests, cached_tokens=np.where(np.arange(300) % 3 == 0, 16, 0))
    settings = fleets.settings
    if kind == "host":  # beyond the plain loop, but taking no time
        settings = replace(settings, host=HostOverheads(output_s=2.0**-30))
    pool = fleets.pool(replicas=2, settings=settings)
    served = serve(Fleet((pool,), Router("least-requests"), store=Link(1e8, 0.004)), requests)
    overtaken = 0
    (found,) = served.pools
    for rows, result in zip(found.rows, found.replicas, strict=True):
        there_s = (served.arrival_s + served.store_s)[rows]
        order = np.argsort(there_s, kind="stable")
        overtaken += int((order != np.arange(len(order))).sum())
        mine = replace(requests.take(rows[order], concurrency=1), arrival_s=there_s[order], concurrency=0)
        by_itself = simulate(pool.cost, pool.settings, mine)
        assert result.scheduled_s[order] == pytest.approx(by_itself.scheduled_s, rel=1e-9)
        assert result.finish_s[order] == pytest.approx(by_itself.finish_s, rel=1e-9)
    assert overtaken > 100


def three_drafts(seqs):
    """Always three drafts, 0.7 of them accepted one by one, which cost 1/8 ms each."""
    accepted = np.zeros((1, 2, 3))
    accepted[0, 1] = 0.7 ** np.arange(1, 4)
    zeros, one = np.zeros(2), np.zeros((2, 1))
    prices = SpeculationCost(
        queries=np.array([1, 4]),
        knots=np.zeros(1),
        value_s=one,
        slope_s=one + 2.0**-22,
        window_slope_s=zeros,
        seq_s=zeros,
        draft_s=np.array([[0.0], [3 * 2.0**-13]]) * (np.arange(seqs + 1) > 0),
        draft_value_s=one,
        draft_slope_s=one,
        chunk_s=np.zeros(65),
    )
    return Speculation(prices, accepted, np.ones(seqs + 1, dtype=np.int64))


def kinds_that_wait(fleets):
    """The same, for clients who wait: caches, swap, speculation and batching modes besides, nobody who leaves, no stages."""
    yield from (kind for kind in kinds_of_replicas(fleets) if kind[0] not in {"leaving", "stages"})
    plain, cost = fleets.settings, dyadic_cost(fleets)
    tight = replace(plain, num_kv_blocks=60)
    prompt = fleets.requests(300).prompt_tokens
    counts = prompt // 4
    ids = np.concatenate([100 * (i % 5) + np.arange(k) for i, k in enumerate(counts)])
    hashes = {"hashes": BlockHashes(ids, np.concatenate([[0], np.cumsum(counts)]), 4)}
    yield "cache", cost, replace(tight, prefix_cache="blocks"), hashes
    yield "swap", cost, replace(tight, swap=HostSwap(50, 2.0**-16)), {}
    yield "static", cost, replace(plain, scheduling=Scheduling(batching="static")), {}
    yield "spec", dyadic_cost(fleets, rows=64), replace(plain, speculation=three_drafts(plain.max_num_seqs)), {}


WAITING_KINDS = ["host", "priority", "ranks", "cache", "swap", "static", "spec"]


@pytest.mark.parametrize("name", WAITING_KINDS)
def test_clients_of_any_kind_of_replica_are_agents_of_one_turn(fleets, name):
    """One replica: the engine's own closed loop, prompts that are rejected among them."""
    _, cost, settings, columns = next(kind for kind in kinds_that_wait(fleets) if kind[0] == name)
    rng = np.random.default_rng(7)
    requests = replace(fleets.requests(300), arrival_s=rng.integers(0, 4096, 300) * 2.0**-16, concurrency=9, **columns)
    # The hashes of a cache are of these prompts; with a host's delays the engine and agents number the rows that an answer and a
    # rejection release at nearly the same time differently.
    if name not in {"cache", "host"}:
        requests = replace(requests, prompt_tokens=np.where(np.arange(300) % 50 == 7, 900, requests.prompt_tokens))
    one_turn = Agents(9, np.ones(300, dtype=np.int64), requests.arrival_s)
    served = serve_agents(Fleet((fleets.pool(cost=cost, settings=settings),)), requests, one_turn)
    engine = new_engine(cost, settings, requests)
    engine.advance()
    plain = engine.result()
    assert np.array_equal(served.status, plain.status)
    assert (plain.status == FINISHED).sum() >= 290
    for column in ("arrival_s", "scheduled_s", "first_token_s", "finish_s"):
        assert np.array_equal(getattr(served, column), getattr(plain, column), equal_nan=True), column
    result = served.pools[0].replicas[0]
    assert np.array_equal(result.preemptions, plain.preemptions[served.pools[0].rows[0]])
    assert {k: v for k, v in result.totals.items() if isinstance(v, int) and k != "segments"} == {
        k: v for k, v in plain.totals.items() if isinstance(v, int) and k != "segments"
    }


@pytest.mark.parametrize("name", WAITING_KINDS)
def test_agents_on_replicas_of_any_kind_wait_for_what_each_does_alone(fleets, name):
    """Three replicas behind a router that looks: turns follow answers, and each replica does what it would with what it was sent."""
    _, cost, settings, columns = next(kind for kind in kinds_that_wait(fleets) if kind[0] == name)
    requests = replace(fleets.requests(300), **columns)
    agents = Agents(12, np.full(60, 5), np.full(300, 2.0**-8))
    pool = fleets.pool(replicas=3, cost=cost, settings=settings)
    served = serve_agents(Fleet((pool,), Router("least-requests")), requests, agents)
    assert served.finished.all()
    arrival, finish = served.arrival_s.reshape(-1, 5), served.finish_s.reshape(-1, 5)
    assert np.array_equal(arrival[:, 1:], finish[:, :-1] + 2.0**-8)
    (found,) = served.pools
    assert min(map(len, found.rows)) > 30
    for rows, result in zip(found.rows, found.replicas, strict=True):
        order = rows[np.argsort(served.arrival_s[rows], kind="stable")]
        mine = replace(requests.take(order, concurrency=1), arrival_s=served.arrival_s[order], concurrency=0)
        engine = new_engine(cost, settings, mine)
        engine.advance()
        by_itself = engine.result()
        back = np.argsort(order, kind="stable")
        for column in ("scheduled_s", "first_token_s", "finish_s", "preemptions"):
            assert np.array_equal(getattr(result, column), getattr(by_itself, column)[back]), column
        assert np.array_equal(result.reused_tokens, by_itself.reused_tokens[back])


def test_without_numba_the_same_results():
    script = """
import numpy as np
from tests.fleet.conftest import Fleets
from simulator.fleet import Agents, Fleet, Link, Router, serve, serve_agents
requests = Fleets.requests(40, rate=200.0)
pools = Fleets.pool("prefill", 2), Fleets.pool("decode", 2)
fleet = Fleet(pools, Router("least-requests"), Router("least-kv"), Link(1e8, 1e-4, "both", layerwise=True))
agents = Agents(4, np.full(8, 5), np.full(40, 0.01))
for served in (serve(fleet, requests), serve_agents(fleet, requests, agents), serve(Fleet((Fleets.pool(replicas=3),), Router("power-of-two")), requests)):
    print(served.finish_s.tolist(), served.replica.tolist(), {name: sums.tolist() for name, sums in served.links.items()})
"""
    root = Path(__file__).parents[2]

    def run(**env):
        done = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            check=True,
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root), **env},
        )
        return done.stdout

    assert run(NUMBA_DISABLE_JIT="1") == run()
