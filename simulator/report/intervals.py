"""Parameter intervals as text: of one run, and of two side by side."""

from collections.abc import Callable

from simulator.report.forms import DASH, HEADLINES, aligned, percent, wrapped
from simulator.results.compare import Comparison
from simulator.results.summary import Intervals, ParameterInterval


def interval_lines(found: Intervals) -> list[str]:
    """Intervals of the parameters, each with its sources' shares of the variance."""
    level = f"{100 * found.level:g} %"
    rows = [[f"Parameters, {found.draws} draws", "run", f"{level} interval", *found.sources]]
    for label, path, form in HEADLINES:
        figure = found.figures.get(path)
        if figure is not None:
            shares = [f"{figure.shares[s]:.0%}" if s in figure.shares else DASH for s in found.sources]
            rows.append([f"  {label}", form(figure.value), interval_text(figure, form), *shares])
    lines = aligned(rows, indent=0)
    sources = ", ".join(found.sources)
    notes = [f"shares of the variance from {sources}; sampling intervals above are apart from these", *found.notes]
    if found.overloaded_fraction:
        unsteady = f"{percent(found.overloaded_fraction)} of the draws have no steady state"
        if found.infeasible_fraction:
            unsteady += f" ({percent(found.infeasible_fraction)} do not fit)"
        notes.insert(0, f"{unsteady}: their latencies are without bound")
    for note in notes:
        lines += wrapped(note)
    return lines


def interval_text(figure: ParameterInterval, form: Callable[[float | None], str]) -> str:
    """The interval; ∞ where the draws beyond that end have no bound."""
    if figure.low is None and figure.median is None and not figure.reason.endswith("steady state"):
        return DASH
    low, high = (("∞" if end is None else form(end)) for end in (figure.low, figure.high))
    return f"[{low} … {high}]"


def apart(a: ParameterInterval, b: ParameterInterval) -> bool:
    """Whether two intervals have nothing in common; an end that is missing has no bound."""
    return (a.high is not None and b.low is not None and a.high < b.low) or (
        b.high is not None and a.low is not None and b.high < a.low
    )


def compared_lines(comparison: Comparison) -> list[str]:
    """Headline intervals of the parameters side by side, where both results have them."""
    both = {path: (a, b) for path, a, b in comparison.intervals}
    rows = [["Parameter intervals", "a", "b", ""]]
    for label, path, form in HEADLINES:
        if path in both:
            a, b = both[path]
            verdict = "apart" if apart(a, b) else "overlap"
            rows.append([f"  {label}", interval_text(a, form), interval_text(b, form), verdict])
    return aligned(rows, indent=0)
