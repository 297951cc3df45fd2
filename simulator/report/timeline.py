"""A picture of a run over time: batch, queue, KV cache, preemptions and busy time."""

from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np

from simulator.report.figures import BLUE, GREEN, GREY, INK, MUTED, ORANGE, PINK, tidy
from simulator.results import Result
from simulator.results.tables import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

#: Title, timeline column, colour, and whether replicas add up (or are averaged, as a share in percent).
PANELS = (
    ("running requests", "running", BLUE, True),
    ("waiting requests", "waiting", ORANGE, True),
    ("KV cache in use", "kv_fraction", GREEN, False),
    ("preemptions per second", "preemptions_per_s", PINK, True),
    (
        "share of time at work, without waits for the slowest rank and bubbles of pipelines",
        "busy_fraction",
        GREY,
        False,
    ),
)
POOL_LINES = ("-", "--", ":", "-.")


def draw_timeline(result: Result) -> "Figure":
    """Figure of one result: one panel per quantity over simulated time, the fleet, or each of several pools, in bold and each replica behind it.

    The measured window is bright, warm-up and drain are shaded.
    """
    from matplotlib.figure import Figure

    table, window = result.timeline, result.summary.window
    pools = _pools(result)
    figure = Figure(figsize=(11, 8.4), layout="constrained")
    panels = figure.subplots(len(PANELS), 1, sharex=True)
    for axes, (title, column, colour, adds) in zip(panels, PANELS, strict=True):
        tidy(axes)
        axes.set_title(title, loc="left", fontsize=10, color=INK)
        replicas = np.unique(table["replica"])
        if len(pools) < len(replicas) <= 16:
            for replica in replicas:
                own = table["replica"] == replica
                axes.step(
                    table["start_s"][own], table[column][own], where="post", color=colour, alpha=0.25, linewidth=0.8
                )
        largest, end_s = 0.0, window.end_s
        for (name, own), line in zip(pools.items(), cycle(POOL_LINES), strict=False):
            time_s, values = fleet_series({key: of[own] for key, of in table.items()}, column, adds=adds)
            axes.step(time_s, values, where="post", color=colour, linewidth=1.4, linestyle=line, label=name)
            if len(pools) == 1:
                axes.fill_between(time_s, values, step="post", color=colour, alpha=0.15, linewidth=0)
            largest = max(largest, float(values.max(initial=0.0)))
            end_s = max(end_s, float(time_s[-1]) if len(time_s) else 0.0)
        _shade(axes, window.start_s, window.stop_s, end_s)
        if adds:
            axes.set_ylim(0, 1.08 * largest if largest else 1)
        else:
            axes.set_ylim(0, 1.02)
            axes.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
    if len(pools) > 1:
        panels[0].legend(loc="lower right", bbox_to_anchor=(1, 1), fontsize=9, frameon=False, ncols=len(pools))
    if len(table["start_s"]):
        panels[-1].set_xlim(0, float((table["start_s"] + table["interval_s"]).max()))
    panels[-1].set_xlabel("simulated time [s]", color=MUTED)
    interval = float(table["interval_s"].max(initial=0.0))
    figure.suptitle(
        f"{result.summary.scenario}   ·   means over {interval:.3g} s   ·   shaded: not measured",
        x=0.01,
        ha="left",
        fontsize=12,
        fontweight="bold",
        color=INK,
    )
    return figure


def _pools(result: Result) -> "dict[str, NDArray[np.bool_]]":
    """Rows of the timeline that are each pool's, by its name; all of them, if there are no several pools."""
    replica = result.timeline["replica"]
    pools = result.summary.pools or []
    if len(pools) < 2:
        return {"": np.ones(len(replica), dtype=bool)}
    firsts = [pool.first_replica for pool in pools]
    number = np.searchsorted(firsts, replica, side="right") - 1
    return {pool.name: number == i for i, pool in enumerate(pools)}


def fleet_series(table: Table, column: str, *, adds: bool) -> tuple[np.ndarray, np.ndarray]:
    """A timeline column of the whole fleet, over the longest interval of any replica: starts [s] and values.

    Replicas' intervals differ by powers of two; shorter ones are averaged. ``adds``: the sum over replicas, otherwise
    their mean. The last start is repeated at the end, so that a step line has its last step.
    """
    start, width = table["start_s"], table["interval_s"]
    if len(start) == 0:
        return np.zeros(0), np.zeros(0)
    interval = float(width.max())
    # Half an interval in, no rounding can move a start into its neighbour.
    slot = np.floor((start + width / 2) / interval).astype(np.int64)
    values = np.asarray(np.bincount(slot, weights=table[column] * (width / interval)), dtype=np.float64)
    if not adds:
        values = values / len(np.unique(table["replica"]))
    time = np.arange(len(values) + 1) * interval
    return time, np.append(values, values[-1])


def _shade(axes: "Axes", start_s: float, stop_s: float, end_s: float) -> None:
    for left, right in ((0.0, start_s), (stop_s, end_s)):
        if right > left:
            axes.axvspan(left, right, color=MUTED, alpha=0.08, linewidth=0)
