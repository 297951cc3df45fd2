"""``chipseconds roofline`` as a user meets it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from simulator.cli.main import cli
from simulator.errors import InfeasibleError, InputError, UnpriceableError

DECODE = [
    "--model",
    "llama-3-70b",
    "--slice",
    "tpu-v5e:4x4",
    "--precision",
    "w8a16kv8",
    "--decode",
    "32",
    "--context",
    "8192",
]
PREFILL = ["--model", "llama-3-8b", "--slice", "h100-sxm:1", "--prefill", "2048"]


def run(*arguments):
    return CliRunner().invoke(cli, ["roofline", *arguments])


def test_table_is_readable_at_100_columns():
    for arguments in (DECODE, PREFILL, [*DECODE[:6], "--prefill", "8192", "--context", "131072"]):
        result = run(*arguments)
        assert result.exit_code == 0, result.output
        assert max(len(line.rstrip()) for line in result.output.splitlines()) <= 100
    assert "attention, prefill" in result.output


def test_table_says_what_bounds_the_step():
    output = run(*DECODE).output
    for words in (
        "bound by",
        "MFU",
        "MBU",
        "critical batch",
        "KV capacity",
        "FFN gate, up",
        "FLOP/byte",
        "held 2 times",
    ):
        assert words in output


def test_json_is_one_document_with_the_tables_figures():
    result = run(*DECODE, "--json")
    document = json.loads(result.stdout)
    assert document["model"] == "llama-3-70b"
    assert document["fits"] is True
    assert sum(op["time_s"] for op in document["ops_per_chip"]) == pytest.approx(document["step_time_s"])
    assert sum(document["time_by_bound_s"].values()) == pytest.approx(document["step_time_s"])
    assert document["tokens_per_s"] == pytest.approx(32 / document["step_time_s"])
    assert document["kv_capacity_tokens"] == document["kv_capacity_blocks"] * document["block_size_tokens"]
    assert document["chip_seconds"] == pytest.approx(16 * document["step_time_s"])


def test_ideal_is_faster_than_default_and_not_below_the_bound():
    times = {}
    for efficiency in ("default", "ideal"):
        document = json.loads(run(*DECODE, "--json", "--efficiency", efficiency).stdout)
        assert document["step_time_s"] >= document["roofline_bound_s"]
        times[efficiency] = document["step_time_s"]
    assert times["ideal"] < times["default"]


def test_plot_is_written_and_said_on_stderr(tmp_path):
    file = tmp_path / "roofline.svg"
    result = run(*PREFILL, "--plot", str(file), "--json")
    assert file.read_text().startswith("<?xml")
    assert json.loads(result.stdout)
    assert str(file) in result.stderr


def test_what_does_not_fit_is_priced_and_answered_no():
    result = run("--model", "llama-3-70b", "--slice", "tpu-v5e:1x1", "--decode", "1", "--context", "100", "--json")
    assert isinstance(result.exception, InfeasibleError)
    assert json.loads(result.stdout)["fits"] is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "llama-3-70", "--slice", "h100-sxm:8", "--prefill", "5"], "llama-3-70b"),
        (["--model", "llama-3-8b", "--slice", "h100-sxm:3", "--prefill", "5"], "h100-sxm:3"),
        (["--model", "llama-3-8b", "--slice", "h100-sxm:1"], "exactly one of prefill"),
        (["--model", "llama-3-8b", "--slice", "h100-sxm:1", "--decode", "4"], "needs a context"),
        ([*PREFILL, "--precision", "int9"], "int9"),
        ([*PREFILL, "--tp", "2"], "tp = 2"),
        ([*PREFILL, "--max-num-batched-tokens", "1024"], "--prefill 2048"),
        ([*PREFILL, "--plot", "x.bmp"], "must end in"),
    ],
)
def test_bad_input_is_one_clear_error(arguments, message):
    result = run(*arguments)
    assert isinstance(result.exception, InputError)
    assert message in str(result.exception)
    assert not isinstance(result.exception, UnpriceableError)


@pytest.mark.parametrize(
    ("model", "ops"),
    [
        ("mixtral-8x7b", {"router", "experts gate, up", "experts down"}),
        ("deepseek-v3", {"latent projections", "latent up-projection", "shared experts down", "attention, decode"}),
        ("glm-5", {"indexer keys", "indexer, decode", "attention, decode"}),
        ("nemotron-h-8b", {"Mamba projections", "recurrence, gate", "state, decode", "FFN down"}),
        ("qwen3-next-80b-a3b", {"GDN projections", "state, decode", "output gate", "experts down"}),
    ],
)
def test_other_architectures_have_ops_of_their_own(model, ops):
    result = run("--model", model, "--slice", "h100-sxm:8", "--decode", "5", "--context", "9000", "--json")
    assert ops <= {row["op"] for row in json.loads(result.stdout)["ops_per_chip"]}


def test_heavy_packages_stay_unimported_without_a_plot():
    code = (
        "import sys; from click.testing import CliRunner; from simulator.cli.main import cli; "
        f"r = CliRunner().invoke(cli, ['roofline', *{DECODE!r}]); assert r.exit_code == 0, r.output; "
        "print([m for m in ('matplotlib', 'numba', 'duckdb', 'scipy', 'simpy') if m in sys.modules])"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert done.stdout.strip() == "[]"


def test_layouts_of_a_torus():
    plain = json.loads(run(*DECODE, "--json").stdout)
    two = json.loads(run(*DECODE, "--layout", "2d", "--json").stdout)
    names = {row["op"] for row in two["ops_per_chip"]}
    assert {"gather, scatter d_model", "gather, scatter columns", "all-reduce, norms"} <= names
    assert two["layout"] == {"asked": "2d", "laid": "2d-x", "d_model_chips": 4, "column_chips": 4, "gathered_chips": 1}
    assert plain["layout"]["laid"] == "1d"
    looped = json.loads(run(*DECODE, "--layout", "2d", "--looped-exchange", "--json").stdout)
    assert looped["step_time_s"] != two["step_time_s"]
    sharded = run(*DECODE, "--shard", "tp16", "--layout", "gathered-x")
    assert "gathered-x: d_model over 1 chip(s), columns over 4, weights gathered over 4" in sharded.output


def test_auto_says_which_layouts_it_tried():
    found = json.loads(run(*DECODE, "--shard", "auto", "--json").stdout)
    tried = {(t["sharding"], t["layout"], t["kv_layout"]) for t in found["tried"]}
    assert {("tp16", "1d", "heads"), ("tp16", "1d", "batch"), ("tp16", "2d-x", "heads")} <= tried
    assert found["best"]["layout"] in {"1d", "2d-x"}
    with pytest.raises(InputError, match="axes of one torus"):
        CliRunner().invoke(cli, ["roofline", *PREFILL, "--layout", "2d"], catch_exceptions=False, standalone_mode=False)


def test_prediction_modules_of_a_step():
    ask = [
        "--model",
        "deepseek-v3",
        "--slice",
        "h200-sxm:8",
        "--precision",
        "fp8g128",
        "--decode",
        "16",
        "--context",
        "4096",
    ]
    document = json.loads(run(*ask, "--mtp", "2", "--json").stdout)
    assert document["mtp"]["step_with_mtp_s"] == document["step_time_s"] + 2 * document["mtp"]["run_s"]
    output = run(*ask, "--mtp", "2").output
    assert "checking them left out" in output
    with pytest.raises(InputError, match="no multi-token-prediction modules"):
        CliRunner().invoke(cli, ["roofline", *DECODE, "--mtp", "1"], catch_exceptions=False, standalone_mode=False)


def test_cost_settings_of_roofline_pareto_and_fit():
    def step(*more):
        mixtral = ["--model", "mixtral-8x7b", "--slice", "h100-sxm:4", "--precision", "w4a16", "--decode", "8"]
        return json.loads(run(*mixtral, "--context", "4096", *more, "--json").stdout)["step_time_s"]

    plain = step()
    assert step("--expert-imbalance", "1.5") > plain
    assert step("--dequantization-flops", "1000") > plain
    assert step("--overlap", "1") < plain
    for command in ("pareto", "fit"):
        place = ["--slice", "h100-sxm:4"] if command == "pareto" else ["--chips", "h100-sxm"]
        ask = [command, "--model", "mixtral-8x7b", *place, "--json"]
        rates = [
            CliRunner().invoke(cli, [*ask, *more]).stdout
            for more in ([], ["--expert-imbalance", "2"], ["--overlap", "1"])
        ]
        assert len(set(rates)) == 3
        with pytest.raises(InputError, match=r"expert_imbalance = 0.5"):
            CliRunner().invoke(cli, [*ask, "--expert-imbalance", "0.5"], catch_exceptions=False, standalone_mode=False)


def test_a_step_has_an_interval_and_says_where_it_comes_from():
    step = ("--model", "llama-3-8b", "--decode", "8", "--context", "512", "--interval", "80")
    text = run("--slice", "h100-sxm:1", *step).stdout
    assert "80 % of 64 draws" in text
    assert "of the variance" in text
    document = json.loads(run("--slice", "mi300x:1", *step, "--json").stdout)["intervals"]
    time = document["figures"]["step_time_s"]
    assert time["low"] < time["value"] < time["high"]
    assert document["sources"] == ["assumed"]


@pytest.mark.parametrize(
    "changes", [("--shard", "auto"), ("--mtp", "1"), ("--efficiency", "ideal"), ("--interval", "100")]
)
def test_intervals_of_steps_that_cannot_be_drawn_are_refused(changes):
    step = ("--model", "llama-3-8b", "--slice", "h100-sxm:2", "--decode", "8", "--context", "512", "--interval", "80")
    found = run(*step, *changes)
    assert isinstance(found.exception, InputError)
    assert "interval" in str(found.exception)
