"""The log of a stretch against the reference engine's own record of every step, and the laws its spans obey."""

from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.engine.compiled import new_engine, simulate
from simulator.engine.event_log import Phase, record
from simulator.engine.records import FINISHED, NOT_ARRIVED, REJECTED
from simulator.engine.reference import Replica
from simulator.engine.refusals import NAMES
from simulator.engine.single import Engine
from tests.engine.mixtures import random_mixture
from tests.engine.strategies import dyadic_cases, observe, random_case

FIELDS = {"tokens": "n", "batch": "B", "keys": "S", "chunks": "P", "pairs": "A", "rows": "R"}


def assert_steps_are(log, steps, blocks):
    assert len(log.steps) == len(steps)
    for ours, theirs in zip(log.steps, steps, strict=True):
        assert (ours.start_s, ours.end_s) == (theirs.start_s, theirs.end_s)
        for name, symbol in FIELDS.items():
            assert getattr(ours, name) == getattr(theirs, symbol), name
        assert ours.running == len(theirs.running)
        assert ours.waiting == len(theirs.waiting)
        assert ours.preempted == len(theirs.preempted)
        assert ours.kv_blocks == blocks - theirs.free_blocks


def phases_of(log):
    spans = defaultdict(list)
    for span in log.spans:
        spans[span.row].append(span)
    return spans


@settings(max_examples=120, deadline=None)
@given(case=dyadic_cases())
def test_every_step_is_the_reference_engines(case):
    result, steps, _ = observe(case)
    log = record(Engine(*case))
    assert log.complete
    assert_steps_are(log, steps, case.settings.num_kv_blocks)
    assert sorted(row for row, _ in log.rejected) == np.flatnonzero(result.status == REJECTED).tolist()
    spans = phases_of(log)
    assert sorted(spans) == np.flatnonzero(result.status == FINISHED).tolist()
    for row, own in spans.items():
        assert own[0].phase is Phase.QUEUED
        assert (own[0].start_s, own[-1].end_s) == (result.arrival_s[row], result.finish_s[row])
        assert own[0].end_s == result.scheduled_s[row]
        assert all(a.end_s == b.start_s for a, b in pairwise(own))
        assert all(a.phase is not b.phase for a, b in pairwise(own))
        assert sum(span.phase is Phase.PREEMPTED for span in own) == result.preemptions[row]
        # The first token comes at the end of a prefill, or of its repetition.
        firsts = [span.end_s for span in own if span.phase in {Phase.PREFILL, Phase.RECOMPUTE}]
        assert result.first_token_s[row] in firsts
        decode_steps = sum(span.phase is Phase.DECODE for span in own)
        assert decode_steps <= result.preemptions[row] + 1


@settings(max_examples=60, deadline=None)
@given(case=dyadic_cases(), shares=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_a_stretch_is_cut_out_of_the_whole(case, shares):
    result, steps, _ = observe(case)
    start_s, stop_s = (share * result.end_s for share in sorted(shares))
    engine = Engine(*case)
    log = record(engine, start_s, stop_s)
    assert_steps_are(log, [s for s in steps if start_s <= s.start_s < stop_s], case.settings.num_kv_blocks)
    whole = phases_of(record(Engine(*case)))
    for row, own in phases_of(log).items():
        assert all(a.end_s == b.start_s for a, b in pairwise(own))
        for span in own:
            around = [s for s in whole[row] if s.start_s <= span.start_s and s.end_s >= span.end_s]
            assert span.end_s == span.start_s or span.phase in {s.phase for s in around}
    engine.advance()
    after = engine.result()
    assert np.array_equal(after.finish_s, result.finish_s, equal_nan=True)


def test_the_cases_above_meet_every_phase():
    met = Counter()
    for seed in range(200):
        met.update({span.phase for span in record(Engine(*random_case(seed))).spans})
    assert set(met) == {Phase.QUEUED, Phase.PREFILL, Phase.DECODE, Phase.PREEMPTED, Phase.RECOMPUTE}
    assert min(met.values()) >= 10


def test_a_long_stretch_ends_early_and_says_so():
    case = random_case(7)
    whole = record(Engine(*case))
    log = record(Engine(*case), max_steps=3)
    assert not log.complete
    assert log.steps == whole.steps[:3]
    assert log.end_s == whole.steps[2].end_s


@pytest.mark.parametrize("seed", range(5))
def test_looking_changes_nothing(seed):
    case = random_case(seed)
    engine = Engine(*case)
    record(engine)
    assert np.array_equal(engine.result().finish_s, simulate(*case).finish_s, equal_nan=True)


def watched(case):
    """Run the reference; return its result, its steps, and who was there in the whole replica as each was scheduled."""
    steps, there = [], []

    def note(step):
        steps.append(step)
        there.append((replica.n_running, replica.n_waiting, replica.used_blocks))

    replica = Replica(*case, note)
    replica.advance()
    return replica.result(), steps, there


def assert_moments_are(log, steps, there):
    """Who is in the replica; in a pipeline a try after the last step of an instant may still have preempted somebody."""
    last = {step.start_s: state for step, state in zip(steps, there, strict=True)}
    seen = {moment.time_s: moment for moment in log.moments}
    assert set(last) <= set(seen)
    for time_s, state in last.items():
        moment = seen[time_s]
        if log.n_stages == 1 or not moment.preempted:
            assert (moment.running, moment.waiting, moment.kv_blocks) == state


def assert_lives_are(log, case, result):
    spans = phases_of(log)
    output_s = case.settings.host.output_s
    assert sorted(row for row, _ in log.rejected) == np.flatnonzero(result.status == REJECTED).tolist()
    assert sorted(spans) == np.flatnonzero((result.status != REJECTED) & (result.status != NOT_ARRIVED)).tolist()
    for row, own in spans.items():
        assert own[0].start_s == result.arrival_s[row]
        assert all(a.end_s == b.start_s for a, b in pairwise(own))
        assert all(span.start_s <= span.end_s for span in own)
        assert own[-1].attempt == result.attempts[row]
        now = [span for span in own if span.attempt == result.attempts[row]]
        if result.status[row] == FINISHED:
            assert own[-1].end_s == result.finish_s[row]
        if not np.isnan(result.first_token_s[row]):
            ends = {
                span.end_s + output_s for span in now if span.phase in {Phase.PREFILL, Phase.RECOMPUTE, Phase.LEAVING}
            }
            assert result.first_token_s[row] in ends
        if not np.isnan(result.scheduled_s[row]):
            assert next(span.start_s for span in now if span.phase is Phase.PREFILL) == result.scheduled_s[row]
        load = result.load_start_s[row], result.load_end_s[row]
        if load[0] < load[1]:
            assert load in {(span.start_s, span.end_s) for span in now if span.phase is Phase.LOADING}
        assert sum(own[-1].paid) == pytest.approx(result.busy_s[row], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("feature", [name for name in NAMES if name not in {"writing through", "warm store"}])
def test_every_mixture_is_followed(feature):
    """What the log says of steps, lives and the replica is what the reference engine did."""
    met = Counter()
    for seed in range(25):
        case = random_mixture(seed, (feature,))
        result, steps, there = watched(case)
        log = record(new_engine(*case))
        ours = [step for step in log.steps if step.tokens]
        assert len(ours) == len(steps)
        retries = log.n_ranks > 1 and case.settings.retries.max_attempts > 1
        for one, other in zip(ours, steps, strict=True):
            assert (one.start_s, one.end_s, one.rank) == (other.start_s, other.end_s, other.rank)
            for name, symbol in FIELDS.items():
                # With speculation contexts are fractions of tokens.
                assert abs(getattr(one, name) - getattr(other, symbol)) <= (0.5 if case.settings.speculation else 0)
            if log.n_stages == 1 and not retries:  # of who tried again within a step, the rank before is not known
                assert one.running == len(other.running)
                assert one.waiting == len(other.waiting) + len(other.loading)
                assert one.preempted == len(other.preempted)
        assert_moments_are(log, steps, there)
        assert_lives_are(log, case, result)
        met.update(span.phase for span in log.spans)
    expected = {
        "clients that leave": {Phase.LEAVING, Phase.AWAY},
        "tiers": {Phase.LOADING},
        "host": {Phase.HOST},
        "swap": {Phase.PREEMPTED, Phase.RECOMPUTE},
    }.get(feature, {Phase.QUEUED, Phase.PREFILL, Phase.DECODE})
    assert all(met[phase] >= 3 for phase in expected)


@pytest.mark.parametrize("seed", range(40))
def test_stages_are_entered_one_after_the_other(seed):
    case = random_mixture(seed, ("stages",))
    log = record(new_engine(*case))
    pp = len(case.cost.stages)
    assert log.n_stages == pp
    for step in log.steps:
        assert len(step.stages) == pp
        assert step.stages[0][0] >= step.start_s
        assert step.stages[-1][1] == step.end_s
        assert all(enters < leaves for enters, leaves in step.stages)
        for stage, ((_, left), (entered, _)) in enumerate(pairwise(step.stages)):
            assert entered >= left + case.cost.send_s[stage, step.tokens]
    for one, other in pairwise(log.steps):  # S5: they keep their order, and no stage has two at a time
        assert all(before[1] <= after[0] for before, after in zip(one.stages, other.stages, strict=True))
    worked = sum(left - entered for step in log.steps for entered, left in step.stages)
    result = simulate(*case)
    assert result.end_s - result.idle_s == pytest.approx(worked / pp, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("seed", range(40))
def test_ranks_wait_for_the_slowest(seed):
    case = random_mixture(seed, ("ranks",))
    log = record(new_engine(*case))
    by_start = defaultdict(list)
    for step in log.steps:
        by_start[step.start_s].append(step)
    for together in by_start.values():
        assert [step.rank for step in together] == list(range(case.cost.ranks))
        assert len({step.end_s for step in together}) == 1
        assert max(step.worked_until_s for step in together) == together[0].end_s
    worked = sum(step.worked_until_s - step.start_s for step in log.steps)
    result = simulate(*case)
    assert result.end_s - result.idle_s == pytest.approx(worked / case.cost.ranks, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("feature", ["stages", "ranks", "clients that leave"])
def test_a_stretch_of_any_replica_is_cut_out_of_the_whole(feature):
    for seed in range(20):
        case = random_mixture(seed, (feature,))
        whole = record(new_engine(*case))
        start_s, stop_s = 0.3 * whole.end_s, 0.7 * whole.end_s
        engine = new_engine(*case)
        log = record(engine, start_s, stop_s)
        assert log.steps == tuple(step for step in whole.steps if start_s <= step.start_s < stop_s)
        lives = phases_of(whole)
        for row, own in phases_of(log).items():
            assert all(a.end_s == b.start_s for a, b in pairwise(own))
            for span in own:
                around = {s.phase for s in lives[row] if s.start_s <= span.start_s and s.end_s >= span.end_s}
                assert (
                    span.end_s == span.start_s or span.phase in around or span.phase in {Phase.PREFILL, Phase.RECOMPUTE}
                )
        engine.advance()
        assert np.array_equal(engine.result().finish_s, simulate(*case).finish_s, equal_nan=True)


def test_a_watched_request_ends_the_stretch():
    case = random_case(7)
    result = simulate(*case)
    row = int(np.flatnonzero(result.status == FINISHED)[0])
    log = record(new_engine(*case), float(result.arrival_s[row]), watched=row)
    assert log.end_s == result.finish_s[row]
    assert [span.end_s for span in log.spans if span.row == row][-1] == result.finish_s[row]
