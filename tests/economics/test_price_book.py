"""The price book: terms, providers, price files, owned chips, sites."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.catalog.chips import chip_names, load_chip
from simulator.catalog.price_book import NO_PRICES, PriceFile, load_price_file, operator_table, region_table
from simulator.economics import TERMS, chip_price, energy_joules, power_model, price_by_hand, quotes, resolve_site
from simulator.economics.energy import power_grade
from simulator.errors import InputError, UnpriceableError

FILE = """
schema_version = 1
currency = "USD"

[owned]
years = 5
cost_of_capital = 0.0
residual_share = 0.0

[[chips.h100-sxm.prices]]
term = "reserved-1y"
usd_per_hour = 2.10
provider = "contract of 2026"
date = "2026-10"

[chips.tpu-v5e.owned]
chip_usd = 3000
host_usd = 1000
network_usd = 400
depreciation = "straight-line"

[regions.cellar]
usd_per_kwh = 0.05
gco2_per_kwh = 30

[regions.germany]
usd_per_kwh = 0.11

[operators.us]
pue = 1.15
"""


@pytest.fixture
def write(tmp_path):
    def writer(text):
        path = tmp_path / "prices.toml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return writer


@pytest.fixture
def book(write):
    return load_price_file(write(FILE))


@pytest.mark.parametrize(
    ("chip", "term", "usd"),
    [
        ("tpu-v5e", None, 1.20),  # the napkin's price
        ("tpu-v5e", "reserved-3y", 0.54),
        ("h100-sxm", None, 2.95),
        ("h100-sxm", "spot", 1.25),
        ("h100-sxm", "reserved-1y", 4.06),  # 6.88 less 41 %
    ],
)
def test_terms_of_the_catalogue(chip, term, usd):
    assert chip_price(load_chip(chip), term).usd_per_chip_hour == usd


def test_a_provider_is_found_by_a_part_of_its_name():
    h100 = load_chip("h100-sxm")
    assert chip_price(h100, "on-demand", provider="google").usd_per_chip_hour == 10.8
    assert chip_price(h100, provider="nebius").term == "on-demand"
    with pytest.raises(InputError, match="'Nebis': no such quote of h100-sxm; did you mean 'Nebius'"):
        chip_price(h100, "on-demand", provider="Nebis")


@pytest.mark.parametrize(
    ("chip", "term", "error", "message"),
    [
        ("h100-sxm", "sopt", InputError, "unknown term; did you mean 'spot'"),
        ("h20", None, UnpriceableError, "h20 has no price in its file"),
        (
            "a10g",
            "spot",
            UnpriceableError,
            r"a10g has no spot price in its file \(terms it has: on-demand, reserved-1y",
        ),
        ("tpu-v5e", "owned", UnpriceableError, "tpu-v5e: ownership.chip is not published"),
        ("a10g", "owned", UnpriceableError, r"a10g: what buying one takes \(ownership.chip\) is not in its file"),
    ],
)
def test_what_has_no_price_is_refused_by_name(chip, term, error, message):
    with pytest.raises(error, match=message):
        chip_price(load_chip(chip), term)


@pytest.mark.parametrize("term", TERMS)
def test_every_chip_answers_or_refuses_every_term_in_words(term):
    for name in chip_names():
        chip = load_chip(name)
        known = {q.term for q in chip.prices} | ({"owned"} if chip.ownership and chip.ownership.chip.value else set())
        if term not in known:
            with pytest.raises(UnpriceableError, match=name):
                chip_price(chip, term)
            continue
        price = chip_price(chip, term)
        assert 0 < price.usd_per_chip_hour < 100
        assert price.term == term
        assert price.inputs
        assert price.low is None or price.high is None or price.low <= price.usd_per_chip_hour <= price.high


def test_owned_parts_sum_to_the_price():
    price = chip_price(load_chip("h100-sxm"), "owned")
    assert math.fsum(vars(price.owned).values()) == pytest.approx(price.usd_per_chip_hour, rel=1e-12)
    # Between the spot and the on-demand price of a specialist: renting out at 2.95 what costs 2.1 is a business.
    assert 1.25 < price.usd_per_chip_hour < 2.95
    assert {item.kind for item in price.inputs} >= {"derived", "assumed"}


def test_a_price_file_goes_before_the_catalogue(book):
    h100, v5e = load_chip("h100-sxm"), load_chip("tpu-v5e")
    assert [q.usd_per_hour for q in quotes(h100, book)][:2] == [2.10, 2.95]
    price = chip_price(h100, book=book)
    assert (price.usd_per_chip_hour, price.term, price.kind) == (2.10, "reserved-1y", "assumed")
    # No interest, nothing left: 4,400 over five years of which 90 % in service.
    owned = chip_price(v5e, "owned", book=book, site=resolve_site("cellar", "us", book=book))
    assert owned.owned.capital_usd == pytest.approx(4400 / 5 / (0.9 * 8766), rel=1e-12)
    assert owned.region == "cellar"


def test_sites(book):
    world = resolve_site()
    assert (world.gco2_per_kwh, world.pue) == (481, 1.25)
    cellar = resolve_site("cellar", "us", book=book)
    assert (cellar.usd_per_kwh, cellar.gco2_per_kwh, cellar.pue) == (0.05, 30, 1.15)
    germany = resolve_site("germany", "google", book=book)
    assert (germany.usd_per_kwh, germany.gco2_per_kwh, germany.pue) == (0.11, 381, 1.10)
    assert [item.source for item in germany.inputs][-1] == "price file"
    assert resolve_site(pue=1.0, usd_per_kwh=0.3, gco2_per_kwh=5).gco2_per_kwh == 5
    with pytest.raises(InputError, match="unknown region 'germny'; did you mean 'germany'"):
        resolve_site("germny")
    with pytest.raises(InputError, match="unknown operator 'gogle'; did you mean 'google'"):
        resolve_site(operator="gogle")
    with pytest.raises(UnpriceableError, match="electricity in 'asia-northeast1' is not published"):
        _ = resolve_site("asia-northeast1").electricity_usd_per_kwh


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('currency = "USD"', 'currency = "EUR"'), "currency = 'EUR': prices are in USD"),
        (("chips.h100-sxm", "chips.h100-smx"), "unknown chip; did you mean 'h100-sxm'"),
        (('"reserved-1y"', '"reserved"'), r"chips.h100-sxm.prices.0.term = 'reserved'"),
        (("2.10", "-2.10"), "chips.h100-sxm.prices.0.usd_per_hour = -2.1"),
        (("2.10", "nan"), "chips.h100-sxm.prices.0.usd_per_hour = nan"),
        (("2.10", "inf"), "chips.h100-sxm.prices.0.usd_per_hour"),
        (('date = "2026-10"\n', ""), "chips.h100-sxm.prices.0.date: required"),
        (('date = "2026-10"', 'date = "last year"'), "chips.h100-sxm.prices.0.date"),
        (
            ("cost_of_capital", "cost_of_captial"),
            "unknown field 'owned.cost_of_captial'; did you mean 'cost_of_capital'",
        ),
        (("[owned]\n", "[owned]\nchip_usd = 5\n"), "chip_usd is of one chip"),
        (("pue = 1.15", "pue = 0.9"), "operators.us.pue = 0.9"),
        (("usd_per_kwh = 0.05", "usd_per_kwh = -0.05"), "regions.cellar.usd_per_kwh = -0.05"),
        (("schema_version = 1", "schema_version = 3"), "schema_version = 3"),
    ],
)
def test_a_wrong_price_file_is_refused_with_file_field_and_value(write, change, message):
    assert change[0] in FILE
    with pytest.raises(InputError, match=message) as refused:
        load_price_file(write(FILE.replace(*change, 1)))
    assert "prices.toml" in str(refused.value)


def test_a_missing_price_file_is_refused():
    with pytest.raises(InputError, match=r"nowhere/prices\.toml' does not exist"):
        load_price_file("nowhere/prices.toml")


def test_an_empty_price_file_changes_nothing():
    assert PriceFile(schema_version=1) == NO_PRICES
    for name in ("h100-sxm", "tpu-v5e"):
        assert chip_price(load_chip(name), book=NO_PRICES) == chip_price(load_chip(name))


def test_a_price_by_hand_says_so():
    price = price_by_hand("h100-sxm", 2.0)
    assert (price.text, price.kind, price.usd_per_chip_hour) == ("scenario", "assumed", 2.0)


def test_every_region_and_operator_states_its_carbon_and_pue():
    for name in region_table().regions:
        assert resolve_site(name).gco2_per_kwh > 0
    for name in operator_table().operators:
        assert resolve_site(operator=name).pue >= 1


def test_grades_by_what_is_known():
    assert power_model(load_chip("tpu-v4")).grade == "A"  # idle and largest draw measured over a fleet
    assert power_model(load_chip("h100-sxm")).grade == "C"  # datasheet's limit, assumed idle share
    assert power_model(load_chip("tpu-v5e")).grade == "D"  # recalled
    assert [power_grade(peak, idle) for peak, idle in (("datasheet", "measured"), ("measured", "derived"))] == [
        "B",
        "B",
    ]
    with pytest.raises(UnpriceableError):
        power_model(
            load_chip("h20").model_copy(update={"power": load_chip("h20").power.model_copy(update={"tdp": None})})
        )


@given(
    st.sampled_from(["h100-sxm", "tpu-v4", "tpu-v5e", "l40s"]), st.floats(0, 1), st.floats(0, 1e6), st.floats(0, 1e6)
)
def test_energy_lies_in_its_range_and_the_range_between_idle_and_peak(name, level, idle_s, busy_s):
    model = power_model(load_chip(name))
    times = {"idle_chip_s": idle_s, "busy_chip_s": busy_s, "utilisation": level}
    low, high = model.chip_joules_range(**times)
    assert low * (1 - 1e-12) <= model.chip_joules(**times) <= high * (1 + 1e-12)
    assert model.idle_low_w * (idle_s + busy_s) * (1 - 1e-12) <= low
    assert high <= model.peak_high_w * (idle_s + busy_s) * (1 + 1e-12)
    assert model.chip_joules(**times) == energy_joules(
        idle_chip_s=idle_s,
        busy_chip_s=busy_s,
        busy_utilisation=level,
        idle_power_w=model.idle_w,
        peak_power_w=model.peak_w,
    )
