"""The invariants of docs/engine-rules.md, at every step of random runs of the reference engine."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from simulator.engine.records import FINISHED, REJECTED, Requests
from simulator.engine.reference import Replica, simulate_reference
from tests.engine.strategies import Case, dyadic_cases, observe, real_case

MANY = settings(max_examples=100, deadline=None)
COLUMNS = ("prompt_tokens", "output_tokens", "cached_tokens", "max_tokens")
PER_REQUEST = (
    "status",
    "arrival_s",
    "scheduled_s",
    "first_token_s",
    "finish_s",
    "preemptions",
    "busy_s",
    "recompute_s",
)


def rows(requests: Requests, chosen, **changed) -> Requests:
    """Some rows of a stream, with changed columns."""
    columns = {name: getattr(requests, name)[chosen] for name in ("arrival_s", *COLUMNS)} | changed
    return Requests(**columns, concurrency=requests.concurrency)


def blocks_for(tokens: int, block_size: int) -> int:
    return (tokens + block_size - 1) // block_size


@MANY
@given(dyadic_cases())
def test_requests_are_conserved_at_every_step(case):  # I1
    result, steps, _ = observe(case)
    for step in steps:
        assert step.arrived == step.finished + step.rejected + len(step.running) + len(step.waiting)
        assert len(set(step.running) | set(step.waiting)) == len(step.running) + len(step.waiting)
    assert np.isin(result.status, (FINISHED, REJECTED)).all()


@MANY
@given(dyadic_cases())
def test_blocks_are_conserved_and_as_many_as_the_tokens_need(case):  # I2
    _, steps, _ = observe(case)
    for step in steps:
        assert step.free_blocks >= 0
        assert sum(step.blocks.values()) + step.free_blocks == case.settings.num_kv_blocks
        for row, owned in step.blocks.items():
            assert owned == blocks_for(step.computed[row] + step.scheduled.get(row, 0), case.settings.block_size)


@MANY
@given(dyadic_cases())
def test_time_is_busy_or_idle_and_never_goes_back(case):  # I3, I4
    result, steps, _ = observe(case)
    assert all(step.start_s < step.end_s for step in steps)
    assert all(before.end_s <= after.start_s for before, after in pairwise(steps))
    assert sum(step.end_s - step.start_s for step in steps) + result.idle_s == result.end_s
    assert abs(result.busy_s.sum() + result.idle_s - result.end_s) <= 1e-12 * result.end_s
    for part in (result.busy_cached_s, result.recompute_s):
        assert (part >= 0).all()
        assert (part <= result.busy_prefill_s).all()
    intercepts_s = case.cost.decode_value_s - case.cost.decode_slope_s * case.cost.decode_knots
    if (intercepts_s >= 0).all():  # else a short context's share of decode attention may be negative (R11)
        assert (result.busy_prefill_s <= result.busy_s * (1 + 1e-12)).all()


@MANY
@given(dyadic_cases())
def test_causes_come_before_effects(case):  # I5
    result, _, _ = observe(case)
    done = result.status == FINISHED
    assert (result.arrival_s <= result.scheduled_s)[done].all()
    assert (result.scheduled_s < result.first_token_s)[done].all()
    assert (result.first_token_s <= result.finish_s)[done].all()
    one_token = case.requests.output_tokens == 1
    assert ((result.first_token_s == result.finish_s) == one_token)[done].all()
    assert np.isnan(result.scheduled_s[~done]).all()
    assert np.isfinite(result.arrival_s).all()


@MANY
@given(dyadic_cases())
def test_no_idling_while_a_request_waits(case):  # I6
    result, steps, _ = observe(case)
    done = result.status == FINISHED
    arrival_s, finish_s = result.arrival_s[done], result.finish_s[done]
    previous_end_s = 0.0
    for step in steps:
        if step.start_s > previous_end_s:
            present = (arrival_s < step.start_s) & (finish_s > previous_end_s)
            assert not present.any()
            assert step.start_s in arrival_s
        previous_end_s = step.end_s


@MANY
@given(dyadic_cases())
def test_every_token_is_computed_once_or_counted_as_recomputed(case):  # I7
    result, steps, _ = observe(case)
    done = result.status == FINISHED
    requests = case.requests
    once = (requests.prompt_tokens - requests.cached_tokens + requests.output_tokens - 1)[done].sum()
    assert sum(step.n for step in steps) == once + result.totals["recomputed_tokens"]
    assert (result.totals["recomputed_tokens"] > 0) <= (result.totals["preemptions"] > 0)
    assert result.preemptions.sum() == result.totals["preemptions"]
    assert result.itl_counts.sum() == (requests.output_tokens - 1)[done].sum()


@MANY
@given(dyadic_cases(), st.integers(1, 30), st.booleans())
def test_every_computed_token_sees_its_window_once(case, window, chunked):  # R9
    requests = case.requests
    windowed = replace(case.cost, window=window, window_chunked=chunked)
    result, _, _ = observe(Case(windowed, case.settings, requests))
    once = 0
    for row in np.flatnonzero(result.status == FINISHED):
        last = requests.prompt_tokens[row] + requests.output_tokens[row] - 1
        for token in range(requests.cached_tokens[row] + 1, last + 1):
            in_chunk = ((key - 1) // window == (token - 1) // window for key in range(1, token + 1))
            once += sum(in_chunk) if chunked else len(range(1, token + 1)[-window:])
    seen = result.totals["window_decode_keys"] + result.totals["window_prefill_pairs"]
    assert seen == once if not result.totals["recomputed_tokens"] else seen > once


@MANY
@given(dyadic_cases(), st.booleans())
def test_the_widest_window_is_none_and_the_narrowest_sees_each_token_itself(case, chunked):
    for window in (1, 1000):
        cost = replace(case.cost, window=window, window_chunked=chunked)
        _, steps, _ = observe(Case(cost, case.settings, case.requests))
        for step in steps:
            if window == 1:
                assert (step.B, step.n - step.B, step.n - step.B) == (step.SW, step.AW, step.KW)
            else:
                assert (step.SW, step.AW, step.KW) == (step.S, step.A, step.K)


@MANY
@given(dyadic_cases())
def test_limits_hold_and_no_admission_is_missed(case):  # R5 to R7
    engine, requests = case.settings, case.requests
    _, steps, _ = observe(case)
    known = dict(enumerate(requests.prompt_tokens.tolist()))
    for step in steps:
        assert step.n == sum(step.scheduled.values()) <= engine.max_num_batched_tokens
        assert len(step.running) <= engine.max_num_seqs
        assert len(step.scheduled) == step.B + step.P
        budget = engine.max_num_batched_tokens - step.n
        wanting = [row for row in step.running if step.scheduled.get(row, 0) < known[row] - step.computed[row]]
        assert not (wanting and budget), "a running request was cut short with budget left"
        assert not (step.preempted and step.admitted)
        if step.waiting and budget and len(step.running) < engine.max_num_seqs and not step.preempted:
            row = step.waiting[0]
            cached = int(requests.cached_tokens[row])
            tokens = known[row] if engine.scheduler_reserve_full_isl else cached + min(known[row] - cached, budget)
            assert blocks_for(tokens, engine.block_size) > step.free_blocks, "the first of the queue would have fitted"
        emitting = [row for row, tokens in step.scheduled.items() if step.computed[row] + tokens == known[row]]
        assert len(emitting) == step.R
        for row in emitting:
            known[row] += 1


@MANY
@given(dyadic_cases())
def test_first_come_first_served(case):
    result, _, _ = observe(case)
    done = np.flatnonzero(result.status == FINISHED)
    order = done[np.lexsort((done, result.arrival_s[done]))]
    assert (np.diff(result.scheduled_s[order]) >= 0).all()


@MANY
@given(dyadic_cases(), st.data())
def test_a_true_output_length_matters_only_from_the_earlier_finish_on(case, data):  # I8
    requests = case.requests
    before, steps_before, _ = observe(case)
    open_rows = np.flatnonzero((before.status == FINISHED) & (requests.max_tokens > 1))
    assume(len(open_rows))
    row = data.draw(st.sampled_from(open_rows.tolist()))
    output = requests.output_tokens.copy()
    output[row] = data.draw(st.integers(1, int(requests.max_tokens[row])).filter(lambda n: n != output[row]))
    after, steps_after, _ = observe(Case(case.cost, case.settings, rows(requests, slice(None), output_tokens=output)))
    same_until_s = min(before.finish_s[row], after.finish_s[row])
    early_before = [step for step in steps_before if step.start_s < same_until_s]
    early_after = [step for step in steps_after if step.start_s < same_until_s]
    assert early_before
    assert early_before == early_after


@MANY
@given(dyadic_cases(), st.data())
def test_cutting_a_run_changes_nothing(case, data):  # I9
    whole, steps, _ = observe(case)
    moments = sorted({0.0, *(step.start_s for step in steps), *(0.5 * (step.start_s + step.end_s) for step in steps)})
    cuts = data.draw(st.lists(st.sampled_from(moments), max_size=4))
    pieces = Replica(*case)
    for cut_s in sorted(cuts):
        pieces.advance(cut_s)
        assert pieces.clock.now <= cut_s
    pieces.advance()
    result = pieces.result()
    for name in PER_REQUEST:
        np.testing.assert_array_equal(getattr(result, name), getattr(whole, name))
    assert result.totals == whole.totals


@MANY
@given(dyadic_cases(), st.data())
def test_later_arrivals_do_not_change_the_past(case, data):
    requests = case.requests
    assume(not requests.concurrency and len(requests) > 1)
    kept = data.draw(st.integers(1, len(requests) - 1))
    next_s = requests.arrival_s[kept]
    _, steps, _ = observe(case)
    _, steps_without, _ = observe(Case(case.cost, case.settings, rows(requests, slice(0, kept))))
    assert [step for step in steps if step.start_s < next_s] == [
        step for step in steps_without if step.start_s < next_s
    ]


@MANY
@given(dyadic_cases(), st.sampled_from((0.25, 3.0)))
def test_integrals_are_sums_over_requests_and_over_intervals(case, interval_s):
    result, steps, _ = observe(case, interval_s)
    done = result.status == FINISHED
    totals = result.totals
    assert totals["running_s"] + totals["waiting_s"] == (result.finish_s - result.arrival_s)[done].sum()
    owned = sum(sum(step.blocks.values()) * (step.end_s - step.start_s) for step in steps)
    assert totals["kv_blocks_s"] == owned
    columns = {"running": "running_s", "waiting": "waiting_s", "kv_blocks": "kv_blocks_s"}
    for column, total in columns.items():
        np.testing.assert_allclose(result.timeline[column].sum() * interval_s, totals[total], rtol=1e-9)
    busy_s = result.timeline["busy_fraction"].sum() * interval_s
    np.testing.assert_allclose(busy_s, result.end_s - result.idle_s, rtol=1e-9)
    assert len(result.timeline["start_s"]) == np.ceil(result.end_s / interval_s)


def test_chip_seconds_are_conserved_on_real_looking_runs():  # I4 without the help of a dyadic grid
    for seed in range(12):
        result = simulate_reference(*real_case(seed))
        assert abs(result.busy_s.sum() + result.idle_s - result.end_s) <= 1e-12 * result.end_s
        assert (result.status == FINISHED).all()
