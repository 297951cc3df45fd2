"""Tiers of the prefix cache below HBM: worked examples and limits. How engines agree on them is in test_mixtures.py."""

from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.engine.block_hashes import BlockHashes
from simulator.engine.kv_memory import Tier
from simulator.engine.records import EngineSettings
from simulator.engine.refusals import PENDING, features_of, why_not
from simulator.engine.tiers import NEXT, PREVIOUS, SIZE, STORED, move_down, new_tiers
from simulator.errors import InputError
from tests.engine.engines import NAMES, engine
from tests.engine.mixtures import seeded_mixtures
from tests.engine.strategies import requests_of, step_cost


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.lists(st.integers(0, 8), max_size=60))
def test_rings_are_ordered_dictionaries(capacities, moves):
    """F2 in arrays against the same with an OrderedDict per tier, after every move."""
    tiers = new_tiers([Tier(capacity, block_s=0.0) for capacity in capacities], 9)
    model = [OrderedDict() for _ in capacities]
    stored = [0] * len(capacities)
    for block_id in moves:
        move_down(tiers, block_id)
        down = block_id
        for tier, held in enumerate(model):
            if down in held:
                held.move_to_end(down)
                break
            held[down] = None
            stored[tier] += 1
            if len(held) <= capacities[tier]:
                break
            down = held.popitem(last=False)[0]
        for tier, held in enumerate(model):
            order, place = [], tiers.rings[tier, 0, PREVIOUS]
            while place:
                order.append(place - 1)
                place = tiers.rings[tier, place, PREVIOUS]
            assert order == list(held)
            assert set(np.flatnonzero(tiers.rings[tier, 1:, NEXT] >= 0)) == set(held)
            assert tiers.counts[tier, SIZE] == len(held)
            assert tiers.counts[tier, STORED] == stored[tier]


@settings(max_examples=40, deadline=None)
@given(seeded_mixtures(("tiers",)))
def test_tiers_that_are_never_asked_change_nothing(case):
    for name in NAMES:
        asked = replace(case.settings, load_policy="never")
        none = replace(case.settings, tiers=())
        ours, theirs = (engine(name)(case.cost, s, case.requests) for s in (asked, none))
        np.testing.assert_array_equal(ours.finish_s, theirs.finish_s)
        assert ours.totals["cache_hit_tokens"] == theirs.totals["cache_hit_tokens"]


def agent(policy: str, tiers: tuple[Tier, ...]) -> tuple:
    """A prompt of 8 tokens, another that evicts it, and the first again with a tail of 2; blocks of 2, a token takes 1 s."""
    cost = step_cost([0.0] + [float(n) for n in range(1, 17)], [0.0] * 3)
    engine_settings = EngineSettings(
        max_num_seqs=2,
        max_num_batched_tokens=16,
        block_size=2,
        num_kv_blocks=6,
        prefix_cache="blocks",
        tiers=tiers,
        load_policy=policy,
    )
    hashes = BlockHashes(np.array([0, 1, 2, 3, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3]), np.array([0, 4, 10, 14]), 2)
    requests = replace(requests_of([0, 10, 30], [8, 12, 10], [1, 1, 1]), hashes=hashes)
    return cost, engine_settings, requests


@pytest.mark.parametrize("name", NAMES)
def test_worked_example(name):
    """The third request's four blocks come from the host: 4 × 0.25 s after 0.5 s, then 2 tokens are computed."""
    host = Tier(100, block_s=0.25, latency_s=0.5)
    result = engine(name)(*agent("always", (host,)))
    np.testing.assert_array_equal(result.finish_s, [8.0, 22.0, 33.5])
    np.testing.assert_array_equal(result.load_s, [0.0, 0.0, 1.5])
    np.testing.assert_array_equal(result.scheduled_s, [0.0, 10.0, 31.5])
    np.testing.assert_array_equal(result.reused_tokens, [0, 0, 8])
    # The second request took six blocks, four of them the first's; the third takes five.
    assert (result.totals["tier0_stored_blocks"], result.totals["tier0_loaded_blocks"]) == (9, 4)
    assert result.totals["cache_hit_tokens"] == 8
    assert result.idle_s == pytest.approx(2 + 8 + 1.5)
    np.testing.assert_array_equal(engine(name)(*agent("never", (host,))).finish_s, [8.0, 22.0, 40.0])
    # Eight tokens are computed in 8 s: a load that takes as long is not cheaper.
    np.testing.assert_array_equal(engine(name)(*agent("cheaper", (Tier(100, 2.0),))).finish_s, [8.0, 22.0, 40.0])
    np.testing.assert_array_equal(engine(name)(*agent("cheaper", (Tier(100, 1.9375),))).finish_s, [8.0, 22.0, 39.75])


@pytest.mark.parametrize("name", NAMES)
def test_a_small_host_hands_on_to_the_store(name):
    """Of the first request's blocks the host keeps the first two, evicted last, and the store the others; both links at once."""
    tiers = (Tier(2, block_s=0.25), Tier(100, block_s=0.5, latency_s=1.0))
    result = engine(name)(*agent("always", tiers))
    assert [result.totals[f"tier{i}_loaded_blocks"] for i in (0, 1)] == [2, 2]
    assert result.load_s[2] == 2.0


def run(name, cost, engine_settings, requests):
    """Serve, unless the engine does not do it yet."""
    why = why_not(features_of(cost, engine_settings, requests), PENDING)
    if name == "compiled" and why:
        pytest.skip(why)
    return engine(name)(cost, engine_settings, requests)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_computed_is_written_through(name):  # F9
    """All ten blocks are put when they are computed; what HBM evicts is there already, and the last four come back as before."""
    result = run(name, *agent("always", (Tier(100, block_s=0.25, latency_s=0.5, write_through=True),)))
    np.testing.assert_array_equal(result.finish_s, [8.0, 22.0, 33.5])
    assert (result.totals["tier0_stored_blocks"], result.totals["tier0_loaded_blocks"]) == (10, 4)
    # In a store behind a host of two blocks: the store has all, the host the two evicted last.
    tiers = (Tier(2, block_s=0.25), Tier(100, block_s=0.5, latency_s=1.0, write_through=True))
    result = run(name, *agent("always", tiers))
    assert [result.totals[f"tier{i}_loaded_blocks"] for i in (0, 1)] == [2, 2]
    assert result.totals["tier1_stored_blocks"] == 10


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("stored", "blocks", "finish_s"), [(8, 100, 1.5 + 2), (7, 100, 1.25 + 4), (8, 2, 1.0 + 6), (1, 100, 10.0)]
)
def test_a_store_that_outlived_its_server_is_warm(name, stored, blocks, finish_s):  # F10
    """Of a prompt of 10 tokens in blocks of 2, a token per second, some lie in the store: whole blocks, the first ones if not all fit."""
    cost, engine_settings, requests = agent("always", (Tier(1, 9.0), Tier(blocks, block_s=0.25, latency_s=0.5)))
    third = requests.take(slice(2, 3))
    warm = replace(third, arrival_s=np.zeros(1), stored_tokens=np.array([stored]))
    result = run(name, cost, engine_settings, warm)
    assert result.finish_s[0] == finish_s
    assert result.totals["tier1_stored_blocks"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"load_policy": "cheapest"}, "load_policy = 'cheapest'.*cheaper"),
        ({"tiers": (Tier(1, 1.0),)}, "prefix_cache"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        EngineSettings(**change)


def test_a_tier_needs_room_and_a_bandwidth():
    with pytest.raises(InputError, match="0 blocks"):
        Tier(0, 1.0)
    with pytest.raises(InputError, match="finite"):
        Tier(1, np.inf)
