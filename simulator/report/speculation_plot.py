"""The worth of speculative decoding over the batch."""

from typing import TYPE_CHECKING

import numpy as np

from simulator.report.figures import BLUE, GREEN, GRID, INK, MUTED, ORANGE, PINK, SKY, YELLOW
from simulator.report.pareto_plot import context_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from simulator.run.speculation_view import SpeculationView

COLOURS = (SKY, GREEN, YELLOW, PINK, ORANGE)


def draw_speculation(view: "SpeculationView") -> "Figure":
    """Speed-up over the batch: a line per draft length, the best of them as a broad pale line, the engine's runs as dots."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 6.0), layout="constrained")
    axes = figure.add_subplot()
    x = view.batches
    best = view.gains[view.best, np.arange(len(x))]
    axes.plot(x, best, color="#FCE588", linewidth=11, solid_capstyle="round", zorder=1, label="as many drafts as pay")
    axes.axhline(1, color=MUTED, linewidth=1, linestyle=":", zorder=1)
    top = len(view.gains) - 1
    shown = sorted({1, (top + 1) // 2, top} - {0})
    for i, level in enumerate(shown):
        colour = BLUE if level == top else COLOURS[i % len(COLOURS)]
        axes.plot(x, view.gains[level], color=colour, linewidth=2.4, zorder=3, label=view.labels[level])
    if view.simulated:
        clients, fixed, adaptive = (np.array(column) for column in zip(*view.simulated, strict=True))
        axes.plot(clients, fixed, "o", color="white", markeredgecolor=BLUE, markeredgewidth=2, markersize=8, zorder=5)
        axes.plot(clients, adaptive, "o", color=INK, markersize=4.5, zorder=6)
    if view.largest < x[-1]:
        axes.axvline(view.largest, color=ORANGE, linewidth=1.2, linestyle=(0, (3, 2)), zorder=2)
        axes.annotate(
            "KV cache full", (view.largest, 0.02), xycoords=("data", "axes fraction"), color=ORANGE, fontsize=9
        )
    axes.set_xscale("log", base=2)
    axes.set(xlim=(0.93, x[-1] * 1.07), ylim=(0, float(np.nanmax(view.gains)) * 1.1))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("sequences that decode", fontsize=11, color=INK)
    axes.set_ylabel("tokens per second, with ÷ without", fontsize=11, color=INK)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9AA5B1")
    axes.tick_params(length=0, labelsize=10, labelcolor=MUTED)
    axes.legend(loc="upper right", fontsize=9.5, framealpha=0.9, edgecolor="none")
    d, o = view.deployment, view.options
    drafter = o.model or {"eagle": "an EAGLE head", "mtp": "MTP modules", "medusa": "Medusa heads"}.get(
        o.method, "n-grams"
    )
    figure.suptitle(
        f"{d.architecture.name} on {d.slice.spec}, drafted by {drafter}",
        x=0.01,
        ha="left",
        fontsize=15,
        fontweight="bold",
        color=INK,
    )
    dots = "; rings: simulated with the longest drafts, dots: with as many as pay" if view.simulated else ""
    figure.supxlabel(
        f"{view.tokens_per_pass[-1]:.2f} tokens per pass at {view.labels[-1]}; every sequence at {context_text(view.context)} "
        f"of context{dots}",
        x=0.01,
        ha="left",
        fontsize=9,
        color=MUTED,
    )
    return figure
