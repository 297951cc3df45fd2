"""``validate``, ``calibrate serving`` and ``reproduce accuracy`` on the command line."""

import csv
import json
from pathlib import Path

import pytest

from simulator.reproduction.accuracy import accuracy_markdown, load_accuracy, readme_table

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = [
    "id",
    "engine",
    "engine_version",
    "model",
    "gpu",
    "n_gpus",
    "tp",
    "pp",
    "attention_dp",
    "moe_ep",
    "precision",
    "isl",
    "osl",
    "concurrency",
    "ttft_ms",
    "tpot_ms",
]
ROWS = [
    ["a", "vllm", "1", "meta-llama/Llama-3.1-8B", "h100_sxm", 1, 1, 1, 1, 1, "bf16", 256, 64, 2, 30, 7.5],
    ["b", "vllm", "1", "meta-llama/Llama-3.1-8B", "h100_sxm", 1, 1, 1, 1, 1, "bf16", 256, 64, 8, 45, 8.5],
    ["c", "vllm", "1", "acme/none-7b", "h100_sxm", 1, 1, 1, 1, 1, "bf16", 256, 64, 8, 45, 8.5],
]


@pytest.fixture
def table(tmp_path):
    file = tmp_path / "rows.csv"
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(COLUMNS)
        writer.writerows(ROWS)
    return file


def test_validate_prints_errors_coverage_and_what_was_left_out(run_cli, table):
    done = run_cli("validate", str(table), "--workers", "1")
    assert "TPOT" in done.stdout
    assert "coverage 66.7%: 2 of 3 rows" in done.stdout
    assert "left out: 1 of rows: model 'acme/none-7b' is not in the catalogue" in done.stdout


def test_validate_json_has_rows_errors_and_reasons(run_cli, table):
    document = json.loads(run_cli("validate", str(table), "--workers", "1", "--json", "--by", "model,load").stdout)
    assert document["coverage"] == pytest.approx(2 / 3)
    assert set(document["errors"]) == {"all", "model", "load"}
    row = document["rows"][0]
    assert row["error"]["tpot_s"] == pytest.approx(row["predicted"]["tpot_s"] / row["measured"]["tpot_s"] - 1)
    assert document["unsupported"][0]["id"] == "c"


def test_validate_writes_rows_and_a_plot(run_cli, table, tmp_path):
    run_cli("validate", str(table), "--workers", "1", "--out", str(tmp_path / "out"))
    with (tmp_path / "out" / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["metric"] for row in rows} == {"ttft_s", "tpot_s", "output_tokens_per_s"}
    assert (tmp_path / "out" / "validation.png").stat().st_size > 10_000
    assert "none-7b" in (tmp_path / "out" / "unsupported.csv").read_text()


def test_validate_refuses_what_it_does_not_know(run_cli, table, tmp_path):
    assert "did you mean 'model'" in run_cli("validate", str(table), "--by", "models", code=2).stderr
    assert "no such file" in run_cli("validate", str(tmp_path / "absent.csv"), code=2).stderr
    only = tmp_path / "only.csv"
    only.write_text(",".join(COLUMNS) + "\n" + ",".join(map(str, ROWS[2])) + "\n")
    assert "none of 1 rows" in run_cli("validate", str(only), "--workers", "1", code=1).stderr


def test_calibrate_writes_a_profile_that_validate_and_scenarios_take(run_cli, table, tmp_path):
    out = tmp_path / "profiles"
    done = run_cli("calibrate", "serving", str(table), "--workers", "1", "--out", str(out))
    assert "What moved" in done.stdout
    assert "hardly identified" in done.stdout  # two rows cannot tell fifteen parameters apart
    again = json.loads(
        run_cli("validate", str(table), "--workers", "1", "--json", "--engine-profile", str(out / "vllm.toml")).stdout
    )
    before = json.loads(run_cli("validate", str(table), "--workers", "1", "--json").stdout)
    error = {
        name: next(e["median"] for e in d["errors"]["all"]["all"] if e["metric"] == "tpot_s")
        for name, d in (("again", again), ("before", before))
    }
    assert error["again"] < max(0.03, error["before"])


def test_the_recorded_accuracy_has_every_split_and_the_shipped_values(run_cli):
    record = load_accuracy()
    assert set(record["splits"]) == {"random", "release", "group"}
    assert len(record["parameters"]) <= 26
    from simulator.catalog.engines import engine_profile

    for p in record["parameters"]:
        for engine in [p["engine"]] if p["engine"] else ["vllm", "sglang", "tensorrt-llm"]:
            assert getattr(engine_profile(engine), p["name"]) == pytest.approx(p["value"], rel=2e-3, abs=1e-9), p
    assert "TPOT" in run_cli("reproduce", "accuracy").stdout


def test_the_page_and_the_readme_are_generated():
    record = load_accuracy()
    assert (ROOT / "docs" / "accuracy.md").read_text(encoding="utf-8") == accuracy_markdown(record)
    assert readme_table(record) in (ROOT / "README.md").read_text(encoding="utf-8")
    assert "{{" not in accuracy_markdown(record)
