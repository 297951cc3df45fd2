"""Figures and paragraphs in the forms that every table and page uses. Renders; computes nothing."""

import math
import textwrap
from collections.abc import Callable, Sequence

from simulator.units import format_si

WIDTH = 100
DASH = "–"


def seconds(value: float | None) -> str:
    """A time with three digits and a fitting unit.

    >>> [seconds(v) for v in (0.0123, 2.5, 4321.9, None)]
    ['12.3 ms', '2.5 s', '4,322 s', '–']
    """
    if value is None:
        return DASH
    if abs(value) >= 999.5:
        return f"{value:,.0f} s"
    return format_si(value, "s").replace(" ms", " ms")


def number(value: float | None, digits: int = 3) -> str:
    """Significant digits, thousands separated, never in exponent form between 1e-6 and 1e15.

    >>> [number(v) for v in (0.000123456, 0.1, 12.3456, 123456.7, 0.0, None)]
    ['0.000123', '0.100', '12.3', '123,457', '0', '–']
    """
    if value is None:
        return DASH
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if magnitude < -6:
        return f"{value:.{digits - 1}e}"
    if isinstance(value, int) or magnitude >= digits:
        return f"{value:,.0f}"
    return f"{value:,.{max(0, digits - 1 - magnitude)}f}"


def usd(value: float | None) -> str:
    """Dollars with three digits.

    >>> usd(0.000771), usd(2.9), usd(None)
    ('$0.000771', '$2.90', '–')
    """
    return DASH if value is None else f"${number(value)}"


def percent(fraction: float | None) -> str:
    """A share in percent.

    >>> percent(0.1234), percent(0.00012), percent(1.0)
    ('12.3 %', '0.0120 %', '100 %')
    """
    return DASH if fraction is None else f"{number(100 * fraction)} %"


def aligned(rows: Sequence[Sequence[str]], *, indent: int = 2, gap: int = 2, left: int = 1) -> list[str]:
    """Rows as lines with aligned columns: the first ``left`` columns to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        lines.append((" " * indent + (" " * gap).join(cells)).rstrip())
    return lines


def wrapped(text: str, *, first: str = "  ", rest: str | None = None) -> list[str]:
    """Lines of a paragraph."""
    return textwrap.wrap(
        text, WIDTH, initial_indent=first, subsequent_indent=" " * len(first) if rest is None else rest,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


#: Figures that a reader looks for first: label, path in the summary, form.
HEADLINES: tuple[tuple[str, str, Callable[[float | None], str]], ...] = (
    ("TTFT p50", "latency.ttft_s.p50", seconds),
    ("TTFT p99", "latency.ttft_s.p99", seconds),
    ("TPOT p50", "latency.tpot_s.p50", seconds),
    ("TPOT p99", "latency.tpot_s.p99", seconds),
    ("ITL p99", "latency.itl_s.p99", seconds),
    ("E2E p50", "latency.e2e_s.p50", seconds),
    ("E2E p99", "latency.e2e_s.p99", seconds),
    ("load", "load.load", number),
    ("goodput /s", "slo.goodput_per_s", number),
    ("chip-s busy", "chip_seconds_per_query.busy", number),
    ("output tokens/s", "throughput.output_tokens_per_s", number),
    ("chip-s provisioned", "chip_seconds_per_query.provisioned", number),
    ("$ per query, allocation", "prices.allocation.per_query_usd", usd),
    ("J per query", "energy.joules_per_query", number),
)
