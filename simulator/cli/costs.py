"""Options that several commands share: what steps cost (overlap, imbalance, unpacking), and what chips cost (term, price file)."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from simulator.catalog.chips import ChipSpec
    from simulator.catalog.price_book import PriceFile
    from simulator.economics import ChipPrice, Site

Command = TypeVar("Command", bound=Callable[..., Any])


def cost_options(command: Command) -> Command:
    """Add ``--overlap``, ``--expert-imbalance`` and ``--dequantization-flops``; their values go through :func:`costs`."""
    for option in (
        click.option(
            "--dequantization-flops",
            type=float,
            help="What unpacking one narrow weight costs, in FLOPs of the matrix units. Default: 32.",
        ),
        click.option(
            "--expert-imbalance", type=float, help="Busiest against mean time of routed experts, from 1. Default: 1."
        ),
        click.option(
            "--overlap", type=float, help="Fraction of collectives that may hide behind products, 0 to 1. Default: 0."
        ),
    ):
        command = option(command)
    return command


def costs(options: dict[str, Any]) -> dict[str, Any]:
    """The settings of :class:`~simulator.roofline.deployment.Deployment` that the options say; it checks their ranges."""
    names = ("overlap", "expert_imbalance", "dequantization_flops", "looped_exchange")
    return {name: options[name] for name in names if options.get(name) is not None}


def price_options(command: Command) -> Command:
    """Add ``--prices`` and ``--term``."""
    for option in (
        click.option("--term", help="on-demand, reserved-1y, reserved-3y, spot, … or owned. Default: the first quote."),
        click.option("--prices", "price_file", metavar="FILE", help="Your own prices.toml; see docs/economics.md."),
    ):
        command = option(command)
    return command


def price_overrides(price_file: str | None, term: str | None) -> tuple[str, ...]:
    """The two options as a scenario's ``--set`` would write them."""
    given = {"file": price_file, "term": term}
    return tuple(f"prices.{name}={value}" for name, value in given.items() if value is not None)


def price_book(price_file: str | None) -> "PriceFile":
    """The user's price file; without one, a file that says nothing."""
    from simulator.catalog.price_book import NO_PRICES, load_price_file

    return NO_PRICES if price_file is None else load_price_file(price_file)


def price_of(
    chip: "ChipSpec", price_file: str | None, term: str | None, *, site: "Site | None" = None
) -> "ChipPrice | None":
    """Price of a chip under the two options, an owned one's at ``site``; None if it has none and none was asked for."""
    from simulator.economics import chip_price, quotes

    book = price_book(price_file)
    if term is None and not quotes(chip, book):
        return None
    return chip_price(chip, term, book=book, site=site)
