"""A waterfall of one figure, correction by correction."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from simulator.report.figures import BLUE, GREEN, GRID, INK, MUTED, ORANGE
from simulator.report.forms import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_waterfall(bars: Sequence[tuple[str, float]], *, title: str, note: str = "") -> "Figure":
    """Figure of :func:`waterfall_bars` with a title, and a note beneath."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 0.52 * len(bars) + 1.5), layout="constrained")
    axes = figure.add_subplot()
    waterfall_bars(axes, bars)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK)
    if note:
        axes.set_xlabel(note, loc="left", fontsize=9, color=MUTED)
    return figure


def waterfall_bars(axes: "Axes", bars: Sequence[tuple[str, float]]) -> None:
    """Values as horizontal bars from the first to the last; each shows what its correction added or took.

    Parameters
    ----------
    bars
        (label, value after this correction), in order; the first and the last are drawn whole.
    """
    before = 0.0
    widest = max(value for _, value in bars)
    for i, (_, value) in enumerate(bars):
        whole = i in {0, len(bars) - 1}
        low, high = (0.0, value) if whole else sorted((before, value))
        colour = BLUE if whole else (ORANGE if value >= before else GREEN)
        axes.barh(i, max(high - low, 0.002 * widest), left=low, height=0.62, color=colour)
        change = "" if whole else f"  ({'+' if value >= before else '−'}{number(abs(value - before))})"
        axes.annotate(
            f"{number(value)}{change}",
            (max(high, value), i),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=INK,
        )
        if i:
            axes.plot([before, before], [i - 0.69, i - 0.31], color=MUTED, linewidth=0.8)
        before = value
    axes.set_yticks(range(len(bars)), [label for label, _ in bars], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, widest * 1.3)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:,.0f}k" if widest >= 10_000 and x else f"{x:,.0f}")
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
