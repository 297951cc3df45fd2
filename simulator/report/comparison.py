"""What differs between two results, as text."""

from simulator.report.forms import DASH, aligned, number, percent, wrapped
from simulator.report.intervals import compared_lines
from simulator.results.compare import Comparison, Difference


def comparison_text(comparison: Comparison, name_a: str, name_b: str, *, everything: bool = False) -> str:
    """What differs between two results; figures a reader looks for first come first."""
    lines = [f"a = {name_a}", f"b = {name_b}"]
    if comparison.equal:
        return "\n".join([*lines, "no difference: scenario, summary and every request are equal"]) + "\n"
    for title, found in (("Scenario", comparison.scenario), ("Versions", comparison.versions)):
        if found:
            lines += ["", title, *aligned([[d.path, _value(d.a), "→", _value(d.b)] for d in found])]
    figures = sorted(comparison.summary, key=_weight)
    numeric = [d for d in figures if d.absolute is not None]
    shown = numeric if everything else [d for d in numeric if _is_headline(d.path)]
    if shown:
        rows = [["Figures", "a", "b", "change"]]
        rows += [[f"  {d.path}", _value(d.a), _value(d.b), _change(d)] for d in shown]
        lines += ["", *aligned(rows, indent=0)]
        if len(shown) < len(numeric):
            lines.append(f"  … and {len(numeric) - len(shown)} more; --all lists them")
    other = [d for d in figures if d.absolute is None and (everything or not d.path.startswith("intervals."))]
    if other:
        shown_other = other if everything else other[:12]
        lines += ["", "Other entries"]
        for d in shown_other:
            lines += wrapped(f"{d.path}: {_value(d.a)} → {_value(d.b)}", rest="      ")
        if len(shown_other) < len(other):
            lines.append(f"  … and {len(other) - len(shown_other)} more; --all lists them")
    if comparison.intervals:
        lines += ["", *compared_lines(comparison)]
    if comparison.rows_a != comparison.rows_b:
        lines += ["", f"Requests: {comparison.rows_a:,} in a, {comparison.rows_b:,} in b; the common ones are compared"]
    if comparison.requests:
        rows = [["Requests, joined by index", "rows", "largest change", "relative", "first"]]
        rows += [
            [f"  {c.column}", f"{c.rows:,}", number(c.max_absolute), _times(c.max_relative), f"{c.first_row:,}"]
            for c in comparison.requests
        ]
        lines += ["", *aligned(rows, indent=0)]
    return "\n".join(lines) + "\n"


#: Figures a reader looks for first; the others follow.
_FIRST = ("chip_seconds_per_query", "latency", "slo", "load", "prices", "throughput")


def _weight(difference: Difference) -> tuple[int, str]:
    top = difference.path.partition(".")[0]
    return (_FIRST.index(top) if top in _FIRST else len(_FIRST), difference.path)


def _is_headline(path: str) -> bool:
    """Leave out the ends of intervals, counts, and the parts that only --all asks for."""
    top, _, rest = path.partition(".")
    return top in _FIRST and rest.rpartition(".")[2] not in {"low", "high", "n"}


def _change(d: Difference) -> str:
    if d.relative is None:
        return f"{'+' if (d.absolute or 0) > 0 else ''}{number(d.absolute)}"
    return f"{d.relative:+.3%}".replace("%", " %")


def _times(relative: float) -> str:
    return percent(relative) if relative < 10 else f"× {number(relative + 1)}"


def _value(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return DASH if value is None else str(value)
    return number(value, 5)
