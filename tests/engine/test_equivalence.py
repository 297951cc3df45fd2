"""A plain replica, first come first served: the compiled engine against the reference engine, dyadic and with real-looking costs."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings

from simulator.engine.records import FINISHED, itl_quantiles_s
from tests.engine.comparing import (
    OWN_TOTALS,
    SHARES,
    TIMES,
    assert_equal,
    assert_results_equal,
    assert_shares_close,
    assert_timelines_close,
)
from tests.engine.engines import engine
from tests.engine.strategies import dyadic_cases, observe, random_case, real_case
from tests.engine.watching import watch

SEEDED_CASES = 300
REAL_CASES = 40
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


@settings(max_examples=150, deadline=None)
@given(dyadic_cases())
def test_engines_agree_exactly_on_drawn_cases(case):
    assert_equal(case, None)


def test_engines_agree_exactly_on_seeded_cases_in_which_special_situations_are_frequent():
    counts = Counter()
    for seed in range(SEEDED_CASES):
        case, interval_s = random_case(seed), (0.125, 1.0, 7.5)[seed % 3]
        ours = engine("compiled")(*case, timeline_interval_s=interval_s)
        theirs, _, met = watch(case, ours.timeline_interval_s)
        counts.update(met)
        try:
            assert_results_equal(ours, theirs)
            assert_timelines_close(ours, theirs, interval_s)
        except AssertionError as error:
            error.add_note(f"seed {seed}")
            raise
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
    for name in ours.totals:
        if not name.endswith("_s") and name not in OWN_TOTALS:
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
            "decode_walk_s",
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
