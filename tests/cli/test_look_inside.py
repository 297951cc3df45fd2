"""Traces, timelines, explanations and summary-only runs on the command line."""

import json

import pytest

NAME = "llama-3-8b-azure-chat"
SMALL = ("--set", "traffic.n_requests=300")


def test_a_trace_of_a_window_is_written(run_cli, tmp_path):
    done = run_cli("simulate", NAME, *SMALL, "--trace", str(tmp_path / "t.json"), "--trace-window", "5:7")
    document = json.loads((tmp_path / "t.json").read_text())
    steps = [event for event in document["traceEvents"] if event["ph"] == "X"]
    assert f"trace of {len(steps):,} steps" in done.stderr
    assert all(5e6 <= step["ts"] < 7e6 for step in steps)
    assert len(steps) > 50
    assert "chip-seconds" in done.stdout
    run_cli("simulate", NAME, *SMALL, "-q", "--trace", str(tmp_path / "whole.json"))
    whole = json.loads((tmp_path / "whole.json").read_text())
    begun = [event for event in whole["traceEvents"] if event["ph"] == "b" and event["name"].startswith("request")]
    assert sorted(event["id"] for event in begun) == list(range(300))
    assert begun[0]["args"].keys() == {"prompt_tokens", "cached_tokens", "output_tokens", "preemptions", "attempts"}


DISAGGREGATED = ("llama-3-70b-disaggregated", "--set", "traffic.n_requests=120")


def test_a_fleet_is_looked_into(run_cli, tmp_path):
    run_cli("simulate", *DISAGGREGATED, "-q", "--out", str(tmp_path / "run"), "--trace", str(tmp_path / "t.json"))
    document = json.loads((tmp_path / "t.json").read_text())
    names = [event["args"]["name"] for event in document["traceEvents"] if event["name"] == "process_name"]
    assert [name.rpartition(": ")[2] for name in names[:4]] == [
        "prefill, replica 0",
        "prefill, replica 1",
        "decode, replica 2",
        "decode, replica 3",
    ]
    found = json.loads(run_cli("explain", str(tmp_path / "run"), "77", "--json").stdout)
    assert sum(part["time_s"] for part in found["parts"]) == pytest.approx(found["e2e_s"], rel=1e-14)
    assert [stop["pool"] for stop in found["stops"]] == ["prefill", "decode"]
    text = run_cli("explain", str(tmp_path / "run"), "77").stdout
    for words in ("KV link: sending and latency", "decode: decode", "least-kv)"):
        assert words in text


def test_a_client_that_leaves_is_explained_up_to_its_departure(run_cli):
    clients = ("--set", "clients.timeout_s=0.5", "--set", "clients.max_attempts=2", "--set", "clients.backoff_s=0.25")
    found = json.loads(run_cli("explain", NAME, "120", *SMALL, *clients, "--json").stdout)
    assert (found["state"], found["attempts"]) == ("timed out", 2)
    assert sum(part["time_s"] for part in found["parts"]) == pytest.approx(found["e2e_s"], rel=1e-14)
    assert 1.25 <= found["e2e_s"] < 1.5  # two attempts, a wait between, and what was left of a step
    text = run_cli("explain", NAME, "120", *SMALL, *clients).stdout
    assert "arrival to departure" in text
    assert "2 attempts, timed out" in text
    assert "between attempts" in text


def test_a_trace_too_long_for_a_viewer_says_where_it_ends(run_cli, tmp_path, monkeypatch):
    from simulator.run import replay

    monkeypatch.setattr(replay.logs_of, "__kwdefaults__", {"max_steps": 40})
    done = run_cli("simulate", NAME, *SMALL, "--trace", str(tmp_path / "t.json"))
    assert "trace of 40 steps" in done.stderr
    assert "choose a --trace-window" in done.stderr


def test_a_timeline_is_drawn_and_bytes_repeat(run_cli, tmp_path):
    for name in ("one.svg", "two.svg"):
        run_cli("simulate", NAME, *SMALL, "-q", "--timeline", str(tmp_path / name))
    text = (tmp_path / "one.svg").read_text()
    assert text == (tmp_path / "two.svg").read_text()
    for words in ("preemptions per second", "KV cache in use", "waiting requests"):
        assert words in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--trace-window", "1:2"], "without --trace"),
        (["--trace", "t.json", "--trace-window", "9:3"], "FROM < TO"),
        (["--trace", "t.json", "--trace-window", "soon"], "FROM:TO"),
        (["--trace", "nowhere/t.json"], "does not exist"),
        (["--timeline", "t.gif"], "--timeline"),
        (["--summary-only", "--plot", "p.png"], "summary-only"),
        (["--summary-only", "--trace", "t.json"], "summary-only"),
        (["--summary-only", "--set", "engine.prefix_cache=blocks"], "plain replica"),
    ],
)
def test_what_cannot_be_done_is_refused_before_the_run(run_cli, tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    done = run_cli("simulate", NAME, *SMALL, *options, code=2)
    assert words in done.stderr
    assert "[1/3]" not in done.stderr or "prefix_cache" in options[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_request_of_a_result_is_explained(run_cli, tmp_path):
    run_cli("simulate", NAME, *SMALL, "-q", "--out", str(tmp_path / "run"))
    found = json.loads(run_cli("explain", str(tmp_path / "run"), "123", "--json").stdout)
    assert found["request"] == 123
    assert sum(part["time_s"] for part in found["parts"]) == pytest.approx(found["e2e_s"], rel=1e-14)
    text = run_cli("explain", NAME, "123", *SMALL).stdout
    assert "arrival to last token" in text
    assert "time [s]" in text
    assert f"{found['e2e_s']:.6f}" in text
    assert f"{found['running_ahead']} running" in text
    assert "0 … 299" in run_cli("explain", str(tmp_path / "run"), "300", code=2).stderr


def test_a_result_of_other_figures_is_not_explained(run_cli, tmp_path):
    run_cli("simulate", NAME, *SMALL, "-q", "--out", str(tmp_path / "run"))
    scenario = tmp_path / "run" / "scenario.toml"
    scenario.write_text(scenario.read_text().replace("rate_per_s = 15.0", "rate_per_s = 14.0"))
    assert "another version" in run_cli("explain", str(tmp_path / "run"), "123", code=2).stderr


def test_a_summary_only_run_prints_the_same_summary(run_cli, tmp_path):
    kept = json.loads(run_cli("simulate", NAME, *SMALL, "--json").stdout)
    done = run_cli("simulate", NAME, *SMALL, "--json", "--summary-only", "--out", str(tmp_path / "run"))
    found = json.loads(done.stdout)
    assert found["requests"] == kept["requests"]
    assert found["latency"]["ttft_s"]["p90"]["value"] == pytest.approx(
        kept["latency"]["ttft_s"]["p90"]["value"], rel=0.005
    )
    assert "summary_only = true" in (tmp_path / "run" / "scenario.toml").read_text()
    assert json.loads(run_cli("simulate", str(tmp_path / "run"), "--json").stdout) == found
