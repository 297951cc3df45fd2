"""More views of a step for ``chipseconds roofline``: what if the hardware were different, and bars of many steps."""

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from simulator.cli.output import print_table
from simulator.cli.pareto import counts, words
from simulator.errors import InputError
from simulator.units import format_si

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from simulator.roofline.analysis import StepReport
    from simulator.roofline.intervals import StepIntervals
    from simulator.roofline.mtp import MtpStep
    from simulator.roofline.variants import WhatIf

#: What "all" asks: every rate doubled, every fixed time halved.
_ALL = "hbm=2,compute=2,link=2,latency=0.5,overhead=0.5"


def mtp_document(mtp: "MtpStep") -> dict[str, Any]:
    """The prediction modules of a step as plain figures; units are in the keys."""
    return {
        "runs": mtp.runs,
        "run_s": mtp.run_s,
        "step_with_mtp_s": mtp.step_s,
        "weights_bytes_per_chip": mtp.weights_bytes,
        "kv_bytes_per_token_per_chip": mtp.kv_bytes_per_token,
        "fits": mtp.memory.fits,
        "kv_capacity_tokens": mtp.memory.kv_tokens,
    }


def print_mtp(mtp: "MtpStep") -> None:
    """Two lines under the report."""
    click.echo(
        f"{'MTP':<16} {mtp.runs} run(s) of {format_si(mtp.run_s, 's')}: {format_si(mtp.step_s, 's')} for step and drafts, "
        "checking them left out"
    )
    click.echo(
        f"{'MTP memory':<16} {mtp.weights_bytes / 1e9:.2f} GB of weights more per chip; KV capacity then "
        f"{mtp.memory.kv_tokens:,} tokens"
    )


def intervals_document(found: "StepIntervals") -> dict[str, Any]:
    """Intervals of a step as plain figures."""
    return vars(found)


def print_intervals(found: "StepIntervals") -> None:
    """Intervals under the report, and what they rest on."""
    from simulator.report.forms import number, percent, seconds, wrapped

    forms: dict[str, tuple[str, Callable[[float | None], str]]] = {
        "step_time_s": ("step time", seconds),
        "chip_seconds": ("chip-seconds", number),
        "tokens_per_s": ("tokens/s", number),
        "mfu": ("MFU", percent),
        "mbu": ("MBU", percent),
    }
    rows = [
        [label, form(f.value), f"{form(f.low)} … {form(f.high)}"]
        for name, (label, form) in forms.items()
        if (f := found.figures[name])
    ]
    shares = found.figures["step_time_s"].shares
    print_table(f"\nparameters: {100 * found.level:g} % of {found.draws} draws", ["", "step", "interval"], rows)
    click.echo(
        f"{'from':<16} " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items()) + " of the variance"
    )
    for text in found.notes:
        click.echo("\n".join(wrapped(text, first=f"{'note':<17}")))


def what_if_rows(report: "StepReport", text: str) -> "list[WhatIf]":
    """The step with the changes of ``knob=factor,…`` or ``all``."""
    from simulator.roofline.variants import what_if

    factors: dict[str, float] = {}
    for word in words("--what-if", _ALL if text.strip() == "all" else text):
        knob, _, factor = word.partition("=")
        try:
            value = float(factor)
        except ValueError:
            raise InputError(f"--what-if {word!r}: write knob=factor, e.g. {_ALL}; or all") from None
        if knob.strip() in factors:
            raise InputError(f"--what-if {text!r}: {knob.strip()} is given twice")
        factors[knob.strip()] = value
    return what_if(report.deployment, report.step, factors)


def print_what_if(report: "StepReport", rows: "Sequence[WhatIf]") -> None:
    """Table of changes: time, speed-up, elasticity."""
    from simulator.roofline.variants import KNOBS

    click.echo("\nWhat if? (rates and fixed times multiplied by a factor)")
    print_table(
        "",
        ["change", "factor", "step time", "speed-up", "elasticity"],
        [
            [
                KNOBS[next(iter(r.factors))] if len(r.factors) == 1 else "all of these",
                f"{next(iter(r.factors.values())):g}" if len(r.factors) == 1 else "",
                format_si(r.time_s, "s"),
                f"{r.speedup:.3f}×",
                "" if math.isnan(r.elasticity) else f"{r.elasticity:+.3f}".replace("-", "−"),
            ]
            for r in rows
        ],
    )
    click.echo(
        f"now {format_si(report.time_s, 's')}; elasticity −0.6: 1 % more saves 0.6 % of the time, for small changes"
    )


def waterfall_steps(report: "StepReport", over: str | None) -> "tuple[str, list[tuple[str, StepReport]]]":
    """What the bars are over, and each bar's label and step.

    Raises
    ------
    InputError
        If ``over`` mixes counts and precisions, or a step is larger than one may be.
    """
    from simulator.roofline.analysis import report as price
    from simulator.roofline.analysis import step_report
    from simulator.roofline.precision import parse_precision

    d, step = report.deployment, report.step
    entries = words("--over", over) if over is not None else []
    if entries and not entries[0][0].isdigit():
        formats = [parse_precision(word, quantize_head=d.precision.quantize_head) for word in entries]
        return "precision", [(f.name, price(replace(d, precision=f), step)) for f in formats]
    size = int(step.B or step.n)
    most = min(d.max_num_batched_tokens, d.max_num_seqs) if step.B else d.max_num_batched_tokens
    if over is not None:
        sizes = counts("--over", over)
    else:
        sizes = sorted({size, *(4**i for i in range(12) if 4**i <= most and (step.B or 4**i >= 64))})
    if max(sizes) > most:
        raise InputError(f"--over {max(sizes)}: more than one step may hold ({most}); raise --max-num-…")
    if step.B:
        context = int(step.S // step.B)
        return "batch", [(f"{n:,}", step_report(d, decode=n, context=context)) for n in sizes]
    past = int(step.K - step.n)
    return "new tokens", [(f"{n:,}", step_report(d, prefill=n, context=n + past)) for n in sizes]


def save_waterfall(steps: "tuple[str, list[tuple[str, StepReport]]]", path: "Path") -> None:
    """Draw the bars into a file."""
    from simulator.report.figures import save_figure
    from simulator.report.step_bars import draw_step_bars

    over, bars = steps
    save_figure(lambda: draw_step_bars(bars, over=over), path)
