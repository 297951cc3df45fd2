"""The page of several runs beside each other."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from simulator.report.forms import HEADLINES, number, usd
from simulator.report.html.inline import inline_svg
from simulator.report.html.page import Card, Grid, Page, Picture, Prose, Section
from simulator.report.html.uncertainty import estimate_at
from simulator.report.intervals import apart, interval_text
from simulator.report.run_plot import LINE_COLOURS, draw_cdfs, measured_values, metric_label
from simulator.results import Result
from simulator.results.compare import differences


def comparison_page(results: Sequence[tuple[str, Result]]) -> Page:
    """Page of named results, at least two: headline figures side by side, latencies in one picture, settings that differ."""
    runs = [result for _, result in results]
    names = [name for name, _ in results]
    per_query = [run.summary.chip_seconds_per_query.provisioned for run in runs]
    least = min(range(len(runs)), key=lambda i: per_query[i])
    lead = (f"{len(runs)} runs; the first, {names[0]}, is what the others are compared with.",)
    cards = tuple(
        Card(
            name,
            number(run.summary.chip_seconds_per_query.provisioned),
            (
                "chip-seconds per query, provisioned",
                f"{run.summary.deployment.model} on {run.summary.deployment.slice}, status {run.summary.status}",
            ),
            "good" if i == least and len(set(per_query)) > 1 else "plain",
        )
        for i, (name, run) in enumerate(results)
    )
    sections = [Section("figures", "Headline figures", (_headlines(names, runs), *_parameters(names, runs)))]
    pictures = _pictures(results)
    if pictures:
        sections.append(Section("latencies", "What users see", pictures))
    sections.append(Section("settings", "Settings that differ", (_settings(names, runs),)))
    return Page(title=" · ".join(names), lead=lead, cards=cards, sections=tuple(sections), footer=_footer(results))


def _pictures(results: Sequence[tuple[str, Result]]) -> tuple[Picture, ...]:
    """Distributions of those runs that have a steady state and kept their requests, as far as there are colours."""
    found = []
    for name in ("ttft_s", "tpot_s", "e2e_s", "queue_s"):
        steady = [(label, run) for label, run in results if run.summary.latency is not None]
        drawn = [(label, run) for label, run in steady if np.isfinite(measured_values(run, name)).any()]
        if 0 < len(drawn) <= len(LINE_COLOURS):
            label = metric_label(name)
            svg = inline_svg(partial(draw_cdfs, drawn, name), label=f"distributions of {label}", key=f"cdf-{name[:4]}")
            found.append(Picture(svg, f"{label}: share of the measured requests at or below each value"))
    return tuple(found)


def _headlines(names: Sequence[str], runs: Sequence[Result]) -> Grid:
    more: tuple[tuple[str, str, Callable[[float | None], str]], ...] = (
        ("output tokens/s per chip", "throughput.output_tokens_per_s_per_chip", number),
        ("chip-s ideal", "chip_seconds_per_query.ideal", number),
        ("$ per M output tokens, allocation", "prices.allocation.per_million_output_tokens_usd", usd),
    )
    rows = []
    for label, path, form in (*HEADLINES, *more):
        values = [estimate_at(run.summary, path).value for run in runs]
        if all(value is None for value in values):
            continue
        first = values[0]
        cells = [form(first)]
        for value in values[1:]:
            change = "" if value is None or not first else f"  ({value / first - 1:+.1%})".replace("-", "−")
            cells.append(form(value) + change)
        rows.append((label, *cells))
    rows.insert(0, ("status", *(run.summary.status for run in runs)))
    return Grid(("figure", *names), tuple(rows), caption="in brackets: against the first")


def _parameters(names: Sequence[str], runs: Sequence[Result]) -> tuple[Grid, ...]:
    """Intervals of the parameters side by side, if all runs have them."""
    intervals = [run.summary.intervals for run in runs if run.summary.intervals is not None]
    if len(intervals) < len(runs):
        return ()
    rows = []
    for label, path, form in HEADLINES:
        found = [interval.figures[path] for interval in intervals if path in interval.figures]
        if len(found) == len(runs):
            cells = (interval_text(f, form) + (" apart" if apart(found[0], f) else "") for f in found)
            rows.append((label, *cells))
    levels = ", ".join(dict.fromkeys(f"{100 * interval.level:g} %" for interval in intervals))
    caption = f"intervals of the parameters, {levels}; apart: nothing in common with the first"
    return (Grid(("figure", *names), tuple(rows), caption=caption),)


def _settings(names: Sequence[str], runs: Sequence[Result]) -> Grid | Prose:
    first = runs[0].scenario
    changed: dict[str, list[str]] = {}
    for i, run in enumerate(runs[1:], start=1):
        for d in differences(first, run.scenario):
            cells = changed.setdefault(d.path, [_cell(d.a)] * len(runs))
            cells[i] = _cell(d.b)
    if not changed:
        return Prose(("None: the scenarios are the same.",))
    rows = tuple((path, *cells) for path, cells in sorted(changed.items()))
    return Grid(("setting", *names), rows, left=len(names) + 1)


def _cell(value: object) -> str:
    return "–" if value is None else str(value)


def _footer(results: Sequence[tuple[str, Result]]) -> tuple[str, ...]:
    return tuple(f"{name}: {run.summary.scenario}, seed {run.seed}." for name, run in results)
