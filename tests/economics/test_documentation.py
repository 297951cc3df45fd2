"""docs/economics.md: its price file is one, its code runs, its worked example is ours."""

import re
import tomllib
from pathlib import Path

import pytest

from simulator.catalog.chips import load_chip
from simulator.catalog.files import parse
from simulator.catalog.price_book import OwnedCosts, PriceFile
from simulator.economics import TERMS, chip_price

PAGE = (Path(__file__).parents[2] / "docs" / "economics.md").read_text(encoding="utf-8")


def block(language):
    return re.search(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)[1]


def test_the_price_file_of_the_page_is_one():
    book = parse(PriceFile, tomllib.loads(block("toml")), "docs/economics.md")
    assert chip_price(load_chip("h100-sxm"), book=book).usd_per_chip_hour == 2.10
    assert book.owned_costs("tpu-v5e").chip_usd == 3000
    assert book.owned_costs("tpu-v5e").years == 5
    named = re.findall(r"\w+", block("toml"))
    assert set(OwnedCosts.model_fields) - set(named) == set()


def test_the_code_of_the_page_runs():
    exec(compile(block("python"), "docs/economics.md", "exec"), {})  # noqa: S102 - our own page


def test_every_term_is_on_the_page():
    assert [term for term in TERMS if f"`{term}`" not in PAGE] == []


def test_the_worked_example_of_an_owned_h100():
    price = chip_price(load_chip("h100-sxm"), "owned")
    parts = [round(value, 2) for value in vars(price.owned).values()]
    assert parts == [1.52, 0.27, 0.21, 0.09]
    assert round(price.usd_per_chip_hour, 2) == 2.10
    assert (price.low, price.high) == (pytest.approx(0.75, abs=0.005), pytest.approx(5.49, abs=0.005))
    for text in ("**2.10 USD per hour**", "it is 0.75, at its dear end\n5.49"):
        assert text in PAGE
