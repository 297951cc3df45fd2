"""Pictures of a lifetime study: cost against size, and regret against demand."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from simulator.report.figures import BLUE, GREEN, GREY, INK, MUTED, ORANGE, PINK, SKY, YELLOW, tidy
from simulator.results.lifetime import Lifetime, Optimum

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINES = (BLUE, ORANGE, GREEN, PINK, SKY, YELLOW)


def draw_lifetime(result: Lifetime) -> "Figure":
    """Figure of a study: cost of training, serving and both over model size, and what a wrong forecast costs beside it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_costs(left, result.optima)
    shown = next(optimum for optimum in result.optima if optimum.best is not None)
    draw_regret(right, shown)
    figure.suptitle(
        f"{result.scenario}   ·   {result.quality}", x=0.01, ha="left", fontsize=12, fontweight="bold", color=INK
    )
    return figure


def draw_costs(axes: "Axes", optima: Sequence[Optimum]) -> None:
    """Cost over the life against N, with the optimum marked; of one optimum its parts, of several the totals."""
    tidy(axes)
    drawn = [optimum for optimum in optima if optimum.best is not None]
    scale, unit = _usd(max(o.best.total_usd for o in drawn if o.best is not None))
    for optimum, colour in zip(drawn, LINES, strict=False):
        best = optimum.best
        if best is None:
            continue
        x = [s.parameters / 1e9 for s in optimum.sizes]
        few = "o" if len(x) < 60 else ""
        total = [s.total_usd / scale for s in optimum.sizes]
        answer = f"{best.parameters / 1e9:.3g}B on {best.tokens / 1e12:.3g}T tokens"
        name = "both" if len(drawn) == 1 else f"E2E ≤ {optimum.slo_limit_s:g} s: {answer}"
        axes.plot(x, total, color=colour, linewidth=2.2, marker=few, markersize=3.5, label=name)
        if len(drawn) == 1:
            training = [s.training_usd / scale for s in optimum.sizes]
            serving = [s.serving_usd / scale for s in optimum.sizes]
            axes.set_title(f"least: {answer}", loc="left", fontsize=10, color=INK)
            axes.plot(x, training, color=GREY, linewidth=1.4, label="training")
            axes.plot(x, serving, color=GREEN, linewidth=1.4, marker=few, markersize=3, label="serving")
        at = (best.parameters / 1e9, best.total_usd / scale)
        axes.plot(*at, "o", color=INK, markersize=6, zorder=5)
    if len(drawn) == 1 and drawn[0].chinchilla is not None:
        chinchilla = drawn[0].chinchilla
        axes.axvline(chinchilla.parameters / 1e9, color=MUTED, linewidth=1, linestyle=":")
        axes.annotate(
            "compute-optimal",
            annotation_clip=True,
            xy=(chinchilla.parameters / 1e9, 0.62),
            xycoords=("data", "axes fraction"),
            xytext=(-4, 0),
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=8.5,
            rotation=90,
            color=MUTED,
        )
    top = 4 * max(o.best.total_usd for o in drawn if o.best is not None)
    shown = [s.parameters / 1e9 for o in drawn for s in o.sizes if s.total_usd <= top]
    axes.set_xscale("log")
    ticks = [n * 10.0**e for e in range(-2, 6) for n in (1, 1.5, 2, 3, 5, 7)]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_xlim(0.9 * min(shown), 1.1 * max(shown))
    axes.set_ylim(0, min(top, 1.06 * _largest(drawn)) / scale)
    axes.set_xlabel("parameters [billion]", color=MUTED)
    axes.set_ylabel(f"cost over the life [{unit}]", color=MUTED)
    axes.legend(frameon=False, fontsize=9)


def draw_regret(axes: "Axes", optimum: Optimum) -> None:
    """Cost over that of the best size, for demands that may come true: a line for each choice."""
    tidy(axes)
    x = [row.times for row in optimum.forecasts]
    choices = sorted({c.parameters: c for c in reversed(optimum.choices)}.values(), key=lambda c: c.parameters)
    for choice, colour in zip(choices, (*LINES, GREY), strict=False):
        label = f"{choice.parameters / 1e9:.3g}B: {choice.reason.removeprefix('best for: ')}"
        axes.plot(x, choice.regret, color=colour, linewidth=1.8, marker="o", markersize=4, label=label)
    axes.axhline(1.0, color=MUTED, linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xticks(x, [f"×{times:.3g}" for times in x], minor=False)
    axes.set_xticks([], minor=True)
    worst = max(c.worst_regret for c in choices)
    axes.set_ylim(0.97, min(2.5, 1.04 * worst))
    axes.set_xlabel("demand that comes true ÷ forecast", color=MUTED)
    axes.set_ylabel("cost ÷ least possible", color=MUTED)
    axes.legend(frameon=False, fontsize=8.5)


def _largest(optima: Sequence[Optimum]) -> float:
    return max(size.total_usd for optimum in optima for size in optimum.sizes)


def _usd(value: float) -> tuple[float, str]:
    """Scale and unit for amounts of this size."""
    for scale, unit in ((1e9, "billion USD"), (1e6, "million USD"), (1e3, "thousand USD")):
        if value >= scale:
            return scale, unit
    return 1.0, "USD"
