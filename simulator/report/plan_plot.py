"""Pictures of a plan: chips from the ideal roofline to the fleet, and cost against latency."""

from typing import TYPE_CHECKING

from simulator.report.figures import BLUE, GREY, INK, MUTED, ORANGE, compact, tidy
from simulator.report.plan_tables import rate_text, targets_text
from simulator.report.waterfall import waterfall_bars
from simulator.results.plan import FrontPoint, Plan, PlannedFleet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_plan(plan: Plan) -> "Figure":
    """Figure of a feasible plan: its waterfall in chips, and what tighter or looser limits cost beside it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": [1.15, 1]})
    qps = plan.provisioning.qps
    steps = [(step.name, step.chip_s_per_query * qps) for step in plan.waterfall]
    waterfall_bars(left, [*steps, ("the fleet", steps[-1][1])])
    left.set_xlabel(f"chips for {rate_text(qps)} queries per second", color=MUTED)
    if plan.front:
        front_axes(right, plan.front)
    else:
        right.remove()
    figure.suptitle(
        f"{plan.name}   ·   {targets_text(plan.targets)}", x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK
    )
    return figure


def draw_front(plan: Plan) -> "Figure":
    """Figure of the cheapest fleet against how long the limits are."""
    figure, axes = compact()
    figure.set_size_inches(11, 3.2)
    front_axes(axes, plan.front)
    return figure


def front_axes(axes: "Axes", front: list[FrontPoint]) -> None:
    """Cost of the cheapest fleet (or its chips, where one has no price) when every limit is so many times as long.

    Steps join the points that nothing tighter beats; hollow points cost as much as a tighter one; crosses have no fleet.
    """
    tidy(axes)
    found = [(point, point.fleet) for point in front if point.fleet is not None]
    priced = all(fleet.usd_per_hour is not None for _, fleet in found)

    def height(fleet: PlannedFleet) -> float:
        return fleet.usd_per_hour if priced and fleet.usd_per_hour is not None else float(fleet.chips)

    best = [(point.scale, height(fleet)) for point, fleet in found if point.on_front]
    top = max((height(fleet) for _, fleet in found), default=1.0)
    scales = [point.scale for point in front]
    if best:
        x, y = zip(*best, strict=True)
        axes.step([*x, max(scales)], [*y, y[-1]], where="post", color=BLUE, linewidth=1.8)
    before = ""
    for point, fleet in found:
        at = (point.scale, height(fleet))
        asked = point.scale == 1
        axes.plot(
            *at,
            "o",
            color=ORANGE if asked else BLUE if point.on_front else "white",
            markeredgecolor=ORANGE if asked else BLUE if point.on_front else GREY,
            markersize=9 if asked else 6.5,
            zorder=4 if asked else 3,
        )
        name = " + ".join(pool.slice for pool in fleet.pools)
        if name != before or asked:
            label = f"{name}, as asked" if asked else name
            axes.annotate(label, at, xytext=(6, 8), textcoords="offset points", fontsize=9, color=INK)
        before = name
    for point in front:
        if point.fleet is None:
            axes.plot(point.scale, 0.03 * top, "x", color=ORANGE, markersize=8, markeredgewidth=2)
            axes.annotate(
                "none", (point.scale, 0.03 * top), xytext=(0, 8), textcoords="offset points", ha="center", fontsize=9
            )
    axes.set_xscale("log")
    axes.set_xticks(scales, [f"{scale:g}×" for scale in scales], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_xlim(0.88 * min(scales), 1.45 * max(scales))
    axes.set_ylim(0, 1.18 * top)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if top >= 10 else f"{value:g}")
    axes.set_xlabel("every limit, times what was asked", color=MUTED)
    axes.set_ylabel("USD per hour" if priced else "chips", color=MUTED)
