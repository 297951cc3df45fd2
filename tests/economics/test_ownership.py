"""Owning a chip: schedules of equal present value, limits, parts that add up."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.economics.ownership import (
    OwnedInputs,
    annuity_usd,
    book_charges_usd,
    capital_recovery_factor,
    owned_price,
    owned_range,
    present_value_usd,
)
from simulator.errors import InputError

PLAIN = OwnedInputs(27_500, 11_250, 4_250, 4, 0.1, 0.08, 0.05, 130, 0.9, 0.6, 210, 700, 0.5, 0.08, 1.25)
usd = st.floats(1e2, 1e6)
rate = st.floats(0, 0.5)
share = st.floats(0, 0.9)
years = st.integers(1, 15)
inputs = st.builds(
    OwnedInputs,
    chip_usd=usd,
    host_usd=usd,
    network_usd=usd,
    years=years,
    residual_share=st.floats(0.01, 0.5),
    cost_of_capital=rate,
    maintenance_share=st.floats(0, 0.3),
    hosting_usd_per_kw_month=st.floats(0, 500),
    utilisation=st.floats(0.05, 1),
    load=st.floats(0, 1),
    idle_power_w=st.floats(1, 100),
    peak_power_w=st.floats(101, 2000),
    host_power_share=st.floats(0, 2),
    usd_per_kwh=st.floats(0, 1),
    pue=st.floats(1, 2),
    depreciation=st.sampled_from(["annuity", "straight-line", "declining"]),
)


def test_annuity_of_a_textbook_loan():
    # 100,000 at 5 % over 10 years costs 12,950.46 a year (any table of annuities: factor 0.1295046).
    assert annuity_usd(100_000, 0, 10, 0.05) == pytest.approx(12_950.46, abs=0.01)


@given(usd, share, years, rate)
def test_every_schedule_has_the_value_of_the_purchase(purchase, left, life, interest):
    residual = left * purchase
    worth = purchase - residual * (1 + interest) ** -life
    annuity = annuity_usd(purchase, residual, life, interest)
    assert present_value_usd([annuity] * life, interest) == pytest.approx(worth, rel=1e-9)
    assert present_value_usd(book_charges_usd(purchase, residual, life, interest), interest) == pytest.approx(
        worth, rel=1e-9
    )
    if residual > 0:
        declining = book_charges_usd(purchase, residual, life, interest, declining=True)
        assert present_value_usd(declining, interest) == pytest.approx(worth, rel=1e-9)


@given(usd, share, years)
def test_without_interest_every_schedule_writes_off_the_purchase(purchase, left, life):
    residual = left * purchase
    straight = (purchase - residual) / life
    assert annuity_usd(purchase, residual, life, 0.0) == pytest.approx(straight, rel=1e-9)
    assert book_charges_usd(purchase, residual, life, 0.0) == pytest.approx([straight] * life, rel=1e-9)


@given(st.floats(1e-12, 1e-6), st.floats(1, 20))
def test_small_interest_tends_to_none(interest, life):
    assert capital_recovery_factor(interest, life) == pytest.approx(1 / life, rel=1e-4)


def test_limits_of_an_owned_chip():
    # Always in service, free capital, nothing left: purchase over hours, and the electricity of the full load.
    bare = replace(PLAIN, residual_share=0, cost_of_capital=0, maintenance_share=0, hosting_usd_per_kw_month=0)
    bare = replace(bare, utilisation=1.0, load=1.0, host_power_share=0.0)
    price = owned_price(bare)
    assert price.capital_usd == pytest.approx(43_000 / (4 * 8766), rel=1e-12)
    assert price.electricity_usd == pytest.approx(0.7 * 1.25 * 0.08, rel=1e-12)
    assert price.usd_per_chip_hour == pytest.approx(price.capital_usd + price.electricity_usd, rel=1e-12)
    # Half the time in service: twice the capital per hour of it, and idle power besides.
    half = owned_price(replace(bare, utilisation=0.5))
    assert half.capital_usd == pytest.approx(2 * price.capital_usd, rel=1e-12)
    assert half.electricity_usd == pytest.approx((0.7 + 0.21) * 1.25 * 0.08, rel=1e-12)


@given(inputs)
def test_parts_add_up_and_none_is_negative(given_inputs):
    price = owned_price(given_inputs)
    parts = vars(price).values()
    assert all(part >= 0 for part in parts)
    assert math.fsum(parts) == pytest.approx(price.usd_per_chip_hour, rel=1e-12)


@given(inputs, st.floats(1, 2))
def test_the_price_follows_each_input_the_right_way(given_inputs, factor):
    base = owned_price(given_inputs).usd_per_chip_hour
    for name in ("chip_usd", "hosting_usd_per_kw_month", "usd_per_kwh", "pue", "maintenance_share"):
        dearer = replace(given_inputs, **{name: getattr(given_inputs, name) * factor})
        assert owned_price(dearer).usd_per_chip_hour >= base * (1 - 1e-12), name
    busier = replace(given_inputs, utilisation=min(1.0, given_inputs.utilisation * factor))
    assert owned_price(busier).usd_per_chip_hour <= base * (1 + 1e-12)


def test_a_price_lies_between_its_corners():
    low = {"chip_usd": 25_000.0, "years": 3.0, "utilisation": 0.7}
    high = {"chip_usd": 30_000.0, "years": 6.0, "utilisation": 1.0}
    least, most = owned_range(PLAIN, low, high)
    assert least < owned_price(PLAIN).usd_per_chip_hour < most
    assert least == owned_price(replace(PLAIN, chip_usd=25_000, years=6, utilisation=1.0)).usd_per_chip_hour
    assert most == owned_price(replace(PLAIN, chip_usd=30_000, years=3, utilisation=0.7)).usd_per_chip_hour


def test_a_year_of_the_books():
    first, last = (owned_price(replace(PLAIN, depreciation="declining", year=year)).capital_usd for year in (1, 4))
    mean = owned_price(replace(PLAIN, depreciation="declining")).capital_usd
    assert first > mean > last
    straight = [owned_price(replace(PLAIN, depreciation="straight-line", year=y)).capital_usd for y in (1, 2, 3, 4)]
    assert sum(straight) / 4 == pytest.approx(owned_price(replace(PLAIN, depreciation="straight-line")).capital_usd)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depreciation": "declining", "residual_share": 0.0}, "residual_share above 0"),
        ({"depreciation": "straight-line", "years": 3.5}, "takes whole years"),
        ({"depreciation": "straight-line", "year": 5}, "the life ends after 4 years"),
        ({"year": 2}, "an annuity is the same in every year"),
    ],
)
def test_contradictions_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        owned_price(replace(PLAIN, **changes))
