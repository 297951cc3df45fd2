"""How far off a run's figures may be: each kind of interval in a column of its own."""

from simulator.report.html.page import Block, Grid, Prose, Section
from simulator.report.tables import HEADLINES, range_text
from simulator.results.summary import Estimate, Summary


def estimate_at(summary: Summary, path: str) -> Estimate:
    """The figure at a path of the summary; without a value where the path leads nowhere."""
    found: object = summary
    for name in path.split("."):
        if found is None:
            return Estimate(value=None)
        found = getattr(found, name)
    if isinstance(found, Estimate):
        return found
    return Estimate(value=None if found is None else float(found))  # type: ignore[arg-type]


def uncertainty_sections(s: Summary) -> tuple[Section, ...]:
    """A table of the headline figures with their intervals, for runs that have more than those of the percentiles."""
    if s.replications is None:
        return ()
    found = s.replications
    statuses = ", ".join(f"{count} {status.replace('_', ' ')}" for status, count in sorted(found.statuses.items()))
    seeds = f"{len(found.seeds)} seeds ({', '.join(map(str, found.seeds))}): {statuses}"
    words = f"Sampling: what another run of this length might have drawn. Between seeds: the mean of {seeds}."
    columns = ("figure", "this run", "sampling, 95 %", "mean of seeds", "between seeds, 95 %")
    rows = []
    for label, path, form in HEADLINES:
        figure, between = estimate_at(s, path), found.figures.get(path)
        if figure.value is None and between is None:
            continue
        mean = (
            Estimate(value=None)
            if between is None
            else Estimate(value=between.mean, low=between.low, high=between.high)
        )
        rows.append((label, form(figure.value), range_text(figure, form), form(mean.value), range_text(mean, form)))
    blocks: tuple[Block, ...] = (Prose((words,)), Grid(columns, tuple(rows)))
    return (Section("sure", "How far off may this be?", blocks),)
