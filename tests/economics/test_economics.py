"""Prices and energy: published worked values, and identities that must hold for any split."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.economics import Usage, chip_seconds_usd, electricity_usd, energy_joules, power_w, unit_prices

amount = st.floats(1e-3, 1e6)
count = st.integers(1, 10**9)


@pytest.mark.parametrize(
    ("name", "chip_s", "usd_per_chip_hour", "expected_usd", "digits"),
    [
        ("napkin, corrected, v5e at 1.20", 23.092719, 1.20, 0.00770, 5),
        ("napkin, as written", 8.862235972, 1.20, 0.00295, 5),
        ("one chip-hour", 3600.0, 4.2, 4.2, 12),
    ],
)
def test_price_of_chip_time(name, chip_s, usd_per_chip_hour, expected_usd, digits):
    assert chip_seconds_usd(chip_s, usd_per_chip_hour) == pytest.approx(expected_usd, abs=0.5 * 10**-digits), name


@given(prefill=amount, share=st.floats(0, 1), decode=amount, a=count, b=count, c=count, idle=amount)
def test_token_prices_add_up_to_what_the_queries_pay(prefill, share, decode, a, b, c, idle):
    used = Usage(7, prefill, share * prefill, decode, a, b, c)
    for basis in (None, used.busy_chip_s + idle):
        prices = unit_prices(used, 2.0, provisioned_chip_s=basis)
        by_token = (
            prices.per_million_input_tokens_usd * a
            + prices.per_million_cached_tokens_usd * b
            + prices.per_million_output_tokens_usd * c
        ) / 1e6
        assert by_token == pytest.approx(prices.per_query_usd * 7, rel=1e-9)
        assert prices.per_million_tokens_usd * (a + b + c) / 1e6 == pytest.approx(by_token, rel=1e-9)
    paid = prices.per_query_usd * 7
    assert paid == pytest.approx(chip_seconds_usd(used.busy_chip_s + idle, 2.0), rel=1e-9)


def test_tokens_that_do_not_occur_have_no_price():
    prices = unit_prices(Usage(1, 1.0, 0.0, 1.0, 10, 0, 5), 1.0)
    assert prices.per_million_cached_tokens_usd is None


@given(u=st.floats(0, 1), idle_s=amount, busy_s=amount)
def test_energy_lies_between_idle_and_peak(u, idle_s, busy_s):
    energy = energy_joules(
        idle_chip_s=idle_s, busy_chip_s=busy_s, busy_utilisation=u, idle_power_w=100.0, peak_power_w=700.0
    )
    assert 100.0 * (idle_s + busy_s) * (1 - 1e-12) <= energy <= (100 * idle_s + 700 * busy_s) * (1 + 1e-12)
    assert 100.0 <= power_w(u, idle_power_w=100.0, peak_power_w=700.0) <= 700.0


def test_pue_scales_the_electricity_bill():
    assert electricity_usd(3.6e6, 0.2, pue=2.0) == pytest.approx(0.4)
