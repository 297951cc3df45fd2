"""Plots of the roofline views: that they show what they must, alike each time."""

import itertools

import pytest

from simulator.catalog.models import load_model
from simulator.catalog.slices import resolve_slice
from simulator.report.figures import save_figure
from simulator.report.pareto_plot import context_text, draw_pareto
from simulator.report.step_bars import PARTS, draw_step_bars, step_fits, step_parts
from simulator.roofline.analysis import step_report
from simulator.roofline.deployment import Deployment
from simulator.roofline.precision import parse_precision
from simulator.roofline.sweep import batch_ladder, decode_curves


def deployment(spec="tpu-v5e:4x4", precision="w8a16kv8"):
    return Deployment(load_model("llama-3-70b"), resolve_slice(spec), parse_precision(precision))


def words(axes):
    return [text.get_text() for text in axes.texts]


def test_one_deployment_has_a_line_per_context_with_its_largest_batch_and_the_memory_limit():
    curves = decode_curves(deployment(), [2048, 8192, 32768])
    figure = draw_pareto(curves)
    (axes,) = figure.axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["2k context", "8k context", "32k context"]
    crosses = [line for line in axes.lines if line.get_marker() == "x"]
    assert len(crosses) == 3  # every one of these fills the memory
    for curve, cross in zip(curves, crosses, strict=True):
        assert cross.get_xdata()[0] == pytest.approx(1e3 * curve.sweep.step_s[curve.largest - 1])
        assert cross.get_ydata()[0] == pytest.approx(curve.sweep.tokens_per_s_per_chip[curve.largest - 1])
        assert f"{curve.largest}" in words(axes)


def test_several_deployments_have_a_panel_per_context_and_a_front():
    curves = [c for spec in ("tpu-v5e:2x4", "tpu-v5e:8x8") for c in decode_curves(deployment(spec), [2048, 8192])]
    figure = draw_pareto(curves)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["2k context", "8k context"]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["tpu-v5e:2x4 w8a16kv8", "tpu-v5e:8x8 w8a16kv8", "best of all"]


def test_batch_labels_overlap_neither_each_other_nor_leave_the_axes():
    figure = draw_pareto(decode_curves(deployment(), [2048, 8192, 32768]))
    (axes,) = figure.axes
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in axes.texts if text.get_text().isdigit()]
    assert len(boxes) > 8
    assert not [1 for a, b in itertools.combinations(boxes, 2) if a.overlaps(b)]


def test_nothing_fits_is_drawn_dashed_without_batches():
    figure = draw_pareto(decode_curves(deployment("tpu-v5e:1x1"), [8192]))
    assert not [w for w in words(figure.axes[0]) if w.isdigit()]


@pytest.mark.parametrize("step", [{"decode": 32, "context": 8192}, {"decode": 1, "context": 1}, {"prefill": 2048}])
@pytest.mark.parametrize("spec", ["tpu-v5e:4x4", "h100-sxm:8"])
def test_parts_add_up_to_the_step(spec, step):
    report = step_report(deployment(spec), **step)
    parts = step_parts(report)
    assert list(parts) == list(PARTS)
    assert sum(sum(both) for both in parts.values()) == pytest.approx(report.time_s, rel=1e-12)
    assert min(min(both) for both in parts.values()) >= 0
    assert sum(parts["overheads"]) == pytest.approx(report.bound_s["overhead"])
    assert sum(parts["collectives"]) == pytest.approx(report.bound_s["interconnect"])


def test_ffn_turns_from_loading_to_computing_with_the_batch():
    few, many = (step_parts(step_report(deployment(), decode=b, context=2048))["FFN, experts"] for b in (1, 256))
    assert few[0] > 1000 * few[1] > 0  # the activation function alone has no weights
    assert many[0] == 0 < many[1]


def test_bars_stand_as_high_as_their_steps_and_say_what_does_not_fit():
    reports = [step_report(deployment(), decode=b, context=8192) for b in (1, 32, 256)]
    figure = draw_step_bars([(f"{r.step.B:g}", r) for r in reports], over="batch")
    (axes,) = figure.axes
    for x, report in enumerate(reports):
        bars = [p for p in axes.patches if abs(p.get_x() + p.get_width() / 2 - x) < 0.1]
        assert max(p.get_y() + p.get_height() for p in bars) == pytest.approx(1e3 * report.time_s)
    assert [step_fits(r) for r in reports] == [True, True, False]
    assert words(axes).count("memory full") == 1


def test_same_curves_same_file(tmp_path):
    curves = decode_curves(deployment(), [2048])
    bars = [("32", step_report(deployment(), decode=32, context=2048))]
    for draw in (lambda: draw_pareto(curves), lambda: draw_step_bars(bars, over="batch")):
        files = [tmp_path / f"{i}.svg" for i in (1, 2)]
        for file in files:
            save_figure(draw, file)
        assert files[0].read_bytes() == files[1].read_bytes()


def test_contexts_read_as_people_say_them():
    assert [context_text(c) for c in (1024, 131072, 1000, 2**20)] == ["1k", "128k", "1,000", "1024k"]
    assert batch_ladder(3) == [1, 2, 3]
