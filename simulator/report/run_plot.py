"""The picture of a run: what users saw, how full the replicas were, where the chip time went."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from simulator.report.figures import BLUE, GREEN, GREY, INK, MUTED, ORANGE, PINK, SKY, YELLOW, compact, tidy
from simulator.report.forms import number
from simulator.report.timeline import fleet_series
from simulator.results import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Colours of the chip-time bar, in the order parts appear.
PART_COLOURS = (BLUE, SKY, GREEN, YELLOW, ORANGE, PINK, "#44546A", "#B7C4CF")


LINE_COLOURS = (BLUE, ORANGE, GREEN, PINK, SKY, YELLOW)


def draw_run(result: Result) -> "Figure":
    """Figure of one result: CDFs of TTFT and TPOT against the SLOs, a timeline, and a bar of chip time."""
    from matplotlib.figure import Figure

    summary = result.summary
    figure = Figure(figsize=(11, 7.4), layout="constrained")
    (top_left, top_right), (middle, _), (bottom, _) = figure.subplots(
        3, 2, gridspec_kw={"height_ratios": [1, 0.9, 0.28]}
    )
    for spare in (_, figure.axes[3]):
        spare.remove()
    grid = top_left.get_gridspec()
    middle.set_subplotspec(grid[1, :])
    bottom.set_subplotspec(grid[2, :])
    slo = summary.slo
    for axes, name in ((top_left, "ttft_s"), (top_right, "tpot_s")):
        if summary.latency is None:
            _no_steady_state(axes, name)
        else:
            _cdfs(axes, [("", measured_values(result, name))], name, None if slo is None else getattr(slo, name))
    _timeline(middle, result)
    _chip_time(bottom, summary.breakdown.fractions)
    per_query = summary.chip_seconds_per_query
    words = [
        summary.scenario,
        f"{per_query.busy:.3g} chip-seconds per query busy, {per_query.provisioned:.3g} provisioned, {per_query.ideal:.3g} ideal",
    ]
    if summary.load.load is not None:
        words.append(f"load {summary.load.load:.2f}" + (", OVERLOADED" if summary.load.overloaded else ""))
    figure.suptitle("   ·   ".join(words), x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK)
    return figure


def draw_cdfs(results: Sequence[tuple[str, Result]], name: str) -> "Figure":
    """Figure of one latency column of named results: a line each, and the limit of the first."""
    figure, axes = compact()
    slo = results[0][1].summary.slo
    limit_s = None if slo is None or name == "queue_s" else getattr(slo, name)  # no objective is about the queue
    columns = [(label, measured_values(result, name)) for label, result in results]
    _cdfs(axes, columns, name, limit_s)
    return figure


def draw_load(result: Result) -> "Figure":
    """Figure of the requests and the KV cache over time."""
    figure, axes = compact()
    figure.set_size_inches(11, 3)
    _timeline(axes, result)
    return figure


def measured_values(result: Result, name: str) -> np.ndarray:
    """A column of the requests that arrived in the measured window."""
    window, arrival = result.summary.window, result.requests["arrival_s"]
    return result.requests[name][(arrival >= window.start_s) & (arrival <= window.stop_s)]


def _no_steady_state(axes: "Axes", name: str) -> None:
    tidy(axes)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel(metric_label(name), color=MUTED)
    text = "overloaded: no steady state\nlatencies grow for as long as the run lasts"
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=MUTED)


def metric_label(name: str) -> str:
    """A latency column's name for people."""
    return "time in the queue" if name == "queue_s" else name.removesuffix("_s").upper()


def _cdfs(axes: "Axes", columns: Sequence[tuple[str, np.ndarray]], name: str, limit_s: float | None) -> None:
    """Share of the measured requests at or below each value, as far as 1.15 times p99.5: a line for each named column.

    One line has its p50 and p99 written beside it; several have them in the legend.
    """
    finite = [(label, np.sort(values[np.isfinite(values)])) for label, values in columns]
    some = [ordered for _, ordered in finite if len(ordered)]
    long = any(float(np.quantile(ordered, 0.99)) >= 3 for ordered in some)
    scale, unit = (1.0, "s") if long else (1e3, "ms")
    tidy(axes)
    axes.set_xlabel(f"{metric_label(name)} [{unit}]", color=MUTED)
    axes.set_ylabel("share of requests", color=MUTED)
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
    if not some:
        axes.text(0.5, 0.5, "no request has one", transform=axes.transAxes, ha="center", color=MUTED)
        return
    right = 1.15 * scale * max(float(np.quantile(ordered, 0.995)) for ordered in some)
    for (label, ordered), colour in zip(finite, LINE_COLOURS, strict=False):
        if not len(ordered):
            continue
        shown = ordered[np.unique(np.linspace(0, len(ordered) - 1, min(len(ordered), 800)).astype(int))]
        share = np.searchsorted(ordered, shown, side="right") / len(ordered)
        marks = [(p, scale * float(np.quantile(ordered, p, method="inverted_cdf"))) for p in (0.5, 0.99)]
        legend = f"{label}: p50 {number(marks[0][1])}, p99 {number(marks[1][1])} {unit}"
        axes.step(scale * shown, share, where="post", color=colour, linewidth=2, label=legend)
        for p, x in marks:
            axes.plot([x], [p], "o", color=INK if len(finite) == 1 else colour, markersize=4)
            if len(finite) == 1:
                text = f"p{p * 100:g} {number(x)}"
                axes.annotate(text, (x, p), xytext=(7, -12), textcoords="offset points", fontsize=9, color=INK)
    if limit_s is not None:
        limit = limit_s * scale
        right = max(right, 1.08 * limit)
        axes.axvline(limit, color=ORANGE, linewidth=1.5, linestyle="--")
        axes.annotate(
            f"SLO {limit:,.4g}",
            (limit, 0.04),
            xytext=(-5 if limit > right / 4 else 5, 0),
            textcoords="offset points",
            ha="right" if limit > right / 4 else "left",
            fontsize=9,
            color=ORANGE,
        )
    if len(finite) > 1:
        axes.legend(loc="lower left", frameon=False, fontsize=9, bbox_to_anchor=(0, 1), borderaxespad=0)
    axes.set_xlim(0, right or 1.0)


def _timeline(axes: "Axes", result: Result) -> None:
    """Running and waiting requests (left), KV use (right), summed or averaged over replicas, against time."""
    table = result.timeline
    tidy(axes)
    time, running = fleet_series(table, "running", adds=True)
    _, waiting = fleet_series(table, "waiting", adds=True)
    _, cache = fleet_series(table, "kv_fraction", adds=False)
    axes.fill_between(time, running, step="post", color=BLUE, alpha=0.25, linewidth=0)
    axes.step(time, running, where="post", color=BLUE, linewidth=1.2, label="running")
    axes.step(time, waiting, where="post", color=ORANGE, linewidth=1.2, label="waiting")
    axes.set_xlabel("simulated time [s]", color=MUTED)
    axes.set_ylabel("requests", color=MUTED)
    axes.set_ylim(0)
    if len(time):
        axes.set_xlim(0, time[-1])
    right = axes.twinx()
    right.step(time, cache, where="post", color=GREEN, linewidth=1.2, label="KV cache in use")
    right.set_ylim(0, 1.02)
    right.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
    right.spines[["top", "left"]].set_visible(False)
    right.tick_params(colors=MUTED)
    handles = [*axes.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]
    axes.legend(handles=handles, loc="upper left", ncols=3, frameon=False, fontsize=9, bbox_to_anchor=(0, 1.16))


def _chip_time(axes: "Axes", fractions: dict[str, float]) -> None:
    """One bar: shares of chips × time."""
    left = 0.0
    parts = sorted((item for item in fractions.items() if item[0] != "idle"), key=lambda item: -item[1])
    for i, (name, share) in enumerate([*parts, ("idle", fractions.get("idle", 0.0))]):
        colour = GREY if name == "idle" else PART_COLOURS[i % len(PART_COLOURS)]
        axes.barh(0, share, left=left, color=colour, height=0.6, edgecolor="white")
        if share > 0.08:
            axes.text(
                left + share / 2,
                0,
                f"{name.replace('_', ' ')}\n{share:.0%}",
                ha="center",
                va="center",
                fontsize=8,
                color="white" if colour not in {YELLOW, SKY, "#B7C4CF"} else INK,
            )
        left += share
    axes.set_xlim(0, 1)
    axes.set_axis_off()
    small = " · ".join(f"{name.replace('_', ' ')} {share:.1%}" for name, share in parts if 0 < share <= 0.08)
    axes.set_title(
        "where the chip time went" + (f"   (also: {small})" if small else ""), loc="left", fontsize=10, color=INK
    )
