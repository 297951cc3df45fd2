"""A page: headline figures, then sections of text, tables, bars and pictures. Rendering, no content."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from tempfile import NamedTemporaryFile

from markupsafe import Markup

from simulator.errors import InputError


@dataclass(frozen=True)
class Card:
    """A headline figure: what, how much, and what stands beneath it (intervals, parts). ``tone``: good, bad or plain."""

    label: str
    value: str
    notes: tuple[str, ...] = ()
    tone: str = "plain"


@dataclass(frozen=True)
class Prose:
    """Paragraphs."""

    paragraphs: tuple[str, ...]
    kind: str = "prose"


@dataclass(frozen=True)
class Grid:
    """A table; the first ``left`` columns are text, the others figures. ``marked`` rows stand out."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    left: int = 1
    marked: frozenset[int] = frozenset()
    kind: str = "grid"

    @property
    def narrow(self) -> bool:
        """Whether it fits half a page, so that two stand beside each other; texts of the first column may break."""
        widths = [max(map(len, cells)) for cells in zip(self.columns, *self.rows, strict=True)]
        return self.left == 1 and min(widths[0], 24) + sum(widths[1:]) + 2 * len(widths) <= 62


@dataclass(frozen=True)
class Bar:
    """One bar of a list: it spans [start, stop] of the widest, 0 … 1, in one of the page's colours."""

    label: str
    text: str
    start: float
    stop: float
    colour: str = "blue"


@dataclass(frozen=True)
class Bars:
    """Bars beneath each other: shares, or a waterfall. ``limit`` draws a line across them there, 0 … 1."""

    bars: tuple[Bar, ...]
    caption: str = ""
    limit: float | None = None
    kind: str = "bars"


@dataclass(frozen=True)
class Picture:
    """An SVG and what it shows. ``wide`` pictures have a row of their own."""

    svg: Markup
    caption: str
    wide: bool = False
    kind: str = "picture"


@dataclass(frozen=True)
class Cards:
    """Headline figures beside each other."""

    cards: tuple[Card, ...]
    kind: str = "cards"


Block = Prose | Grid | Bars | Picture | Cards


@dataclass(frozen=True)
class Section:
    """A heading and its blocks. A ``part`` opens what would otherwise be a page of its own."""

    key: str
    title: str
    blocks: tuple[Block, ...]
    status: str = ""
    tone: str = "plain"
    part: bool = False


@dataclass(frozen=True)
class Page:
    """Everything a page shows."""

    title: str
    lead: tuple[str, ...]
    cards: tuple[Card, ...]
    sections: tuple[Section, ...]
    status: str = ""
    tone: str = "plain"
    """good, bad or plain: the colour of the status."""
    footer: tuple[str, ...] = ()


def waterfall(steps: Sequence[tuple[str, float, str]]) -> tuple[Bar, ...]:
    """Bars from the first value to the last: whole at both ends, between them what each step added or took.

    >>> [(bar.label, round(bar.start, 2), round(bar.stop, 2)) for bar in waterfall([("a", 1, ""), ("b", 3, ""), ("c", 4, "")])]
    [('a', 0.0, 0.25), ('b', 0.25, 0.75), ('c', 0.0, 1.0)]
    """
    widest = max(value for _, value, _ in steps)
    bars = []
    before = 0.0
    for i, (label, value, text) in enumerate(steps):
        whole = i in {0, len(steps) - 1}
        low, high = (0.0, value) if whole else sorted((before, value))
        colour = "blue" if whole else "orange" if value >= before else "green"
        bars.append(Bar(label, text, low / widest, high / widest, colour))
        before = value
    return tuple(bars)


def page_html(page: Page) -> str:
    """The page as one HTML document."""
    from jinja2 import Environment, StrictUndefined

    source = (files("simulator.report.html") / "page.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["groupruns"] = _runs
    return environment.from_string(source).render(page=page)


def _runs(blocks: Sequence[Block]) -> list[tuple[str, list[Block]]]:
    """Neighbours of one kind together: pictures share a row."""
    return [(kind, list(run)) for kind, run in groupby(blocks, key=lambda block: block.kind)]


def write_page(page: Page, path: Path, *, option: str = "--out") -> None:
    """Write the page to ``path``, whole or not at all.

    Raises
    ------
    InputError
        If the path is refused by :func:`check_page_path` or cannot be written.
    """
    check_page_path(path, option=option)
    text = page_html(page)
    try:
        with NamedTemporaryFile("w", encoding="utf-8", newline="\n", dir=path.parent, delete=False) as file:
            file.write(text)
        Path(file.name).chmod(0o644)
        os.replace(file.name, path)  # noqa: PTH105 - Path.replace would do the same
    except OSError as error:
        raise InputError(f"{option} {path}: cannot be written: {error.strerror}") from None


def check_page_path(path: Path, *, option: str = "--out") -> None:
    """Refuse a path before the work for it is done.

    Raises
    ------
    InputError
        If the file name does not end in .html, or the folder does not exist.
    """
    if path.suffix.lower() not in {".html", ".htm"}:
        raise InputError(f"{option} {path}: the file name must end in .html")
    if not path.parent.is_dir():
        raise InputError(f"{option} {path}: folder {str(path.parent)!r} does not exist")
    if path.is_dir():
        raise InputError(f"{option} {path}: is a folder")
