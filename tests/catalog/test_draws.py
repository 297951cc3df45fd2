"""Draws: distributions as stated, bounds kept, and the same values whatever else is drawn."""

from dataclasses import fields, replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from simulator.calibration import kernels_models
from simulator.calibration.kernels_tables import read_tables
from simulator.catalog import draws as module
from simulator.catalog.chips import IDEAL, load_chip
from simulator.catalog.draws import (
    Draws,
    chip_spreads,
    drawn_efficiencies,
    drawn_profiles,
    free_parameters,
    interval_of,
    residual_factors,
    residual_of,
    residual_scales,
    root_of,
    student_quantile,
    triangular,
)
from simulator.catalog.engines import EngineSpec, FitErrors, LeftOut, load_engine
from simulator.catalog.files import parse
from simulator.catalog.kernel_curves import CURVES, calibration_names, read_calibration
from simulator.errors import InputError
from simulator.randomness import stratified

LEFT_OUT = LeftOut(
    groups=5, rows=100, step_scale=0.1, step_tail=4, first_token_scale=0.2, first_token_tail=2, within_group=0.5
)


def test_a_stratified_list_has_one_value_in_each_stratum_and_belongs_to_its_cause():
    one, other = stratified(3, "a", 50), stratified(3, "b", 50)
    assert sorted(np.floor(one * 50)) == list(range(50))
    assert (one == stratified(3, "a", 50)).all()
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.4


@pytest.mark.parametrize("tail", [2, 4])
def test_closed_forms_of_students_t_equal_scipy(tail):
    u = np.linspace(0.001, 0.999, 201)
    assert student_quantile(u, tail) == pytest.approx(stats.t.ppf(u, tail), abs=1e-9)


def test_an_unknown_tail_is_refused():
    with pytest.raises(InputError, match="tail = 3"):
        student_quantile(np.array([0.5]), 3)


@given(low=st.floats(0, 10), up=st.floats(0.01, 10), more=st.floats(0.01, 10))
def test_a_triangle_stays_inside_its_range_with_its_median_at_the_value(low, up, more):
    value, high = low + up, low + up + more
    found = triangular(np.linspace(0, 1, 101), low, value, high)
    assert (np.diff(found) >= -1e-12).all()
    assert found[[0, 50, 100]] == pytest.approx([low, value, high])


def test_intervals_are_nested():
    values = np.random.default_rng(0).standard_t(4, 64)
    ends = [interval_of(values, level) for level in (0.5, 0.8, 0.95)]
    for (low, high), (wider_low, wider_high) in pairwise(ends):
        assert wider_low <= low <= high <= wider_high


@pytest.mark.parametrize("name", ["h100-sxm", "h200-sxm", "l4", "mi300x", "tpu-v5e"])
def test_no_draw_leaves_the_physical_range(name):
    chip = load_chip(name)
    drawn = drawn_efficiencies(chip, chip.efficiency, Draws(64))  # curves and deployments refuse what is outside
    for constant in ("matmul", "hbm", "kv", "attention", "link"):
        quantity = getattr(chip.efficiency_table, constant)
        values = [getattr(e, constant) for e in drawn]
        assert quantity.low <= min(values) < max(values) <= quantity.high
        assert max(values) <= 1


def test_without_sources_nothing_moves_and_one_source_does_not_move_another():
    chip = load_chip("h100-sxm")
    assert drawn_efficiencies(chip, chip.efficiency, Draws(3, sources=frozenset())) == [chip.efficiency] * 3
    kernels = drawn_efficiencies(chip, chip.efficiency, Draws(8, sources=frozenset({"kernels"})))
    every = drawn_efficiencies(chip, chip.efficiency, Draws(8))
    assert [e.curves for e in kernels] == [e.curves for e in every]
    assert {e.matmul for e in kernels} == {chip.efficiency.matmul}


def test_what_was_chosen_by_hand_stays():
    chip = load_chip("mi300x")
    own = chip.efficiency.override(matmul=0.61)
    drawn = drawn_efficiencies(chip, own, Draws(8))
    assert {e.matmul for e in drawn} == {0.61}
    held = drawn_efficiencies(chip, chip.efficiency, Draws(8), held=("matmul",))
    assert {e.matmul for e in held} == {chip.efficiency.matmul}
    assert drawn_efficiencies(chip, IDEAL, Draws(2)) == [IDEAL, IDEAL]


def test_draws_have_the_fits_spread_and_correlation():
    fit = next(f for f in read_calibration("h100-sxm").fits if f.op == "gemm" and f.dtype == "fp8_block")
    names = free_parameters(fit, CURVES["gemm"])
    errors = module._parameter_errors(fit, "test", Draws(2000))
    for name in names:
        assert errors[name].std() == pytest.approx(fit.standard_errors[name], rel=0.1)
    found = np.corrcoef([errors[name] for name in names])
    assert np.abs(found - np.array(fit.correlation)).max() < 0.08


def test_every_curve_can_be_drawn():
    assert set(CURVES.values()) == set(module._SIDES) == set(module._LEADING)
    for curve, sides in module._SIDES.items():
        assert {*sides, *module._LEADING[curve]} <= {f.name for f in fields(curve)}


TABLES = {
    "gemm_x": ("dtype,m,n,k", "fp8_block,{i},256,256"),
    "moe_x": (
        "dtype,hidden,inter,gated,topk,experts,tp,ep,distribution,tokens",
        "bfloat16,64,64,1,2,8,1,1,balanced,{i}",
    ),
    "attention_prefill_x": ("dtype,kv_dtype,batch,seq,heads,kv_heads,head_dim", "bfloat16,bfloat16,1,{i},8,2,128"),
    "attention_decode_x": ("dtype,kv_dtype,batch,kv_len,heads,kv_heads,head_dim", "bfloat16,bfloat16,{i},512,8,2,128"),
    "comm": ("collective,impl,dtype,num_gpus,bytes", "all_reduce,nccl,bfloat16,8,{i}"),
}


@pytest.mark.parametrize("name", TABLES)
def test_the_order_of_a_correlation_is_that_of_the_fit(name, tmp_path):
    """Files sort parameters by name; correlations keep the order in which the fits list their free parameters."""
    columns, row = TABLES[name]
    lines = [f"{columns},latency_us", *(f"{row.format(i=i)},{1000 + i}" for i in range(1, 41))]
    (tmp_path / f"{name}.csv").write_text("\n".join(lines), encoding="utf-8")
    problem = next(iter(kernels_models.problems(load_chip("h100-sxm"), read_tables(tmp_path))))
    listed = tuple(p.name for p in problem.free)
    order = module._ORDER.get(CURVES[problem.op]) or tuple(f.name for f in fields(CURVES[problem.op]))
    assert tuple(p for p in order if p in listed) == listed


def test_every_correlation_of_the_catalogue_is_of_the_parameters_with_errors():
    fits = [fit for name in calibration_names() for fit in read_calibration(name).fits]
    sizes = [(len(free_parameters(fit, CURVES[fit.op])), len(fit.correlation)) for fit in fits]
    # Along a flat direction a standard error may be 0 and its row of the correlation empty: then draws are independent. So it is
    # where a kernel's walk over a sequence is always longer than its products.
    assert all(rows >= free for free, rows in sizes if free > 1)
    assert sum(rows > free for free, rows in sizes if free > 1) <= 0.04 * len(fits)


def test_a_slightly_indefinite_correlation_still_has_a_root():
    matrix = np.array([[1, 0.99, 0.0], [0.99, 1, 0.99], [0.0, 0.99, 1]])
    assert np.isfinite(root_of(matrix)).all()


def test_residual_scales_follow_the_regimes():
    fit = next(f for f in read_calibration("h100-sxm").fits if f.op == "all_reduce" and f.chips == 8)
    doubled = fit.model_copy(
        update={"residuals": tuple(r.model_copy(update={"median_abs": 2 * r.median_abs}) for r in fit.residuals)}
    )
    for side, scale in residual_scales(fit).items():
        assert residual_scales(doubled)[side] == pytest.approx(2 * scale)


def test_chips_priced_by_anothers_kernels_spread_further():
    assert all(spread > 0 for spread in chip_spreads("switched").values())
    own, heir = (load_chip(name) for name in ("h100-sxm", "h200-sxm"))

    def spread(chip):
        drawn = drawn_efficiencies(chip, chip.efficiency, Draws(64, sources=frozenset({"kernels"})))
        return np.log([e.curves.curves["gemm", "bfloat16", "", 1].hbm for e in drawn]).std()

    assert spread(heir) > 1.05 * spread(own)


def with_errors(**changes):
    spec = load_engine("vllm")
    errors = FitErrors(
        parameters=("host.step", "slowdown.weights"),
        standard_errors=(1e-4, 0.02),
        correlation=((1.0,), (-0.9, 1.0)),
        chips=("h100-sxm",),
        left_out={"dense": LEFT_OUT},
    )
    return spec.model_copy(update={"errors": errors.model_copy(update=changes)})


def test_profiles_are_drawn_with_their_covariance():
    spec = with_errors()
    drawn = drawn_profiles(spec, spec.profile, Draws(500))
    step, weights = (np.array([getattr(p, name) for p in drawn]) for name in ("step_s", "weights_slowdown"))
    assert step.std() == pytest.approx(1e-4, rel=0.1)
    assert weights.std() == pytest.approx(0.02, rel=0.1)
    assert np.corrcoef(step, weights)[0, 1] == pytest.approx(-0.9, abs=0.05)
    assert {p.token_s for p in drawn} == {spec.profile.token_s}


def test_no_error_no_spread():
    spec = with_errors(standard_errors=(0.0, 0.0))
    assert drawn_profiles(spec, spec.profile, Draws(5)) == [spec.profile] * 5


def test_a_profile_value_set_by_hand_stays():
    spec = with_errors()
    own = replace(spec.profile, step_s=7e-3)
    assert {p.step_s for p in drawn_profiles(spec, own, Draws(5))} == {7e-3}


def test_a_profile_without_errors_is_drawn_from_its_stated_ranges():
    spec = load_engine("vllm").model_copy(update={"errors": None})
    drawn = drawn_profiles(spec, spec.profile, Draws(50))
    low, high = (1e-6 * getattr(spec.host.step, side) for side in ("low", "high"))
    assert low <= min(p.step_s for p in drawn) < max(p.step_s for p in drawn) <= high


def test_the_residual_is_shared_inside_a_group():
    draws = Draws(256)
    one, mate = (residual_factors(LEFT_OUT, draws, group="g", run=run) for run in ("a", "b"))
    other = residual_factors(LEFT_OUT, draws, group="h", run="a")
    assert np.corrcoef(np.log(one.step), np.log(mate.step))[0, 1] > 0.3
    assert abs(np.corrcoef(np.log(one.step), np.log(other.step))[0, 1]) < 0.25
    assert np.median(one.step) == pytest.approx(1, rel=0.01)
    low, high = interval_of(np.log(one.step), 0.8)
    assert high == pytest.approx(0.1 * stats.t.ppf(0.9, 4), rel=0.05) == pytest.approx(-low, rel=0.05)


def test_chips_outside_the_fit_have_a_residual_of_their_own():
    spec = with_errors(other_chips=LEFT_OUT.model_copy(update={"step_scale": 0.4}))
    assert residual_of(spec, "h100-sxm", experts=False).step_scale == 0.1
    assert residual_of(spec, "a100-80-sxm", experts=False).step_scale == 0.4
    assert residual_of(spec, "h100-sxm", experts=True) is None


def test_errors_of_a_file_are_checked():
    spec = load_engine("vllm")
    data = spec.model_dump(mode="json")
    data["errors"] = {"parameters": ["host.stepp"], "standard_errors": [1e-4], "correlation": [[1.0]]}
    with pytest.raises(InputError, match=r"host\.stepp.*host\.step"):
        parse(EngineSpec, data, "mine.toml")
    data["errors"] = {"parameters": ["host.step"], "standard_errors": [], "correlation": [[1.0]]}
    with pytest.raises(InputError, match="standard_errors"):
        parse(EngineSpec, data, "mine.toml")


def test_bad_draws_are_refused():
    with pytest.raises(InputError, match="draws = 0"):
        Draws(0)
    with pytest.raises(InputError, match="kernel"):
        Draws(4, sources=frozenset({"kernel"}))


@pytest.mark.parametrize("kernels", ["vllm", "sglang", "trtllm"])
def test_curves_that_stand_for_a_framework_are_drawn_like_those_they_come_from(kernels):
    """8-bit experts on B200 were measured in TensorRT-LLM alone: drawn alike for all, with the framework's own walk."""
    chip, key = load_chip("b200"), ("moe", "fp8_block", "", 1)
    for drawn in drawn_efficiencies(chip, chip.efficiency, Draws(4), kernels=kernels):
        plain, own = drawn.curves.curves[key], drawn.curves.of(kernels).curves[key]
        assert (own.hbm, own.peak, own.traffic) == (plain.hbm, plain.peak, plain.traffic)
        assert (own.expert_s < plain.expert_s / 5) == (kernels != "trtllm")
