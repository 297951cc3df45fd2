"""Pipelines and attention ranks through a whole run: scenario keys, summary and conservation."""

import pytest

from simulator.errors import InfeasibleError, InputError
from simulator.run import load_scenario, run_scenario
from simulator.run.resolve import resolve

COMMON = ("traffic.n_requests=400", "traffic.arrival.rate_per_s=4.0", "engine.max_num_batched_tokens=2048")
PIPELINE = (*COMMON, "model=llama-3-70b", "slice=h100-sxm:2x8", "sharding.pp=2")
RANKS = (*COMMON, "model=deepseek-v3", "slice=h200-sxm:8", "precision=fp8", "sharding.dp=8", "sharding.ep=8")


def summary(*overrides):
    return run_scenario(load_scenario("llama-3-8b-azure-chat", overrides)).summary


def test_a_pipeline_runs():
    found = summary(*PIPELINE)
    assert found.deployment.sharding == "tp=8 pp=2"
    assert found.deployment.chips_per_replica == 16
    assert found.ledger.relative_error == pytest.approx(0, abs=1e-9)
    assert sum(found.breakdown.fractions.values()) == pytest.approx(1, rel=1e-9)
    assert found.requests.finished == 400
    one = summary(*PIPELINE, "slice=h100-sxm:8", "sharding.pp=1")
    # Twice the chips: less than twice the throughput, and the work of a query costs more chip-time, not less.
    assert one.load.capacity_per_s < found.load.capacity_per_s < 2 * one.load.capacity_per_s
    assert found.chip_seconds_per_query.busy > one.chip_seconds_per_query.busy
    assert found.occupancy.kv_capacity_tokens > 2 * one.occupancy.kv_capacity_tokens


def test_attention_ranks_run():
    found = summary(*RANKS)
    assert found.deployment.sharding == "tp=1 dp=8 ep=8"
    assert found.ledger.relative_error == pytest.approx(0, abs=1e-9)
    fractions = found.breakdown.fractions
    assert sum(fractions.values()) == pytest.approx(1, rel=1e-9)
    assert fractions["padding"] > 0
    assert fractions["imbalance"] == 0
    assert found.occupancy.kv_capacity_tokens % 8 == 0
    assert 0 < found.occupancy.mean_kv_fraction < 1
    assert found.chip_seconds_per_query.ideal < found.chip_seconds_per_query.busy


def test_uneven_experts_slow_a_run_by_their_seed():
    skewed = [summary(*RANKS, "deployment.expert_skew=1.5", f"run.seed={seed}") for seed in (1, 1, 2)]
    even = summary(*RANKS)
    assert skewed[0].breakdown.fractions["imbalance"] > 0
    assert skewed[0].latency.tpot_s.p50.value > even.latency.tpot_s.p50.value
    assert skewed[0] == skewed[1]
    assert skewed[0].latency != skewed[2].latency


def test_least_loaded_routing_is_followed():
    by_turns, by_load = summary(*RANKS), summary(*RANKS, "engine.rank_routing=least-loaded")
    assert by_load.latency.ttft_s != by_turns.latency.ttft_s


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("sharding.dp=2",), "replicas = 2"),
        (("engine.rank_routing=least-loaded",), r"sharding\.dp = 1"),
        ((*PIPELINE, "sharding.tp=4"), "every chip must be used"),
        ((*PIPELINE, "sharding.ep=8"), "has none"),
        ((*RANKS, "slice=h200-sxm:2x8", "sharding.pp=2"), "inside 2 pipeline stages"),
    ],
)
def test_what_cannot_be_is_refused(overrides, message):
    with pytest.raises(InputError, match=message):
        resolve(load_scenario("llama-3-8b-azure-chat", overrides))


def test_uneven_experts_of_a_dense_model_are_refused():
    with pytest.raises(InputError, match=r"engine\.expert_skew\.mean = 2"):
        summary("traffic.n_requests=50", "deployment.expert_skew=2")


def test_runs_in_blocks_know_one_part_only():
    with pytest.raises(InputError, match="summary_only follows replicas of one part"):
        summary(*PIPELINE, "run.summary_only=true")


def test_what_does_not_fit_is_said():
    with pytest.raises(InfeasibleError, match="tightest stage"):
        resolve(load_scenario("llama-3-8b-azure-chat", [*PIPELINE, "model=llama-3.1-405b", "slice=h100-sxm:8"]))
