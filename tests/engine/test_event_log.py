"""The log of a stretch against the reference engine's own record of every step, and the laws its spans obey."""

from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.engine.compiled import Engine, simulate
from simulator.engine.event_log import Phase, record
from simulator.engine.records import FINISHED, REJECTED
from simulator.engine.refusals import LASTING, NAMES, Refusal
from tests.engine.mixtures import random_mixture
from tests.engine.strategies import dyadic_cases, observe, random_case

ALONE = Refusal(
    ("prefix cache",), [name for name in NAMES if name not in {"prefix cache", "swap"}], "not followed here"
)
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
    assert set(met) == set(Phase)
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


@pytest.mark.parametrize("seed", range(60))
def test_a_replica_with_a_prefix_cache_is_followed_too(seed):
    case = random_mixture(seed, ("prefix cache",), (*LASTING, ALONE))
    result, steps, _ = observe(case)
    log = record(Engine(*case))
    assert_steps_are(log, steps, case.settings.num_kv_blocks)
    for row, own in phases_of(log).items():
        assert (own[0].start_s, own[-1].end_s) == (result.arrival_s[row], result.finish_s[row])
        assert sum(span.phase is Phase.PREEMPTED for span in own) == result.preemptions[row]
