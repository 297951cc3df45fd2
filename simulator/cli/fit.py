"""``chipseconds fit``: what fits where."""

import textwrap
from typing import TYPE_CHECKING, Any

import click

from simulator.cli.costs import cost_options, costs
from simulator.cli.output import json_option, note, print_json, print_table
from simulator.cli.pareto import counts, words
from simulator.errors import ChipsecondsError, InfeasibleError, InputError

if TYPE_CHECKING:
    from simulator.roofline.fit import Place

#: A slice any precision computes on, to check model and settings by before chips are asked.
_PROBE = "h100-sxm:1"


@click.command()
@click.option("--model", required=True, help="Catalogue name, or a path to a model TOML or Hugging Face config.json.")
@click.option("--chips", help="Names or files, by commas. Default: every chip of the catalogue.")
@click.option("--precision", default="bf16", show_default=True, help="One or several: bf16,w8a16kv8.")
@click.option("--quantize-head", is_flag=True, help="Hold embedding and output head in the weights' format too.")
@click.option("--context", default="8k", show_default=True, help="Tokens per sequence; k is 1024.")
@click.option("--max-num-seqs", type=click.IntRange(1, 65536), default=256, show_default=True, help="vLLM's setting.")
@click.option(
    "--max-num-batched-tokens", type=click.IntRange(1), default=8192, show_default=True, help="vLLM's setting."
)
@click.option("--gpu-memory-utilization", type=float, default=0.9, show_default=True, help="vLLM's setting.")
@cost_options
@json_option
def fit(as_json: bool, **options: Any) -> None:
    """The smallest slice of each chip that holds the model, its KV capacity, and what decoding there gives.

    \b
    chipseconds fit --model llama-3-70b --precision w8a16kv8 --context 32k
    chipseconds fit --model llama-3-8b --chips l4,a100-40gb,h100-sxm --precision bf16,int8

    A slice holds the model if one sequence of the context fits beside the weights. Slices of one scale-up domain are
    tried. The speed is that of a decode step of as many sequences as fit, at most --max-num-seqs.
    """
    from simulator.catalog.chips import chip_names
    from simulator.catalog.models import load_model
    from simulator.catalog.slices import resolve_slice
    from simulator.roofline.deployment import Deployment
    from simulator.roofline.fit import smallest_place
    from simulator.roofline.precision import parse_precision

    contexts = counts("--context", options["context"])
    if len(contexts) != 1:
        raise InputError(f"--context {options['context']!r}: one context at a time")
    model, probe = load_model(options["model"]), resolve_slice(_PROBE)
    templates = [
        Deployment(
            model,
            probe,
            parse_precision(word, quantize_head=options["quantize_head"]),
            max_num_seqs=options["max_num_seqs"],
            max_num_batched_tokens=options["max_num_batched_tokens"],
            gpu_memory_utilization=options["gpu_memory_utilization"],
            **costs(options),
        )
        for word in words("--precision", options["precision"])
    ]
    chips = words("--chips", options["chips"]) if options["chips"] else chip_names()
    places = [(t.precision.name, smallest_place(t, chip, contexts[0])) for t in templates for chip in chips]
    rows = [row(place, precision, contexts[0]) for precision, place in places]
    if as_json:
        print_json({"model": model.name, "context_tokens": contexts[0], "places": rows})
    else:
        _print(model.name, contexts[0], rows)
    if not any(r["slice"] for r in rows):
        raise InfeasibleError(f"fit: {model.name} fits on none of the chips asked for")


def row(place: "Place", precision: str, context: int) -> dict[str, Any]:
    """One place as plain figures; units are in the keys. Null where there is none."""
    from simulator.roofline.analysis import step_report

    d, memory = place.deployment, place.fit
    found: dict[str, Any] = {"chip": place.chip, "precision": precision, "slice": None, "why": place.why}
    if d is None or memory is None:
        return found
    batch = min(place.max_batch, d.max_num_seqs, d.max_num_batched_tokens)
    found |= {
        "slice": d.slice.spec,
        "chips": d.chips,
        "weights_bytes_per_chip": memory.weights_bytes,
        "kv_bytes_per_chip": memory.kv_bytes,
        "kv_capacity_tokens": memory.kv_tokens,
        "max_batch_in_memory": place.max_batch,
        "decode_batch": batch,
        "latency_per_token_s": None,
        "tokens_per_s_per_chip": None,
        "notes": list(d.notes),
    }
    try:
        step = step_report(d, decode=batch, context=context)
    except ChipsecondsError as error:  # a rate its vendor has not published
        return found | {"why": str(error)}
    return found | {"latency_per_token_s": step.time_s, "tokens_per_s_per_chip": step.tokens_per_s_per_chip}


def _print(model: str, context: int, rows: list[dict[str, Any]]) -> None:
    from simulator.report.pareto_plot import context_text

    several = len({r["precision"] for r in rows}) > 1
    fitting = sorted((r for r in rows if r["slice"]), key=lambda r: (r["chips"], -(r["tokens_per_s_per_chip"] or 0.0)))
    cells = [
        [
            r["slice"],
            *([r["precision"]] if several else []),
            f"{r['weights_bytes_per_chip'] / 1e9:,.1f}",
            f"{r['kv_bytes_per_chip'] / 1e9:,.1f}",
            f"{r['kv_capacity_tokens']:,}",
            f"{r['max_batch_in_memory']:,}",
            f"{r['decode_batch']:,}",
            "–" if r["latency_per_token_s"] is None else f"{1e3 * r['latency_per_token_s']:,.1f}",
            "–" if r["tokens_per_s_per_chip"] is None else f"{r['tokens_per_s_per_chip']:,.0f}",
        ]
        for r in fitting
    ]
    long = context_text(context)
    what = "" if several else f" in {rows[0]['precision']}"
    click.echo(f"{model}{what}: smallest slice of each chip that holds it and {long} of context")
    print_table(
        "",
        [
            "slice",
            *(["precision"] if several else []),
            "weights GB",
            "KV GB",
            "KV tokens",
            f"seqs of {long}",
            "batch",
            "ms/token",
            "tok/s/chip",
        ],
        cells,
    )
    missing = [r for r in rows if not r["slice"]]
    if missing:
        click.echo("\nNo slice of:")
    for r in missing:
        text = f"{r['chip']}{' in ' + r['precision'] if several else ''}: {r['why']}"
        click.echo(textwrap.fill(text, 110, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False))
    for r in fitting:
        if r["why"]:
            note(f"{r['slice']}: {r['why']}")
