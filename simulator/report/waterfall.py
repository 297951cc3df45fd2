"""A waterfall of one figure, correction by correction."""

from collections.abc import Sequence
from pathlib import Path

from simulator.errors import InputError

FORMATS = (".png", ".svg", ".pdf")


def check_figure_path(path: Path) -> None:
    """Refuse a figure path before any work is done for it.

    Raises
    ------
    InputError
        If the suffix is none of ``FORMATS`` or the folder does not exist.
    """
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"plot file {str(path)!r}: the suffix must be one of {', '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise InputError(f"plot file {str(path)!r}: folder {str(path.parent)!r} does not exist")


def draw_waterfall(bars: Sequence[tuple[str, float]], path: Path, *, title: str, note: str = "") -> None:
    """Draw values as horizontal bars from the first to the last; each shows what its correction added or took.

    Parameters
    ----------
    bars
        (label, value after this correction), in order.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 0.52 * len(bars) + 1.5), layout="constrained")
    axes = figure.add_subplot()
    ink, up, down, ends = "#24292f", "#d9773f", "#4a9d72", "#3b6ea5"
    before = 0.0
    widest = max(value for _, value in bars)
    for i, (_, value) in enumerate(bars):
        end = i in {0, len(bars) - 1}
        low, high = (0.0, value) if end else sorted((before, value))
        colour = ends if end else (up if value >= before else down)
        axes.barh(i, max(high - low, 0.002 * widest), left=low, height=0.62, color=colour)
        change = "" if end else f"  ({value - before:+,.0f})"
        axes.annotate(
            f"{value:,.0f}{change}",
            (max(high, value), i),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=ink,
        )
        if i:
            axes.plot([before, before], [i - 1 + 0.31, i - 0.31], color="#8c959f", linewidth=0.8)
        before = value
    axes.set_yticks(range(len(bars)), [label for label, _ in bars], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, widest * 1.3)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:,.0f}k" if x else "0")
    axes.grid(axis="x", color="#d0d7de", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", color=ink)
    if note:
        axes.set_xlabel(note, loc="left", fontsize=9, color="#57606a")
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)
