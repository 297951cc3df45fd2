"""Where the chips stand: what a kilowatt-hour costs and emits there, and how much of it reaches the computers."""

from dataclasses import dataclass

from simulator.catalog.price_book import NO_PRICES, PriceFile, named, operator_table, region_table
from simulator.catalog.records import Quantity
from simulator.errors import UnpriceableError
from simulator.results.summary import Assumption


@dataclass(frozen=True)
class Site:
    """A region and an operator, resolved.

    Attributes
    ----------
    region, operator
        names; empty where every number was given by hand.
    gco2_per_kwh
        of the grid, location-based. [g CO2e/kWh]
    pue
        facility ÷ IT energy.
    usd_per_kwh
        of electricity; None where the region's price is not published.
    inputs
        the numbers with their kinds and sources.
    """

    region: str
    operator: str
    gco2_per_kwh: float
    pue: float
    usd_per_kwh: float | None
    inputs: tuple[Assumption, ...]

    @property
    def electricity_usd_per_kwh(self) -> float:
        """Price of electricity. [USD/kWh]

        Raises
        ------
        UnpriceableError
            If it is not published for the region.
        """
        if self.usd_per_kwh is None:
            raise UnpriceableError(
                f"the price of electricity in {self.region!r} is not published; give usd_per_kwh, or a region that has one"
            )
        return self.usd_per_kwh


def resolve_site(
    region: str | None = None,
    operator: str | None = None,
    *,
    usd_per_kwh: float | None = None,
    gco2_per_kwh: float | None = None,
    pue: float | None = None,
    book: PriceFile = NO_PRICES,
) -> Site:
    """Region and operator by name, with numbers given by hand or in a price file in place of the catalogue's.

    None takes the catalogue's defaults, the world's grid and an operator that is not named.

    Raises
    ------
    InputError
        If a name is unknown.
    UnpriceableError
        If the region's carbon intensity is not known.
    """
    where = region or region_table().default
    who = operator or operator_table().default
    named("region", where, region_table().regions, book.regions)
    named("operator", who, operator_table().operators, book.operators)
    place, building = region_table().regions.get(where), operator_table().operators.get(who)
    own_place, own_building = book.regions.get(where), book.operators.get(who)
    inputs: list[Assumption] = []

    def take(what: str, unit: str, by_hand: float | None, own: float | None, quantity: Quantity | None) -> float | None:
        for value, source in ((by_hand, "scenario"), (own, "price file")):
            if value is not None:
                inputs.append(Assumption(what=what, value=f"{value:g} {unit}".strip(), kind="assumed", source=source))
                return value
        if quantity is None or quantity.value is None:
            return None
        spread = "" if quantity.low is None else f" ({quantity.low:g} … {quantity.high:g})"
        source = f"{quantity.source}, {quantity.locator}" if quantity.locator else quantity.source
        text = f"{quantity.value:g} {unit}".strip() + spread
        inputs.append(Assumption(what=what, value=text, kind=quantity.kind, source=source))
        return quantity.value

    carbon = take(
        f"carbon intensity, {where}",
        "gCO2e/kWh",
        gco2_per_kwh,
        own_place.gco2_per_kwh if own_place else None,
        place.carbon if place else None,
    )
    ratio = take(f"PUE, {who}", "", pue, own_building.pue if own_building else None, building.pue if building else None)
    price = take(
        f"electricity, {where}",
        "USD/kWh",
        usd_per_kwh,
        own_place.usd_per_kwh if own_place else None,
        place.electricity if place else None,
    )
    if carbon is None or ratio is None:
        missing = f"gco2_per_kwh of region {where!r}" if carbon is None else f"pue of operator {who!r}"
        raise UnpriceableError(f"{missing} is not known; give it in the price file or by hand")
    return Site(where, who, carbon, ratio, price, tuple(inputs))
