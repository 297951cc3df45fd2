"""I9 on the compiled engine: a run cut at any times and resumed is the same run."""

import dataclasses

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.engine.compiled import Engine, simulate
from tests.engine.strategies import dyadic_cases, random_case


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
