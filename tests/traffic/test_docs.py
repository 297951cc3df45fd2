"""The traffic page against the code: names, aliases and the examples in it."""

import re
import tomllib
from pathlib import Path

import pytest

from simulator.catalog.files import data_folder, names_in, parse
from simulator.traffic import Stream, TrafficSpec
from simulator.traffic.arrivals import Closed, Constant, Gamma, Offline, Poisson, TraceTimes
from simulator.traffic.lengths import LENGTH_LAWS
from simulator.traffic.readers import FORMATS

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "traffic.md").read_text(encoding="utf-8")
CELLS = set(re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL)))


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.mark.parametrize("record", [*LENGTH_LAWS.values(), Closed, Constant, Gamma, Offline, Poisson, TraceTimes])
def test_every_law_and_each_of_its_fields_is_on_the_page(record):
    tags = {"kind", "process"} & set(record.model_fields)
    names = {record.model_fields[tag].default for tag in tags} | set(record.model_fields) - tags
    written = {cell.split(" ")[0] for cell in CELLS}
    assert names <= written


def test_every_format_alias_field_and_mix_is_on_the_page():
    listed = {name.lower() for name in CELLS}
    for form in FORMATS.values():
        assert {alias for names in form.names.values() for alias in names} <= listed
    assert set(FORMATS) <= listed
    assert set(TrafficSpec.model_fields) - {"source"} <= {part for cell in CELLS for part in cell.split(" ")}
    assert set(names_in(data_folder("workloads") / "traffic")) <= {
        part.strip('"') for cell in CELLS for part in cell.split(" ")
    }


def test_the_examples_run():
    for text in blocks("toml"):
        parse(TrafficSpec, tomllib.loads(text)["traffic"], "docs/traffic.md")
    for text in blocks("python"):
        names = {"print": lambda *_: None}
        exec(text, names)  # noqa: S102 - our own page
        assert isinstance(names["stream"], Stream)
