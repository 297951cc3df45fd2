"""Chip time to joules, electricity and carbon.

A chip draws its idle power when nothing runs and its rated power (TDP) when the binding resource is fully used::

    power = idle + (peak − idle) · utilisation,   utilisation = max(FLOP/s ÷ peak FLOP/s, bytes/s ÷ peak bytes/s)

The straight line is a stated shape, not a fit: real chips draw more at low utilisation (clocks stay up) and may hit the cap
before full use. So every energy comes with a range, from the line with the least idle power to a chip that draws its
peak whenever it is busy, and with a grade that says how well the two ends of the line are known:

=====  ==========================================================================
grade  power of the chip
=====  ==========================================================================
A      idle and peak measured on this chip
B      peak from a datasheet (or measured), idle measured or derived for this chip
C      peak from a datasheet (or measured), idle an assumed share of it
D      peak recalled or assumed
=====  ==========================================================================
"""

from dataclasses import dataclass
from typing import Literal

from simulator.catalog.chips import ChipSpec
from simulator.catalog.price_book import ownership_defaults, published
from simulator.catalog.records import Quantity
from simulator.results.summary import Assumption

JOULES_PER_KWH = 3.6e6
HOURS_PER_YEAR = 8766.0
"""Of 365.25 days."""
#: ± on numbers that were recalled and have no range of their own.
RECALLED_ERROR = 0.05

Grade = Literal["A", "B", "C", "D"]


def power_w(utilisation: float, *, idle_power_w: float, peak_power_w: float) -> float:
    """Power of one chip at a utilisation of its binding resource, 0 … 1. [W]

    >>> power_w(0.5, idle_power_w=200.0, peak_power_w=700.0)
    450.0
    """
    return idle_power_w + (peak_power_w - idle_power_w) * utilisation


def energy_joules(
    *, idle_chip_s: float, busy_chip_s: float, busy_utilisation: float, idle_power_w: float, peak_power_w: float
) -> float:
    """Energy of chips that were busy at a mean utilisation, and idle. [J]

    The model is linear, so the mean utilisation of the busy time is all it needs.

    >>> energy_joules(idle_chip_s=10, busy_chip_s=10, busy_utilisation=1.0, idle_power_w=100, peak_power_w=500)
    6000.0
    """
    busy_power_w = power_w(busy_utilisation, idle_power_w=idle_power_w, peak_power_w=peak_power_w)
    return idle_chip_s * idle_power_w + busy_chip_s * busy_power_w


def electricity_usd(energy_j: float, usd_per_kwh: float, *, pue: float = 1.0) -> float:
    """Price of the electricity behind ``energy_j`` of IT equipment; PUE is facility ÷ IT energy, at least 1. [USD]

    >>> round(electricity_usd(3.6e6, 0.10, pue=1.5), 12)
    0.15
    """
    return energy_j / JOULES_PER_KWH * pue * usd_per_kwh


def carbon_g(energy_j: float, gco2_per_kwh: float, *, pue: float = 1.0) -> float:
    """Operational emissions of the electricity behind ``energy_j`` of IT equipment. [g CO2e]

    >>> carbon_g(3.6e6, 400.0, pue=1.25)
    500.0
    """
    return energy_j / JOULES_PER_KWH * pue * gco2_per_kwh


@dataclass(frozen=True)
class PowerModel:
    """Power of one chip between idle and peak, with what is known of both.

    Attributes
    ----------
    idle_w, peak_w
        ends of the line. [W]
    idle_low_w, idle_high_w, peak_low_w, peak_high_w
        their ranges. [W]
    host_w
        the chip's share of its server, always on. [W]
    grade
        A … D, see the module.
    source
        the line in words.
    inputs
        the shares it rests on, beside the chip's own numbers.
    """

    idle_w: float
    peak_w: float
    idle_low_w: float
    idle_high_w: float
    peak_low_w: float
    peak_high_w: float
    host_w: float
    grade: Grade
    source: str
    inputs: tuple[Assumption, ...] = ()

    def chip_joules(self, *, idle_chip_s: float, busy_chip_s: float, utilisation: float) -> float:
        """Energy of the chips. [J]"""
        return energy_joules(
            idle_chip_s=idle_chip_s,
            busy_chip_s=busy_chip_s,
            busy_utilisation=utilisation,
            idle_power_w=self.idle_w,
            peak_power_w=self.peak_w,
        )

    def chip_joules_range(self, *, idle_chip_s: float, busy_chip_s: float, utilisation: float) -> tuple[float, float]:
        """Least and most energy of the chips: the line between the low ends, and peak power whenever busy. [J]"""
        low = energy_joules(
            idle_chip_s=idle_chip_s,
            busy_chip_s=busy_chip_s,
            busy_utilisation=utilisation,
            idle_power_w=self.idle_low_w,
            peak_power_w=self.peak_low_w,
        )
        return low, idle_chip_s * self.idle_high_w + busy_chip_s * self.peak_high_w

    def it_joules(self, chip_joules: float, chip_s: float) -> float:
        """Energy of chips and the servers around them, over ``chip_s`` of provisioned chip time. [J]"""
        return chip_joules + self.host_w * chip_s


def power_grade(peak_kind: str, idle_kind: str) -> Grade:
    """Grade of a power model from the kinds of its two numbers.

    >>> power_grade("measured", "measured"), power_grade("datasheet", "assumed"), power_grade("recalled", "measured")
    ('A', 'C', 'D')
    """
    if peak_kind in {"recalled", "assumed"}:
        return "D"
    if idle_kind in {"recalled", "assumed"}:
        return "C"
    return "A" if peak_kind == idle_kind == "measured" else "B"


def power_model(chip: ChipSpec, *, idle_share: float | None = None, host_share: float | None = None) -> PowerModel:
    """Power of a chip of the catalogue.

    Idle power is the chip file's, else ``idle_share`` of its limit; the server's is ``host_share`` of the limit. Both shares are
    assumed, and the catalogue's own where they are None.

    Raises
    ------
    UnpriceableError
        If the chip's power is not published; the message names it.
    """
    defaults = ownership_defaults()
    peak_w = chip.tdp_w
    tdp = chip.power.tdp
    peak_kind = "assumed" if tdp is None else tdp.kind
    peak_low_w, peak_high_w = _range(peak_w, tdp)
    inputs = [_share("power of the server, of TDP", defaults.host_power_share, host_share)]
    host = published(defaults.host_power_share, "host_power_share") if host_share is None else host_share
    idle = chip.power.idle
    if idle is not None and idle.value is not None:
        idle_w, idle_kind = idle.si(f"{chip.name}: power.idle", "W"), idle.kind
        idle_low_w, idle_high_w = _range(idle_w, idle)
        text = f"{idle_w:g} W ({idle.kind})"
    else:
        given = defaults.idle_power_share
        inputs.append(_share("idle power, of TDP", given, idle_share))
        share = published(given, "idle_power_share") if idle_share is None else idle_share
        low, high = (given.low, given.high) if idle_share is None else (share, share)
        idle_w, idle_kind = share * peak_w, "assumed"
        idle_low_w = peak_w * (share if low is None else low)
        idle_high_w = peak_w * (share if high is None else high)
        text = f"{share:g} of TDP (assumed)"
    return PowerModel(
        idle_w=idle_w,
        peak_w=peak_w,
        idle_low_w=idle_low_w,
        idle_high_w=idle_high_w,
        peak_low_w=peak_low_w,
        peak_high_w=peak_high_w,
        host_w=host * peak_w,
        grade=power_grade(peak_kind, idle_kind),
        source=f"linear from idle, {text}, to TDP by utilisation of the binding resource",
        inputs=tuple(inputs),
    )


def _share(what: str, catalogue: Quantity, by_hand: float | None) -> Assumption:
    if by_hand is not None:
        return Assumption(what=what, value=f"{by_hand:g}", kind="assumed", source="scenario")
    value = f"{catalogue.value:g} ({catalogue.low:g} … {catalogue.high:g})"
    return Assumption(what=what, value=value, kind=catalogue.kind, source=catalogue.source)


def _range(value: float, quantity: Quantity | None) -> tuple[float, float]:
    """Range of a number in SI units: its file's, ± 5 % if it was recalled, else none."""
    if quantity is None or quantity.value is None:
        return value, value
    error = RECALLED_ERROR if quantity.kind == "recalled" else 0.0
    low = value * (1 - error) if quantity.low is None else value * quantity.low / quantity.value
    high = value * (1 + error) if quantity.high is None else value * quantity.high / quantity.value
    return low, high
