"""The compiled engine against the reference engine: the same schedule, counts and times.

On dyadic costs and arrivals every float sum is exact whatever its order, so what happened, and when, must be equal.
How a step is split among its requests divides by n, R and B, which is exact on no grid: there 1e-9 is demanded.
"""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings

from simulator.engine.records import FINISHED, itl_quantiles_s
from tests.engine.engines import engine
from tests.engine.strategies import dyadic_cases, events_of, observe, random_case, real_case

SEEDED_CASES = 300
REAL_CASES = 40
COUNTS = ("status", "preemptions", "steps_by_tokens", "steps_by_rows", "itl_counts")
TIMES = ("arrival_s", "scheduled_s", "first_token_s", "finish_s")
SHARES = ("busy_s", "busy_prefill_s", "busy_cached_s", "recompute_s")
WHOLE_TOTALS = (
    "steps",
    "dense_tokens",
    "decode_tokens",
    "decode_keys",
    "prefill_pairs",
    "prefill_keys",
    "window_decode_keys",
    "window_prefill_pairs",
    "window_prefill_keys",
    "chunks",
    "rows",
    "preemptions",
    "recomputed_tokens",
    "max_running",
    "max_waiting",
    "max_kv_blocks",
)
SUMS = ("decode_attention_s", "prefill_attention_s", "running_s", "waiting_s", "kv_blocks_s")
TIMELINE = ("start_s", "running", "waiting", "kv_blocks", "busy_fraction", "preemptions_per_s")
FREQUENT = (
    "preemption",
    "self-preemption",
    "full token budget",
    "arrival at a step's end",
    "knot crossed during a run",
    "window saturated during decode",
    "chunk window wrapped",
    "max_num_seqs full",
    "admission blocked by memory",
    "several chunks in a step",
    "rejection",
    "closed loop",
)


def assert_counts_equal(ours, theirs):
    for name in COUNTS:
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), err_msg=name)
    for name in WHOLE_TOTALS:
        assert ours.totals[name] == theirs.totals[name], name
    assert set(ours.totals) == set(theirs.totals)


def assert_shares_close(ours, theirs, end_s):
    for name in SHARES:
        wrong_s = np.abs(getattr(ours, name) - getattr(theirs, name))
        # The last term only matters where positive and negative shares of a convex g all but cancel (R11).
        assert (wrong_s <= 1e-9 * np.abs(theirs.busy_s) + 1e-12 * end_s).all(), name
    assert abs(ours.idle_s - theirs.idle_s) <= 1e-9 * end_s
    for name in SUMS:
        assert ours.totals[name] == pytest.approx(theirs.totals[name], rel=1e-9, abs=1e-9 * end_s), name


def assert_timelines_close(ours, theirs, asked_s):
    assert set(ours.timeline) == set(TIMELINE)
    assert np.log2(ours.timeline_interval_s / asked_s) in range(20)  # doubled to bound the number of rows (R15)
    for name in TIMELINE:
        np.testing.assert_allclose(ours.timeline[name], theirs.timeline[name], rtol=1e-9, atol=1e-9, err_msg=name)


def assert_equal(case, interval_s):
    simulate = engine("compiled")
    ours = simulate(*case, timeline_interval_s=interval_s)
    theirs, steps, _ = observe(case, ours.timeline_interval_s)
    assert_counts_equal(ours, theirs)
    for name in TIMES:
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), err_msg=name)
    assert ours.end_s == theirs.end_s
    assert ours.itl_max_s == theirs.itl_max_s
    assert_shares_close(ours, theirs, theirs.end_s)
    if interval_s is not None:
        assert_timelines_close(ours, theirs, interval_s)
    return theirs, steps


@settings(max_examples=150, deadline=None)
@given(dyadic_cases())
def test_engines_agree_exactly_on_drawn_cases(case):
    assert_equal(case, None)


def test_engines_agree_exactly_on_seeded_cases_with_timelines():
    for seed in range(SEEDED_CASES):
        try:
            assert_equal(random_case(seed), (0.125, 1.0, 7.5)[seed % 3])
        except AssertionError as error:
            error.add_note(f"seed {seed}")
            raise


def test_special_situations_are_frequent_in_the_seeded_cases():
    counts = Counter()
    for seed in range(SEEDED_CASES):
        case = random_case(seed)
        result, steps, _ = observe(case)
        counts.update(events_of(case, result, steps))
    rare = {name: counts[name] / SEEDED_CASES for name in FREQUENT if counts[name] < 0.05 * SEEDED_CASES}
    assert not rare


@pytest.mark.parametrize("seed", range(REAL_CASES))
def test_engines_agree_on_real_looking_costs(seed):
    case = real_case(seed)
    simulate = engine("compiled")
    theirs, _, _ = observe(case)
    ours = simulate(*case)
    np.testing.assert_array_equal(ours.status, theirs.status)
    latency_s = theirs.finish_s - theirs.arrival_s
    for name in TIMES:
        wrong_s = np.abs(getattr(ours, name) - getattr(theirs, name))
        assert (wrong_s <= 1e-9 * latency_s)[theirs.status == FINISHED].all(), name
    np.testing.assert_array_equal(ours.preemptions, theirs.preemptions)
    for name in WHOLE_TOTALS:
        assert ours.totals[name] == theirs.totals[name], name
    assert_shares_close(ours, theirs, theirs.end_s)
    assert ours.itl_counts.sum() == theirs.itl_counts.sum()


@pytest.mark.parametrize("name", ["reference", "compiled"])
def test_itl_quantiles_are_within_one_percent_of_the_stored_latencies(name):
    probabilities = np.array([0.5, 0.9, 0.95, 0.99])
    simulate = engine(name)
    for seed in range(10):
        case = real_case(seed)
        _, _, itl_s = observe(case)
        exact_s = np.quantile(itl_s, probabilities, method="inverted_cdf")
        result = simulate(*case)
        np.testing.assert_allclose(itl_quantiles_s(result.itl_counts, probabilities), exact_s, rtol=0.01)
        assert result.itl_max_s == pytest.approx(max(itl_s), rel=1e-9)


@pytest.mark.parametrize("name", ["reference", "compiled"])
def test_twice_the_times_is_the_same_run_at_half_the_speed(name):
    """Scaling by two is exact in floats: costs and arrivals doubled, every time must double, bit for bit."""
    simulate = engine(name)
    for seed in range(10):
        cost, engine_settings, requests = real_case(seed)
        times = (
            "dense_s",
            "head_s",
            "decode_value_s",
            "decode_slope_s",
            "decode_seq_s",
            "window_slope_s",
            "prefill_planes",
        )
        slow_cost = replace(cost, **{column: 2 * getattr(cost, column) for column in times})
        slow_requests = replace(requests, arrival_s=2 * requests.arrival_s)
        fast, slow = simulate(cost, engine_settings, requests), simulate(slow_cost, engine_settings, slow_requests)
        for column in (*TIMES, *SHARES):
            np.testing.assert_array_equal(2 * getattr(fast, column), getattr(slow, column), err_msg=column)
        assert fast.totals["preemptions"] == slow.totals["preemptions"]
