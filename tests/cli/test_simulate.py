"""The commands simulate, compare and scenarios as a shell sees them: streams, exit codes, nothing half-written."""

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from simulator.cli.main import cli
from simulator.errors import ChipsecondsError, InfeasibleError, InputError

NAME = "llama-3-8b-azure-chat"
SMALL = ["--set", "traffic.n_requests=400"]


def call(*arguments):
    return CliRunner().invoke(cli, [*map(str, arguments)], catch_exceptions=True)


def shell(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "simulator.cli.main", *map(str, arguments)], capture_output=True, text=True, check=False
    )


def test_the_summary_fits_a_hundred_columns_and_says_the_answer():
    found = call("simulate", NAME, *SMALL)
    assert found.exit_code == 0, found.output
    assert max(map(len, found.stdout.splitlines())) <= 100
    for word in (
        "chip-seconds busy",
        "provisioned (idle included)",
        "1 chip",
        "TTFT",
        "p99",
        "Conservation",
        "= 400 finished",
    ):
        assert word in found.stdout


def test_json_is_one_document_with_the_same_figures(tmp_path):
    found = call("simulate", NAME, *SMALL, "--json", "--out", tmp_path / "run")
    assert found.exit_code == 0
    document = json.loads(found.stdout)
    assert document == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert document["ledger"]["chips"] == 1
    assert "seed 1" in found.stderr


def test_nothing_is_written_without_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("simulate", NAME, *SMALL).exit_code == 0
    assert list(tmp_path.iterdir()) == []


def test_an_overloaded_run_is_an_answer():
    found = call("simulate", "overloaded", "--set", "traffic.n_requests=3000")
    assert found.exit_code == 0
    assert "OVERLOADED" in found.stdout
    assert "headroom -" in found.stdout
    assert "p99" not in found.stdout


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["simulate", "llama-3-8b-azure"], InputError, "did you mean 'llama-3-8b-azure-chat'"),
        (["simulate", NAME, "--set", "engine.max_seqs=3"], InputError, "max_num_seqs"),
        (["simulate", NAME, "--set", "model=llama-3-70b"], InfeasibleError, "does not fit"),
        (["simulate", NAME, "--set", "traffic.trace=missing.csv"], InputError, "missing.csv"),
        (["compare", "nowhere", "nowhere"], InputError, "no such result"),
        (["scenarios", "show", "nothing"], InputError, "unknown scenario"),
    ],
)
def test_errors_reach_the_top_as_this_packages_own(arguments, error, message):
    found = call(*arguments)
    assert isinstance(found.exception, error), found.output
    assert message in str(found.exception)


def test_a_folder_that_is_not_a_result_is_refused_before_the_run(tmp_path):
    (tmp_path / "thesis.txt").write_text("words")
    found = call("simulate", NAME, "--out", tmp_path)
    assert isinstance(found.exception, InputError)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    assert "simulating" not in found.stderr


def test_exit_codes_and_streams_in_a_real_shell(tmp_path):
    wrong = shell("simulate", NAME, "--set", "replicas=none", "--out", tmp_path / "run")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("chipseconds: ")
    assert "Traceback" not in wrong.stderr
    assert list(tmp_path.iterdir()) == []
    no = shell("simulate", NAME, "--set", "model=llama-3-70b")
    assert (no.returncode, no.stdout) == (1, "")


def test_results_are_compared_figure_by_figure(tmp_path):
    for name, rate in (("a", 10), ("b", 20), ("c", 10)):
        setting = f"traffic.arrival.rate_per_s={rate}"
        assert call("simulate", NAME, *SMALL, "--set", setting, "--out", tmp_path / name).exit_code == 0
    same = call("compare", tmp_path / "a", tmp_path / "c")
    assert "no difference" in same.stdout
    found = call("compare", tmp_path / "a", tmp_path / "b")
    assert found.exit_code == 0
    assert "traffic.arrival.rate_per_s" in found.stdout
    assert "chip_seconds_per_query.busy" in found.stdout
    assert max(map(len, found.stdout.splitlines())) <= 120
    document = json.loads(call("compare", tmp_path / "a", tmp_path / "b", "--json").stdout)
    assert not document["equal"]
    rate = next(d for d in document["scenario"] if d["path"] == "traffic.arrival.rate_per_s")
    assert rate["relative"] == 1.0
    assert json.loads(call("compare", tmp_path / "a", tmp_path / "c", "--json").stdout)["equal"]


def test_a_scenario_can_be_listed_shown_copied_and_run(tmp_path):
    assert NAME in call("scenarios").stdout
    assert NAME in [s["name"] for s in json.loads(call("scenarios", "list", "--json").stdout)["scenarios"]]
    assert 'model = "llama-3-8b"' in call("scenarios", "show", NAME).stdout
    assert json.loads(call("scenarios", "show", NAME, "--json").stdout)["engine"]["block_size"] == 16
    mine = tmp_path / "mine.toml"
    assert call("scenarios", "new", mine, "--set", "traffic.n_requests=300").exit_code == 0
    assert call("simulate", mine).exit_code == 0
    again = call("scenarios", "new", mine)
    assert isinstance(again.exception, InputError)
    assert isinstance(call("scenarios", "new", tmp_path / "mine.txt").exception, ChipsecondsError)


def test_seeds_add_a_table_of_intervals_between_seeds():
    found = call("simulate", NAME, *SMALL, "--seeds", 3, "-q")
    assert "Between 3 seeds" in found.stdout
    assert found.stderr == ""


def test_a_run_can_be_drawn_the_same_way_twice(tmp_path):
    for name in ("one.svg", "two.svg"):
        assert call("simulate", NAME, *SMALL, "-q", "--plot", tmp_path / name).exit_code == 0
    text = (tmp_path / "one.svg").read_text()
    assert text == (tmp_path / "two.svg").read_text()
    for words in ("where the chip time went", "chip-seconds per query busy", "SLO 1,000"):
        assert words in text
    inside = call("simulate", NAME, *SMALL, "-q", "--out", tmp_path / "run", "--plot", tmp_path / "run" / "run.png")
    assert inside.exit_code == 0
    assert (tmp_path / "run" / "run.png").stat().st_size > 10_000
    overloaded = call("simulate", "overloaded", "--set", "traffic.n_requests=3000", "--plot", tmp_path / "o.svg")
    assert overloaded.exit_code == 0
    assert "no steady state" in (tmp_path / "o.svg").read_text()


@pytest.mark.parametrize("name", ["run.gif", "nowhere/run.png"])
def test_a_plot_that_cannot_be_written_is_refused_before_the_run(tmp_path, name):
    found = call("simulate", NAME, "--plot", tmp_path / name)
    assert isinstance(found.exception, InputError)
    assert "simulating" not in found.stderr


def test_intervals_are_shown_stored_and_compared(tmp_path):
    asked = (
        "--interval",
        "80",
        "--draws",
        "16",
        "--set",
        "engine.profile=vllm",
        "--set",
        "traffic.arrival.rate_per_s=8",
    )
    runs = []
    for name, chip in (("a", "h100-sxm:1"), ("b", "h200-sxm:1")):
        found = call("simulate", NAME, *SMALL, *asked, "--set", f"slice={chip}", "--out", tmp_path / name)
        assert found.exit_code == 0, found.output
        runs.append(found.stdout)
    assert max(map(len, runs[0].splitlines())) <= 100
    assert "80 % interval  kernels  profile  assumed  residual" in runs[0]
    assert "kernels of h200-sxm are those of h100-sxm" in runs[1]
    assert "run.interval" not in runs[0]
    text = call("compare", tmp_path / "a", tmp_path / "b").stdout
    assert "Parameter intervals" in text
    assert any(line.endswith(("overlap", "apart")) for line in text.splitlines())
    document = json.loads(call("compare", tmp_path / "a", tmp_path / "b", "--json").stdout)
    assert {"low", "median", "high"} <= set(document["intervals"][0][1])
    again = call("simulate", tmp_path / "a", "--out", tmp_path / "c")
    assert again.exit_code == 0
    assert (tmp_path / "a" / "summary.json").read_bytes() == (tmp_path / "c" / "summary.json").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--interval", "0"), "between 0 and 100"),
        (("--interval", "100"), "between 0 and 100"),
        (("--draws", "32"), "run: interval_draws = 32: only with an interval"),
        (("--interval", "80", "--summary-only"), "run.summary_only keeps none"),
    ],
)
def test_intervals_that_make_no_sense_are_refused_before_the_run(arguments, message):
    found = call("simulate", NAME, *SMALL, *arguments)
    assert isinstance(found.exception, InputError)
    assert message in str(found.exception)
    assert not found.stdout
