"""``chipseconds plan`` as a user meets it."""

import json

import pytest

from simulator.results.plan import Plan, read_plan

QUICK = [
    "--max-chips",
    "1",
    "--batch-limits",
    "64",
    "--token-budgets",
    "2048",
    "--requests",
    "300",
    "--shardings",
    "tp",
    "-q",
]
ASK = ["plan", "llama-3-8b-azure-chat", "--qps", "100", *QUICK]


def test_json_is_one_document_and_the_file_is_the_same_plan(run_cli, tmp_path):
    file = tmp_path / "plan.json"
    done = run_cli(
        *ASK, "--json", "--out", str(file), "--ttft", "0.5@90", "--tpot", "0.05", "--peak", "1.5", "--spare", "1"
    )
    found = Plan.model_validate(json.loads(done.stdout))
    assert found == read_plan(file)
    assert [str(t) for t in found.targets.limits] == ["TTFT p90 <= 0.5 s", "TPOT p95 <= 0.05 s"]
    assert found.provisioning.peak_to_mean == 1.5
    assert found.best.pools[0].replicas == found.best.pools[0].needed_replicas + 1


def test_the_tables_tell_the_fleet_and_why(run_cli):
    done = run_cli(*ASK, "--chips", "h100-sxm,l40s", "--goodput-share", "0.9", "--profile", "1,1,2,4")
    for text in (
        "the plan",
        "from the roofline to the bill",
        "cost against latency",
        "the best of each chip",
        "l40s:1",
    ):
        assert text in done.stdout
    assert "busiest hour has 2 times the mean rate" in done.stdout
    assert "90 % of requests keep all" in done.stdout
    assert "simulated in" in done.stderr


def test_infeasible_is_answered_no_with_the_nearest(run_cli):
    done = run_cli(*ASK, "--slices", "h100-sxm:1", "--ttft", "0.001@50", "--json", code=1)
    found = json.loads(done.stdout)
    assert found["best"] is None
    assert found["nearest"][0]["what"].startswith("relax to TTFT p50 <= ")
    assert "cannot be kept on h100-sxm; nearest: relax to TTFT p50 ≤ " in done.stderr


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--ttft", "soon"], "--ttft 'soon': write SECONDS or SECONDS@PERCENT"),
        (["--ttft", "1@0"], "percentile must be above 0"),
        (["--ttft", "-1"], "--ttft '-1': the limit must be positive"),
        (["--goodput-share", "95"], "joint_fraction"),
        (["--headroom", "1"], "headroom"),
        (["--chips", "h100-sxm,,l4"], "empty name"),
        (["--chips", "h100"], "unknown chip 'h100'"),
        (["--profile", "0,0"], "at least one rate must be above 0"),
        (["--profile", "1,2", "--peak", "2"], "state one of them"),
        (["--price", "h100-sxm"], "write CHIP=USD"),
        (["--price", "h100=2"], "unknown chip 'h100'"),
        (["--batch-limits", "8,x"], "whole numbers by commas"),
        (["--shardings", "tp,xp"], "shardings"),
        (["--out", "nowhere/plan.json"], "does not exist"),
        (["--set", "traffic.arrival={process='closed', concurrency=4}"], "a plan needs arrivals with a rate"),
        (["--chips", "h100-nvl"], "no price is published for h100-nvl"),
    ],
)
def test_errors_name_the_option_and_what_is_allowed(run_cli, more, message):
    done = run_cli(*ASK, *more, code=2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
