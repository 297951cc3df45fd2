"""I9 on the compiled engine: a run cut at any times and resumed is the same run."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.engine.compiled import simulate
from simulator.engine.records import itl_bin, itl_mean_s
from simulator.engine.single import Engine
from tests.engine.strategies import dyadic_cases, observe, random_case


@settings(max_examples=150, deadline=None)
@given(case=dyadic_cases(), cuts=st.lists(st.floats(0, 1), max_size=8))
def test_cutting_and_resuming_changes_nothing(case, cuts):
    cost, limits, requests = case
    whole = simulate(cost, limits, requests)
    engine = Engine(cost, limits, requests)
    for share in sorted(cuts):
        engine.advance(share * whole.end_s)
        assert engine.clock_s <= whole.end_s
    engine.advance()
    assert engine.done
    parts = engine.result()
    for field in dataclasses.fields(whole):
        name = field.name
        one, other = getattr(whole, name), getattr(parts, name)
        if name in {"totals", "timeline"}:
            for key in one:
                if key != "segments":
                    assert np.allclose(one[key], other[key], rtol=1e-9, atol=1e-12), key
        elif name.startswith("busy") or name == "recompute_s":
            assert np.allclose(one, other, rtol=1e-9, atol=1e-12), name
        else:
            assert np.array_equal(one, other, equal_nan=np.asarray(one).dtype.kind == "f"), name


def test_a_cut_before_the_first_arrival_does_nothing():
    cost, limits, requests = random_case(3)
    engine = Engine(cost, limits, requests)
    engine.advance(0.0)
    assert engine.clock_s == 0.0
    assert engine.result().totals["steps"] == 0
    assert not engine.done


@pytest.mark.parametrize("seed", range(30))
def test_latencies_between_two_instants_are_those_of_the_steps_that_start_there(seed):
    case = random_case(seed)
    whole, steps, itl_s = observe(case)
    start, stop = 0.2 * whole.end_s, 0.7 * whole.end_s
    engine = Engine(*case)
    counts = engine.itl_between(start, stop)
    engine.advance()
    assert np.array_equal(engine.result().itl_counts, whole.itl_counts)
    assert np.array_equal(Engine(*case).itl_between(0.0, np.inf), whole.itl_counts)
    inside = [step for step in steps if start <= step.start_s < stop]
    # A decoding request emits one token per step; who was preempted emits one more, with a long gap, when it is back.
    assert 0 <= counts.sum() - sum(step.B for step in inside) <= whole.totals["preemptions"]
    if itl_s and not whole.totals["preemptions"]:
        lengths = np.concatenate([np.full(step.B, step.end_s - step.start_s) for step in inside] or [np.zeros(0)])
        assert np.array_equal(counts, np.bincount([itl_bin(value) for value in lengths], minlength=len(counts)))
        if len(lengths):
            assert itl_mean_s(counts) == pytest.approx(lengths.mean(), rel=0.004)
