"""Speculative decoding: both engines against each other, and against what is known in closed form."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings

from hypothesis import strategies as st
from simulator.engine.compiled import Engine, simulate
from simulator.engine.records import EngineSettings, Speculation
from simulator.engine.reference import simulate_reference
from simulator.errors import InputError
from simulator.roofline.acceptance import survival_of_rate, tokens_per_pass
from simulator.roofline.speculation import SpeculationCost
from tests.engine.strategies import (
    SLOPE_GRID_S,
    Case,
    Pick,
    dyadic_case,
    events_of,
    observe,
    one_of,
    real_case,
    requests_of,
    step_cost,
)
from tests.engine.test_equivalence import (
    COUNTS,
    SHARES,
    SUMS,
    TIMES,
    WHOLE_TOTALS,
    assert_counts_equal,
    assert_shares_close,
    assert_timelines_close,
)

SEEDED_CASES = 150
FREQUENT = (
    "preemption",
    "full token budget",
    "admission blocked by memory",
    "max_num_seqs full",
    "knot crossed during a run",
    "rejection",
    "closed loop",
    "level change",
    "level lowered by the budget",
    "several tokens in a pass",
    "several blocks in a pass",
    "surplus at the end",
    "different rates in a batch",
    "window, and several tokens in a pass",
    "preempted with a fraction",
)


def speculation_cost(pick: Pick, case: Case, queries: list[int], grid_s: float) -> SpeculationCost:
    cost, limits, _ = case
    levels, seqs = len(queries), limits.max_num_seqs
    steps = np.arange(levels)[:, None]

    def slopes(most):
        return SLOPE_GRID_S * np.array([0] + [pick(0, most) for _ in range(levels - 1)], dtype=float)

    draft = grid_s * np.array(
        [[pick(0, 3) * (level > 0) * (b > 0) for b in range(seqs + 1)] for level in range(levels)]
    )
    extra = slopes(3)[:, None]
    return SpeculationCost(
        queries=np.array(queries),
        value_s=cost.decode_value_s + extra * cost.decode_knots,
        slope_s=cost.decode_slope_s + extra,
        window_slope_s=cost.window_slope_s + (slopes(2) if cost.window else np.zeros(levels)),
        seq_s=cost.decode_seq_s + grid_s * steps[:, 0] * pick(0, 1),
        draft_s=draft,
        draft_slope_s=slopes(2),
        chunk_s=grid_s * pick(0, 1) * np.arange(limits.max_num_batched_tokens + 1.0),
        chunk_planes=SLOPE_GRID_S * np.array([[pick(0, 2), pick(0, 2), pick(0, 2), 0, 0] for _ in range(pick(1, 2))]),
    )


def speculating_case(pick: Pick) -> Case:
    """A dyadic case with speculation of random levels, acceptance and costs; KV and rows enlarged to hold it."""
    cost, limits, requests = dyadic_case(pick)
    grid_s = 2.0**-6
    levels = pick(2, 4)
    queries = [1] + sorted({pick(2, 7) for _ in range(levels - 1)})
    if pick(0, 2) == 0:  # room for whole batches of the highest level
        limits = replace(limits, max_num_batched_tokens=limits.max_num_seqs * queries[-1] + pick(1, 20))
    budget, seqs = limits.max_num_batched_tokens, limits.max_num_seqs
    classes = pick(1, 3)
    survival = np.zeros((classes, len(queries), queries[-1] - 1))
    for kind in range(classes):
        for level, q in enumerate(queries[1:], start=1):
            shares = sorted((pick(0, 16) / 16 for _ in range(q - 1)), reverse=True)
            survival[kind, level, : q - 1] = shares
    table = np.array([pick(0, len(queries) - 1) for _ in range(seqs + 1)])
    if pick(0, 1):
        table[:] = pick(1, len(queries) - 1)
    dense = np.array([0.0] + [grid_s * pick(1, 9) for _ in range(budget)])
    head = np.array([0.0] + [grid_s * pick(0, 4) for _ in range(max(budget, seqs * queries[-1]))])
    sized = replace(
        cost, dense_s=dense, head_s=head, dense_flops=dense, dense_bytes=dense, head_flops=head, head_bytes=head
    )
    case = Case(sized, limits, requests)
    plan = Speculation(speculation_cost(pick, case, queries, grid_s), survival, table)
    if pick(0, 1):
        limits = replace(limits, num_kv_blocks=limits.num_kv_blocks + -(-plan.cost.lookahead // limits.block_size))
    kinds = np.array([pick(0, classes - 1) for _ in range(len(requests))]) if pick(0, 3) else None
    return Case(sized, replace(limits, speculation=plan), replace(requests, acceptance_class=kinds))


def seeded(seed: int) -> Case:
    rng = np.random.default_rng(seed)
    return speculating_case(lambda low, high: int(rng.integers(low, high, endpoint=True)))


@st.composite
def speculating_cases(draw: st.DrawFn) -> Case:
    return speculating_case(lambda low, high: draw(st.integers(low, high)))


def assert_speculation_equal(ours, theirs, end_s):
    one, other = ours.speculation, theirs.speculation
    np.testing.assert_array_equal(one.passes, other.passes)
    np.testing.assert_array_equal(one.keys, other.keys)
    np.testing.assert_array_equal(one.window_keys, other.window_keys)
    np.testing.assert_array_equal(one.chunk_steps, other.chunk_steps)
    assert one.extra_tokens == other.extra_tokens
    np.testing.assert_allclose(one.wasted_s, other.wasted_s, rtol=1e-9, atol=1e-12 * end_s)
    assert one.draft_s == pytest.approx(other.draft_s, rel=1e-9)


def assert_equal(case, interval_s=None):
    ours = simulate(*case, timeline_interval_s=interval_s)
    theirs, steps, _ = observe(case, ours.timeline_interval_s)
    assert_counts_equal(ours, theirs)
    for name in TIMES:
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), err_msg=name)
    assert ours.end_s == theirs.end_s
    assert ours.itl_max_s == theirs.itl_max_s
    assert_shares_close(ours, theirs, theirs.end_s)
    assert_speculation_equal(ours, theirs, theirs.end_s)
    if interval_s is not None:
        assert_timelines_close(ours, theirs, interval_s)
    return theirs, steps


@settings(max_examples=100, deadline=None)
@given(speculating_cases())
def test_engines_agree_exactly_on_drawn_cases(case):
    assert_equal(case)


def test_engines_agree_exactly_on_seeded_cases():
    for seed in range(SEEDED_CASES):
        try:
            assert_equal(seeded(seed), (0.125, 1.0, 7.5)[seed % 3])
        except AssertionError as error:
            error.add_note(f"seed {seed}")
            raise
