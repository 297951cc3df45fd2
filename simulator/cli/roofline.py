"""``chipseconds roofline``: what one step costs, op by op, and what bounds it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from simulator.cli.costs import cost_options, costs, price_of, price_options
from simulator.cli.output import json_option, note, print_json, print_table
from simulator.errors import InfeasibleError, InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from simulator.economics import ChipPrice
    from simulator.roofline.analysis import StepReport
    from simulator.roofline.deployment import Deployment
    from simulator.roofline.ops import Number


@click.command()
@click.option("--model", required=True, help="Catalogue name, or a path to a model TOML or Hugging Face config.json.")
@click.option(
    "--slice", "slice_spec", required=True, help="Chips and topology: tpu-v5e:4x4, h100-sxm:8, h100-sxm:2x8 …"
)
@click.option("--precision", default="bf16", show_default=True, help="bf16, fp8, w8a16kv8, w4a16kv8g32 …")
@click.option("--quantize-head", is_flag=True, help="Hold embedding and output head in the weights' format too.")
@click.option("--tp", type=int, help="Tensor-parallel degree; all chips of the slice by default.")
@click.option("--pp", type=int, help="Pipeline stages; the other chips are tensor-parallel unless --tp says otherwise.")
@click.option("--shard", "sharding", help="How the model lies on the slice: tp8pp2, tp4dp2 …, or auto: try them all.")
@click.option(
    "--objective",
    type=click.Choice(["latency", "throughput"]),
    help="What --shard auto looks for: least time (default), or most tokens per second and chip.",
)
@click.option("--micro-batches", type=click.IntRange(min=1), help="Batches in flight in a pipeline; one per stage.")
@click.option("--prefill", type=click.IntRange(min=1), help="Price a prefill of this many new tokens.")
@click.option("--decode", type=click.IntRange(min=1), help="Price a decode step of this many sequences.")
@click.option(
    "--context",
    type=click.IntRange(min=1),
    help="Length at the end of the step, new tokens included. Default for --prefill: nothing cached.",
)
@click.option(
    "--efficiency",
    type=click.Choice(["default", "ideal"]),
    default="default",
    show_default=True,
    help="The chip's fractions and overheads, or the bare datasheet.",
)
@click.option(
    "--layout", help="Where weights are on a torus: 1d (default), 2d, gathered, or with axes: 2d-x, gathered-xyz."
)
@click.option("--looped-exchange", is_flag=True, help="2d layouts exchange in pieces inside their products.")
@click.option(
    "--kv-layout",
    type=click.Choice(["heads", "even", "batch"]),
    help="KV cache over heads (default), evenly, or whole sequences on chips.",
)
@cost_options
@price_options
@click.option("--mtp", type=click.IntRange(min=1), help="Runs of the model's MTP modules after a decode step.")
@click.option("--max-num-seqs", type=int, help="vLLM's setting. Default: 256, or the batch if larger.")
@click.option("--max-num-batched-tokens", type=int, help="vLLM's setting. Default: 8192, or the step if larger.")
@click.option("--gpu-memory-utilization", type=float, default=0.9, show_default=True, help="vLLM's setting.")
@click.option(
    "--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw a roofline plot: FILE.png, .svg or .pdf."
)
@click.option(
    "--waterfall",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Draw where the time of steps goes, part by part, over --over.",
)
@click.option(
    "--over", help="For --waterfall: batches (tokens of a prefill) or precisions, by commas. Default: batches."
)
@click.option(
    "--what-if", "what_if_", help="Factors, by commas: hbm=2,compute=2,link=2,latency=0.5,overhead=0.5; or all."
)
@click.option(
    "--interval",
    type=float,
    metavar="PERCENT",
    help="Interval of the step's time over draws of what the chip's calibration leaves open.",
)
@json_option
def roofline(plot: Path | None, waterfall: Path | None, interval: float | None, as_json: bool, **options: Any) -> None:
    """What one prefill or decode step costs, op by op, and what bounds it.

    \b
    chipseconds roofline --model llama-3-70b --slice tpu-v5e:4x4 --precision w8a16kv8 --decode 32 --context 8192
    chipseconds roofline --model llama-3-8b --slice h100-sxm:1 --prefill 2048 --plot prefill.png
    chipseconds roofline --model llama-3-70b --slice h100-sxm:2x8 --shard auto --decode 64 --context 8192
    chipseconds roofline --model llama-3-8b --slice h100-sxm:1 --decode 64 --context 4096 --interval 80
    chipseconds roofline … --what-if hbm=2,link=2 --waterfall steps.png --over 1,8,64

    Figures are per chip unless they say otherwise. A deployment that does not fit is priced all the same, and the
    command ends with exit code 1.
    """
    from simulator.cli.roofline_views import (
        intervals_document,
        mtp_document,
        print_intervals,
        print_mtp,
        print_what_if,
        save_waterfall,
        waterfall_steps,
        what_if_rows,
    )
    from simulator.roofline.analysis import step_report
    from simulator.roofline.memory import require_fit
    from simulator.roofline.mtp import mtp_step

    for figure in (plot, waterfall):
        if figure is not None:
            from simulator.report.figures import check_figure_path

            check_figure_path(figure)
    if interval is not None:
        _check_interval(interval, options)
    if options["over"] is not None and waterfall is None:
        raise InputError(f"--over {options['over']}: only with --waterfall")
    if any(options[name] is not None for name in ("pp", "sharding", "objective", "micro_batches")):
        from simulator.cli.sharded import sharded_roofline

        views = {"plot": plot, "waterfall": waterfall, "what-if": options["what_if_"], "mtp": options["mtp"]}
        views["interval"] = interval
        for name, value in views.items():
            if value is not None:
                raise InputError(f"--{name} is for one replica on the whole slice; leave --shard and --pp out")
        sharded_roofline(options, as_json=as_json)
        return
    deployment = _deployment(options)
    price = price_of(deployment.slice.chip, options["price_file"], options["term"])
    prefill, decode, context = options["prefill"], options["decode"], options["context"]
    for name, size, limit in (
        ("prefill", prefill, deployment.max_num_batched_tokens),
        ("decode", decode, min(deployment.max_num_seqs, deployment.max_num_batched_tokens)),
    ):
        if size is not None and size > limit:
            raise InputError(f"--{name} {size}: more than one step may hold ({limit}); raise --max-num-… or drop it")
    report = step_report(deployment, prefill=prefill, decode=decode, context=context)
    mtp = mtp_step(report, options["mtp"]) if options["mtp"] is not None else None
    changes = what_if_rows(report, options["what_if_"]) if options["what_if_"] is not None else []
    steps = waterfall_steps(report, options["over"]) if waterfall is not None else None
    intervals = None
    if interval is not None:
        from simulator.roofline.intervals import step_intervals

        intervals = step_intervals(report, level=interval)
    if as_json:
        extra: dict[str, Any] = {} if mtp is None else {"mtp": mtp_document(mtp)}
        extra |= {"price": price_document(price, report.tokens_per_s_per_chip)}
        if intervals is not None:
            extra["intervals"] = intervals_document(intervals)
        print_json(document(report) | {"what_if": [vars(change) for change in changes]} | extra)
    else:
        print_report(report)
        print_price(price, report.tokens_per_s_per_chip)
        if mtp is not None:
            print_mtp(mtp)
        if changes:
            print_what_if(report, changes)
        if intervals is not None:
            print_intervals(intervals)
    if steps is not None and waterfall is not None:
        save_waterfall(steps, waterfall)
        note(f"waterfall written to {waterfall}")
    if plot is not None:
        from simulator.report.roofline_plot import save_roofline_plot

        save_roofline_plot(report, plot)
        note(f"plot written to {plot}")
    require_fit(deployment)
    if mtp is not None and not mtp.memory.fits:
        raise InfeasibleError(
            f"{deployment.architecture.name} fits on {deployment.slice.spec}, but not with its MTP modules: they take "
            f"{mtp.weights_bytes / 1e9:.2f} GB more on each chip; a larger slice, or no --mtp"
        )


def _check_interval(interval: float, options: dict[str, Any]) -> None:
    from simulator.roofline.intervals import check_level

    check_level(interval)
    if options["mtp"] is not None:
        raise InputError("--interval: drafts of --mtp are not drawn again; leave one of them out")
    if options["efficiency"] == "ideal":
        raise InputError(
            "--interval: with --efficiency ideal the datasheet is taken as it stands; leave one of them out"
        )


def _deployment(options: dict[str, Any]) -> "Deployment":
    from simulator.catalog.chips import IDEAL
    from simulator.catalog.models import load_model
    from simulator.catalog.slices import resolve_slice
    from simulator.roofline.deployment import Deployment
    from simulator.roofline.precision import parse_precision

    tokens = max(options["prefill"] or 0, options["decode"] or 0)
    seqs = options["max_num_seqs"] or max(256, options["decode"] or 0)
    return Deployment(
        architecture=load_model(options["model"]),
        slice=resolve_slice(options["slice_spec"]),
        precision=parse_precision(options["precision"], quantize_head=options["quantize_head"]),
        tp=options["tp"],
        efficiency=IDEAL if options["efficiency"] == "ideal" else None,
        max_num_seqs=seqs,
        max_num_batched_tokens=options["max_num_batched_tokens"] or max(8192, tokens),
        gpu_memory_utilization=options["gpu_memory_utilization"],
        kv_layout=options["kv_layout"] or "heads",
        layout=options["layout"] or "1d",
        **costs(options),
    )


def document(report: "StepReport") -> dict[str, Any]:
    """The report as one JSON document; units are in the keys."""
    d, fit = report.deployment, report.memory
    return {
        "model": d.architecture.name,
        "slice": d.slice.spec,
        "chips": d.chips,
        "precision": {
            "name": d.precision.name,
            "weights": d.precision.weights,
            "activations": d.precision.activations,
            "kv": d.precision.kv,
            "computes_in": d.compute_dtype,
        },
        "layout": {
            "asked": d.layout,
            "laid": "1d" if d.axis_split is None else str(d.axis_split.layout),
            "d_model_chips": d.model_chips,
            "column_chips": d.column_chips,
            "gathered_chips": d.gathered_chips,
        },
        "kv_layout": d.kv_layout,
        "efficiency": d.eff.constants | {"kernels_of": d.eff.curves.chip if d.eff.curves else None},
        "step": vars(report.step),
        "step_time_s": report.time_s,
        "roofline_bound_s": report.roofline_s,
        "bound": report.bound,
        "time_by_bound_s": report.bound_s,
        "tokens_per_s": report.tokens_per_s,
        "tokens_per_s_per_chip": report.tokens_per_s_per_chip,
        "chip_seconds": report.time_s * d.chips,
        "mfu": report.mfu,
        "mbu": report.mbu,
        "model_flops": report.model_flops,
        "required_bytes": report.required_bytes,
        "intensity_flops_per_byte": report.intensity_flops_per_byte,
        "critical_batch_tokens": report.critical_batch,
        "memory_per_chip": {
            "capacity_bytes": fit.capacity_bytes,
            "usable_bytes": fit.usable_bytes,
            "weights_bytes": fit.weights_bytes,
            "activations_bytes": fit.activations_bytes,
            "workspace_bytes": fit.workspace_bytes,
            "kv_bytes": max(fit.kv_bytes, 0.0),
            "kv_bytes_per_token": fit.kv_bytes_per_token,
        },
        "fits": fit.fits,
        "kv_capacity_tokens": fit.kv_tokens,
        "kv_capacity_blocks": fit.kv_blocks,
        "block_size_tokens": fit.block_size,
        "ops_per_chip": [
            {
                "op": row.op.name,
                "kind": row.op.kind,
                "count": row.op.count,
                "dtype": row.dtype,
                "flops": row.op.flops,
                "weight_bytes": row.op.weight_bytes,
                "kv_read_bytes": row.op.kv_read_bytes,
                "kv_write_bytes": row.op.kv_write_bytes,
                "activation_bytes": row.op.activation_bytes,
                "communication_bytes": row.op.comm_bytes,
                "compute_s": row.op.compute_s,
                "memory_s": row.op.memory_s,
                "network_s": row.op.network_s,
                "overhead_s": row.op.overhead_s,
                "time_s": row.time_s,
                "share": row.share,
                "bound": row.bound,
            }
            for row in report.ops
        ],
        "notes": list(d.notes),
    }


def print_report(report: "StepReport") -> None:
    """Op table, then the step in a few lines."""
    from simulator.units import format_si

    d, step, fit, t = report.deployment, report.step, report.memory, report.time_s
    what = (
        f"decode step of {step.B:g} at context {step.S / step.B:,.0f}"
        if step.B
        else f"prefill of {step.n:,.0f} tokens, {step.K - step.n:,.0f} cached"
    )
    figures: dict[str, list[Number]] = {
        "FLOP": [row.op.flops for row in report.ops],
        "weight B": [row.op.weight_bytes for row in report.ops],
        "KV B": [row.op.kv_read_bytes + row.op.kv_write_bytes for row in report.ops],
        "act. B": [row.op.activation_bytes for row in report.ops],
        "link B": [row.op.comm_bytes for row in report.ops],
        "time s": [row.time_s for row in report.ops],
    }
    largest: dict[str, float] = {}  # by unit: columns in bytes share their prefix
    for title, values in figures.items():
        largest[title[-1]] = max(largest.get(title[-1], 0.0), *map(float, values))
    titles, columns = zip(*(_column(t, v, largest[t[-1]]) for t, v in figures.items()), strict=True)
    rows = [
        [row.op.name, str(row.op.count), *cells, f"{row.share:.1%}", row.bound]
        for row, *cells in zip(report.ops, *columns, strict=True)
    ]
    print_table(
        f"{d.architecture.name} in {d.precision.name} on {d.slice.spec} (tp {d.chips}): {what}",
        ["per chip", "count", *titles, "share", "bound"],
        rows,
    )
    parts = ", ".join(f"{bound} {s / t:.0%}" for bound, s in report.bound_s.items() if s / t >= 0.005)
    gb = [x / 1e9 for x in (fit.weights_bytes, fit.activations_bytes, fit.workspace_bytes)]
    memory = f"weights {gb[0]:.2f} + activations {gb[1]:.2f} + workspace {gb[2]:.2f} of {fit.usable_bytes / 1e9:.2f} GB"
    capacity = f"{fit.kv_tokens:,} tokens in {fit.kv_blocks:,} blocks" if fit.fits else "does not fit"
    lines = {
        "step time": f"{format_si(t, 's')}, at best {format_si(report.roofline_s, 's')} if everything overlapped",
        "bound by": f"{report.bound}: {parts}",
        "tokens/s": f"{report.tokens_per_s:,.0f}, per chip {report.tokens_per_s_per_chip:,.1f}",
        "utilisation": f"MFU {report.mfu:.1%} of {d.compute_dtype} peak, MBU {report.mbu:.1%} of HBM bandwidth",
        "intensity": f"{report.intensity_flops_per_byte:,.1f} FLOP/byte",
        "critical batch": f"{report.critical_batch:,.0f} tokens per step make the linear layers compute-bound",
        "memory per chip": memory,
        "KV capacity": f"{capacity}, {format_si(fit.kv_bytes_per_token, 'B')} per token on each chip",
    }
    click.echo()
    for name, text in lines.items():
        click.echo(f"{name:<16} {text}")
    for line in d.notes:
        click.echo(f"{'note':<16} {line}")


def price_document(price: "ChipPrice | None", tokens_per_s_per_chip: float) -> dict[str, Any] | None:
    """What the tokens of such steps cost, back to back; None without a price."""
    from simulator.economics import chip_seconds_usd

    if price is None:
        return None
    return {
        "usd_per_chip_hour": price.usd_per_chip_hour,
        "source": price.text,
        "per_million_tokens_usd": chip_seconds_usd(1e6 / tokens_per_s_per_chip, price.usd_per_chip_hour),
    }


def print_price(price: "ChipPrice | None", tokens_per_s_per_chip: float) -> None:
    """The same in one line."""
    found = price_document(price, tokens_per_s_per_chip)
    if price is not None and found is not None:
        quoted = ", ".join(filter(None, (price.term, price.provider if price.owned is None else "", price.date)))
        text = f"${found['per_million_tokens_usd']:.3g} per M tokens at ${price.usd_per_chip_hour:.4g} per chip-hour"
        click.echo(f"{'price':<16} {text}: {quoted}")


def _column(title: str, values: "Sequence[Number]", largest: float) -> tuple[str, list[str]]:
    """Title with the SI prefix that suits ``largest``, and the values: three digits, a dash for nothing."""
    prefixes = {"µ": 1e-6, "m": 1e-3, "": 1.0} if title.endswith("s") else {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
    prefix = next((p for p, f in prefixes.items() if largest < 1e5 * f), list(prefixes)[-1])
    *words, unit = title.split(" ")
    cells = ["–" if v == 0 else _three_digits(float(v) / prefixes[prefix]) for v in values]
    return " ".join([*words, f"{prefix}{unit}"]), cells


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}" if value >= 0.001 else "0.00"
