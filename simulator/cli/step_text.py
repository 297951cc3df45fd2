"""A priced step for people, and as a JSON document."""

from typing import TYPE_CHECKING, Any

import click

from simulator.cli.output import print_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from simulator.economics import ChipPrice
    from simulator.roofline.analysis import StepReport
    from simulator.roofline.ops import Number


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
