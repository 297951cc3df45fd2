"""Room: chip-seconds to dollars, joules and carbon. Pure functions; knows no clock and no engine."""

from simulator.economics.api_prices import ApiPrices, BreakEven, break_even
from simulator.economics.energy import PowerModel, carbon_g, electricity_usd, energy_joules, power_model, power_w
from simulator.economics.ownership import OwnedInputs, OwnedPrice, owned_price
from simulator.economics.price_book import OWNED, TERMS, ChipPrice, chip_price, owned_inputs, price_by_hand, quotes
from simulator.economics.prices import UnitPrices, Usage, chip_seconds_usd, unit_prices
from simulator.economics.site import Site, resolve_site

__all__ = [
    "OWNED",
    "TERMS",
    "ApiPrices",
    "BreakEven",
    "ChipPrice",
    "OwnedInputs",
    "OwnedPrice",
    "PowerModel",
    "Site",
    "UnitPrices",
    "Usage",
    "break_even",
    "carbon_g",
    "chip_price",
    "chip_seconds_usd",
    "electricity_usd",
    "energy_joules",
    "owned_inputs",
    "owned_price",
    "power_model",
    "power_w",
    "price_by_hand",
    "quotes",
    "resolve_site",
    "unit_prices",
]
