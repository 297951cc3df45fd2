"""``chipseconds roofline``: what one step costs, op by op, and what bounds it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from simulator.cli.costs import cost_options, costs, price_of, price_options
from simulator.cli.output import json_option, note, print_json
from simulator.cli.step_text import document, price_document, print_price, print_report
from simulator.errors import InfeasibleError, InputError

if TYPE_CHECKING:
    from simulator.roofline.deployment import Deployment


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
