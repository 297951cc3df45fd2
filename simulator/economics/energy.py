"""Chip time to joules: a linear power model between idle and peak.

A chip draws its idle power when nothing runs and its rated power (TDP) when the binding resource is fully used::

    power = idle + (peak − idle) · utilisation,   utilisation = max(FLOP/s ÷ peak FLOP/s, bytes/s ÷ peak bytes/s)

It is a placeholder of stated shape, not a fit: real chips draw more at low utilisation (clocks stay up) and may hit the
cap before full use. Hosts, switches and cooling are outside; a PUE factor adds the building.
"""

JOULES_PER_KWH = 3.6e6

#: Share of TDP that a powered chip with a loaded model draws between steps. Assumed; a fleet of TPU v4 chips was
#: measured at no less than 90 W of at most 192 W, an upper bound on this share.
IDLE_FRACTION = 0.3
IDLE_FRACTION_LOW, IDLE_FRACTION_HIGH = 0.1, 0.47


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
    """Price of the electricity behind ``energy_j`` at the chips; PUE is facility ÷ IT energy, at least 1. [USD]

    >>> electricity_usd(3.6e6, 0.10, pue=1.5)
    0.15000000000000002
    """
    return energy_j / JOULES_PER_KWH * pue * usd_per_kwh
