"""Prices of a run: terms, price files that travel with the result, identities of cost and energy."""

import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.economics import ApiPrices, Usage, unit_prices
from simulator.economics.api_prices import break_even_of
from simulator.economics.prices import usage_of
from simulator.errors import InputError, UnpriceableError
from simulator.results import write_result
from simulator.run import load_scenario, run_scenario
from simulator.run.resolve import resolve

NAME = "llama-3-8b-azure-chat"
SMALL = ["traffic.n_requests=400"]
FILE = """
schema_version = 1

[[chips.h100-sxm.prices]]
term = "reserved-1y"
usd_per_hour = 2.10
date = "2026-10"

[regions.cellar]
usd_per_kwh = 0.05
gco2_per_kwh = 30
"""


@pytest.fixture
def price_file(tmp_path):
    path = tmp_path / "prices.toml"
    path.write_text(FILE, encoding="utf-8")
    return path


def priced(*overrides):
    return run_scenario(load_scenario(NAME, [*SMALL, *overrides]), summary_only=True).summary


def test_a_price_file_travels_with_the_result(price_file, tmp_path):
    scenario = load_scenario(NAME, [*SMALL, f"prices.file={price_file}", "prices.region=cellar"])
    one = run_scenario(scenario)
    write_result(one.result, tmp_path / "one")
    price_file.unlink()
    again = run_scenario(load_scenario(str(tmp_path / "one")))
    write_result(again.result, tmp_path / "two")
    files = [{f.name: f.read_bytes() for f in sorted((tmp_path / n).iterdir())} for n in ("one", "two")]
    assert files[0] == files[1]
    text = (tmp_path / "one" / "scenario.toml").read_text(encoding="utf-8")
    assert "prices.toml" not in text
    assert tomllib.loads(text)["prices"]["book"]["chips"]["h100-sxm"]["prices"][0]["usd_per_hour"] == 2.10
    assert again.summary.prices.usd_per_chip_hour == 2.10
    assert again.summary.energy.gco2_per_kwh == 30


def test_a_price_file_is_relative_to_its_scenario(price_file):
    scenario = price_file.parent / "mine.toml"
    text = 'schema_version = 1\nname = "mine"\nmodel = "llama-3-8b"\nslice = "h100-sxm:1"\n'
    text += (
        '[traffic]\nmix = "azure-conversation"\nn_requests = 10\narrival = { process = "poisson", rate_per_s = 1.0 }\n'
    )
    scenario.write_text(text + '[prices]\nfile = "prices.toml"\n', encoding="utf-8")
    assert load_scenario(str(scenario)).prices.book.regions["cellar"].gco2_per_kwh == 30
    price_file.write_text(FILE.replace("usd_per_hour = 2.10", "usd_per_hour = -2"), encoding="utf-8")
    with pytest.raises(InputError, match=r"prices.toml: chips.h100-sxm.prices.0.usd_per_hour = -2"):
        load_scenario(str(scenario))


def test_without_a_price_file_the_resolved_scenario_has_none():
    assert "book" not in load_scenario(NAME).as_toml()["prices"]


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["prices.term=sopt"], InputError, "prices.term = 'sopt': unknown term; did you mean 'spot'"),
        (["prices.term=capacity-block"], UnpriceableError, "h100-sxm has no capacity-block price"),
        (["prices.region=germny"], InputError, "unknown region 'germny'; did you mean 'germany'"),
        (["prices.operator=gogle"], InputError, "unknown operator 'gogle'"),
        (["prices.usd_per_chip_hour=2", "prices.term=spot"], InputError, "say two things"),
        (["prices.pue=0.5"], InputError, "prices.pue = 0.5"),
        (["prices.usd_per_kwh=nan"], InputError, "prices.usd_per_kwh"),
        (
            ["prices.term=owned", "prices.region=asia-east1"],
            UnpriceableError,
            "electricity in 'asia-east1' is not published",
        ),
    ],
)
def test_wrong_prices_are_refused_before_the_run(overrides, error, message):
    with pytest.raises(error, match=message):
        resolve(load_scenario(NAME, overrides))


def test_terms_scale_every_price_alike():
    market, spot = priced(), priced("prices.term=spot")
    ratio = spot.prices.usd_per_chip_hour / market.prices.usd_per_chip_hour
    assert (spot.prices.term, ratio) == ("spot", pytest.approx(1.25 / 2.95))
    for basis in ("usage", "allocation"):
        for name, value in vars(getattr(market.prices, basis)).items():
            other = getattr(getattr(spot.prices, basis), name)
            assert value is None if other is None else other == pytest.approx(ratio * value, rel=1e-12), name
    assert spot.chip_seconds_per_query == market.chip_seconds_per_query
    assert spot.energy == market.energy


def test_an_owned_fleet_shows_its_parts_and_says_what_it_assumed():
    owned = priced("prices.term=owned", "prices.region=united-states")
    assert sum(owned.prices.owned.values()) == pytest.approx(owned.prices.usd_per_chip_hour, rel=1e-12)
    assert owned.prices.low_usd_per_chip_hour < owned.prices.usd_per_chip_hour < owned.prices.high_usd_per_chip_hour
    whats = [item.what for item in owned.assumptions]
    assert {"owned h100-sxm: chip_usd", "PUE, unnamed", "electricity, united-states", "idle power, of TDP"} <= set(
        whats
    )
    assert len(whats) == len(set(whats))


def test_usage_and_idle_make_allocation():
    summary = priced()
    usage = usage_of(summary)
    prices, ledger = summary.prices, summary.ledger
    paid = prices.allocation.per_query_usd * usage.queries
    used = prices.usage.per_query_usd * usage.queries
    idle = ledger.idle_chip_s * prices.usd_per_chip_hour / 3600
    assert used + idle == pytest.approx(paid, rel=1e-9)
    assert paid == pytest.approx(ledger.chip_s * prices.usd_per_chip_hour / 3600, rel=1e-9)
    assert usage.busy_chip_s == pytest.approx(ledger.busy_chip_s, rel=1e-9)


def test_energy_of_the_facility_is_chips_servers_and_building():
    summary = priced("prices.region=germany", "prices.operator=google")
    energy, ledger = summary.energy, summary.ledger
    queries = summary.requests.finished
    it_joules = energy.joules_per_query + energy.host_power_w * ledger.chip_s / queries
    assert energy.facility_joules_per_query == pytest.approx(1.10 * it_joules, rel=1e-12)
    assert energy.gco2_per_query == pytest.approx(381 * energy.facility_joules_per_query / 3.6e6, rel=1e-12)
    assert energy.usd_per_query == pytest.approx(0.19 * energy.facility_joules_per_query / 3.6e6, rel=1e-12)
    assert energy.low_joules_per_query < energy.joules_per_query < energy.high_joules_per_query
    assert energy.grade == "C"
    assert priced().energy.usd_per_query is None  # rented chips include electricity


def test_a_run_breaks_even_where_its_allocation_price_is_the_apis():
    summary = priced()
    found = break_even_of(summary, ApiPrices(0.05, 0.08))
    assert found.allocation_usd_per_query == pytest.approx(summary.prices.allocation.per_query_usd, rel=1e-9)
    assert found.usage_usd_per_query == pytest.approx(summary.prices.usage.per_query_usd, rel=1e-9)
    at = priced(f"prices.usd_per_chip_hour={found.usd_per_chip_hour!r}")
    assert at.prices.allocation.per_query_usd == pytest.approx(found.api_usd_per_query, rel=1e-9)


positive = st.floats(1e-3, 1e6)


@settings(deadline=None)
@given(positive, positive, positive, st.integers(2, 1000), st.floats(0.1, 100))
def test_expected_cost_is_linear_in_exogenous_demand(prefill, decode, idle, factor, hour):
    # The same queries, n times: each pays the same, so the bill is n times the bill, on either basis.
    once = Usage(10, prefill, 0.0, decode, 1000, 0, 100)
    often = Usage(10 * factor, factor * prefill, 0.0, factor * decode, 1000 * factor, 0, 100 * factor)
    for basis in (None, once.busy_chip_s + idle):
        scaled = None if basis is None else basis * factor
        one = unit_prices(once, hour, provisioned_chip_s=basis).per_query_usd * once.queries
        many = unit_prices(often, hour, provisioned_chip_s=scaled).per_query_usd * often.queries
        assert many == pytest.approx(factor * one, rel=1e-9)
