"""How far off a run's figures may be: each kind of interval in a column of its own."""

from simulator.report.forms import HEADLINES, percent
from simulator.report.html.page import Block, Grid, Prose, Section
from simulator.report.intervals import interval_text
from simulator.report.tables import range_text
from simulator.results.summary import Estimate, Intervals, Summary


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


def parameter_notes(s: Summary, path: str) -> tuple[str, ...]:
    """The interval of a headline figure over draws of the parameters, as a card's note; none where nothing was drawn."""
    found = None if s.intervals is None else s.intervals.figures.get(path)
    if s.intervals is None or found is None:
        return ()
    form = next(form for _, known, form in HEADLINES if known == path)
    return (f"parameters, {100 * s.intervals.level:g} %: {interval_text(found, form)}",)


def uncertainty_sections(s: Summary) -> tuple[Section, ...]:
    """A table of the headline figures with their intervals, for runs that have more than those of the percentiles."""
    seeds, parameters = s.replications, s.intervals
    if seeds is None and parameters is None:
        return ()
    columns = ["figure", "this run", "sampling, 95 %"]
    words = ["Sampling: what another run of this length might have drawn."]
    if seeds is not None:
        columns += ["mean of seeds", "between seeds, 95 %"]
        statuses = ", ".join(f"{count} {status.replace('_', ' ')}" for status, count in sorted(seeds.statuses.items()))
        words.append(
            f"Between seeds: the mean of {len(seeds.seeds)} seeds ({', '.join(map(str, seeds.seeds))}): {statuses}."
        )
    if parameters is not None:
        columns += [f"parameters, {100 * parameters.level:g} %", *(f"from {source}" for source in parameters.sources)]
        words += _parameter_words(parameters)
    rows = []
    for label, path, form in HEADLINES:
        figure = estimate_at(s, path)
        row = [form(figure.value), range_text(figure, form)]
        if seeds is not None:
            between = seeds.figures.get(path)
            mean = Estimate(value=None)
            if between is not None:
                mean = Estimate(value=between.mean, low=between.low, high=between.high)
            row += [form(mean.value), range_text(mean, form)]
        if parameters is not None:
            drawn = parameters.figures.get(path)
            shares = {} if drawn is None else drawn.shares
            row.append(form(None) if drawn is None else interval_text(drawn, form))
            row += [
                f"{100 * shares[source]:.0f} %" if source in shares else form(None) for source in parameters.sources
            ]
        if any(cell != form(None) for cell in row):
            rows.append((label, *row))
    blocks: tuple[Block, ...] = (Prose(tuple(words)), Grid(tuple(columns), tuple(rows)))
    return (Section("sure", "How far off may this be?", blocks),)


def _parameter_words(found: Intervals) -> list[str]:
    unsteady = ""
    if found.overloaded_fraction:
        unfit = f", {percent(found.infeasible_fraction)} do not fit" if found.infeasible_fraction else ""
        unsteady = f" {percent(found.overloaded_fraction)} of them have no steady state{unfit}: their latencies are without bound."
    drawn = (
        f"Parameters: the same requests served with {found.draws} draws of what calibration leaves uncertain.{unsteady}"
    )
    notes = (f"{note[:1].upper()}{note[1:]}." for note in found.notes)
    return [f"{drawn} On the right: shares of that variance.", *notes]
