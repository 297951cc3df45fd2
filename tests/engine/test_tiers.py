"""Tiers of the prefix cache below HBM: the compiled engine against the reference, conservation, and worked examples."""

from collections import Counter, OrderedDict
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.engine.block_hashes import BlockHashes
from simulator.engine.kv_memory import HostSwap, Tier
from simulator.engine.records import FINISHED, EngineSettings
from simulator.engine.reference import Replica
from simulator.engine.tiers import NEXT, PREVIOUS, SIZE, STORED, move_down, new_tiers
from simulator.errors import InputError
from tests.engine.engines import NAMES, engine
from tests.engine.strategies import TIME_GRIDS_S, Case, Pick, observe, one_of, requests_of, step_cost
from tests.engine.test_equivalence import TIMES, assert_counts_equal, assert_shares_close, assert_timelines_close
from tests.engine.test_prefix_cache import CACHE_COUNTS, cache_case

SEEDED_CASES = 300


def tier_case(pick: Pick) -> Case:
    """A case of the prefix cache, short of blocks, with one to three tiers below; swapping now and then."""
    cost, engine_settings, requests = cache_case(pick)
    for _ in range(2):
        if len(requests) >= 12:  # fewer seldom come back to what was evicted
            break
        cost, engine_settings, requests = cache_case(pick)
    bs = engine_settings.block_size
    longest = int((requests.prompt_tokens + requests.max_tokens).max())
    enough = -(-(longest - 1) // bs)
    grid_s = one_of(pick, TIME_GRIDS_S)
    tiers = tuple(
        Tier(
            one_of(pick, (pick(1, 3), pick(1, 6), 50 * enough)),
            block_s=grid_s * one_of(pick, (0, pick(1, 6), pick(1, 60))),
            latency_s=grid_s * pick(0, 6),
            name=f"tier {i}",
        )
        for i in range(one_of(pick, (1, 2, 2, 3)))
    )
    blocks = engine_settings.num_kv_blocks if pick(0, 2) == 0 else enough + pick(0, max(1, enough // 4))
    engine_settings = replace(
        engine_settings,
        num_kv_blocks=blocks,
        tiers=tiers,
        load_policy=one_of(pick, ("always", "always", "always", "always", "cheaper", "cheaper", "never")),
        swap=HostSwap(2 * enough, block_s=grid_s * pick(0, 2)) if pick(0, 1) else None,
    )
    return Case(cost, engine_settings, requests)


def seeded(seed: int) -> Case:
    rng = np.random.default_rng([seed, 13])
    return tier_case(lambda low, high: int(rng.integers(low, high, endpoint=True)))


@st.composite
def tier_cases(draw: st.DrawFn) -> Case:
    return tier_case(lambda low, high: draw(st.integers(low, high)))


def tier_counts(case: Case) -> list[str]:
    of_tiers = [f"tier{i}_{what}_blocks" for i in range(len(case.settings.tiers)) for what in ("stored", "loaded")]
    return ["loads", "loads_declined", *of_tiers, *CACHE_COUNTS]


def assert_same(case: Case, interval_s):
    ours = engine("compiled")(*case, timeline_interval_s=interval_s)
    theirs, _, _ = observe(case, ours.timeline_interval_s)
    for name in tier_counts(case):
        assert ours.totals[name] == theirs.totals[name], name
    assert_counts_equal(ours, theirs)
    for name in (*TIMES, "reused_tokens", "load_s"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), err_msg=name)
    assert ours.end_s == theirs.end_s
    assert_shares_close(ours, theirs, theirs.end_s)
    if interval_s is not None:
        assert_timelines_close(ours, theirs, interval_s)


@settings(max_examples=150, deadline=None)
@given(tier_cases())
def test_engines_agree_exactly_on_drawn_cases(case):
    assert_same(case, None)


def test_engines_agree_exactly_on_seeded_cases():
    for seed in range(SEEDED_CASES):
        try:
            assert_same(seeded(seed), (None, 1.0, 7.5)[seed % 3])
        except AssertionError as error:
            error.add_note(f"seed {seed}")
            raise


def events_of(case: Case) -> set[str]:
    """Name what a run of the reference met."""
    replica = Replica(*case)
    tiers, met = replica.tiers, set()
    assert tiers is not None
    assert replica.pool is not None
    load, move_down_, count = tiers.load, tiers.move_down, replica.pool.count_admission

    def watched_load(run, now_s):
        met.add("load")
        if len({tier for _, tier in run}) > 1:
            met.add("load from two tiers")
        if any(tiers.link_free_s[tier] > now_s for _, tier in run):
            met.add("link shared")
        if replica.running:
            met.add("others run meanwhile")
        load(run, now_s)

    def watched_move(block_id, tier=0):
        if tier < len(tiers.tiers) and block_id in tiers.held[tier]:
            met.add("still there")
        if tier == 1 and len(tiers.tiers) > 1:
            met.add("moved to the second tier")
        if tier == len(tiers.tiers):
            met.add("dropped")
        move_down_(block_id, tier)

    def watched_count(known, hit_tokens):
        request = replica.running[-1]
        if request.loaded:
            met.add("hits in HBM overtook the load" if request.start > request.loaded else "starts after the load")
        count(known, hit_tokens)

    tiers.load, tiers.move_down, replica.pool.count_admission = watched_load, watched_move, watched_count
    blocked, idle = [], []
    replica.on_step = lambda step: blocked.extend(
        row for row in step.waiting[:1] if replica.rows[row].loaded and len(step.running) < case.settings.max_num_seqs
    )
    close_piece = replica.close_piece

    def watched_piece():
        if replica.loading and not replica.in_step and not replica.running and not replica.waiting:
            idle.append(replica.clock.now)
        close_piece()

    replica.close_piece = watched_piece
    replica.advance()
    met |= {"loaded, but no room"} if blocked else set()
    met |= {"nothing to do but load"} if idle else set()
    if tiers.counts["loads_declined"]:
        met.add("computed again instead")
    if tiers.counts["loads"]:
        met |= {case.settings.prefix_cache} | ({"window"} if case.cost.window else set())
        met |= {"closed loop"} if case.requests.concurrency else set()
        met |= {"swap"} if replica.swapped is not None and replica.swapped.counts["swap_out_blocks"] else set()
        met |= {"preemption"} if replica.totals["preemptions"] else set()
    return met


FREQUENT = (
    "load",
    "load from two tiers",
    "link shared",
    "others run meanwhile",
    "still there",
    "moved to the second tier",
    "dropped",
    "starts after the load",
    "loaded, but no room",
    "nothing to do but load",
    "computed again instead",
    "blocks",
    "radix",
    "window",
    "closed loop",
    "swap",
    "preemption",
)


def test_special_situations_are_frequent():
    counts = Counter()
    for seed in range(SEEDED_CASES):
        counts.update(events_of(seeded(seed)))
    rare = {name: counts[name] / SEEDED_CASES for name in FREQUENT if counts[name] < 0.05 * SEEDED_CASES}
    assert not rare


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


@settings(max_examples=60, deadline=None)
@given(tier_cases())
def test_everybody_is_served_and_counted(case):  # I1, I7, I12
    result, steps, _ = observe(case)
    assert set(result.status) <= {0, 1}
    done = result.status == FINISHED
    needed = (case.requests.prompt_tokens + case.requests.output_tokens - 1 - result.reused_tokens)[done].sum()
    assert sum(step.n for step in steps) == needed + result.totals["recomputed_tokens"]
    assert (result.reused_tokens[done] < case.requests.prompt_tokens[done]).all()
    assert (result.load_s[done] <= (result.scheduled_s - result.arrival_s)[done] + 1e-12).all()
    loads = result.totals["loads"]
    assert (result.load_s > 0).sum() <= loads
    if case.settings.load_policy == "never":
        assert loads == 0
    moved = sum(result.totals[f"tier{i}_loaded_blocks"] for i in range(len(case.settings.tiers)))
    assert moved >= loads


@settings(max_examples=40, deadline=None)
@given(tier_cases())
def test_tiers_that_are_never_asked_change_nothing(case):
    for name in NAMES:
        asked = replace(case.settings, load_policy="never")
        none = replace(case.settings, tiers=())
        ours, theirs = (engine(name)(case.cost, s, case.requests) for s in (asked, none))
        np.testing.assert_array_equal(ours.finish_s, theirs.finish_s)
        assert ours.totals["cache_hit_tokens"] == theirs.totals["cache_hit_tokens"]


@settings(max_examples=60, deadline=None)
@given(tier_cases(), st.data())
def test_the_true_output_length_changes_nothing_before_its_own_finish(case, data):  # I8
    requests = case.requests
    row = data.draw(st.integers(0, len(requests) - 1))
    shorter = requests.output_tokens.copy()
    shorter[row] = data.draw(st.integers(1, int(shorter[row])))
    before, after = [], []
    Replica(*case, before.append).advance()
    second = Replica(case.cost, case.settings, replace(requests, output_tokens=shorter), after.append)
    second.advance()
    end_s = second.rows[row].finish_s
    end_s = np.inf if np.isnan(end_s) else end_s
    ours, theirs = (
        [(s.start_s, s.end_s, s.scheduled, s.blocks) for s in steps if s.end_s < end_s] for steps in (before, after)
    )
    assert ours == theirs


def test_cutting_a_run_changes_nothing():  # I9
    engine("compiled")
    from simulator.engine.compiled import Engine

    for seed in range(40):
        case = seeded(seed)
        whole = engine("compiled")(*case, timeline_interval_s=1.0)
        cut = Engine(*case, timeline_interval_s=1.0)
        for until_s in np.linspace(0, whole.end_s, 7):
            cut.advance(until_s)
        cut.advance()
        pieces = cut.result()
        np.testing.assert_array_equal(pieces.finish_s, whole.finish_s)
        for name in tier_counts(case):
            assert pieces.totals[name] == whole.totals[name]


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
