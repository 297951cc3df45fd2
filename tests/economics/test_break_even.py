"""Break-even with an API: a worked example, and the same answer from both sides."""

import doctest
from importlib import import_module

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.economics import ApiPrices, Usage, break_even, chip_seconds_usd, unit_prices
from simulator.errors import InputError

positive = st.floats(1e-3, 1e3)
tokens = st.integers(1, 10**9)


def test_the_web_agent_against_an_api():
    # 122,880 cached + 8,192 new + 128 out at $0.05, $0.50 and $1.50 a million: 0.010432. One query takes 26.64 chip-seconds of
    # v5e at $1.20 (napkin, corrected, decode without speculation): 0.008881, so a fleet must be in use 85.1 % of its time.
    used = Usage(1, 19.534536, 0.0, 7.109278, 8192, 122_880, 128)
    found = break_even(used, ApiPrices(0.5, 1.5, 0.05), 1.20, chips=230_927, provisioned_chip_s=30.0)
    assert found.api_usd_per_query == pytest.approx(0.010432, rel=1e-12)
    assert found.usage_usd_per_query == pytest.approx(0.008881, abs=1e-6)
    assert found.busy_fraction == pytest.approx(0.8513, abs=1e-4)
    # 230,927 chips cost 76.98 a second: 7,379 queries a second pay for them.
    assert found.queries_per_s == pytest.approx(230_927 * 1.20 / 3600 / 0.010432, rel=1e-12)
    assert found.own_is_cheaper == (30.0 * 1.20 / 3600 < 0.010432)


@given(positive, positive, st.integers(1, 1000), tokens, tokens, tokens, st.floats(1, 20), positive, positive, positive)
def test_break_even_is_the_same_from_both_sides(prefill, decode, queries, a, b, c, idle, hour, inp, out):
    used = Usage(queries, prefill, 0.3 * prefill, decode, a, b, c)
    chips, provisioned = 8, idle * used.busy_chip_s
    capacity = queries / (used.busy_chip_s / chips)  # all chips busy
    found = break_even(
        used, ApiPrices(inp, out), hour, chips=chips, provisioned_chip_s=provisioned, capacity_per_s=capacity
    )
    # At the break-even price of a chip, the run's own allocation price is the API's.
    own = unit_prices(used, found.usd_per_chip_hour, provisioned_chip_s=provisioned)
    assert own.per_query_usd == pytest.approx(found.api_usd_per_query, rel=1e-9)
    # At the break-even share in use, too.
    at = unit_prices(used, hour, provisioned_chip_s=used.busy_chip_s / found.busy_fraction)
    assert at.per_query_usd == pytest.approx(found.api_usd_per_query, rel=1e-9)
    # At the break-even rate the API's bill is the fleet's.
    assert found.queries_per_s * found.api_usd_per_query == pytest.approx(chip_seconds_usd(chips, hour), rel=1e-9)
    # With a constant chip time per query, load and share in use are one number.
    assert found.load == pytest.approx(found.busy_fraction, rel=1e-9)
    assert found.reachable == (found.load <= 1)
    # Breaking even at the run's own use, or below it, is being cheaper.
    assert found.own_is_cheaper == (found.allocation_usd_per_query < found.api_usd_per_query)


@given(positive, positive, tokens, tokens, tokens)
def test_cached_tokens_cost_as_others_unless_said(inp, out, a, b, c):
    amounts = {"input_tokens": a, "cached_tokens": b, "output_tokens": c}
    assert ApiPrices(inp, out).bill_usd(**amounts) == ApiPrices(inp, out, inp).bill_usd(**amounts)
    assert ApiPrices(inp, out, 0.0).bill_usd(**amounts) <= ApiPrices(inp, out).bill_usd(**amounts)


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_wrong_api_prices_are_refused(bad):
    with pytest.raises(InputError, match="input_usd"):
        ApiPrices(bad, 1.0)
    with pytest.raises(InputError, match="cached_usd"):
        ApiPrices(1.0, 1.0, bad)


def test_an_api_that_asks_nothing_has_no_break_even():
    with pytest.raises(InputError, match="asks nothing"):
        break_even(Usage(1, 1.0, 0.0, 1.0, 1, 0, 1), ApiPrices(0.0, 0.0), 1.0, chips=1, provisioned_chip_s=2.0)


def test_examples_in_the_docstrings_hold():
    names = ("api_prices", "energy", "ownership", "price_book", "prices", "site")
    for name in names:
        assert doctest.testmod(import_module(f"simulator.economics.{name}")).failed == 0, name
