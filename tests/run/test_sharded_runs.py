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


DRAFTS = "num_speculative_tokens=2, acceptance_rate=0.8}"
DRAFTERS = {
    "mtp": f'{{method="mtp", {DRAFTS}',
    "eagle": f'{{method="eagle", {DRAFTS}',
    "medusa": f'{{method="medusa", {DRAFTS}',
    "ngram": f'{{method="ngram", {DRAFTS}',
    "a draft model": f'{{method="draft_model", model="qwen3-0.6b", precision="bf16", {DRAFTS}',
    "its own slice": f'{{method="draft_model", model="qwen3-0.6b", precision="bf16", slice="l4:1", {DRAFTS}',
}


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_ranks_speculate(drafter):
    found, plain = summary(*RANKS, f"engine.speculation={DRAFTERS[drafter]}"), summary(*RANKS)
    assert found.ledger.relative_error == pytest.approx(0, abs=1e-9)
    assert sum(found.breakdown.fractions.values()) == pytest.approx(1, rel=1e-9)
    assert found.requests.finished == 400
    mean = 1 + 0.8 + 0.64
    assert 0.96 * mean < found.speculation.tokens_per_pass < mean
    assert found.latency.tpot_s.p50.value < 0.75 * plain.latency.tpot_s.p50.value
    assert found.deployment.chips_per_replica == (16 if drafter == "its own slice" else 8)
    assert found.breakdown.fractions["draft"] > 0
    # Drafter and target share the memory of a rank, unless one has a slice of its own or no weights.
    held = found.occupancy.kv_capacity_tokens / plain.occupancy.kv_capacity_tokens
    assert held > 0.95 if drafter in {"its own slice", "ngram"} else held < 1


def test_a_draft_model_may_lie_on_one_chip_of_a_rank():
    ranks = (*COMMON, "model=qwen3-30b-a3b", "slice=h100-sxm:4", "sharding.tp=2", "sharding.dp=2", "sharding.ep=4")

    def drafted(model, size):
        text = f'engine.speculation={{method="draft_model", model="{model}", {size}{DRAFTS}'
        return resolve(load_scenario("llama-3-8b-azure-chat", [*ranks, text]))

    gains = {}
    for model in ("qwen3-0.6b", "qwen3-8b"):
        alone, spread, default = (
            drafted(model, size and f"draft_tensor_parallel_size={size}, ") for size in ("1", "2", "")
        )
        assert spread.settings.num_kv_blocks == default.settings.num_kv_blocks > alone.settings.num_kv_blocks
        one, all_ = (found.settings.speculation.cost.drafting_s(2, B=4, S=4000) for found in (alone, spread))
        gains[model] = one / all_
    # Two chips read a large model's weights nearly twice as fast; a small one loses to the exchange what it gains.
    assert 0.9 < gains["qwen3-0.6b"] < 1.2 < gains["qwen3-8b"] < 2
    with pytest.raises(InputError, match="on one chip, or on all 2 of an attention rank"):
        drafted("qwen3-0.6b", "draft_tensor_parallel_size=4, ")


def test_drafts_that_always_fail_and_cost_nothing_cost_verification_alone():
    """Each pass gives one token, as without drafts, and takes as long as a step of three tokens a sequence."""
    text = 'engine.speculation={method="ngram", num_speculative_tokens=2, acceptance_rate=0.0, host_sequence_s=0.0}'
    found, plain = summary(*RANKS, text), summary(*RANKS)
    assert found.speculation.tokens_per_pass == 1
    assert found.breakdown.fractions["draft"] == 0
    assert found.latency.tpot_s.p50.value > plain.latency.tpot_s.p50.value
    assert found.speculation.rejected_tokens == found.speculation.drafted_tokens


def test_least_loaded_routing_is_followed():
    by_turns, by_load = summary(*RANKS), summary(*RANKS, "engine.rank_routing=least-loaded")
    assert by_load.latency.ttft_s != by_turns.latency.ttft_s


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            (*PIPELINE, 'engine.speculation={method="ngram", num_speculative_tokens=2, acceptance_rate=0.5}'),
            "last stage's verdict",
        ),
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
