"""Launch settings of published runs: what a recipe sets, when it holds, and what cannot be simulated without."""

import pytest
from pydantic import ValidationError

from simulator.calibration.measurements import Measurement, Pool
from simulator.calibration.recipes import Recipe, RecipeFile, launched, published_recipes
from simulator.calibration.tables import read_measurements
from simulator.catalog.chips import chip_names
from simulator.catalog.engines import engine_names
from simulator.catalog.models import model_aliases, model_names
from simulator.errors import UnpriceableError
from simulator.roofline.precision import parse_precision

from .test_harness import ROW, write_rows


def run(**changes):
    values = {
        "id": "x", "table": "t", "model": "llama-3-70b", "chip": "b200", "engine": "tensorrt-llm", "engine_version": "",
        "dtype": "fp8", "precision": "fp8kv8", "pools": (Pool(tp=2),), "load": "closed", "clients": 8,
        "prompt_tokens": 1024, "output_tokens": 1024, "range_ratio": 0.8, "n_requests": 80, "measured": {},
    }  # fmt: skip
    return Measurement(**(values | changes))


def test_recipes_name_things_of_the_catalogue():
    models = {*model_names(), *model_aliases()}
    for recipe in published_recipes():
        assert recipe.engine in engine_names()
        assert set(recipe.models) <= models, recipe.script
        assert set(recipe.chips) <= set(chip_names()), recipe.script


@pytest.mark.parametrize(
    ("changes", "tokens", "held"),
    [
        ({}, 16384, 20),
        ({"pools": (Pool(tp=8),)}, 16384, 0),
        ({"output_tokens": 8192}, 16384, 0),
        ({"chip": "h200-sxm"}, 2 * 1024 + 200, 20),
    ],
)
def test_short_requests_on_fewer_than_eight_chips_wait_for_company(changes, tokens, held):
    """benchmarks/70b_fp8_{b200,h200}_trt_slurm.sh: batch_wait_timeout_iters = 20 for 1,024 in and out below TP 8."""
    found = launched(run(**changes))
    assert found.pools[0].max_num_batched_tokens == tokens
    assert found.hold_steps == held


def test_formats_and_layouts_that_the_script_sets_replace_those_assumed():
    """minimaxm2.5_fp8_b200.sh: a 16-bit cache and experts always spread at first, FP8 and as recorded later."""
    row = run(model="minimax-m2.5", engine="vllm", precision="fp8kv8g128")
    first, later = (launched(m) for m in (run_with(row, "0.17.0"), run_with(row, "0.19.0")))
    assert parse_precision(first.precision).kv == "bf16"
    assert parse_precision(later.precision).kv == "fp8"
    assert (first.pools[0].ep, later.pools[0].ep) == (2, 1)
    assert (first.memory_fraction, later.memory_fraction) == (0.95, 0.9)
    assert later.pools[0].max_num_batched_tokens == 2 * 1024


def test_recipes_of_one_pool_and_of_two_are_apart():
    two = run(pools=(Pool(tp=8), Pool(tp=8)), model="deepseek-v3", chip="h200-sxm")
    found = launched(two)
    assert (found.stream_interval, found.pools) == (20, two.pools)
    assert launched(run()).stream_interval == 1
    assert launched(run(pools=two.pools, engine="sglang")).stream_interval == 1


def test_a_setting_that_two_pools_would_not_take_is_refused():
    recipe = {"script": "s", "commit": "0" * 40, "engine": "vllm", "disaggregated": True}
    file = {"schema_version": 1, "repository": "r", "retrieved": "2026-11-28"}
    with pytest.raises(ValidationError, match="hold_steps is not used with two pools"):
        RecipeFile(**file, recipes=(Recipe(**recipe, hold_steps=3),))
    with pytest.raises(ValidationError, match="stream_interval is not used with one pool"):
        RecipeFile(**file, recipes=(Recipe(**recipe | {"disaggregated": False}, stream_interval=3),))


def run_with(m, version):
    return run(**{**vars(m), "engine_version": version})


def test_runs_no_recipe_is_known_for_stay_as_they_are():
    m = run(model="qwen3-32b")
    assert launched(m) is m


def test_a_run_whose_server_had_an_unrecorded_limit_is_refused():
    m = run(model="gpt-oss-120b", chip="h100-sxm", engine="vllm", engine_version="0.11.2", clients=512)
    with pytest.raises(UnpriceableError, match="max-num-seqs is not recorded"):
        launched(m)
    assert launched(run_with(m, "0.18.0")).clients == 512


def test_only_published_tables_take_published_settings(tmp_path):
    row = {
        **ROW,
        "engine": "trtllm",
        "model": "llama-3-70b",
        "gpu": "b200_sxm",
        "precision": "fp8",
        "isl": "1024",
        "osl": "1024",
    }
    mine, theirs = {**row, "subset": "mine"}, {**row, "id": "r2", "subset": "inferencex_dump"}
    first, second = read_measurements(write_rows(tmp_path / "rows.csv", [mine, theirs])).measurements
    assert (first.hold_steps, second.hold_steps) == (0, 20)


def test_a_refusal_needs_a_reason():
    bare = {"script": "a.sh", "commit": "0" * 40, "engine": "vllm", "models": ("llama-3-8b",), "unrecorded": "a limit"}
    file = {"schema_version": 1, "repository": "r", "retrieved": "2026-11-27"}
    with pytest.raises(ValidationError, match="needs a note"):
        RecipeFile(**file, recipes=(Recipe(**bare),))
    assert RecipeFile(**file, recipes=(Recipe(**bare, note="why"),)).recipes[0].unrecorded
