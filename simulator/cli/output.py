"""What the commands share for writing: JSON on stdout, tables for people, notes on stderr."""

import io
import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import click
import numpy as np

json_option = click.option("--json", "as_json", is_flag=True, help="Print exactly one JSON document on stdout.")


def plain(value: Any) -> Any:
    """Turn records, arrays and numpy scalars into what JSON can hold; NaN and infinities become null."""
    if hasattr(value, "model_dump"):
        return plain(value.model_dump(mode="json"))
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return [plain(v) for v in value.tolist()]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(v) for v in value]
    return value


def print_json(document: Mapping[str, Any]) -> None:
    """Print one JSON document at full precision."""
    click.echo(json.dumps(plain(document), indent=2, allow_nan=False))


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, note: str = "", left: int = 1
) -> None:
    """Print a table on stdout; columns after the first ``left`` are right-aligned."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=title, title_justify="left", caption=note or None, caption_justify="left", box=None, pad_edge=False
    )
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < left else "right", no_wrap=i == 0)
    for row in rows:
        table.add_row(*row)
    console = Console(markup=False)  # "[s]" is a unit
    if console.is_terminal:
        console.print(table)
        return
    text = io.StringIO()
    Console(width=1000, markup=False, file=text).print(table)  # a file has room: no cell is folded
    for line in text.getvalue().splitlines():
        click.echo(line.rstrip())


def note(message: str) -> None:
    """Say something on stderr."""
    click.echo(message, err=True)


def show_progress(done: int, total: int, what: str) -> None:
    """One line per stage on stderr; on a terminal the line is overwritten."""
    if what == "done":
        if sys.stderr.isatty():
            click.echo("\r\033[K", err=True, nl=False)
        return
    text = f"[{done}/{total}] {what}"
    if sys.stderr.isatty():
        click.echo(f"\r\033[K{text}", err=True, nl=False)
    else:
        click.echo(text, err=True)
