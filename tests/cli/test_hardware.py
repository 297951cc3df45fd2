"""``chipseconds hardware`` as a user types it."""

import json

import pytest
from click.testing import CliRunner

from simulator.catalog.chips import chip_names, load_chip
from simulator.cli.hardware import hardware
from simulator.errors import InputError


def run(*arguments: str) -> str:
    result = CliRunner().invoke(hardware, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_list_has_every_chip_and_its_numbers():
    lines = run("list").splitlines()
    by_name = {line.split()[0]: line.split() for line in lines if line.strip()}
    assert set(chip_names()) <= set(by_name)
    assert by_name["tpu-v5e"] == ["tpu-v5e", "197", "-", "394", "16", "819", "4", "x", "45", "ICI", "~200", "1.20"]
    assert by_name["tpu-7x"][1:4] == ["2,307", "4,614", "?"]
    assert by_name["t4"][1] == "~65*"


def test_list_as_json_is_in_si_units():
    chips = {c["name"]: c for c in json.loads(run("list", "--json"))["chips"]}
    assert sorted(chips) == chip_names()
    assert chips["tpu-v5e"]["hbm_bandwidth_bytes_per_s"] == 819e9
    assert chips["tpu-v5e"]["peak_flops_per_s"]["bf16"] == 197e12
    assert chips["tpu-7x"]["peak_flops_per_s"]["int8"] is None
    assert chips["h20"]["default_price_usd_per_hour"] is None


@pytest.mark.parametrize("name", chip_names())
def test_show_prints_every_number_with_its_source(name):
    text = run("show", name)
    chip = load_chip(name)
    rows = text.split("Notes\n")[0].splitlines()
    expected = len(chip.quantities()) + len(chip.prices) + (chip.scale_up is not None)
    kinds = ("datasheet", "measured", "derived", "assumed", "recalled", "not published")
    assert sum(any(f"  {kind}  " in row for kind in kinds) for row in rows) == expected
    for quantity in chip.quantities().values():
        assert f"  {quantity.source} " in text


def test_show_lays_out_a_slice():
    text = run("show", "tpu-v5e:8x16")
    assert "ICI: 8x16, only the axis of length 16 wraps around" in text
    assert "128 chips" in text
    assert "45 GB/s per link" in text
    assert "an axis wraps around only if its length is 16" in text
    text = run("show", "h100-sxm:2x8")
    assert "16 chips, 2 nodes" in text
    assert "450 GB/s per chip" in text
    assert "50 GB/s per chip" in text


def test_show_as_json_carries_provenance_and_topology():
    document = json.loads(run("show", "tpu-v5e:16x16", "--json"))
    bandwidth = document["quantities"]["memory.hbm_bandwidth"]
    assert bandwidth["value_si"] == 819e9
    assert (bandwidth["value"], bandwidth["unit"], bandwidth["unit_si"]) == (819, "GB/s", "bytes/s")
    assert (bandwidth["kind"], bandwidth["source"], bandwidth["low"], bandwidth["high"]) == (
        "datasheet",
        "google-tpu-docs",
        810,
        820,
    )
    assert bandwidth["source"] in document["sources"]
    assert document["slice"]["n_chips"] == 256
    assert document["slice"]["domains"][0]["wraps"] == [True, True]
    assert "slice" not in json.loads(run("show", "tpu-v5e", "--json"))


def test_show_of_an_unlinked_chip_is_valid_json():
    document = json.loads(run("show", "m4-max:1", "--json"))
    assert document["slice"]["domains"][0]["bandwidth_bytes_per_s"] is None


@pytest.mark.parametrize("argument", ["h100", "tpu-v5e:3x3", "tpu-v5e:", ""])
def test_show_refuses_what_does_not_exist(argument):
    with pytest.raises(InputError):
        run("show", argument)
