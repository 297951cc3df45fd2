"""Two engines on one case: the same schedule, counts and times.

On dyadic costs and arrivals every float sum is exact whatever its order, so what happened, and when, must be equal.
How a step is split among its requests divides by n, R and B, which is exact on no grid: there 1e-9 is demanded.
"""

import numpy as np
import pytest

from tests.engine.engines import engine
from tests.engine.strategies import Case, observe

COUNTS = ("status", "preemptions", "attempts", "reused_tokens", "steps_by_tokens", "steps_by_rows", "itl_counts")
TIMES = ("arrival_s", "scheduled_s", "first_token_s", "finish_s")
LOADS = ("load_start_s", "load_end_s")
SHARES = ("busy_s", "busy_prefill_s", "busy_cached_s", "recompute_s", "wasted_s", "swap_s")
SPECULATION_COUNTS = ("passes", "keys", "window_keys", "chunk_steps", "extra_tokens", "drafted_tokens")
TIMELINE = ("start_s", "running", "waiting", "kv_blocks", "busy_fraction", "preemptions_per_s")
OWN_TOTALS = ("segments",)
"""Totals that depend on the engine."""


def assert_counts_equal(ours, theirs):
    for name in COUNTS:
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), err_msg=name)
    assert set(ours.totals) == set(theirs.totals)
    for name in ours.totals:
        if not name.endswith("_s") and name not in OWN_TOTALS:
            assert ours.totals[name] == theirs.totals[name], name
    assert (ours.speculation is None) == (theirs.speculation is None)
    if ours.speculation is not None:
        for name in SPECULATION_COUNTS:
            one, other = getattr(ours.speculation, name), getattr(theirs.speculation, name)
            np.testing.assert_array_equal(one, other, err_msg=name)


def assert_times_equal(ours, theirs):
    for name in (*TIMES, *LOADS):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), err_msg=name)
    assert ours.end_s == theirs.end_s
    assert ours.itl_max_s == theirs.itl_max_s


def assert_shares_close(ours, theirs, end_s):
    for name in SHARES:
        wrong_s = np.abs(getattr(ours, name) - getattr(theirs, name))
        # The last term only matters where positive and negative shares of a convex g all but cancel (R11).
        assert (wrong_s <= 1e-9 * np.abs(theirs.busy_s) + 1e-12 * end_s).all(), name
    assert abs(ours.idle_s - theirs.idle_s) <= 1e-9 * end_s
    for name in ours.totals:
        if name.endswith("_s"):
            assert ours.totals[name] == pytest.approx(theirs.totals[name], rel=1e-9, abs=1e-9 * end_s), name
    if ours.speculation is not None:
        wasted_s = (ours.speculation.wasted_s, theirs.speculation.wasted_s)
        np.testing.assert_allclose(*wasted_s, rtol=1e-9, atol=1e-12 * end_s)
        assert ours.speculation.draft_s == pytest.approx(theirs.speculation.draft_s, rel=1e-9)


def assert_timelines_close(ours, theirs, asked_s):
    assert set(ours.timeline) == set(TIMELINE)
    assert np.log2(ours.timeline_interval_s / asked_s) in range(20)  # doubled to bound the number of rows (R15)
    for name in TIMELINE:
        np.testing.assert_allclose(ours.timeline[name], theirs.timeline[name], rtol=1e-9, atol=1e-9, err_msg=name)


def assert_results_equal(ours, theirs):
    assert_counts_equal(ours, theirs)
    assert_times_equal(ours, theirs)
    assert_shares_close(ours, theirs, theirs.end_s)


def assert_equal(case: Case, interval_s: float | None = None):
    """Run both engines and compare all they say; return the reference's result and steps."""
    ours = engine("compiled")(*case, timeline_interval_s=interval_s)
    theirs, steps, _ = observe(case, ours.timeline_interval_s)
    assert_results_equal(ours, theirs)
    if interval_s is not None:
        assert_timelines_close(ours, theirs, interval_s)
    return theirs, steps
