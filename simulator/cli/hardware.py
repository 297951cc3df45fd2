"""``chipseconds hardware``: the chips of the catalogue, with where every number comes from."""

import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import click

from simulator.catalog.chips import ChipSpec, DomainScaleUp, TorusScaleUp, chip_names, load_chip, quantity_si, sources
from simulator.catalog.kernel_curves import preferred_fits, read_calibration
from simulator.catalog.records import Quantity
from simulator.catalog.slices import LinkDomain, Slice, resolve_slice
from simulator.cli.output import json_option, print_json, print_table
from simulator.units import UNITS, format_si

#: Narrower terminals get the list without its widest column.
_LINKS_NEED_COLUMNS = 104

_Row = tuple[str, ...] | str

_FAMILIES = {
    "tpu": "Google TPU",
    "nvidia": "NVIDIA",
    "amd": "AMD",
    "aws": "AWS",
    "intel": "Intel",
    "apple": "Apple",
    "sram": "SRAM machines",
    "cpu": "CPUs",
}

#: Heading of each group of `show`, and what its fields are called there.
_GROUPS = {
    "compute": ("Compute, dense", {}),
    "memory": (
        "Memory",
        {
            "hbm_capacity": "capacity",
            "hbm_bandwidth": "bandwidth",
            "on_chip": "on the chip",
            "on_chip_bandwidth": "on the chip, bandwidth",
        },
    ),
    "power": ("Power", {"tdp": "limit (TDP)", "idle": "idle", "measured_mean": "measured mean"}),
    "scale_up": (
        "Links",
        {
            "bandwidth": "nominal, one way",
            "achievable": "achievable, one way",
            "latency": "latency",
            "published_per_chip": "published per chip",
        },
    ),
    "bridge": ("NVLink bridge", {"bandwidth": "one way", "latency": "latency"}),
    "scale_out": ("Scale-out", {"bandwidth": "per chip, one way", "latency": "latency"}),
    "host": ("Host", {"dram": "DRAM", "pcie": "PCIe per chip, one way", "coherent_link": "CPU link, one way"}),
    "ownership": (
        "Buying one",
        {"chip": "chip", "host": "share of its server", "network": "share of the network"},
    ),
    "efficiency": (
        "Efficiency",
        {
            "matmul": "matrix products, of peak",
            "hbm": "weights, of HBM bandwidth",
            "attention": "prefill attention, of peak",
            "kv": "KV reads, of HBM bandwidth",
            "link": "collectives, of links",
            "op_overhead": "gap per operation",
            "collective_latency": "per collective",
            "step_overhead": "host, per step",
            "row_overhead": "host, per sequence",
        },
    ),
}


@click.group()
def hardware() -> None:
    """Chips and slices of the catalogue, with sources."""


@hardware.command(name="list", short_help="Every chip: rates, memory, links, power, price.")
@json_option
def list_chips(as_json: bool) -> None:
    """List every chip: dense rates, memory, links, power and default price."""
    order = list(_FAMILIES)
    chips = sorted((load_chip(n) for n in chip_names()), key=lambda c: (order.index(c.family), c.name))
    if as_json:
        print_json({"chips": [_summary(chip) for chip in chips]})
        return

    def row(chip: ChipSpec) -> list[str]:
        compute = {str(d): q for d, q in chip.compute.items()}
        sixteen = _short(compute.get("bf16"), 1e12) if "bf16" in compute else _short(compute.get("fp16"), 1e12) + "*"
        return [
            chip.name,
            sixteen,
            _short(compute.get("fp8"), 1e12),
            _short(compute.get("int8"), 1e12),
            _short(chip.memory.hbm_capacity, 2.0**30 if chip.family != "sram" else 1e9),
            _short(chip.memory.hbm_bandwidth, 1e9),
            _links(chip),
            _short(chip.power.tdp, 1.0),
            f"{_price_mark(chip)}{chip.default_price.usd_per_chip_hour:.2f}" if chip.prices else "-",
        ]

    columns = ["chip", "bf16\nTFLOP/s", "fp8\nTFLOP/s", "int8\nTOP/s", "memory\nGiB", "memory\nGB/s"]
    columns += ["links, GB/s one way", "TDP\nW", "price\nUSD/h"]
    rows = [row(chip) for chip in chips]
    narrow = sys.stdout.isatty() and shutil.get_terminal_size().columns < _LINKS_NEED_COLUMNS
    if narrow:
        links = columns.index("links, GB/s one way")
        columns, rows = columns[:links] + columns[links + 1 :], [r[:links] + r[links + 1 :] for r in rows]
    print_table(
        f"{len(chips)} chips, dense rates",
        columns,
        rows,
        note="~ recalled or assumed; * fp16, no bf16; ? not published; SRAM machines: memory in GB"
        + (f"\nThe links column needs a terminal of {_LINKS_NEED_COLUMNS} columns." if narrow else "")
        + "\n'chipseconds hardware show NAME' prints every number with its source.",
    )


@hardware.command(short_help="Every number of one chip or slice, with its source.")
@click.argument("chip_or_slice", metavar="NAME[:SLICE]")
@json_option
def show(chip_or_slice: str, as_json: bool) -> None:
    """Print every number of a chip with unit, kind and source; with a slice, also its topology.

    NAME is a chip of the catalogue or the path of your own file. Examples: tpu-v5e, tpu-v5e:4x4, h100-sxm:2x8.
    """
    joined: Slice | None = None
    if ":" in chip_or_slice:
        joined = resolve_slice(chip_or_slice)
        chip = joined.chip
    else:
        chip = load_chip(chip_or_slice)
    cited = {q.source for q in chip.quantities().values()} | {p.source for p in chip.prices}
    if chip.scale_up is not None:
        cited.add(chip.scale_up.source)
    bibliography = {key: sources()[key].title for key in sorted(cited & set(sources()))}
    bibliography |= {key: chip.sources[key] for key in sorted(cited & set(chip.sources))}
    if as_json:
        document = _summary(chip) | {
            "quantities": {path: _quantity(q) for path, q in chip.quantities().items()},
            "prices": [price.model_dump(mode="json") for price in chip.prices],
            "efficiency_source": chip.efficiency_source,
            "note": chip.note,
            "sources": bibliography,
        }
        print_json(document | ({"slice": _slice(joined)} if joined else {}))
        return
    _print_chip(chip, bibliography, joined)


def _print_chip(chip: ChipSpec, bibliography: Mapping[str, str], joined: Slice | None) -> None:
    click.echo(f"{chip.title}  ({chip.name})")
    click.echo(
        f"{chip.vendor}, "
        + (f"{chip.launched}, " if chip.launched else "")
        + f"family {chip.family}"
        + (f"; {chip.note}" if chip.note else "")
    )
    if joined is not None:
        click.echo("")
        _print_slice(joined)
    notes: list[str] = []

    def numbered(note: str) -> str:
        if not note:
            return ""
        if note not in notes:
            notes.append(note)
        return f"[{notes.index(note) + 1}]"

    rows: list[_Row] = []
    quantities = chip.quantities()
    for group, (heading, labels) in _GROUPS.items():
        fields = {path.removeprefix(f"{group}."): q for path, q in quantities.items() if path.startswith(f"{group}.")}
        if group == "compute" and "multiprocessors" in quantities:
            fields["multiprocessors"] = quantities["multiprocessors"]
        if not fields:
            continue
        rows.append(_heading(chip, group, heading))
        if group == "scale_up" and chip.scale_up is not None:
            rows.append(_slices_row(chip.scale_up, numbered))
        for field, q in fields.items():
            rows.append(
                (labels.get(field, field), _written(q), q.kind.replace("_", " "), q.source, q.locator, numbered(q.note))
            )
    if chip.prices:
        rows.append("Prices, per chip-hour (the first is the default)")
        for price in chip.prices:
            spread = f" ({price.low:g} to {price.high:g})" if price.low and price.high else ""
            where = f", {price.region}" if price.region else ""
            rows.append(
                (
                    f"{price.term}, {price.provider}{where}, {price.date}",
                    "not published" if price.usd_per_hour is None else f"{price.usd_per_hour:.2f} USD{spread}",
                    price.kind.replace("_", " "),
                    price.source,
                    price.locator,
                    numbered(price.note),
                )
            )
    click.echo("")
    _print_rows(rows)
    if chip.calibration:
        _print_curves(chip.calibration)
    if notes:
        click.echo("\nNotes")
        _print_wrapped((f"[{i}]", text) for i, text in enumerate(notes, 1))
    click.echo("\nSources (§ and 'data' locators are explained in docs/hardware.md)")
    width = max(map(len, bibliography)) + 1
    _print_wrapped(((f"{key:<{width}}", title) for key, title in bibliography.items()))


def _print_curves(calibration: str) -> None:
    """The fitted kernels that stand for the constants, with their error on shapes left out."""
    file = read_calibration(calibration)
    click.echo(f"\nKernels as measured on {file.chip}, in place of the constants above ({file.command})")
    rows: list[_Row] = []
    for fit in preferred_fits(file):
        error = fit.residuals[0]
        kinds = " ".join(filter(None, (fit.op.replace("_", " "), fit.dtype, fit.kv_dtype and f"kv {fit.kv_dtype}")))
        name = (
            kinds
            + (f" on {fit.chips}" if fit.chips > 1 else "")
            + (f", heads of {fit.head_dim}" if fit.head_dim else "")
        )
        rows.append(
            (
                name,
                fit.framework,
                f"{fit.rows:,} rows",
                f"{error.median_abs:.1%} off in the median, p90 {error.p90_abs:.0%}",
            )
        )
    _print_rows(rows)


def _heading(chip: ChipSpec, group: str, heading: str) -> str:
    if group == "compute":
        return f"{heading} (critical intensity at HBM: {_intensities(chip)})"
    if group == "memory" and chip.memory.technology:
        return f"{heading}: {chip.memory.technology}"
    if group == "scale_up":
        return f"{heading}: {_link_heading(chip)}"
    if group == "bridge" and chip.bridge is not None:
        return f"{heading}, " + ("fitted between pairs" if chip.bridge.fitted else "not assumed in slices")
    if group == "scale_out" and chip.scale_out is not None:
        return f"{heading}: {chip.scale_out.network}"
    if group == "host" and chip.host.chips:
        return f"{heading} of {chip.host.chips} chips"
    if group == "efficiency":
        return f"{heading}: {chip.efficiency_source}"
    return heading


def _link_heading(chip: ChipSpec) -> str:
    rule = chip.scale_up
    if isinstance(rule, TorusScaleUp):
        return f"{rule.network}, {rule.links_per_chip} per chip; bandwidth of one link"
    kinds = {
        "switched": "switched; bandwidth of one chip, all its links",
        "full_mesh": "one link per pair; bandwidth of one link",
        "pcie": "through the host; bandwidth of one chip",
    }
    return f"{rule.network}, {kinds[rule.topology]}" if rule is not None else ""


def _slices_row(rule: TorusScaleUp | DomainScaleUp, numbered: Callable[[str], str]) -> tuple[str, ...]:
    """What slices exist, in one line; the full list and the wrap rule go into the note."""
    if isinstance(rule, DomainScaleUp):
        value, text = f"1 to {max(rule.sizes)} chips", f"domains of {', '.join(map(str, rule.sizes))} chips"
    else:
        shapes = ["x".join(map(str, shape)) for shape in rule.shapes]
        largest = "x".join(map(str, rule.largest)) if rule.largest else shapes[-1]
        value, text = f"{shapes[0]} to {largest}", f"shapes {', '.join(shapes)}"
        if rule.multiples_of is not None:
            text += f", and all multiples of {rule.multiples_of} up to {largest}"
        if rule.wrap.axis_length is not None:
            text += f"; an axis wraps around only if its length is {rule.wrap.axis_length}"
        else:
            text += f"; axes wrap around only if every one is a multiple of {rule.wrap.every_axis_multiple_of}"
    note = numbered(f"{text}; {rule.note}" if rule.note else text)
    return ("slices", value, rule.kind, rule.source, rule.locator, note)


def _intensities(chip: ChipSpec) -> str:
    known = [d for d, q in chip.compute.items() if q.value is not None]
    return ", ".join(f"{d} {chip.critical_intensity(d):.0f}" for d in known) + " FLOP/byte"


def _print_slice(joined: Slice) -> None:
    chip = joined.chip
    nodes = f", {joined.n_nodes} nodes" if joined.n_nodes > 1 else ""
    click.echo(f"Slice {joined.spec}: {joined.n_chips} chip{'s' if joined.n_chips > 1 else ''}{nodes}")
    rows: list[_Row] = []
    for level, (domain, bisection) in enumerate(zip(joined.domains, joined.bisections_bytes_per_s, strict=True)):
        rows += [(f"level {level + 1}" if len(joined.domains) > 1 else "topology", _topology(domain))]
        if domain.size > 1:
            per = "link" if domain.kind in {"torus", "full_mesh"} else "chip"
            hop = "hop" if domain.kind == "torus" else "message"
            speed = f"{format_si(domain.bandwidth_bytes_per_s, 'B/s')} per {per}, one way"
            rows += [("", f"{speed}; {format_si(domain.latency_s, 's')} per {hop}")]
            rows += [("", f"bisection {format_si(bisection, 'B/s')} one way")]
    n = joined.n_chips
    rows.append(
        (
            "memory",
            f"{n * chip.hbm_capacity_bytes / 2**30:,.0f} GiB at {format_si(n * chip.hbm_bandwidth_bytes_per_s, 'B/s')}",
        )
    )
    rates = [
        f"{format_si(n * chip.peak_flops_per_s(d), 'FLOP/s')} {d}"
        for d, q in chip.compute.items()
        if q.value is not None
    ]
    rows.append(("compute", ", ".join(rates)))
    if chip.power.tdp is not None and chip.power.tdp.value is not None:
        rows.append(("power", f"{format_si(n * chip.tdp_w, 'W')} at the chips' limit"))
    if chip.prices:
        price = chip.default_price
        rows.append(
            ("price", f"{n * price.usd_per_chip_hour:,.2f} USD/h ({price.provider}, {price.term}, {price.date})")
        )
    _print_rows(rows)


def _topology(domain: LinkDomain) -> str:
    shape = "x".join(map(str, domain.dims))
    if domain.size == 1:
        return "one chip, nothing to cross"
    if domain.kind != "torus":
        kinds = {"switched": "behind a switch", "full_mesh": "one link per pair", "pcie": "through the host's PCIe"}
        return f"{domain.network}: {shape}, {kinds[domain.kind]}"
    closed = [d for d, w in zip(domain.dims, domain.wraps, strict=True) if w]
    if len(closed) == len(domain.dims):
        return f"{domain.network}: {shape} torus, every axis closes into a ring"
    if not closed:
        return f"{domain.network}: {shape} grid, no axis wraps around"
    return f"{domain.network}: {shape}, only the axis of length {closed[0]} wraps around"


def _print_rows(rows: Iterable[_Row]) -> None:
    rows = list(rows)
    cells = [r for r in rows if not isinstance(r, str)]
    widths = [max((len(r[i]) for r in cells if i < len(r)), default=0) for i in range(max(map(len, cells)))]
    first = True
    for row in rows:
        if isinstance(row, str):
            click.echo(("" if first else "\n") + row)
        else:
            click.echo("  " + "  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=False)).rstrip())
        first = False


def _print_wrapped(items: Iterable[tuple[str, str]]) -> None:
    for head, text in items:
        lines = textwrap.wrap(text, width=max(40, 116 - len(head)))
        click.echo(f"  {head} {lines[0]}")
        for line in lines[1:]:
            click.echo(f"  {' ' * len(head)} {line}")


def _written(q: Quantity) -> str:
    """The value as the file has it, with its range and, for binary units, the bytes."""
    if q.value is None:
        return "not published"
    unit = "" if q.unit == "fraction" else f" {q.unit}"
    text = f"{q.value:g}{unit}" if q.value < 1e5 else f"{q.value:.0f}{unit}"
    if q.unit == "MiB" and q.value >= 1e4:
        text += f" = {q.value * 2**20 / 1e9:.1f} GB"
    low, high = (q.value if q.low is None else q.low), (q.value if q.high is None else q.high)
    return text if low == high else f"{text} ({low:g} to {high:g})"


def _short(q: Quantity | None, divisor: float) -> str:
    if q is None:
        return "-"
    value = quantity_si(q)
    if value is None:
        return "?"
    scaled = value / divisor
    mark = "~" if q.kind in {"recalled", "assumed"} else ""
    return mark + (f"{scaled:,.0f}" if scaled >= 99.95 or abs(scaled - round(scaled)) < 0.05 else f"{scaled:.1f}")


def _price_mark(chip: ChipSpec) -> str:
    return "~" if chip.prices[0].kind in {"recalled", "assumed"} else ""


def _links(chip: ChipSpec) -> str:
    rule = chip.scale_up
    if rule is None:
        return "-"
    network = {"Infinity Fabric": "IF", "RoCE 100 GbE": "RoCE", "RoCE 200 GbE": "RoCE"}.get(rule.network, rule.network)
    speed = _short(rule.achievable or rule.bandwidth, 1e9)
    if rule.topology == "torus":
        return f"{rule.links_per_chip} x {speed} {rule.network}"
    if rule.topology == "full_mesh":
        return f"{max(rule.sizes) - 1} x {speed} {network}"
    return f"{speed} {rule.network} of {max(rule.sizes)}"


def _quantity(q: Quantity) -> dict[str, Any]:
    return q.model_dump(mode="json") | {"value_si": quantity_si(q), "unit_si": UNITS[q.unit][0]}


def _summary(chip: ChipSpec) -> dict[str, Any]:
    return {
        "name": chip.name,
        "title": chip.title,
        "vendor": chip.vendor,
        "family": chip.family,
        "launched": chip.launched,
        "peak_flops_per_s": {d: quantity_si(q) for d, q in chip.compute.items()},
        "hbm_capacity_bytes": quantity_si(chip.memory.hbm_capacity),
        "hbm_bandwidth_bytes_per_s": quantity_si(chip.memory.hbm_bandwidth),
        "links": _links(chip),
        "tdp_w": quantity_si(chip.power.tdp),
        "default_price_usd_per_hour": chip.prices[0].usd_per_hour if chip.prices else None,
    }


def _slice(joined: Slice) -> dict[str, Any]:
    return {
        "spec": joined.spec,
        "n_chips": joined.n_chips,
        "n_nodes": joined.n_nodes,
        "domains": [
            {
                "kind": d.kind,
                "network": d.network,
                "dims": list(d.dims),
                "wraps": list(d.wraps),
                "bandwidth_bytes_per_s": d.bandwidth_bytes_per_s,
                "latency_s": d.latency_s,
                "bisection_bytes_per_s": bisection,
            }
            for d, bisection in zip(joined.domains, joined.bisections_bytes_per_s, strict=True)
        ],
    }
