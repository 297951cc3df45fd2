"""Latency against throughput of decode steps, over the batch: one line per context, or per deployment."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from simulator.report.figures import BLUE, GREEN, GRID, INK, MUTED, ORANGE, PINK, SKY, YELLOW
from simulator.roofline.sweep import DecodeCurve, batch_ladder, pareto_front

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from numpy.typing import NDArray

FRONT = "#FCE588"
LINE_COLOURS = (BLUE, ORANGE, GREEN, PINK, SKY, YELLOW, "#44546A", "#B7C4CF")


def context_text(context: int) -> str:
    """A context as people say it.

    >>> context_text(8192), context_text(131072), context_text(5000)
    ('8k', '128k', '5,000')
    """
    return f"{context // 1024}k" if context % 1024 == 0 else f"{context:,}"


def draw_pareto(curves: Sequence[DecodeCurve]) -> "Figure":
    """Figure of latency per token (x) and throughput per chip (y).

    One deployment: one panel, a line per context. Several: a panel per context, a line per deployment, and beneath
    them the front that no deployment beats. Dots are batch sizes; a cross ends a line where the memory is full, and
    dashes go on as if it were not.
    """
    from matplotlib.figure import Figure

    contexts = list(dict.fromkeys(c.context for c in curves))
    names = list(dict.fromkeys(_name(c) for c in curves))
    d = curves[0].deployment
    if len(names) == 1:
        figure = Figure(figsize=(10.5, 6.2), layout="constrained")
        panels = [(figure.add_subplot(), list(curves))]
        title = f"{d.architecture.name} in {d.precision.name} on {d.slice.spec}"
    else:
        columns = min(len(contexts), 3)
        rows = -(-len(contexts) // columns)
        figure = Figure(figsize=(max(9.0, 0.8 + 5.0 * columns), 1.4 + 4.4 * rows), layout="constrained")
        grid = list(figure.subplots(rows, columns, squeeze=False).flat)
        panels = [(axes, [c for c in curves if c.context == k]) for axes, k in zip(grid, contexts, strict=False)]
        for spare in grid[len(contexts) :]:
            spare.remove()
        title = d.architecture.name
    for i, (axes, drawn) in enumerate(panels):
        _frame(axes, drawn, first=i % 3 == 0)
        if len(names) > 1:
            _front(axes, drawn)
            axes.set_title(f"{context_text(drawn[0].context)} context", loc="left", fontsize=11, color=INK)
        else:
            _floor(axes, drawn)
        keys = [(contexts.index(c.context) if len(names) == 1 else names.index(_name(c))) for c in drawn]
        colours = [LINE_COLOURS[key % len(LINE_COLOURS)] for key in keys]
        for curve, colour in zip(drawn, colours, strict=True):
            _line(axes, curve, colour)
        _labels(axes, drawn, colours)
    handles = _legend(contexts, names)
    if len(names) == 1:
        panels[0][0].legend(handles=handles, loc="lower right", fontsize=9.5, framealpha=0.9, edgecolor="none")
    else:
        figure.legend(handles=handles, loc="outside upper right", ncols=4, fontsize=9.5, frameon=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=15, fontweight="bold", color=INK)
    figure.supxlabel(
        "decode only, every sequence at the context; dots: batch size; × memory full, dashed: as if it were not",
        x=0.01,
        ha="left",
        fontsize=9,
        color=MUTED,
    )
    return figure


def _name(curve: DecodeCurve) -> str:
    return f"{curve.deployment.slice.spec} {curve.deployment.precision.name}"


def _legend(contexts: Sequence[int], names: Sequence[str]) -> "list[Line2D]":
    from matplotlib.lines import Line2D

    labels = [f"{context_text(c)} context" for c in contexts] if len(names) == 1 else names
    lines = [
        Line2D([], [], color=LINE_COLOURS[i % len(LINE_COLOURS)], linewidth=2.4, label=label)
        for i, label in enumerate(labels)
    ]
    if len(names) > 1:
        lines.append(Line2D([], [], color=FRONT, linewidth=8, label="best of all"))
    return lines


def _frame(axes: "Axes", curves: Sequence[DecodeCurve], *, first: bool) -> None:
    """Axes from the floor to a little beyond the longest line that fits."""
    shown = [_shown(c) for c in curves]
    latest = max(1e3 * float(c.sweep.step_s[n - 1]) for c, n in zip(curves, shown, strict=True))
    most = max(float(c.sweep.tokens_per_s_per_chip[:n].max()) for c, n in zip(curves, shown, strict=True))
    axes.set(xlim=(0, latest * 1.06), ylim=(0, most * 1.12))
    axes.set_xlabel("latency per token  [ms]", fontsize=11, color=INK)
    if first:
        axes.set_ylabel("throughput per chip  [tokens/s]", fontsize=11, color=INK)
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}")
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9AA5B1")
    axes.tick_params(length=0, labelsize=10, labelcolor=MUTED)


def _shown(curve: DecodeCurve) -> int:
    """Batches drawn: those that fit, and a quarter more."""
    return min(len(curve.sweep.batch), max(1, curve.largest + curve.largest // 4 + 1))


def _front(axes: "Axes", curves: Sequence[DecodeCurve]) -> None:
    """What no deployment beats, as a broad pale line."""
    x = np.concatenate([c.sweep.step_s[: c.largest] for c in curves]) * 1e3
    y = np.concatenate([c.sweep.tokens_per_s_per_chip[: c.largest] for c in curves])
    kept = pareto_front(x, y)
    order = np.argsort(x[kept], kind="stable")
    axes.plot(x[kept][order], y[kept][order], color=FRONT, linewidth=10, solid_capstyle="round", zorder=1)


def _floor(axes: "Axes", curves: Sequence[DecodeCurve]) -> None:
    """Where the fastest token is: one sequence at the shortest context."""
    floor = 1e3 * min(float(c.sweep.step_s[0]) for c in curves)
    axes.axvline(floor, color=MUTED, linewidth=1, linestyle=":", zorder=1)
    axes.annotate(
        f"one sequence\n{floor:.3g} ms",
        (floor, 0.97),
        xycoords=("data", "axes fraction"),
        xytext=(-6, 0),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=9,
        color=MUTED,
    )


def _line(axes: "Axes", curve: DecodeCurve, colour: str) -> None:
    x, y = curve.sweep.step_s * 1e3, curve.sweep.tokens_per_s_per_chip
    n, shown = curve.largest, _shown(curve)
    if n:
        axes.plot(x[:n], y[:n], color=colour, linewidth=2.4, zorder=3)
    if n < shown:
        beyond = slice(max(n - 1, 0), shown)
        axes.plot(x[beyond], y[beyond], color=colour, linewidth=1.3, linestyle=(0, (3, 2)), zorder=2)
        axes.plot(x[beyond][0], y[beyond][0], "x", color=colour, markersize=10, markeredgewidth=2.6, zorder=5)
    dots = [b - 1 for b in batch_ladder(n) if b < n or n == shown] if n else []
    axes.plot(
        x[dots], y[dots], "o", color="white", markeredgecolor=colour, markeredgewidth=1.6, markersize=5.5, zorder=4
    )


def _labels(axes: "Axes", curves: Sequence[DecodeCurve], colours: Sequence[str]) -> None:
    """Batch sizes beside the dots, ends of the lines first, as far as there is room."""
    points = [
        (batch, float(c.sweep.step_s[batch - 1]) * 1e3, float(c.sweep.tokens_per_s_per_chip[batch - 1]), colour, end)
        for c, colour in zip(curves, colours, strict=True)
        if c.largest
        for batch in batch_ladder(c.largest)
        for end in [0 if batch == c.largest else 1 if batch == 1 else 2]
    ]
    scale = 72 / axes.figure.dpi
    floor = float(axes.transAxes.transform((0, 0))[1]) * scale
    paths = [_path(axes, c) * scale for c in curves]
    dots = np.array([axes.transData.transform(p[1:3]) for p in points]) * scale
    taken: list[tuple[float, float, float, float]] = []
    for batch, x, y, colour, _ in sorted(points, key=lambda p: (p[4], -p[0])):
        at = axes.transData.transform((x, y)) * scale
        width, height = 5.9 * len(str(batch)) + 2, 10.0
        for dx, dy in ((7, -13), (-7 - width, 4), (8, -5), (-8 - width, -5), (-width / 2, 6)):
            box = (at[0] + dx, at[1] + dy, at[0] + dx + width, at[1] + dy + height)
            clash = any(box[0] < b[2] and box[2] > b[0] and box[1] < b[3] and box[3] > b[1] for b in taken)
            covers = any(_inside(p, box, 0) for p in paths) or _inside(dots, box, 2.5)
            if not covers and not clash and box[1] > floor:
                break
        else:
            continue
        taken.append(box)
        axes.annotate(
            f"{batch}", (x, y), xytext=(dx + 1, dy + 1), textcoords="offset points", fontsize=9, color=colour, zorder=6
        )


def _inside(points: "NDArray[np.float64]", box: tuple[float, float, float, float], margin: float) -> bool:
    x, y = points[:, 0], points[:, 1]
    inside = (x > box[0] - margin) & (x < box[2] + margin) & (y > box[1] - margin) & (y < box[3] + margin)
    return bool(inside.any())


def _path(axes: "Axes", curve: DecodeCurve) -> "NDArray[np.float64]":
    """Points close together along a drawn line, in display coordinates."""
    n = _shown(curve)
    ends = axes.transData.transform(
        np.column_stack([curve.sweep.step_s[:n] * 1e3, curve.sweep.tokens_per_s_per_chip[:n]])
    )
    index = np.arange(n)
    fine = np.linspace(0, n - 1, 40 * n)
    return np.column_stack([np.interp(fine, index, ends[:, 0]), np.interp(fine, index, ends[:, 1])])
