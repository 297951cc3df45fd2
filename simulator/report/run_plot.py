"""The picture of one simulated run: what users waited, what the replicas did, where the chip time went."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from simulator.errors import InputError
from simulator.report.tables import number, percent, seconds
from simulator.results.store import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Okabe-Ito: told apart by colour-blind readers too.
BLUE, ORANGE, GREEN, PURPLE, YELLOW, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
GREY, INK, MUTED, GRID = "#C4C9D0", "#1F2933", "#616E7C", "#E4E7EB"
FORMATS = (".png", ".svg", ".pdf")
#: Parts of the step in the order of the bar; a part without a colour of its own is grey.
PARTS = {
    "matmul": BLUE,
    "attention_prefill": ORANGE,
    "attention_decode": YELLOW,
    "head": PURPLE,
    "collective": GREEN,
    "elementwise": SKY,
    "overhead": MUTED,
    "idle": GREY,
}
GRID_POINTS = 400


def check_plot_path(path: Path, *, made: Path | None = None) -> None:
    """Refuse, before a long run, a file that :func:`save_run_plot` could not write; ``made`` is a folder to come.

    Raises
    ------
    InputError
        If the suffix is none of .png, .svg, .pdf, or the folder does not exist.
    """
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"--plot {path}: the file name must end in {', '.join(FORMATS)}")
    folder = path.absolute().parent
    if not folder.is_dir() and (made is None or folder != made.absolute()):
        raise InputError(f"--plot {path}: there is no folder {path.parent}")


def save_run_plot(result: Result, path: Path) -> None:
    """Draw ``result`` into ``path``; the suffix chooses the format. The same result gives the same SVG.

    Raises
    ------
    InputError
        If the suffix is none of .png, .svg, .pdf, or the file cannot be written.
    """
    check_plot_path(path)
    import matplotlib as mpl  # 0.3 s, only for those who plot

    with mpl.rc_context({"svg.hashsalt": "chipseconds", "svg.fonttype": "none", "font.family": "DejaVu Sans"}):
        figure = draw_run(result)
        try:
            figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)
        except OSError as error:
            raise InputError(f"--plot {path}: cannot be written: {error.strerror}") from None


def draw_run(result: Result) -> "Figure":
    """Figure of four panels: latencies, the replicas over time, chip-seconds per query, and parts of the chip time."""
    from matplotlib.figure import Figure  # with matplotlib

    summary = result.summary
    figure = Figure(figsize=(12, 7.2), layout="constrained", facecolor="white")
    axes = figure.subplots(2, 2, gridspec_kw={"height_ratios": [1.35, 1]})
    d = summary.deployment
    figure.suptitle(
        f"{summary.scenario}: {d.model} {d.precision} on {d.replicas} × {d.slice}",
        x=0.01,
        ha="left",
        fontsize=14,
        color=INK,
    )
    if summary.latency is None:
        _growing_latency(axes[0][0], result)
    else:
        _latency(axes[0][0], result)
    _timeline(axes[0][1], result)
    _chip_seconds(axes[1][0], result)
    _breakdown(axes[1][1], result)
    for axis in axes.flat:
        axis.tick_params(colors=MUTED, labelsize=9)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        for side in ("left", "bottom"):
            axis.spines[side].set_color(GRID)
    return figure


def _title(axis: "Axes", title: str, note: str = "") -> None:
    axis.set_title(title, loc="left", fontsize=11, color=INK, pad=22 if note else 8)
    if note:
        axis.text(0, 1.03, note, transform=axis.transAxes, fontsize=9, color=MUTED)


def _measured(result: Result, name: str) -> Any:
    window, table = result.summary.window, result.requests
    inside = (table["arrival_s"] >= window.start_s) & (table["arrival_s"] <= window.stop_s)
    values = table[name][inside]
    return np.sort(values[~np.isnan(values)])


def _latency(axis: "Axes", result: Result) -> None:
    summary = result.summary
    slo = summary.slo
    limits = {} if slo is None else {"ttft_s": slo.ttft_s, "tpot_s": slo.tpot_s, "e2e_s": slo.e2e_s}
    for name, label, colour in (("tpot_s", "TPOT", GREEN), ("ttft_s", "TTFT", BLUE), ("e2e_s", "E2E", ORANGE)):
        values = _measured(result, name)
        if len(values) == 0:
            continue
        axis.plot(values, np.arange(1, len(values) + 1) / len(values), color=colour, lw=2, label=label)
        limit = limits.get(name)
        if limit is not None:
            axis.axvline(limit, color=colour, lw=1.2, ls=(0, (4, 3)))
            axis.text(
                limit,
                0.02,
                f" {label} ≤ {seconds(limit)}",
                color=colour,
                fontsize=8,
                rotation=90,
                va="bottom",
                ha="right",
            )
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(_formatter(seconds))
    axis.yaxis.set_major_formatter(_formatter(_whole_percent))
    axis.set_ylim(0, 1.01)
    axis.grid(color=GRID, lw=0.8)
    axis.legend(frameon=False, fontsize=9, loc="lower right")
    note = "share of measured requests at or below"
    if slo is not None:
        note += f"; dashed: limits, all met by {percent(slo.met_fraction.value)}"
    _title(axis, "What users wait", note)


def _growing_latency(axis: "Axes", result: Result) -> None:
    table = result.requests
    axis.plot(table["arrival_s"], table["ttft_s"], ".", ms=1.5, color=BLUE, rasterized=True)
    axis.xaxis.set_major_formatter(_formatter(seconds))
    axis.yaxis.set_major_formatter(_formatter(seconds))
    axis.set_ylim(bottom=0)
    axis.set_xlim(left=0)
    axis.grid(color=GRID, lw=0.8)
    load = result.summary.load
    axis.set_xlabel("arrival", fontsize=9, color=MUTED)
    _title(
        axis,
        "Overloaded: time to first token by arrival",
        f"load {number(load.load)}; there is no steady state to describe",
    )


def _timeline(axis: "Axes", result: Result) -> None:
    table, window = result.timeline, result.summary.window
    grid = np.linspace(0, window.end_s, GRID_POINTS)
    total = {"running": np.zeros(GRID_POINTS), "waiting": np.zeros(GRID_POINTS)}
    for replica in range(result.summary.ledger.replicas):
        rows = table["replica"] == replica
        starts = table["start_s"][rows]
        if len(starts) == 0:
            continue
        at = np.clip(np.searchsorted(starts, grid, side="right") - 1, 0, len(starts) - 1)
        alive = grid < starts[-1] + table["interval_s"][rows][-1]
        for name, values in total.items():
            np.add(values, np.where(alive, table[name][rows][at], 0.0), out=values)
    axis.axvspan(window.start_s, window.stop_s, color=GRID, alpha=0.45, lw=0)
    axis.fill_between(grid, total["running"], color=BLUE, alpha=0.2, lw=0, step="post")
    axis.step(grid, total["running"], where="post", color=BLUE, lw=1.4, label="running")
    axis.step(grid, total["waiting"], where="post", color=ORANGE, lw=1.4, label="waiting")
    axis.set_ylim(bottom=0)
    axis.set_xlim(0, window.end_s)
    axis.xaxis.set_major_formatter(_formatter(seconds))
    axis.legend(frameon=False, fontsize=9, loc="upper right")
    fleet = "" if result.summary.ledger.replicas == 1 else ", all replicas"
    _title(axis, f"Requests in the system{fleet}", "shaded: arrivals that are measured")


def _chip_seconds(axis: "Axes", result: Result) -> None:
    c = result.summary.chip_seconds_per_query
    names = ["ideal", "busy", "provisioned"]
    bars = [
        [(c.ideal, GREEN)],
        [(c.prefill, ORANGE), (c.decode, BLUE)],
        [(c.prefill, ORANGE), (c.decode, BLUE), (max(c.provisioned - c.busy, 0.0), GREY)],
    ]
    for y, parts in enumerate(reversed(bars)):
        left = 0.0
        for width, colour in parts:
            axis.barh(y, width, left=left, color=colour, height=0.6)
            left += width
        axis.text(left, y, f"  {number(left)}", va="center", fontsize=10, color=INK)
    axis.set_yticks(range(3), list(reversed(names)))
    axis.set_xlim(0, max(c.provisioned, c.ideal) * 1.15)
    axis.grid(axis="x", color=GRID, lw=0.8)
    axis.set_axisbelow(True)
    chips = result.summary.ledger.chips
    price = result.summary.prices
    note = "prefill (orange), decode (blue), idle (grey)"
    if price is not None:
        note += f"; ${number(price.allocation.per_query_usd)} per query with idle"
    _title(axis, f"Chip-seconds per query, {chips} chip{'s' * (chips > 1)}", note)


def _breakdown(axis: "Axes", result: Result) -> None:
    fractions = result.summary.breakdown.fractions
    known = [name for name in PARTS if fractions.get(name, 0) > 0]
    other = [name for name in fractions if name not in PARTS and fractions[name] > 0]
    names = [*known, *other]
    shown = sorted(names, key=lambda name: fractions[name])
    for y, name in enumerate(shown):
        axis.barh(y, fractions[name], color=PARTS.get(name, GREY), height=0.62)
        axis.text(fractions[name], y, f"  {percent(fractions[name])}", va="center", fontsize=9, color=INK)
    axis.set_yticks(range(len(shown)), [name.replace("_", " ") for name in shown])
    axis.set_xlim(0, 1.15 * max(fractions[name] for name in shown))
    axis.xaxis.set_major_formatter(_formatter(_whole_percent))
    axis.grid(axis="x", color=GRID, lw=0.8)
    axis.set_axisbelow(True)
    used = result.summary.utilisation
    _title(axis, "Where the chip time goes", f"MFU {percent(used.mfu)}, MBU {percent(used.mbu)} of all chip time")


def _whole_percent(fraction: float) -> str:
    return f"{100 * fraction:.0f} %"


def _formatter(form: Any) -> Any:
    from matplotlib.ticker import FuncFormatter  # with matplotlib

    return FuncFormatter(lambda value, _: "0" if value == 0 else form(value))
