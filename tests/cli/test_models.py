"""The models commands, as a user meets them."""

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from simulator.catalog.models import model_names
from simulator.cli.main import cli
from simulator.errors import InputError

DATA = Path(__file__).parents[1] / "catalog" / "data"


def run(*args: str) -> str:
    result = CliRunner().invoke(cli, ["models", *args], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def row(text: str, name: str) -> str:
    (line,) = [line for line in text.splitlines() if line.startswith(f"{name} ")]
    return line


def test_list_has_one_row_per_model_with_its_counts():
    text = run("list")
    expected = "llama-3-70b 80 8192 64/8 70.55 B 327,680 yes"
    assert row(text, "llama-3-70b").split() == expected.split()
    expected = "deepseek-v3 61 7168 128/MLA 671.03 B 37.55 B 70,272 yes"
    assert row(text, "deepseek-v3").split() == expected.split()
    for name in model_names():
        row(text, name)


def test_list_json_is_one_document_with_every_model():
    document = json.loads(run("list", "--json"))
    assert sorted(m["name"] for m in document["models"]) == model_names()
    llama = next(m for m in document["models"] if m["name"] == "llama-3-70b")
    assert llama["total_parameters"] == 70_553_706_496
    assert llama["kv_cache_bytes_per_token_bf16"] == 327_680
    assert llama["not_priced_yet"] == []


@pytest.mark.parametrize("name", model_names())
def test_show_works_for_every_model(name):
    text = run("show", name)
    assert text.startswith(name)
    assert "source" in text


def test_show_gives_components_cache_and_source():
    text = run("show", "deepseek-r1")
    assert "671,026,419,200" in text
    assert "11,610,068,224" in text
    assert "35,136 elements: 70,272 B in bf16" in text
    assert re.search(r"^priced +yes$", text, re.MULTILINE)
    assert "published total       70,553,706,496: equal to the last digit" in run("show", "llama-3-70b")
    assert "recalled configuration" in run("show", "gemma-3-27b")
    assert "11,173,625,856 B" in run("show", "gemma-3-27b")


def test_show_json_carries_the_whole_record():
    document = json.loads(run("show", "gpt-oss-120b", "--json"))
    assert document["parameters"]["active_without_embedding"] == 5_132_849_472
    assert document["architecture"]["layers"][0]["mixer"]["window"] == 128
    assert document["matmul_flops_per_token"] == 2 * 5_132_849_472


def test_show_reads_a_hugging_face_configuration_and_keeps_notes_off_stdout():
    result = CliRunner().invoke(cli, ["models", "show", str(DATA / "gemma-3-4b.json"), "--json"])
    document = json.loads(result.stdout)
    assert document["parameters"]["total"] == 3_880_263_168
    assert "note: text model only" in result.stderr
    assert "mxfp4 weights" in run("show", str(DATA / "gpt-oss-20b.json"))


def test_an_unknown_model_is_an_error_with_the_nearest_names():
    with pytest.raises(InputError, match="did you mean 'llama-3-70b'"):
        run("show", "llama-3-70")
