"""Reproduced tables as text: Markdown to read, CSV to compute with, and an index of both."""

import csv
import io
from collections.abc import Mapping, Sequence

from simulator.reproduction.rows import Row, tally
from simulator.reproduction.tables import TABLES

CSV_COLUMNS = (
    "id", "section", "quantity", "unit", "kind", "printed", "expected", "ours", "difference", "verdict", "source", "note",
)  # fmt: skip


def figure(row: Row) -> str:
    """Our value: whole numbers in full, formulas to ten digits, estimates to five (they follow the platform's sums)."""
    if row.ours is None:
        return ""
    if row.kind in {"exact", "tolerance"}:
        return f"{row.ours:.0f}" if row.ours == round(row.ours) and abs(row.ours) < 1e15 else f"{row.ours:.10g}"
    return f"{row.ours:.5g}"


def verdict(row: Row) -> str:
    """What is said of a row, with the figure that matters for its kind."""
    match row.verdict:
        case "held" if row.kind == "bound":
            return f"holds, {1 + row.difference:.2f}×"
        case "held":
            return "holds"
        case "missed":
            return f"MISSED, {row.difference:+.1%}"
        case "reported":
            return f"{row.difference:+.1%}"
        case other:
            return other


def tally_cells(rows: Sequence[Row]) -> tuple[str, ...]:
    """Rows, held, missed, reported, not priced, and the median error of the reported ones."""
    t = tally(rows)
    error = "–" if t.median_error is None else f"{t.median_error:.1%}"
    return (str(t.rows), str(t.held), str(t.missed), str(t.reported), str(t.unpriced), error)


TALLY_COLUMNS = ("rows", "held", "missed", "reported", "not priced", "median error")


def markdown(name: str, rows: Sequence[Row]) -> str:
    """Render one table as a Markdown page."""
    lines = [f"# {TABLES[name].title}", "", f"`chipseconds reproduce {name}`", ""]
    lines += _markdown_table(TALLY_COLUMNS, [tally_cells(rows)])
    for section in dict.fromkeys(row.section for row in rows):
        lines += ["", f"## {section}", ""]
        cells = [
            (row.quantity, row.printed, f"{row.expected:.13g}", figure(row), row.unit, verdict(row), _remark(row))
            for row in rows
            if row.section == section
        ]
        lines += _markdown_table(("quantity", "printed", "expected", "ours", "unit", "verdict", "note"), cells)
    lines += ["", "Sources: " + "; ".join(sorted({row.source for row in rows})) + ".", ""]
    return "\n".join(lines)


def csv_text(rows: Sequence[Row]) -> str:
    """Render one table as CSV."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for row in rows:
        difference = "" if row.ours is None else f"{row.difference:.4f}"
        writer.writerow((
            row.id, row.section, row.quantity, row.unit, row.kind, row.printed, f"{row.expected:.13g}", figure(row),
            difference, row.verdict, row.source, _remark(row),
        ))  # fmt: skip
    return out.getvalue()


def index(tables: Mapping[str, Sequence[Row]]) -> str:
    """Render the list of tables with their verdicts as a Markdown page."""
    cells = [(f"[{name}]({name}.md)", TABLES[name].title, *tally_cells(rows)) for name, rows in tables.items()]
    lines = ["# Published numbers and ours", "", "Written by `chipseconds reproduce --out`; the kinds of rows are"]
    lines += ["explained in [docs/reproductions.md](../../docs/reproductions.md).", ""]
    return "\n".join([*lines, *_markdown_table(("table", "what", *TALLY_COLUMNS), cells), ""])


def _remark(row: Row) -> str:
    return "; ".join(part for part in (row.note, row.unpriced) if part)


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(columns), "|" + "---|" * len(columns), *map(line, rows)]
