"""The price of a chip under a term: quoted in its file or the user's, or worked out for an owner."""

from dataclasses import dataclass
from typing import Any, get_args

from simulator.catalog.chips import ChipSpec
from simulator.catalog.price_book import NO_PRICES, PriceFile, ownership_defaults, published
from simulator.catalog.prices import PriceQuote, Term
from simulator.catalog.records import Quantity
from simulator.economics.energy import power_model
from simulator.economics.ownership import OwnedInputs, OwnedPrice, owned_price, owned_range
from simulator.economics.site import Site, resolve_site
from simulator.errors import InputError, UnpriceableError, nearest
from simulator.results.summary import Assumption

OWNED = "owned"
TERMS: tuple[str, ...] = (*get_args(Term), OWNED)
"""How a chip can be paid for."""


@dataclass(frozen=True)
class ChipPrice:
    """What one chip costs per hour, and where that comes from.

    Attributes
    ----------
    usd_per_chip_hour
        [USD/h]
    low, high
        its range; of an owned chip, every input at its cheap or dear end. None: none is stated.
    term, provider, region, date, kind, source
        as in the quote; an owned chip's kind is derived.
    owned
        parts of an owned chip's price; None for quotes.
    inputs
        the numbers behind it.
    """

    chip: str
    usd_per_chip_hour: float
    low: float | None
    high: float | None
    term: str
    provider: str
    region: str
    date: str
    kind: str
    source: str
    owned: OwnedPrice | None = None
    inputs: tuple[Assumption, ...] = ()

    @property
    def text(self) -> str:
        """Provider, region, term, date, kind and source in one line."""
        if self.provider == self.source:
            return self.source
        if self.owned is not None:
            return f"owned, electricity of {self.region!r} ({self.kind} from a {self.source})"
        where = f", {self.region}" if self.region else ""
        when = f", {self.date}" if self.date else ""
        return f"{self.provider}{where}, {self.term}{when} ({self.kind}, {self.source})"


def price_by_hand(chip: str, usd_per_chip_hour: float) -> ChipPrice:
    """A price that a scenario or a caller states itself."""
    value = f"{usd_per_chip_hour:g} USD per chip-hour"
    return ChipPrice(
        chip=chip,
        usd_per_chip_hour=usd_per_chip_hour,
        low=None,
        high=None,
        term="by hand",
        provider="scenario",
        region="",
        date="",
        kind="assumed",
        source="scenario",
        inputs=(Assumption(what="price", value=value, kind="assumed", source="scenario"),),
    )


def quotes(chip: ChipSpec, book: PriceFile = NO_PRICES) -> tuple[PriceQuote, ...]:
    """Quotes of a chip, those of a price file first."""
    own = book.chips.get(chip.name)
    return (*(own.prices if own else ()), *chip.prices)


def chip_price(
    chip: ChipSpec,
    term: str | None = None,
    *,
    provider: str | None = None,
    book: PriceFile = NO_PRICES,
    site: Site | None = None,
) -> ChipPrice:
    """Price of a chip.

    Parameters
    ----------
    term
        one of :data:`TERMS`; None: the first quote there is, the price file's before the catalogue's.
    provider
        part of a provider's name; None: any.
    book
        the user's own prices.
    site
        where an owned chip stands; None: the catalogue's default.

    Raises
    ------
    InputError
        If there is no such term, or no quote of such a provider.
    UnpriceableError
        If the chip has no price under the term, or it is not published.
    """
    if term is not None and term not in TERMS:
        raise InputError(f"prices.term = {term!r}: unknown term{nearest(term, TERMS)}")
    if term == OWNED:
        if provider is not None:
            raise InputError(f"prices.provider = {provider!r}: an owned chip has no provider")
        return _owned(chip, book, site or resolve_site(book=book))
    known = quotes(chip, book)
    found = [q for q in known if term is None or q.term == term]
    if not found:
        has = ", ".join(dict.fromkeys(q.term for q in known)) or "none"
        what = "price" if term is None else f"{term} price"
        raise UnpriceableError(f"{chip.name} has no {what} in its file (terms it has: {has}); give one in a price file")
    if provider is not None:
        every = dict.fromkeys(q.provider for q in found)
        found = [q for q in found if provider.casefold() in q.provider.casefold()]
        if not found:
            raise InputError(f"prices.provider = {provider!r}: no such quote of {chip.name}{nearest(provider, every)}")
    quote = next((q for q in found if q.usd_per_hour is not None), None)
    if quote is None or quote.usd_per_hour is None:
        raise UnpriceableError(
            f"{chip.name}: the {found[0].term} price of {found[0].provider} is not published ({found[0].source})"
        )
    source = f"{quote.source}, {quote.locator}" if quote.locator else quote.source
    value = f"{quote.usd_per_hour:g} USD per chip-hour, {quote.term}, {quote.date}"
    return ChipPrice(
        chip=chip.name,
        usd_per_chip_hour=quote.usd_per_hour,
        low=quote.low,
        high=quote.high,
        term=quote.term,
        provider=quote.provider,
        region=quote.region,
        date=quote.date,
        kind=quote.kind,
        source=quote.source,
        inputs=(Assumption(what="price", value=value, kind=quote.kind, source=source),),
    )


def _owned(chip: ChipSpec, book: PriceFile, site: Site) -> ChipPrice:
    inputs, low, high, used = owned_inputs(chip, book, site)
    parts = owned_price(inputs)
    least, most = owned_range(inputs, low, high)
    used += [item for item in site.inputs if not item.what.startswith("carbon")]
    return ChipPrice(
        chip=chip.name,
        usd_per_chip_hour=parts.usd_per_chip_hour,
        low=least,
        high=most,
        term=OWNED,
        provider="owned",
        region=site.region,
        date="",
        kind="derived",
        source=f"purchase of {inputs.purchase_usd:,.0f} USD",
        owned=parts,
        inputs=tuple(used),
    )


def owned_inputs(
    chip: ChipSpec, book: PriceFile, site: Site
) -> tuple[OwnedInputs, dict[str, float], dict[str, float], list[Assumption]]:
    """Inputs of an owned chip's price, their low and high ends by name, and what they are.

    Raises
    ------
    UnpriceableError
        If the chip's purchase price, its power, or the site's electricity is not known.
    """
    own = book.owned_costs(chip.name)
    defaults = ownership_defaults()
    used: list[Assumption] = []
    values: dict[str, Any] = {}
    low: dict[str, float] = {}
    high: dict[str, float] = {}

    def take(name: str, quantity: Quantity | None, *, scale: float = 1.0, what: str = "") -> None:
        """One input: the price file's, else the catalogue's (times ``scale``)."""
        by_hand = getattr(own, name)
        label = f"owned {chip.name}: {name}"
        if by_hand is not None:
            values[name] = low[name] = high[name] = by_hand
            used.append(Assumption(what=label, value=f"{by_hand:g}", kind="assumed", source="price file"))
            return
        if quantity is None:
            raise UnpriceableError(
                f"{chip.name}: what buying one takes (ownership.chip) is not in its file; give chip_usd in "
                f"[chips.{chip.name}.owned] of a price file"
            )
        value = published(quantity, f"{chip.name}: {what or name}")
        values[name] = value * scale
        low[name] = scale * (value if quantity.low is None else quantity.low)
        high[name] = scale * (value if quantity.high is None else quantity.high)
        spread = "" if low[name] == high[name] else f" ({low[name]:g} … {high[name]:g})"
        source = f"{quantity.source}, {quantity.locator}" if quantity.locator else quantity.source
        used.append(Assumption(what=label, value=f"{values[name]:g}{spread}", kind=quantity.kind, source=source))

    purchase = chip.ownership
    take("chip_usd", purchase.chip if purchase else None, what="ownership.chip")
    in_file = purchase.host if purchase else None
    take("host_usd", in_file or defaults.host_share, scale=1.0 if in_file else values["chip_usd"])
    in_file = purchase.network if purchase else None
    if in_file or own.network_usd is not None:
        take("network_usd", in_file)
    else:
        take("network_usd", _of_the_rest(defaults.network_share), scale=values["chip_usd"] + values["host_usd"])
    take("years", defaults.years)
    take("residual_share", defaults.residual_share)
    take("cost_of_capital", defaults.cost_of_capital)
    take("maintenance_share", defaults.maintenance_share)
    take("hosting_usd_per_kw_month", defaults.hosting)
    take("utilisation", defaults.utilisation)
    take("load", defaults.load)
    take("host_power_share", defaults.host_power_share)
    power = power_model(chip)
    found = OwnedInputs(
        **values,
        idle_power_w=power.idle_w,
        peak_power_w=power.peak_w,
        usd_per_kwh=site.electricity_usd_per_kwh,
        pue=site.pue,
        depreciation=own.depreciation or "annuity",
        year=own.year,
    )
    return found, low, high, used


def _of_the_rest(share: Quantity) -> Quantity:
    """A share s of a whole as a share of what is not it: s/(1 − s)."""

    def other(s: float | None) -> float | None:
        return None if s is None else s / (1 - s)

    return share.model_copy(update={name: other(getattr(share, name)) for name in ("value", "low", "high")})
