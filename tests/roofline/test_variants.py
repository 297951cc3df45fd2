"""What if the hardware were different: homogeneity, monotonicity, elasticities."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.catalog.models import load_model
from simulator.catalog.slices import resolve_slice
from simulator.errors import InputError
from simulator.roofline.compile import step_time_s
from simulator.roofline.deployment import Deployment
from simulator.roofline.memory import memory_fit
from simulator.roofline.ops import StepShape
from simulator.roofline.precision import parse_precision
from simulator.roofline.variants import KNOBS, elasticity, scaled, textbook, what_if

DEPLOYMENTS = [
    Deployment(load_model("llama-3-70b"), resolve_slice(spec), parse_precision(precision), overlap=overlap)
    for spec, precision, overlap in (
        ("tpu-v5e:4x4", "w8a16kv8", 0.0),
        ("h100-sxm:8", "fp8kv8", 0.5),
        ("h100-sxm:2x8", "bf16", 0.0),
    )
]
STEPS = [StepShape.decode(32, 8192), StepShape.prefill(4096), StepShape.decode(8, 900) + StepShape.prefill(512, 100)]
RATES, TIMES = ("hbm", "compute", "link"), ("latency", "overhead")


@pytest.mark.parametrize("d", DEPLOYMENTS, ids=lambda d: d.slice.spec)
@pytest.mark.parametrize("step", STEPS, ids=["decode", "prefill", "mixed"])
def test_all_rates_times_k_and_all_times_over_k_is_k_times_as_fast(d, step):
    k = 3.0
    faster = scaled(d, dict.fromkeys(RATES, k) | dict.fromkeys(TIMES, 1 / k))
    assert step_time_s(faster, step) == pytest.approx(step_time_s(d, step) / k, rel=1e-12)


@pytest.mark.parametrize("d", DEPLOYMENTS, ids=lambda d: d.slice.spec)
@pytest.mark.parametrize("step", STEPS, ids=["decode", "prefill", "mixed"])
def test_elasticities_are_shares_that_add_up_to_one(d, step):
    found = {knob: elasticity(d, step, knob) for knob in KNOBS}
    assert all(-1 <= found[knob] <= 1e-12 for knob in RATES)
    assert all(-1e-12 <= found[knob] <= 1 for knob in TIMES)
    assert sum(found[t] for t in TIMES) - sum(found[r] for r in RATES) == pytest.approx(1, abs=1e-6)


@given(
    d=st.sampled_from(DEPLOYMENTS),
    step=st.sampled_from(STEPS),
    knob=st.sampled_from(sorted(KNOBS)),
    factors=st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)),
)
def test_time_falls_with_rates_and_grows_with_fixed_times(d, step, knob, factors):
    low, high = sorted(factors)
    slow, fast = (low, high) if knob in RATES else (high, low)
    assert step_time_s(scaled(d, {knob: fast}), step) <= step_time_s(scaled(d, {knob: slow}), step) * (1 + 1e-12)


def test_what_if_gives_each_change_and_all_of_them():
    d, step = DEPLOYMENTS[0], STEPS[0]
    rows = what_if(d, step, {"hbm": 2, "overhead": 0})
    assert [dict(r.factors) for r in rows] == [{"hbm": 2}, {"overhead": 0}, {"hbm": 2, "overhead": 0}]
    assert rows[2].speedup > rows[0].speedup > rows[1].speedup > 1
    assert math.isnan(rows[2].elasticity)
    assert len(what_if(d, step, {"hbm": 2})) == 1


def test_memory_stays_as_it_was():
    d = DEPLOYMENTS[0]
    assert memory_fit(scaled(d, {"hbm": 2, "compute": 3})) == memory_fit(d)


def test_textbook_decode_is_weights_and_keys_over_bandwidth():
    d = textbook(DEPLOYMENTS[2])
    weights = 2 * 80 * (2 * 8192 * 128 * (64 + 8) + 3 * 8192 * 28672) + 2 * 8192 * 128256 + 2 * 8192 * 161
    keys = 4 * 1000 * 2 * 80 * 8 * 128 * 2
    seconds = (weights + keys) / (16 * d.slice.chip.hbm_bandwidth_bytes_per_s)
    # Norm weights, a few MB, lie on every chip.
    assert step_time_s(d, StepShape.decode(4, 1000)) == pytest.approx(seconds, rel=5e-4)


@pytest.mark.parametrize(
    ("factors", "message"),
    [({"hmb": 2}, "'hbm'"), ({"hbm": 0}, "above 0"), ({"overhead": -1}, "not below 0"), ({"link": math.inf}, "finite")],
)
def test_bad_factors_are_refused(factors, message):
    with pytest.raises(InputError, match=message):
        scaled(DEPLOYMENTS[0], factors)
