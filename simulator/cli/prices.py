"""``chipseconds prices``: the price book, owned chips, sites, the bill of a training run, and break-even with an API."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from simulator.cli.costs import price_book, price_of, price_options, price_overrides
from simulator.cli.output import json_option, note, print_json, print_table
from simulator.errors import InputError, UnpriceableError

if TYPE_CHECKING:
    from simulator.economics import ApiPrices, BreakEven, ChipPrice, Site
    from simulator.lifetime.training_bill import TrainingBill
    from simulator.results.summary import Assumption, Summary

_SITE_OPTIONS = (
    click.option("--region", help="Whose grid and electricity; see `prices regions`. Default: the world's."),
    click.option("--operator", help="Who runs the building, for its PUE. Default: one that is not named."),
)


def _site_options(command: Any) -> Any:
    for option in _SITE_OPTIONS:
        command = option(command)
    return command


@click.group()
def prices() -> None:
    """What chips cost, by term; owning one; training a model; break-even with an API."""


@prices.command(name="list", short_help="Every price of the book: term, $/h, date, source.")
@click.argument("chips", nargs=-1, metavar="[CHIP]…")
@price_options
@json_option
def list_prices(chips: tuple[str, ...], price_file: str | None, term: str | None, as_json: bool) -> None:
    """List the prices of all chips, or of some; owned chips as the catalogue's assumptions make them."""
    from simulator.catalog.chips import chip_names, load_chip
    from simulator.economics import OWNED, TERMS, chip_price, quotes, resolve_site
    from simulator.errors import nearest

    if term is not None and term not in TERMS:
        raise InputError(f"--term {term}: unknown term{nearest(term, TERMS)}")
    book = price_book(price_file)
    rows: list[dict[str, Any]] = []
    for name in chips or chip_names():
        chip = load_chip(name)
        rows += [q.model_dump(mode="json") | {"chip": chip.name} for q in quotes(chip, book)]
        try:
            owned = chip_price(chip, OWNED, book=book, site=resolve_site(book=book))
        except UnpriceableError:
            continue
        rows.append(
            {
                "chip": chip.name,
                "usd_per_hour": owned.usd_per_chip_hour,
                "low": owned.low,
                "high": owned.high,
                "term": OWNED,
                "date": "",
                "provider": "",
                "region": "",
                "source": owned.source,
                "kind": owned.kind,
            }
        )
    rows = [row for row in rows if term is None or row["term"] == term]
    if as_json:
        print_json({"currency": "USD", "prices": rows})
        return
    if not rows:
        raise UnpriceableError(f"no {term} price of {', '.join(chips) or 'any chip'}; give one in a price file")

    def cells(row: dict[str, Any]) -> list[str]:
        value = "not published" if row["usd_per_hour"] is None else f"{row['usd_per_hour']:.3f}"
        spread = f"{row['low']:g} to {row['high']:g}" if row["low"] is not None and row["high"] is not None else ""
        if row["term"] == OWNED:
            spread = f"{row['low']:.2f} to {row['high']:.2f}"
        where = f", {row['region']}" if row["region"] else ""
        return [
            row["chip"],
            row["term"],
            value,
            spread,
            row["date"],
            row["provider"] + where,
            row["kind"].replace("_", " "),
            row["source"],
        ]

    columns = ["chip", "term", "USD/h", "range", "date", "provider", "kind", "source"]
    print_table(
        f"{len(rows)} prices, per chip-hour",
        columns,
        [cells(row) for row in rows],
        note="The first price of a chip is its default. 'chipseconds prices owned CHIP' takes an owned chip's price apart.",
    )


@prices.command(short_help="An owned chip's price, taken apart.")
@click.argument("chip")
@click.option("--prices", "price_file", metavar="FILE", help="Your own prices.toml.")
@_site_options
@json_option
def owned(chip: str, price_file: str | None, region: str | None, operator: str | None, as_json: bool) -> None:
    """Take the price of an owned CHIP apart, per hour in service, and list what it is made of."""
    from simulator.catalog.chips import load_chip
    from simulator.economics import OWNED, chip_price, resolve_site

    book = price_book(price_file)
    found = chip_price(load_chip(chip), OWNED, book=book, site=resolve_site(region, operator, book=book))
    parts = vars(found.owned) if found.owned else {}
    if as_json:
        print_json(_price_document(found) | {"parts": parts})
        return
    low, high = found.low or 0.0, found.high or 0.0
    click.echo(f"{found.chip}, owned: ${found.usd_per_chip_hour:.3f} per hour in service")
    click.echo(f"every input at its cheap end ${low:.2f}, at its dear end ${high:.2f}")
    rows = [
        [name.removesuffix("_usd"), f"{usd:.4f}", f"{usd / found.usd_per_chip_hour:.0%}"]
        for name, usd in (*parts.items(), ("together", found.usd_per_chip_hour))
    ]
    print_table("", ["part", "USD/h", "share"], rows)
    _print_inputs(found.inputs)


@prices.command(short_help="Regions and operators: carbon, electricity, PUE.")
@click.option("--prices", "price_file", metavar="FILE", help="Your own prices.toml.")
@json_option
def regions(price_file: str | None, as_json: bool) -> None:
    """List regions with grid carbon and electricity price, and operators with their PUE."""
    from simulator.catalog.price_book import operator_table, region_table

    book = price_book(price_file)
    places, buildings = region_table(), operator_table()
    if as_json:
        print_json(
            {
                "default_region": places.default,
                "default_operator": buildings.default,
                "regions": places.regions,
                "operators": buildings.operators,
                "own": {"regions": book.regions, "operators": book.operators},
            }
        )
        return

    def cell(quantity: Any) -> list[str]:
        value = "not published" if quantity.value is None else f"{quantity.value:g}"
        return [value, "" if quantity.value is None else quantity.kind.replace("_", " ")]

    rows = [
        [name, *cell(place.carbon), *cell(place.electricity), place.title, place.carbon.source]
        for name, place in places.regions.items()
    ]
    for name, own in book.regions.items():
        given = [("not said" if v is None else f"{v:g}") for v in (own.gco2_per_kwh, own.usd_per_kwh)]
        rows.append([name, given[0], "", given[1], "", "of your price file", ""])
    print_table(
        f"{len(rows)} regions; {places.default!r} is taken where none is named",
        ["region", "g CO2e/kWh", "", "USD/kWh", "", "where", "source of carbon"],
        rows,
    )
    rows = [[name, *cell(o.pue), o.title, o.pue.source] for name, o in buildings.operators.items()]
    rows += [[name, f"{own.pue:g}", "", "of your price file", ""] for name, own in book.operators.items()]
    print_table(
        f"{len(rows)} operators; {buildings.default!r} is taken where none is named",
        ["operator", "PUE", "", "what", "source"],
        rows,
    )


@prices.command(short_help="Dollars, joules and carbon of a training run.")
@click.option("--model", help="Its active parameters are N. Or --parameters.")
@click.option("--parameters", type=float, help="N, active parameters.")
@click.option("--tokens", type=float, required=True, help="D, training tokens.")
@click.option("--slice", "slice_spec", required=True, help="Chips of the run, e.g. h100-sxm:8.")
@click.option("--slices", type=click.IntRange(min=1), default=1, show_default=True, help="Equal slices side by side.")
@click.option("--mfu", type=float, default=0.4, show_default=True, help="Model FLOPs over peak.")
@click.option("--dtype", default="bf16", show_default=True, help="Arithmetic whose peak the MFU refers to.")
@click.option("--overhead", type=float, default=1.0, show_default=True, help="Chip time paid over chip time trained.")
@click.option(
    "--utilisation", type=float, default=1.0, show_default=True, help="Of the power between idle and peak; 1: TDP."
)
@price_options
@_site_options
@json_option
def training(slices: int, price_file: str | None, term: str | None, as_json: bool, **options: Any) -> None:
    """Price a training run: 6ND FLOPs at a fraction of peak, on chips under a term, in a region.

    \b
    chipseconds prices training --model llama-3-70b --tokens 15e12 --slice h100-sxm:8 --slices 2000 --term reserved-1y
    chipseconds prices training --parameters 37e9 --tokens 14.8e12 --slice h100-sxm:8 --mfu 0.346 --region germany
    """
    from typing import get_args

    from simulator.catalog.chips import DType
    from simulator.catalog.models import load_model
    from simulator.catalog.parameters import count
    from simulator.catalog.slices import resolve_slice
    from simulator.economics import power_model, resolve_site
    from simulator.errors import nearest
    from simulator.lifetime.training_bill import training_bill
    from simulator.training.cost import TrainingSetup

    if (options["model"] is None) == (options["parameters"] is None):
        raise InputError("give exactly one of --model and --parameters")
    if options["dtype"] not in get_args(DType):
        raise InputError(f"--dtype {options['dtype']}: unknown{nearest(options['dtype'], get_args(DType))}")
    joined = resolve_slice(options["slice_spec"])
    site = resolve_site(options["region"], options["operator"], book=price_book(price_file))
    price = price_of(joined.chip, price_file, term, site=site)
    if price is None:
        raise UnpriceableError(f"{joined.chip.name} has no price in its file; give one in a price file")
    parameters = options["parameters"]
    if parameters is None:
        parameters = count(load_model(options["model"])).active
    setup = TrainingSetup(joined, options["mfu"], options["dtype"], options["overhead"])
    known = joined.chip.power.tdp is not None and joined.chip.power.tdp.value is not None
    bill = training_bill(
        parameters,
        options["tokens"],
        setup,
        price,
        power=power_model(joined.chip) if known else None,
        site=site,
        utilisation=options["utilisation"],
    )
    chips = joined.n_chips * slices
    if as_json:
        print_json(_bill_document(bill, site, chips))
    else:
        _print_bill(bill, site, chips)


def _bill_document(bill: "TrainingBill", site: "Site", chips: int) -> dict[str, Any]:
    return {
        "flops": bill.cost.flops,
        "chip_hours": bill.cost.chip_hours,
        "chips": chips,
        "wall_s": bill.cost.chip_s / chips,
        "price": _price_document(bill.price),
        "usd": bill.usd,
        "low_usd": bill.low_usd,
        "high_usd": bill.high_usd,
        "usd_per_flop": bill.usd_per_flop,
        "chip_joules": bill.chip_joules,
        "low_chip_joules": bill.low_chip_joules,
        "high_chip_joules": bill.high_chip_joules,
        "facility_joules": bill.facility_joules,
        "gco2": bill.gco2,
        "region": site.region,
        "operator": site.operator,
        "assumptions": [*bill.price.inputs, *(item for item in site.inputs if item not in bill.price.inputs)],
    }


def _print_bill(bill: "TrainingBill", site: "Site", chips: int) -> None:
    from simulator.units import format_si

    def spread(low: float | None, high: float | None, unit: str) -> str:
        return "" if low is None or high is None else f" ({format_si(low, unit)} to {format_si(high, unit)})"

    lines = {
        "compute": f"{bill.cost.flops:.4g} FLOP",
        "chip time": f"{bill.cost.chip_hours:,.0f} chip-hours, {bill.cost.chip_s / chips / 86400:,.1f} days on {chips:,} chips",
        "cost": f"${bill.usd:,.0f}"
        + ("" if bill.low_usd is None else f" (${bill.low_usd:,.0f} to ${bill.high_usd:,.0f})"),
        "at": f"${bill.price.usd_per_chip_hour:.4g} per chip-hour: {bill.price.text}",
    }
    if bill.chip_joules is None:
        lines["energy"] = "the chip's power is not published"
    elif bill.facility_joules is not None and bill.gco2 is not None:
        lines["energy"] = f"{format_si(bill.chip_joules, 'J')} at the chips" + spread(
            bill.low_chip_joules, bill.high_chip_joules, "J"
        )
        lines["facility"] = (
            f"{bill.facility_joules / 3.6e9:,.0f} MWh with servers and PUE {site.pue:g} ({site.operator})"
        )
        lines["carbon"] = f"{bill.gco2 / 1e6:,.0f} t CO2e at {site.gco2_per_kwh:g} g/kWh ({site.region})"
    for name, text in lines.items():
        click.echo(f"{name:<10} {text}")


@prices.command(name="break-even", short_help="At which traffic an own fleet costs what an API asks.")
@click.argument("scenario_or_result")
@click.option("--input", "input_usd", type=float, required=True, help="API price of a million input tokens, USD.")
@click.option("--output", "output_usd", type=float, required=True, help="… of a million output tokens.")
@click.option("--cached", "cached_usd", type=float, help="… of a million cached input tokens. Default: as other input.")
@click.option("--set", "overrides", multiple=True, metavar="PATH=VALUE", help="Change a field; may be repeated.")
@price_options
@json_option
def break_even(
    scenario_or_result: str,
    input_usd: float,
    output_usd: float,
    cached_usd: float | None,
    overrides: tuple[str, ...],
    price_file: str | None,
    term: str | None,
    as_json: bool,
) -> None:
    """Compare a simulated fleet with an API: the rate of queries, and the load, at which both cost the same.

    A result folder is read as it is; a scenario (or a folder with options that change it) is simulated first.
    """
    from simulator.economics import ApiPrices
    from simulator.economics.api_prices import break_even_of

    api = ApiPrices(input_usd, output_usd, cached_usd)
    summary = _summary(scenario_or_result, (*overrides, *price_overrides(price_file, term)))
    if summary.prices is None:
        raise UnpriceableError(
            f"{summary.deployment.chip} has no price in its file; give one with --set prices.usd_per_chip_hour=…"
        )
    found = break_even_of(summary, api)
    if as_json:
        print_json(
            {
                "scenario": summary.scenario,
                "api": vars(api),
                "usd_per_chip_hour_paid": summary.prices.usd_per_chip_hour,
                "price_source": summary.prices.source,
                "capacity_per_s": summary.load.capacity_per_s,
                "own_is_cheaper": found.own_is_cheaper,
                "reachable": found.reachable,
                **{
                    f"break_even_{k}" if k.startswith(("queries", "load", "usd_per_chip")) else k: v
                    for k, v in vars(found).items()
                },
            }
        )
        return
    _print_break_even(summary, api, found)


def _summary(scenario_or_result: str, overrides: tuple[str, ...]) -> "Summary":
    from simulator.results import read_result
    from simulator.run import load_scenario, run_scenario

    if not overrides and Path(scenario_or_result).is_dir():
        return read_result(Path(scenario_or_result)).summary
    note(f"simulating {scenario_or_result}")
    return run_scenario(load_scenario(scenario_or_result, overrides), summary_only=True).summary


def _print_break_even(summary: "Summary", api: "ApiPrices", found: "BreakEven") -> None:
    paid = summary.prices
    chips = summary.ledger.chips
    per_hour = f"${paid.usd_per_chip_hour * chips:,.4g} per hour for {chips:,} chips: {paid.source}" if paid else ""
    cheaper = "less" if found.own_is_cheaper else "more"
    load = "" if found.load is None else f", load {found.load:.3g} of {summary.load.capacity_per_s:.4g} queries/s"
    verdict = "" if found.reachable else "; the fleet cannot serve that many: the API is cheaper at any load"
    lines = {
        "fleet": per_hour,
        "API": f"${found.api_usd_per_query:.4g} per query (${api.input_usd:g} input, ${api.output_usd:g} output per million)",
        "as run": f"${found.allocation_usd_per_query:.4g} per query with idle time, {cheaper} than the API; "
        f"${found.usage_usd_per_query:.4g} for its use alone",
        "break-even": f"{found.queries_per_s:.4g} queries/s{load}{verdict}",
        "in use then": f"{found.busy_fraction:.1%} of chip time, at the chip time a query took in this run",
        "chip price": f"${found.usd_per_chip_hour:.4g} per chip-hour would make this run cost what the API asks",
    }
    for name, text in lines.items():
        click.echo(f"{name:<12} {text}")
    if summary.load.capacity_understated:
        note("the run is too short to measure capacity: the load is overstated; simulate more requests")


def _price_document(price: "ChipPrice") -> dict[str, Any]:
    return {
        "chip": price.chip,
        "usd_per_chip_hour": price.usd_per_chip_hour,
        "low_usd_per_chip_hour": price.low,
        "high_usd_per_chip_hour": price.high,
        "term": price.term,
        "source": price.text,
        "assumptions": list(price.inputs),
    }


def _print_inputs(inputs: "tuple[Assumption, ...]") -> None:
    rows = [[item.what.removeprefix("owned "), item.value, item.kind, item.source] for item in inputs]
    print_table("made of", ["what", "value", "kind", "source"], rows)
