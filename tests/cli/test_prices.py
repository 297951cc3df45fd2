"""``chipseconds prices`` and the price options of other commands, as a user meets them."""

import json

import pytest

FILE = """
schema_version = 1

[[chips.h100-sxm.prices]]
term = "reserved-1y"
usd_per_hour = 2.10
date = "2026-10"

[chips.tpu-v5e.owned]
chip_usd = 3000
"""


@pytest.fixture
def price_file(tmp_path):
    path = tmp_path / "prices.toml"
    path.write_text(FILE, encoding="utf-8")
    return str(path)


def test_the_list_has_term_price_date_and_source(run_cli):
    text = run_cli("prices", "list", "tpu-v5e").stdout
    for word in ("on-demand", "1.200", "2025-02", "scaling-book-prices", "reserved-3y", "0.540", "spot"):
        assert word in text
    document = json.loads(run_cli("prices", "list", "--json").stdout)
    assert document["currency"] == "USD"
    assert all(row["source"] and row["term"] and row["kind"] for row in document["prices"])
    assert {row["term"] for row in document["prices"]} >= {"on-demand", "reserved-1y", "reserved-3y", "spot", "owned"}
    spot = json.loads(run_cli("prices", "list", "--term", "spot", "--json").stdout)["prices"]
    assert {row["term"] for row in spot} == {"spot"}


def test_a_price_file_is_listed_first(run_cli, price_file):
    rows = json.loads(run_cli("prices", "list", "h100-sxm", "--prices", price_file, "--json").stdout)["prices"]
    assert (rows[0]["usd_per_hour"], rows[0]["source"]) == (2.10, "price file")
    owned = json.loads(run_cli("prices", "owned", "tpu-v5e", "--prices", price_file, "--json").stdout)
    assert sum(owned["parts"].values()) == pytest.approx(owned["usd_per_chip_hour"], rel=1e-12)


def test_an_owned_chip_is_taken_apart(run_cli):
    text = run_cli("prices", "owned", "h100-sxm", "--region", "germany").stdout
    for word in ("capital", "maintenance", "hosting", "electricity", "together", "0.19 USD/kWh", "h100-cluster-sheet"):
        assert word in text


def test_regions_and_operators(run_cli):
    text = run_cli("prices", "regions").stdout
    assert "us-central1" in text
    assert "431.95" in text
    assert "google-region-carbon" in text
    assert json.loads(run_cli("prices", "regions", "--json").stdout)["default_region"] == "world"


def test_a_training_run(run_cli):
    args = [
        "prices",
        "training",
        "--parameters",
        "37e9",
        "--tokens",
        "14.8e12",
        "--slice",
        "h100-sxm:8",
        "--mfu",
        "0.346",
    ]
    bill = json.loads(run_cli(*args, "--slices", "256", "--json").stdout)
    assert bill["chip_hours"] == pytest.approx(2.664e6, rel=3e-3)
    assert bill["usd"] == pytest.approx(2.95 * bill["chip_hours"], rel=1e-12)
    assert bill["wall_s"] == pytest.approx(3600 * bill["chip_hours"] / 2048, rel=1e-12)
    text = run_cli(*args, "--term", "owned", "--region", "germany").stdout
    assert "t CO2e at 381 g/kWh (germany)" in text


def test_break_even_of_a_result_and_of_a_scenario(run_cli, tmp_path):
    size = ["--set", "traffic.n_requests=300"]
    run_cli("simulate", "llama-3-8b-azure-chat", *size, "--out", str(tmp_path / "run"), "-q")
    api = ["--input", "0.05", "--output", "0.08"]
    read = run_cli("prices", "break-even", str(tmp_path / "run"), *api, "--json")
    assert "simulating" not in read.stderr
    again = run_cli("prices", "break-even", "llama-3-8b-azure-chat", *size, *api, "--json")
    one, two = json.loads(read.stdout), json.loads(again.stdout)
    assert one["break_even_queries_per_s"] == pytest.approx(two["break_even_queries_per_s"], rel=1e-6)
    assert one["break_even_load"] == pytest.approx(one["break_even_queries_per_s"] / one["capacity_per_s"])
    spot = json.loads(run_cli("prices", "break-even", str(tmp_path / "run"), *api, "--term", "spot", "--json").stdout)
    assert spot["break_even_queries_per_s"] == pytest.approx(one["break_even_queries_per_s"] * 1.25 / 2.95, rel=1e-6)
    text = run_cli("prices", "break-even", str(tmp_path / "run"), "--input", "0.01", "--output", "0.01").stdout
    assert "the API is cheaper at any load" in text


def test_simulate_and_roofline_take_term_and_file(run_cli, price_file):
    size = ["--set", "traffic.n_requests=300", "-q", "--summary-only"]
    text = " ".join(run_cli("simulate", "llama-3-8b-azure-chat", *size, "--prices", price_file).stdout.split())
    assert "at $2.10 per chip-hour: own prices, reserved-1y, 2026-10" in text
    assert "g CO2e per query at 481 g/kWh (world)" in text
    assert "grade C" in text
    step = ["roofline", "--model", "llama-3-70b", "--slice", "h100-sxm:8", "--decode", "32", "--context", "2048"]
    plain = json.loads(run_cli(*step, "--prices", price_file, "--json").stdout)
    assert plain["price"]["usd_per_chip_hour"] == 2.10
    assert plain["price"]["per_million_tokens_usd"] == pytest.approx(
        2.10 / 3600 * 1e6 / plain["tokens_per_s_per_chip"], rel=1e-12
    )
    assert (
        "per M tokens at $1.25 per chip-hour: spot, Nebius, 2026"
        in run_cli(*step, "--term", "spot", "--shard", "tp8").stdout
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["prices", "list", "h100-smx"], "unknown chip 'h100-smx'"),
        (["prices", "list", "--term", "sopt"], "unknown term; did you mean 'spot'"),
        (["prices", "list", "a10g", "--term", "spot"], "no spot price of a10g"),
        (["prices", "list", "--prices", "none.toml"], "price file './none.toml' does not exist"),
        (["prices", "owned", "tpu-v5e"], "tpu-v5e: ownership.chip is not published"),
        (["prices", "owned", "h100-sxm", "--region", "germny"], "did you mean 'germany'"),
        (
            ["prices", "training", "--tokens", "1e12", "--slice", "h100-sxm:8"],
            "exactly one of --model and --parameters",
        ),
        (
            ["prices", "training", "--parameters", "-1", "--tokens", "1e12", "--slice", "h100-sxm:8"],
            "training.parameters = -1.0",
        ),
        (
            ["prices", "break-even", "llama-3-8b-azure-chat", "--input", "-1", "--output", "1"],
            "API price input_usd = -1.0",
        ),
        (["simulate", "llama-3-8b-azure-chat", "--term", "capacity-block"], "h100-sxm has no capacity-block price"),
    ],
)
def test_wrong_input_ends_in_one_message(run_cli, args, message):
    done = run_cli(*args, code=2)
    assert message in done.stderr
    assert done.stdout == ""
