"""Room: chip-seconds to dollars and joules. Pure functions; knows no clock and no engine."""

from simulator.economics.energy import IDLE_FRACTION, electricity_usd, energy_joules, power_w
from simulator.economics.prices import UnitPrices, Usage, chip_seconds_usd, unit_prices

__all__ = [
    "IDLE_FRACTION",
    "UnitPrices",
    "Usage",
    "chip_seconds_usd",
    "electricity_usd",
    "energy_joules",
    "power_w",
    "unit_prices",
]
