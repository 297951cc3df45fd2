"""What an owned chip costs per hour in service: capital, maintenance, hosting, electricity.

Two ways of spreading the purchase over the chip's life. An *annuity* is the equal yearly payment whose present value, with what
is left at the end, is the purchase. *Books* charge each year its depreciation (straight line, or a constant share of what is
left) and interest on the value at the year's start. All three have the same present value; they differ in when they fall due.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from simulator.catalog.price_book import Depreciation
from simulator.economics.energy import HOURS_PER_YEAR, power_w
from simulator.errors import InputError


def capital_recovery_factor(rate: float, years: float) -> float:
    """Equal yearly payment per unit of a loan, paid at the end of each year: r/(1 − (1 + r)^−T); 1/T without interest. [1/a]

    >>> round(capital_recovery_factor(0.08, 4), 5), capital_recovery_factor(0.0, 4)
    (0.30192, 0.25)
    """
    return 1 / years if rate == 0 else -rate / math.expm1(-years * math.log1p(rate))


def annuity_usd(purchase_usd: float, residual_usd: float, years: float, rate: float) -> float:
    """Equal yearly charge of a purchase that is worth ``residual_usd`` after the years. [USD/a]

    >>> round(annuity_usd(43_000, 4_300, 4, 0.0), 2)
    9675.0
    """
    present = purchase_usd - residual_usd * math.exp(-years * math.log1p(rate))
    return present * capital_recovery_factor(rate, years)


def book_charges_usd(
    purchase_usd: float, residual_usd: float, years: int, rate: float, *, declining: bool = False
) -> list[float]:
    """Charge of each year: depreciation, and interest on the value at the year's start. [USD]

    Straight line writes off (C − S)/T a year; declining balance the share 1 − (S/C)^(1/T) of what is left, which needs S > 0.

    >>> [round(c) for c in book_charges_usd(40_000, 4_000, 4, 0.10)]
    [13000, 12100, 11200, 10300]
    >>> [round(c) for c in book_charges_usd(40_000, 2_500, 4, 0.10, declining=True)]
    [24000, 12000, 6000, 3000]

    Raises
    ------
    InputError
        For a declining balance that ends at nothing.
    """
    if declining and not residual_usd > 0:
        raise InputError(
            "depreciation = 'declining' needs a residual_share above 0: a constant share never reaches nothing"
        )
    value, charges = purchase_usd, []
    for _ in range(years):
        fall = (
            value * (1 - (residual_usd / purchase_usd) ** (1 / years))
            if declining
            else (purchase_usd - residual_usd) / years
        )
        charges.append(fall + rate * value)
        value -= fall
    return charges


def present_value_usd(charges: Sequence[float], rate: float) -> float:
    """Value today of charges at the end of each year. [USD]

    >>> round(present_value_usd([110.0, 121.0], 0.10), 9)
    200.0
    """
    return sum(charge * (1 + rate) ** -(year + 1) for year, charge in enumerate(charges))


@dataclass(frozen=True)
class OwnedInputs:
    """What the price of an owned chip is made of.

    Attributes
    ----------
    chip_usd, host_usd, network_usd
        purchase of one chip, its share of the server, and of the network. [USD]
    years, residual_share, cost_of_capital
        life [a], share of the purchase left at its end, interest per year.
    maintenance_share
        of the purchase, per year.
    hosting_usd_per_kw_month
        space and cooling plant, per kW of rated IT power.
    utilisation
        share of the owned hours in which the chip is in service, in (0, 1].
    load
        mean utilisation of the binding resource in service, 0 … 1; out of service the chip draws its idle power.
    idle_power_w, peak_power_w, host_power_share
        of the chip [W], and the server's power over the chip's peak.
    usd_per_kwh, pue
        electricity, and facility ÷ IT energy.
    depreciation, year
        how the purchase is spread; ``year`` (from 1) picks one year of the books, None their mean.
    """

    chip_usd: float
    host_usd: float
    network_usd: float
    years: float
    residual_share: float
    cost_of_capital: float
    maintenance_share: float
    hosting_usd_per_kw_month: float
    utilisation: float
    load: float
    idle_power_w: float
    peak_power_w: float
    host_power_share: float
    usd_per_kwh: float
    pue: float
    depreciation: Depreciation = "annuity"
    year: int | None = None

    @property
    def purchase_usd(self) -> float:
        """Chip, host and network. [USD]"""
        return self.chip_usd + self.host_usd + self.network_usd

    @property
    def rated_w(self) -> float:
        """Chip and its share of the server at their limit. [W]"""
        return self.peak_power_w * (1 + self.host_power_share)


@dataclass(frozen=True)
class OwnedPrice:
    """Parts of the price of an owned chip, per hour in service. [USD/h]"""

    capital_usd: float
    maintenance_usd: float
    hosting_usd: float
    electricity_usd: float

    @property
    def usd_per_chip_hour(self) -> float:
        """All parts. [USD/h]"""
        return self.capital_usd + self.maintenance_usd + self.hosting_usd + self.electricity_usd


def owned_price(inputs: OwnedInputs) -> OwnedPrice:
    """Price of an owned chip, per hour in service. [USD/h]

    Yearly costs are divided by the hours in service, utilisation × 8,766. Electricity is what chip and server draw in service and
    out of it, times PUE.

    An H100 bought for 43,000 with its share of everything, written off over four years without interest, always in service,
    nothing else to pay: 43,000 ÷ (4 × 8,766) = 1.226.

    >>> bare = OwnedInputs(27_500, 11_250, 4_250, 4, 0, 0, 0, 0, 1, 1, 210, 700, 0, 0, 1)
    >>> round(owned_price(bare).usd_per_chip_hour, 3)
    1.226

    Raises
    ------
    InputError
        If the schedule of the books does not fit the life.
    """
    hours = inputs.utilisation * HOURS_PER_YEAR
    drawn_w = power_w(inputs.load, idle_power_w=inputs.idle_power_w, peak_power_w=inputs.peak_power_w)
    mean_w = inputs.utilisation * drawn_w + (1 - inputs.utilisation) * inputs.idle_power_w
    mean_w += inputs.host_power_share * inputs.peak_power_w
    kwh = mean_w / 1e3 * HOURS_PER_YEAR * inputs.pue
    return OwnedPrice(
        capital_usd=_capital_usd_per_year(inputs) / hours,
        maintenance_usd=inputs.maintenance_share * inputs.purchase_usd / hours,
        hosting_usd=12 * inputs.hosting_usd_per_kw_month * inputs.rated_w / 1e3 / hours,
        electricity_usd=kwh * inputs.usd_per_kwh / hours,
    )


def _capital_usd_per_year(inputs: OwnedInputs) -> float:
    purchase, residual = inputs.purchase_usd, inputs.residual_share * inputs.purchase_usd
    if inputs.depreciation == "annuity":
        if inputs.year is not None:
            raise InputError(
                f"owned.year = {inputs.year}: an annuity is the same in every year; choose another depreciation"
            )
        return annuity_usd(purchase, residual, inputs.years, inputs.cost_of_capital)
    years = int(inputs.years)
    if years != inputs.years:
        raise InputError(f"owned.years = {inputs.years:g}: depreciation = {inputs.depreciation!r} takes whole years")
    charges = book_charges_usd(
        purchase, residual, years, inputs.cost_of_capital, declining=inputs.depreciation == "declining"
    )
    if inputs.year is None:
        return sum(charges) / years
    if inputs.year > years:
        raise InputError(f"owned.year = {inputs.year}: the life ends after {years} years")
    return charges[inputs.year - 1]


def _with(inputs: OwnedInputs, numbers: Mapping[str, Any]) -> OwnedInputs:
    return replace(inputs, **numbers)


#: Inputs that make the chip dearer as they fall; all others make it dearer as they rise.
_CHEAPENING = frozenset({"years", "residual_share", "utilisation"})


def owned_range(inputs: OwnedInputs, low: Mapping[str, float], high: Mapping[str, float]) -> tuple[float, float]:
    """Price with every input at its cheap end, and at its dear end. [USD/h]

    The corners of the ranges, not an interval of any probability.
    """
    cheap = {name: high[name] if name in _CHEAPENING else low[name] for name in low}
    dear = {name: low[name] if name in _CHEAPENING else high[name] for name in low}
    least, most = (owned_price(_with(inputs, ends)).usd_per_chip_hour for ends in (cheap, dear))
    return least, most
