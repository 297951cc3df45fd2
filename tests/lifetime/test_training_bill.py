"""The bill of a training run: published runs, linearity, and agreement with the price of a FLOP."""

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.catalog.chips import load_chip
from simulator.catalog.slices import resolve_slice
from simulator.economics import chip_price, power_model, price_by_hand, resolve_site
from simulator.errors import InputError
from simulator.lifetime import training_bill as module
from simulator.lifetime.optimum import flop_price
from simulator.lifetime.training_bill import bill_of, training_bill
from simulator.training.cost import TrainingCost, TrainingSetup

size = st.floats(1e8, 1e13)
H100 = resolve_slice("h100-sxm:8")


def test_deepseek_v3_as_its_report_prices_it():
    # DeepSeek-AI 2024, arXiv:2412.19437, Table 1: 2.664 M + 0.119 M + 0.005 M H800-hours at $2 are $5.576 M.
    hours = (2.664e6, 0.119e6, 0.005e6)
    bills = [bill_of(TrainingCost(1.0, 3600 * h, 3600 * h), price_by_hand("h800", 2.0)) for h in hours]
    assert [round(bill.usd) for bill in bills] == [5_328_000, 238_000, 10_000]
    assert sum(bill.usd for bill in bills) == pytest.approx(5.576e6, rel=1e-12)


def test_sardanas_training_price():
    # README example of Sardana et al. 2024: A100 bf16 at $1.40 an hour and an MFU of 0.5.
    setup = TrainingSetup(resolve_slice("a100-80-sxm:8"), mfu=0.5)
    bill = training_bill(2.05273e10, 3.30212e12, setup, price_by_hand("a100-80-sxm", 1.40))
    assert bill.usd_per_flop == pytest.approx(1.40 / 3600 / (312e12 * 0.5), rel=1e-12)
    assert bill.usd == pytest.approx(6 * 2.05273e10 * 3.30212e12 * bill.usd_per_flop, rel=1e-12)


@given(size, size, st.floats(0.05, 1), st.floats(1, 3), st.floats(0.1, 50))
def test_the_bill_is_the_price_of_a_flop_times_the_flops(n, d, mfu, overhead, hour):
    bill = training_bill(n, d, TrainingSetup(H100, mfu=mfu, overhead=overhead), price_by_hand("h100-sxm", hour))
    per_flop = flop_price(hour, H100.chip.peak_flops_per_s("bf16"), mfu) * overhead
    assert bill.usd_per_flop == pytest.approx(per_flop, rel=1e-12)
    assert bill.usd == pytest.approx(6 * n * d * per_flop, rel=1e-12)


@given(size, size, st.floats(1.5, 10))
def test_dollars_joules_and_carbon_are_linear_in_tokens(n, d, factor):
    h100 = load_chip("h100-sxm")
    about = {"price": chip_price(h100), "power": power_model(h100), "site": resolve_site("germany", "google")}
    one, many = (training_bill(n, tokens, TrainingSetup(H100), **about) for tokens in (d, factor * d))
    for name in ("usd", "low_usd", "high_usd", "chip_joules", "low_chip_joules", "facility_joules", "gco2"):
        assert getattr(many, name) == pytest.approx(factor * getattr(one, name), rel=1e-9), name
    assert one.low_usd <= one.usd <= one.high_usd
    assert one.low_chip_joules <= one.chip_joules <= one.high_chip_joules * (1 + 1e-12)
    # Chips and half as much again for servers, in a building of PUE 1.10, on a grid of 381 g.
    assert one.facility_joules == pytest.approx(1.5 * 1.10 * one.chip_joules, rel=1e-12)
    assert one.gco2 == pytest.approx(381 * one.facility_joules / 3.6e6, rel=1e-12)


def test_without_a_power_figure_there_is_no_energy():
    bill = training_bill(1e9, 1e12, TrainingSetup(H100), price_by_hand("h100-sxm", 2.0))
    assert (bill.chip_joules, bill.facility_joules, bill.gco2) == (None, None, None)
    with pytest.raises(InputError, match=r"training.utilisation = 1.5"):
        training_bill(1e9, 1e12, TrainingSetup(H100), price_by_hand("h100-sxm", 2.0), utilisation=1.5)


def test_examples_in_the_docstrings_hold():
    assert doctest.testmod(module).failed == 0
