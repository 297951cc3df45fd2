"""``chipseconds speculation``: what speculative decoding is worth at each batch."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from simulator.cli.output import json_option, note, print_json, print_table

if TYPE_CHECKING:
    from simulator.run.speculation_view import SpeculationView

METHODS = ("draft_model", "eagle", "mtp", "medusa", "ngram")
LADDER = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@click.command()
@click.option("--model", required=True, help="Catalogue name, or a path to a model TOML or Hugging Face config.json.")
@click.option("--slice", "slice_", required=True, help="Slice of the model, and of the drafter.")
@click.option(
    "--shard", "sharding", help="How the model lies on the slice: tp2dp4ep8 …; batches are then those of a rank."
)
@click.option("--precision", default="bf16", show_default=True)
@click.option("--method", type=click.Choice(METHODS), required=True, help="Who drafts.")
@click.option("--draft-model", help="For --method draft_model.")
@click.option("--draft-slice", help="Slice of its own for the draft model.")
@click.option("--tokens", type=click.IntRange(1, 64), help="Drafts per pass.")
@click.option("--tree", help="Draft nodes at each depth instead: 4,8,8,4.")
@click.option("--acceptance", required=True, help="Rate, 0.8; or the rate at each position, 0.85,0.8,0.7.")
@click.option("--spread", type=float, help="Standard deviation of the rate between requests.")
@click.option("--context", type=click.IntRange(min=1), default=2048, show_default=True, help="Tokens per sequence.")
@click.option("--max-num-seqs", type=click.IntRange(1, 4096), default=256, show_default=True)
@click.option("--simulate", "simulates", is_flag=True, help="Run the engine as well, with 1, 4, 16 … clients.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Draw it: FILE.png, .svg or .pdf.")
@json_option
def speculation(plot: Path | None, as_json: bool, **options: Any) -> None:
    """Tokens per second with speculative decoding over those without, for every batch and draft length.

    \b
    chipseconds speculation --model llama-3-70b --slice h100-sxm:8 --method draft_model --draft-model llama-3-8b \
        --tokens 4 --acceptance 0.8 --simulate --plot speculation.png
    chipseconds speculation --model deepseek-v3 --slice h200-sxm:8 --shard dp8ep8 --precision fp8 --method mtp --tokens 1 --acceptance 0.85
    chipseconds speculation --model deepseek-v3 --slice h200-sxm:8 --precision fp8 --method mtp --tokens 2 --acceptance 0.85,0.6
    """
    from simulator.run.speculation_view import speculation_view

    if plot is not None:
        from simulator.report.figures import check_figure_path

        check_figure_path(plot)
    settings = _settings(options)
    target = _target(options, settings.decode_tokens)
    clients = [batch for batch in LADDER[::2] if batch <= options["max_num_seqs"]] if options["simulates"] else []
    view = speculation_view(target, settings, context=options["context"], simulate_at=clients)
    if as_json:
        print_json(document(view))
    else:
        _print(view)
    if plot is not None:
        from simulator.report.figures import save_figure
        from simulator.report.speculation_plot import draw_speculation

        save_figure(lambda: draw_speculation(view), plot)
        note(f"plot written to {plot}")


def document(view: "SpeculationView") -> dict[str, Any]:
    """The view at every batch, as one JSON document."""
    return {
        "model": view.deployment.architecture.name,
        "slice": view.deployment.slice.spec,
        "speculation": view.options,
        "context_tokens": view.context,
        "max_batch_in_memory": view.largest,
        "tokens_per_pass": view.tokens_per_pass,
        "batch": view.batches,
        "speedup": dict(zip(view.labels, view.gains, strict=True)),
        "best": [view.labels[level] for level in view.best],
        "simulated": [
            {"clients": clients, "speedup_fixed": fixed, "speedup_adaptive": adaptive}
            for clients, fixed, adaptive in view.simulated
        ],
    }


def _target(options: dict[str, Any], decode_tokens: int) -> Any:
    from simulator.catalog.models import load_model
    from simulator.catalog.slices import resolve_slice
    from simulator.roofline.deployment import Deployment
    from simulator.roofline.pipeline import shard
    from simulator.roofline.precision import parse_precision
    from simulator.roofline.sharding import parse_sharding

    seqs = options["max_num_seqs"]
    model, slice_ = load_model(options["model"]), resolve_slice(options["slice_"])
    limits = {
        "precision": parse_precision(options["precision"]),
        "max_num_seqs": seqs,
        "max_num_batched_tokens": max(8192, 64 * seqs),
        "decode_tokens": decode_tokens,
    }
    if options["sharding"] is None:
        return Deployment(model, slice_, **limits)
    return shard(model, slice_, parse_sharding(options["sharding"]), **limits)


def _settings(options: dict[str, Any]) -> Any:
    from simulator.catalog.files import parse
    from simulator.run.speculation import SpeculationOptions

    rates = _numbers("--acceptance", options["acceptance"])
    data = {
        "method": options["method"],
        "num_speculative_tokens": options["tokens"],
        "model": options["draft_model"],
        "slice": options["draft_slice"],
        "tree": [int(x) for x in _numbers("--tree", options["tree"])] if options["tree"] else [],
        "acceptance_spread": options["spread"],
        **({"acceptance_rate": rates[0]} if len(rates) == 1 else {"acceptance_curve": rates}),
    }
    return parse(SpeculationOptions, {name: value for name, value in data.items() if value is not None}, "speculation")


def _numbers(option: str, text: str) -> list[float]:
    from simulator.errors import InputError

    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise InputError(f"{option} {text!r}: write numbers, separated by commas") from None


def _print(view: "SpeculationView") -> None:
    d, o = view.deployment, view.options
    click.echo(
        f"{d.architecture.name} in {d.precision.name} on {d.slice.spec}, {o.method}{f' {o.model}' if o.model else ''}: "
        f"speed-up of decoding at a context of {view.context:,}"
        + (f", by the batch of each of {d.expert_ranks:g} attention ranks" if d.expert_ranks > 1 else "")
    )
    runs = {clients: (fixed, adaptive) for clients, fixed, adaptive in view.simulated}
    columns = ["batch", *view.labels[1:], "best"] + (["simulated", "adaptive"] if runs else [])
    rows = []
    for batch in LADDER:
        if batch > view.batches[-1]:
            break
        gains = [f"{gain:.2f}" if gain == gain else "–" for gain in view.gains[1:, batch - 1]]  # noqa: PLR0124 - NaN
        row = [f"{batch}", *gains, view.labels[int(view.best[batch - 1])]]
        if runs:
            row += [f"{x:.2f}" for x in runs[batch]] if batch in runs else ["", ""]
        rows.append(row)
    print_table("", columns, rows)
    per_pass = ", ".join(
        f"{tokens:.2f} at {label}" for tokens, label in zip(view.tokens_per_pass[1:], view.labels[1:], strict=True)
    )
    click.echo(f"\ntokens per pass: {per_pass}")
    click.echo(f"the KV cache holds {view.largest:,} such sequences beside the drafter")
