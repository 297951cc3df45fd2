"""What a page's figures rest on: warnings, and every input with its grade and source."""

from collections.abc import Sequence

from simulator.report.html.page import Block, Grid, Prose
from simulator.report.tables import by_grade
from simulator.results.summary import Assumption


def input_blocks(warnings: Sequence[str], assumptions: Sequence[Assumption]) -> tuple[Block, ...]:
    """Warnings, then a table of inputs, weakest first; either may be missing."""
    blocks: list[Block] = []
    if warnings:
        blocks.append(Prose(tuple(f"Warning: {warning}" for warning in warnings)))
    rows = tuple((a.what, a.kind, a.value, a.source) for a in by_grade(assumptions))
    if rows:
        caption = "every input behind these figures, weakest first"
        blocks.append(Grid(("input", "kind", "value", "source"), rows, caption=caption, left=4))
    return tuple(blocks)
