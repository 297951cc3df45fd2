"""Attention ranks in lock-step and uneven experts: the compiled engine against the reference, and against limits."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.engine.expert_skew import ExpertSkew
from simulator.engine.grouped import RankEngine
from simulator.engine.reference_ranks import LockStep
from simulator.errors import InputError
from tests.engine.engines import engine
from tests.engine.strategies import Case, Pick, dyadic_case, events_of, one_of, real_case
from tests.engine.test_equivalence import (
    SHARES,
    TIMES,
    assert_counts_equal,
    assert_shares_close,
    assert_timelines_close,
)

SEEDED_CASES = 300
RANK_SECONDS = ("padding_s", "imbalance_s")


def rank_case(pick: Pick) -> Case:
    """A dyadic case on one to four ranks, with fewer blocks and seats on each."""
    cost, engine_settings, requests = dyadic_case(pick)
    ranks = pick(1, 4)
    experts = cost.dense_s * one_of(pick, (0.25, 0.5, 1.0))
    skew = ExpertSkew(1 + pick(1, 4) / 4, sigma=0.75, seed=pick(0, 99)) if pick(0, 2) == 0 else ExpertSkew()
    changes = {"rank_routing": one_of(pick, ("round-robin", "least-loaded")), "expert_skew": skew}
    return Case(replace(cost, ranks=ranks, expert_s=experts), replace(engine_settings, **changes), requests)


def seeded(seed: int) -> Case:
    rng = np.random.default_rng([seed, 11])
    return rank_case(lambda low, high: int(rng.integers(low, high, endpoint=True)))


@st.composite
def rank_cases(draw: st.DrawFn) -> Case:
    return rank_case(lambda low, high: draw(st.integers(low, high)))


def observe_ranks(case: Case, interval_s=None):
    """Run the reference; return its result and the records of every lock-step."""
    steps = []
    replica = LockStep(*case, on_steps=steps.append)
    replica.advance()
    return replica.result(interval_s), steps


def run(case: Case, interval_s=None):
    whole = RankEngine(*case, timeline_interval_s=interval_s)
    whole.advance()
    return whole.result()


def assert_same(case: Case, interval_s):
    ours = run(case, interval_s)
    theirs, steps = observe_ranks(case, ours.timeline_interval_s)
    assert_counts_equal(ours, theirs)
    for name in TIMES:
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), err_msg=name)
    assert ours.end_s == theirs.end_s
    assert ours.itl_max_s == theirs.itl_max_s
    assert_shares_close(ours, theirs, theirs.end_s)
    for name in RANK_SECONDS:
        assert ours.totals[name] == pytest.approx(theirs.totals[name], rel=1e-9, abs=1e-9), name
    if interval_s is not None:
        assert_timelines_close(ours, theirs, interval_s)
    return theirs, steps


@settings(max_examples=100, deadline=None)
@given(rank_cases())
def test_engines_agree_exactly_on_drawn_cases(case):
    assert_same(case, None)


def test_engines_agree_exactly_on_seeded_cases():
    for seed in range(SEEDED_CASES):
        try:
            assert_same(seeded(seed), (None, 1.0, 7.5)[seed % 3])
        except AssertionError as error:
            error.add_note(f"seed {seed}")
            raise
