"""Speculative decoding: the compiled engine against the reference engine, mixed with everything else a replica does."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from simulator.engine.compiled import Engine, simulate
from simulator.engine.records import FINISHED, EngineResult, Speculation
from simulator.engine.reference_state import StepRecord
from simulator.roofline.speculation import SpeculationCost
from tests.engine.strategies import SLOPE_GRID_S, Case, Pick, dyadic_case, events_of, observe, with_ties
from tests.engine.test_equivalence import (
    TIMES,
    assert_counts_equal,
    assert_shares_close,
    assert_timelines_close,
)
from tests.engine.test_prefix_cache import CACHE_COUNTS, cache_case

SEEDED_CASES = 200
FREQUENT = (
    "preemption",
    "full token budget",
    "arrival at a step's end",
    "admission blocked by memory",
    "max_num_seqs full",
    "rejection",
    "closed loop",
    "level change within a batch",
    "level lowered by the budget",
    "no drafts at this batch",
    "several tokens in a pass",
    "several blocks in a pass",
    "surplus in a last pass",
    "rates that differ within a batch",
    "sliding window",
    "chunked window",
    "preempted with a fraction",
    "knot crossed by a batch",
    "hits in the prefix cache",
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
    curve = np.array([slopes(2) for _ in cost.decode_knots]).T
    return SpeculationCost(
        queries=np.array(queries),
        knots=cost.decode_knots,
        value_s=cost.decode_value_s + extra * cost.decode_knots,
        slope_s=cost.decode_slope_s + extra,
        window_slope_s=cost.window_slope_s + (slopes(2) if cost.window else np.zeros(levels)),
        seq_s=cost.decode_seq_s + grid_s * steps[:, 0] * pick(0, 1),
        draft_s=draft,
        draft_value_s=np.concatenate(
            [np.zeros((levels, 1)), np.cumsum(curve[:, :-1] * np.diff(cost.decode_knots), axis=1)], axis=1
        ),
        draft_slope_s=curve,
        chunk_s=grid_s * pick(0, 1) * np.arange(limits.max_num_batched_tokens + 1.0),
        chunk_planes=SLOPE_GRID_S * np.array([[pick(0, 2), pick(0, 2), pick(0, 2), 0, 0] for _ in range(pick(1, 2))]),
    )


def speculating_case(pick: Pick) -> Case:
    """A dyadic case with speculation of random levels, acceptance and costs; KV and rows enlarged to hold it."""
    cost, limits, requests = cache_case(pick) if pick(0, 3) == 0 else dyadic_case(pick)
    grid_s = 2.0**-6
    levels = pick(2, 4)
    queries = [1, *sorted({pick(2, 7) for _ in range(levels - 1)})]
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
    limits = replace(limits, speculation=plan)
    if requests.concurrency or requests.hashes is not None or pick(0, 2):
        return Case(sized, limits, replace(requests, acceptance_class=kinds))
    tied = with_ties(pick, Case(sized, limits, requests))
    return tied._replace(requests=replace(tied.requests, acceptance_class=kinds))


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
    assert np.array_equal(ours.reused_tokens, theirs.reused_tokens)
    for name in CACHE_COUNTS:
        assert ours.totals.get(name) == theirs.totals.get(name), name
    np.testing.assert_allclose(one.wasted_s, other.wasted_s, rtol=1e-9, atol=1e-12 * end_s)
    assert one.draft_s == pytest.approx(other.draft_s, rel=1e-9)


def assert_equal(case: Case, interval_s: float | None = None) -> tuple[EngineResult, list[StepRecord]]:
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


def test_engines_agree_exactly_on_seeded_cases_in_which_everything_occurs():
    counts: Counter[str] = Counter()
    for seed in range(SEEDED_CASES):
        case = seeded(seed)
        try:
            result, steps = assert_equal(case, (0.125, 1.0, 7.5)[seed % 3])
        except AssertionError as error:
            error.add_note(f"seed {seed}")
            raise
        counts.update(events_of(case, result, steps) | speculation_events(case, result, steps))
    rare = {name: counts[name] / SEEDED_CASES for name in FREQUENT if counts[name] < 0.05 * SEEDED_CASES}
    assert not rare


def speculation_events(case: Case, result: EngineResult, steps: Sequence[StepRecord]) -> set[str]:
    """Name the special situations of speculation that a run met."""
    cost, limits, requests = case
    plan, found = limits.speculation, result.speculation
    levels = plan.levels(limits.max_num_seqs, limits.max_num_batched_tokens)
    events = set()
    batches = {step.B for step in steps if step.B}
    decode_only = [step for step in steps if step.B and not step.P]
    # The level is chosen before anybody is preempted.
    calm = [step for step in decode_only if not step.preempted]
    if any(levels[a.B] != levels[b.B] and set(a.running) & set(b.running) for a, b in pairwise(calm)):
        events.add("level change within a batch")
    if any(levels[b] < plan.level_by_batch[b] for b in batches):
        events.add("level lowered by the budget")
    if any(plan.level_by_batch[b] == 0 for b in batches) and found.passes[1:].any():
        events.add("no drafts at this batch")
    gains = [
        (b.computed[row] - a.computed[row], b.blocks[row] - a.blocks[row], a.computed[row])
        for a, b in pairwise(steps)
        for row in a.scheduled
        if row in b.running and row not in b.preempted and a.computed[row] >= requests.prompt_tokens[row]
    ]
    if any(tokens > 1 for tokens, _, _ in gains):
        events.add("several tokens in a pass")
        if cost.window:
            events.add("chunked window" if cost.window_chunked else "sliding window")
    if any(blocks > 1 for _, blocks, _ in gains):
        events.add("several blocks in a pass")
    rates = plan.rates[:, 1:] if requests.acceptance_class is not None else plan.rates[:1, 1:]
    if found.passes[1:].any() and len(np.unique(rates)) > 1 and found.passes[1:, 2:].any():
        events.add("rates that differ within a batch")
    done = result.status == FINISHED
    gained = (requests.output_tokens[done] - 1 - result.preemptions[done]).sum()
    if found.passes[1:].any() and gained > 0 and (rates % (1 << 16)).any():
        events.add("surplus in a last pass")
        if result.totals["preemptions"]:
            events.add("preempted with a fraction")
    if any(
        np.searchsorted(cost.decode_knots, a.S) != np.searchsorted(cost.decode_knots, b.S) for a, b in pairwise(calm)
    ):
        events.add("knot crossed by a batch")
    if result.totals.get("cache_hit_tokens", 0):
        events.add("hits in the prefix cache")
    return events


@settings(max_examples=60, deadline=None)
@given(case=speculating_cases(), cuts=st.lists(st.floats(0, 1), max_size=6))
def test_cutting_and_resuming_changes_nothing(case, cuts):  # I9
    whole = simulate(*case)
    pieces = Engine(*case)
    for share in sorted(cuts):
        pieces.advance(share * whole.end_s)
    pieces.advance()
    parts = pieces.result()
    assert_speculation_equal(parts, whole, whole.end_s)
    for name in (*TIMES, "status", "steps_by_tokens", "steps_by_rows", "itl_counts"):
        assert np.array_equal(getattr(whole, name), getattr(parts, name), equal_nan=name in TIMES), name
    assert_shares_close(parts, whole, whole.end_s)


@settings(max_examples=60, deadline=None)
@given(speculating_cases(), st.data())
def test_a_true_output_length_matters_only_from_the_earlier_finish_on(case, data):  # I8
    requests = replace(case.requests, max_tokens=case.requests.max_tokens + 5)
    case = Case(case.cost, case.settings, requests)
    before, steps_before, _ = observe(case)
    rows = np.flatnonzero(before.status == FINISHED)
    assume(len(rows))
    row = data.draw(st.sampled_from(rows.tolist()))
    output = requests.output_tokens.copy()
    output[row] = data.draw(st.integers(1, int(requests.max_tokens[row])).filter(lambda n: n != output[row]))
    after, steps_after, _ = observe(case._replace(requests=replace(requests, output_tokens=output)))
    same_until_s = min(before.finish_s[row], after.finish_s[row])
    early = [step for step in steps_before if step.start_s < same_until_s]
    assert early
    assert early == [step for step in steps_after if step.start_s < same_until_s]


@settings(max_examples=60, deadline=None)
@given(speculating_cases())
def test_conservation(case):  # I1, I2, I4, I7
    result, steps, _ = observe(case)
    total = case.settings.num_kv_blocks
    plan, found = case.settings.speculation, result.speculation
    if case.settings.prefix_cache == "off":
        assert all(step.free_blocks + sum(step.blocks.values()) == total for step in steps)
    assert result.busy_s.sum() + result.idle_s == pytest.approx(result.end_s, rel=1e-9)
    assert (found.wasted_s <= result.busy_s * (1 + 1e-9) + 1e-12).all() or (result.busy_s < 0).any()
    done = result.status == FINISHED
    assert done.sum() + (result.status == 1).sum() == len(done)
    # I7: every token is computed once; passes compute the tokens that were rejected as well.
    output, prompt = case.requests.output_tokens[done], case.requests.prompt_tokens[done]
    needed = int((prompt - result.reused_tokens[done] + output - 1).sum()) + result.totals["recomputed_tokens"]
    rejected = int(found.sequence_passes @ plan.cost.queries) - found.sequence_passes.sum() - found.extra_tokens
    assert result.totals["dense_tokens"] == needed + rejected
    assert result.totals["decode_tokens"] == found.sequence_passes.sum()
    assert result.totals["rows"] == output.sum() + rejected
