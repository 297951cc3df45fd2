"""``chipseconds pareto``, ``fit`` and the views of ``roofline`` as a user meets them."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from simulator.catalog.chips import chip_names
from simulator.catalog.models import load_model
from simulator.results.toml import dumps
from simulator.roofline.variants import KNOBS

ROOT = Path(__file__).resolve().parents[2]
PARETO = ["pareto", "--model", "llama-3-70b", "--slice", "tpu-v5e:4x4", "--precision", "w8a16kv8"]
STEP = ["roofline", "--model", "llama-3-70b", "--slice", "tpu-v5e:4x4", "--precision", "w8a16kv8", "--decode", "32"]
STEP += ["--context", "8192"]


def test_pareto_json_agrees_with_roofline(run_cli):
    document = json.loads(run_cli(*PARETO, "--contexts", "2k,8k", "--json").stdout)
    (found,) = document["deployments"]
    curve = found["curves"][1]
    step = json.loads(run_cli(*STEP, "--json").stdout)
    assert curve["context_tokens"] == 8192
    assert curve["batch"] == list(range(1, 257))
    assert curve["latency_per_token_s"][31] == pytest.approx(step["step_time_s"], rel=1e-12)
    assert curve["tokens_per_s_per_chip"][31] == pytest.approx(step["tokens_per_s_per_chip"], rel=1e-12)
    assert sum(curve["fits"]) == min(256, curve["max_batch_in_memory"])
    assert found["kv_capacity_tokens"] == step["kv_capacity_tokens"]


def test_pareto_table_names_limits_and_the_best_of_several(run_cli, tmp_path):
    file = tmp_path / "p.png"
    args = [*PARETO[:3], "--slice", "tpu-v5e:2x4,tpu-v5e:8x8", "--precision", "w8a16kv8,int8kv8", "--contexts", "8k"]
    done = run_cli(*args, "--plot", str(file))
    assert file.read_bytes().startswith(b"\x89PNG")
    assert done.stdout.count("the KV cache holds") == 4
    assert "Most tokens/s/chip within a latency" in done.stdout
    assert "tpu-v5e:2x4 int8kv8, batch" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 110


def test_textbook_pareto_of_the_scaling_book(run_cli):
    args = [*PARETO[:5], "--precision", "w8a16kv8g0", "--quantize-head", "--efficiency", "textbook", "--contexts", "2k"]
    (found,) = json.loads(run_cli(*args, "--json").stdout)["deployments"]
    curve = found["curves"][0]
    assert 1e3 * curve["latency_per_token_s"][0] == pytest.approx(5.335, rel=2e-3)
    assert curve["tokens_per_s_per_chip"][120] == pytest.approx(893, rel=5e-3)
    assert curve["tokens_per_s_per_chip"][255] == pytest.approx(curve["tokens_per_s_per_chip"][120], rel=1e-3)


def test_a_model_that_fits_nowhere_is_answered_no(run_cli):
    done = run_cli(*PARETO[:3], "--slice", "tpu-v5e:1x1", "--json", code=1)
    assert json.loads(done.stdout)["deployments"][0]["curves"][0]["max_batch_in_memory"] == 0
    assert "chipseconds fit" in done.stderr
    done = run_cli("fit", "--model", "llama-3-70b", "--chips", "groq-lpu-v1", "--json", code=1)
    assert json.loads(done.stdout)["places"][0]["slice"] is None


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([*PARETO, "--contexts", "2k,,8k"], "not a whole number"),
        ([*PARETO, "--contexts", "0"], "whole number from 1"),
        ([*PARETO, "--contexts", "2kk"], "2kk"),
        ([*PARETO, "--plot", "x.bmp"], "must end in"),
        ([*PARETO[:5], "--precision", "bf16,"], "empty entry"),
        (["fit", "--model", "llama-3-8b", "--chips", "h100-smx"], "h100-sxm"),
        (["fit", "--model", "llama-3-8b", "--context", "2k,8k"], "one context"),
        (["fit", "--model", "llama-3-8b", "--gpu-memory-utilization", "1.5"], "gpu_memory_utilization"),
        ([*STEP, "--what-if", "hbm"], "knob=factor"),
        ([*STEP, "--what-if", "hmb=2"], "hbm"),
        ([*STEP, "--what-if", "hbm=2,hbm=3"], "twice"),
        ([*STEP, "--over", "1,2"], "only with --waterfall"),
        ([*STEP, "--waterfall", "x.bmp"], "must end in"),
        ([*STEP, "--waterfall", "x.png", "--over", "1,500"], "--over 500"),
        ([*STEP, "--waterfall", "x.png", "--over", "1,bf16"], "bf16"),
    ],
)
def test_bad_input_is_one_clear_error(run_cli, args, message):
    done = run_cli(*args, code=2)
    assert message in done.stderr
    assert done.stdout == ""


def test_what_the_cost_model_cannot_price_is_refused_by_name(run_cli, tmp_path):
    model = load_model("gemma-3-1b").model_dump(mode="json", exclude_none=True) | {"name": "two-windows"}
    windowed = next(group for group in model["layers"] if "window" in group["mixer"])
    model["layers"] = [*model["layers"], windowed | {"mixer": windowed["mixer"] | {"window": 77}}]
    file = tmp_path / "two-windows.toml"
    file.write_text(dumps(model))
    for command in (["pareto", "--slice", "h100-sxm:8"], ["fit"]):
        done = run_cli(*command, "--model", str(file), code=2)
        assert "attention windows of several sizes" in done.stderr


def test_fit_lists_every_chip_once_with_figures_or_a_reason(run_cli):
    rows = json.loads(run_cli("fit", "--model", "llama-3-8b", "--json").stdout)["places"]
    assert [row["chip"] for row in rows] == chip_names()
    for row in rows:
        assert row["why"] or row["tokens_per_s_per_chip"] > 0
        if row["slice"]:
            assert row["max_batch_in_memory"] * 8192 <= row["kv_capacity_tokens"]
            assert row["decode_batch"] == min(256, row["max_batch_in_memory"])


def test_fit_table_is_readable_and_says_what_has_no_slice(run_cli):
    args = ["--model", "llama-3-70b", "--chips", "h100-sxm,tpu-v5e,groq-lpu-v1", "--precision", "bf16,w8a16kv8"]
    out = run_cli("fit", *args, "--context", "32k").stdout
    assert max(map(len, out.splitlines())) <= 110
    for words in ("h100-sxm:4", "tpu-v5e:4x4", "tpu-v5e:2x4", "No slice of:", "groq-lpu-v1 in w8a16kv8", "seqs of 32k"):
        assert words in out


def test_what_if_is_in_table_and_json(run_cli):
    out = run_cli(*STEP, "--what-if", "all").stdout
    for words in ("HBM bandwidth", "all of these", "2.000×", "elasticity"):
        assert words in out
    document = json.loads(run_cli(*STEP, "--what-if", "hbm=2", "--json").stdout)
    (row,) = document["what_if"]
    assert row["factors"] == {"hbm": 2.0}
    assert row["time_s"] * row["speedup"] == pytest.approx(document["step_time_s"])
    assert -1 <= row["elasticity"] < 0


@pytest.mark.parametrize("over", [None, "1,8,64", "bf16,w8a16kv8,w4a16kv8"])
def test_waterfall_is_drawn_over_batches_or_precisions(run_cli, tmp_path, over):
    file = tmp_path / "w.svg"
    run_cli(*STEP, "--waterfall", str(file), *(["--over", over] if over else []))
    text = file.read_text()
    for label in over.split(",") if over else ["1", "4", "16", "32", "64", "256"]:
        assert f">{label}</text>" in text
    assert "attention over the cache" in text


def test_heavy_packages_stay_unimported_without_a_plot():
    code = (
        "import sys; from click.testing import CliRunner; from simulator.cli.main import cli; "
        f"runs = [{PARETO!r}, ['fit', '--model', 'llama-3-8b', '--chips', 'l4'], {[*STEP, '--what-if', 'all']!r}]; "
        "done = [CliRunner().invoke(cli, r) for r in runs]; assert all(r.exit_code == 0 for r in done), done; "
        "print([m for m in ('matplotlib', 'numba', 'duckdb', 'scipy', 'simpy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.strip() == "[]"


def test_the_views_page_runs(run_cli, tmp_path, monkeypatch):
    page = (ROOT / "docs" / "views.md").read_text(encoding="utf-8")
    commands = [
        shlex.split(line) for line in page.splitlines() if line.startswith("    chipseconds ") and "…" not in line
    ]
    assert {command[1] for command in commands} == {"pareto", "fit", "roofline", "speculation"}
    monkeypatch.chdir(tmp_path)
    for command in commands:
        run_cli(*command[1:])
    assert {file.name for file in tmp_path.iterdir()} == {"pareto.png", "speculation.png", "steps.png"}
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    names = {}
    exec(code, names)  # noqa: S102 - our own page
    assert names["grid"].step_s.shape == (250, 400)
    for knob in KNOBS:
        assert f"| `{knob}` |" in page
