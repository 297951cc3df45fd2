"""Intervals of a step: nested, nothing without uncertainty, and wider where less was measured."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.catalog.chips import IDEAL
from simulator.catalog.models import load_model
from simulator.catalog.slices import resolve_slice
from simulator.errors import InputError
from simulator.roofline.analysis import step_report
from simulator.roofline.compile import compile_step_cost
from simulator.roofline.deployment import Deployment
from simulator.roofline.intervals import drawn_interval, step_intervals, variance_shares
from simulator.roofline.precision import parse_precision
from simulator.roofline.residual import slowed_step


def report(slice_="h100-sxm:1", **changes):
    d = Deployment(
        architecture=load_model("llama-3-8b"), slice=resolve_slice(slice_), precision=parse_precision("bf16"), **changes
    )
    return step_report(d, decode=64, context=4096)


def width(found, figure="step_time_s"):
    interval = found.figures[figure]
    return math.log(interval.high / interval.low)


def test_intervals_of_a_step_are_nested_and_hold_their_median():
    one = report()
    found = [step_intervals(one, level=level).figures["step_time_s"] for level in (50, 80, 95)]
    for inner, outer in pairwise(found):
        assert outer.low < inner.low < inner.median < inner.high < outer.high
    assert found[1].value == one.time_s


def test_rates_follow_from_the_time():
    one = report()
    figures = step_intervals(one, level=80).figures
    time, rate = figures["step_time_s"], figures["tokens_per_s"]
    assert rate.value == pytest.approx(one.tokens_per_s)
    assert rate.high == pytest.approx(64 / time.low, rel=1e-2)
    assert sum(time.shares.values()) == pytest.approx(1)


def test_a_chip_without_measurements_is_less_certain_and_one_with_anothers_in_between():
    own, heir, none = (step_intervals(report(s), level=80) for s in ("h100-sxm:1", "h200-sxm:1", "mi300x:1"))
    assert width(own) < width(heir)
    assert width(own) < width(none)
    assert own.sources == heir.sources == ["kernels", "assumed"]
    assert none.sources == ["assumed"]
    assert "no kernel of mi300x was measured" in none.notes[0]


def test_constants_given_by_hand_are_certain():
    eff = report().deployment.eff
    by_hand = report(efficiency=eff.override(**{name: 0.9 * value for name, value in eff.constants.items()}))
    found = step_intervals(by_hand, level=80)
    assert found.sources == []
    for figure in found.figures.values():
        assert figure.low == figure.median == figure.high == figure.value
        assert figure.shares == {}


def test_the_bare_datasheet_has_no_interval():
    with pytest.raises(InputError, match="nothing to draw"):
        step_intervals(report(efficiency=IDEAL), level=80)


@pytest.mark.parametrize("level", [0, 100, -5, 250, math.nan])
def test_levels_that_are_no_share_of_draws_are_refused(level):
    with pytest.raises(InputError, match="between 0 and 100"):
        step_intervals(report(), level=level)


def test_the_same_seed_gives_the_same_interval():
    one = report()
    assert step_intervals(one, level=80, seed=4) == step_intervals(one, level=80, seed=4)
    assert step_intervals(one, level=80, seed=4) != step_intervals(one, level=80, seed=5)


def test_draws_without_bound_leave_an_end_open():
    found = drawn_interval(1.0, [1.0, 2.0, 3.0, math.inf], 0.8)
    assert (found.low, found.high) == (pytest.approx(1.0), None)
    assert found.reason == "25% of the draws have no steady state"
    assert drawn_interval(1.0, [math.nan, math.nan, 1.0], 0.8).median is None


def test_shares_are_of_the_variance_of_the_logarithm():
    shares = variance_shares({"kernels": [1.0, math.e], "assumed": [1.0, math.e**2], "residual": [1.0, 1.0]})
    assert shares == pytest.approx({"kernels": 0.2, "assumed": 0.8, "residual": 0.0})
    assert variance_shares({"kernels": [1.0, 1.0]}) == {}


@given(factor=st.floats(0.05, 20), slice_=st.sampled_from(["h100-sxm:1", "mi300x:1"]))
def test_a_factor_on_every_step_keeps_the_bound(factor, slice_):
    limits = {"max_num_seqs": 32, "max_num_batched_tokens": 64}
    d = replace(report(slice_).deployment, **limits)
    cost, bound = compile_step_cost(d), compile_step_cost(replace(d, efficiency=IDEAL))
    found = slowed_step(cost, factor, bound)
    shapes = [
        {"n": 8, "B": 8, "S": 8000, "R": 8},
        {"n": 64, "P": 1, "A": 2080, "K": 64, "R": 1},
        {"n": 1, "B": 1, "S": 3, "R": 1},
    ]
    for shape in shapes:
        assert found.step_s(**shape) >= bound.step_s(**shape) * (1 - 1e-12)
        if factor >= 1:
            assert found.step_s(**shape) == pytest.approx(factor * cost.step_s(**shape))
    assert sum(found.dense_parts.values()) == pytest.approx(found.dense_s)
    assert slowed_step(cost, 1.0, bound) is cost


def test_a_factor_that_is_none_is_refused():
    cost = compile_step_cost(replace(report().deployment, max_num_seqs=4, max_num_batched_tokens=8))
    for factor in (0.0, -1.0, np.nan):
        with pytest.raises(InputError, match="factor"):
            slowed_step(cost, factor, cost)
