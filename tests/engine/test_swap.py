"""Swapping of preempted requests: the compiled engine against the reference, conservation, and worked examples."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.engine.kv_memory import HostSwap
from simulator.engine.records import FINISHED, EngineSettings
from simulator.engine.reference import Replica
from simulator.errors import InputError
from tests.engine.engines import NAMES, engine
from tests.engine.strategies import TIME_GRIDS_S, Case, Pick, dyadic_case, observe, one_of, requests_of, step_cost
from tests.engine.test_equivalence import TIMES, assert_counts_equal, assert_shares_close, assert_timelines_close
from tests.engine.test_prefix_cache import CACHE_COUNTS, cache_case

SEEDED_CASES = 300
SWAP_COUNTS = ("swap_out_blocks", "swap_in_blocks", "swap_fallbacks", "max_host_blocks")


def swap_case(pick: Pick) -> Case:
    """A dyadic case, often short of blocks, with host memory of some size; with a prefix cache now and then."""
    case = (cache_case if pick(0, 2) == 0 else dyadic_case)(pick)
    requests, bs = case.requests, case.settings.block_size
    longest = int((requests.prompt_tokens + requests.max_tokens).max())
    enough = -(-(longest - 1) // bs)
    blocks = case.settings.num_kv_blocks if pick(0, 2) == 0 else enough + pick(0, max(1, enough // 2))
    host = HostSwap(
        one_of(pick, (0, pick(1, enough), 2 * enough, 100 * enough)),
        block_s=one_of(pick, TIME_GRIDS_S) * pick(0, 4),
        overlapped=bool(pick(0, 1)),
    )
    return case._replace(settings=replace(case.settings, num_kv_blocks=blocks, swap=host))


def seeded(seed: int) -> Case:
    rng = np.random.default_rng([seed, 11])
    return swap_case(lambda low, high: int(rng.integers(low, high, endpoint=True)))


@st.composite
def swap_cases(draw: st.DrawFn) -> Case:
    return swap_case(lambda low, high: draw(st.integers(low, high)))


def assert_same(case: Case, interval_s):
    ours = engine("compiled")(*case, timeline_interval_s=interval_s)
    theirs, _, _ = observe(case, ours.timeline_interval_s)
    for name in (*SWAP_COUNTS, *(CACHE_COUNTS if case.settings.prefix_cache != "off" else ())):
        assert ours.totals[name] == theirs.totals[name], name
    assert_counts_equal(ours, theirs)
    for name in (*TIMES, "reused_tokens"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), err_msg=name)
    assert ours.end_s == theirs.end_s
    assert ours.totals["swap_s"] == pytest.approx(theirs.totals["swap_s"], rel=1e-12)
    np.testing.assert_allclose(ours.swap_s, theirs.swap_s, rtol=1e-12)
    assert_shares_close(ours, theirs, theirs.end_s)
    if interval_s is not None:
        assert_timelines_close(ours, theirs, interval_s)


@settings(max_examples=150, deadline=None)
@given(swap_cases())
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
    host, met = replica.swapped, set()
    assert host is not None
    copy_out, copy_in, end_copies = host.copy_out, host.copy_in, host.end_copies

    def watched_out(row, blocks):
        kept = copy_out(row, blocks)
        met.add(("swapped out" if kept else "host full") if blocks else "nothing to swap")
        if kept and replica.rows[row].in_prefill:
            met.add("swapped out in prefill")
        return kept

    def watched_in(row, hits):
        met.add("swapped in")
        if hits:
            met.add("part of it still cached")
        copy_in(row, hits)

    def watched_end(step_s):
        rows = len(host.copies)
        shares = end_copies(step_s)
        if rows > 1:
            met.add("several copies in a step")
        if rows and host.settings.overlapped and host.settings.block_s:
            met.add("copies wait for" if host.delay_s else "copies hidden")
        return shares

    host.copy_out, host.copy_in, host.end_copies = watched_out, watched_in, watched_end
    replica.advance()
    if case.requests.concurrency and "swapped in" in met:
        met.add("closed loop")
    if case.cost.window and "swapped in" in met:
        met.add("window")
    return met


FREQUENT = (
    "swapped out",
    "swapped out in prefill",
    "host full",
    "swapped in",
    "part of it still cached",
    "several copies in a step",
    "copies hidden",
    "copies wait for",
    "closed loop",
    "window",
)


def test_special_situations_are_frequent():
    counts = Counter()
    for seed in range(SEEDED_CASES):
        counts.update(events_of(seeded(seed)))
    rare = {name: counts[name] / SEEDED_CASES for name in FREQUENT if counts[name] < 0.05 * SEEDED_CASES}
    assert not rare


@settings(max_examples=60, deadline=None)
@given(swap_cases())
def test_nothing_stays_in_host_memory_and_time_adds_up(case):  # E5, I4
    replica = Replica(*case)
    replica.advance()
    result = replica.result()
    assert replica.swapped is not None
    assert not replica.swapped.held
    assert result.totals["swap_in_blocks"] <= result.totals["swap_out_blocks"]
    if case.settings.prefix_cache == "off":
        assert result.totals["swap_in_blocks"] == result.totals["swap_out_blocks"]
    assert result.totals["max_host_blocks"] <= case.settings.swap.blocks
    assert result.swap_s.sum() == pytest.approx(result.totals["swap_s"])
    assert result.busy_s.sum() + result.idle_s == pytest.approx(result.end_s)


@settings(max_examples=60, deadline=None)
@given(swap_cases())
def test_with_room_in_the_host_nothing_is_computed_twice(case):
    room = HostSwap(1 << 30, block_s=case.settings.swap.block_s)
    result, steps, _ = observe(case._replace(settings=replace(case.settings, swap=room)))
    assert result.totals["recomputed_tokens"] == result.totals["swap_fallbacks"] == 0
    done = result.status == FINISHED
    needed = (case.requests.prompt_tokens + case.requests.output_tokens - 1 - result.reused_tokens)[done].sum()
    assert sum(step.n for step in steps) == needed


@settings(max_examples=60, deadline=None)
@given(swap_cases())
def test_without_host_memory_it_is_recomputation(case):
    none = HostSwap(0, block_s=case.settings.swap.block_s)
    for name in NAMES:
        ours = engine(name)(*case._replace(settings=replace(case.settings, swap=none)))
        theirs = engine(name)(*case._replace(settings=replace(case.settings, swap=None)))
        np.testing.assert_array_equal(ours.finish_s, theirs.finish_s)
        assert ours.totals["swap_fallbacks"] == theirs.totals["preemptions"]
        assert ours.totals["swap_s"] == 0


@pytest.mark.parametrize("name", NAMES)
def test_worked_example(name):
    """Two prompts of 4 tokens in 4 blocks of 2. A step takes 1 s, copying a block 0.25 s."""
    cost = step_cost([0.0] + [1.0] * 8, [0.0] * 3)
    plain = EngineSettings(max_num_seqs=2, max_num_batched_tokens=8, block_size=2, num_kv_blocks=4)
    requests = requests_of([0, 0], [4, 4], [4, 3])
    swapped = replace(plain, swap=HostSwap(8, block_s=0.25))
    result = engine(name)(cost, swapped, requests)
    # Step 1 [0, 1]: both prompts. Step 2 needs a third block each: the second's 2 blocks are copied out, [1, 2.5]. The first
    # goes on alone, [2.5, 3.5] and [3.5, 4.5], and is done. Then the 2 blocks come in: [4.5, 6], [6, 7].
    np.testing.assert_array_equal(result.finish_s, [4.5, 7.0])
    np.testing.assert_array_equal(result.swap_s, [0.0, 1.0])
    assert [result.totals[name] for name in SWAP_COUNTS] == [2, 2, 0, 2]
    assert result.totals["swap_s"] == 1.0
    hidden = replace(plain, swap=HostSwap(8, block_s=0.25, overlapped=True))
    np.testing.assert_array_equal(engine(name)(cost, hidden, requests).finish_s, [4.0, 6.0])
    full = replace(plain, swap=HostSwap(1, block_s=0.25))
    again = engine(name)(cost, full, requests)
    np.testing.assert_array_equal(again.finish_s, [4.0, 6.0])
    assert again.totals["swap_fallbacks"] == 1
    assert again.totals["recomputed_tokens"] == 4


@settings(max_examples=60, deadline=None)
@given(swap_cases(), st.data())
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
        for name in SWAP_COUNTS:
            assert pieces.totals[name] == whole.totals[name]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"blocks": -1}, "host_blocks = -1"), ({"blocks": 1, "block_s": np.inf}, "finite and not negative")],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        HostSwap(**change)
