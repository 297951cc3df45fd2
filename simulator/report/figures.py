"""What all figures share: formats, colours, and a way to save that gives the same bytes each time."""

from pathlib import Path
from typing import TYPE_CHECKING

from simulator.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")
INK, MUTED, GRID = "#1F2933", "#616E7C", "#E4E7EB"
#: Okabe-Ito: told apart by colour-blind readers too.
BLUE, ORANGE, GREEN, SKY, PINK, YELLOW, GREY = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#56B4E9",
    "#CC79A7",
    "#E69F00",
    "#8A8F98",
)


def tidy(axes: "Axes") -> None:
    """Grid behind the data, no frame at the top and the right."""
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=MUTED)


def compact() -> "tuple[Figure, Axes]":
    """One panel as wide as half a page, with texts that stay readable on a phone."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 3.6), layout="constrained")
    axes = figure.add_subplot()
    tidy(axes)
    return figure, axes


def check_figure_path(path: Path, *, made: Path | None = None, option: str = "--plot") -> None:
    """Refuse a figure path before any work is done for it; ``made`` is a folder that the work will make.

    Raises
    ------
    InputError
        If the suffix is none of ``FORMATS`` or the folder does not exist.
    """
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"{option} {path}: the file name must end in {', '.join(FORMATS)}")
    if not path.parent.is_dir() and (made is None or path.absolute().parent != made.absolute()):
        raise InputError(f"{option} {path}: folder {str(path.parent)!r} does not exist")


def save_figure(draw: "Callable[[], Figure]", path: Path, *, option: str = "--plot") -> None:
    """Draw and save; the suffix chooses the format. The same figure gives the same bytes: no date, a fixed salt.

    Raises
    ------
    InputError
        If the path is refused by :func:`check_figure_path` or cannot be written.
    """
    check_figure_path(path, option=option)
    import matplotlib as mpl

    with mpl.rc_context({"svg.hashsalt": "chipseconds", "svg.fonttype": "none", "font.family": "DejaVu Sans"}):
        figure = draw()
        metadata = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix.lower())
        try:
            figure.savefig(path, dpi=160, metadata=metadata)
        except OSError as error:
            raise InputError(f"{option} {path}: cannot be written: {error.strerror}") from None
