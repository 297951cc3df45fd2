"""Figures as SVG inside a page, in the page's own colours, so that they follow light and dark.

Figures are drawn with the colours of :mod:`simulator.report.figures`; each of these becomes a CSS variable of the page.
"""

import io
import re
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from simulator.report import figures

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.figure import Figure

#: Colour of a figure → variable of the page's style sheet.
VARIABLES = {
    figures.INK: "ink",
    figures.MUTED: "muted",
    figures.GRID: "line",
    figures.BLUE: "blue",
    figures.ORANGE: "orange",
    figures.GREEN: "green",
    figures.SKY: "sky",
    figures.PINK: "pink",
    figures.YELLOW: "yellow",
    figures.GREY: "grey",
    "#FFFFFF": "card",
    "#000000": "ink",
    "#9AA5B1": "muted",
    "#CCCCCC": "line",
    "#F5F7FA": "tint",  # under the roofs
}
_COLOUR = re.compile(r"#[0-9a-fA-F]{6}\b(?![\"')])|#[0-9a-fA-F]{6}(?=[\";])")
_BY_HEX = {colour.lower(): f"var(--{name})" for colour, name in VARIABLES.items()}


def inline_svg(draw: "Callable[[], Figure]", *, label: str, key: str, least_width_px: int = 0) -> Markup:
    """Draw a figure as one ``<svg>`` element.

    Parameters
    ----------
    label
        what a screen reader says for it.
    key
        prefix of the element's ids: unique in the page, or two figures would share clip paths.
    least_width_px
        narrower windows scroll the figure sideways instead of shrinking it further.
    """
    import matplotlib as mpl

    out = io.StringIO()
    settings: dict[Any, Any] = {
        "svg.hashsalt": key,
        "svg.fonttype": "none",
        "font.family": "DejaVu Sans",
        "text.color": figures.INK,
        "axes.labelcolor": figures.MUTED,
        "axes.edgecolor": figures.MUTED,
        "legend.labelcolor": figures.INK,
    }
    with mpl.rc_context(settings):
        figure = draw()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        width, height = (72 * inch for inch in figure.get_size_inches())
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    body = svg[svg.index(">") + 1 : svg.rindex("</svg>")]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'\b(id="|url\(#|xlink:href="#)', rf"\g<1>{key}-", body).replace("xlink:href", "href")
    body = _COLOUR.sub(lambda found: _BY_HEX.get(found[0].lower(), found[0]), body)
    body = re.sub(r"font(-family)?: ?([^;\"]*)'?DejaVu Sans'?[^;\"]*", _font, body)
    style = f' style="min-width:{least_width_px}px"' if least_width_px else ""
    return Markup(  # noqa: S704 - matplotlib escapes the texts of a figure
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}"{style}>{body}</svg>'
    )


def _font(found: re.Match[str]) -> str:
    """The page's font instead of the one the figure was measured with."""
    return f"font: {found[2]}var(--sans)" if found[1] is None else "font-family: var(--sans)"
