"""One page of several: a part each, beginning with what its own page would show first."""

import re
from collections.abc import Sequence
from dataclasses import replace

from markupsafe import Markup

from simulator.report.html.page import Block, Cards, Page, Picture, Prose, Section


def joined_pages(pages: Sequence[Page]) -> Page:
    """A page with a part for each of ``pages``, at least two."""
    sections = []
    for i, page in enumerate(pages, start=1):
        first = Section(
            "part", page.title, (Prose(page.lead), Cards(page.cards)), status=page.status, tone=page.tone, part=True
        )
        sections += [_moved(section, f"p{i}-") for section in (first, *page.sections)]
    footers = (line for page in pages for line in page.footer)
    return Page(
        title=f"Report of {len(pages)} results",
        lead=(),
        cards=(),
        sections=tuple(sections),
        footer=tuple(dict.fromkeys(footers)),
    )


def _moved(section: Section, prefix: str) -> Section:
    """A section whose ids, and those of its pictures, begin with ``prefix``, so that parts do not share any."""
    return replace(section, key=prefix + section.key, blocks=tuple(_picture(block, prefix) for block in section.blocks))


def _picture(block: Block, prefix: str) -> Block:
    if not isinstance(block, Picture):
        return block
    svg = re.sub(r'\b(id="|url\(#|href="#)', rf"\g<1>{prefix}", str(block.svg))
    return replace(block, svg=Markup(svg))  # noqa: S704 - it was markup before
