"""What a training run costs: chip time to dollars, joules and carbon."""

from dataclasses import dataclass

from simulator.economics import ChipPrice, PowerModel, Site, carbon_g, chip_seconds_usd
from simulator.errors import InputError
from simulator.training.cost import TrainingCost, TrainingSetup, training_cost


@dataclass(frozen=True)
class TrainingBill:
    """A training run, paid.

    Attributes
    ----------
    cost
        FLOPs, chip time and wall time.
    price
        of a chip-hour.
    usd, low_usd, high_usd
        chip time at that price, and at the ends of its range (None: the price has no range).
    chip_joules, low_chip_joules, high_chip_joules
        energy of the chips; None where the chip's power is not published.
    facility_joules
        with servers and the building.
    gco2
        of the facility, operational, on the grid's average. [g CO2e]
    """

    cost: TrainingCost
    price: ChipPrice
    usd: float
    low_usd: float | None
    high_usd: float | None
    chip_joules: float | None
    low_chip_joules: float | None
    high_chip_joules: float | None
    facility_joules: float | None
    gco2: float | None

    @property
    def usd_per_flop(self) -> float:
        """Price of a model FLOP: ``train_cost_per_flop`` of the lifetime optimum. [USD/FLOP]"""
        return self.usd / self.cost.flops


def training_bill(
    parameters: float,
    tokens: float,
    setup: TrainingSetup,
    price: ChipPrice,
    *,
    power: PowerModel | None = None,
    site: Site | None = None,
    utilisation: float = 1.0,
) -> TrainingBill:
    """Bill of training N (active) parameters on D tokens.

    Energy is what the chips draw at ``utilisation`` of their binding resource during the whole of the paid time. The default, 1, is
    the convention of published model cards (chip-hours × TDP). Its low end is the line at the setup's MFU, its high end peak power.

    Llama-3-70B's 15e12 tokens at 40 % of peak on H100s at 2 dollars:

    >>> from simulator.catalog.slices import resolve_slice
    >>> from simulator.economics import price_by_hand
    >>> setup = TrainingSetup(resolve_slice("h100-sxm:8"), mfu=0.4)
    >>> bill = training_bill(70.6e9, 15e12, setup, price_by_hand("h100-sxm", 2.0))
    >>> f"{bill.cost.chip_hours / 1e6:.2f} M chip-hours, {bill.usd / 1e6:.2f} M USD"
    '4.46 M chip-hours, 8.92 M USD'

    Raises
    ------
    InputError
        If N, D or the utilisation is out of range.
    """
    if not 0 <= utilisation <= 1:
        raise InputError(f"training.utilisation = {utilisation}: must be in [0, 1]")
    cost = training_cost(parameters, tokens, setup)
    return bill_of(cost, price, power=power, site=site, utilisation=utilisation, least_utilisation=setup.mfu)


def bill_of(
    cost: TrainingCost,
    price: ChipPrice,
    *,
    power: PowerModel | None = None,
    site: Site | None = None,
    utilisation: float = 1.0,
    least_utilisation: float = 0.0,
) -> TrainingBill:
    """Bill of a run whose chip time is known, from published GPU-hours for instance.

    >>> from simulator.economics import price_by_hand
    >>> run = TrainingCost(flops=6 * 37e9 * 14.8e12, chip_s=2.788e6 * 3600, wall_s=2.788e6 * 3600 / 2048)
    >>> bill_of(run, price_by_hand("h800", 2.0)).usd  # DeepSeek-V3, as its report prices it
    5576000.0
    """
    joules = low = high = facility = carbon = None
    if power is not None:
        joules = power.chip_joules(idle_chip_s=0.0, busy_chip_s=cost.chip_s, utilisation=utilisation)
        low, high = power.chip_joules_range(
            idle_chip_s=0.0, busy_chip_s=cost.chip_s, utilisation=min(utilisation, least_utilisation)
        )
        if site is not None:
            it_joules = power.it_joules(joules, cost.chip_s)
            facility = it_joules * site.pue
            carbon = carbon_g(it_joules, site.gco2_per_kwh, pue=site.pue)

    def paid(usd_per_chip_hour: float | None) -> float | None:
        return None if usd_per_chip_hour is None else chip_seconds_usd(cost.chip_s, usd_per_chip_hour)

    return TrainingBill(
        cost=cost,
        price=price,
        usd=chip_seconds_usd(cost.chip_s, price.usd_per_chip_hour),
        low_usd=paid(price.low),
        high_usd=paid(price.high),
        chip_joules=joules,
        low_chip_joules=low,
        high_chip_joules=high,
        facility_joules=facility,
        gco2=carbon,
    )
