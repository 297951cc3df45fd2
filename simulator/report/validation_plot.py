"""Predicted against measured, one panel per metric."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from simulator.report.figures import BLUE, GREEN, GREY, GRID, INK, MUTED, ORANGE, PINK, SKY, YELLOW

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Points = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""Name of a group -> measured and predicted values."""

_COLOURS = (BLUE, ORANGE, GREEN, PINK, SKY, YELLOW, GREY)


def draw_validation(panels: Mapping[str, Points], title: str) -> "Figure":
    """Scatter plots on logarithmic axes, with the diagonal and a band of ±20 %.

    Parameters
    ----------
    panels
        axis title with unit -> groups.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(panels), 4.9), layout="constrained")
    names = sorted({name for points in panels.values() for name in points})
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (what, points) in zip(axes, panels.items(), strict=True):
        values = [v for pair in points.values() for side in pair for v in side if v > 0]
        low, high = min(values) / 1.3, max(values) * 1.3
        axis.fill_between(
            [low, high], [0.8 * low, 0.8 * high], [1.2 * low, 1.2 * high], color=GRID, lw=0, label="±20 %"
        )
        axis.plot([low, high], [low, high], color=MUTED, lw=0.8)
        for i, name in enumerate(names):
            if name in points:
                measured, predicted = points[name]
                colour, marker = _COLOURS[i % len(_COLOURS)], "osD^v"[i // len(_COLOURS) % 5]
                axis.plot(measured, predicted, marker, ms=3.2, color=colour, alpha=0.65, mew=0, label=name)
        axis.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), aspect="equal")
        axis.set_xlabel(f"measured {what}", color=INK)
        axis.set_ylabel(f"predicted {what}", color=INK)
        axis.grid(visible=True, color=GRID, lw=0.5)
    handles = {text: handle for axis in axes for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=3,
        fontsize=7,
        frameon=False,
        markerscale=1.6,
    )
    figure.suptitle(title, color=INK, fontsize=11, x=0.01, ha="left")
    return figure
