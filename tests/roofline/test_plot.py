"""The roofline plot: what it shows, and that it is the same file every time."""

import pytest

from simulator.catalog.chips import IDEAL
from simulator.catalog.models import load_model
from simulator.catalog.slices import resolve_slice
from simulator.errors import InputError
from simulator.report.roofline_plot import draw_roofline, save_roofline_plot
from simulator.roofline.analysis import step_report
from simulator.roofline.deployment import Deployment
from simulator.roofline.precision import parse_precision


def reported(spec="tpu-v5e:4x4", precision="w8a16kv8", efficiency=None, **step):
    d = Deployment(load_model("llama-3-70b"), resolve_slice(spec), parse_precision(precision), efficiency=efficiency)
    return step_report(d, **(step or {"decode": 32, "context": 8192}))


def texts(figure):
    return "\n".join(t.get_text() for axes in figure.axes for t in axes.texts) + "\n".join(
        t.get_text() for t in figure.texts
    )


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"precision": "int8kv8"},
        {"spec": "h100-sxm:8", "precision": "fp8kv8", "prefill": 4096, "context": 32768},
        {"spec": "h100-sxm:8", "efficiency": IDEAL, "prefill": 2048},
        {"spec": "tpu-v5e:8x8", "decode": 1, "context": 1},
    ],
)
def test_every_computing_op_of_weight_is_named_under_the_roofs(arguments):
    report = reported(**arguments)
    figure = draw_roofline(report)
    axes, words = figure.axes[0], texts(figure)
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    for row in report.ops:
        if row.op.flops and row.share >= 0.005:
            assert f"{row.op.name}  {row.share:.0%}" in words
            assert left < row.intensity_flops_per_byte < right
            assert bottom < row.flops_per_s < top
            bandwidth = report.deployment.slice.chip.hbm_bandwidth_bytes_per_s
            assert row.flops_per_s <= row.intensity_flops_per_byte * bandwidth * (1 + 1e-9)
    assert "the step" in words
    assert "llama-3-70b" in words
    for dtype in {row.dtype for row in report.ops if row.dtype}:
        assert f"{dtype}  " in words


def test_labels_do_not_overlap():
    for report in (reported(), reported("h100-sxm:8", "fp8kv8", prefill=4096, context=32768)):
        figure = draw_roofline(report)
        boxes = [t.get_window_extent() for t in figure.axes[0].texts if t.get_text() and "HBM" not in t.get_text()]
        clashes = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
        assert not clashes


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_same_report_same_file(tmp_path, suffix):
    files = [tmp_path / f"{i}{suffix}" for i in (1, 2)]
    for file in files:
        save_roofline_plot(reported(), file)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert len(files[0].read_bytes()) > 10_000


def test_bad_paths_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"must end in \.png, \.svg, \.pdf"):
        save_roofline_plot(reported(), tmp_path / "plot.docx")
    with pytest.raises(InputError, match="does not exist"):
        save_roofline_plot(reported(), tmp_path / "missing" / "plot.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        save_roofline_plot(reported(), tmp_path / "folder.png")
