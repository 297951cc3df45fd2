"""The roofline plot of one step: its ops under the chip's roofs, and where its time goes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from simulator.report.figures import BLUE, GREEN, GREY, GRID, INK, MUTED, ORANGE, save_figure
from simulator.roofline.analysis import BOUNDS, Bound, OpReport, StepReport
from simulator.units import format_si

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

COLOURS: dict[Bound, str] = {"compute": ORANGE, "HBM": BLUE, "interconnect": GREEN, "overhead": GREY}
CLUSTER_PT = 20.0
"""Points nearer than this share one label. [typographic points]"""
SMALLEST_SHARE = 0.005
"""Ops below this share of the step are left to the bar; they would only stretch the axes."""


@dataclass(frozen=True)
class _Mark:
    row: OpReport
    x: float
    y: float


def save_roofline_plot(report: StepReport, path: Path) -> None:
    """Draw ``report`` into ``path``; the suffix chooses the format.

    Raises
    ------
    InputError
        If the path is refused or cannot be written.
    """
    save_figure(lambda: draw_roofline(report), path)


def draw_roofline(report: StepReport) -> "Figure":
    """Figure with the roofs, one point per op that computes, a star for the step, and a bar of the step's time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 6.6), facecolor="white")
    axes = figure.add_axes((0.085, 0.265, 0.885, 0.585))
    bar = figure.add_axes((0.085, 0.085, 0.885, 0.055))
    _titles(figure, report)
    marks = [
        _Mark(row, row.intensity_flops_per_byte, row.flops_per_s)
        for row in report.ops
        if row.op.flops and row.share >= SMALLEST_SHARE and np.isfinite(row.intensity_flops_per_byte)
    ]
    star = (report.intensity_flops_per_byte, report.model_flops / report.deployment.chips / report.time_s)
    _frame(axes, report, marks, star)
    _roofs(axes, report)
    for mark in sorted(marks, key=lambda m: -m.row.share):
        axes.scatter(
            mark.x,
            mark.y,
            s=4 * _radius_pt(mark) ** 2,
            color=COLOURS[mark.row.bound],
            alpha=0.82,
            edgecolor="white",
            linewidth=1.2,
            zorder=4,
        )
    axes.scatter(*star, s=330, marker="*", color="#F0B429", edgecolor=INK, linewidth=1.0, zorder=6)
    _labels(axes, marks, star)
    _time_bar(bar, report)
    return figure


def _titles(figure: "Figure", report: StepReport) -> None:
    d, step = report.deployment, report.step
    what = (
        f"decode step, {step.B:g} sequences at context {step.S / step.B:,.0f}"
        if step.B and not step.P
        else f"prefill of {step.n:,.0f} tokens, context {step.K:,.0f}"
        if step.P == 1 and not step.B
        else f"mixed step of {step.n:,.0f} tokens"
    )
    figure.text(
        0.085,
        0.945,
        f"{d.architecture.name} in {d.precision.name} on {d.slice.spec}",
        fontsize=17,
        color=INK,
        weight="bold",
    )
    figure.text(
        0.085,
        0.898,
        f"{what}:  {format_si(report.time_s, 's')}  ·  {report.tokens_per_s:,.0f} tokens/s  ·  "
        f"MFU {report.mfu:.0%}  ·  MBU {report.mbu:.0%}  ·  bound by {report.bound}",
        fontsize=11,
        color=MUTED,
    )


def _frame(axes: "Axes", report: StepReport, marks: Sequence[_Mark], star: tuple[float, float]) -> None:
    """Limits that hold the ridge and every point, log axes with SI labels, light grid."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter  # with matplotlib

    chip = report.deployment.slice.chip
    peaks = [chip.peak_flops_per_s(t) for t in _dtypes(report)]
    ridge = max(peaks) / chip.hbm_bandwidth_bytes_per_s
    xs = [m.x for m in marks] + [star[0], ridge]
    ys = [m.y for m in marks] + [star[1]]
    left, right = min(xs) / 4, max(max(xs) * 6, ridge * 12)
    bottom = min(min(ys) / 8, left * chip.hbm_bandwidth_bytes_per_s * 2)
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(bottom, max(peaks) * 2.4))
    axes.set_xlabel("arithmetic intensity  [FLOP per byte of HBM traffic]", fontsize=11, color=INK)
    axes.set_ylabel("achieved per chip  [FLOP/s]", fontsize=11, color=INK)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: format_si(v, "").strip()))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda v, _: f"{v:g}" if v < 1e3 else format_si(v, "").replace(" ", ""))
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(numticks=12))
        axis.set_minor_formatter(NullFormatter())
    axes.grid(which="major", color=GRID, linewidth=0.9)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0, labelsize=10, labelcolor=MUTED)
    for side, spine in axes.spines.items():
        spine.set_visible(side in {"left", "bottom"})
        spine.set_color("#9AA5B1")


def _roofs(axes: "Axes", report: StepReport) -> None:
    """HBM roof and one compute roof per format in use: datasheet solid, the deployment's efficiency dashed."""
    chip, e = report.deployment.slice.chip, report.deployment.eff
    bandwidth = chip.hbm_bandwidth_bytes_per_s
    (left, right), (bottom, _) = axes.get_xlim(), axes.get_ylim()
    peaks = {t: chip.peak_flops_per_s(t) for t in _dtypes(report)}
    for solid, hbm, matmul in ((True, 1.0, 1.0), (False, e.hbm, e.matmul)):
        if not solid and hbm == matmul == 1:
            continue
        top = max(peaks.values()) * matmul
        roofs = [([left, top / (bandwidth * hbm)], [left * bandwidth * hbm, top])]
        roofs += [([p * matmul / (bandwidth * hbm), right], [p * matmul, p * matmul]) for p in peaks.values()]
        for xs, ys in roofs:
            if solid:
                axes.plot(xs, ys, color=INK, lw=1.9, zorder=2)
            else:
                axes.plot(xs, ys, color=MUTED, lw=1.0, ls=(0, (5, 3)), zorder=2)
    top = max(peaks.values())
    axes.fill_between(
        [left, top / bandwidth, right], [left * bandwidth, top, top], bottom, color="#F5F7FA", zorder=0, linewidth=0
    )
    for dtype, peak in peaks.items():
        text = f"{dtype}  {format_si(peak, 'FLOP/s')}"
        axes.annotate(text, (right, peak), (-3, 4), textcoords="offset points", ha="right", fontsize=10, color=INK)
    angle = _slope_degrees(axes)
    axes.annotate(
        f"HBM  {format_si(bandwidth, 'B/s')}",
        (left * 1.3, left * 1.3 * bandwidth),
        (-5 * np.sin(np.radians(angle)), 6 * np.cos(np.radians(angle))),
        textcoords="offset points",
        rotation=angle,
        rotation_mode="anchor",
        fontsize=10,
        color=INK,
    )
    axes.annotate(
        f"{top / bandwidth:,.0f} FLOP/byte",
        (top / bandwidth, top),
        (0, 5),
        textcoords="offset points",
        ha="center",
        fontsize=9,
        color=MUTED,
    )
    if min(e.hbm, e.matmul) < 1:
        text = f"dashed: reached in practice ({e.hbm:.0%} of HBM, {e.matmul:.0%} of peak)"
        axes.annotate(text, (0.995, 0.02), xycoords="axes fraction", ha="right", fontsize=9, color=MUTED)


def _slope_degrees(axes: "Axes") -> float:
    """Angle on paper of a line of slope one on log-log axes."""
    (x0, y0), (x1, y1) = axes.transData.transform([(1.0, 1.0), (10.0, 10.0)])
    return float(np.degrees(np.arctan2(y1 - y0, x1 - x0)))


def _radius_pt(mark: _Mark) -> float:
    """Radius of a point; its area grows with the op's share of the step. [typographic points]"""
    return float(np.sqrt(10 + 350 * mark.row.share))


def _labels(axes: "Axes", marks: Sequence[_Mark], star: tuple[float, float]) -> None:
    """One label per cluster of points, each at the place near it that covers least."""
    dpi = axes.figure.dpi
    paper = {id(m): axes.transData.transform((m.x, m.y)) * 72 / dpi for m in marks}
    clusters: list[list[_Mark]] = []
    for mark in sorted(marks, key=lambda m: -m.row.share):
        near = [c for c in clusters if min(np.hypot(*(paper[id(mark)] - paper[id(m)])) for m in c) < CLUSTER_PT]
        if near:
            near[0].append(mark)
        else:
            clusters.append([mark])
    star_pt = axes.transData.transform(star) * 72 / dpi
    items = [
        (
            "\n".join(f"{m.row.op.name}  {m.row.share:.0%}" for m in c),
            paper[id(c[0])],
            _radius_pt(c[0]),
            (c[0].x, c[0].y),
        )
        for c in clusters
    ]
    items.insert(0, ("the step", star_pt, 9.0, star))
    points = [(*paper[id(m)], _radius_pt(m)) for m in marks] + [(*star_pt, 9.0)]
    lines_pt = _roof_points(axes) * 72 / dpi
    leaders = np.empty((0, 2))
    corners = (
        axes.transData.transform([(a, b) for a, b in zip(axes.get_xlim(), axes.get_ylim(), strict=True)]) * 72 / dpi
    )
    extents = [text.get_window_extent() for text in axes.texts]
    placed: list[_Box] = [(e.x0 * 72 / dpi, e.y0 * 72 / dpi, e.x1 * 72 / dpi, e.y1 * 72 / dpi) for e in extents]
    for text, at, radius, xy in items:
        lines = text.split("\n")
        width, height = 5.5 * max(map(len, lines)), 13.0 * len(lines)
        box = min(
            _candidates(at, radius, width, height),
            key=lambda b: _cost(b, at, points, lines_pt, leaders, placed, corners),
        )
        placed.append(box)
        inside = np.clip(at, box[:2], box[2:])
        far = float(np.hypot(*(inside - at))) > radius + 12
        axes.annotate(
            text,
            xy,
            (box[0] - at[0], box[3] - at[1]),
            textcoords="offset points",
            va="top",
            ha="left",
            fontsize=9.5,
            linespacing=1.25,
            color=INK,
            weight="bold" if text == "the step" else "normal",
            zorder=7,
        )
        if far:
            leaders = np.concatenate([leaders, _leader(at, inside)])
            axes.annotate(
                "",
                xy,
                (inside[0] - at[0], inside[1] - at[1]),
                textcoords="offset points",
                zorder=3,
                arrowprops={"arrowstyle": "-", "color": "#9AA5B1", "lw": 0.8, "shrinkA": 1, "shrinkB": radius},
            )


_Box = tuple[float, float, float, float]
"""Left, bottom, right, top. [typographic points]"""


def _candidates(at: "Array", radius: float, width: float, height: float) -> list[_Box]:
    """Places for a label: to either side, above and below, at growing distance."""
    boxes = []
    for away in (4.0, 14.0, 26.0, 40.0, 56.0, 74.0, 94.0, 116.0):
        r = radius + away
        for dx, dy in (
            (r, -height / 2),
            (r * 0.8, -r * 0.6 - height),
            (-width / 2, -r - height),
            (-r - width, -height / 2),
            (-r * 0.8 - width, -r * 0.6 - height),
            (r * 0.8, r * 0.6),
            (-width / 2, r),
            (-r * 0.8 - width, r * 0.6),
        ):
            boxes.append((at[0] + dx, at[1] + dy, at[0] + dx + width, at[1] + dy + height))
    return boxes


def _cost(
    box: _Box,
    at: "Array",
    points: Sequence[tuple[float, float, float]],
    roofs: "Array",
    leaders: "Array",
    placed: Sequence[_Box],
    corners: "Array",
) -> float:
    """How bad a place is: off the axes, on labels, on points, on roofs; then how far."""
    (left, bottom), (right, top) = corners
    x0, y0, x1, y1 = box
    cost = 1e6 * float(x0 < left + 4 or x1 > right - 2 or y0 < bottom + 2 or y1 > top)
    cost += sum(1e4 for b in placed if x0 < b[2] + 3 and x1 > b[0] - 3 and y0 < b[3] + 2 and y1 > b[1] - 2)
    cost += sum(3e3 for x, y, r in points if np.hypot(x - np.clip(x, x0, x1), y - np.clip(y, y0, y1)) < r)
    leader = _leader(at, np.array([np.clip(at[0], x0, x1), np.clip(at[1], y0, y1)]))
    cost += 2e3 * (sum(bool(_within(leader, b).any()) for b in placed) + bool(_within(leaders, box).any()))
    on_roof = _within(roofs, (x0 - 2, y0 - 1, x1 + 2, y1 + 1))
    cost += 300 * bool(on_roof.any()) + 10 * float(on_roof.sum())
    return cost + float(np.hypot(at[0] - np.clip(at[0], x0, x1), at[1] - np.clip(at[1], y0, y1)))


def _leader(at: "Array", to: "Array") -> "Array":
    """Points along the line from a point to its label."""
    return at + np.linspace(0, 1, 20)[:, None] * (to - at)


def _within(points: "Array", box: _Box) -> "NDArray[np.bool_]":
    """Which points lie in a box."""
    x, y = points[:, 0], points[:, 1]
    return (x > box[0]) & (x < box[2]) & (y > box[1]) & (y < box[3])


def _roof_points(axes: "Axes") -> "Array":
    """Points along every drawn roof and its name, in display coordinates."""
    found = []
    for line in axes.get_lines():
        ends = axes.transData.transform(np.column_stack([line.get_xdata(), line.get_ydata()]))
        found.append(ends[0] + np.linspace(0, 1, 200)[:, None] * (ends[-1] - ends[0]))
    return np.concatenate(found)


def _time_bar(axes: "Axes", report: StepReport) -> None:
    """The step's time, op by op, coloured by what bounds each."""
    start = 0.0
    for row in sorted(report.ops, key=lambda r: (BOUNDS.index(r.bound), -r.share)):
        axes.barh(
            0, row.share, left=start, height=1, color=COLOURS[row.bound], alpha=0.82, edgecolor="white", linewidth=1.2
        )
        if row.share > 0.0086 * len(row.op.name):
            axes.text(
                start + row.share / 2, 0, row.op.name, ha="center", va="center_baseline", fontsize=8.5, color="white"
            )
        start += row.share
    axes.set(xlim=(0, 1), ylim=(-0.5, 0.5), yticks=[], xticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.text(0, 0.66, "where the time goes", fontsize=10, color=INK)
    axes.text(
        0,
        -0.95,
        "points: area by share of the step's time; ops without FLOPs are in the bar only",
        fontsize=8.5,
        color=MUTED,
    )
    shown = [b for b in BOUNDS if report.bound_s[b] / report.time_s >= SMALLEST_SHARE]
    for i, bound in enumerate(shown):
        share = report.bound_s[bound] / report.time_s
        x = 1 - 0.165 * (len(shown) - 1 - i)
        axes.text(x, 0.66, f"■ {bound} {share:.0%}", fontsize=10, color=COLOURS[bound], ha="right")


def _dtypes(report: StepReport) -> list[str]:
    """Formats the step computes in, fastest last."""
    used = {row.dtype for row in report.ops if row.dtype and row.op.flops}
    return sorted(used, key=lambda t: (report.deployment.slice.chip.peak_flops_per_s(t), t))
