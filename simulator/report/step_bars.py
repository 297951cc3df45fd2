"""Where the time of steps goes: stacked bars, part by part, over the batch or the precision."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from simulator.report.figures import BLUE, GREEN, GREY, GRID, INK, MUTED, ORANGE, PINK, SKY, YELLOW
from simulator.roofline.analysis import OpReport, StepReport
from simulator.roofline.sweep import max_batch
from simulator.units import format_si

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Parts of a step in the order they are stacked, with their colours.
PARTS = {
    "FFN, experts": BLUE,
    "attention projections": SKY,
    "attention over the cache": ORANGE,
    "norms, rotary, KV writes": YELLOW,
    "collectives": GREEN,
    "embedding and head": PINK,
    "overheads": GREY,
}


def part_of(row: OpReport) -> str:
    """The part an op's time belongs to, its launch overheads aside."""
    op, name = row.op, row.op.name.lower()
    if op.kind == "collective":
        return "collectives"
    if op.kind == "overhead":
        return "overheads"
    if op.kind == "attention":
        return "attention over the cache"
    if any(word in name for word in ("embedding", "head", "sampling")):
        return "embedding and head"
    if any(word in name for word in ("ffn", "expert", "route")):
        return "FFN, experts"
    return "attention projections" if op.kind == "matmul" else "norms, rotary, KV writes"


def step_parts(report: StepReport) -> dict[str, tuple[float, float]]:
    """Time of each part: (bound by loading weights or KV from HBM, everything else). Sums to the step's time. [s]"""
    parts = {part: [0.0, 0.0] for part in PARTS}
    for row in report.ops:
        overhead_s = float(row.op.overhead_s)
        loads = row.op.kind in {"matmul", "attention"} and float(row.op.memory_s) > float(row.op.compute_s)
        parts[part_of(row)][0 if loads else 1] += row.time_s - overhead_s
        parts["overheads"][1] += overhead_s
    return {part: (loaded, other) for part, (loaded, other) in parts.items()}


def draw_step_bars(bars: Sequence[tuple[str, StepReport]], *, over: str) -> "Figure":
    """Figure of one bar per step, stacked by part; hatched where loading from HBM is what takes the time.

    Parameters
    ----------
    bars
        (label, step), left to right.
    over
        what the labels are: the title of the axis.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    first = bars[0][1]
    figure = Figure(figsize=(max(9.0, 4.2 + 1.05 * len(bars)), 6.0), layout="constrained")
    axes = figure.add_subplot()
    parts = [step_parts(report) for _, report in bars]
    longest = max(report.time_s for _, report in bars)
    scale, unit = (1e3, "ms") if longest < 10 else (1.0, "s")
    with rc_context({"hatch.linewidth": 1.1}):
        for i, (part, colour) in enumerate(PARTS.items()):
            for x, found in enumerate(parts):
                below = scale * sum(sum(found[p]) for p in list(PARTS)[:i])
                loaded, other = (scale * s for s in found[part])
                for height, bottom, hatch in ((loaded, below, "////"), (other, below + loaded, "")):
                    axes.bar(
                        x,
                        height,
                        0.72,
                        bottom,
                        color=colour,
                        hatch=hatch,
                        edgecolor=(1, 1, 1, 0.5),
                        linewidth=0,
                        zorder=3,
                    )
    axes.set_ylim(0, scale * longest * 1.17)
    for x, (_, report) in enumerate(bars):
        _total(axes, x, report, scale)
    axes.set_xticks(range(len(bars)), [label for label, _ in bars])
    axes.set_xlim(-0.6, len(bars) - 0.4)
    axes.set_xlabel(over, fontsize=11, color=INK)
    axes.set_ylabel(f"time of a step  [{unit}]", fontsize=11, color=INK)
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:,g}")
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#9AA5B1")
    axes.tick_params(length=0, labelsize=10, labelcolor=MUTED)
    used = [p for p in PARTS if any(sum(found[p]) > 2e-3 * longest for found in parts)]
    handles = [Patch(facecolor=PARTS[p], label=p) for p in reversed(used)]
    handles.append(Patch(facecolor="#CBD2D9", edgecolor="white", hatch="////", label="loading weights or cache"))
    figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=10)
    figure.suptitle(_title(first, bars), x=0.01, ha="left", fontsize=15, fontweight="bold", color=INK)
    return figure


def _title(first: StepReport, bars: Sequence[tuple[str, StepReport]]) -> str:
    d, step = first.deployment, first.step
    words = [d.architecture.name]
    if len({r.deployment.precision.name for _, r in bars}) == 1:
        words.append(f"in {d.precision.name}")
    words.append(f"on {d.slice.spec}:")
    same = len({r.step for _, r in bars}) == 1
    if step.B:
        words.append(f"decode of {step.B:g} at context {step.S / step.B:,.0f}" if same else "decode")
        if not same:
            words.append(f"at context {step.S / step.B:,.0f}")
    else:
        words.append(f"prefill of {step.n:,.0f} tokens" if same else "prefill")
    return " ".join(words)


def _total(axes: "Axes", x: int, report: StepReport, scale: float) -> None:
    """Step time, what it gives and whether it fits, on top of a bar."""
    rate = report.tokens_per_s_per_chip
    lines = [(f"{rate:,.0f} tok/s/chip" if rate >= 100 else f"{rate:.3g} tok/s/chip", 8.0, "normal", MUTED)]
    if not step_fits(report):
        lines.append(("memory full", 8.0, "normal", ORANGE))
    lines.append((format_si(report.time_s, "s"), 10.0, "bold", INK))
    for i, (text, size, weight, colour) in enumerate(lines):
        axes.annotate(
            text,
            (x, scale * report.time_s),
            xytext=(0, 5 + 12 * i),
            textcoords="offset points",
            ha="center",
            fontsize=size,
            fontweight=weight,
            color=colour,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            zorder=2,
        )


def step_fits(report: StepReport) -> bool:
    """Whether the KV cache holds the sequences of a step, all of the same length."""
    sequences = int(report.step.B + report.step.P)
    longest = -(-int(report.step.S + report.step.K) // max(sequences, 1))
    return sequences <= int(max_batch(report.memory, longest))
