"""What power, buildings and capital cost, and a user's own price file.

Regions, operators and what every owner pays alike stand in ``hardware_specs/economics``; quotes and purchase prices in the chips'
files. A price file of the user's (``prices.toml``) overrides any of it.
"""

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, NonNegativeFloat, PositiveFloat, model_validator

from simulator.catalog.chips import chip_names, sources
from simulator.catalog.files import data_folder, find, parse, read_toml
from simulator.catalog.prices import PriceQuote, ProviderKind, in_unit
from simulator.catalog.records import Kind, Quantity, Record, quantities_in
from simulator.errors import InputError, UnpriceableError, nearest

Depreciation = Literal["annuity", "straight-line", "declining"]
R = TypeVar("R", bound=Record)

Share = Annotated[Quantity, AfterValidator(in_unit("fraction", 0, 1))]
Ratio = Annotated[Quantity, AfterValidator(in_unit("1", 0, 10))]
Years = Annotated[Quantity, AfterValidator(in_unit("a", 0.5, 30))]
KilowattMonth = Annotated[Quantity, AfterValidator(in_unit("USD/kW/month", 0, 2000))]
EnergyPrice = Annotated[Quantity, AfterValidator(in_unit("USD/kWh", 0, 2))]
CarbonIntensity = Annotated[Quantity, AfterValidator(in_unit("gCO2e/kWh", 0, 2000))]
Pue = Annotated[Quantity, AfterValidator(in_unit("1", 1, 4))]


class OwnershipDefaults(Record):
    """``hardware_specs/economics/ownership.toml``: what an owner pays besides the chip."""

    schema_version: Literal[1]
    host_share: Ratio
    """Of the chip's price, where its file does not give ``ownership.host``."""
    network_share: Share
    """Of the whole purchase (chip, host and network), where its file does not give ``ownership.network``."""
    years: Years
    residual_share: Share
    """Of the purchase, left at the end of the years."""
    cost_of_capital: Share
    """Per year."""
    maintenance_share: Share
    """Of the purchase, per year: repair, spares, staff."""
    hosting: KilowattMonth
    """Space, cooling plant and connection, per kW of rated IT power; electricity is apart."""
    utilisation: Share
    """Share of the owned hours in which a chip is in service. Idle time within the service is the fleet's matter."""
    load: Share
    """Mean utilisation of the binding resource in service, for the electricity bill."""
    host_power_share: Ratio
    """Power of the server around a chip, its share of the network included, over the chip's limit."""
    idle_power_share: Share
    """Of the chip's limit, where its file has no idle power."""


class Region(Record):
    """Electricity somewhere: what a kilowatt-hour emits and costs."""

    title: str
    carbon: CarbonIntensity
    """Grid average, operational, location-based."""
    electricity: EnergyPrice


class Operator(Record):
    """Who runs the building."""

    title: str
    pue: Pue
    """Facility energy ÷ IT energy, annual mean."""


class RegionTable(Record):
    """``hardware_specs/economics/regions.toml``."""

    schema_version: Literal[1]
    default: str
    regions: dict[str, Region]


class OperatorTable(Record):
    """``hardware_specs/economics/operators.toml``."""

    schema_version: Literal[1]
    default: str
    operators: dict[str, Operator]


def _read(record: type[R], name: str) -> R:
    """One file of ``hardware_specs/economics``; its sources must be in the bibliography."""
    where = f"hardware_specs/economics/{name}.toml"
    found = parse(record, read_toml(data_folder("hardware_specs") / "economics" / f"{name}.toml"), where)
    for path, quantity in quantities_in("", found):
        if quantity.source not in sources():
            raise InputError(f"{where}: {path}.source = {quantity.source!r} is not in the bibliography")
    return found


@cache
def ownership_defaults() -> OwnershipDefaults:
    """What all owners pay alike."""
    return _read(OwnershipDefaults, "ownership")


@cache
def region_table() -> RegionTable:
    """Regions by name, and the one whose grid is taken where none is named."""
    return _read(RegionTable, "regions")


@cache
def operator_table() -> OperatorTable:
    """Operators by name, and the one whose PUE is taken where none is named."""
    return _read(OperatorTable, "operators")


def _only_usd(value: Any) -> Any:
    if value != "USD":
        raise ValueError('prices are in USD; convert yours, and write currency = "USD"')
    return value


class OwnQuote(PriceQuote):
    """A quote of a price file: provider and source need not be said."""

    provider: str = "own prices"
    provider_kind: ProviderKind = "own"
    source: str = "price file"
    kind: Kind = "assumed"


class OwnedCosts(Record):
    """``[owned]`` of a price file, for every chip or one: what replaces the catalogue's figures. Plain numbers."""

    chip_usd: PositiveFloat | None = None
    host_usd: NonNegativeFloat | None = None
    network_usd: NonNegativeFloat | None = None
    years: Annotated[float, Field(ge=0.5, le=30)] | None = None
    residual_share: Annotated[float, Field(ge=0, lt=1)] | None = None
    cost_of_capital: Annotated[float, Field(ge=0, le=1)] | None = None
    maintenance_share: Annotated[float, Field(ge=0, le=1)] | None = None
    hosting_usd_per_kw_month: NonNegativeFloat | None = None
    utilisation: Annotated[float, Field(gt=0, le=1)] | None = None
    load: Annotated[float, Field(ge=0, le=1)] | None = None
    host_power_share: Annotated[float, Field(ge=0, le=10)] | None = None
    depreciation: Depreciation | None = None
    """``annuity`` (default): equal yearly payments; ``straight-line`` or ``declining``: the books' charge, see ``year``."""
    year: Annotated[int, Field(ge=1)] | None = None
    """Year of life whose charge is taken with a schedule of the books; None: the mean over the life."""

    def over(self, other: "OwnedCosts") -> "OwnedCosts":
        """These values, and where they are not given, those of ``other``."""
        return other.model_copy(update=self.model_dump(exclude_none=True))


class _AllOwned(OwnedCosts):
    @model_validator(mode="after")
    def _no_chip(self) -> "_AllOwned":
        for name in ("chip_usd", "host_usd", "network_usd"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name} is of one chip: put it into [chips.NAME.owned]")
        return self


class OwnChip(Record):
    """``[chips.NAME]`` of a price file."""

    prices: Annotated[tuple[OwnQuote, ...], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)] = ()
    """Go before the catalogue's; the first is the default."""
    owned: OwnedCosts = OwnedCosts()


class OwnRegion(Record):
    """``[regions.NAME]`` of a price file: a new region, or what is different in one of the catalogue."""

    usd_per_kwh: Annotated[float, Field(ge=0, le=2)] | None = None
    gco2_per_kwh: Annotated[float, Field(ge=0, le=2000)] | None = None


class OwnOperator(Record):
    """``[operators.NAME]`` of a price file."""

    pue: Annotated[float, Field(ge=1, le=4)]


class PriceFile(Record):
    """A user's ``prices.toml``."""

    schema_version: Literal[1]
    currency: Annotated[Literal["USD"], BeforeValidator(_only_usd)] = "USD"
    chips: dict[str, OwnChip] = Field(default_factory=dict)
    owned: _AllOwned = _AllOwned()
    regions: dict[str, OwnRegion] = Field(default_factory=dict)
    operators: dict[str, OwnOperator] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _chips_exist(self) -> "PriceFile":
        for name in self.chips:
            known = chip_names()
            if name not in known:
                raise ValueError(f"chips.{name}: unknown chip{nearest(name, known)}")
        return self

    def owned_costs(self, chip: str) -> OwnedCosts:
        """What replaces the catalogue's figures of owning this chip."""
        own = self.chips.get(chip)
        return OwnedCosts(**self.owned.model_dump()) if own is None else own.owned.over(self.owned)


NO_PRICES = PriceFile(schema_version=1)
"""A price file that says nothing."""


def read_price_file(path: str) -> dict[str, Any]:
    """A user's price file as plain data, checked.

    Raises
    ------
    InputError
        If there is no such file, or a field, chip, term or currency in it is wrong.
    """
    file = find("price", path if "/" in path else f"./{path}", data_folder("hardware_specs") / "economics")
    data = read_toml(file)
    parse(PriceFile, data, path)
    return data


def load_price_file(path: str) -> PriceFile:
    """Read and check a user's price file.

    Raises
    ------
    InputError
        As :func:`read_price_file`.
    """
    return parse(PriceFile, read_price_file(path), path)


def named(kind: str, name: str, known: Mapping[str, Any], own: Iterable[str] = ()) -> None:
    """Refuse a region or operator that neither the catalogue nor a price file has.

    Raises
    ------
    InputError
        With the nearest names.
    """
    if name not in known and name not in own:
        raise InputError(f"unknown {kind} {name!r}{nearest(name, {*known, *own})}")


def published(quantity: Quantity, what: str) -> float:
    """Value of a quantity in its own unit.

    Raises
    ------
    UnpriceableError
        If it is not published; the message names it.
    """
    if quantity.value is None:
        raise UnpriceableError(f"{what} is not published ({quantity.source}); give your own in a price file")
    return quantity.value
