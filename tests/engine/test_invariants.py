"""The invariants of docs/engine-mixtures.md, at every step or event of random mixtures of the reference engine."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from simulator.engine.records import CANCELLED, FINISHED, REJECTED, TIMED_OUT
from simulator.engine.reference import Replica, simulate_reference
from simulator.engine.reference_cache import BlockPool, RadixPool
from simulator.engine.refusals import LASTING
from simulator.roofline.kv_groups import KvGroups
from simulator.roofline.pipeline_cost import PipelineCost
from tests.engine.comparing import assert_results_equal
from tests.engine.mixtures import seeded_mixtures
from tests.engine.situations import total_cost
from tests.engine.strategies import Case, dyadic_cases, observe, real_case

MANY = settings(max_examples=40, deadline=None)
ANYTHING = seeded_mixtures(refusals=LASTING)


def blocks_for(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size)


def parts(case: Case) -> int:
    return len(case.cost.stages) if isinstance(case.cost, PipelineCost) else case.cost.ranks


def at_every_event(replica: Replica):
    """Let a replica run, stopping after each of its events."""
    while replica.clock.peek() < np.inf:
        replica.clock.step()
        yield


def at_every_instant(replica: Replica):
    """Let a replica run, stopping when all has happened that happens at one time."""
    while replica.clock.peek() < np.inf:
        replica.advance(replica.clock.peek())
        yield


@MANY
@given(ANYTHING)
def test_requests_are_conserved_at_every_event(case):  # I1
    replica = Replica(*case)
    for _ in at_every_event(replica):
        present = replica.n_running + replica.n_waiting
        assert replica.arrived == replica.finished + replica.rejected + replica.left + present
        everybody = [one.row for s in replica.schedulers for one in (*s.running, *s.queue, *s.loading)]
        assert len(set(everybody)) == len(everybody)
    result = replica.result()
    assert np.isin(result.status, (FINISHED, REJECTED, TIMED_OUT, CANCELLED)).all()
    totals = result.totals
    left = totals["timeouts"] + totals["cancellations"] - totals["retries"]
    gone = np.isin(result.status, (TIMED_OUT, CANCELLED)).sum()
    retried_in_vain = ((result.status == REJECTED) & (result.attempts > 1)).sum()
    assert left == gone
    assert retried_in_vain == 0


@MANY
@given(ANYTHING)
def test_blocks_are_conserved_at_every_event(case):  # I2, I10, I11
    replica, total = Replica(*case), case.settings.num_kv_blocks
    for _ in at_every_event(replica):
        for scheduler in replica.schedulers:
            pool = scheduler.pool
            assert pool.free >= 0
            assert set(pool.tables) == {request.row for request in scheduler.running}
            for request in scheduler.running:
                passed = pool.passed[request.row]
                assert request.flights or passed == scheduler.passed(request.computed)
                assert pool.owned(request.row) >= scheduler.blocks_for(request.computed, passed)
            if not isinstance(pool, BlockPool):
                assert sum(pool.tables.values()) + pool.free == total
                continue
            tables = [(row, g, table) for row, own in pool.tables.items() for g, table in enumerate(own)]
            owned = Counter(block for _, _, table in tables for block in table if block is not None)
            assert len(owned) + pool.free == total
            assert not set(owned) & set(pool.queue)
            assert all(block.owners == count for block, count in owned.items())
            assert all((block.group, block.id) == key for key, same in pool.published.items() for block in same)
            assert not isinstance(pool, RadixPool) or all(len(same) == 1 for same in pool.published.values())
            for row, group, table in tables:
                windowed = group < pool.groups.windowed
                assert all((block is None) == (windowed and i < pool.passed[row]) for i, block in enumerate(table))
                held = [(i, block) for i, block in enumerate(table) if block is not None]
                assert all(block.group == group and block.id in {-1, *pool.ids[row][i : i + 1]} for i, block in held)


@MANY
@given(ANYTHING)
def test_nobody_is_given_more_than_the_step_needs(case):  # R5, R7, P2
    _, steps, _ = observe(case)
    for step in steps:
        for row, owned in step.blocks.items():
            tokens = step.computed[row] + step.scheduled.get(row, 0)
            drafts = case.settings.lookahead + 1 if case.settings.speculation is not None else 0
            if not isinstance(case.cost, PipelineCost):  # in flight, more may have been scheduled
                blocks = case.settings.kv_groups.count * blocks_for(
                    max(tokens, step.computed[row] + drafts), case.settings.block_size
                )
                assert owned <= blocks


@MANY
@given(st.one_of(ANYTHING, seeded_mixtures(("swap", "clients that leave"), LASTING)))
def test_when_all_is_over_nothing_is_left(case):  # I13
    replica = Replica(*case)
    replica.advance()
    for scheduler in replica.schedulers:
        assert scheduler.used_blocks == scheduler.n_waiting == len(scheduler.running) == 0
        assert scheduler.host is None or not scheduler.host.held
        for tier, held in zip(case.settings.tiers, scheduler.tiers.held if scheduler.tiers else (), strict=False):
            assert len(held) <= tier.blocks
    assert not replica.at_work
    assert not any(request.flights or request.leaving or request.saved or request.loading for request in replica.rows)


@MANY
@given(ANYTHING)
def test_time_is_busy_or_idle_and_never_goes_back(case):  # I3, I4
    result, steps, _ = observe(case)
    assert all(step.start_s < step.end_s for step in steps)
    assert all(before.start_s <= after.start_s for before, after in pairwise(steps))
    if parts(case) == 1:
        assert all(before.end_s <= after.start_s for before, after in pairwise(steps))
        assert sum(step.end_s - step.start_s for step in steps) + result.idle_s == result.end_s
    assert abs(result.busy_s.sum() + result.idle_s - result.end_s) <= 1e-12 * result.end_s
    for name in ("busy_cached_s", "recompute_s", "swap_s", "wasted_s"):
        assert (getattr(result, name) >= -1e-12 * result.end_s).all(), name
    cost = total_cost(case)
    intercepts_s = cost.decode_value_s - cost.decode_slope_s * cost.decode_knots
    if (intercepts_s >= 0).all() and case.settings.speculation is None:
        # else a short context's share of decode attention may be negative (R11)
        slack_s = 1e-12 * result.end_s
        for part, whole in (("busy_prefill_s", "busy_s"), ("busy_cached_s", "busy_prefill_s"), ("wasted_s", "busy_s")):
            assert (getattr(result, part) <= getattr(result, whole) + slack_s).all(), part


@MANY
@given(ANYTHING)
def test_causes_come_before_effects(case):  # I5
    result, _, _ = observe(case)
    done = result.status == FINISHED
    assert (result.arrival_s + case.settings.host.request_s <= result.scheduled_s)[done].all()
    assert (result.scheduled_s < result.first_token_s)[done].all()
    assert (result.first_token_s <= result.finish_s)[done].all()
    loads = ~np.isnan(result.load_start_s)
    assert (result.load_start_s <= result.load_end_s)[loads].all()
    assert (result.load_end_s <= result.scheduled_s)[loads & done].all()
    assert np.isfinite(result.arrival_s).all()


@MANY
@given(ANYTHING)
def test_no_idling_while_a_request_waits(case):  # I6
    replica = Replica(*case)
    for _ in at_every_instant(replica):
        if not replica.in_progress:
            assert replica.n_running == sum(len(scheduler.queue) for scheduler in replica.schedulers) == 0


@MANY
@given(ANYTHING)
def test_every_token_is_computed_once_or_counted(case):  # I7
    result, steps, _ = observe(case)
    done, totals, requests = result.status == FINISHED, result.totals, case.requests
    once = (requests.prompt_tokens - result.reused_tokens + requests.output_tokens - 1)[done].sum()
    rejected = 0 if result.speculation is None else result.speculation.rejected_tokens
    assert sum(step.n for step in steps) == totals["dense_tokens"]
    assert totals["dense_tokens"] == once + totals["recomputed_tokens"] + totals["abandoned_tokens"] + rejected
    assert totals["rows"] == requests.output_tokens[done].sum() + totals["abandoned_outputs"] + rejected
    assert (totals["recomputed_tokens"] > 0) <= (totals["preemptions"] > 0)
    assert result.preemptions.sum() == totals["preemptions"]
    assert (result.reused_tokens[done] < requests.prompt_tokens[done]).all()
    assert (result.reused_tokens >= np.where(done, requests.cached_tokens, 0)).all()


@MANY
@given(ANYTHING)
def test_limits_hold(case):  # R5, R7, B5
    engine = case.settings
    _, steps, _ = observe(case)
    longest = engine.scheduling.long_prefill_token_threshold
    for step in steps:
        assert step.n == sum(step.scheduled.values()) <= engine.max_num_batched_tokens
        assert len(step.running) <= engine.max_num_seqs
        assert len(step.scheduled) == step.B + step.P
        assert set(step.admitted) <= set(step.scheduled) <= set(step.running)
        assert not set(step.preempted) & set(step.running)
        if longest:
            assert all(step.scheduled[row] <= longest for row in step.admitted)
        if engine.scheduling.batching in {"prefill_first", "static"}:
            assert not (step.B and step.admitted)


@MANY
@given(seeded_mixtures(("policy",), LASTING))
def test_nobody_is_admitted_before_someone_with_a_smaller_key(case):  # I16
    policy = case.settings.scheduling.policy
    assume(policy in {"priority", "sjf"})
    key = case.requests.priority if policy == "priority" else case.requests.predicted_tokens
    _, steps, _ = observe(case)
    for step in steps:
        for row in step.admitted:
            assert all(key[row] <= key[other] for other in step.waiting if other not in step.preempted)


@MANY
@given(seeded_mixtures(("policy",), LASTING))
def test_the_least_served_tenant_is_admitted(case):  # I18
    scheduling = replace(case.settings.scheduling, policy="fair", preempt_lower=False)
    replica = Replica(*case._replace(settings=replace(case.settings, scheduling=scheduling)))
    for scheduler in replica.schedulers:
        queue = scheduler.queue

        def watched(request, start, *, is_new, queue=queue, take=queue.take):
            assert all(queue.counts[request.tenant] <= queue.counts[other.tenant] for other in queue)
            take(request, start, is_new=is_new)

        queue.take = watched
    replica.advance()


@MANY
@given(ANYTHING, st.data())
def test_a_true_output_length_matters_only_from_the_earlier_finish_on(case, data):  # I8, Q5: the oracle boundary
    requests = replace(case.requests, max_tokens=case.requests.max_tokens + 5)
    case = case._replace(requests=requests)
    before, steps_before, _ = observe(case)
    rows = np.flatnonzero((before.status == FINISHED) & (before.attempts == 1))
    assume(len(rows))
    row = data.draw(st.sampled_from(rows.tolist()))
    output = requests.output_tokens.copy()
    output[row] = data.draw(st.integers(1, int(requests.max_tokens[row])).filter(lambda n: n != output[row]))
    after, steps_after, _ = observe(case._replace(requests=replace(requests, output_tokens=output)))
    ends = [run.finish_s[row] - case.settings.host.output_s for run in (before, after) if run.status[row] == FINISHED]
    until_s = min(ends)
    early = [step for step in steps_before if step.start_s < until_s]
    assert early
    assert early == [step for step in steps_after if step.start_s < until_s]


@MANY
@given(ANYTHING, st.data())
def test_cutting_a_run_changes_nothing(case, data):  # I9
    whole, steps, _ = observe(case)
    moments = sorted({0.0, *(step.start_s for step in steps), *(0.5 * (step.start_s + step.end_s) for step in steps)})
    cuts = data.draw(st.lists(st.sampled_from(moments), max_size=4))
    pieces = Replica(*case)
    for cut_s in sorted(cuts):
        pieces.advance(cut_s)
        assert pieces.clock.now <= cut_s
        pieces.result()
    pieces.advance()
    assert_results_equal(pieces.result(), whole)


@MANY
@given(ANYTHING, st.data())
def test_later_arrivals_do_not_change_the_past(case, data):
    requests = case.requests
    assume(not requests.concurrency and len(requests) > 1)
    kept = data.draw(st.integers(1, len(requests) - 1))
    next_s = requests.arrival_s[kept]
    _, steps, _ = observe(case)
    warm = requests.stored_tokens is not None  # which says what is there at the start, for all rows
    assume(not warm)
    _, steps_without, _ = observe(case._replace(requests=requests.take(slice(0, kept))))
    assert [step for step in steps if step.start_s < next_s] == [
        step for step in steps_without if step.start_s < next_s
    ]


@MANY
@given(ANYTHING, st.sampled_from((0.25, 3.0)))
def test_integrals_are_sums_over_requests_and_over_intervals(case, interval_s):  # R13, R15
    result, _, _ = observe(case, interval_s)
    totals, host = result.totals, case.settings.host
    done = result.status == FINISHED
    if not case.requests.clients_may_leave:
        seen_s = (result.arrival_s + host.request_s)[done]
        assert totals["running_s"] + totals["waiting_s"] == (result.finish_s[done] - host.output_s - seen_s).sum()
    columns = {"running": "running_s", "waiting": "waiting_s", "kv_blocks": "kv_blocks_s"}
    for column, total in columns.items():
        np.testing.assert_allclose(result.timeline[column].sum() * interval_s, totals[total], rtol=1e-9, atol=1e-9)
    busy_s = result.timeline["busy_fraction"].sum() * interval_s
    np.testing.assert_allclose(busy_s, result.end_s - result.idle_s, rtol=1e-9, atol=1e-9)
    assert len(result.timeline["start_s"]) == np.ceil(result.end_s / interval_s)


@MANY
@given(ANYTHING)
def test_no_time_is_lost_in_loading(case):  # F8
    result, _, _ = observe(case)
    totals = result.totals
    if case.settings.tiers:
        moved = sum(totals[f"tier{i}_loaded_blocks"] for i in range(len(case.settings.tiers)))
        assert moved >= totals["loads"]
        assert (result.load_s > 0).sum() <= totals["loads"]
        assert (totals["loads"] > 0) <= (case.settings.load_policy != "never")


# Of a plain replica alone


@MANY
@given(dyadic_cases())
def test_no_admission_is_missed(case):  # R5 to R7
    engine, requests = case.settings, case.requests
    _, steps, _ = observe(case)
    known = dict(enumerate(requests.prompt_tokens.tolist()))
    for step in steps:
        budget = engine.max_num_batched_tokens - step.n
        wanting = [row for row in step.running if step.scheduled.get(row, 0) < known[row] - step.computed[row]]
        assert not (wanting and budget), "a running request was cut short with budget left"
        assert not (step.preempted and step.admitted)
        if step.waiting and budget and len(step.running) < engine.max_num_seqs and not step.preempted:
            row = step.waiting[0]
            cached = int(requests.cached_tokens[row])
            tokens = known[row] if engine.scheduler_reserve_full_isl else cached + min(known[row] - cached, budget)
            groups, pages = engine.kv_groups, blocks_for(tokens, engine.block_size)
            before = groups.count * blocks_for(cached, engine.block_size) - groups.blocks(cached, engine.block_size)
            wanted = groups.count * pages - before
            if engine.scheduler_reserve_full_isl:
                bound = groups.most_in_window(engine.block_size, engine.max_num_batched_tokens)
                wanted = min(wanted, groups.full * pages + groups.windowed * bound)
            assert wanted > step.free_blocks, "the first of the queue would have fitted"
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
@given(dyadic_cases(), st.integers(1, 30), st.booleans())
def test_every_computed_token_sees_its_window_once(case, window, chunked):  # R9
    requests = case.requests
    windowed = replace(case.cost, window=window, window_chunked=chunked)
    result, _, _ = observe(case._replace(cost=windowed, settings=replace(case.settings, kv_groups=KvGroups())))
    once = 0
    for row in np.flatnonzero(result.status == FINISHED):
        last = int(requests.prompt_tokens[row] + requests.output_tokens[row] - 1)
        for token in range(int(requests.cached_tokens[row]) + 1, last + 1):
            in_chunk = ((key - 1) // window == (token - 1) // window for key in range(1, token + 1))
            once += sum(in_chunk) if chunked else len(range(1, token + 1)[-window:])
    seen = result.totals["window_decode_keys"] + result.totals["window_prefill_pairs"]
    assert seen == once if not result.totals["recomputed_tokens"] else seen > once


@MANY
@given(dyadic_cases(), st.booleans())
def test_the_widest_window_is_none_and_the_narrowest_sees_each_token_itself(case, chunked):
    for window in (1, 1000):
        cost = replace(case.cost, window=window, window_chunked=chunked)
        _, steps, _ = observe(case._replace(cost=cost, settings=replace(case.settings, kv_groups=KvGroups())))
        for step in steps:
            if window == 1:
                assert (step.B, step.n - step.B, step.n - step.B) == (step.SW, step.AW, step.KW)
            else:
                assert (step.SW, step.AW, step.KW) == (step.S, step.A, step.K)


def test_chip_seconds_are_conserved_on_real_looking_runs():  # I4 without the help of a dyadic grid
    for seed in range(12):
        result = simulate_reference(*real_case(seed))
        assert abs(result.busy_s.sum() + result.idle_s - result.end_s) <= 1e-12 * result.end_s
        assert (result.status == FINISHED).all()
