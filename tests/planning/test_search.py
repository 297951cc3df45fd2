"""The bounded search finds what simulating everything finds."""

import pytest

from simulator.catalog.models import load_model
from simulator.errors import InputError
from simulator.planning.loads import Loads
from simulator.planning.options import PlanOptions
from simulator.planning.search import ChipSearch, needed_replicas, with_spares
from simulator.results.plan import Provisioning, Target, Targets
from simulator.run.scenario import load_scenario

SCENARIO = "llama-3-8b-azure-chat"


def searcher(chip, *, qps=300.0, model="llama-3-8b", changes=(), provisioning=None, **options):
    scenario = load_scenario(SCENARIO, [f"model={model}", *changes])
    small = {"requests": 300, "batch_limits": (16, 64), "token_budgets": (1024, 4096), "max_chips": 4, "max_stages": 2}
    chosen = PlanOptions.model_validate(small | options)
    loads = Loads(scenario, 1, chosen.requests)
    return ChipSearch(load_model(model), chip, scenario, chosen, loads, provisioning or Provisioning(qps=qps))


def both(ttft_s, tpot_s, percentile=95):
    return Targets(
        limits=(
            Target(metric="ttft_s", limit_s=ttft_s, percentile=percentile),
            Target(metric="tpot_s", limit_s=tpot_s, percentile=percentile),
        )
    )


CASES = {
    "one GPU or several": ("h100-sxm", {}),
    "PCIe": ("l4", {"qps": 20.0}),
    "torus and its layouts": ("tpu-v5e", {"precisions": ("bf16", "w8a16kv8")}),
    "experts": (
        "h100-sxm",
        {
            "model": "qwen3-30b-a3b",
            "requests": 200,
            "changes": ["engine.max_num_seqs=16", "engine.max_num_batched_tokens=1024"],
            "batch_limits": (8,),
            "token_budgets": (1024,),
        },
    ),
    "spares count": (
        "l40s",
        {"provisioning": Provisioning(qps=30.0, spare_replicas=2, failed_fraction=0.1, peak_to_mean=1.5)},
    ),
    "rejections": ("l4", {"changes": ["engine.max_model_len=2000"], "qps": 20.0}),
}


@pytest.mark.parametrize("case", CASES)
def test_search_equals_brute_force(case):
    chip, options = CASES[case]
    one = searcher(chip, **options)
    for targets in (both(2.0, 0.1), both(0.4, 0.03), both(0.05, 0.005), Targets()):
        answer = one.search(targets)
        every = one.exhaustive(targets)
        assert [f.rank for f in every[:1]] == [f.rank for f in answer.found[:1]]
        by_order = {f.order: f for f in every}
        assert all(by_order[f.order].rank == f.rank for f in answer.found)
        assert (every == []) == (answer.found == ())
        for most in {f.chips + more for f in every for more in (-1, 0)}:
            limited = one.search(targets, most).found[:1]
            assert [f.rank for f in limited] == [f.rank for f in every[:1] if f.chips <= most]


def test_without_limits_every_request_must_be_served():
    """Web-agent contexts fit on some limits of a slice and not on others."""
    one = searcher(
        "tpu-v5e",
        model="llama-3-70b",
        changes=["traffic.mix=web-agent", "engine.max_model_len=0"],
        precisions=("w4a16kv4",),
        slices=("tpu-v5e:2x4",),
        token_budgets=(512, 8192),
    )
    answer = one.search(Targets())
    assert [f.rank for f in answer.found[:1]] == [f.rank for f in one.exhaustive(Targets())[:1]]
    assert searcher("l4", changes=["engine.max_model_len=2000"]).search(Targets()).found == ()


def test_every_deployment_is_accounted_for():
    one = searcher("tpu-v5e")
    answer = one.search(both(1.0, 0.05))
    simulated = sum(entry.bench.simulations > 0 for entry in one.opened)
    assert one.considered == one.illegal + one.unfit + answer.pruned_by_latency + answer.pruned_by_cost + simulated
    assert answer.pruned_by_cost > 0
    assert simulated > 0


def test_impossible_targets_are_refused_without_a_simulation():
    one = searcher("h100-sxm")
    answer = one.search(both(1e-3, 1e-4))
    assert answer.found == ()
    assert sum(entry.bench.simulations for entry in one.opened) == 0
    assert answer.pruned_by_latency == one.considered - one.illegal - one.unfit


def test_least_scale_is_the_edge_of_what_an_idle_replica_does():
    one = searcher("h100-sxm")
    targets = both(1e-3, 1.0)
    scale = one.least_scale(targets, ("ttft_s",))
    assert scale > 1
    assert one.search(targets.scaled(scale * 1.001, ("ttft_s",))).found
    assert not one.exhaustive(targets.scaled(scale * 0.99, ("ttft_s",)))


def test_a_chip_too_small_says_why():
    one = searcher("l4", model="llama-3-70b")
    assert one.sites == []
    assert "leave no KV cache on l4:" in one.why_not()


def test_a_chip_without_a_published_rate_says_which():
    one = searcher("tpu-7x", precisions=("int8",))
    assert one.sites == []
    assert "tpu-7x: compute.int8 is not published" in one.why_not()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["traffic.arrival={process='closed', concurrency=4}"],
            "process = 'closed': a plan needs arrivals with a rate",
        ),
        (["traffic.arrival={process='offline'}"], "process = 'offline'"),
    ],
)
def test_traffic_without_a_rate_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        searcher("h100-sxm", changes=changes)


def test_replicas_are_whole_and_survive_failures():
    p = Provisioning(qps=100.0, peak_to_mean=2.0, headroom_fraction=0.0, spare_replicas=1, failed_fraction=0.25)
    assert needed_replicas(p, 10.0) == 20
    assert needed_replicas(p, 9.99) == 21
    assert with_spares(p, 20) == 28
    assert with_spares(p, 3) == 5
