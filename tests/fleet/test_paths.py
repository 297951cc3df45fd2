"""Prefill and decode pools, links and stores: the whole path of a request, and what is conserved on it."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from simulator.engine import many
from simulator.engine.compiled import simulate
from simulator.engine.records import FINISHED, REJECTED
from simulator.errors import InputError
from simulator.fleet import Fleet, Link, Router, serve

PERS = ("fleet", "source", "target", "both")


def disaggregated(fleets, link, *, prefill=2, decode=3, router="least-requests", decoder="least-kv", **more):
    pools = fleets.pool("prefill", prefill), fleets.pool("decode", decode)
    return Fleet(pools, Router(router), Router(decoder), link, **more)


@pytest.mark.parametrize(
    "policies", [("round-robin", "random"), ("least-requests", "least-kv"), ("power-of-two", "round-robin")]
)
@pytest.mark.parametrize("per", PERS)
@pytest.mark.parametrize("layerwise", [False, True])
def test_bytes_requests_and_time_are_conserved(fleets, policies, per, layerwise):
    requests = fleets.requests(800, rate=120.0)
    fleet = disaggregated(fleets, Link(1e8, 1e-4, per, layerwise), router=policies[0], decoder=policies[1])
    served = serve(fleet, requests, workers=2)
    assert served.finished.all()
    needs = requests.output_tokens > 1
    assert np.array_equal(served.moved["link"], needs)
    carried = -(-requests.prompt_tokens[needs] // 4) * 4e4
    held = 2 if per == "both" else 1
    assert served.links["link"][:, many.BYTES].sum() == pytest.approx(held * carried.sum(), rel=1e-12)
    assert served.moved_bytes["link"] == held * carried.sum()
    assert len(served.links["link"]) == {"fleet": 1, "source": 2, "target": 3, "both": 5}[per]
    sending = carried / 1e8
    least = sending / 4 if layerwise else sending
    assert (served.transfer_s[needs] >= least + 1e-4 - 1e-12).all()
    assert (served.transfer_s[~needs] == 0).all()
    prefill, decode = served.pools
    for pool in served.pools:
        for result in pool.replicas:
            assert result.busy_s.sum() + result.idle_s == pytest.approx(result.end_s, rel=1e-9)
    # Every token is computed once: prompts here, the rest there.
    total = sum(result.totals["dense_tokens"] for pool in served.pools for result in pool.replicas)
    again = sum(result.totals["recomputed_tokens"] for pool in served.pools for result in pool.replicas)
    assert total - again == (requests.prompt_tokens + requests.output_tokens - 1).sum()
    assert (decode.column("arrival_s")[needs] > prefill.column("finish_s")[needs]).all()
    assert (served.first_token_s[needs] <= served.finish_s[needs]).all()


def test_no_load_takes_prefill_and_transfer_and_decode_exactly(fleets):
    requests = fleets.requests(1).take(slice(0, 1))
    requests = replace(
        requests,
        arrival_s=np.zeros(1),
        prompt_tokens=np.array([150]),
        output_tokens=np.array([9]),
        max_tokens=np.array([9]),
    )
    pool = fleets.pool()
    for by in ("prefill", "decode"):
        served = serve(disaggregated(fleets, Link(1e8, 1e-4), first_token=by), requests)
        one = np.ones(1, dtype=np.int64)
        prefill_s = simulate(pool.cost, pool.settings, replace(requests, output_tokens=one, max_tokens=one)).finish_s[0]
        transfer_s = 38 * 4e4 / 1e8 + 1e-4
        if by == "prefill":
            rest = replace(
                requests, prompt_tokens=one * 151, cached_tokens=one * 150, output_tokens=one * 8, max_tokens=one * 8
            )
        else:
            rest = replace(requests, cached_tokens=one * 149)
        there = simulate(pool.cost, pool.settings, replace(rest, arrival_s=np.array([prefill_s + transfer_s])))
        assert served.finish_s[0] == there.finish_s[0]
        assert served.transfer_s[0] == pytest.approx(transfer_s, rel=1e-12)
        assert served.first_token_s[0] == (prefill_s if by == "prefill" else there.first_token_s[0])
        alone = simulate(pool.cost, pool.settings, replace(rest, arrival_s=np.zeros(1))).finish_s[0]
        assert served.finish_s[0] == pytest.approx(prefill_s + transfer_s + alone, rel=1e-12)


def test_transfers_over_one_link_follow_lindley(fleets):
    """Independent: first come, first served, each starts when it is ready and the one before it is sent."""
    requests = fleets.requests(600, rate=150.0)
    served = serve(disaggregated(fleets, Link(4e7, 2e-4)), requests)
    free_s = 0.0
    ready_s = served.pools[0].column("finish_s")
    for request in sorted(np.flatnonzero(served.moved["link"]), key=lambda i: (ready_s[i], i)):
        free_s = max(free_s, ready_s[request]) + -(-int(requests.prompt_tokens[request]) // 4) * 4e4 / 4e7
        assert served.pools[1].column("arrival_s")[request] == free_s + 2e-4
    assert served.waited_s["link"].max() > 0


def test_layers_sent_while_others_are_computed_hide_most_of_a_transfer(fleets):
    requests = fleets.requests(300, rate=20.0)
    whole, layers = (serve(disaggregated(fleets, Link(2e8, 0.0, "source", flag)), requests) for flag in (False, True))
    assert layers.transfer_s.mean() < 0.5 * whole.transfer_s.mean()
    assert layers.links["link"][:, many.BUSY].sum() == pytest.approx(whole.links["link"][:, many.BUSY].sum())


@pytest.mark.parametrize("per", ["fleet", "target"])
def test_a_store_delays_admission_and_nothing_else(fleets, per):
    requests = fleets.requests(300, rate=50.0, prompt=40, cached=12)
    fleet = Fleet((fleets.pool(replicas=2),), Router("least-requests"), store=Link(1e8, 1e-3, per))
    served = serve(fleet, requests)
    assert (served.store_s >= 3 * 4e4 / 1e8 + 1e-3 - 1e-12).all()
    assert (served.scheduled_s >= served.arrival_s + served.store_s).all()
    assert served.moved_bytes["store"] == 300 * 3 * 4e4
    fast = serve(replace(fleet, store=Link(1e15)), requests)
    without = serve(replace(fleet, store=None), requests)
    assert fast.finish_s == pytest.approx(without.finish_s, rel=1e-6)


def test_who_fits_no_decode_replica_is_rejected_on_arrival(fleets):
    requests = fleets.requests(50)
    long = requests.prompt_tokens.copy()
    long[7] = 700  # the prefill pool could hold it, with one token of output
    outputs = requests.output_tokens.copy()
    outputs[7] = 150
    requests = replace(requests, prompt_tokens=long, output_tokens=outputs, max_tokens=outputs)
    for policies in (("round-robin", "round-robin"), ("least-requests", "least-kv")):
        served = serve(disaggregated(fleets, Link(1e9), router=policies[0], decoder=policies[1]), requests)
        assert served.status[7] == REJECTED
        assert served.arrival_s[7] == requests.arrival_s[7]
        assert served.prefill_replica[7] == -1
        assert (np.delete(served.status, 7) == FINISHED).all()


def test_the_number_of_workers_changes_nothing(fleets):
    requests = fleets.requests(600, rate=150.0)
    fleet = disaggregated(fleets, Link(1e8, 1e-4, "both"), prefill=3, router="random", decoder="random")
    one, three = (serve(fleet, requests, seed=9, workers=workers) for workers in (1, 3))
    assert np.array_equal(one.finish_s, three.finish_s)
    assert np.array_equal(one.links["link"], three.links["link"])
    other = serve(fleet, requests, seed=10)
    assert not np.array_equal(one.replica, other.replica)


def test_pools_that_make_no_path_are_refused(fleets):
    unified, prefill, decode = (fleets.pool(role) for role in ("unified", "prefill", "decode"))
    for pools, link in (((prefill,), None), ((unified, decode), Link(1e9)), ((), None)):
        with pytest.raises(InputError, match="pools"):
            Fleet(pools, link=link)
    with pytest.raises(InputError, match="link: needed"):
        Fleet((prefill, decode))
    with pytest.raises(InputError, match="first, then"):
        Fleet((decode, prefill), link=Link(1e9))
    with pytest.raises(InputError, match="did you mean 'least-requests'"):
        Router("least-request")
    with pytest.raises(InputError, match="tenants"):
        serve(Fleet((fleets.pool(replicas=2),), Router("hash")), fleets.requests(10))


def test_measured_transfers_of_kv_caches_are_latency_and_bandwidth():
    """Mooncake's 1P1D runs: each system's largest and middle prompts give a link, which predicts the smallest within 40 % (9 and 34 %)."""
    file = Path(__file__).parents[2].parent / "shared" / "data" / "serving" / "mooncake_pd_kv_transfer.csv"
    if not file.is_file():
        pytest.skip(f"measured transfers are not here: {file}")
    by_model = {}
    for row in csv.DictReader(file.read_text().splitlines()):
        by_model.setdefault(row["model"], []).append(
            (float(row["kv_bytes_reported"]), float(row["kv_transfer_ms"]) / 1e3)
        )
    assert len(by_model) == 2
    for rows in by_model.values():
        (small, small_s), (middle, middle_s), (large, large_s) = sorted(rows)
        bandwidth = (large - middle) / (large_s - middle_s)
        latency = middle_s - middle / bandwidth
        link = Link(bandwidth, latency)
        assert link.latency_s + small / link.bandwidth_bytes_per_s == pytest.approx(small_s, rel=0.4)
