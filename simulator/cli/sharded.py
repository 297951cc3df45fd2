"""``chipseconds roofline --shard …``: a model over a whole slice, in one sharding or the best of all."""

from typing import TYPE_CHECKING, Any

import click

from simulator.cli.costs import costs, price_of
from simulator.cli.output import print_json, print_table
from simulator.cli.step_text import document, price_document, print_price, print_report
from simulator.errors import InputError

if TYPE_CHECKING:
    from simulator.catalog.slices import Slice
    from simulator.roofline.pipeline import ShardedReport
    from simulator.roofline.search import Search, Tried
    from simulator.roofline.sharding import Sharding


def sharded_roofline(options: dict[str, Any], *, as_json: bool) -> None:
    """Price what the options ask for, print it, and demand that it fits."""
    from simulator.catalog.chips import IDEAL
    from simulator.catalog.models import load_model
    from simulator.catalog.slices import resolve_slice
    from simulator.roofline.pipeline import require_sharded_fit, shard, sharded_report
    from simulator.roofline.precision import parse_precision
    from simulator.roofline.search import search

    question = {name: options[name] for name in ("prefill", "decode", "context")}
    architecture, slice_ = load_model(options["model"]), resolve_slice(options["slice_spec"])
    settings = {
        "precision": parse_precision(options["precision"], quantize_head=options["quantize_head"]),
        "efficiency": IDEAL if options["efficiency"] == "ideal" else None,
        "max_num_seqs": options["max_num_seqs"] or max(256, options["decode"] or 0),
        "max_num_batched_tokens": options["max_num_batched_tokens"]
        or max(8192, options["prefill"] or 0, options["decode"] or 0),
        "gpu_memory_utilization": options["gpu_memory_utilization"],
    } | {name: options[name] for name in ("layout", "kv_layout") if options[name] is not None}
    settings |= costs(options)
    price = price_of(slice_.chip, options["price_file"], options["term"])
    if options["sharding"] == "auto":
        for name in ("tp", "pp", "micro_batches"):
            if options[name] is not None:
                raise InputError(f"--{name.replace('_', '-')} {options[name]} with --shard auto: auto chooses it")
        found = search(architecture, slice_, objective=options["objective"] or "latency", **question, **settings)
        if as_json:
            first = found.tried[0].report
            priced = price_document(price, first.tokens_per_s_per_chip) if first else None
            print_json(search_document(found, slice_.n_chips) | {"price": priced})
        else:
            _print_search(found)
        best = found.best
        if not as_json:
            click.echo()
            _print_report(best)
            print_price(price, best.tokens_per_s_per_chip)
        return
    if options["objective"] is not None:
        raise InputError(f"--objective {options['objective']}: only --shard auto has a choice; add it")
    deployment = shard(architecture, slice_, _sharding(options, slice_), **settings)
    report = sharded_report(deployment, **question, micro_batches=options["micro_batches"])
    if as_json:
        print_json(sharded_document(report) | {"price": price_document(price, report.tokens_per_s_per_chip)})
    else:
        _print_report(report)
        print_price(price, report.tokens_per_s_per_chip)
    require_sharded_fit(deployment)


def _sharding(options: dict[str, Any], slice_: "Slice") -> "Sharding":
    from simulator.roofline.sharding import Sharding, parse_sharding

    tp, pp = options["tp"], options["pp"]
    if options["sharding"] is not None:
        if tp is not None or pp is not None:
            raise InputError(f"--shard {options['sharding']} with --tp or --pp: write them as one, e.g. tp8pp2")
        return parse_sharding(options["sharding"])
    pp = 1 if pp is None else pp
    if tp is None:
        if pp < 1 or slice_.n_chips % pp:
            raise InputError(f"--pp {pp}: must divide the {slice_.n_chips} chips of {slice_.spec}")
        tp = slice_.n_chips // pp
    return Sharding(tp=tp, pp=pp)


def sharded_document(report: "ShardedReport") -> dict[str, Any]:
    """One sharding as a JSON document; ``stages`` are documents of the plain command."""
    d = report.deployment
    return {
        "model": d.architecture.name,
        "slice": d.slice.spec,
        "chips": d.slice.n_chips,
        "sharding": str(d.sharding),
        "layout": d.stages[0].layout,
        "kv_layout": d.stages[0].kv_layout,
        "degrees": vars(d.sharding),
        "replicas": d.sharding.replicas,
        "micro_batches": report.micro_batches,
        "time_s": report.time_s,
        "period_s": report.period_s,
        "bubble_fraction": report.bubble,
        "send_s": report.send_s,
        "tokens_per_s": report.tokens_per_s,
        "tokens_per_s_per_chip": report.tokens_per_s_per_chip,
        "fits": d.memory.fits,
        "kv_capacity_tokens": d.kv_tokens,
        "stages": [{"layers": r.deployment.architecture.n_layers} | document(r) for r in report.stages],
    }


def search_document(found: "Search", chips: int) -> dict[str, Any]:
    """What was tried, best first, and the winner in full."""
    best = found.tried[0].report
    return {
        "objective": found.objective,
        "chips": chips,
        "tried": [
            {
                "sharding": str(t.sharding),
                "layout": t.layout,
                "kv_layout": t.kv_layout,
                "time_s": t.report.time_s if t.report else None,
                "tokens_per_s_per_chip": t.report.tokens_per_s_per_chip if t.report else None,
                "reason": t.reason or None,
            }
            for t in found.tried
        ],
        "best": sharded_document(best) if best else None,
    }


def _print_search(found: "Search") -> None:
    def cells(t: "Tried") -> list[str]:
        if t.report is None:
            return [t.name, "–", "–", "–", t.reason]
        r = t.report
        sequences = f"{r.replica_tokens * t.sharding.dp:,.0f}" if r.step.B else "–"
        return [t.name, f"{1e3 * r.time_s:,.2f}", f"{r.tokens_per_s_per_chip:,.1f}", sequences, ""]

    print_table(
        f"tried, best {found.objective} first",
        ["sharding", "time ms", "tokens/s/chip", "batch", "why not"],
        [cells(t) for t in found.tried],
    )


def _print_report(report: "ShardedReport") -> None:
    """Stages where there are several, the op table of the slowest, and the whole slice in a few lines."""
    from simulator.units import format_si

    d = report.deployment
    number, slowest = max(enumerate(report.stages, start=1), key=lambda r: r[1].time_s)
    if d.sharding.pp > 1:
        rows = [
            [
                str(i),
                str(r.deployment.architecture.n_layers),
                f"{1e3 * r.time_s:,.2f}",
                r.bound,
                f"{r.memory.weights_bytes / 1e9:.2f}",
                f"{r.memory.kv_tokens:,}",
            ]
            for i, r in enumerate(report.stages, start=1)
        ]
        title = f"{d.architecture.name} on {d.slice.spec} as {d.sharding}, one micro-batch"
        print_table(title, ["stage", "layers", "time ms", "bound", "weights GB/chip", "KV tokens"], rows)
        click.echo(f"\nThe slowest stage, number {number}:")
    print_report(slowest)
    decode = bool(slowest.step.B)
    lines = {
        "sharding": f"{d.sharding}: {_in_words(d.sharding)}",
        "round" if decode else "prompt": f"{format_si(report.time_s, 's')}"
        + (" per output token" if decode else " until its first token"),
        "whole slice": f"{report.tokens_per_s:,.0f} tokens/s, per chip {report.tokens_per_s_per_chip:,.1f}",
        "KV of slice": f"{d.kv_tokens:,} tokens",
    }
    layout = d.stages[0].axis_split
    if layout is not None:
        lines["layout"] = (
            f"{layout.layout}: d_model over {layout.model.size} chip(s), columns over {layout.columns.size}, weights "
            f"gathered over {layout.gathered.size}"
        )
    if d.sharding.pp > 1:
        lines["pipeline"] = (
            f"{report.micro_batches} micro-batches, bubble {report.bubble:.1%}, "
            f"{format_si(report.send_s, 's')} from stage to stage"
        )
    click.echo()
    for name, text in lines.items():
        click.echo(f"{name:<16} {text}")


def _in_words(s: "Sharding") -> str:
    stage = f"{s.pp} stage(s) on {s.tp} chip(s) each"
    if s.cp > 1:
        return f"{s.dp} replica(s) that split a prompt over {s.cp} groups of {s.tp} chip(s)"
    if s.ep == 1:
        return f"{s.dp} replica(s) of {stage}"
    return f"{s.dp} attention rank(s) of {stage}, whole experts spread over the {s.ep} chips of a stage"
