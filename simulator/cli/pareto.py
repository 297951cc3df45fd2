"""``chipseconds pareto``: latency against throughput of decoding, over the batch."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from simulator.cli.costs import cost_options, costs
from simulator.cli.output import json_option, note, print_json, print_table
from simulator.errors import InfeasibleError, InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from simulator.roofline.deployment import Deployment
    from simulator.roofline.sweep import DecodeCurve


@click.command()
@click.option("--model", required=True, help="Catalogue name, or a path to a model TOML or Hugging Face config.json.")
@click.option("--slice", "slices", required=True, help="One or several, by commas: tpu-v5e:4x4,tpu-v5e:8x8.")
@click.option("--precision", default="bf16", show_default=True, help="One or several: w8a16kv8,int8kv8.")
@click.option("--quantize-head", is_flag=True, help="Hold embedding and output head in the weights' format too.")
@click.option("--contexts", default="2k,8k,32k", show_default=True, help="Tokens per sequence; k is 1024.")
@click.option(
    "--max-num-seqs", type=click.IntRange(1, 65536), default=256, show_default=True, help="vLLM's; the largest batch."
)
@click.option(
    "--efficiency",
    type=click.Choice(["default", "ideal", "textbook"]),
    default="default",
    show_default=True,
    help="The chip's fractions and overheads; the bare datasheet; or that with weights and KV reads alone.",
)
@click.option("--gpu-memory-utilization", type=float, default=0.9, show_default=True, help="vLLM's setting.")
@click.option("--layout", default="1d", show_default=True, help="Of weights on a torus: 1d, 2d, 2d-x, gathered-xyz …")
@cost_options
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw it: FILE.png, .svg or .pdf.")
@json_option
def pareto(plot: Path | None, as_json: bool, **options: Any) -> None:
    """Latency per token against throughput per chip, over the batch, for each context length.

    \b
    chipseconds pareto --model llama-3-70b --slice tpu-v5e:4x4 --precision w8a16kv8 --plot pareto.png
    chipseconds pareto --model llama-3-70b --slice h100-sxm:4,h100-sxm:8 --precision bf16,fp8 --contexts 8k

    Decode steps only: every sequence has the context's length and gets one token per step. With several slices or
    precisions, also the best of them within each latency.
    """
    from simulator.roofline.sweep import decode_curves

    if plot is not None:
        from simulator.report.figures import check_figure_path

        check_figure_path(plot)
    contexts = counts("--contexts", options["contexts"])
    deployments = _deployments(options)
    groups = [decode_curves(d, contexts) for d in deployments]
    if as_json:
        print_json(document(groups))
    if not any(curve.largest for curves in groups for curve in curves):
        raise InfeasibleError(
            "pareto: not one sequence fits in memory; `chipseconds fit` lists the slices that hold it"
        )
    if not as_json:
        for curves in groups:
            _print_curves(curves)
        if len(groups) > 1:
            _print_best(groups)
    if plot is not None:
        from simulator.report.figures import save_figure
        from simulator.report.pareto_plot import draw_pareto

        save_figure(lambda: draw_pareto([curve for curves in groups for curve in curves]), plot)
        note(f"plot written to {plot}")


def counts(option: str, text: str) -> list[int]:
    """Whole numbers by commas, each once; ``k`` is 1024 and ``M`` 1024².

    >>> counts("--contexts", "2k,5000,1M")
    [2048, 5000, 1048576]
    """
    found = []
    for word in text.split(","):
        number = word.strip()
        factor = {"k": 1024, "m": 1024**2}.get(number[-1:].lower(), 1)
        digits = number[:-1] if factor > 1 else number
        if not (digits.isascii() and digits.isdigit() and 1 <= int(digits) * factor <= 2**40):
            raise InputError(f"{option} {text!r}: {word!r} is not a whole number from 1; write e.g. 2k,8192,32k")
        found.append(int(digits) * factor)
    return list(dict.fromkeys(found))


def words(option: str, text: str) -> list[str]:
    """Words by commas, each once."""
    found = [word.strip() for word in text.split(",")]
    if not all(found):
        raise InputError(f"{option} {text!r}: an empty entry; separate entries by single commas")
    return list(dict.fromkeys(found))


def _deployments(options: dict[str, Any]) -> "list[Deployment]":
    from simulator.catalog.chips import IDEAL
    from simulator.catalog.models import load_model
    from simulator.catalog.slices import resolve_slice
    from simulator.roofline.deployment import Deployment
    from simulator.roofline.precision import parse_precision
    from simulator.roofline.variants import textbook

    model = load_model(options["model"])
    found = [
        Deployment(
            architecture=model,
            slice=resolve_slice(spec),
            precision=parse_precision(precision, quantize_head=options["quantize_head"]),
            efficiency=None if options["efficiency"] == "default" else IDEAL,
            max_num_seqs=options["max_num_seqs"],
            max_num_batched_tokens=max(8192, options["max_num_seqs"]),
            gpu_memory_utilization=options["gpu_memory_utilization"],
            layout=options["layout"],
            **costs(options),
        )
        for spec in words("--slice", options["slices"])
        for precision in words("--precision", options["precision"])
    ]
    return [textbook(d) for d in found] if options["efficiency"] == "textbook" else found


def document(groups: "Sequence[Sequence[DecodeCurve]]") -> dict[str, Any]:
    """Every curve at every batch, as one JSON document; units are in the keys."""
    from simulator.roofline.memory import memory_fit

    return {
        "model": groups[0][0].deployment.architecture.name,
        "deployments": [
            {
                "slice": d.slice.spec,
                "chips": d.chips,
                "precision": d.precision.name,
                "efficiency": d.eff.constants | {"kernels_of": d.eff.curves.chip if d.eff.curves else None},
                "kv_capacity_tokens": memory_fit(d).kv_tokens,
                "curves": [
                    {
                        "context_tokens": c.context,
                        "max_batch_in_memory": c.max_batch,
                        "batch": c.sweep.batch,
                        "latency_per_token_s": c.sweep.step_s,
                        "tokens_per_s_per_chip": c.sweep.tokens_per_s_per_chip,
                        "fits": c.sweep.fits,
                    }
                    for c in curves
                ],
                "notes": list(d.notes),
            }
            for curves in groups
            for d in [curves[0].deployment]
        ],
    }


def _print_curves(curves: "Sequence[DecodeCurve]") -> None:
    """One deployment: a row per batch, two columns per context."""
    from simulator.report.pareto_plot import context_text
    from simulator.roofline.sweep import batch_ladder

    d = curves[0].deployment
    batches = sorted({b for c in curves if c.largest for b in batch_ladder(c.largest)})
    columns = ["batch"]
    for c in curves:
        columns += [f"{context_text(c.context)} ms", "tok/s/chip"]
    rows = []
    for batch in batches:
        row = [f"{batch}"]
        for c in curves:
            if batch <= c.largest:
                rate = float(c.sweep.tokens_per_s_per_chip[batch - 1])
                row += [f"{1e3 * float(c.sweep.step_s[batch - 1]):,.2f}", f"{rate:,.1f}"]
            else:
                row += ["–", "–"]
        rows.append(row)
    click.echo(
        f"{d.architecture.name} in {d.precision.name} on {d.slice.spec} (tp {d.chips}): latency per token of decode"
    )
    print_table("", columns, rows)
    limits = ", ".join(f"{c.max_batch:,} of {context_text(c.context)}" for c in curves)
    click.echo(f"\nthe KV cache holds {limits}; a step at most {d.max_num_seqs}")
    for line in d.notes:
        click.echo(f"note: {line}")
    click.echo()


def _print_best(groups: "Sequence[Sequence[DecodeCurve]]") -> None:
    """Several deployments: who gives most per chip within each latency."""
    from simulator.report.pareto_plot import context_text

    by_context = list(zip(*groups, strict=True))
    shortest = min((float(c.sweep.step_s[0]) for g in groups for c in g if c.largest), default=math.inf)
    rows: list[list[str]] = []
    for goal_s in (m * 10.0**e for e in range(-5, 3) for m in (1, 2, 5)):
        cells = [_best_within(curves, goal_s) for curves in by_context]
        if goal_s >= shortest and cells != (rows[-1][1:] if rows else None):
            rows.append([f"{1e3 * goal_s:g} ms", *cells])
    click.echo("Most tokens/s/chip within a latency per token")
    print_table(
        "",
        ["within", *(f"{context_text(c[0].context)} context" for c in by_context)],
        rows,
    )


def _best_within(curves: "Sequence[DecodeCurve]", goal_s: float) -> str:
    best, text = 0.0, "–"
    for c in curves:
        n = int((c.sweep.step_s[: c.largest] <= goal_s).sum())  # a step grows with its batch
        if n and float(c.sweep.tokens_per_s_per_chip[:n].max()) > best:
            i = int(c.sweep.tokens_per_s_per_chip[:n].argmax())
            best = float(c.sweep.tokens_per_s_per_chip[i])
            text = f"{best:,.1f} {c.deployment.slice.spec} {c.deployment.precision.name}, batch {i + 1}"
    return text
