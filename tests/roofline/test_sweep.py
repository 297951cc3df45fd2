"""Sweeps: equal to the table they vectorise, the published Pareto plot, fronts, what fits where."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.catalog.chips import chip_names
from simulator.catalog.models import load_model
from simulator.catalog.slices import legal_slices, resolve_slice
from simulator.errors import ChipsecondsError, InputError
from simulator.roofline.analysis import step_report
from simulator.roofline.compile import compile_step_cost
from simulator.roofline.deployment import Deployment
from simulator.roofline.fit import smallest_place
from simulator.roofline.memory import MemoryFit, memory_fit
from simulator.roofline.precision import parse_precision
from simulator.roofline.step_cost import StepCost
from simulator.roofline.sweep import DecodeSweep, batch_ladder, decode_curves, max_batch, pareto_front, sweep_decode


def deployment(spec="tpu-v5e:4x4", precision="w8a16kv8", **settings):
    return Deployment(load_model("llama-3-70b"), resolve_slice(spec), parse_precision(precision), **settings)


def windowed_cost(window, *, chunked):
    """A table with several knots, a window and a time per sequence, as no dense decoder has."""
    n = np.arange(65.0)
    return StepCost(
        dense_s=n * 1e-4,
        head_s=n * 1e-5,
        decode_knots=np.array([0.0, 500.0, 3000.0]),
        decode_value_s=np.array([1e-3, 1.5e-3, 9e-3]),
        decode_slope_s=np.array([1e-6, 3e-6, 2e-6]),
        decode_seq_s=7e-5,
        prefill_planes=np.zeros((1, 5)),
        chips=4,
        dense_flops=n,
        dense_bytes=n,
        head_flops=n,
        head_bytes=n,
        attention_flops_per_pair=1.0,
        kv_bytes_per_token=1.0,
        peak_flops_per_s=1.0,
        hbm_bandwidth_bytes_per_s=1.0,
        window=window,
        window_chunked=chunked,
        window_slope_s=4e-7,
    )


FIT = MemoryFit(1e9, 1e9, 0.0, 0.0, 0.0, 1e3, 16)


@given(
    batch=st.lists(st.integers(1, 64), min_size=1, max_size=5),
    context=st.lists(st.integers(1, 5000), min_size=1, max_size=5),
    window=st.integers(1, 2000),
    chunked=st.booleans(),
)
def test_a_sweep_equals_step_s_at_every_point(batch, context, window, chunked):
    cost = windowed_cost(window, chunked=chunked)
    found = sweep_decode(cost, FIT, np.array(batch)[:, None], context)
    for i, B in enumerate(batch):
        for j, C in enumerate(context):
            seen = (C - 1) % window + 1 if chunked else min(C, window)
            expected = cost.step_s(n=B, B=B, S=B * C, R=B, SW=B * seen)
            assert found.step_s[i, j] == pytest.approx(expected, rel=1e-12)
            assert found.tokens_per_s_per_chip[i, j] == pytest.approx(B / expected / 4, rel=1e-12)


@pytest.mark.parametrize(("batch", "context"), [(1, 1), (32, 8192), (256, 100_000)])
def test_a_sweep_equals_the_report_of_the_step(batch, context):
    d = deployment()
    found = sweep_decode(compile_step_cost(d), memory_fit(d), batch, context)
    report = step_report(d, decode=batch, context=context)
    assert float(found.step_s) == pytest.approx(report.time_s, rel=1e-12)
    assert float(found.tokens_per_s_per_chip) == pytest.approx(report.tokens_per_s_per_chip, rel=1e-12)


def test_the_memory_mask_counts_whole_blocks():
    d = deployment()
    fit = memory_fit(d)
    contexts = np.array([1, 15, 16, 17, 8192, 8193, 100_000, 10**7])
    grid = sweep_decode(compile_step_cost(d), fit, np.arange(1, 257)[:, None], contexts)
    for j, context in enumerate(contexts):
        blocks = -(-int(context) // fit.block_size)
        assert grid.fits[:, j].tolist() == [B * blocks <= fit.kv_blocks for B in range(1, 257)]
    assert not grid.fits[:, -1].any()
    assert grid.fits[:, 0].all()


@pytest.mark.parametrize(
    ("batch", "context", "message"),
    [(0, 5, "batch = 0"), (5, 0, "context = 0"), (257, 5, "at most 256"), (1.5, 5, "whole"), (5, [1, -2], "-2")],
)
def test_points_that_do_not_exist_are_refused(batch, context, message):
    d = deployment()
    with pytest.raises(InputError, match=message):
        sweep_decode(compile_step_cost(d), memory_fit(d), batch, context)


# --- scaling book, serving chapter: the Pareto plot of Llama-3-70B, int8 weights and cache, on v5e 4x4 ------------------


@pytest.fixture(scope="module")
def book_curve(textbook, make_slice, rounded, without_norms) -> DecodeSweep:
    slice_ = make_slice("tpu-v5e:4x4", flops={"bf16": 1.97e14}, bandwidth=8.2e11, links=False)
    model = rounded(without_norms("llama-3-70b"), 70e9)
    (curve,) = decode_curves(textbook(model, slice_, "w8a16kv8g0", max_num_seqs=512), [2048])
    return curve.sweep


def test_book_serving_a21_floor_is_5_335_ms(book_curve):
    kv_s = 2048 * 163_840 / (16 * 8.2e11)
    assert book_curve.step_s[0] - kv_s == pytest.approx(5.335e-3, rel=1e-4)  # 70e9 / (16 · 8.2e11)
    assert book_curve.step_s[0] < 5.5e-3


def test_book_serving_a21_plateau_of_about_1_token_per_ms_and_chip_from_batch_120(book_curve):
    per_ms = book_curve.tokens_per_s_per_chip / 1e3
    plateau = 1 / (2 * 70e9 / 1.97e14 + 2048 * 163_840 / 8.2e11) / 1e3  # MLPs bound by compute, attention by HBM
    assert plateau == pytest.approx(0.893, abs=5e-4)
    assert per_ms[120:] == pytest.approx(plateau, rel=1e-4)
    assert (np.diff(per_ms[:120]) > 0).all()
    assert per_ms[59] < 0.7 * plateau


# --- fronts -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=30))
def test_front_is_what_no_point_beats(points):
    def beaten(p):
        return any(q[0] <= p[0] and q[1] >= p[1] and q != p for q in points)

    kept = pareto_front(*zip(*points, strict=True))
    assert kept.tolist() == [not beaten(p) for p in points]


def test_ladder_ends_at_the_largest():
    assert batch_ladder(1) == [1]
    assert batch_ladder(2) == [1, 2]
    assert batch_ladder(64) == [1, 2, 4, 8, 16, 32, 64]


# --- what fits where --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chip", ["tpu-v5e", "h100-sxm", "l4", "a100-80-sxm"])
def test_the_smallest_place_holds_a_sequence_and_no_smaller_slice_does(chip):
    context = 16384
    template = deployment("h100-sxm:1")
    place = smallest_place(template, chip, context)
    assert place.deployment is not None
    assert place.fit == memory_fit(place.deployment)
    assert place.max_batch * -(-context // 16) <= place.fit.kv_blocks < (place.max_batch + 1) * -(-context // 16)
    smaller = legal_slices(chip)[: legal_slices(chip).index(place.deployment.slice.spec)]
    for spec in smaller:
        try:
            fit = memory_fit(replace(template, slice=resolve_slice(spec)))
        except ChipsecondsError:
            continue
        assert int(max_batch(fit, context)) == 0


def test_a_chip_too_small_says_why():
    place = smallest_place(deployment("h100-sxm:1"), "groq-lpu-v1", 8192)
    assert place.deployment is None
    assert "not even the weights fit" in place.why
    assert "groq-lpu-v1:1" in place.why


def test_a_longer_context_never_needs_a_smaller_slice_nor_holds_more():
    template = deployment("h100-sxm:1")
    for chip in chip_names():
        places = [smallest_place(template, chip, context) for context in (1024, 65536)]
        short, long = ((p.deployment.chips, p.max_batch) if p.deployment else (np.inf, 0) for p in places)
        assert long[0] >= short[0]
        if long[0] == short[0] < np.inf:
            assert long[1] <= short[1]
