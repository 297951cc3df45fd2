"""Whole runs on real deployments: reproducible to the byte, whatever the number of workers."""

from dataclasses import replace

import numpy as np
import pytest

from simulator.results import read_result, summary_json, write_result
from simulator.run import load_scenario, run_scenario
from simulator.run.simulate import figures

SMALL = ["traffic.n_requests=1500"]
NAME = "llama-3-8b-azure-chat"


@pytest.fixture(scope="module")
def run():
    return run_scenario(load_scenario(NAME, [*SMALL, "replicas=2", "traffic.arrival.rate_per_s=25"]))


def contents(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_running_a_results_own_scenario_gives_the_same_bytes(run, tmp_path):
    write_result(run.result, tmp_path / "one")
    again = run_scenario(load_scenario(str(tmp_path / "one")))
    write_result(again.result, tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    by_file = run_scenario(load_scenario(str(tmp_path / "one" / "scenario.toml")))
    assert by_file.summary == run.summary


def test_another_seed_is_recorded_and_changes_the_requests(run, tmp_path):
    other = run_scenario(run.resolved.scenario, seed=7)
    assert other.summary.seed == other.result.seed == other.result.scenario["run"]["seed"] == 7
    assert not np.array_equal(other.result.requests["arrival_s"], run.result.requests["arrival_s"])
    write_result(other.result, tmp_path / "seven")
    assert run_scenario(load_scenario(str(tmp_path / "seven"))).summary == other.summary


@pytest.mark.parametrize("workers", [2, 5])
def test_workers_do_not_change_a_result(run, workers):
    other = run_scenario(run.resolved.scenario, workers=workers)
    assert summary_json(other.summary) == summary_json(run.summary)
    for name, column in run.result.requests.items():
        np.testing.assert_array_equal(other.result.requests[name], column)


def test_nothing_in_a_result_names_a_folder_or_a_time(run, tmp_path):
    write_result(run.result, tmp_path / "named-folder")
    for file, data in contents(tmp_path / "named-folder").items():
        assert b"named-folder" not in data, file
        assert str(tmp_path).encode() not in data, file
    assert set(read_result(tmp_path / "named-folder").versions) >= {"chipseconds", "numpy", "duckdb"}


def test_round_robin_replicas_are_independent_runs_of_their_share(run):
    alone = run_scenario(run.resolved.scenario.model_copy(update={"replicas": 1}))
    assert (run.result.requests["replica"] == np.arange(1500) % 2).all()
    assert alone.summary.load.load == pytest.approx(2 * run.summary.load.load, rel=0.1)


def test_seeds_give_between_seed_intervals_around_their_mean(run, tmp_path):
    many = run_scenario(run.resolved.scenario, seeds=3)
    write_result(many.result, tmp_path / "many")
    assert run_scenario(load_scenario(str(tmp_path / "many"))).summary == many.summary
    replications = many.summary.replications
    assert replications.seeds == [1, 2, 3]
    assert sum(replications.statuses.values()) == 3
    figure = replications.figures["latency.ttft_s.p50"]
    singles = [run_scenario(run.resolved.scenario, seed=s).summary.latency.ttft_s.p50.value for s in (1, 2, 3)]
    assert figure.mean == pytest.approx(np.mean(singles))
    assert figure.low < figure.mean < figure.high
    assert many.summary.model_copy(update={"replications": None}) == run.summary
    assert set(figures(run.summary)) <= set(replications.figures) | {"load.backlog_trend_p"}


def test_ideal_efficiency_is_never_slower_and_meets_its_own_ideal_bound(run):
    ideal = run_scenario(
        run.resolved.scenario.model_copy(update={"efficiency": load_scenario(NAME, ["efficiency=ideal"]).efficiency})
    )
    assert ideal.summary.latency.e2e_s.mean.value < run.summary.latency.e2e_s.mean.value
    assert ideal.summary.load.capacity_per_s > run.summary.load.capacity_per_s
    assert ideal.resolved.cost.dense_s == pytest.approx(run.resolved.ideal_cost.dense_s)


def test_a_table_of_steps_accounts_for_all_busy_time(run):
    fractions = run.summary.breakdown.fractions
    assert {"matmul", "head", "attention_decode", "attention_prefill", "idle"} <= set(fractions)
    assert sum(fractions.values()) == pytest.approx(1, rel=1e-9)


def test_dense_flops_are_proportional_to_tokens(run):
    # Model FLOPs without recomputation rest on this.
    flops = run.resolved.cost.dense_flops
    np.testing.assert_allclose(flops, flops[1] * np.arange(len(flops)), rtol=1e-12)


def test_more_memory_traffic_does_not_hide_in_mbu(run):
    used = run.summary.utilisation
    assert 0 < used.mfu < 1
    assert 0 < used.mbu < 1
    slower = replace(run.resolved.deployment.eff, hbm=0.4)
    changed = run.resolved.scenario.efficiency.model_copy(update={"hbm": slower.hbm})
    other = run_scenario(run.resolved.scenario.model_copy(update={"efficiency": changed}))
    assert other.summary.utilisation.mbu_busy < used.mbu_busy
